"""What liger-kernel's preference losses share: their operands, and the numbers beside the loss."""

import torch
from torch import Tensor

from .._core import checks
from .._torch import partitioned
from ..losses import TokenLogProbs, token_log_probs


def check(order: str, _input: Tensor, lin_weight: Tensor, target: Tensor) -> None:
    """`order`: of the module's arguments, for whoever has exchanged them."""
    checks.dense(_input=_input, lin_weight=lin_weight, target=target)
    shape = checks.shape
    if _input.dim() == 3 and lin_weight.dim() == 2 and target.shape == _input.shape[:2]:
        return
    swapped = _input.dim() == 2 and lin_weight.dim() == 3
    raise ValueError(
        f"_input must be (sequences, length, D), lin_weight (V, D) and target (sequences, length): "
        f"got _input {shape(_input)}, lin_weight {shape(lin_weight)} and target {shape(target)}"
        + (f"; _input and lin_weight are swapped: the order here is {order}" if swapped else "")
    )


def averaged(log_probs: TokenLogProbs, average: bool) -> TokenLogProbs:
    """Where `average`: each token's divided by its sequence's length, so that sums are means (0 for
    a sequence without a token that counts)."""
    if not average:
        return log_probs
    lengths = log_probs.lengths().clamp(min=1)[..., None]
    return TokenLogProbs(log_probs.log_probs / lengths, log_probs.mask)


def reference_sums(
    use_ref_model: bool,
    ref: tuple[Tensor | None, Tensor | None, Tensor | None],
    target: Tensor,
    ignore_index: int,
    average: bool,
    like: TokenLogProbs,
) -> Tensor:
    """Of each sequence, under the reference model: its input, weight and bias. 0 without one."""
    ref_input, ref_weight, ref_bias = ref
    given = ref_input is not None or ref_weight is not None or ref_bias is not None
    if not use_ref_model:
        if given:
            raise ValueError(
                "use_ref_model is False, so ref_input, ref_weight and ref_bias would not be used: "
                "leave them out, or pass use_ref_model=True"
            )
        return like.log_probs.new_zeros(like.log_probs.shape[0])
    if ref_input is None or ref_weight is None:
        missing = "ref_input" if ref_input is None else "ref_weight"
        raise ValueError(
            f"use_ref_model is True, and {missing} is None: pass the reference model's hidden "
            f"states and classifier, or use_ref_model=False"
        )
    with torch.no_grad():
        of_ref = token_log_probs(ref_input, ref_weight, target, ref_bias, ignore_index=ignore_index)
        return averaged(of_ref, average).sum()


@torch.no_grad()
def logit_sums(_input: Tensor, lin_weight: Tensor, bias: Tensor | None) -> Tensor:
    """The sum of the logits of each sequence, of all its positions and classes, (sequences). The
    sum of a product is the product of the sums, so no logit is made."""

    def total(t: Tensor) -> Tensor:
        return partitioned.gathered(t.sum(0, dtype=torch.promote_types(t.dtype, torch.float32)))

    of_classes = total(lin_weight)
    # No matrix product, which autocast would make in 16 bits.
    sums = (_input.sum(1, dtype=of_classes.dtype) * of_classes).sum(-1)
    return sums if bias is None else sums + _input.shape[1] * total(bias)

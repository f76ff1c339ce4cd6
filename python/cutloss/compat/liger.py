"""The fused linear cross-entropy and JSD of liger-kernel 0.8: its names, its order of arguments::

    from cutloss.compat.liger import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(softcap=30.0)(lm_head.weight, hidden, labels)

The module takes (weight, input, target), the function (input, weight, target), as theirs do.
Other than with theirs:

- targets outside the vocabulary are errors (on CUDA NaN), and V may be anything;
- sums of gradients are fp32 whatever accum_dtype says; fp64 is refused;
- outputs beside the loss carry no gradient, as theirs, and return_z_loss and use_token_scaling
  cost what a per-token result costs (see return_lse of :func:`cutloss.linear_cross_entropy`).

As theirs, and not as cutloss and PyTorch: the mean over no token at all is 0.
"""

import dataclasses

import torch
from torch import Tensor, nn

from .._core import checks
from ..functional import linear_cross_entropy
from ._liger_jsd import LigerFusedLinearJSD, LigerFusedLinearJSDLoss

__all__ = [
    "CrossEntropyOutput",
    "LigerFusedLinearCrossEntropyLoss",
    "LigerFusedLinearJSD",
    "LigerFusedLinearJSDLoss",
    "liger_fused_linear_cross_entropy",
]


@dataclasses.dataclass
class CrossEntropyOutput:
    """Returned in place of the loss where anything beside it is asked for."""

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


def liger_fused_linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ce_weight: Tensor | None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    accum_dtype: torch.dtype | None = None,
    use_token_scaling: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    chunk_mem_const: int = 1,
) -> Tensor | CrossEntropyOutput:
    """The loss of ``input @ weight.T + bias``, or a :class:`CrossEntropyOutput`.

    :param input: (N, D).
    :param weight: (V, D).
    :param target: (N).
    :param bias: (V).
    :param ce_weight: Class weights, (V): cutloss's ``weight``.
    :param ignore_index: As cutloss's.
    :param lse_square_scale: cutloss's ``z_loss``: is part of the loss.
    :param label_smoothing: As cutloss's.
    :param reduction: "mean", "sum" or "none".
    :param softcap: As cutloss's.
    :param return_z_loss: Also return that part, without a gradient, reduced as the loss.
    :param accum_dtype: Not needed: fp32. torch.float64 raises, unless the inputs are.
    :param use_token_scaling: Weigh each token's loss by its target's probability, through which no
        gradient flows.
    :param return_token_accuracy: Also return the share of tokens that count whose target has the
        largest logit; with "none" 1 or 0 for each token.
    :param return_predicted_tokens: Also return the largest logit's index of each token, -1 where
        it is ignored.
    :param chunk_mem_const: Not needed: for memory there is cutloss's ``max_workspace``.
    """
    _shapes(input, weight, target, bias)
    checks.choice("reduction", reduction, checks.REDUCTIONS)
    checks.flags(
        return_z_loss=return_z_loss,
        use_token_scaling=use_token_scaling,
        return_token_accuracy=return_token_accuracy,
        return_predicted_tokens=return_predicted_tokens,
    )
    _accumulator(accum_dtype, input.dtype)
    checks.z_loss(lse_square_scale)
    valid = target != ignore_index
    operands = (input, weight, target, bias)
    logits = dict(ignore_index=ignore_index, softcap=softcap)
    losses = dict(weight=ce_weight, label_smoothing=label_smoothing)
    wants_predictions = return_token_accuracy or return_predicted_tokens
    result = linear_cross_entropy(
        *operands,
        **logits,
        **losses,
        reduction="none" if use_token_scaling else reduction,
        z_loss=0.0 if use_token_scaling else lse_square_scale,
        return_lse=return_z_loss or use_token_scaling,
        return_predictions=wants_predictions,
    )
    loss, *rest = result if isinstance(result, tuple) else (result,)
    predictions = rest.pop() if wants_predictions else None
    penalty = lse_square_scale * rest[0].square() if rest else None  # (N)

    if use_token_scaling:
        nll = loss
        if ce_weight is not None or label_smoothing != 0:
            with torch.no_grad():
                nll = linear_cross_entropy(*operands, **logits, reduction="none")
        scale = torch.where(valid, torch.exp(-nll.detach()), 0.0)
        penalty = penalty * scale
        loss = _reduced(loss * scale, valid, reduction, target, ce_weight)
        loss = loss + _reduced(penalty, valid, reduction)
    elif reduction == "mean":
        loss = torch.where(valid.any(), loss, 0.0)
    if not (return_z_loss or wants_predictions):
        return loss

    output = CrossEntropyOutput(loss)
    if return_z_loss:
        output.z_loss = _reduced(penalty.detach(), valid, reduction)
    if return_token_accuracy:
        right = ((predictions == target) & valid).float()
        by = "mean" if reduction != "none" else "none"
        output.token_accuracy = _reduced(right, valid, by)
    if return_predicted_tokens:
        output.predicted_tokens = predictions
    return output


def _shapes(input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> None:
    for name, t in dict(input=input, weight=weight, target=target).items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
        checks.layout(name, t)
    shape = checks.shape
    fits = weight.dim() == 2 and input.dim() >= 1 and input.shape[-1] == weight.shape[1]
    if fits and target.shape == input.shape[:-1]:
        return
    swapped = fits and target.shape == weight.shape[:1]
    raise ValueError(
        f"input must be (N, D), weight (V, D) and target (N): got input {shape(input)}, weight "
        f"{shape(weight)} and target {shape(target)}"
        + (
            "; input and weight are swapped: the function takes (input, weight, target), the "
            "module (weight, input, target)"
            if swapped
            else ""
        )
    )


def _reduced(
    t: Tensor,
    valid: Tensor,
    reduction: str,
    target: Tensor | None = None,
    ce_weight: Tensor | None = None,
) -> Tensor:
    """`t` is 0 where a token is ignored. The mean is over tokens, or the sum of their weights."""
    if reduction != "mean":
        return t if reduction == "none" else t.sum()
    over = valid.to(t.dtype)
    if ce_weight is not None:
        inside = target.clamp(0, ce_weight.numel() - 1).long()
        over = over * ce_weight.to(t.dtype)[inside]
    return t.sum() / torch.where(valid.any(), over.sum(), 1.0)


def _accumulator(accum_dtype: torch.dtype | None, dtype: torch.dtype) -> None:
    _accumulator_type(accum_dtype)
    if accum_dtype == torch.float64 and dtype != torch.float64:
        raise NotImplementedError(
            f"accum_dtype is torch.float64 and input {dtype}: cutloss accumulates in float32 "
            f"unless its inputs are float64; leave accum_dtype out, or convert the inputs"
        )


def _accumulator_type(accum_dtype: torch.dtype | None) -> None:
    if accum_dtype is not None and not isinstance(accum_dtype, torch.dtype):
        raise TypeError(f"accum_dtype must be a torch.dtype or None, got {accum_dtype!r}")


class LigerFusedLinearCrossEntropyLoss(nn.Module):
    """The same as a module; called with (weight, input, target, bias), in this order."""

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ):
        super().__init__()
        checks.choice("reduction", reduction, checks.REDUCTIONS)
        checks.label_smoothing(label_smoothing)
        checks.softcap(softcap)
        checks.z_loss(lse_square_scale)
        checks.ignore_index(ignore_index)
        _accumulator_type(accum_dtype)
        self.register_buffer("ce_weight", ce_weight, persistent=False)
        self.ignore_index = ignore_index
        self.lse_square_scale = lse_square_scale
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.softcap = softcap
        self.return_z_loss = return_z_loss
        self.accum_dtype = accum_dtype
        self.use_token_scaling = use_token_scaling
        self.return_token_accuracy = return_token_accuracy
        self.return_predicted_tokens = return_predicted_tokens

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor | CrossEntropyOutput:
        return liger_fused_linear_cross_entropy(
            _input,
            lin_weight,
            target,
            bias,
            self.ce_weight,
            self.ignore_index,
            self.lse_square_scale,
            self.label_smoothing,
            self.reduction,
            self.softcap,
            self.return_z_loss,
            self.accum_dtype,
            self.use_token_scaling,
            self.return_token_accuracy,
            self.return_predicted_tokens,
        )

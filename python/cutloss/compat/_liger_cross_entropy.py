"""liger-kernel's fused linear cross-entropy: the function, the module, and what a causal language
model of Transformers calls."""

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._core import checks
from ..functional import linear_cross_entropy
from ._liger_outputs import CrossEntropyOutput, output, parts, reduced, zero_for_nothing


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
    loss, lse, predictions = parts(result, return_z_loss or use_token_scaling, wants_predictions)
    penalty = None if lse is None else lse_square_scale * lse.square()  # (N)

    if use_token_scaling:
        nll = loss
        if ce_weight is not None or label_smoothing != 0:
            with torch.no_grad():
                nll = linear_cross_entropy(*operands, **logits, reduction="none")
        scale = torch.where(valid, torch.exp(-nll.detach()), 0.0)
        penalty = penalty * scale
        loss = reduced(loss * scale, valid, reduction, target, ce_weight)
        loss = loss + reduced(penalty, valid, reduction)
    elif reduction == "mean":
        loss = zero_for_nothing(loss, valid)
    if not (return_z_loss or wants_predictions):
        return loss
    return output(
        loss, target, valid, reduction, penalty if return_z_loss else None, predictions,
        return_token_accuracy, return_predicted_tokens,
    )  # fmt: skip


def _shapes(input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> None:
    checks.dense(input=input, weight=weight, target=target)
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


# Read here, once: torch.compile does not trace inspect.
_OPTIONS = frozenset(inspect.signature(liger_fused_linear_cross_entropy).parameters)


def LigerForCausalLMLoss(  # a function, under the name that it has there
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor | None,
    hidden_size: int,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    final_logit_softcapping: float | None = None,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    **kwargs: object,
) -> Tensor | CrossEntropyOutput:
    """``liger_kernel.transformers.model.loss_utils.LigerForCausalLMLoss``: position t of the hidden
    states is scored against label t + 1.

    Beyond its own, it takes the options of :func:`liger_fused_linear_cross_entropy` by name (bias,
    label_smoothing, lse_square_scale, ...). Anything else is accepted and not used, as with theirs:
    models pass on all that they are called with.

    :param hidden_states: (..., length, D).
    :param lm_head_weight: (V, D).
    :param labels: (..., length), moved to where hidden_states are. Not used where shift_labels are
        given.
    :param hidden_size: D.
    :param num_items_in_batch: The loss is the sum over this number, at least 1; without it the mean
        over the tokens that count, 0 where there is none.
    :param ignore_index: Labels that do not count.
    :param shift_labels: Labels that are shifted already.
    :param final_logit_softcapping: cutloss's ``softcap``.
    :param return_token_accuracy: Also return the share of tokens that count whose target has the
        largest logit.
    :param return_predicted_tokens: Also return the largest logit's index of each token, of all
        sequences in a row, -1 where it is ignored.
    """
    given = {name: value for name, value in kwargs.items() if name in _OPTIONS}
    if given.get("return_z_loss"):
        raise NotImplementedError(
            "LigerForCausalLMLoss has no place for the z-loss in what it returns, got "
            "return_z_loss=True: leave it out, or call liger_fused_linear_cross_entropy"
        )
    checks.dense(hidden_states=hidden_states)
    if hidden_states.shape[-1] != hidden_size:
        raise ValueError(
            f"hidden_states must be (..., hidden_size), got {checks.shape(hidden_states)} and "
            f"hidden_size {hidden_size}"
        )
    if shift_labels is None:
        checks.dense(labels=labels)
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    result = liger_fused_linear_cross_entropy(
        hidden_states.reshape(-1, hidden_size),
        lm_head_weight,
        shift_labels.reshape(-1).to(hidden_states.device),
        ignore_index=ignore_index,
        reduction="mean" if num_items_in_batch is None else "sum",
        softcap=final_logit_softcapping,
        return_token_accuracy=return_token_accuracy,
        return_predicted_tokens=return_predicted_tokens,
        **given,
    )
    if num_items_in_batch is None:
        return result
    items = checks.num_items(num_items_in_batch)
    if isinstance(result, CrossEntropyOutput):
        result.loss = result.loss / items
        return result
    return result / items

"""What liger-kernel's cross-entropies return beside the loss, of logits and of hidden states."""

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass
class CrossEntropyOutput:
    """Returned in place of the loss where anything beside it is asked for."""

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


def parts(
    result: Tensor | tuple[Tensor, ...], has_lse: bool, has_predictions: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, lse and predictions that cutloss returned."""
    every = result if isinstance(result, tuple) else (result,)
    return every[0], every[1] if has_lse else None, every[-1] if has_predictions else None


def zero_for_nothing(loss: Tensor, valid: Tensor) -> Tensor:
    """The mean over no token is 0 with Liger, NaN with cutloss and PyTorch."""
    return torch.where(valid.any(), loss, 0.0)


def reduced(
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


def output(
    loss: Tensor,
    target: Tensor,
    valid: Tensor,
    reduction: str,
    penalty: Tensor | None,
    predictions: Tensor | None,
    return_token_accuracy: bool,
    return_predicted_tokens: bool,
) -> CrossEntropyOutput:
    """`penalty`: the z-loss of each token, where it is to be returned."""
    result = CrossEntropyOutput(loss)
    if penalty is not None:
        result.z_loss = reduced(penalty.detach(), valid, reduction)
    if return_token_accuracy:
        right = ((predictions == target) & valid).float()
        by = "mean" if reduction != "none" else "none"
        result.token_accuracy = reduced(right, valid, by)
    if return_predicted_tokens:
        result.predicted_tokens = predictions
    return result

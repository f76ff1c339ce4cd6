"""The loss as a weighted sum of per-row outputs; written once, for every way to compute them.

    loss = sum over rows of  nll * n  +  lse * l  +  lse^2 * q  +  zbar * b

Label smoothing is that of F.cross_entropy: with eps, class weights w and W = sum(w),
(1 - eps) * w[target] * nll + eps * (W * lse / V - zbar), where zbar = sum_v w[v] z[v] / V.
"""

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass
class Weighting:
    """What the user says about how tokens count."""

    reduction: str = "mean"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    weight: Tensor | None = None  # (V)
    token_weight: Tensor | None = None  # (rows)


@dataclasses.dataclass
class Terms:
    """(rows) each, in the stat dtype; absent ones are zero. Zero at ignored rows."""

    nll: Tensor
    lse: Tensor | None = None
    lse_squared: Tensor | None = None
    zbar: Tensor | None = None
    undefined: Tensor | None = None  # one bool: the mean of nothing


@dataclasses.dataclass
class Rows:
    """Per-row outputs; what was not asked for may be empty."""

    nll: Tensor
    lse: Tensor
    entropy: Tensor
    zbar: Tensor
    argmax: Tensor


def terms(
    targets: Tensor, V: int, how: Weighting, ignore_index: int, stats: torch.dtype
) -> Terms:
    """`targets`: (rows), those of the rows of the loss."""
    valid = targets != ignore_index
    tokens = valid.to(stats)
    if how.token_weight is not None:
        tokens = torch.where(valid, how.token_weight.to(stats), 0.0)
    weighted = tokens
    if how.weight is not None:
        # Targets out of range are clamped here; the operator names them.
        weighted = tokens * how.weight.to(stats)[targets.clamp(0, V - 1).long()]

    undefined = None
    per_token = tokens
    if how.reduction == "mean":
        total = weighted.sum(dtype=torch.float64)
        undefined = total == 0
        # A mean of nothing is undefined, its gradients are zero.
        total = torch.where(undefined, 1.0, total).to(stats)
        per_token = tokens / total
        weighted = per_token if how.weight is None else weighted / total

    result = Terms(weighted, undefined=undefined)
    eps = how.label_smoothing
    if eps > 0:
        share = eps if how.weight is None else eps * how.weight.sum(dtype=torch.float64) / V
        result.nll = weighted * (1.0 - eps)
        result.lse = per_token * share
        result.zbar = per_token * -eps
    if how.z_loss > 0:
        # Class weights say nothing about the size of a row's logits: z-loss is a mean over tokens.
        over_tokens = per_token
        if how.reduction == "mean" and how.weight is not None:
            total = tokens.sum(dtype=torch.float64)
            over_tokens = tokens / torch.where(total == 0, 1.0, total).to(stats)
        result.lse_squared = over_tokens * how.z_loss
    return result


def per_row(t: Terms, rows: Rows) -> Tensor:
    loss = t.nll * rows.nll
    if t.lse is not None:
        loss = loss + t.lse * rows.lse
    if t.lse_squared is not None:
        loss = loss + t.lse_squared * rows.lse.square()
    if t.zbar is not None:
        loss = loss + t.zbar * rows.zbar
    return loss


def total(t: Terms, loss: Tensor) -> Tensor:
    """The sum of per-row losses, in a precision that does not matter."""
    return defined(t, loss.sum(dtype=torch.float64).to(loss.dtype))


def defined(t: Terms, loss: Tensor) -> Tensor:
    """NaN for the mean of nothing, as in PyTorch, with a gradient of zero."""
    return loss if t.undefined is None else torch.where(t.undefined, float("nan"), loss)

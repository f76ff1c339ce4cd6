"""The loss as a weighted sum of per-row outputs; written once, for every way to compute them.

    loss = sum over rows of  nll * n  +  lse * l  +  lse^2 * q  +  zbar * b

Label smoothing is that of F.cross_entropy: with eps, class weights w and W = sum(w),
(1 - eps) * w[target] * nll + eps * (W * lse / V - zbar), where zbar = sum_v w[v] z[v] / V.
The difference is taken as W * log_sum / V - zbar_centred, both relative to the row's largest logit
(lse = row_max + log_sum, zbar_centred = zbar - W * row_max / V): logits that all lie far from 0
have an lse and a zbar of that size, whose difference has lost its digits. As to derivatives row_max
is a constant, for the difference does not depend on it; so log_sum has that of lse, zbar_centred
that of zbar.

The operator loss_terms makes the coefficients in one step (src/core/loss_terms.h). `terms` makes
the same ones of PyTorch's own operators, where token weights carry a gradient, under torch.func,
and for impl="torch".
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor


# What loss_and_gradients takes by name, and its defaults.
WEIGHTS_OF_ROWS = {"mean": True, "label_smoothing": 0.0, "z_loss": 0.0}


@dataclasses.dataclass
class Weighting:
    """What the user says about how tokens count."""

    reduction: str = "mean"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    weight: Tensor | None = None  # (V)
    token_weight: Tensor | None = None  # (sequences, length)

    def in_words(self) -> str:
        return (
            f", reduction {self.reduction}, label_smoothing {self.label_smoothing}, z_loss "
            f"{self.z_loss}, weight {self.weight is not None}, token_weight "
            f"{self.token_weight is not None}"
        )

    def of_operator(self) -> dict[str, Any]:
        """What loss_and_gradients takes by name, but for what are its defaults."""
        said = {
            "mean": self.reduction == "mean",
            "label_smoothing": self.label_smoothing,
            "z_loss": self.z_loss,
        }
        if torch.compiler.is_compiling():
            return said
        return {name: value for name, value in said.items() if value != WEIGHTS_OF_ROWS[name]}

    def tensors(
        self, stats: torch.dtype, copy: bool = False
    ) -> tuple[Tensor | None, Tensor | None]:
        """Those of tokens and of classes, as the operators take them."""
        given = self.token_weight, self.weight
        return tuple([None if t is None else t.to(stats, copy=copy) for t in given])

    def changes_nothing(self) -> bool:
        """Whether the loss is nll as it is."""
        return (
            self.reduction == "none"
            and self.label_smoothing == 0
            and self.z_loss == 0
            and self.weight is None
            and self.token_weight is None
        )


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
    """Per-row outputs; what was not asked for may be empty, or absent."""

    nll: Tensor | None = None
    lse: Tensor | None = None
    log_sum: Tensor | None = None  # lse less the row's largest logit
    entropy: Tensor | None = None
    zbar_centred: Tensor | None = None
    argmax: Tensor | None = None


def of_rows(t: Tensor, shift: int) -> Tensor:
    """(rows): what lies where the targets do, (sequences, length)."""
    return t.reshape(-1) if shift == 0 else t[:, shift:].reshape(-1)


def unpacked(packed: Tensor) -> Terms:
    """Those that loss_terms made: (k, rows), of nll; with label smoothing of lse and zbar; with
    z-loss of lse^2."""
    nll, *rest = packed.unbind()
    result = Terms(nll)
    if len(rest) >= 2:
        result.lse, result.zbar, *rest = rest
    if rest:
        (result.lse_squared,) = rest
    return result


def terms(
    targets: Tensor, V: int, how: Weighting, shift: int, ignore_index: int, stats: torch.dtype
) -> Terms:
    """`targets`: (sequences, length)"""
    targets = of_rows(targets, shift)
    valid = targets != ignore_index
    tokens = valid.to(stats)
    if how.token_weight is not None:
        tokens = torch.where(valid, of_rows(how.token_weight, shift).to(stats), 0.0)
    weighted = tokens
    weight = None if how.weight is None else how.weight.to(stats)
    if weight is not None:
        # Targets out of range are clamped here; the operator names them.
        weighted = tokens * weight[targets.clamp(0, V - 1).long()]

    undefined = None
    per_token = over_tokens = tokens
    if how.reduction == "mean":
        total = weighted.sum(dtype=torch.float64)
        undefined = total == 0
        # A mean of nothing is undefined, its gradients are zero; those of the weights too, so nothing
        # is divided by zero on the way.
        total = torch.where(undefined, 1.0, total).to(stats)
        per_token = torch.where(undefined, 0.0, tokens / total)
        over_tokens = per_token
        if weight is not None:
            weighted = torch.where(undefined, 0.0, weighted / total)
            # Class weights say nothing about the size of a row's logits: z-loss is a mean over
            # tokens.
            total = tokens.sum(dtype=torch.float64)
            total = torch.where(total == 0, 1.0, total).to(stats)
            over_tokens = torch.where(undefined, 0.0, tokens / total)
        else:
            weighted = per_token

    result = Terms(weighted, undefined=undefined)
    eps = how.label_smoothing
    if eps > 0:
        share = eps if weight is None else eps * weight.sum(dtype=torch.float64) / V
        result.nll = weighted * (1.0 - eps)
        result.lse = per_token * share
        result.zbar = per_token * -eps
    if how.z_loss > 0:
        result.lse_squared = over_tokens * how.z_loss
    return result


def loss(t: Terms, rows: Rows, reduction: str) -> Tensor:
    """The loss, per row where nothing is reduced."""
    loss = t.nll * rows.nll
    if t.lse is not None:
        loss = loss + t.lse * rows.log_sum
    if t.lse_squared is not None:
        loss = loss + t.lse_squared * rows.lse.square()
    if t.zbar is not None:
        loss = loss + t.zbar * rows.zbar_centred
    if reduction == "none":
        return loss
    # In a precision that does not matter. The mean of nothing is NaN, as in PyTorch.
    total = loss.sum(dtype=torch.float64).to(loss.dtype)
    return total if t.undefined is None else torch.where(t.undefined, float("nan"), total)

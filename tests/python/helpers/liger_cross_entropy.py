"""liger-kernel's cross-entropy losses as they document them, with stored logits."""

import inspect

import torch
import torch.nn.functional as F
from helpers import problems
from helpers.problems import F32, F64

REQUIRED = inspect.Parameter.empty


def plain(
    input, weight, target, bias=None, *, ce_weight=None, ignore_index=-100, lse_square_scale=0.0,
    label_smoothing=0.0, reduction="mean", softcap=None, use_token_scaling=False,
):  # fmt: skip
    """As liger-kernel documents it: the four of CrossEntropyOutput."""
    stats = F64 if input.dtype == F64 else F32
    z = (input @ weight.T).to(stats)
    z = z if bias is None else z + bias.to(stats)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    valid = target != ignore_index
    w = None if ce_weight is None else ce_weight.to(stats)
    how = dict(weight=w, ignore_index=ignore_index, label_smoothing=label_smoothing)
    loss = F.cross_entropy(z, target, reduction="none", **how)
    penalty = torch.where(valid, lse_square_scale * z.logsumexp(-1).square(), 0.0)
    inside = target.clamp(min=0)
    if use_token_scaling:
        p = z.detach().softmax(-1).gather(1, inside[:, None])[:, 0]
        loss, penalty = loss * p, penalty * p
    right = torch.where(valid, z.argmax(-1) == target, False).to(stats)
    predictions = torch.where(valid, z.argmax(-1), -1)
    tokens = valid.sum()
    if reduction == "none":
        return loss + penalty, penalty.detach(), right, predictions
    loss, penalty, right = loss.sum(), penalty.sum(), right.sum() / tokens
    if reduction == "mean":
        loss = loss / (tokens if w is None else (w[inside] * valid).sum())
        penalty = penalty / tokens
    return loss + penalty, penalty.detach(), right, predictions


OPTIONS = {
    "default": {},
    "ignore_index": dict(ignore_index=5),
    "smoothing": dict(label_smoothing=0.1),
    "z_loss": dict(lse_square_scale=1e-2),
    "softcap": dict(softcap=2.0),
    "weight": dict(ce_weight=True),
    "scaling": dict(use_token_scaling=True),
    "scaling_z_loss": dict(use_token_scaling=True, lse_square_scale=1e-2),
    "everything": dict(
        ce_weight=True, lse_square_scale=1e-2, label_smoothing=0.2, softcap=3.0
    ),
    "everything_scaled": dict(
        ce_weight=True, lse_square_scale=1e-2, label_smoothing=0.2, softcap=3.0,
        use_token_scaling=True,
    ),
}  # fmt: skip


def options_of(name, reduction):
    options = dict(OPTIONS[name], reduction=reduction)
    if options.get("ce_weight"):
        g = torch.Generator().manual_seed(1)
        options["ce_weight"] = (0.1 + torch.rand(211, generator=g)).to(problems.device)
    return options

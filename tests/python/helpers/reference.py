"""The loss in plain PyTorch, by its definition: in fp64 the truth, in another dtype the plain path
that people write. Shares nothing with the package."""

import torch
import torch.nn.functional as F
from helpers.problems import Problem
from torch import Tensor


def evaluate(p: Problem) -> dict[str, Tensor]:
    """loss, lse, entropy, predictions: in the shapes that linear_cross_entropy documents."""
    o = dict(p.options)
    shift = int(o.get("shift", 0))
    ignore_index = o.get("ignore_index", -100)
    reduction = o.get("reduction", "mean")
    stats = torch.float64 if p.e.dtype == torch.float64 else torch.float32

    def at_targets(t: Tensor) -> Tensor:
        t = t.expand(p.targets.shape)
        return t[..., shift:] if shift else t

    e = p.e[..., : p.targets.shape[-1] - shift, :] if shift else p.e
    targets = at_targets(p.targets)
    z = (e @ p.c.T).to(stats) * o.get("logit_scale", 1.0)
    if p.bias is not None:
        z = z + p.bias.to(stats)
    if o.get("softcap") is not None:
        z = torch.tanh(z / o["softcap"]) * o["softcap"]
    temperature = o.get("temperature", 1.0)
    if isinstance(temperature, Tensor):
        temperature = at_targets(temperature).to(stats)[..., None]
    z = z / temperature

    flat, t = z.reshape(-1, z.shape[-1]), targets.reshape(-1).long()
    valid = t != ignore_index
    weight = o.get("weight")
    kinds = dict(
        weight=None if weight is None else weight.to(stats),
        ignore_index=ignore_index,
        label_smoothing=o.get("label_smoothing", 0.0),
    )
    token_weight = o.get("token_weight")
    z_loss = o.get("z_loss", 0.0)
    lse = torch.where(valid, torch.logsumexp(flat, -1), 0.0)
    if token_weight is None:
        loss = F.cross_entropy(flat, t, reduction=reduction, **kinds)
        tokens = valid.to(stats)
    else:
        tokens = torch.where(valid, at_targets(token_weight).reshape(-1).to(stats), 0.0)
        loss = tokens * F.cross_entropy(flat, t, reduction="none", **kinds)
        if reduction == "mean":
            over = tokens
            if weight is not None:
                over = tokens * weight.to(stats)[t.clamp(0, weight.numel() - 1)]
            loss = loss.sum() / over.sum()
        elif reduction == "sum":
            loss = loss.sum()
    if z_loss:
        squares = tokens * lse**2
        if reduction == "mean":
            squares = squares.sum() / tokens.sum()
        elif reduction == "sum":
            squares = squares.sum()
        loss = loss + z_loss * squares

    log_p = F.log_softmax(flat, -1)
    entropy = torch.where(valid, -(log_p.exp() * log_p).sum(-1), 0.0)
    predictions = torch.where(valid, flat.argmax(-1), -1)
    return {
        "loss": loss.reshape(targets.shape) if reduction == "none" else loss,
        "lse": lse.reshape(targets.shape),
        "entropy": entropy.reshape(targets.shape),
        "predictions": predictions.reshape(targets.shape),
    }


def chosen(results: dict[str, Tensor], options: dict) -> list[Tensor]:
    """What a call with these options returns, in its order."""
    names = [n for n in ("lse", "entropy", "predictions") if options.get(f"return_{n}")]
    return [results["loss"], *(results[n] for n in names)]


def gradients(outputs: list[Tensor], parameters: tuple[Tensor, ...]) -> list[Tensor]:
    """Of a sum of all differentiable outputs, each entry weighted differently."""
    total = 0.0
    for i, out in enumerate(outputs):
        if out.is_floating_point():
            weights = torch.linspace(0.5, 1.5 + i, out.numel(), dtype=out.dtype, device=out.device)
            total = total + (out * weights.reshape(out.shape)).sum()
    return list(torch.autograd.grad(total, parameters))

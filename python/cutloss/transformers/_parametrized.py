"""Classifiers whose weight is computed when it is read (torch.nn.utils.parametrize)."""

import torch
from torch import nn
from torch.nn.utils import parametrize

from .._torch import private
from ._product import equal


def check(head: nn.Module, owner: str) -> None:
    """That each reading gives the same: a loss without logits reads the weight several times, for
    its shape and dtype too."""
    for module in head.modules():
        changing = _changing(module) if parametrize.is_parametrized(module) else []
        if changing:
            raise NotImplementedError(
                f"the classifier of {owner} has a parametrization ({', '.join(changing)}) which "
                f"changes each time it is read in training, and a loss without logits reads it "
                f"more often than the model's own: take it off "
                f"(torch.nn.utils.parametrize.remove_parametrizations), use one without state or "
                f"chance (weight_norm, orthogonal), or leave this model as it is"
            )


def _changing(module: nn.Module) -> list[str]:
    """As "weight by _SpectralNorm", of each parametrized tensor that is another, or that leaves
    other buffers, when it is read again. The module is left as it was."""
    modes = [(m, m.training) for m in module.modules()]
    buffers = [
        (m, name, b, private.version_of(b), b.clone())
        for m in module.modules()
        for name, b in private.buffers_of(m).items()
        if b is not None
    ]
    devices = {t.device.index for t in [*module.parameters(), *module.buffers()] if t.is_cuda}
    found = []
    try:
        with torch.random.fork_rng(sorted(devices)), torch.no_grad():
            module.train()
            for name, kinds in module.parametrizations.items():
                first, second = getattr(module, name), getattr(module, name)
                own = set(kinds.modules())
                touched = any(
                    m in own
                    and (private.buffers_of(m).get(n) is not b or private.version_of(b) != version)
                    for m, n, b, version, _ in buffers
                )
                if touched or not (first.is_meta or equal(first, second)):
                    found.append(f"{name} by {', '.join(type(k).__name__ for k in kinds)}")
    finally:
        for m, name, b, version, value in buffers:
            if private.version_of(b) != version:
                with torch.no_grad():
                    b.copy_(value)
            private.buffers_of(m)[name] = b
        for m, training in modes:
            m.training = training
    return found

"""Calls of linear_cross_entropy that differ in one fact or more, and what comes of them.

A change is a function of a Call: of its tensors, its options, or what is in force around it.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.inside import repeated
from helpers.problems import BF16, F16, F32
from torch import Tensor

from cutloss import linear_cross_entropy

S, L, V, D = 3, 8, 21, 16
COUNT = S * L - 2  # of targets that are not ignored, in what `plain` makes


@dataclasses.dataclass
class Call:
    e: Tensor
    c: Tensor
    targets: Tensor
    bias: Tensor | None
    options: dict[str, Any]
    needs: set[str]  # the tensors that require a gradient
    around: list[Callable]  # that make context managers


def plain(device="cpu"):
    g = torch.Generator().manual_seed(0)
    e, c = torch.randn(S, L, D, generator=g), torch.randn(V, D, generator=g)
    targets = torch.randint(0, V, (S, L), generator=g)
    targets[0, 3] = targets[1, 1] = -100
    e, c, targets = (t.to(device) for t in (e, c, targets))
    return Call(e, c, targets, None, {}, {"e", "c", "bias"}, [])


# Changes ------------------------------------------------------------------------------------------


def of(name, make):
    """Another tensor of this name."""

    def change(call):
        setattr(call, name, make(getattr(call, name)))

    return change


def bias(call):
    call.bias = torch.linspace(-1, 1, V, device=call.e.device)


def around(*makers):
    return lambda call: call.around.extend(makers)


def constant(name):
    return lambda call: call.needs.discard(name)


def option(**said):
    return lambda call: call.options.update(said)


def every(*changes):
    def change(call):
        for one in changes:
            one(call)

    return change


def rows(at):
    """Those tokens alone."""
    return every(of("e", lambda e: e[at].clone()), of("targets", lambda t: t[at].clone()))


def one_further(t):
    """The same values an element further in memory."""
    longer = t.new_zeros(t.numel() + 1)
    longer[1:] = t.flatten()
    return longer[1:].view(t.shape)


def in_columns(t):
    return t.t().contiguous().t()


def freed(t):
    t.untyped_storage().resize_(0)
    return t


@contextlib.contextmanager
def engine(name):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUTLOSS_ENGINE", name)
        yield


@contextlib.contextmanager
def precision(name):
    settings = torch.backends.cuda.matmul
    before, settings.fp32_precision = settings.fp32_precision, name
    try:
        yield
    finally:
        settings.fp32_precision = before


def autocast(call, dtype):
    call.around.append(lambda: torch.autocast(call.e.device.type, dtype))


to_bf16 = functools.partial(autocast, dtype=BF16)
to_fp16 = functools.partial(autocast, dtype=F16)
to_fp32 = functools.partial(autocast, dtype=F32)


def nothing(call):
    pass


# What comes of a call -----------------------------------------------------------------------------


def tensors_of(call):
    return {name: getattr(call, name) for name in ("e", "c", "targets", "bias")}


def outcome(call):
    """(results and gradients, or the error; the key that linear_cross_entropy asked for)"""
    keys = []
    tensors = tensors_of(call)
    inputs = [t for name, t in tensors.items() if name in call.needs and t is not None]
    for t in inputs:
        t.requires_grad_()
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        make = repeated.key
        patch.setattr(repeated, "key", lambda *facts: keys.append(make(*facts)) or keys[-1])
        try:
            for manager in call.around:
                stack.enter_context(manager())
            made = linear_cross_entropy(**tensors, **call.options)
            made = made if isinstance(made, tuple) else (made,)
            with_gradient = [t.sum() for t in made if t.requires_grad]
            if with_gradient:
                made += torch.autograd.grad(with_gradient, inputs, allow_unused=True)
        except Exception as error:
            made = type(error), str(error)
    return made, keys[-1] if keys else None


def made_anew(make):
    """The outcome where no call was made before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repeated, "_settled", {})
        return outcome(make())


def check(make):
    """That the call gives what it gives where none was made before. Returns its key."""
    got, key = outcome(make())
    want, _ = made_anew(make)
    assert len(got) == len(want)
    for mine, other in zip(got, want):
        if isinstance(other, Tensor):
            assert mine.requires_grad == other.requires_grad
            torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)
        else:
            assert mine == other
    return key


def made_by(*changes, device="cpu"):
    def make():
        call = plain(device)
        every(*changes)(call)
        return call

    return make


def places(key, other):
    """In how many two keys differ."""
    return sum(a != b for a, b in zip(key, other)) + abs(len(key) - len(other))

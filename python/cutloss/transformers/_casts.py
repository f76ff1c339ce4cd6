"""Classifiers with a forward, a wrapper or a hook that makes the product with their weight, in
whatever dtypes, and nothing else: whether a forward does is found out by _product.py."""

import contextlib
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .._torch import partitioned
from . import _product
from ._product import DTYPES, equal, rows

NAME = "_cutloss_cast"  # the attribute of a layer that has one
_HOOKS = "_cutloss_cast_hooks"  # those of a layer that were found to cast

# What nn.Linear's forward is, if nobody replaced it for the whole class before cutloss came.
LINEAR_FORWARD = nn.Linear.forward


@dataclasses.dataclass(eq=False)
class Cast:
    """What a classifier's layer does beside its product."""

    own: Callable[[Tensor], Tensor] | None  # the forward of the instance; None: of the class
    rounds_input: bool  # a wider input is cast to the weight's dtype
    outside_autocast: bool  # the product is not done in the dtype of autocast
    of_class: Callable  # the forward that the layer's class had
    checked: int  # the id of the layer; that of a copy is another

    def logits(self, layer: nn.Linear, hidden: Tensor) -> Tensor:
        return self.own(hidden) if self.own is not None else type(layer).forward(layer, hidden)

    def operand(self, layer: nn.Linear, hidden: Tensor) -> Tensor:
        """A wider one that is not rounded stays what it is, and is refused where it is used."""
        dtype = layer.weight.dtype
        wider = torch.promote_types(hidden.dtype, dtype) != dtype
        return hidden if wider and not self.rounds_input else hidden.to(dtype)

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        if self.outside_autocast:
            return torch.autocast(device.type, enabled=False)
        return contextlib.nullcontext()


class Result(dict):
    """What comes out of a layer in place of logits, through hooks that would cast or place them."""

    placements = None

    def _itself(self, *args, **kwargs) -> "Result":
        return self

    to = type = float = double = half = bfloat16 = redistribute = to_local = _itself


def result(layer: nn.Linear, value: object) -> dict:
    # In a dict, so that a hook that changes an output cannot take this for logits.
    is_changed = layer.__dict__.get(_HOOKS) or partitioned.is_dtensor(layer.weight)
    return (Result if is_changed else dict)(cutloss=value)


def has_forward_of(layer: nn.Module, cast: Cast | None) -> bool:
    """Whether the forward of the layer's class is the one that was looked at."""
    return type(layer).forward is (LINEAR_FORWARD if cast is None else cast.of_class)


def of_layer(layer: nn.Linear, own: Callable[[Tensor], Tensor] | None) -> Cast | None:
    """None where its forward, which is not nn.Linear's, does more than the product."""
    found = layer.__dict__.get(NAME)
    if found is not None and own is None:
        if found.checked == id(layer) and has_forward_of(layer, found):
            return found
        own = found.own
    return _cast(layer, layer, own or (lambda x: type(layer).forward(layer, x)), own)


def of_wrapper(head: nn.Module) -> tuple[nn.Linear, Cast] | None:
    """A module without weights of its own around one nn.Linear."""
    layers = [m for m in head.modules() if isinstance(m, nn.Linear)]
    if len(layers) != 1 or layers[0] is head:
        return None
    cast = _cast(head, layers[0], head, None)
    return None if cast is None else (layers[0], cast)


def _cast(
    head: nn.Module, layer: nn.Linear, function: Callable, own: Callable | None
) -> Cast | None:
    found = _product.found(head, layer, function)
    return None if found is None else Cast(own, *found, type(layer).forward, id(layer))


def forget(layer: nn.Linear) -> Cast | None:
    layer.__dict__.pop(_HOOKS, None)
    return layer.__dict__.pop(NAME, None)


def is_cast(layer: nn.Linear, hook: Callable, of_input: bool) -> bool:
    """Whether a hook of the layer casts its input or output, and does nothing else. It is called
    to find out, and so must not be one that has work to do (that gathers weights, say); one that
    was found to cast is not called again."""
    known = layer.__dict__.get(_HOOKS, [])
    if any(hook is h for h in known):
        return True
    casts = False
    x = rows(8)
    try:
        for dtype in DTYPES:
            given = x.to(dtype, copy=True).requires_grad_()
            with torch.enable_grad():
                got = hook(layer, (given,)) if of_input else hook(layer, (x,), given)
            if of_input and isinstance(got, tuple) and len(got) == 1:
                got = got[0]
            if got is None:
                continue  # as if there were no hook
            same = got.is_floating_point() and equal(got, given.to(got.dtype))
            if not same or not torch.equal(_gradient(got, given), torch.ones_like(given)):
                return False
            casts = casts or got.dtype != dtype
    except Exception:
        return False
    if casts:
        layer.__dict__[_HOOKS] = [*known, hook]
    return casts


def _gradient(y: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(y.sum(), x)[0] if y is not x else torch.ones_like(x)

"""What calls were found to be, remembered by all that it depends on.

Training makes the same call step after step, and to check it and to decide what becomes of it takes
longer than a small loss. What depends on a tensor's numbers is looked at in every call.
"""

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core.operands import check_values, in_sequences
from .._core.options import Options
from .._core.weighting import Weighting
from . import library, private
from .operators import Linear


class Settled(NamedTuple):
    """All that a call's arguments decide but for the numbers in its tensors."""

    options: Options
    how: Weighting
    at_once: Linear | None  # where one operator makes the loss, and the gradients that are wanted
    row_shape: tuple[int, ...]  # of per-token results
    is_ordinary: bool  # the call has a key, and is remembered


_LEAST_ADDRESS = 1 << 40  # below it an address is looked at more closely
_MOST = 256  # calls, which forget each other: a loss of many lengths asks for a plan again
_settled: dict[tuple, Settled] = {}


def key(e: Tensor, c: Tensor, targets: Tensor, bias: Tensor | None, said: tuple) -> tuple | None:
    """What a call depends on; None where it is not an ordinary one: traced, transformed, of
    tensors that others made or that have no strides. `said`: its options, without tensors."""
    if (
        torch.compiler.is_compiling()
        or private.are_transforms_active()
        or private.is_in_forward_mode()
    ):
        return None
    facts: list[Any] = [
        torch.is_grad_enabled(),
        os.environ.get("CUTLOSS_ENGINE"),
        *said,
        *map(type, said),  # True is no softcap, though it equals 1.0
    ]
    try:
        for t in (e, c, targets, bias):
            if t is None:
                facts.append(None)
                continue
            if type(t) not in private.ORDINARY:
                return None
            address = t.data_ptr()  # a RuntimeError where a tensor has no memory of its own
            # What was freed has an offset in place of an address (partitioned.py).
            if address < _LEAST_ADDRESS and address == t.storage_offset() * t.itemsize:
                return None
            facts += (t.shape, t.stride(), t.dtype, t.device, t.requires_grad, address % 16)
        kind = e.device.type
        autocast = torch.is_autocast_enabled(kind)
        facts.append(torch.get_autocast_dtype(kind) if autocast else None)
        # Of fp32, to which autocast may go.
        facts.append(library.allow_tf32(kind, torch.float32) if kind == "cuda" else None)
        made = tuple(facts)
        hash(made)  # of options that have none something is wrong
    except (AttributeError, RuntimeError, TypeError):
        return None
    return made


def found(key: tuple | None) -> Settled | None:
    return None if key is None else _settled.get(key)


def remember(key: tuple | None, settled: Settled) -> None:
    if key is None:
        return
    if len(_settled) >= _MOST:
        _settled.clear()
    _settled[key] = settled


def operands(
    e: Tensor, c: Tensor, targets: Tensor, bias: Tensor | None, options: Options
) -> tuple:
    """As make_operands has them, of a call that was found."""
    labels = targets if targets.dim() == 2 else in_sequences(targets)
    if e.dim() != 3:
        e = e.reshape(*labels.shape, e.shape[-1])
    check_values(c, labels, None, options)
    return e, c, bias, labels, None, None

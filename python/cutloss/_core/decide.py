"""Which family of operators and which schedule a call takes: what the C++ plan says.

An operator's result shapes must follow from its arguments, so the schedule, and how many bytes it
keeps from forward to backward, are asked for before the call and passed to it. Compilers ask while
they trace. Where the number of rows is a symbol then, the library says up to which numbers it takes
which schedule, and comparing the symbol with those makes the compiler's guards.
"""

import functools
import os
from operator import index  # of a symbol: it becomes a number, with a guard
from typing import NamedTuple

import torch
from torch import Tensor

from .._torch import autograd, library, private
from .options import SCHEDULES, Options
from .plan import Plan


class Place(NamedTuple):
    """How E or C lies in memory: where the library cannot read it in place, it reads a copy."""

    strides: tuple[int, ...] = ()  # none: packed
    offset: int = 0  # bytes past a multiple of 16, where it starts


class Sizes(NamedTuple):
    """What a plan depends on besides the options."""

    sequences: int
    length: int
    V: int
    D: int
    e_dtype: torch.dtype
    c_dtype: torch.dtype
    bias_dtype: torch.dtype | None
    target_dtype: torch.dtype
    has_row_temperature: bool = False
    has_class_weight: bool = False
    on_cuda: bool = False
    device_index: int = -1  # of several GPUs; -1 is the current one
    e: Place = Place()
    c: Place = Place()

    def arguments(self, known_at_forward: bool) -> tuple:
        """The leading arguments of the operator plan. `known_at_forward`: whether the loss is a sum
        of the rows' outputs, with weights that are known in forward."""
        *problem, on_cuda, device_index, e, c = self
        return *problem, known_at_forward, on_cuda, device_index, *e, *c


class Choice(NamedTuple):
    in_forward: bool  # loss_and_gradients, else statistics and gradients
    schedule: int
    kept_bytes: int = 0


def decided(
    operands: tuple, options: Options, known_at_forward: bool, own_e: Tensor | None = None
) -> tuple[Options, bool]:
    """The options with the gradients that autograd asks for and what the plan settles, and whether
    gradients are made in forward. `operands`: from make_operands; `own_e`: what autograd sees
    instead of their e. `known_at_forward`: the loss is a weighted sum of per-row outputs, with
    weights that are known in forward."""
    e, c, bias = operands[:3]
    de, dc, dbias = map(autograd.wants_gradient, (e if own_e is None else own_e, c, bias))
    if not (de or dc or dbias):
        options = options.but(schedule=SCHEDULES["none"])
        # Nothing is to be decided. But whether there is a plan at all an operator would say as
        # compiled code runs, where its errors are not Python's.
        if options.max_workspace is None or c.shape[0] == 0:
            return options, False
    options = options.but(needs_de=de, needs_dc=dc, needs_dbias=dbias)
    if c.shape[0] == 0:  # a shard without classes: there is nothing to plan
        return options.but(schedule=SCHEDULES["vocabulary"]), False
    sizes = sizes_of(*operands)
    if torch.compiler.is_compiling() or not all([type(size) is int for size in sizes[:4]]):
        in_forward, schedule, kept_bytes = _while_traced(operands, options, known_at_forward)
    else:
        in_forward, schedule, kept_bytes = choose(sizes, options, known_at_forward)
    return options.but(schedule=schedule, kept_bytes=kept_bytes), in_forward


def choose(sizes: Sizes, options: Options, known_at_forward: bool) -> Choice:
    return Choice(*library.choice(sizes.arguments(known_at_forward), options))


# While a compiler traces -------------------------------------------------------------------------


def _while_traced(
    operands: tuple, options: Options, known_at_forward: bool
) -> tuple[bool, int, int]:
    """As choose: of sizes that are known what eager code takes, of a number of rows that is a symbol
    what the library says of such numbers."""
    e, c = operands[:2]
    sequences, length, _ = e.shape
    shift = index(options.shift)
    num_valid = options.num_valid
    is_known = private.is_static(sequences, length)
    if num_valid is not None and not private.is_static(num_valid):
        # Not which number it is: any but that of all rows, as most batches have it.
        num_valid = max(sequences * (length - shift) - 1, 0) if is_known else 1
    # What no plan depends on a compiler may have as a symbol.
    asked = options.but(
        shift=shift,
        ignore_index=-100,
        softcap=None if options.softcap is None else 1.0,
        logit_scale=1.0,
        temperature=1.0,
        num_valid=num_valid,
        max_workspace=None if options.max_workspace is None else index(options.max_workspace),
    )
    # The classifier's sizes, which make a model, are known: a compiler that has them as symbols
    # compiles again where they change.
    V, D = index(c.shape[0]), index(c.shape[1])
    sizes = sizes_of(*operands)._replace(V=V, D=D, c=Place(_known(c.stride())))
    if is_known:
        place = Place(_known(e.stride()))
        sizes = sizes._replace(sequences=index(sequences), length=index(length), e=place)
        choice, refusal, is_value = _constant_choice(
            _plain(sizes), asked.values(), known_at_forward
        )
        # Raised in the code that is traced, so that compilers make of it what the code would.
        if is_value:
            raise ValueError(refusal)
        if refusal:
            raise NotImplementedError(refusal)
        return choice
    if not any(options.needs):
        return False, SCHEDULES["none"], 0
    sizes = sizes._replace(sequences=1, length=1, e=Place())
    ways = _constant_ways(_plain(sizes), asked.values(), known_at_forward)
    rows = sequences * (length - shift)
    for most, in_forward, schedule in ways[:-1]:
        # Where nothing is known of the number, the last way serves every one.
        if private.is_known_to_be(rows <= most):
            return _kept_by_none(in_forward, schedule)
    return _kept_by_none(*ways[-1][1:])


def _kept_by_none(in_forward: bool, schedule: int) -> tuple[bool, int, int]:
    if schedule == SCHEDULES["rows"] and not in_forward:
        raise NotImplementedError(
            "schedule='rows' keeps logits from forward to backward for this loss (a per-token "
            "result, or fp16), which is not available under torch.compile where the number of "
            "tokens is a symbol (dynamic shapes); use schedule='auto', or compile with "
            "dynamic=False"
        )
    return in_forward, schedule, 0


def _known(strides: tuple) -> tuple[int, ...]:
    """Those that are symbols stand for a packed tensor's."""
    return tuple([index(stride) for stride in strides]) if private.is_static(*strides) else ()


@private.while_traced
def _constant_choice(
    sizes: tuple, values: tuple, known_at_forward: bool
) -> tuple[tuple[bool, int, int] | None, str, bool]:
    """The choice; or why there is none, and whether that is a ValueError."""
    try:
        return tuple(choose(_sizes(sizes), Options(*values), known_at_forward)), "", False
    except (ValueError, NotImplementedError) as error:
        return None, str(error), isinstance(error, ValueError)


@private.while_traced
def _constant_ways(
    sizes: tuple, values: tuple, known_at_forward: bool
) -> tuple[tuple[int, bool, int], ...]:
    """Up to how many rows: gradients in forward, schedule."""
    return _ways_before(sizes, values, known_at_forward, os.environ.get("CUTLOSS_ENGINE"))


# Some hundred plans, which a compiler asks for whenever it compiles again.
@functools.lru_cache(maxsize=64)
def _ways_before(
    sizes: tuple, values: tuple, known_at_forward: bool, engine: str | None
) -> tuple[tuple[int, bool, int], ...]:
    arguments = _sizes(sizes).arguments(known_at_forward)
    ways = library.plan_for_rows(arguments, Options(*values))
    return tuple((most, in_forward, SCHEDULES[schedule]) for most, in_forward, schedule in ways)


def _plain(sizes: Sizes) -> tuple:
    """As tuples throughout, of which alone a compiler knows that they are constants."""
    *others, e, c = sizes
    return (*others, (e.strides, e.offset), (c.strides, c.offset))


def _sizes(values: tuple) -> Sizes:
    *others, e, c = values
    return Sizes(*others, Place(*e), Place(*c))


def planned(
    operands: tuple,
    options: Options,
    known_at_forward: bool,
    device: torch.device | str | None = None,
) -> Plan:
    """The plan of a call. `device`: where it would be, if not where the operands are."""
    e, c, bias = operands[:3]
    de, dc, dbias = map(autograd.wants_gradient, (e, c, bias))
    options = options.but(needs_de=de, needs_dc=dc, needs_dbias=dbias)
    sizes = sizes_of(*operands)
    if device is not None:
        device = torch.device(device)
        _check_device(device)
        number = -1 if device.index is None else device.index
        sizes = sizes._replace(on_cuda=device.type == "cuda", device_index=number)
        options = options.but(allow_tf32=library.allow_tf32(device.type, options.compute_dtype))
    return library.plan(sizes.arguments(known_at_forward), options)


def _check_device(device: torch.device) -> None:
    """Of a plan that is asked for. What else a GPU may lack the library says."""
    if device.type not in ("cpu", "cuda"):
        raise NotImplementedError(f"there are plans for 'cpu' and 'cuda', not for {str(device)!r}")
    if device.type == "cpu":
        return
    if not library.HAS_CUDA:
        raise NotImplementedError(
            f"a plan for device={str(device)!r} is made of facts of the GPU, and this cutloss was "
            f"built without CUDA (`cutloss doctor` says more): ask where the GPU is"
        )
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise ValueError(f"there is no {device}: {torch.cuda.device_count()} CUDA devices are here")


def _place(t: Tensor) -> Place:
    if torch.compiler.is_compiling():  # there is no address, and new storage is aligned
        return Place(tuple(t.stride()))
    if private.is_ordinary(t):
        return Place(t.stride(), t.data_ptr() % 16)
    # Fake tensors and those of torch.func have no address either.
    return Place(t.stride(), t.storage_offset() * t.itemsize % 16)


def sizes_of(
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_temperature: Tensor | None,
    class_weight: Tensor | None,
) -> Sizes:
    """E is (sequences, length, D)."""
    sequences, length, _ = e.shape
    V, D = c.shape
    device = e.device
    index = device.index
    return Sizes(  # by position, in a third of the time
        sequences, length, V, D, e.dtype, c.dtype,
        None if bias is None else bias.dtype, targets.dtype,
        row_temperature is not None, class_weight is not None,
        device.type == "cuda", -1 if index is None else index, _place(e), _place(c),
    )  # fmt: skip

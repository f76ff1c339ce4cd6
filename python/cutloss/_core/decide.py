"""Which family of operators and which schedule a call takes.

An operator's result shapes must follow from its arguments, so the schedule, and how many bytes it
keeps from forward to backward, are settled before the call and passed to it. The C++ plan settles
them; where sizes are symbols, a bound on its memory does.
"""

import dataclasses
import functools
import os
from typing import NamedTuple

import torch
from torch import Tensor

from .._torch import autograd, library, private
from .options import SCHEDULES, Options
from .plan import Plan

DEFAULT_WORKSPACE = 512 << 20  # kDefaultWorkspace of cutloss.h


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


@dataclasses.dataclass(frozen=True)
class Choice:
    immediate: bool  # loss_and_gradients, else statistics and gradients
    schedule: int
    kept_bytes: int = 0


def decided(
    operands: tuple, options: Options, known_at_forward: bool, own_e: Tensor | None = None
) -> tuple[Options, bool]:
    """The options with the gradients that autograd asks for and what the plan settles, and whether
    gradients are made in forward. `operands`: from make_operands; `own_e`: what autograd sees
    instead of their e."""
    e, c, bias = operands[:3]
    de, dc, dbias = map(autograd.wants_gradient, (e if own_e is None else own_e, c, bias))
    if not (de or dc or dbias):
        return options.but(schedule=SCHEDULES["none"]), False
    sizes, needs = sizes_of(*operands), (de, dc, dbias)
    if sizes.V == 0:  # a shard without classes: there is nothing to plan
        schedule = SCHEDULES["vocabulary"]
        return options.but(needs_de=de, needs_dc=dc, needs_dbias=dbias, schedule=schedule), False
    if _is_symbolic(sizes):
        return _decided(sizes, options, needs, known_at_forward)
    engine = os.environ.get("CUTLOSS_ENGINE")  # which the plan depends on too
    return _decided_before(sizes, options.values(), needs, known_at_forward, engine)


def _decided(
    sizes: Sizes, options: Options, needs: tuple[bool, bool, bool], known_at_forward: bool
) -> tuple[Options, bool]:
    de, dc, dbias = needs
    options = options.but(needs_de=de, needs_dc=dc, needs_dbias=dbias)
    choice = choose(sizes, options, known_at_forward)
    options = options.but(schedule=choice.schedule, kept_bytes=choice.kept_bytes)
    return options, choice.immediate


# Training asks for the same few again and again, and asking the operator costs more than to know.
@functools.lru_cache(maxsize=64)
def _decided_before(
    sizes: Sizes,
    values: tuple,
    needs: tuple[bool, bool, bool],
    known_at_forward: bool,
    engine: str | None,
) -> tuple[Options, bool]:
    return _decided(sizes, Options(*values), needs, known_at_forward)


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
        index = -1 if device.index is None else device.index
        sizes = sizes._replace(on_cuda=device.type == "cuda", device_index=index)
        options = options.but(allow_tf32=library.allow_tf32(device.type, options.compute_dtype))
    return library.plan(sizes.arguments(known_at_forward), options)


def _is_symbolic(sizes: Sizes) -> bool:
    """Whether the compiler traces, or a size is a symbol."""
    numbers = (sizes.sequences, sizes.length, sizes.V, sizes.D)
    return torch.compiler.is_compiling() or torch.SymInt in map(type, numbers)


def _waits_for_loss_scale(sizes: Sizes, options: Options) -> bool:
    """fp16 gradients are made in backward: the loss scale must come before anything underflows."""
    return torch.float16 in (
        options.compute_dtype,
        sizes.e_dtype if options.needs_de else None,
        sizes.c_dtype if options.needs_dc else None,
        sizes.bias_dtype if options.needs_dbias else None,
    )


def choose(sizes: Sizes, options: Options, known_at_forward: bool) -> Choice:
    """`known_at_forward`: the loss is a weighted sum of per-row outputs, weights known."""
    if not any(options.needs):
        return Choice(False, SCHEDULES["none"])
    immediate = known_at_forward and not _waits_for_loss_scale(sizes, options)
    if _is_symbolic(sizes):
        return _choose_by_bound(sizes, options, immediate)
    plan = library.plan(sizes.arguments(immediate), options)
    return Choice(plan.in_forward, SCHEDULES[plan.schedule], plan.kept_bytes)


def _choose_by_bound(sizes: Sizes, options: Options, immediate: bool) -> Choice:
    asked = options.schedule
    if asked == SCHEDULES["rows"] and not immediate:
        raise NotImplementedError(
            "schedule='rows' keeps logits from forward to backward for this loss (a per-token "
            "result, or fp16), which is not available under torch.compile; use schedule='auto'"
        )
    if not immediate or asked == SCHEDULES["vocabulary"]:
        return Choice(False, SCHEDULES["vocabulary"])
    if asked == SCHEDULES["rows"] or rows_fit(sizes, options):
        return Choice(True, SCHEDULES["rows"])
    return Choice(False, SCHEDULES["vocabulary"])


_BOUND_ROWS = 256  # rows of logits kept at a time, in the bound


def rows_fit(sizes: Sizes, options: Options) -> bool:
    """Whether the workspace surely suffices for the schedule by rows: kept logits of 256 rows,
    sums of dC where C is not in the dtype of the sums, and a generous rest."""
    stats = options.stats
    budget = options.max_workspace
    rows = sizes.sequences * (sizes.length - options.shift)
    logits = _BOUND_ROWS * (sizes.V * stats.itemsize + sizes.V)
    operands = 4 * _BOUND_ROWS * sizes.D * 8 + 3 * _BOUND_ROWS * _BOUND_ROWS * 8
    per_row_and_column = 32 * (rows + sizes.V) + 64 * 1024
    total = logits + operands + per_row_and_column
    if options.needs_dc and sizes.c_dtype != stats:
        total = total + sizes.V * sizes.D * stats.itemsize
    return total <= (DEFAULT_WORKSPACE if budget is None else budget)


def _place(t: Tensor) -> Place:
    if torch.compiler.is_compiling():  # no plan is asked for, and there is no address
        return Place()
    if private.is_ordinary(t):
        return Place(t.stride(), t.data_ptr() % 16)
    # Fake tensors and those of torch.func have no address either; new storage is aligned.
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
    return Sizes(
        sequences=sequences,
        length=length,
        V=V,
        D=D,
        e_dtype=e.dtype,
        c_dtype=c.dtype,
        bias_dtype=None if bias is None else bias.dtype,
        target_dtype=targets.dtype,
        has_row_temperature=row_temperature is not None,
        has_class_weight=class_weight is not None,
        on_cuda=device.type == "cuda",
        device_index=-1 if device.index is None else device.index,
        e=_place(e),
        c=_place(c),
    )

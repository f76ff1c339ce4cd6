"""Losses of rows of logits, without the logits of all rows: the loop, written once.

A chunk of rows is all there is at a time. Its logits are made, a rule (Rule) makes of them a loss
for each row and the derivative by logits, and that goes into the gradients:

    z = e c^T (R,V),  losses (R), g = d loss / d z (R,V),  dE = g c (R,D),  dC += g^T e (V,D)

Two ways to dC, as elsewhere in cutloss (docs/math.md, section 6): *by rows*, as written, whose sums
need memory where c is in 16 bits; or *by vocabulary*, where a slab of columns of all rows, made a
second time from what was kept of each row, gives a slab of dC that is complete.

Products take 16-bit operands as they are on CUDA and give fp32; g is rounded to their dtype. On the
CPU PyTorch has no such product, and the operands are fp32. Sums are fp32 (fp64 for fp64).
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .._torch import autograd, flops
from .._torch.autograd import Made, Saved
from .._torch.softcap import mul_slope_
from ._chunk_plan import CONVERTED, Plan, bytes_of

# The logit of a class that cannot be, whose bias is -inf. Finite, so that 0 * log 0 is 0.
NEVER = -1e30


@dataclasses.dataclass(frozen=True)
class Logits:
    """softcap tanh((logit_scale e c^T + bias) / softcap)"""

    operands: torch.dtype
    stats: torch.dtype
    logit_scale: float = 1.0
    softcap: float | None = None

    def rows(self, e: Tensor, rows: "Rows") -> Tensor:
        """(R,D): those of e (M,D), as operands; 0 where a row does not count."""
        chosen = e.index_select(0, rows.index)
        if rows.counts is not None:
            chosen.masked_fill_(~rows.counts[:, None], 0)
        return chosen.to(self.operands)

    def before_cap(
        self, rows: Tensor, c: Tensor, bias: Tensor | None, columns: slice
    ) -> Tensor:
        """(R,W). `bias`: from `floored`."""
        c = c[columns]
        z = rows.new_empty((rows.shape[0], c.shape[0]), dtype=self.stats)
        for part in self.parts(c):
            _product(z[:, part], rows, c[part].to(self.operands).T)
        if self.logit_scale != 1.0:
            z.mul_(self.logit_scale)
        return z if bias is None else z.add_(bias[columns])

    def of(self, rows: Tensor, c: Tensor, bias: Tensor | None, columns: slice) -> Tensor:
        z = self.before_cap(rows, c, bias, columns)
        return z if self.softcap is None else z.div_(self.softcap).tanh_().mul_(self.softcap)

    def floored(self, bias: Tensor | None) -> Tensor | None:
        """(V), finite where it is -inf; NaN where no class can be."""
        if bias is None:
            return None
        bias = bias.to(self.stats)
        return torch.where((bias == -torch.inf).all(), torch.nan, bias.clamp(min=NEVER))

    def cannot_be(self, bias: Tensor | None) -> Tensor | None:
        """(V), bool: which classes have a probability of 0."""
        return None if bias is None or self.softcap is not None else bias == -torch.inf

    def parts(self, c: Tensor) -> Iterator[slice]:
        """Of the rows of c, so many at a time as may be converted."""
        width = c.shape[0]
        if c.dtype != self.operands:
            width = max(1, CONVERTED // (c.shape[1] * bytes_of(self.operands)))
        return _slices(c.shape[0], width)


@dataclasses.dataclass
class OfRows:
    """What a rule makes of a chunk."""

    losses: Tensor  # (R)
    parts: Tensor  # (R,P), what the losses are made of, to report
    g: Tensor | None  # (R,V), by the logits after the cap
    kept: Tensor | None  # (R,K), for of_slab


class Rows(NamedTuple):
    """Which rows a chunk is of."""

    at: slice  # of the n
    index: Tensor  # (R), in e
    counts: Tensor | None  # (R), bool; None: all


class Rule(Protocol):
    """From logits to losses. Tensors of its own lie as e does, or as the index."""

    parts: int  # P
    kept: int  # K
    buffers: int  # tensors of (R,V) alive at most, the logits among them
    scale: float  # what g is yet to be multiplied by
    teacher_width: int  # columns of the teacher's hidden states; 0: none are multiplied

    def tensors(self) -> tuple[Tensor | None, ...]: ...

    def with_tensors(self, tensors: tuple[Tensor | None, ...]) -> "Rule":
        """The same with other tensors."""
        ...

    def of_rows(self, logits: list[Tensor], rows: Rows, gradient: bool, keep: bool) -> OfRows:
        """logits: one tensor (R,V), to be taken out of the list, so that its memory is free once it
        is used up."""
        ...

    def of_slab(self, z: Tensor, rows: Rows, columns: slice, kept: Tensor) -> Tensor:
        """g of some columns, (R,W). z: (R,W), may be overwritten."""
        ...


@dataclasses.dataclass(frozen=True)
class Task:
    """All but the tensors that gradients go to, and what each row's loss is multiplied by."""

    logits: Logits
    rule: Rule
    index: Tensor  # (n), rows of e
    counts: Tensor | None  # (n), bool; None: all
    plan: Plan
    predicted: int  # rows, whether they count or not

    def products(self, c: Tensor, forward: bool, needs: "Needs") -> list[flops.Product]:
        """Those of the mathematics, which a FlopCounterMode counts."""
        N, (V, D), (de, dc, _) = self.predicted, c.shape, needs
        widths = [D, self.rule.teacher_width] if forward else []
        return [(N, width, V) for width in widths + [D] * (de + dc) if width > 0]

    def rows(self, width: int) -> Iterator[Rows]:
        for at in _slices(self.index.numel(), width):
            yield Rows(at, self.index[at], None if self.counts is None else self.counts[at])

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.index, self.counts, *self.rule.tensors()

    def with_tensors(self, tensors: tuple[Tensor | None, ...]) -> "Task":
        index, counts, *rest = tensors
        rule = self.rule.with_tensors(tuple(rest))
        return dataclasses.replace(self, index=index, counts=counts, rule=rule)


Student = tuple[Tensor, Tensor, Tensor | None]  # e (M,D), c (V,D), bias (V)
Needs = tuple[bool, bool, bool]
_NOTHING: Needs = (False, False, False)
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def losses_of_rows(student: Student, task: Task) -> tuple[Tensor, Tensor]:
    """(n) and (n,P), whose gradient (that of the first) is made in backward."""
    if not autograd.wants_gradient(*student):
        return _forward(student, task)[:2]
    return autograd.deferred(*_apart(student, task))


def weighted_sum(student: Student, task: Task, factors: Tensor) -> tuple[Tensor, Tensor]:
    """sum factors * losses, with its gradients made along, and (n,P). `factors`: (n), constant."""
    if not autograd.wants_gradient(*student):
        losses, parts, _ = _forward(student, task)
        return _sum(losses, factors), parts
    return autograd.immediate(*_apart(student, task, factors))


def _forward(
    student: Student, task: Task, keep: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    with flops.counted_as(task.products(student[1], True, _NOTHING)):
        return _by_rows(student, task, keep=keep)


def _sum(losses: Tensor, factors: Tensor) -> Tensor:
    """What a row with the factor 0 holds does not count."""
    # Of a row that counts nothing infinity is nothing; its gradient is NaN where its loss is.
    terms = torch.where((factors == 0) & ~losses.isnan(), 0.0, losses * factors)
    return terms.sum(dtype=torch.float64).to(losses.dtype)


# The two passes ---------------------------------------------------------------------------------


def _slices(total: int, width: int) -> Iterator[slice]:
    return (slice(start, min(start + width, total)) for start in range(0, total, width))


def _by_rows(
    student: Student, task: Task, sums: "_Sums | None" = None, keep: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """losses (n), parts (n,P), kept (n,K); and what is to be summed."""
    e, c, bias = student
    how, rule, n = task.logits, task.rule, task.index.numel()
    bias = how.floored(bias)
    losses = e.new_zeros(n, dtype=how.stats)
    parts = e.new_zeros((n, rule.parts), dtype=how.stats)
    kept = e.new_zeros((n, rule.kept), dtype=how.stats) if keep else None
    with torch.no_grad(), torch.autocast(e.device.type, enabled=False):
        for rows in task.rows(task.plan.rows):
            at = rows.at
            chosen = how.rows(e, rows)
            z, x = _capped(how, how.before_cap(chosen, c, bias, slice(None)))
            logits = [z]
            del z
            made = rule.of_rows(logits, rows, sums is not None, keep)
            losses[at], parts[at] = made.losses, made.parts
            if keep:
                kept[at] = made.kept
            if sums is not None:
                sums.add(_uncapped(made.g, x), chosen, at, c, slice(None))
            del made, x
    return losses, parts, kept


def _by_vocabulary(student: Student, task: Task, sums: "_Sums", kept: Tensor) -> None:
    e, c, bias = student
    how, rule = task.logits, task.rule
    bias = how.floored(bias)
    with torch.no_grad(), torch.autocast(e.device.type, enabled=False):
        for columns in _slices(c.shape[0], task.plan.columns):
            for rows in task.rows(task.plan.block):
                chosen = how.rows(e, rows)
                z, x = _capped(how, how.before_cap(chosen, c, bias, columns))
                g = rule.of_slab(z, rows, columns, kept[rows.at])
                del z
                sums.add(_uncapped(g, x), chosen, rows.at, c, columns)
                del g, x
            sums.end_of_slab(columns)


def _capped(how: Logits, a: Tensor) -> tuple[Tensor, Tensor | None]:
    """The logits, and with a softcap what their slope is made of, in the memory of `a`."""
    if how.softcap is None:
        return a, None
    x = a.div_(how.softcap)
    return torch.tanh(x).mul_(how.softcap), x


def _uncapped(g: Tensor, x: Tensor | None) -> Tensor:
    return g if x is None else mul_slope_(g, x)


class _Sums:
    """The gradients of e, c and bias while they come into being."""

    def __init__(
        self, student: Student, task: Task, factors: Tensor, needs: Needs, sums_de: bool = False
    ):
        e, c, bias = student
        self.student, self.task, self.needs = student, task, needs
        stats = task.logits.stats
        # With the scale here it is in both products, and to be taken out of dbias, which has none.
        self.factors = factors.to(stats) * (task.logits.logit_scale * task.rule.scale)
        self.de = e.new_zeros(e.shape) if needs[0] else None
        self.dc = self.slab = self.rows_of_de = None
        if needs[0] and sums_de:
            self.rows_of_de = e.new_zeros((task.index.numel(), e.shape[1]), dtype=stats)
        if needs[1]:
            by_rows = task.plan.accumulates
            self.dc = c.new_zeros(c.shape, dtype=stats if by_rows else c.dtype)
        self.dbias = bias.new_zeros(bias.shape, dtype=torch.float64) if needs[2] else None

    def add(self, g: Tensor, rows: Tensor, at: slice, c: Tensor, columns: slice) -> None:
        """g: (R,W) of these columns, rows: (R,D). g is used up."""
        how = self.task.logits
        g.mul_(self.factors[at, None])
        if self.dbias is not None:
            self.dbias[columns] += g.sum(0)
        if self.de is None and self.dc is None:
            return
        g, scale = _operand(g, how.operands)
        c = c[columns]
        if self.de is not None:
            whole = self.rows_of_de is None
            de = g.new_zeros(rows.shape, dtype=how.stats) if whole else self.rows_of_de[at]
            for part in how.parts(c):
                _add_product(de, g[:, part], c[part].to(how.operands), scale)
            if whole:
                self.de.index_copy_(0, self.task.index[at], de.to(self.de.dtype))
        if self.dc is not None:
            dc = self.dc
            if not self.task.plan.accumulates:
                if self.slab is None:
                    self.slab = g.new_zeros(c.shape, dtype=how.stats)
                dc = self.slab
            for part in _slices(c.shape[0], c.shape[0] if scale is None else 1024):
                _add_product(dc[part], g[:, part].T, rows, scale)

    def end_of_slab(self, columns: slice) -> None:
        if self.slab is not None:
            self.dc[columns] = self.slab.to(self.dc.dtype)
            self.slab = None

    def gradients(self) -> Gradients:
        e, c, bias = self.student
        if self.rows_of_de is not None:
            self.de.index_copy_(0, self.task.index, self.rows_of_de.to(e.dtype))
        dc = None if self.dc is None else self.dc.to(c.dtype)
        dbias = self.dbias
        if dbias is not None:
            dbias = (dbias / self.task.logits.logit_scale).to(bias.dtype)
        return self.de, dc, dbias


def _gradients(
    student: Student, task: Task, factors: Tensor, needs: Needs, kept: Tensor | None = None
) -> tuple[Gradients, Tensor | None, Tensor | None]:
    """The gradients of sum factors * losses; losses and parts where they are made along with them.
    `kept`: from an earlier pass by rows."""
    plan, (de, dc, dbias) = task.plan, needs
    losses = parts = None
    by_rows: Gradients = (None, None, None)
    by_vocabulary = dc and not plan.accumulates
    if kept is None or not by_vocabulary:
        first = (de, dc and not by_vocabulary, dbias)
        sums = _Sums(student, task, factors, first) if any(first) else None
        losses, parts, kept = _by_rows(student, task, sums, keep=by_vocabulary)
        by_rows = by_rows if sums is None else sums.gradients()
        de = dbias = False
    if not by_vocabulary:
        return by_rows, losses, parts
    sums = _Sums(student, task, factors, (de, dc, dbias), plan.sums_de)
    _by_vocabulary(student, task, sums, kept)
    made = sums.gradients()
    return tuple(a if b is None else b for a, b in zip(by_rows, made)), losses, parts


# Products ---------------------------------------------------------------------------------------


def _product(out: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _add_product(out: Tensor, a: Tensor, b: Tensor, scale: Tensor | None) -> None:
    """out += a b / scale"""
    if scale is not None:
        product = torch.empty_like(out)
        _product(product, a, b)
        out.add_(product.div_(scale))
    elif a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)


def _operand(g: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """g as an operand, and the power of two that it is multiplied by, if any: what is too small for
    fp16 is then 2^-36 of the largest entry, whatever the upstream gradient."""
    if dtype != torch.float16:
        return g.to(dtype), None
    largest = torch.maximum(g.amax(), -g.amin())
    scale = torch.exp2(13 - torch.ceil(torch.log2(largest)).clamp(-100, 100))
    return g.mul_(scale).to(dtype), scale


# Autograd ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class _OfTask(autograd.Computation):
    """Operands e, c, bias; constants: the factors of a weighted sum, or None, and the task's
    tensors, which it is without here."""

    task: Task

    def forward(self, given: Saved) -> Made:
        task = self._task(given)
        losses, parts, kept = _forward(given.operands, task, keep=task.plan.sums_de)
        return Made(given._replace(made=(kept,)), (losses,), (parts,))

    def gradients(self, saved: Saved, needs: Needs, upstream: autograd.Tensors) -> Gradients:
        """Any upstream gradient: from logits that are made again."""
        (factors,), (kept,) = upstream, saved.made
        if factors is None:
            return None, None, None
        task, (_, c, _) = self._task(saved), saved.operands
        with flops.counted_as(task.products(c, False, needs)):
            return _gradients(saved.operands, task, factors, needs, kept)[0]

    def loss_and_gradients(self, given: Saved, needs: Needs) -> Made:
        factors, *_ = given.constants
        task, (_, c, _) = self._task(given), given.operands
        with flops.counted_as(task.products(c, True, needs)):
            gradients, losses, parts = _gradients(given.operands, task, factors, needs)
        return Made(given, (_sum(losses, factors),), (parts,), gradients)

    def products_again(self, saved: Saved, needs: Needs) -> list[flops.Product]:
        _, c, _ = saved.operands
        return self.task.products(c, False, needs)

    def _task(self, given: Saved) -> Task:
        _, *tensors = given.constants
        return self.task.with_tensors(tuple(tensors))


def _apart(
    student: Student, task: Task, factors: Tensor | None = None
) -> tuple[Saved, _OfTask]:
    tensors = task.tensors()
    return Saved(student, (factors, *tensors)), _OfTask(task.with_tensors((None,) * len(tensors)))

"""Losses whose coefficients are functions of the rows' own statistics, by rows: three products.

The operators do a chunk of rows up to its statistics; what the loss makes of them, row by row, is
asked of it there; then the operators make the chunk's gradients (docs/math.md, "Two schedules").
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .._core.options import Options
from .._core.weighting import Rows
from . import autograd, operators, private
from .autograd import Made, Saved
from .library import call

_torch_ops = torch.ops.cutloss


class ChunkRows(NamedTuple):
    """The R rows of a chunk."""

    index: Tensor  # (R), int64, in [0, N)
    is_row: Tensor  # (R), bool: False, as it may be on CUDA, where an entry stands for none


class RowLoss(Protocol):
    """A loss that is a sum over rows, each a function of the row's own statistics."""

    def coefficients(self, rows: ChunkRows, at: Rows) -> Rows:
        """The loss's derivatives by nll, lse and entropy (absent: zero) of a chunk's rows, whose
        statistics `at` holds, (R) each. What stands where `is_row` is False is not used. Called
        under no_grad."""

    def value(self, at: Rows) -> Tensor:
        """The loss, when every chunk's coefficients have been asked for."""


def loss(
    operands: tuple,
    options: Options,
    start: Callable[[], RowLoss],
    undefined: Tensor | None = None,
    reads: Iterable[Tensor] = (),
) -> tuple[Tensor, Rows]:
    """The loss, differentiable in e, c and bias, and the rows' statistics. `start` begins a
    RowLoss; it is called again where a second backward makes the gradients again. `options`: of a
    plan that goes by rows, with gradients made in forward. Where `undefined` is true gradients are
    zero. `reads`: tensors that the RowLoss takes, which must not have changed by then."""
    *differentiable, targets, row_temperature, class_weight = operands
    constants = targets, row_temperature, class_weight
    given = Saved(tuple(differentiable), constants, undefined=undefined)
    versions = [(t, private.version_of(t)) for t in reads if not t.is_inference()]
    value, nll, lse, entropy = autograd.immediate(given, _ByRows(options, start, versions))
    return value, Rows(nll=nll, lse=lse, entropy=entropy)


@dataclasses.dataclass
class _ByRows(operators.Linear):
    start: Callable[[], RowLoss]
    versions: list[tuple[Tensor, int]]  # of what the RowLoss takes

    def loss_and_gradients(self, given: Saved, needs: tuple[bool, ...]) -> Made:
        operands = (*given.operands, *given.constants)
        gradients, at, row_loss = _make(operands, self.options, self.start)
        return Made(given, (row_loss.value(at),), (at.nll, at.lse, at.entropy), gradients)

    def gradients_again(self, saved: Saved, needs: tuple[bool, ...]) -> autograd.Tensors:
        for t, version in self.versions:
            if private.version_of(t) != version:
                raise RuntimeError(
                    f"a second backward makes the gradients again, and a tensor of shape "
                    f"{tuple(t.shape)} that the loss takes has been changed in place since "
                    f"forward: pass a copy (clone()), or leave retain_graph out"
                )
        return super().gradients_again(saved, needs)


def leaves(**statistics: Tensor | None) -> dict[str, Tensor]:
    """Those that there are, by name, to be differentiated by."""
    present = {name: t for name, t in statistics.items() if t is not None}
    return {name: t.detach().requires_grad_() for name, t in present.items()}


def derivatives(loss: Tensor, by: dict[str, Tensor]) -> dict[str, Tensor]:
    """By each of the statistics that the loss depends on."""
    d = torch.autograd.grad(loss, list(by.values()), allow_unused=True)
    return {name: g for name, g in zip(by, d, strict=True) if g is not None}


def _coefficients(
    row_loss: RowLoss, listed: Tensor, at: Rows, wide: dict[str, Tensor]
) -> tuple[Tensor | None, ...]:
    """Those of a chunk, as the operator takes them: (N), of which it reads the chunk's rows.
    `listed`: the rows, -1 for none; `wide`: the memory of those that were made before."""
    N = at.nll.shape[0]
    is_row = listed >= 0
    rows = ChunkRows(listed.clamp(min=0), is_row)
    of_chunk = {k: t[rows.index] for k, t in vars(at).items() if t is not None}
    d = row_loss.coefficients(rows, Rows(**of_chunk))
    to = torch.where(is_row, listed, N)  # one entry more, for those that are no row

    def scattered(name: str) -> Tensor | None:
        t = getattr(d, name)
        if t is None:
            return None
        if name not in wide:
            wide[name] = t.new_empty(N + 1)
        return wide[name].index_copy_(0, to, t)[:N]

    return scattered("nll"), scattered("lse"), scattered("entropy")


@torch.no_grad()
def _make(operands: tuple, options: Options, start: Callable[[], RowLoss]):
    e, c, *rest = operands
    # Every operator would copy them again.
    e, c = (t if call(_torch_ops.is_read_in_place, t) else t.clone(
        memory_format=torch.contiguous_format) for t in (e, c))  # fmt: skip
    operands = (e, c, *rest)
    *state, chunks = call(_torch_ops.chunks_begin, *operands, **options.of_linear())
    nll, lse, _, _, entropy, de, dc, dbias, memory = state
    at = Rows(nll=nll, lse=lse, entropy=entropy if options.wants_entropy else None)
    row_loss = start()
    wide: dict[str, Tensor] = {}
    for chunk in range(chunks):
        offset, count = call(
            _torch_ops.chunk_statistics, *operands, *state, chunk, **options.of_linear()
        )
        of_rows: tuple[Tensor | None, ...] = (None, None, None)
        if count > 0:
            listed = memory[offset : offset + 8 * count].view(torch.int64)
            of_rows = _coefficients(row_loss, listed, at, wide)
        call(_torch_ops.chunk_gradients, *operands, *state, *of_rows, chunk, **options.of_linear())
    call(_torch_ops.chunks_finish, *operands, *state, **options.of_linear())
    return operators.Linear(options).wanted((de, dc, dbias)), at, row_loss

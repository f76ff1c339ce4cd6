"""Losses whose coefficients are functions of the rows' own statistics, by rows: three products.

The operators do a chunk of rows up to its statistics; what the loss makes of them, row by row, is
asked of it there; then the operators make the chunk's gradients (docs/math.md, "Two schedules").
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

from .._core.options import Options
from .._core.weighting import Rows
from . import autograd, operators, private
from .autograd import Made, Saved
from .library import call

_torch_ops = torch.ops.cutloss


class RowLoss(Protocol):
    """A loss that is a sum over rows, each a function of the row's own statistics."""

    def coefficients(self, rows: Tensor, at: Rows) -> Rows:
        """The loss's derivatives by nll, lse and entropy (absent: zero), (N) each, of which those
        of `rows` are read: the rows of a chunk, whose statistics `at` holds, (N) each. On CUDA
        entries of -1 stand for none. Called under no_grad."""

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
    for chunk in range(chunks):
        offset, count = call(
            _torch_ops.chunk_statistics, *operands, *state, chunk, **options.of_linear()
        )
        d = Rows()
        if count > 0:
            d = row_loss.coefficients(memory[offset : offset + 8 * count].view(torch.int64), at)
        of_rows = (d.nll, d.lse, d.entropy)
        call(_torch_ops.chunk_gradients, *operands, *state, *of_rows, chunk, **options.of_linear())
    call(_torch_ops.chunks_finish, *operands, *state, **options.of_linear())
    return operators.Linear(options).wanted((de, dc, dbias)), at, row_loss

"""Losses whose coefficients are functions of the rows' own statistics, by rows: three products.

The operators do a chunk of rows up to its statistics; what the loss makes of them, row by row, is
asked of it there; then the operators make the chunk's gradients (docs/math.md, "Two schedules").
"""

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

from . import _flops, _ops
from ._ops import Options, call
from ._terms import Rows

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
    versions = [(t, t._version) for t in reads if not t.is_inference()]
    value, nll, lse, entropy = _Chunked.apply(*operands, undefined, options, start, versions)
    return value, Rows(nll=nll, lse=lse, entropy=entropy)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        *tensors, undefined, options, start, ctx.versions = inputs
        operands = tuple(tensors)
        ctx.save_for_backward(*operands, undefined)
        ctx.set_materialize_grads(False)
        ctx.options, ctx.start = options, start
        ctx.gradients, at, row_loss = _make(operands, options, start)
        statistics = at.nll, at.lse, at.entropy
        ctx.mark_non_differentiable(*(t for t in statistics if t is not None))
        return row_loss.value(at), *statistics

    @staticmethod
    def backward(ctx, d_loss, *_):
        if d_loss is None:
            return (None,) * 10
        *operands, undefined = ctx.saved_tensors
        _ops.check_backward(*operands[:2], reads=ctx.gradients is None)

        def remake():
            for t, version in ctx.versions:
                if t._version != version:
                    raise RuntimeError(
                        f"a second backward makes the gradients again, and a tensor of shape "
                        f"{tuple(t.shape)} that the loss takes has been changed in place since "
                        f"forward: pass a copy (clone()), or leave retain_graph out"
                    )
            products = _flops.products_of_gradients(*operands[:2], ctx.options)
            with _flops.counted_as(products):
                return _make(tuple(operands), ctx.options, ctx.start)[0]

        return *_ops.hand_over(ctx, d_loss, operands[:3], undefined, remake), *(None,) * 7

    @staticmethod
    def jvp(ctx, *_):
        raise NotImplementedError(_ops.NO_FORWARD_MODE)


@torch.no_grad()
def _make(operands: tuple, options: Options, start: Callable[[], RowLoss]):
    e, c, *rest = operands
    # Every operator would copy them again.
    e, c = (t if call(_torch_ops.is_read_in_place, t) else t.clone(
        memory_format=torch.contiguous_format) for t in (e, c))  # fmt: skip
    operands = (e, c, *rest)
    *state, chunks = call(_torch_ops.chunks_begin, *operands, **options)
    nll, lse, _, _, entropy, de, dc, dbias, memory = state
    at = Rows(nll=nll, lse=lse, entropy=entropy if options["wants_entropy"] else None)
    row_loss = start()
    for chunk in range(chunks):
        offset, count = call(
            _torch_ops.chunk_statistics, *operands, *state, chunk, **options
        )
        d = Rows()
        if count > 0:
            d = row_loss.coefficients(memory[offset : offset + 8 * count].view(torch.int64), at)
        of_rows = (d.nll, d.lse, d.entropy)
        call(_torch_ops.chunk_gradients, *operands, *state, *of_rows, chunk, **options)
    call(_torch_ops.chunks_finish, *operands, *state, **options)
    return _ops.wanted((de, dc, dbias), options), at, row_loss

"""Calls whose loss is a function of the rows' statistics: their operands and options, where the
classifier is whole and where it lies in shards (VocabParallelOptions, DTensor)."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .. import sharded
from .._core import decide, weighting
from .._core.operands import checked_options, make_operands, shape_of_rows
from .._core.options import Options
from .._core.weighting import Rows
from .._torch import autograd, operators, shards


@dataclasses.dataclass
class Given:
    """The caller's tensors as plain ones of this rank; `e` is this rank's share of the tokens where
    tokens are sharded."""

    e: Tensor
    c: Tensor
    bias: Tensor | None
    targets: Tensor
    shard: sharded.Shard | None  # None: the classifier is whole

    def exchange(self, shift: bool | int) -> Any:
        """A context for all that may fail on this rank before the ranks exchange their statistics:
        the others then fail too, and do not wait. It gives what `RowCall.of` takes."""
        return shards.call(self.shard, self.e, self.targets, shift)


def given(e: Tensor, c: Tensor, bias: Tensor | None, targets: Tensor, options: Any) -> Given:
    """`options`: vocab_parallel_options."""
    *tensors, options = sharded.local(e, c, bias, targets, options)
    return Given(*tensors, shard=None if options is None else sharded.resolved(options))


_NO_GRADIENT = (
    "torch.compile traced this loss of a classifier in shards without its gradient: call it "
    "outside of what is compiled, in a function under torch.compiler.disable"
)


@dataclasses.dataclass
class RowCall:
    operands: tuple
    options: Options
    immediate: bool  # gradients are made along with the loss, by rows
    of_shard: shards.Call | None
    shape: tuple[int, ...]  # of per-token results

    @classmethod
    def of(
        cls,
        given: Given,
        of_shard: shards.Call | None,
        temperature: float | Tensor,
        **described: Any,
    ) -> "RowCall":
        """`described`: what checked_options takes besides."""
        e, c, bias, targets, shard = given.e, given.c, given.bias, given.targets, given.shard
        classes = None
        if of_shard is not None:
            e = of_shard.whole_e(lambda: sharded.check(shard, c, plain=False))
            classes = shard.first, shard.total
        _, options = checked_options(
            e, c, targets, bias, temperature=temperature, classes=classes, **described
        )
        if of_shard is not None:
            options = options.but(de_in_sums=shard.reduce_e_grad or shard.sequence_parallel)
        operands = make_operands(e, c, targets, bias, temperature, None, options)
        # Of a shard no row is known before all ranks have told theirs.
        known = of_shard is None and not autograd.is_differentiated_by_others(e, c, bias)
        shape = shape_of_rows(targets, options.shift)
        own_e = None if of_shard is None else of_shard.own_e
        return cls(operands, *decide.decided(operands, options, known, own_e), of_shard, shape)

    def counts(self) -> Tensor:
        """Which rows count, (N), bool."""
        labels = weighting.of_rows(self.operands[3], self.options.shift)
        return labels != self.options.ignore_index

    def statistics(self) -> Rows:
        """Of the whole vocabulary, with gradients that are made in backward."""
        if self.of_shard is not None:
            rows = self.of_shard.statistics(self.operands, self.options)
            if any(self.options.needs) and not rows.nll.requires_grad:
                raise NotImplementedError(_NO_GRADIENT)
            return rows
        return operators.statistics(operators.Linear(self.options), self.operands)

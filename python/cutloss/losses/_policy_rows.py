"""Policy losses by rows: where a token's term is a function of its own log-probability, a chunk's
gradients need no other chunk (docs/math.md, "Two schedules")."""

from typing import Any

import torch
from torch import Tensor

from .._core.weighting import Rows
from .._torch import by_rows
from ..sharded import VocabParallelOptions
from . import _policy_terms as terms
from . import _rows
from ._arguments import Loss
from .log_probs import TokenLogProbs


def loss(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    logits: dict[str, Any],
    options: dict[str, Any],
    needs_entropy: bool,
    vocab_parallel_options: VocabParallelOptions | None = None,
) -> Loss:
    """policy_loss, by rows where the plan says so. `logits`: token_log_probs' options; `options`:
    all of policy_loss's."""
    given = _rows.given(e, c, bias, targets, vocab_parallel_options)
    with given.exchange(logits["shift"]) as of_shard:
        call = _rows.RowCall.of(given, of_shard, return_entropy=needs_entropy, **logits)
        mask = call.counts().reshape(call.shape)
        unknown = mask.new_zeros(mask.shape, dtype=call.options.stats)
        of_tokens = terms.given(TokenLogProbs(unknown, mask), **options)
        if not call.immediate:
            return terms.loss(_policy(call.statistics(), mask, needs_entropy), of_tokens)
    of_rows = _PolicyRows(of_tokens, needs_entropy)
    read = [getattr(t, "log_probs", t) for t in options.values()]
    reads = [t for t in read if isinstance(t, Tensor)]
    value, _ = by_rows.loss(call.operands, call.options, lambda: of_rows, reads=reads)
    return Loss(value, of_rows.metrics)


def _policy(at: Rows, mask: Tensor, has_entropy: bool) -> TokenLogProbs:
    entropy = at.entropy.reshape(mask.shape) if has_entropy else None
    return TokenLogProbs(-at.nll.reshape(mask.shape), mask, entropy)


class _PolicyRows:
    """A by_rows.RowLoss."""

    def __init__(self, given: terms.Given, has_entropy: bool):
        self.given, self.has_entropy = given, has_entropy
        self.of_rows = given.flat()
        self.metrics: dict[str, Tensor] = {}

    def coefficients(self, rows: by_rows.ChunkRows, at: Rows) -> Rows:
        taken = by_rows.leaves(nll=at.nll, entropy=at.entropy)
        with torch.enable_grad():
            of_chunk = self.of_rows.rows(rows.index, rows.is_row)
            loss = terms.sums(-taken["nll"], taken.get("entropy"), of_chunk).loss
        return Rows(**by_rows.derivatives(loss, taken))

    def value(self, at: Rows) -> Tensor:
        complete = terms.loss(_policy(at, self.given.mask, self.has_entropy), self.given)
        self.metrics = complete.metrics
        return complete.loss

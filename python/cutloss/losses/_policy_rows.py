"""Policy losses by rows: where a token's term is a function of its own log-probability, a chunk's
gradients need no other chunk (docs/math.md, "Two schedules")."""

from typing import Any

import torch
from torch import Tensor

from .._core.weighting import Rows
from .._torch import by_rows
from ..sharded import VocabParallelOptions
from . import _rows
from ._arguments import Loss
from .log_probs import TokenLogProbs
from .policy import policy_loss


def keeps_tokens_apart(options: dict[str, Any]) -> bool:
    """Whether policy_loss with these options couples no token's term to another's log-probability
    under the policy."""
    of_sequences = (
        options.get("importance_sampling_level", "token") != "token"
        or options.get("loss_type") == "vespo"
        or options.get("off_policy_mask_threshold") is not None
        or options.get("top_entropy_quantile", 1.0) != 1.0
    )
    # The correction is p_old / p_sampler, and p_old the policy's own where it is not given.
    corrects = options.get("sampling_log_probs") is not None
    is_own = options.get("old_log_probs") is None
    how = options.get("sampling_correction", "sequence_mask")
    couples_sampler = corrects and is_own and how is not None and how.startswith("sequence")
    return not of_sequences and not couples_sampler


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
    """policy_loss, by rows where the plan says so. `logits`: token_log_probs' options."""
    given = _rows.given(e, c, bias, targets, vocab_parallel_options)
    with given.exchange(logits["shift"]) as of_shard:
        call = _rows.RowCall.of(given, of_shard, return_entropy=needs_entropy, **logits)
        of_rows = _PolicyRows(call.counts().reshape(call.shape), options)
        if not call.immediate:
            return of_rows.evaluate(call.statistics())
    read = [getattr(t, "log_probs", t) for t in options.values()]
    reads = [t for t in read if isinstance(t, Tensor)]
    value, _ = by_rows.loss(call.operands, call.options, lambda: of_rows, reads=reads)
    return Loss(value, of_rows.metrics)


class _PolicyRows:
    """A by_rows.RowLoss. A chunk's coefficients are the derivatives of the whole loss, in which
    other chunks' log-probabilities stand as 0: they change its value, not these derivatives."""

    def __init__(self, mask: Tensor, options: dict[str, Any]):
        self.mask = mask
        self.options = options
        self.metrics: dict[str, Tensor] = {}

    def evaluate(self, at: Rows) -> Loss:
        return policy_loss(self._log_probs(at.nll, at.entropy), **self.options)

    def _log_probs(self, nll: Tensor, entropy: Tensor | None) -> TokenLogProbs:
        has_entropy = entropy is not None and entropy.numel() == nll.numel()
        entropy = entropy.reshape(self.mask.shape) if has_entropy else None
        return TokenLogProbs(-nll.reshape(self.mask.shape), self.mask, entropy)

    def coefficients(self, rows: Tensor, at: Rows) -> Rows:
        N = self.mask.numel()
        in_chunk = self.mask.new_zeros(N + 1)  # one entry more, for those that are no row
        in_chunk.index_fill_(0, torch.where(rows >= 0, rows, N), True)
        taken = {
            name: torch.where(in_chunk[:N], t, 0.0).requires_grad_()
            for name, t in (("nll", at.nll), ("entropy", at.entropy))
            if t is not None
        }
        with torch.enable_grad():
            total = policy_loss(
                self._log_probs(taken["nll"], taken.get("entropy")), **self.options
            ).loss
        d = torch.autograd.grad(total, list(taken.values()))
        return Rows(**dict(zip(taken, d, strict=True)))

    def value(self, at: Rows) -> Tensor:
        complete = self.evaluate(at)
        self.metrics = complete.metrics
        return complete.loss

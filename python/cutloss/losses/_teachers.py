"""What a row of logits is compared with: another model's logits, or its stored top k.

Rules of `_chunks`. The loss of a row is soft_weight divergence + hard_weight nll, the divergence at
the temperature, nll without; g is that of this loss times temperature / soft_weight (`scale`).
"""

import dataclasses

import torch
from torch import Tensor

from ._chunks import NEVER, Logits, OfRows, Rows
from ._divergences import DIVERGENCES, by_logits

TAILS = ("bucket", "renormalise", "ignore")

# Of stored probabilities: the least that is left for all other classes, and the most that rounding
# makes of their sum.
_LEAST_REST = 1e-7
MOST_MASS = 1.05


@dataclasses.dataclass(frozen=True)
class Mixture:
    """What both rules share."""

    divergence: str
    beta: float
    temperature: float
    soft_weight: float
    hard_weight: float

    @property
    def scale(self) -> float:
        return self.soft_weight / self.temperature

    @property
    def hard(self) -> float:
        """The weight of nll in g."""
        return self.hard_weight / self.scale

    @property
    def twice(self) -> bool:
        """Whether nll and divergence are of different distributions."""
        return self.hard_weight != 0 and self.temperature != 1

    def of_entries(self, s: Tensor, t: Tensor, wants_loss: bool = True):
        return DIVERGENCES[self.divergence].of_entries(s, t, self.beta, wants_loss)

    def made(self, soft: Tensor, nll: Tensor | None, g: Tensor | None, kept: list) -> OfRows:
        losses, parts = self.soft_weight * soft, [soft]
        if nll is not None:
            losses, parts = losses + self.hard_weight * nll, [soft, nll]
        return OfRows(losses, torch.stack(parts, -1), g, torch.cat(kept, -1) if kept else None)


def _log_probs(z: Tensor, kept: list | None) -> Tensor:
    """log softmax, and the maximum and the logarithm of the sum beside it, (R,1) each: subtracted
    one after the other they keep the digits that a common offset of the logits would take."""
    log_p = torch.log_softmax(z, -1)
    if kept is not None:
        kept += [z.amax(-1, keepdim=True), -log_p.amax(-1, keepdim=True)]
    return log_p


def _nll(log_p: Tensor) -> Tensor:
    """(R), of (R,1)"""
    return torch.where(log_p > NEVER / 2, -log_p, torch.inf)[:, 0]


def _add_at(g: Tensor, classes: Tensor, columns: slice, values: Tensor | float) -> None:
    """g (R,W) of these columns += values (R,K) at classes (R,K). No two that matter are at one
    place (nothing is added at all others), so that the order does not matter."""
    local = classes - (columns.start or 0)
    inside = (local >= 0) & (local < g.shape[1])
    # A number becomes a tensor where it is used: a copy from the host would wait for the device.
    values = values.to(g.dtype) if isinstance(values, Tensor) else g.new_full((), values)
    values = torch.where(inside, values, g.new_zeros(()))
    g.scatter_add_(1, local.clamp(0, g.shape[1] - 1), values)


@dataclasses.dataclass(frozen=True)
class OfModel:
    """Another model's head. Its tensors: e (M,Dt) as the student's lies, c (V,Dt), bias (V)."""

    mixture: Mixture
    logits: Logits
    e: Tensor
    c: Tensor
    bias: Tensor | None
    targets: Tensor | None  # (n), in [0,V)
    invalid: Tensor | None  # (n), bool: NaN
    infinite: Tensor | None  # (), bool: whether a class has a probability of 0 in one of the two

    @property
    def parts(self) -> int:
        return 1 + (self.mixture.hard_weight != 0)

    @property
    def teacher_width(self) -> int:
        return self.c.shape[1]

    @property
    def kept(self) -> int:
        return 5 + 2 * self.mixture.twice

    @property
    def scale(self) -> float:
        return self.mixture.scale

    @property
    def buffers(self) -> int:
        return DIVERGENCES[self.mixture.divergence].buffers + self.mixture.twice

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.e, self.c, self.bias, self.targets, self.invalid, self.infinite

    def with_tensors(self, tensors: tuple[Tensor | None, ...]) -> "OfModel":
        return OfModel(self.mixture, self.logits, *tensors)

    def of_rows(self, logits: list[Tensor], rows: Rows, gradient: bool, keep: bool) -> OfRows:
        mix, z = self.mixture, logits.pop()
        kept = [] if keep else None
        target = None if self.targets is None else self.targets[rows.at, None]
        nll = once = None
        if mix.twice:
            beside = [] if keep else None
            once = _log_probs(z, beside)
            nll = _nll(once.gather(1, target))
        s = _log_probs(z.div_(mix.temperature) if mix.temperature != 1 else z, kept)
        del z
        if target is not None and nll is None:
            nll = _nll(s.gather(1, target))
        t = _log_probs(self._teacher(rows, slice(None)), kept)
        soft, slope = mix.of_entries(s, t)
        del t
        nan = None if self.invalid is None else self.invalid[rows.at]
        if self.infinite is not None:
            soft = torch.where(self.infinite & ~soft.isnan(), torch.inf, soft)
        if nan is not None:
            soft = soft.masked_fill(nan, torch.nan)
        g = None
        if gradient or keep:
            total = slope.sum(-1, keepdim=True)
            if target is not None and once is None:
                total -= mix.hard
            if DIVERGENCES[mix.divergence].infinite == "teacher" and self.infinite is not None:
                total = torch.where(self.infinite, torch.nan, total)
            if nan is not None:
                total = total.masked_fill(nan[:, None], torch.nan)
            if keep:
                kept += [total] + (beside if mix.twice else [])
        if gradient:
            g = self._g(slope, s, total, target, once, slice(None))
        return mix.made(soft, nll, g, kept)

    def of_slab(self, z: Tensor, rows: Rows, columns: slice, kept: Tensor) -> Tensor:
        mix = self.mixture
        s_max, s_sum, t_max, t_sum, total, *beside = kept.split(1, -1)
        target = None if self.targets is None else self.targets[rows.at, None]
        once = (z - beside[0]).sub_(beside[1]) if mix.twice else None
        s = (z.div_(mix.temperature) if mix.temperature != 1 else z).sub_(s_max).sub_(s_sum)
        t = self._teacher(rows, columns).sub_(t_max).sub_(t_sum)
        slope = mix.of_entries(s, t, wants_loss=False)[1]
        del t
        return self._g(slope, s, total, target, once, columns)

    def _teacher(self, rows: Rows, columns: slice) -> Tensor:
        how = self.logits
        chosen = how.rows(self.e, rows)
        z = how.of(chosen, self.c, how.floored(self.bias), columns)
        return z.div_(self.mixture.temperature) if self.mixture.temperature != 1 else z

    def _g(
        self, slope: Tensor, s: Tensor, total: Tensor, target: Tensor | None, once: Tensor | None,
        columns: slice,
    ) -> Tensor:  # fmt: skip
        """All but `once`, the log-probabilities at temperature 1, at the temperature."""
        hard = self.mixture.hard
        if target is not None and once is None:
            _add_at(slope, target, columns, -hard)
        g = by_logits(slope, s, total)
        if once is not None:
            g.add_(once.exp_(), alpha=hard)
            _add_at(g, target, columns, -hard)
        return g


@dataclasses.dataclass(frozen=True)
class OfTopK:
    """Stored log-probabilities of some classes: ids (M,K) and log_probs (M,K), as e lies.

    An entry of -inf is not there, whatever its id is. The K classes and, with tail="bucket", all
    others together are the events that the divergence is taken of.
    """

    mixture: Mixture
    tail: str
    ids: Tensor
    log_probs: Tensor
    targets: Tensor | None  # (n), in [0,V)
    invalid: Tensor | None  # (n), bool: NaN

    @property
    def parts(self) -> int:
        return 1 + (self.mixture.hard_weight != 0)

    @property
    def teacher_width(self) -> int:
        return 0

    @property
    def kept(self) -> int:
        return 3 + self.ids.shape[1] + 2 * self.mixture.twice

    @property
    def scale(self) -> float:
        return self.mixture.scale

    @property
    def buffers(self) -> int:
        return 2 + self.mixture.twice

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.ids, self.log_probs, self.targets, self.invalid

    def with_tensors(self, tensors: tuple[Tensor | None, ...]) -> "OfTopK":
        return OfTopK(self.mixture, self.tail, *tensors)

    def of_rows(self, logits: list[Tensor], rows: Rows, gradient: bool, keep: bool) -> OfRows:
        mix, z = self.mixture, logits.pop()
        ids, log_t, here = self._stored(rows)
        invalid = faults(ids, log_t, here, z.shape[1], self.tail).any(0)
        if self.invalid is not None:
            invalid = invalid | self.invalid[rows.at]
        here &= (ids >= 0) & (ids < z.shape[1])
        ids = torch.where(here, ids, 0)
        target = None if self.targets is None else self.targets[rows.at, None]
        nll = once = None
        beside = [] if keep and mix.twice else None
        if mix.twice:
            once = _log_probs(z, beside)
            nll = _nll(once.gather(1, target))
        if mix.temperature != 1:
            z.div_(mix.temperature)
        of_target = None if target is None else z.gather(1, target)

        # The K classes leave z, so that what is left is the rest.
        top = torch.where(here, z.gather(1, ids), NEVER).to(z.dtype)
        _add_at(z, ids, slice(None), torch.where(here, NEVER, 0.0))
        rest_max = z.amax(-1, keepdim=True)
        rest = torch.softmax(z, -1)
        del z
        rest_sum = -rest.amax(-1, keepdim=True).log()
        nothing = rest_max <= NEVER / 2  # all classes are among the K
        largest = torch.maximum(rest_max, top.amax(-1, keepdim=True))
        of_rest = torch.where(nothing, NEVER, rest_max - largest + rest_sum).to(top.dtype)
        events = torch.cat([top - largest, of_rest], -1)
        log_p = torch.log_softmax(events, -1)  # (R,K+1)
        if target is not None and nll is None:
            log_sum = torch.logsumexp(events, -1, keepdim=True)
            nll = _nll(of_target - largest - log_sum)

        soft, u = self._events(log_p, top - largest, log_t, here, nothing)
        if target is not None and once is None:
            u = u + mix.hard * log_p.exp()
        u = u.masked_fill(invalid[:, None], torch.nan)
        soft = soft.masked_fill(invalid, torch.nan)
        at_ids, of_rest = torch.where(here, u[:, :-1], 0.0), u[:, -1:]
        g = None
        if gradient:
            g = rest.mul_(of_rest)
            self._put(g, ids, at_ids, target, once, slice(None))
        kept = [rest_max, rest_sum, of_rest, at_ids] + (beside or []) if keep else None
        return mix.made(soft, nll, g, kept)

    def of_slab(self, z: Tensor, rows: Rows, columns: slice, kept: Tensor) -> Tensor:
        mix = self.mixture
        ids, _, here = self._stored(rows)
        rest_max, rest_sum, of_rest = kept[:, :3].split(1, -1)
        at_ids, beside = kept[:, 3 : 3 + ids.shape[1]], kept[:, 3 + ids.shape[1] :]
        target = None if self.targets is None else self.targets[rows.at, None]
        once = (z - beside[:, :1]).sub_(beside[:, 1:]) if mix.twice else None
        if mix.temperature != 1:
            z.div_(mix.temperature)
        _add_at(z, ids, columns, torch.where(here, NEVER, 0.0))
        g = z.sub_(rest_max).sub_(rest_sum).exp_().mul_(of_rest)
        self._put(g, ids, at_ids, target, once, columns)
        return g

    def _stored(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """ids, log-probabilities and which of them are there, (R,K)"""
        ids = self.ids.index_select(0, rows.index).long()
        log_t = self.log_probs.index_select(0, rows.index)
        log_t = log_t.to(torch.promote_types(log_t.dtype, torch.float32))
        here = log_t != -torch.inf
        if rows.counts is not None:
            here &= rows.counts[:, None]
        return ids, log_t, here

    def _events(
        self, log_p: Tensor, top: Tensor, log_t: Tensor, here: Tensor, nothing: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The divergence (R), and its derivative by the logits of the K classes and of all others
        together, (R,K+1)."""
        mix = self.mixture
        t = torch.where(here, log_t, NEVER).to(log_p.dtype)
        s = log_p
        if self.tail == "bucket":
            log_mass = torch.logsumexp(t, -1, keepdim=True).clamp(max=-_LEAST_REST)
            left = torch.where(nothing, NEVER, torch.log(-torch.expm1(log_mass)))
            t = torch.cat([t, left.to(t.dtype)], -1)
        elif self.tail == "renormalise":
            s, t = torch.log_softmax(top, -1), torch.log_softmax(t, -1)
        else:
            s = log_p[:, :-1].contiguous()
        infinite = ((s < NEVER / 2) & (t > NEVER / 2)).any(-1)
        soft, slope = mix.of_entries(s, t)
        if self.tail == "ignore":  # the events are not all that there is
            slope = slope + DIVERGENCES[mix.divergence].omitted * s.exp()
        if DIVERGENCES[mix.divergence].infinite == "student":
            soft = torch.where(infinite, torch.inf, soft)
        total = slope.sum(-1, keepdim=True)
        if self.tail != "bucket":
            slope = torch.cat([slope, torch.zeros_like(total)], -1)
        if self.tail == "renormalise":
            s = torch.cat([s, torch.full_like(total, NEVER)], -1)
        else:
            s = log_p
        return soft, slope - s.exp() * total

    def _put(
        self, g: Tensor, ids: Tensor, at_ids: Tensor, target: Tensor | None, once: Tensor | None,
        columns: slice,
    ) -> None:  # fmt: skip
        hard = self.mixture.hard
        _add_at(g, ids, columns, at_ids)
        if once is not None:
            g.add_(once.exp_(), alpha=hard)
        if target is not None:
            _add_at(g, target, columns, -hard)


def faults(ids: Tensor, log_t: Tensor, here: Tensor, V: int, tail: str) -> Tensor:
    """(3,R), bool: an id outside the vocabulary, one that is there twice, probabilities whose sum
    is more than 1."""
    outside = (here & ((ids < 0) | (ids >= V))).any(-1)
    absent = -1 - torch.arange(ids.shape[1], device=ids.device)
    ordered = torch.where(here, ids, absent).sort(-1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]).any(-1)
    if tail == "renormalise":
        return torch.stack([outside, twice, torch.zeros_like(twice)])
    mass = torch.where(here, log_t.exp(), 0.0).sum(-1)
    return torch.stack([outside, twice, mass > MOST_MASS])

"""The loss of a classifier in shards. Each rank makes the open statistics of its classes; one
gather brings those of all ranks to each, which merges them in the order of the ranks and closes the
rows: the same bits everywhere. In backward each rank makes the gradients of its classes, and dE is
summed over the ranks, in the dtype of its sums.

Every rank joins every collective, whatever its data, and one that fails says so in the gather.
Plans need not agree: what is exchanged does not depend on them.
"""

import contextlib
import dataclasses
import functools
import math
import struct
import weakref
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .._core import checks
from .._core.options import Options, stat_dtype
from .._core.weighting import Rows
from . import library, partitioned
from .autograd import Saved, Tensors
from .operators import Constants, Linear, Outputs, deferred, of_rows

if TYPE_CHECKING:
    from ..sharded import Shard

_ops = torch.ops.cutloss


# What ranks tell each other -----------------------------------------------------------------------

_MESSAGE_BYTES = 512
# By the names of PyTorch 2.13, and those before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _gathered(t: Tensor, shard: "Shard") -> Tensor:
    """(ranks, ...) of what each rank has, of one shape and dtype."""
    size = len(shard.ranges)
    out = t.new_empty((size * t.shape[0], *t.shape[1:]))
    _all_gather(out, t.contiguous(), group=shard.group)
    return out.view(size, *t.shape)


def _digest(targets: Tensor) -> Tensor:
    """A number that hardly two batches of targets share: (1), int64, on their device."""
    flat = targets.reshape(-1).to(torch.int64)
    mixed = flat * 0x5851F42D4C957F2D + torch.arange(flat.numel(), device=flat.device)
    mixed = (mixed ^ (mixed >> 29)) * 0x14057B7EF767814F
    return (mixed ^ (mixed >> 32)).sum().view(1)


class Facts(NamedTuple):
    """What a rank tells of itself, beside the digest of its targets."""

    first: int
    count: int
    total: int
    failed: int
    call: int  # a number made of what must be the same on all ranks: what is computed of a row

    @classmethod
    def of(cls, shard: "Shard", call: str, rank: int | None = None) -> "Facts":
        start, stop = shard.ranges[shard.rank if rank is None else rank]
        return cls(start, stop - start, shard.total, 0, zlib.crc32(call.encode()))


_FACTS = struct.Struct("7q")  # Facts, rows, digest of the targets


def _tell(
    shard: "Shard", call: str, rows: int, targets: Tensor, error: Exception | None
) -> None:
    """Raises on every rank where one of them has failed, or has other classes, options or tokens
    than the others know of. Waits for the device."""
    words = "" if error is None else f"{type(error).__name__}: {error}"
    message = words.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0")
    digest = _digest(targets).item()
    own = Facts.of(shard, call)._replace(failed=int(error is not None))
    told = _FACTS.pack(*own, rows, digest) + message
    told = torch.frombuffer(bytearray(told), dtype=torch.uint8).to(targets.device)
    all_of_them = [bytes(each) for each in _gathered(told, shard).tolist()]
    if error is not None:
        raise error
    for rank, each in enumerate(all_of_them):
        *facts, its_rows, its_digest = _FACTS.unpack(each[: _FACTS.size])
        its, expected = Facts(*facts), Facts.of(shard, call, rank)
        if its.failed:
            said = each[_FACTS.size :].rstrip(b"\0").decode(errors="replace")
            raise RuntimeError(f"rank {rank} of the sharded classifier's group failed: {said}")
        if its[:3] != expected[:3]:
            raise ValueError(
                f"rank {rank} has the classes [{its.first}, {its.first + its.count}) of "
                f"{its.total}, where rank {shard.rank} expected [{expected.first}, "
                f"{expected.first + expected.count}) of {shard.total}: every rank must make the "
                f"same calls, for shards of the same classifier"
            )
        if (its_rows, its_digest) != (rows, digest):
            counts = "" if its_rows == rows else f" ({its_rows} tokens, not {rows})"
            raise ValueError(
                f"rank {rank} has other targets than rank {shard.rank}{counts}, and the ranks of a "
                f"sharded classifier must have the same e and targets, which are classes of the "
                f"whole vocabulary on every rank. If each has a batch of its own (c is a DTensor "
                f"that FSDP has sharded, not tensor parallelism), {partitioned.IN_FORWARD}"
            )
        if its.call != expected.call:
            raise ValueError(
                f"rank {rank} makes the call with other options than rank {shard.rank}, which has "
                f"{call}: the ranks of a sharded classifier must have the same dtype and options, "
                f"results asked for included, and e must want a gradient on all of them or on none"
            )


_HEADERS = 2  # records of states that a header takes


@functools.lru_cache(maxsize=256)
def _known(ranges: tuple, device: torch.device) -> Tensor:
    """The classes that the ranks' headers begin with, (ranks, 4): on the device once, by a call
    that waits anyway, since to bring them there would wait."""
    total = ranges[-1][1]
    table = [(start, stop - start, total, 0) for start, stop in ranges]
    return torch.tensor(table, dtype=torch.int64, device=device)


# The shards of which a group has made a first call, in which every rank looks at what the others
# have; later ones on CUDA would wait.
_seen: "weakref.WeakKeyDictionary[ProcessGroup, set[tuple]]" = weakref.WeakKeyDictionary()


def _looks(shard: "Shard", device: torch.device) -> bool:
    return shard.ranges not in _seen.get(shard.group, ()) or checks.may_look(device)


def _has_looked(shard: "Shard", device: torch.device) -> None:
    _known(shard.ranges, device)
    _seen.setdefault(shard.group, set()).add(shard.ranges)


def _exchanged(
    states: Tensor, targets: Tensor, shard: "Shard", call: str, error: Exception | None
) -> tuple[Tensor, Tensor | None]:
    """The states of all ranks, (ranks, _HEADERS + rows, bytes), and whether all of them are what
    they should be: None where that was looked at, else one bool on the device. `states` has room
    for the header."""
    records, _ = states.shape
    if _looks(shard, states.device):
        _tell(shard, call, records - _HEADERS, targets, error)
        _has_looked(shard, states.device)
        return _gathered(states, shard), None
    known = _known(shard.ranges, states.device)
    digest = _digest(targets) ^ Facts.of(shard, call).call
    expected = torch.cat((known, digest.expand(len(shard.ranges), 1)), dim=1)
    own = expected[shard.rank] if error is None else torch.full_like(expected[0], -1)
    size = own.numel() * own.itemsize
    states.view(-1)[:size] = own.view(torch.uint8)
    told = _gathered(states, shard)
    if error is not None:
        raise error
    headers = told.view(len(shard.ranges), -1)[:, :size].contiguous().view(torch.int64)
    return told, (headers == expected).all()


class Tokens(NamedTuple):
    """How an e lies of which each rank has a share of the tokens."""

    dim: int  # of targets
    ranks: int
    own: torch.Size  # of e as the caller has it
    whole: torch.Size  # of all of it

    @classmethod
    def of(cls, e: Tensor, targets: Tensor, ranks: int) -> "Tokens":
        have, want = tuple(e.shape[:-1]), tuple(targets.shape)
        differ = [i for i, pair in enumerate(zip(have, want, strict=False)) if pair[0] != pair[1]]
        dim = differ[0] if differ else 0
        if len(have) != len(want) or not want or len(differ) > 1 or (
            have[dim] * ranks != want[dim]
        ):
            raise ValueError(
                f"sequence_parallel: e must have 1/{ranks} of the tokens of targets along one "
                f"dimension, and all of them along the others: got e {tuple(e.shape)} and targets "
                f"{want}; pad the sequence to a multiple of {ranks}, or leave sequence_parallel "
                f"out where e is whole"
            )
        return cls(dim, ranks, e.shape, torch.Size((*want, e.shape[-1])))

    def gathered(self, e: Tensor, shard: "Shard") -> Tensor:
        return _gathered(e.detach(), shard).movedim(0, self.dim).reshape(self.whole)

    def sum_of_own(self, de: Tensor, shard: "Shard") -> Tensor:
        """The sum over all ranks, of this rank's tokens alone."""
        parts = de.view(self.whole).unflatten(self.dim, (self.ranks, -1))
        parts = parts.movedim(self.dim, 0).contiguous()
        own = parts.new_empty(parts.shape[1:])
        _reduce_scatter(own.view(-1), parts.view(-1), group=shard.group)
        return own


# The loss -----------------------------------------------------------------------------------------


@dataclasses.dataclass
class ShardedLinear(Linear):
    """Operands e, c (this rank's), bias (this rank's). Where tokens are sharded, the operand e is
    the caller's, and `made` of what forward is given is the whole e, (sequences, length, D)."""

    shard: "Shard"
    tokens: Tokens | None = None
    # What else must be the same on all ranks, in words.
    weighting: str = ""
    call: "Call | None" = None

    def in_words(self) -> str:
        """What must be the same on all ranks. What each of them has of memory, plans, and gradients
        of c and bias need not be."""
        o = self.options
        return (
            f"{o.compute_dtype}, shift {o.shift}, ignore_index {o.ignore_index}, softcap "
            f"{o.softcap}, logit_scale {o.logit_scale}, temperature {o.temperature}, entropy "
            f"{o.wants_entropy}, mean logit {o.wants_zbar}, predictions {o.wants_argmax}, gradient "
            f"of e {o.needs_de}{self.weighting}"
        )

    def outputs(self, given: Saved) -> Outputs:
        e, c, bias = given.operands
        if self.tokens is not None:
            (e,) = given.made
        targets, row_temperature, class_weight, _ = given.constants
        options, shard = self.options, self.shard
        rows = e.shape[0] * (e.shape[1] - options.shift)
        kept = e.new_empty((0,), dtype=torch.uint8)
        states = error = None
        try:
            if shard.count > 0:
                states, kept = library.call(
                    _ops.open_statistics, e, c, bias, targets, row_temperature, class_weight,
                    _HEADERS, **self.keywords(),
                )  # fmt: skip
        except Exception as failure:  # the other ranks wait for this one
            error = failure
        if states is None:
            states = library.call(_ops.empty_states, e, _HEADERS + rows, options.stats)
        if self.call is not None:
            # And let go of: it has tensors, which until backward are autograd's alone to keep.
            self.call.has_exchanged, self.call = True, None
        told, is_right = _exchanged(states, targets, shard, self.in_words(), error)
        closed = library.call(
            _ops.close_rows, told, targets, class_weight, is_right, _HEADERS, options.stats,
            shard.total, options.shift, options.ignore_index, options.wants_entropy,
            options.wants_zbar, options.wants_argmax,
        )  # fmt: skip
        return Outputs(e.new_empty((0,), dtype=options.stats), *closed, kept)

    def gradients(self, saved: Saved, needs: tuple[bool, ...], upstream: Tensors) -> Tensors:
        e, c, bias = saved.operands
        constants = Constants(*saved.constants).without_terms()
        whole = e
        if self.tokens is not None:  # again, so that nobody keeps it from forward to backward
            targets, *_ = constants
            whole = self.tokens.gathered(e, self.shard).view(*targets.shape, e.shape[-1])
        if self.shard.count > 0:
            d_rows = of_rows(self.options, None, None, *upstream)
            inputs = (whole, c, bias, *constants, *saved.made, *d_rows)
            gradients = self.call_of_gradients(saved, inputs)
        else:
            no_dbias = None if bias is None else torch.zeros_like(bias)
            gradients = _zeros(whole, self.options), torch.zeros_like(c), no_dbias
        de, dc, dbias = self.wanted(gradients)
        return None if de is None else self._summed(de, e.dtype), dc, dbias

    def _summed(self, de: Tensor, dtype: torch.dtype) -> Tensor:
        """The gradient of the caller's e, of this rank's part of it."""
        shard, ranks = self.shard, len(self.shard.ranges)
        if self.tokens is not None:
            return self.tokens.sum_of_own(de, shard).to(dtype)
        if not shard.reduce_e_grad:
            return de
        if de.dtype == dtype or de.numel() % ranks != 0:
            dist.all_reduce(de, group=shard.group)
            return de.to(dtype)
        # What an all-reduce does in two steps; the second has less to carry once its numbers are
        # rounded.
        own = de.new_empty((de.numel() // ranks,))
        _reduce_scatter(own, de.view(-1), group=shard.group)
        summed = torch.empty_like(de, dtype=dtype)
        _all_gather(summed.view(-1), own.to(dtype), group=shard.group)
        return summed


def _zeros(e: Tensor, options: Options) -> Tensor:
    # Packed, as the operators make it, whatever the strides of e: a collective adds up memory.
    return e.new_zeros(e.shape, dtype=options.stats if options.de_in_sums else e.dtype)


class Call:
    """One call for a shard. As a context it sees to it that a rank which fails before the exchange
    joins it all the same, since the others wait for it there."""

    def __init__(self, shard: "Shard", e: Tensor, targets: Tensor, shift: bool | int):
        self.shard, self.own_e, self.targets, self.shift = shard, e, targets, shift
        self.tokens: Tokens | None = None
        self.weighting = ""  # as ShardedLinear has it
        self.dc_into: Tensor | None = None  # as Linear has it
        self.has_exchanged = False

    def whole_e(self, check: Callable[[], None]) -> Tensor:
        """The e of all tokens. `check` raises where something is wrong with this rank's shard."""
        try:
            check()
            if self.shard.sequence_parallel:
                ranks = len(self.shard.ranges)
                self.tokens = Tokens.of(self.own_e, self.targets, ranks)
        except Exception as error:
            self._fail_where_e_is_gathered(error)
            raise
        if self.tokens is None:
            return self.own_e
        if torch.compiler.is_compiling():
            return _traced_tokens(self.own_e, self.shard, self.tokens)
        if _looks(self.shard, self.own_e.device):
            self._tell(None)
        return self.tokens.gathered(self.own_e, self.shard)

    def _tell(self, error: Exception | None) -> None:
        self.has_exchanged = True  # where it raises all ranks do
        _tell(self.shard, "tokens", self._rows(), self.targets, error)
        self.has_exchanged = False

    def _fail_where_e_is_gathered(self, error: Exception) -> None:
        if not self.shard.sequence_parallel or torch.compiler.is_compiling():
            return
        if _looks(self.shard, self.own_e.device):
            self._tell(error)
        share = self.targets.numel() // len(self.shard.ranges) * self.own_e.shape[-1]
        _gathered(self.own_e.new_zeros((share,)), self.shard)

    def statistics(self, operands: tuple, options: Options) -> Rows:
        """Per-row outputs of the whole vocabulary, whose gradients are made in backward.
        `operands`: as operators.statistics has them, with the whole e."""
        computation = ShardedLinear(
            options, self.shard, self.tokens, self.weighting, self, dc_into=self.dc_into
        )
        given = computation.given((*operands, None, None))
        if self.tokens is not None:
            whole, *others = given.operands
            given = given._replace(operands=(self.own_e, *others), made=(whole,))
        if torch.compiler.is_compiling():
            return _traced(computation, given)
        return deferred(computation, given)[1]

    def _rows(self) -> int:
        shape = self.targets.shape
        if shape and 0 < int(self.shift) <= shape[-1]:
            return math.prod(shape[:-1]) * (shape[-1] - int(self.shift))
        return math.prod(shape)

    def __enter__(self) -> "Call":
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if not isinstance(error, Exception) or self.has_exchanged:
            return
        stats = stat_dtype(self.own_e.dtype)
        states = library.call(_ops.empty_states, self.own_e, _HEADERS + self._rows(), stats)
        _exchanged(states, self.targets, self.shard, "", error)


def _traced_tokens(e: Tensor, shard: "Shard", tokens: Tokens) -> Tensor:
    from . import shard_operators  # which knows this module

    words = shard_operators.in_words(ShardedLinear(Options(torch.float32), shard, tokens))
    return _ops.sharded_tokens(e.detach(), words)


def _traced(computation: ShardedLinear, given: Saved) -> Rows:
    from . import shard_operators  # which knows this module

    e, c, bias = given.operands
    whole = given.made[0] if given.made else None
    nll, lse, _, log_sum, entropy, zbar_centred, argmax, _ = _ops.sharded_statistics(
        e, c, bias, *given.constants[:3], whole, shard_operators.in_words(computation)
    )
    return Rows(
        nll=nll, lse=lse, log_sum=log_sum, entropy=entropy, zbar_centred=zbar_centred, argmax=argmax
    )


def call(shard: "Shard | None", e: Tensor, targets: Tensor, shift: bool | int) -> Any:
    """A context: the Call, or None where the classifier is whole."""
    return _WHOLE if shard is None else Call(shard, e, targets, shift)


_WHOLE = contextlib.nullcontext()

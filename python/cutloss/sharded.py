"""``VocabParallelOptions``: a classifier whose rows (classes) lie in shards on the ranks of a process
group, as tensor parallelism has them; which shard is whose, from these options or from a DTensor.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ._torch import partitioned, private

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclasses.dataclass
class VocabParallelOptions:
    """This rank's shard of the classifier: the classes [start, stop) of a vocabulary whose other
    classes the other ranks of the group have.

    Shards may be uneven, and empty; together they must be the whole vocabulary, in the order of the
    ranks. Every rank of the group makes the same call, with the same e and targets (class indices
    of the whole vocabulary) and its own c and bias: the loss and every per-token result are then
    the same bits on all ranks, the gradient of c is that of the shard, and the gradient of e is the
    sum over all shards, added up in fp32.

    :param start: The first class of this rank's c.
    :param stop: One past the last: c has stop - start rows.
    :param group: The process group; None is the default group.
    :param reduce_e_grad: False leaves the gradient of e as this rank's part of the sum, for who
        adds the parts up elsewhere.
    :param sequence_parallel: e is sharded too: each rank has an equal share of the tokens of one
        dimension of targets, which are whole. They are gathered for the call (and once more in
        backward), and each rank gets the gradient of its own tokens.

    Make one object for a classifier, in the same way on all ranks, and keep it: where it was not
    made by ``from_vocab``, its first use asks all ranks for their ranges.
    """

    start: int
    stop: int
    group: "ProcessGroup | None" = None
    reduce_e_grad: bool = True
    sequence_parallel: bool = dataclasses.field(default=False, kw_only=True)

    @classmethod
    def from_vocab(
        cls,
        vocab_size: int,
        group: "ProcessGroup | None" = None,
        reduce_e_grad: bool = True,
        *,
        sequence_parallel: bool = False,
    ) -> "VocabParallelOptions":
        """The balanced partition: of vocab_size classes over T ranks the first vocab_size % T ranks
        have one more."""
        rank, size = _place_in(group)
        ranges = balanced(vocab_size, size)
        options = cls(
            *ranges[rank], group, reduce_e_grad, sequence_parallel=sequence_parallel
        )
        _remember(options, ranges)
        return options


def equal(
    rows: int,
    group: "ProcessGroup",
    reduce_e_grad: bool = True,
    *,
    sequence_parallel: bool = False,
) -> VocabParallelOptions:
    """Of shards that have the same number of rows on all ranks; that they do is checked with
    everything else, in the calls."""
    rank, size = _place_in(group)
    ranges = tuple((i * rows, (i + 1) * rows) for i in range(size))
    own = VocabParallelOptions(
        *ranges[rank], group, reduce_e_grad, sequence_parallel=sequence_parallel
    )
    _remember(own, ranges)
    return own


class Shard(NamedTuple):
    """What the options say of this rank, checked, and of the others."""

    ranges: tuple[tuple[int, int], ...]  # of each rank: start, stop
    rank: int
    group: "ProcessGroup"
    group_name: str
    reduce_e_grad: bool
    sequence_parallel: bool

    @property
    def first(self) -> int:
        return self.ranges[self.rank][0]

    @property
    def count(self) -> int:
        start, stop = self.ranges[self.rank]
        return stop - start

    @property
    def total(self) -> int:
        return self.ranges[-1][1]


def balanced(vocab_size: int, size: int) -> tuple[tuple[int, int], ...]:
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
        raise TypeError(f"vocab_size must be an int, got {vocab_size!r}")
    if vocab_size < 1:
        raise ValueError(f"vocab_size must be >= 1, got {vocab_size}")
    each, more = divmod(vocab_size, size)
    starts = [rank * each + min(rank, more) for rank in range(size + 1)]
    return tuple(zip(starts[:-1], starts[1:], strict=True))


def _place_in(group: "ProcessGroup | None") -> tuple[int, int]:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "a sharded classifier needs torch.distributed, which is not initialized: call "
            "torch.distributed.init_process_group first, or pass the whole classifier without "
            "vocab_parallel_options"
        )
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError(
            "this rank is not in the group of vocab_parallel_options: only the group's ranks may "
            "make the call"
        )
    return rank, size


# The ranges of an object's group are found once, and kept on the object: options of others may be
# dataclasses that have no hash.
_RANGES = "_cutloss_ranges"


def _remember(options: Any, ranges: Sequence[tuple[int, int]]) -> None:
    key = options.start, options.stop, _group_of(options).group_name
    object.__setattr__(options, _RANGES, (key, tuple(ranges)))


def _group_of(options: Any) -> "ProcessGroup":
    return dist.group.WORLD if options.group is None else options.group


def resolved(options: Any) -> Shard:
    """`options`: ours, or any object with their attributes (cut_cross_entropy's)."""
    missing = [n for n in ("start", "stop", "group", "reduce_e_grad") if not hasattr(options, n)]
    if missing:
        raise TypeError(
            f"vocab_parallel_options must be a VocabParallelOptions, or have its attributes: got "
            f"{options!r}, without {', '.join(missing)}"
        )
    start, stop = options.start, options.stop
    rank, size = _place_in(options.group)
    group = _group_of(options)
    known, ranges = getattr(options, _RANGES, (None, ()))
    is_known = known == (start, stop, group.group_name) and len(ranges) == size
    if not is_known or ranges[rank] != (start, stop):
        ranges = _asked_of_all(options, size)
        _remember(options, ranges)
    return Shard(
        ranges,
        rank,
        group,
        group.group_name,
        bool(options.reduce_e_grad),
        bool(getattr(options, "sequence_parallel", False)),
    )


def _asked_of_all(options: Any, size: int) -> tuple[tuple[int, int], ...]:
    """The ranges of all ranks; where those of one are none, an error on all of them."""
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "vocab_parallel_options are used for the first time in compiled code, where the "
            "ranks cannot be asked for their ranges: make them by from_vocab, or make one call "
            "that is not compiled before"
        )
    error = _range_error(options.start, options.stop)
    told: list[Any] = [None] * size
    own = (options.start, options.stop) if error is None else f"{type(error).__name__}: {error}"
    dist.all_gather_object(told, own, group=options.group)
    if error is not None:
        raise error
    for other, each in enumerate(told):
        if isinstance(each, str):
            raise RuntimeError(f"rank {other} of the sharded classifier's group failed: {each}")
    check_tiling(told)
    return tuple(told)


def _range_error(start: Any, stop: Any) -> Exception | None:
    for name, value in (("start", start), ("stop", stop)):
        if isinstance(value, bool) or not isinstance(value, int):
            return TypeError(f"vocab_parallel_options.{name} must be an int, got {value!r}")
    if 0 <= start <= stop:
        return None
    return ValueError(
        f"vocab_parallel_options must have 0 <= start <= stop, got start {start}, stop {stop}"
    )


def check_tiling(ranges: Sequence[tuple[int, int]]) -> None:
    """The same error on every rank."""
    end = 0
    for rank, (start, stop) in enumerate(ranges):
        if start != end:
            raise ValueError(
                f"the shards of vocab_parallel_options must follow each other in the order of the "
                f"ranks, from class 0 on, without a gap or an overlap: rank {rank} starts at "
                f"{start}, where {end} was expected; all ranks have {list(ranges)}"
            )
        end = stop
    if end == 0:
        raise ValueError(f"all shards of vocab_parallel_options are empty: {list(ranges)}")


def check(shard: Shard, c: Tensor, plain: bool) -> None:
    if isinstance(c, Tensor) and c.dim() == 2 and c.shape[0] != shard.count:
        raise ValueError(
            f"c must have stop - start rows, those of this rank's shard: got c {tuple(c.shape)} and "
            f"start {shard.first}, stop {shard.first + shard.count}"
        )
    if plain:
        raise NotImplementedError(
            "impl='torch' takes a whole classifier: gather c, or leave impl out"
        )
    if private.is_transformed():
        raise NotImplementedError(
            "a sharded classifier (vocab_parallel_options) is not supported under torch.func "
            "(grad, vmap, vjp, jvp): use autograd, or gather c"
        )


# DTensors -----------------------------------------------------------------------------------------


class Local(NamedTuple):
    """The caller's tensors as plain ones of this rank, and what they are shards of."""

    e: Tensor
    c: Tensor
    bias: Tensor | None
    targets: Tensor
    options: Any


def local(e: Tensor, c: Tensor, bias: Tensor | None, targets: Tensor, options: Any) -> Local:
    """Where c is a DTensor placed Shard(0) on a mesh of one dimension, it is taken for a shard, with
    an e, a bias and targets that may be DTensors on the same mesh; gradients come back as DTensors
    placed alike. Otherwise all are left as they are, and a DTensor will be refused."""
    if not partitioned.has_classes(c):
        return Local(e, c, bias, targets, options)
    mesh = c.device_mesh
    if options is not None:
        raise ValueError(
            "c is a DTensor, which says what is whose: leave vocab_parallel_options out, or pass "
            "c.to_local()"
        )
    if bias is not None:
        is_on_mesh = partitioned.is_dtensor(bias) and bias.device_mesh == mesh
        if not (is_on_mesh and partitioned.is_shard(bias, 0)):
            raise ValueError(
                f"bias must be a DTensor placed as c is, {c.placements} on {mesh}: got "
                f"{_described(bias)}"
            )
        bias = bias.to_local(grad_placements=bias.placements)
    if partitioned.is_dtensor(targets):
        if targets.device_mesh != mesh or not targets.placements[0].is_replicate():
            raise ValueError(
                f"targets must be whole on every rank: got {_described(targets)}; pass "
                f"targets.full_tensor()"
            )
        targets = targets.to_local()
    if mesh.get_local_rank() != dist.get_rank(mesh.get_group()):
        raise ValueError(
            f"c is a DTensor on {mesh}, whose ranks do not lie in the order of their group, so that "
            f"its shards would be taken for each other's: make a mesh of ascending ranks"
        )
    e, shares_tokens = _local_e(e, c, mesh)
    ranges = _chunks(c.shape[0], mesh.size())
    own = VocabParallelOptions(
        *ranges[mesh.get_local_rank()], mesh.get_group(), sequence_parallel=shares_tokens
    )
    _remember(own, ranges)
    return Local(e, c.to_local(grad_placements=c.placements), bias, targets, own)


def _local_e(e: Tensor, c: Tensor, mesh: Any) -> tuple[Tensor, bool]:
    """And whether each rank has a share of the tokens."""
    if not partitioned.is_dtensor(e):
        return e, False
    (placement,) = e.placements if e.device_mesh == mesh else (None,)
    if placement is not None and placement.is_replicate():
        # Every rank gets the whole sum.
        return e.to_local(grad_placements=e.placements), False
    if any(partitioned.is_shard(e, dim) for dim in range(e.dim() - 1)) and e.device_mesh == mesh:
        return e.to_local(grad_placements=e.placements), True
    raise ValueError(
        f"e must be plain, or a DTensor on the mesh of c that is whole on every rank (Replicate) or "
        f"sharded on its tokens (Shard of a dimension other than the last): got {_described(e)} "
        f"beside c {_described(c)}; pass e.redistribute(placements=[Replicate()]), or "
        f"e.full_tensor() where its mesh is another"
    )


def _described(t: Tensor) -> str:
    if partitioned.is_dtensor(t):
        return f"a DTensor {tuple(t.shape)} placed {t.placements} on {t.device_mesh}"
    return f"a plain tensor {tuple(t.shape)}"


def _chunks(V: int, size: int) -> tuple[tuple[int, int], ...]:
    """The partition of DTensors: whole chunks of V / size rounded up, then what is left."""
    each = -(-V // size)
    ends = [min(rank * each, V) for rank in range(size + 1)]
    return tuple(zip(ends[:-1], ends[1:], strict=True))

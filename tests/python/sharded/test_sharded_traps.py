"""What goes wrong, without an error, in losses over shards of a vocabulary: a test for each trap.

Some are tested beside what they belong to:

* label smoothing over the classes of one shard instead of all: test_sharded, "smoothed" and
  "weighted", of uneven shards;
* a sum of this rank's part of e's gradient that nobody makes: test_sharded compares it on all ranks;
* the weight of another module, or one that is used where nothing gathers it: test_sharded_heads,
  "outside_of_forward_is_refused", and integrations/test_megatron, tied and
  "pre_hooks_are_called".
"""

import dataclasses

import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import processes
from helpers.processes import checks, refused
from helpers.sharded_problems import D, V, compare, make, ranges_of, sharded, whole
from helpers.tolerance import assert_near
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.parallel import loss_parallel

from cutloss import VocabParallelOptions, linear_cross_entropy

SPLITS = ("balanced", "uneven", "one_has_all")


def own_rows(own, t):
    return t[own.start : own.stop].clone().requires_grad_()


def check_whole_classifiers_that_say_they_are_shards(world):
    """Every rank has all classes: each would be counted once for every rank, and the loss be too
    large by the logarithm of their number."""
    p = make(world)
    all_of_it = VocabParallelOptions(0, V)
    match = f"rank 1 starts at 0, where {V} was expected"
    refused(ValueError, match, lambda: linear_cross_entropy(
        p.e, p.c, p.targets, vocab_parallel_options=all_of_it))  # fmt: skip


def check_gradient_of_a_view(world, sequence_parallel):
    """A reduction of something that is not contiguous may reduce a copy, and leave the gradient a
    part of the sum."""
    p = make(world, shape=(2 * world.size, 3))
    own = dataclasses.replace(ranges_of(world, "uneven"), sequence_parallel=sequence_parallel)
    e = p.e.chunk(world.size)[world.rank] if sequence_parallel else p.e
    wide = torch.stack((e.transpose(0, 1), torch.zeros_like(e.transpose(0, 1))), -1)
    leaf = wide.contiguous().requires_grad_()  # of which e is every other number, transposed
    c = own_rows(own, p.c)
    loss = linear_cross_entropy(
        leaf[..., 0].transpose(0, 1), c, p.targets, vocab_parallel_options=own
    )
    loss.backward()
    (want, *_), de, _, _ = whole(p, {})
    de = de.chunk(world.size)[world.rank] if sequence_parallel else de
    assert_near(loss, want, "loss", torch.float32)
    assert_near(leaf.grad[..., 0].transpose(0, 1), de, "e.grad", torch.float32)


def check_partial_e(world):
    """Hidden states that are parts of a sum: their gradient would be reduced once more."""
    p = make(world)
    mesh = init_device_mesh(world.device.type, (world.size,))
    c = distribute_tensor(p.c, mesh, [Shard(0)]).requires_grad_()
    e = DTensor.from_local(p.e, mesh, [Partial()], run_check=False)
    refused(ValueError, "redistribute", lambda: linear_cross_entropy(e, c, p.targets))


def check_every_class_is_a_target(world, split):
    """A number that stands for "not among my classes" may be one of them, or a column that pads the
    last tile: each class is the target once, and shards are no multiple of any tile."""
    p = make(world, shape=(V,))
    p.targets = torch.randperm(V, generator=torch.Generator().manual_seed(3)).to(world.device)
    compare(world, p, {"reduction": "none"}, ranges_of(world, split), torch.float32)


def check_ignore_index(world, ignore_index):
    """Which may be a class, of one shard or another, or no class at all."""
    p = make(world, ignored=0.0)
    p.targets[::7] = ignore_index
    options = {"reduction": "none", "ignore_index": ignore_index}
    compare(world, p, options, ranges_of(world, "uneven"), torch.float32)


def check_targets_of_one_shard(world, owner):
    """Where a forward sums target logits over ranks and autograd differentiates that, those that
    have not the target get wrong gradients: here all targets are of one rank."""
    p = make(world)
    first, last = (0, 300) if owner == 0 else (300, V)
    p.targets = p.targets.where(p.targets < 0, first + p.targets % (last - first))
    compare(world, p, {"label_smoothing": 0.1}, ranges_of(world, "uneven"), torch.float32)


def check_partition_of_dtensors(world, classes):
    """Theirs is in chunks that are rounded up: the last ranks have fewer classes, or none."""
    p = make(world)
    p.c = p.c[:classes].clone()
    p.targets = torch.where(p.targets >= 0, p.targets % classes, p.targets)
    want = whole(p, {})
    mesh = init_device_mesh(world.device.type, (world.size,))
    c = distribute_tensor(p.c, mesh, [Shard(0)]).requires_grad_()
    e = p.e.clone().requires_grad_()
    loss = linear_cross_entropy(e, c, p.targets)
    loss.backward()
    assert_near(loss, want[0][0], "loss", torch.float32)
    assert_near(e.grad, want[1], "e.grad", torch.float32)
    assert_near(c.grad.full_tensor(), want[2], "c.grad", torch.float32)


def check_parts_that_cancel(world):
    """Parts of e's gradient that are rounded to 16 bits before they are added up: here they are
    large, and their sum is small."""
    g = torch.Generator().manual_seed(0)
    rows = 16
    large = 64 * torch.rand(1, D, generator=g) + 64
    halves = [sign * large + torch.randn(rows, D, generator=g) / 64 for sign in (1, -1)]
    c = torch.cat(halves).to(world.device, torch.bfloat16)
    e = torch.zeros(40, D, device=world.device).bfloat16()  # so that all classes are as likely
    targets = torch.zeros(40, dtype=torch.int64, device=world.device)
    ends = [0, rows, *[2 * rows] * world.size]
    own = VocabParallelOptions(ends[world.rank], ends[world.rank + 1])
    mine = e.clone().requires_grad_()
    _, lse = linear_cross_entropy(
        mine, own_rows(own, c), targets, return_lse=True, vocab_parallel_options=own
    )
    lse.sum().backward()  # of which the gradient of e is the mean of c
    mean = c.double().mean(0)
    parts = c[:rows].double().sum(0).abs() / (2 * rows)
    error = (mine.grad[0].double() - mean).abs()
    assert mean.abs().max() < parts.min() / 64, "parts that do not cancel prove nothing"
    assert (error <= mean.abs() * 2.0**-8 + parts * 2.0**-18).all()


def _cp_and_tp(world, tp=2):
    """The groups of this rank: of tensor parallelism (which have the same tokens), and across."""
    mesh = init_device_mesh(
        world.device.type, (world.size // tp, tp), mesh_dim_names=("cp", "tp")
    )
    return mesh.get_group("cp"), mesh.get_group("tp"), mesh.get_local_rank("cp")


def check_tokens_and_classes_in_shards(world):
    """Means over the tokens of a rank where each has another number of them; a rank without any
    token that leaves early, while others wait for it; the group of all ranks, in place of the one
    that was passed."""
    cp, tp, at = _cp_and_tp(world)
    parts = world.size // 2
    p = make(world, shape=(2, 12 * parts))
    p.targets[:, :12] = -100  # of the first part nothing counts
    want = whole(p, {})
    e = p.e.chunk(parts, 1)[at].clone().requires_grad_()
    targets = p.targets.chunk(parts, 1)[at].contiguous()
    own = VocabParallelOptions.from_vocab(V, tp)
    assert own.stop - own.start < V - 1
    c = own_rows(own, p.c)
    tokens = (targets != -100).sum()
    dist.all_reduce(tokens, group=cp)
    total = linear_cross_entropy(
        e, c, targets, reduction="sum", vocab_parallel_options=own
    )
    loss = total / tokens
    loss.backward()
    assert (total == 0) == (at == 0)
    whole_loss = loss.detach().clone()
    dist.all_reduce(whole_loss, group=cp)
    dist.all_reduce(c.grad, group=cp)
    assert_near(whole_loss, want[0][0], "loss", torch.float32)
    assert_near(e.grad, want[1].chunk(parts, 1)[at], "e.grad", torch.float32)
    assert_near(c.grad, want[2][own.start : own.stop], "c.grad", torch.float32)


def check_two_at_once(world):
    """State of a module or a stream that two calls share: forwards first, then backwards in the
    other order, of losses that differ."""
    p, q = make(world), make(world, shape=(2, 17), seed=5)
    own, other = ranges_of(world, "uneven"), ranges_of(world, "balanced")
    calls = []
    for problem, options, shard in ((p, {}, own), (q, {"softcap": 3.0}, other)):
        e, c = problem.e.clone().requires_grad_(), own_rows(shard, problem.c)
        loss = linear_cross_entropy(e, c, problem.targets, vocab_parallel_options=shard, **options)
        calls.append((loss, e, c, shard, whole(problem, options)))
    for loss, e, c, shard, want in reversed(calls):
        loss.backward()
        assert_near(loss, want[0][0], "loss", torch.float32)
        assert_near(e.grad, want[1], "e.grad", torch.float32)
        if shard.stop > shard.start:
            assert_near(c.grad, want[2][shard.start : shard.stop], "c.grad", torch.float32)


def check_under_loss_parallel(world):
    """The context that PyTorch has for sharded logits changes nothing of a loss without them."""
    p = make(world)
    want = whole(p, {})
    mesh = init_device_mesh(world.device.type, (world.size,))
    c = distribute_tensor(p.c, mesh, [Shard(0)]).requires_grad_()
    e = p.e.clone().requires_grad_()
    with loss_parallel():
        loss = linear_cross_entropy(e, c, p.targets)
        loss.backward()
    assert_near(loss, want[0][0], "loss", torch.float32)
    assert_near(e.grad, want[1], "e.grad", torch.float32)
    assert_near(c.grad.full_tensor(), want[2], "c.grad", torch.float32)


def check_mean_is_not_reduced_again(world):
    """All ranks have the same mean: it is the plain one, and not that times their number."""
    p, own = make(world), ranges_of(world, "balanced")
    (loss, *_), _, _, _ = sharded(p, {}, own)
    plain = F.cross_entropy(p.e @ p.c.T, p.targets)
    assert_near(loss, plain, "loss", torch.float32)


CHECKS = [
    *checks(check_whole_classifiers_that_say_they_are_shards),
    *checks(check_gradient_of_a_view, (False, True)),
    *checks(check_partial_e),
    *checks(check_every_class_is_a_target, SPLITS),
    *checks(check_ignore_index, (0, 299, V - 1, V, 2**40)),
    *checks(check_targets_of_one_shard, (0, 1)),
    *checks(check_partition_of_dtensors, (1, 5, 9)),
    *checks(check_parts_that_cancel),
    *checks(check_two_at_once),
    *checks(check_under_loss_parallel),
    *checks(check_mean_is_not_reduced_again),
]
OF_FOUR = [*CHECKS, *checks(check_tokens_and_classes_in_shards)]
BY_SIZE = {2: CHECKS, 4: OF_FOUR}
test_cpu = processes.on_cpu(BY_SIZE)

"""A classifier in shards (VocabParallelOptions, DTensor): the loss, every result and every gradient
are those of the whole classifier, the same bits on all ranks, whatever the shards' sizes."""

import dataclasses
import os
import types

import pytest
import torch
import torch.distributed as dist
from helpers import processes
from helpers.processes import checks, refused
from helpers.sharded_problems import (
    OPTIONS, N, V, compare, given_by_name, make, ranges_of, same_on_all, sharded, total_of, whole,
)  # fmt: skip
from helpers.tolerance import assert_near
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from cutloss import VocabParallelOptions, linear_cross_entropy

SPLITS = ("balanced", "uneven", "one_has_all")
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def check_options(world, name, split):
    p = make(world, torch.float32)
    compare(world, p, OPTIONS[name], ranges_of(world, split), torch.float32)


def check_dtypes(world, dtype, split):
    p = make(world, dtype)
    compare(world, p, OPTIONS["mean"], ranges_of(world, split), dtype)


def check_shapes(world):
    for shape, shift in (((3, 11), 1), ((2, 3, 5), 0), ((1,), 0), ((0,), 0), ((2, 1), 1)):
        p = make(world, shape=shape)
        options = {"shift": shift, "reduction": "sum"}
        compare(world, p, options, ranges_of(world, "uneven"), torch.float32)


def check_everything_ignored(world):
    p = make(world, ignored=1.0)
    loss, results = None, None
    e = p.e.clone().requires_grad_()
    own = ranges_of(world, "uneven")
    c = p.c[own.start : own.stop].clone().requires_grad_()
    loss = linear_cross_entropy(e, c, p.targets, vocab_parallel_options=own)
    assert loss.isnan()
    loss.backward()
    assert (e.grad == 0).all() and (c.grad == 0).all()


def check_apples_case(world):
    """N 252, V 507, D 123, a fifth ignored, and an lse that carries a gradient: the test of
    cut_cross_entropy."""
    torch.manual_seed(0)
    e0 = torch.randn(252, 123, device=world.device).bfloat16()
    c0 = (torch.randn(V, 123, device=world.device) / 5).bfloat16()
    y = torch.randint(V, (252,), device=world.device)
    y[torch.rand(252, device=world.device) < 0.2] = -100
    dist.broadcast(e0, 0), dist.broadcast(c0, 0), dist.broadcast(y, 0)

    def step(e, c, **options):
        nll, lse = linear_cross_entropy(e, c, y, return_lse=True, **options)
        (nll + 1e-2 * lse[y != -100].square().mean()).backward()
        return nll

    own = types.SimpleNamespace(group=None, reduce_e_grad=True)  # theirs, by its attributes
    own.start, own.stop = 507 * world.rank // world.size, 507 * (world.rank + 1) // world.size
    e, c = e0.clone().requires_grad_(), c0[own.start : own.stop].clone().requires_grad_()
    nll = step(e, c, vocab_parallel_options=own)
    e1, c1 = e0.double().requires_grad_(), c0.double().requires_grad_()
    assert_near(nll, step(e1, c1), "nll", torch.bfloat16)
    assert_near(e.grad, e1.grad, "e.grad", torch.bfloat16)
    assert_near(c.grad, c1.grad[own.start : own.stop], "c.grad", torch.bfloat16)


def check_parts_of_e(world):
    p = make(world)
    own = dataclasses.replace(ranges_of(world, "uneven"), reduce_e_grad=False)
    _, part, _, _ = sharded(p, {}, own)
    dist.all_reduce(part)
    assert_near(part, whole(p, {})[1], "the sum of the parts", torch.float32)


def check_nobody_asks_for_e(world):
    """Nothing is communicated in backward; nor is there anything to reduce without gradients."""
    p, own = make(world), ranges_of(world, "balanced")
    c = p.c[own.start : own.stop].clone().requires_grad_()
    loss = linear_cross_entropy(p.e, c, p.targets, vocab_parallel_options=own)
    with counted_collectives() as calls:
        loss.backward()
    assert not calls
    assert_near(c.grad, whole(p, {})[2][own.start : own.stop], "c.grad", torch.float32)
    with torch.no_grad(), counted_collectives() as calls:
        linear_cross_entropy(p.e, c, p.targets, vocab_parallel_options=own)
    assert 1 <= len(calls) <= 2


class counted_collectives:
    """Calls of torch.distributed that communicate, by name."""

    def __enter__(self):
        from helpers.inside import shards

        self.calls, self.undo = [], []
        places = (dist, "all_reduce"), (shards, "_all_gather"), (shards, "_reduce_scatter")
        for module, name in places:
            original = getattr(module, name)
            self.undo.append((module, name, original))
            setattr(module, name, lambda *a, _f=original, _n=name, **k: (
                self.calls.append(_n), _f(*a, **k))[1])  # fmt: skip
        return self.calls

    def __exit__(self, *_):
        for module, name, original in self.undo:
            setattr(module, name, original)


def check_random_splits(world):
    p = make(world)
    want = whole(p, OPTIONS["everything"])

    @settings(derandomize=True, max_examples=15, deadline=None, database=None)
    @given(st.lists(st.integers(0, V), min_size=world.size - 1, max_size=world.size - 1))
    def try_split(ends):
        ends = [0, *sorted(ends), V]
        own = VocabParallelOptions(ends[world.rank], ends[world.rank + 1])
        results, de, _, _ = sharded(p, OPTIONS["everything"], own)
        assert_near(results[0], want[0][0], "loss", torch.float32)
        assert_near(de, want[1], "e.grad", torch.float32)

    try_split()


def check_plans_may_differ(world):
    """Each rank plans for itself, with what memory it has: nothing that ranks exchange depends on
    it."""
    p = make(world, shape=(400,))
    own = ranges_of(world, "uneven")
    memory = None if world.rank == 0 else 1 << 20
    schedule = "rows" if world.rank == 0 else "vocabulary"
    results, de, dc, _ = sharded(p, {}, own, max_workspace=memory, schedule=schedule)
    want = whole(p, {})
    assert_near(results[0], want[0][0], "loss", torch.float32)
    assert_near(de, want[1], "e.grad", torch.float32)
    same_on_all(world, results[0].detach(), de)


def check_a_group_of_some_ranks(world):
    """Ranks that are not in it make no call."""
    ranks = [0, world.size - 1]
    group = dist.new_group(ranks)
    if world.rank not in ranks:
        refused(ValueError, "not in the group", lambda: VocabParallelOptions.from_vocab(V, group))
        return
    p = make(world)
    own = VocabParallelOptions.from_vocab(V, group)
    results, de, dc, _ = sharded(p, {}, own)
    want = whole(p, {})
    assert_near(results[0], want[0][0], "loss", torch.float32)
    assert_near(de, want[1], "e.grad", torch.float32)
    assert_near(dc, want[2][own.start : own.stop], "c.grad", torch.float32)


def check_other_ways_of_calling(world):
    """Under autocast, under activation checkpointing, and backward twice."""
    p, own = make(world), ranges_of(world, "uneven")
    e = p.e.clone().requires_grad_()
    c = p.c[own.start : own.stop].clone().requires_grad_()

    def loss(e, c):
        return linear_cross_entropy(e, c, p.targets, vocab_parallel_options=own)

    _, de, dc, _ = whole(p, {})
    value = checkpoint(loss, e, c, use_reentrant=False)
    for times in (1, 2):
        value.backward(retain_graph=True)
        assert_near(e.grad, times * de, "e.grad", torch.float32)
        if own.stop > own.start:
            assert_near(c.grad, times * dc[own.start : own.stop], "c.grad", torch.float32)
    e.grad = c.grad = None
    with torch.autocast(world.device.type, torch.bfloat16):
        loss(e, c).backward()
    assert e.grad.dtype == torch.float32
    assert_near(e.grad, de, "e.grad", torch.bfloat16)


def check_repeatable(world):
    p, own = make(world, torch.bfloat16), ranges_of(world, "uneven")
    first = sharded(p, OPTIONS["everything"], own)
    for _ in range(5):
        again = sharded(p, OPTIONS["everything"], own)
        for a, b in zip((*first[0], *first[1:3]), (*again[0], *again[1:3])):
            assert torch.equal(a, b)


# Tokens in shards ---------------------------------------------------------------------------------


def check_sequence_parallel(world, dim):
    p = make(world, torch.bfloat16, shape=(4 * world.size, 3 * world.size))
    own = dataclasses.replace(ranges_of(world, "uneven"), sequence_parallel=True)
    parts = p.e.chunk(world.size, dim)
    e = parts[world.rank].clone().requires_grad_()
    c = p.c[own.start : own.stop].clone().requires_grad_()
    loss = linear_cross_entropy(e, c, p.targets, shift=1, vocab_parallel_options=own)
    loss.backward()
    (want, *_), de, dc, _ = whole(p, {"shift": 1})
    assert_near(loss, want, "loss", torch.bfloat16)
    assert_near(e.grad, de.chunk(world.size, dim)[world.rank], "e.grad", torch.bfloat16)
    if own.stop > own.start:
        assert_near(c.grad, dc[own.start : own.stop], "c.grad", torch.bfloat16)


def check_dtensors(world):
    p = make(world, shape=(world.size, 4 * world.size))
    want = whole(p, {"bias": "bias"})
    mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("tp",))

    def placed(t, placement):
        return distribute_tensor(t, mesh, [placement]).requires_grad_()

    for make_e in (
        lambda: p.e.clone().requires_grad_(),
        lambda: placed(p.e, Replicate()),
        lambda: placed(p.e, Shard(0)),
        lambda: placed(p.e, Shard(1)),
    ):
        e, c, bias = make_e(), placed(p.c, Shard(0)), placed(p.bias, Shard(0))
        loss, _ = total_of(linear_cross_entropy(e, c, p.targets, bias))
        loss.backward()
        assert_near(loss, want[0][0], "loss", torch.float32)
        for t, expected in zip((e, c, bias), want[1:], strict=True):
            if hasattr(t, "placements"):
                assert t.grad.placements == t.placements
            got = t.grad.full_tensor() if hasattr(t.grad, "full_tensor") else t.grad
            assert_near(got, expected, "a gradient", torch.float32)


# Compiled -----------------------------------------------------------------------------------------


def check_compiled(world, name, backend):
    """In one graph, and the same bits."""
    torch._dynamo.reset()
    p = make(world, shape=(2, 15 * world.size))
    for shares_tokens in (False, True):
        own = VocabParallelOptions.from_vocab(V, sequence_parallel=shares_tokens)
        e = p.e.chunk(world.size, 1)[world.rank] if shares_tokens else p.e
        e = e.transpose(0, 1).contiguous().transpose(0, 1)  # strides that are not packed
        given = given_by_name(p, OPTIONS[name])
        given.pop("bias", None)

        def loss(e, c):
            return total_of(
                linear_cross_entropy(
                    e, c, p.targets, vocab_parallel_options=own, schedule="vocabulary", **given
                )
            )[0]

        found = []
        for f in (loss, torch.compile(loss, backend=backend, fullgraph=True)):
            e = e.detach().clone(memory_format=torch.preserve_format)
            c = p.c[own.start : own.stop].T.contiguous().T
            value = f(e.requires_grad_(), c.requires_grad_())
            value.backward()
            found.append((value, e.grad, c.grad))
        for a, b in zip(*found, strict=True):
            if backend == "inductor":  # which adds up the rows of the loss in another order
                torch.testing.assert_close(a, b)
            else:
                assert torch.equal(a, b)


# What is refused, and what goes wrong -------------------------------------------------------------


def check_refusals(world):
    p, own = make(world), ranges_of(world, "balanced")
    c = p.c[own.start : own.stop]

    def call(c=c, options=own, **more):
        return linear_cross_entropy(p.e, c, p.targets, vocab_parallel_options=options, **more)

    refused(ValueError, "stop - start rows", lambda: call(p.c))
    refused(NotImplementedError, "takes a whole classifier", lambda: call(impl="torch"))
    refused(TypeError, "without start", lambda: call(options=object()))
    refused(TypeError, "start must be an int", lambda: call(options=VocabParallelOptions(0.0, 1)))
    refused(ValueError, "0 <= start <= stop", lambda: call(options=VocabParallelOptions(3, 1)))
    refused(ValueError, "weight must be", lambda: call(weight=p.weight[:-1]))
    refused(ValueError, "follow each other", lambda: call(
        p.c[:10], VocabParallelOptions(0, 10)))  # fmt: skip
    refused(ValueError, "vocab_size must be", lambda: VocabParallelOptions.from_vocab(0))
    refused(NotImplementedError, "torch.func", lambda: torch.func.grad(
        lambda e: linear_cross_entropy(e, c, p.targets, vocab_parallel_options=own))(p.e))  # fmt: skip
    p.targets[7] = V
    if world.device.type == "cuda":  # where nobody looks
        assert call().isnan()
        os.environ["CUTLOSS_CHECK"] = "1"
    refused(ValueError, f"is {V}, outside", call)
    os.environ.pop("CUTLOSS_CHECK", None)


def check_one_rank_fails(world):
    """Every rank raises, or, on CUDA, where nobody looks, has NaN; nobody waits."""
    p, own = make(world), ranges_of(world, "balanced")
    on_cuda = world.device.type == "cuda"
    c = p.c[own.start : own.stop].clone().requires_grad_()
    last = world.size - 1
    for looks in (True, False) if on_cuda else (True, True):
        os.environ["CUTLOSS_CHECK"] = str(int(looks))
        error, match = RuntimeError, f"rank {last} .* failed: ValueError: .*max_workspace"
        memory = None
        if world.rank == last:
            error, match, memory = ValueError, "the smallest plan needs", 16

        def call():
            return linear_cross_entropy(
                p.e, c, p.targets, vocab_parallel_options=own, max_workspace=memory
            )

        if looks or world.rank == last:
            refused(error, match, call)
        else:
            assert call().isnan()
    os.environ.pop("CUTLOSS_CHECK")
    linear_cross_entropy(p.e, c, p.targets, vocab_parallel_options=own).backward()


def check_ranks_disagree(world):
    p, own = make(world), ranges_of(world, "balanced")
    c = p.c[own.start : own.stop]
    targets = p.targets.clone()
    targets[0] = world.rank

    def call(**more):
        linear_cross_entropy(p.e, c, vocab_parallel_options=own, **{"targets": targets, **more})

    if world.device.type == "cuda":
        loss = linear_cross_entropy(
            p.e, c, targets, vocab_parallel_options=own, reduction="none"
        )
        assert loss[targets != -100].isnan().all()
        os.environ["CUTLOSS_CHECK"] = "1"
    refused(ValueError, "other targets", call)
    rows = N - (world.rank == 0)
    refused(ValueError, "tokens", lambda: linear_cross_entropy(
        p.e[:rows], c, p.targets[:rows], vocab_parallel_options=own))  # fmt: skip
    os.environ.pop("CUTLOSS_CHECK", None)


def check_options_differ(world):
    """What would be a loss of nobody's model."""
    p, own = make(world, ignored=0.0), ranges_of(world, "balanced")
    c = p.c[own.start : own.stop]
    here = world.rank == 0
    different = (
        {"softcap": 1.0 + here},
        {"temperature": 1.0 + here},
        {"return_entropy": here},
        {"label_smoothing": 0.1 * here},
        {"ignore_index": -100 - here},
        {"reduction": "sum" if here else "mean"},
    )
    os.environ["CUTLOSS_CHECK"] = "1"
    for options in different:
        refused(ValueError, "with other options than", lambda: linear_cross_entropy(
            p.e, c, p.targets, vocab_parallel_options=own, **options))  # fmt: skip
    e = p.e.clone().requires_grad_(here)
    refused(ValueError, "want a gradient", lambda: linear_cross_entropy(
        e, c, p.targets, vocab_parallel_options=own))  # fmt: skip
    for mine, others in (([0, 1], [3, 0]), ([0, 1, 0, 0, 0, 0], [3, 0, 0, 0, 0, 0])):
        y = torch.tensor(mine if here else others, device=world.device)
        refused(ValueError, "other targets", lambda: linear_cross_entropy(
            p.e[: len(y)], c, y, vocab_parallel_options=own))  # fmt: skip
    os.environ.pop("CUTLOSS_CHECK")


def check_one_rank_fails_before_e_is_gathered(world):
    p = make(world, shape=(2, 6 * world.size))
    own = dataclasses.replace(ranges_of(world, "balanced"), sequence_parallel=True)
    c = p.c[own.start : own.stop]
    e = p.e.chunk(world.size, 1)[world.rank]
    last = world.rank == world.size - 1
    for wrong in ({"c": c[:-1]}, {"e": e[:, :-1]}):
        given = {"e": e, "c": c, **(wrong if last else {})}

        def call():
            return linear_cross_entropy(
                given["e"], given["c"], p.targets, vocab_parallel_options=own
            )

        if world.device.type == "cuda" and not last and _has_looked(own):
            assert call().isnan()
        else:
            refused(ValueError if last else RuntimeError, "stop - start|1/|failed", call)


def _has_looked(own):
    from helpers.inside import shards

    from cutloss import sharded

    shard = sharded.resolved(own)
    return not shards._looks(shard, torch.device("cuda"))


def check_ranges_are_wrong_on_one_rank(world):
    p = make(world)
    own = ranges_of(world, "balanced")
    for start, stop, error in ((5, 3, ValueError), (0.0, 5, TypeError)):
        wrong = world.rank == 0
        options = VocabParallelOptions(*((start, stop) if wrong else (own.start, own.stop)))
        refused(error if wrong else RuntimeError, "start|failed", lambda: linear_cross_entropy(
            p.e, p.c[own.start : own.stop], p.targets, vocab_parallel_options=options))  # fmt: skip


def check_another_group(world):
    """Options that are given another group ask its ranks again."""
    p, own = make(world), ranges_of(world, "balanced")
    c = p.c[own.start : own.stop]
    want = linear_cross_entropy(p.e, c, p.targets, vocab_parallel_options=own)
    own.group = dist.new_group(list(range(world.size)))
    assert torch.equal(linear_cross_entropy(p.e, c, p.targets, vocab_parallel_options=own), want)


def check_a_graph(world):
    """Captured in a CUDA graph, after two steps."""
    if world.device.type != "cuda":
        return
    p, own = make(world, torch.bfloat16, seed=3), ranges_of(world, "balanced")
    own = dataclasses.replace(own, group=dist.new_group(list(range(world.size))))
    e = p.e.clone().requires_grad_()
    c = p.c[own.start : own.stop].clone().requires_grad_()

    def step():
        e.grad = c.grad = None
        loss = linear_cross_entropy(e, c, p.targets, vocab_parallel_options=own)
        loss.backward()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    for n in range(N + 1, N + 20):  # other sizes between
        q = make(world, torch.bfloat16, shape=(n,))
        linear_cross_entropy(q.e, c.detach(), q.targets, vocab_parallel_options=own)
    graph.replay()
    (want, *_), de, dc, _ = whole(p, {})
    assert_near(loss, want, "loss", torch.bfloat16)
    assert_near(e.grad, de, "e.grad", torch.bfloat16)
    assert_near(c.grad, dc[own.start : own.stop], "c.grad", torch.bfloat16)


def check_the_first_call_looks(world):
    """On CUDA too: what is wrong from the start is said in words, once."""
    p = make(world)
    own = ranges_of(world, "uneven")
    own = dataclasses.replace(own, group=dist.new_group(list(range(world.size))))
    targets = p.targets.clone()
    targets[0] = world.rank
    c = p.c[own.start : own.stop]
    refused(ValueError, "other targets", lambda: linear_cross_entropy(
        p.e, c, targets, vocab_parallel_options=own))  # fmt: skip


def check_nothing_waits_for_the_device(world):
    if world.device.type != "cuda":
        return
    p, own = make(world, torch.bfloat16), ranges_of(world, "balanced")
    own = dataclasses.replace(own, group=dist.new_group(list(range(world.size))))
    e = p.e.clone().requires_grad_()
    c = p.c[own.start : own.stop].clone().requires_grad_()

    def step():
        linear_cross_entropy(e, c, p.targets, vocab_parallel_options=own).backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


CHECKS = [
    *checks(check_options, OPTIONS, SPLITS),
    *checks(check_dtypes, DTYPES, SPLITS),
    *checks(check_shapes),
    *checks(check_everything_ignored),
    *checks(check_apples_case),
    *checks(check_parts_of_e),
    *checks(check_nobody_asks_for_e),
    *checks(check_random_splits),
    *checks(check_plans_may_differ),
    *checks(check_a_group_of_some_ranks),
    *checks(check_other_ways_of_calling),
    *checks(check_repeatable),
    *checks(check_sequence_parallel, (0, 1)),
    *checks(check_dtensors),
    *checks(check_refusals),
    *checks(check_one_rank_fails),
    *checks(check_ranks_disagree),
    *checks(check_options_differ),
    *checks(check_one_rank_fails_before_e_is_gathered),
    *checks(check_ranges_are_wrong_on_one_rank),
    *checks(check_another_group),
    *checks(check_the_first_call_looks),
    *checks(check_a_graph),
    *checks(check_nothing_waits_for_the_device),
]
OF_TWO = [*CHECKS, *checks(check_compiled, ("everything",), ("aot_eager", "inductor"))]
BY_SIZE = {2: OF_TWO, 3: CHECKS, 4: CHECKS}
test_cpu = processes.on_cpu(BY_SIZE)
test_cuda = processes.on_two_devices(OF_TWO)


def test_without_a_group():
    options = VocabParallelOptions(0, 4)
    with pytest.raises(RuntimeError, match="init_process_group first"):
        linear_cross_entropy(
            torch.ones(2, 3), torch.ones(4, 3), torch.zeros(2, dtype=torch.int64),
            vocab_parallel_options=options,
        )  # fmt: skip
    with pytest.raises(RuntimeError, match="init_process_group first"):
        VocabParallelOptions.from_vocab(4)

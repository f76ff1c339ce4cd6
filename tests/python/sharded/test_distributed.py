"""Data parallel training in two processes: DDP, FSDP2, FSDP1, with checkpoints, autocast, gradient
accumulation; DTensors. Gradients are those of plain PyTorch in one process, on all batches."""

import contextlib

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import processes
from helpers.processes import checks, refused
from helpers.small_model import (
    D,
    Model,
    V,
    batch,
    compare,
    count,
    joined,
    make,
    plain_gradients,
    unwrapped,
    whole,
)
from helpers.tolerance import assert_near
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

from cutloss import LinearCrossEntropyLoss, linear_cross_entropy

SCHEDULES = ("rows", "vocabulary")  # gradients made in forward, and in backward


def batches_of(world, **options):
    """One for each process."""
    return [batch(10 + rank, device=world.device, **options) for rank in range(world.size)]


class WithoutLoss(Model):
    """Its forward returns hidden states."""

    def forward(self, x):
        return self.body(x)


def without_loss(world):
    torch.manual_seed(1)
    return WithoutLoss().to(world.device)


def three(world):
    """Hidden states and targets."""
    targets = torch.arange(3, device=world.device)
    return torch.randn(3, D, device=world.device), targets


# DDP ----------------------------------------------------------------------------------------------


def check_ddp(world, tied, schedule):
    model = make(tied, world.device, schedule=schedule)
    batches = batches_of(world)
    expected = plain_gradients(model, batches)
    parallel = DDP(model)
    for _ in range(2):
        parallel.zero_grad()
        parallel(*batches[world.rank]).backward()
        compare(parallel, expected)


def check_ddp_with_the_loss_outside(world):
    model = without_loss(world)
    batches = batches_of(world)
    expected = plain_gradients(model, batches)
    parallel = DDP(model)
    x, labels = batches[world.rank]
    hidden = parallel(x)
    linear_cross_entropy(hidden, model.head.weight, labels, model.head.bias, shift=1).backward()
    compare(parallel, expected)


def accumulated(world, model, micro_batches, without_sync, ignored=0.7):
    """Gradients of the mean over all tokens of all processes and micro-batches, however uneven."""
    mine = [batch(100 * world.rank + i, ignored, world.device) for i in range(micro_batches)]
    tokens = sum(count(labels) for _, labels in mine)
    dist.all_reduce(tokens)
    for i, (x, labels) in enumerate(mine):
        with without_sync(last=i == micro_batches - 1):
            model(x, labels, num_items=tokens / world.size).backward()


def expected_of_accumulated(world, model, micro_batches, ignored=0.7):
    ranks = range(world.size)
    everything = [
        batch(100 * r + i, ignored, world.device) for r in ranks for i in range(micro_batches)
    ]
    counts = [count(labels).item() for _, labels in everything]
    assert len(set(counts)) > 1, "batches that are even prove nothing"
    return plain_gradients(model, [joined(everything)])


def check_ddp_accumulates(world, schedule):
    model = make(False, world.device, schedule=schedule)
    expected = expected_of_accumulated(world, model, 3)
    parallel = DDP(model)

    def without_sync(last):
        return contextlib.nullcontext() if last else parallel.no_sync()

    accumulated(world, parallel, 3, without_sync)
    compare(parallel, expected)


def check_ddp_autocast(world, schedule):
    """fp32 parameters, products in bf16."""
    model = make(True, world.device, schedule=schedule)
    batches = batches_of(world)
    with torch.autocast(world.device.type, torch.bfloat16):
        expected = plain_gradients(model, batches)
    parallel = DDP(model)
    with torch.autocast(world.device.type, torch.bfloat16):
        loss = parallel(*batches[world.rank])
    loss.backward()
    assert model.head.weight.grad.dtype == torch.float32
    compare(parallel, expected, products=torch.bfloat16)


class CheckpointedHead(Model):
    """Its head runs twice: this saves no memory, see docs/training-stacks.md."""

    use_reentrant = False

    def forward(self, x, labels):
        hidden = self.body(x)
        return checkpoint(
            lambda h: self.head(h, labels).loss, hidden, use_reentrant=self.use_reentrant
        )


def check_ddp_checkpoint(world, use_reentrant, schedule):
    torch.manual_seed(1)
    model = CheckpointedHead(False, schedule=schedule).to(world.device)
    model.use_reentrant = use_reentrant
    batches = batches_of(world)
    expected = plain_gradients(model, batches)
    parallel = DDP(model, static_graph=use_reentrant)  # as DDP needs for reentrant ones
    for _ in range(2):
        parallel.zero_grad()
        parallel(*batches[world.rank]).backward()
        compare(parallel, expected)


# FSDP2 --------------------------------------------------------------------------------------------


def check_fsdp(world, tied, wrapped, schedule):
    """`wrapped`: which modules are given to fully_shard besides the model."""
    model = make(tied, world.device, schedule=schedule)
    batches = batches_of(world)
    expected = plain_gradients(model, batches)
    for name in wrapped:
        fully_shard(model.get_submodule(name), mesh=world.mesh)
    fully_shard(model, mesh=world.mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    for _ in range(2):  # in the second everything is gathered again
        model.zero_grad()
        model(*batches[world.rank]).backward()
        compare(model, expected)


def check_fsdp_mixed_precision(world, schedule):
    """Parameters in bf16, gradients reduced in fp32: each process's are rounded once, their mean
    is not."""
    model = make(False, world.device, schedule=schedule)
    batches = batches_of(world)
    half = make(False, world.device, schedule=schedule).bfloat16()
    parts = [plain_gradients(half, [b]) for b in batches]
    expected = {n: sum(p[n].float() for p in parts) / world.size for n in parts[0]}
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model.head, mesh=world.mesh, mp_policy=policy)
    fully_shard(model, mesh=world.mesh, mp_policy=policy)
    loss = model(*batches[world.rank])
    loss.backward()
    assert loss.dtype == torch.float32
    assert whole(model.head.weight.grad).dtype == torch.float32
    compare(model, expected, products=torch.bfloat16)


def check_fsdp_accumulates(world, schedule):
    model = make(False, world.device, schedule=schedule)
    expected = expected_of_accumulated(world, model, 3)
    fully_shard(model.head, mesh=world.mesh)
    fully_shard(model, mesh=world.mesh)

    @contextlib.contextmanager
    def without_sync(last):
        model.set_requires_gradient_sync(last)
        yield

    accumulated(world, model, 3, without_sync)
    compare(model, expected)


def check_fsdp_checkpoint(world, schedule):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = make(False, world.device, schedule=schedule)
    batches = batches_of(world)
    expected = plain_gradients(model, batches)
    model.head = checkpoint_wrapper(model.head)
    fully_shard(model.head, mesh=world.mesh)
    fully_shard(model, mesh=world.mesh)
    for _ in range(2):
        model.zero_grad()
        model(*batches[world.rank]).backward()
        compare(model, expected)


def check_fsdp_with_the_loss_outside(world, schedule):
    """Right where the weight is whole, else refused, with what to write; and that is right."""

    def step(model, weight=lambda t: t):
        x, labels = batches[world.rank]
        hidden = model(x)
        w, b = weight(model.head.weight), weight(model.head.bias)
        linear_cross_entropy(hidden, w, labels, b, shift=1, schedule=schedule).backward()

    batches = batches_of(world)
    expected = plain_gradients(make(False, world.device), batches)

    model = without_loss(world)
    fully_shard(model, mesh=world.mesh)  # whose parameters stay gathered until backward is through
    for _ in range(2):
        model.zero_grad()
        step(model)
        compare(model, expected)

    model = without_loss(world)
    fully_shard(model, mesh=world.mesh, reshard_after_forward=True)
    match = "other targets .* in the forward of the module"
    refused(ValueError, match, lambda: step(model))
    model.zero_grad()
    step(model, lambda t: t.full_tensor(grad_placements=[Partial("avg")]))
    compare(model, expected)


def check_fsdp_of_output_embeddings_alone(world):
    """The head's forward does not call them, so nothing gathers their weight."""
    for tied in (False, True):
        model = make(tied, world.device)
        fully_shard(model.head.output_embeddings, mesh=world.mesh)
        fully_shard(model, mesh=world.mesh)
        b = batch(1, device=world.device)
        refused(ValueError, "give it the whole CausalLMHead or the model", lambda: model(*b))
    loss = LinearCrossEntropyLoss(D, V, device=world.device)
    fully_shard(loss.output_embeddings, mesh=world.mesh)
    refused(ValueError, "whole LinearCrossEntropyLoss", lambda: loss(*three(world)))


def check_fsdp_freed_memory(world):
    """A weight that was whole, and is used after FSDP freed its memory: an error, not a read of
    what is there now."""
    if world.size == 1:  # nothing needs to be gathered, or freed
        return
    model = make(False, world.device)
    held = {}
    inner = model.head.forward

    def forward(*args, **options):
        held["c"] = model.head.weight
        return inner(*args, **options)

    model.head.forward = forward
    fully_shard(model.head, mesh=world.mesh)
    fully_shard(model, mesh=world.mesh)
    model(*batch(1, device=world.device))
    e, targets = three(world)
    match = "memory of c, 1616 .* freed.* in the forward of the module"
    refused(RuntimeError, match, lambda: linear_cross_entropy(e, held["c"], targets))


# torch.compile ------------------------------------------------------------------------------------


def check_compiled(world, stack):
    torch._dynamo.reset()
    model = make(False, world.device)
    batches = batches_of(world)
    expected = plain_gradients(model, batches)
    if stack == "ddp":
        run = torch.compile(DDP(model), backend="aot_eager")
    else:
        if stack == "fsdp_of_compiled_parts":
            for part in (model.body, model.head):
                part.compile(backend="aot_eager")
        fully_shard(model.head, mesh=world.mesh)
        fully_shard(model, mesh=world.mesh)
        if stack == "compiled_fsdp":
            model.compile(backend="aot_eager")
        run = model
    for _ in range(2):
        model.zero_grad()
        run(*batches[world.rank]).backward()
        compare(model, expected)


# DTensors -----------------------------------------------------------------------------------------


def check_tensor_parallel(world):
    """All processes have the same hidden states, or each a part of every sequence."""
    torch.manual_seed(2)
    e0, c0 = torch.randn(2, 8, D).to(world.device), torch.randn(V, D).to(world.device)
    targets = batch(3, device=world.device)[0][:, :8].contiguous()
    plain = [t.clone().requires_grad_() for t in (e0, c0)]
    F.cross_entropy((plain[0] @ plain[1].T).flatten(0, 1), targets.flatten()).backward()

    def shard(t, dim):
        t = distribute_tensor(t, world.mesh, [Shard(dim)])
        return t.requires_grad_() if t.is_floating_point() else t

    def compare_both(e, c):
        for t, want in zip((e, c), plain):
            assert_near(whole(t.grad), want.grad, "gradient")

    c, e = shard(c0, 0), e0.clone().requires_grad_()
    linear_cross_entropy(e, c.full_tensor(), targets).backward()
    compare_both(e, c)

    c, e = shard(c0, 0), shard(e0, 1)
    linear_cross_entropy(e, c, targets).backward()
    compare_both(e, c)

    c, e = shard(c0, 0), shard(e0, 1)
    linear_cross_entropy(e.full_tensor(), c.full_tensor(), targets).backward()
    compare_both(e, c)

    c, e = shard(c0, 0), shard(e0, 1)  # each process its own tokens: parts of one sum
    part = linear_cross_entropy(
        e.to_local(),
        c.full_tensor(grad_placements=[Partial()]),
        shard(targets, 1).to_local().contiguous(),
        reduction="sum",
    )
    (part / targets.numel()).backward()
    compare_both(e, c)


def check_every_dtensor_is_refused(world):
    e, targets = three(world)
    c = torch.rand(V, D, device=world.device)
    plain = {"e": e, "c": c, "targets": targets, "bias": c[:, 0], "weight": c[:, 0]}
    plain["token_weight"] = e[:, 0]
    for name, t in plain.items():
        one = {**plain, name: distribute_tensor(t, world.mesh, [Replicate()])}
        for impl in ("auto", "torch"):
            match = rf"{name} is a DTensor, placed \(Replicate.*{name}\.full_tensor"
            refused(ValueError, match, lambda: linear_cross_entropy(**one, impl=impl))


# FSDP1, which wants a GPU -------------------------------------------------------------------------


def check_fsdp1(world, use_orig_params, schedule):
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    model = make(True, world.device, schedule=schedule)
    batches = batches_of(world)
    gradients = plain_gradients(model, batches)
    expected = {name: p.detach() - gradients[name] for name, p in model.named_parameters()}
    parallel = FSDP(model, use_orig_params=use_orig_params, device_id=world.device)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=1.0)
    parallel(*batches[world.rank]).backward()
    optimizer.step()
    parallel(*batches[world.rank]).backward()
    with FSDP.summon_full_params(parallel):
        found = {unwrapped(name): p.detach().clone() for name, p in parallel.named_parameters()}
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        assert_near(found[name], want, name)


BOTH = (False, True)
CHECKS = [
    *checks(check_ddp, BOTH, SCHEDULES),
    *checks(check_ddp_with_the_loss_outside),
    *checks(check_ddp_accumulates, SCHEDULES),
    *checks(check_ddp_autocast, SCHEDULES),
    *checks(check_ddp_checkpoint, BOTH, SCHEDULES),
    *checks(check_fsdp, (False,), [(), ("head",), ("body", "head"), ("body.mid",)], SCHEDULES),
    *checks(check_fsdp, (True,), [(), ("body.mid",)], SCHEDULES),
    *checks(check_fsdp_mixed_precision, SCHEDULES),
    *checks(check_fsdp_accumulates, SCHEDULES),
    *checks(check_fsdp_checkpoint, SCHEDULES),
    *checks(check_fsdp_with_the_loss_outside, SCHEDULES),
    *checks(check_fsdp_of_output_embeddings_alone),
    *checks(check_fsdp_freed_memory),
    *checks(check_compiled, ("ddp", "fsdp_of_compiled_parts", "compiled_fsdp")),
    *checks(check_tensor_parallel),
    *checks(check_every_dtensor_is_refused),
]
ON_CUDA = [*CHECKS, *checks(check_fsdp1, BOTH, SCHEDULES)]


test_cpu = processes.on_cpu({2: CHECKS})
test_cuda = processes.on_two_devices(ON_CUDA)

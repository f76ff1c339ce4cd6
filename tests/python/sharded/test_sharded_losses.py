"""Losses over rows of a classifier in shards: values, metrics and gradients are those of the whole
classifier in one process, the same on all ranks; what cannot be done so is refused."""

import copy
import dataclasses

import torch
from helpers import processes
from helpers.processes import checks, refused
from helpers.sharded_problems import make, ranges_of, same_on_all
from helpers.tolerance import assert_near
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from cutloss import losses

B, L = 4, 12  # two pairs; L is a multiple of the numbers of ranks
SHAPE = (B, L)


def small(world):
    p = make(world, shape=SHAPE)
    g = torch.Generator().manual_seed(7)

    def draw(*shape):
        return torch.rand(*shape, generator=g).to(world.device)

    p.advantages = draw(B) - 0.5
    p.old = -draw(*SHAPE) * 3 - 4
    p.reference = (draw(*p.e.shape) - 0.5, draw(*p.c.shape) - 0.5)
    p.desirable = torch.tensor([True, False, True, True], device=world.device)
    p.per_token = draw(*SHAPE)
    return p


def dft(nll):
    return nll.neg().exp().detach() * nll


def of_everything(nll, entropy, lse, a):
    return a * nll + 0.1 * entropy - 1e-2 * lse.square()


def token_loss(p, e, c, bias, **more):
    return losses.linear_token_loss(e, c, p.targets, dft, bias, shift=1, **more)


def token_loss_of_everything(p, e, c, bias, **more):
    loss, rows = losses.linear_token_loss(
        e, c, p.targets, of_everything, bias, entropy=True, lse=True, per_token={"a": p.per_token},
        normalizer=7, return_rows=True, softcap=4.0, **more,
    )  # fmt: skip
    return loss, rows


def token_loss_of_sum(p, e, c, bias, **more):
    normalizer = torch.tensor(3.0, device=e.device)
    return losses.linear_token_loss(e, c, p.targets, dft, normalizer=normalizer, **more)


def log_probs(p, e, c, bias, **more):
    made = losses.token_log_probs(
        e, c, p.targets, bias, return_entropy=True, return_log_sum_sq_probs=True, **more
    )
    loss = (made.log_probs * p.old).sum() + made.entropy.sum()
    return loss, vars(made)


def of_table(name, with_reference=False, **options):
    def loss(p, e, c, bias, **more):
        given = {k: getattr(p, str(v), v) for k, v in options.items()}
        if with_reference:
            given["reference"] = p.reference
        made = losses.linear_loss(name, e, c, p.targets, bias, **given, **more)
        return made.loss, made.metrics

    return loss


LOSSES = {
    "token": token_loss,
    "token, everything": token_loss_of_everything,
    "token, sum": token_loss_of_sum,
    "log probs": log_probs,
    "dpo": of_table("dpo", with_reference=True),
    "wpo": of_table("dpo", with_reference=True, use_weighting=True),
    "kto": of_table("kto", with_reference=True, desirable="desirable", kl=0.1),
    "cpo": of_table("cpo"),
    "simpo": of_table("simpo"),
    "orpo": of_table("orpo"),
    "grpo": of_table("policy", advantages="advantages", old_log_probs="old", loss_type="grpo"),
    "grpo, kl": of_table("policy", True, advantages="advantages", beta=0.1, entropy_coef=0.05),
    "gspo": of_table(
        "policy", advantages="advantages", old_log_probs="old", importance_sampling_level="sequence"
    ),
    "by rows": of_table("policy", advantages="advantages", schedule="rows", num_items_in_batch=9),
}


def flat(extras):
    """Tensors of what a loss says beside its value."""
    if extras is None:
        return []
    return [t.detach() for t in extras.values() if isinstance(t, torch.Tensor)]


def step(loss_of, p, e, c, bias, **more):
    result = loss_of(p, e, c, bias, **more)
    loss, extras = result if isinstance(result, tuple) else (result, None)
    loss.backward()
    return loss.detach(), flat(extras)


def whole_step(loss_of, p):
    """In fp64, in one process."""
    e, c, bias = (t.to(torch.float64, copy=True).requires_grad_() for t in (p.e, p.c, p.bias))
    wide = copy.copy(p)
    wide.reference = tuple(t.double() for t in p.reference)
    return *step(loss_of, wide, e, c, bias), e.grad, c.grad, bias.grad


def agree(got, want):
    loss, extras = got
    assert_near(loss, want[0], "loss", torch.float32)
    assert len(extras) == len(want[1])
    for a, b in zip(extras, want[1], strict=True):
        if b.is_floating_point():
            assert_near(a, b, "what is said beside the loss", torch.float32)
        else:
            assert torch.equal(a, b)


def check_loss(world, name, split):
    p, loss_of = small(world), LOSSES[name]
    want = whole_step(loss_of, p)
    own = ranges_of(world, split)
    shard = slice(own.start, own.stop)
    e = p.e.clone().requires_grad_()
    c, bias = (t[shard].clone().requires_grad_() for t in (p.c, p.bias))
    p.reference = p.reference[0], p.reference[1][shard]
    got = step(loss_of, p, e, c, bias, vocab_parallel_options=own)
    agree(got, want)
    same_on_all(world, got[0], e.grad)
    assert_near(e.grad, want[2], "e.grad", torch.float32)
    if own.stop > own.start:
        assert_near(c.grad, want[3][shard], "c.grad", torch.float32)
        if want[4] is not None:
            assert_near(bias.grad, want[4][shard], "bias.grad", torch.float32)


def check_dtensors(world, name, e_placement):
    p, loss_of = small(world), LOSSES[name]
    want = whole_step(loss_of, p)
    mesh = init_device_mesh(world.device.type, (world.size,))
    e = p.e.clone().requires_grad_()
    if e_placement is not None:
        e = distribute_tensor(p.e, mesh, [e_placement]).requires_grad_()
    c, bias = (distribute_tensor(t, mesh, [Shard(0)]).requires_grad_() for t in (p.c, p.bias))
    p.targets = distribute_tensor(p.targets, mesh, [Replicate()])
    p.reference = p.reference[0], distribute_tensor(p.reference[1], mesh, [Shard(0)])
    got = step(loss_of, p, e, c, bias)
    agree(got, want)
    assert c.grad.placements == (Shard(0),)
    assert_near(getattr(e.grad, "full_tensor", lambda: e.grad)(), want[2], "e.grad", torch.float32)
    assert_near(c.grad.full_tensor(), want[3], "c.grad", torch.float32)


def check_sequence_parallel(world, name):
    p, loss_of = small(world), LOSSES[name]
    want = whole_step(loss_of, p)
    own = dataclasses.replace(ranges_of(world, "uneven"), sequence_parallel=True)
    shard = slice(own.start, own.stop)
    e = p.e.chunk(world.size, 1)[world.rank].clone().requires_grad_()
    c, bias = (t[shard].clone().requires_grad_() for t in (p.c, p.bias))
    p.reference = p.reference[0].chunk(world.size, 1)[world.rank], p.reference[1][shard]
    got = step(loss_of, p, e, c, bias, vocab_parallel_options=own)
    agree(got, want)
    mine = want[2].chunk(world.size, 1)[world.rank]
    assert_near(e.grad, mine, "e.grad", torch.float32)
    if own.stop > own.start:
        assert_near(c.grad, want[3][shard], "c.grad", torch.float32)


def check_evaluation(world, split):
    p = small(world)
    own = ranges_of(world, split)
    shard = slice(own.start, own.stop)
    for options in ({}, {"token_weight": p.token_weight, "shift": 1}):
        want = losses.evaluate(p.e.double(), p.c.double(), p.targets, **options).sums
        of_shard = dict(vocab_parallel_options=own, **options)
        got = losses.evaluate(p.e, p.c[shard], p.targets, **of_shard).sums
        assert_near(got, want, "sums", torch.float32)
        same_on_all(world, got)
    mesh = init_device_mesh(world.device.type, (world.size,))
    c = distribute_tensor(p.c, mesh, [Shard(0)])
    targets = distribute_tensor(p.targets, mesh, [Replicate()])
    want = losses.evaluate(p.e.double(), p.c.double(), p.targets).sums
    assert_near(losses.evaluate(p.e, c, targets).sums, want, "sums", torch.float32)


def check_nothing_counts(world):
    """No rank leaves early."""
    p = small(world)
    p.targets[:] = -100
    own = ranges_of(world, "uneven")
    e = p.e.clone().requires_grad_()
    c = p.c[own.start : own.stop].clone().requires_grad_()
    loss = losses.linear_token_loss(e, c, p.targets, dft, vocab_parallel_options=own)
    loss.backward()
    assert loss.isnan() and (e.grad == 0).all() and (c.grad == 0).all()


def check_compiled(world):
    """The gradient is there, or an error says that it is not: beside another loss nobody would see
    that it is missing."""
    p, own = small(world), ranges_of(world, "balanced")

    def step(e, c):
        more = dict(vocab_parallel_options=own)
        return losses.linear_token_loss(e, c, p.targets, dft, **more) + 0 * e.sum()

    results = []
    for run in (step, torch.compile(step, backend="aot_eager")):
        e = p.e.clone().requires_grad_()
        c = p.c[own.start : own.stop].clone().requires_grad_()
        try:
            run(e, c).backward()
        except NotImplementedError as error:
            assert run is not step and "torch.compiler.disable" in str(error)
            return
        results.append((e.grad, c.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def check_refusals(world):
    """On all ranks, also where only one of them is wrong."""
    p, own = small(world), ranges_of(world, "balanced")
    c = p.c[own.start : own.stop].clone().requires_grad_()
    more = dict(vocab_parallel_options=own)

    def token(fn=dft, **options):
        return losses.linear_token_loss(p.e, c, p.targets, fn, **options, **more)

    refused(TypeError, "fn must be a function", lambda: token(fn=3))
    refused(ValueError, "depends on other rows", lambda: token(fn=lambda nll: nll - nll.mean()))
    refused(NotImplementedError, "takes a whole classifier", lambda: losses.token_log_probs(
        p.e, c, p.targets, impl="torch", **more))  # fmt: skip
    reference = (p.e, p.c)
    refused(ValueError, "stop - start rows", lambda: losses.linear_loss(
        "dpo", p.e, c, p.targets, reference=reference, **more))  # fmt: skip
    mesh = init_device_mesh(world.device.type, (world.size,))
    placed = distribute_tensor(p.c, mesh, [Shard(0)])
    match = r"c is a DTensor.*in losses that are functions of each token's nll.*full_tensor"
    refused(ValueError, match, lambda: losses.linear_distillation(p.e, placed, p.e, p.c))
    match = "teacher_c is a DTensor.*full_tensor"
    refused(ValueError, match, lambda: losses.linear_distillation(p.e, p.c, p.e, placed))
    error, match, per_token = RuntimeError, "rank 0 .* failed: ValueError: per_token", p.per_token
    if world.rank == 0:
        error, match, per_token = ValueError, "must begin with the shape", p.per_token[:1]
    with processes.looking():
        refused(error, match, lambda: token(lambda nll, a: a * nll, per_token={"a": per_token}))
    token().backward()


SPLITS = ("balanced", "uneven", "one_has_all")
FEW = ("token, everything", "log probs", "dpo", "grpo")
CHECKS = [
    *checks(check_loss, LOSSES, SPLITS),
    *checks(check_dtensors, FEW, (None, Replicate(), Shard(1))),
    *checks(check_sequence_parallel, FEW),
    *checks(check_evaluation, SPLITS),
    *checks(check_nothing_counts),
    *checks(check_compiled),
    *checks(check_refusals),
]
SIZES = (2, 3)


BY_SIZE = {size: CHECKS for size in SIZES}
test_cpu = processes.on_cpu(BY_SIZE)
test_cuda = processes.on_two_devices(BY_SIZE[2])

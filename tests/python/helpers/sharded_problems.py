"""Losses of a classifier in shards, and of the whole one in fp64, for checks in several processes."""

import dataclasses

import torch
import torch.distributed as dist
from helpers.tolerance import assert_near

from cutloss import VocabParallelOptions, linear_cross_entropy

N, V, D = 60, 507, 24


@dataclasses.dataclass
class Problem:
    e: torch.Tensor
    c: torch.Tensor
    bias: torch.Tensor
    targets: torch.Tensor
    weight: torch.Tensor
    token_weight: torch.Tensor
    temperature: torch.Tensor


def make(world, dtype=torch.float32, shape=(N,), ignored=0.2, seed=0):
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(V, shape, generator=g)
    targets[torch.rand(shape, generator=g) < ignored] = -100
    made = Problem(
        e=torch.randn(*shape, D, generator=g).to(dtype),
        c=(torch.randn(V, D, generator=g) / 3).to(dtype),
        bias=torch.randn(V, generator=g).to(dtype),
        targets=targets,
        weight=torch.rand(V, generator=g) + 0.5,
        token_weight=torch.rand(shape, generator=g),
        temperature=torch.rand(shape, generator=g) + 0.5,
    )
    moved = {f.name: getattr(made, f.name).to(world.device) for f in dataclasses.fields(made)}
    return Problem(**moved)


def ranges_of(world, split):
    if split == "balanced":
        own = VocabParallelOptions.from_vocab(V)
        assert own.stop - own.start in (V // world.size, V // world.size + 1)
        return own
    ends = {"uneven": [300, 300, *[V] * 9], "one_has_all": [V] * 11}[split]
    ends = [0, *ends[: world.size - 1], V]
    return VocabParallelOptions(ends[world.rank], ends[world.rank + 1])


OPTIONS = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothed": {"label_smoothing": 0.1, "z_loss": 1e-3},
    "weighted": {"weight": "weight", "label_smoothing": 0.2},
    "token weights": {"token_weight": "token_weight", "z_loss": 1e-2},
    "bias, softcap": {"bias": "bias", "softcap": 3.0, "logit_scale": 0.5},
    "everything": {
        "bias": "bias", "softcap": 5.0, "label_smoothing": 0.1, "weight": "weight",
        "token_weight": "token_weight", "temperature": 1.7, "return_lse": True,
        "return_entropy": True, "return_predictions": True, "z_loss": 1e-3,
    },
    "a temperature for each token": {"temperature": "temperature", "softcap": 4.0},
    "num_valid": {"num_valid": "count"},
    "lse and entropy": {"return_lse": True, "return_entropy": True},
    "predictions": {"return_predictions": True, "reduction": "none"},
    "by rows": {"schedule": "rows"},
    "by vocabulary": {"schedule": "vocabulary"},
}  # fmt: skip


def given_by_name(p, options):
    args = {k: getattr(p, v) if v in ("bias", "weight", "token_weight", "temperature") else v
            for k, v in options.items()}  # fmt: skip
    if "num_valid" in args:
        args["num_valid"] = int((p.targets != -100).sum())
    return args


def total_of(results):
    """One number that depends on every differentiable result, and all of the results."""
    results = results if isinstance(results, tuple) else (results,)
    floating = [r for r in results if r.is_floating_point()]
    weights = [torch.linspace(1, 2, r.numel(), dtype=r.dtype, device=r.device).view(r.shape)
               for r in floating]  # fmt: skip
    return sum((r * w).sum() for r, w in zip(floating, weights)), results


def whole(p, options, dtype=torch.float64):
    """In fp64, in one process."""
    e, c, bias = (t.to(dtype, copy=True).requires_grad_() for t in (p.e, p.c, p.bias))
    args = given_by_name(p, options)
    if "bias" in args:
        args["bias"] = bias
    args.pop("schedule", None)
    loss, results = total_of(linear_cross_entropy(e, c, p.targets, **args))
    loss.backward()
    return results, e.grad, c.grad, bias.grad


def sharded(p, options, own, **more):
    e = p.e.clone().requires_grad_()
    c = p.c[own.start : own.stop].clone().requires_grad_()
    bias = p.bias[own.start : own.stop].clone().requires_grad_()
    args = {**given_by_name(p, options), **more}
    if "bias" in args:
        args["bias"] = bias
    loss, results = total_of(
        linear_cross_entropy(e, c, p.targets, vocab_parallel_options=own, **args)
    )
    loss.backward()
    return results, e.grad, c.grad, bias.grad


def same_on_all(world, *tensors):
    for t in tensors:
        told = [torch.empty_like(t) for _ in range(world.size)]
        dist.all_gather(told, t.contiguous())
        for rank, other in enumerate(told):
            assert torch.equal(other.nan_to_num(7), t.nan_to_num(7)), f"rank {rank} differs"


def compare(world, p, options, own, products):
    want = whole(p, options)
    results, de, dc, dbias = sharded(p, options, own)
    for got, expected in zip(results, want[0], strict=True):
        if got.is_floating_point():
            assert_near(got, expected, "a result", products)
        else:
            assert torch.equal(got, expected)
    same_on_all(world, *[r.detach() for r in results], de)
    shard = slice(own.start, own.stop)
    assert de.dtype == p.e.dtype and dc.dtype == p.c.dtype
    assert_near(de, want[1], "e.grad", products)
    if own.stop > own.start:
        assert_near(dc, want[2][shard], "c.grad", products)
    if "bias" in options and own.stop > own.start:
        assert_near(dbias, want[3][shard], "bias.grad", products)



"""linear_distillation and linear_distillation_top_k against formulas with stored logits: loss and
gradients, every divergence and option."""

import dataclasses

import pytest
import torch
from helpers import losses_by_hand as by_hand
from helpers import problems
from helpers.distillation import (
    check,
    distil,
    hand,
    of_two_models,
    shifted,
    stored,
    teacher_of,
    upstream_of,
)
from helpers.problems import BF16, F32, F64

from cutloss import losses
from cutloss.losses import distillation

pytestmark = pytest.mark.usefixtures("device")


WEIGHTED = dict(token_weight=lambda batch, V, g: torch.rand(batch, generator=g))
OPTIONS = {
    "plain": {},
    "bias": dict(bias=True, temperature=2.0),
    "sum": dict(reduction="sum", bias=True),
    "none": dict(reduction="none", temperature=0.7),
    "hard": dict(hard_weight=0.3, soft_weight=0.7, bias=True),
    "hard_temperature": dict(hard_weight=0.3, temperature=3.0, soft_weight=9.0),
    "softcaps": dict(softcap=4.0, teacher_softcap=3.0, bias=True),
    "scales": dict(logit_scale=-0.5, teacher_logit_scale=1.5, bias=True),
    "num_items": dict(num_items_in_batch=50.0),
    "weights_shift": dict(shift=1, **WEIGHTED),
    "none_everything": dict(
        reduction="none", shift=2, softcap=5.0, teacher_softcap=6.0, logit_scale=1.5, bias=True,
        hard_weight=0.5, soft_weight=2.0, temperature=1.5, **WEIGHTED,
    ),
    "everything": dict(
        shift=1, softcap=5.0, teacher_softcap=6.0, logit_scale=1.5, bias=True, hard_weight=0.5,
        temperature=0.5, num_items_in_batch=torch.tensor(40), **WEIGHTED,
    ),
}  # fmt: skip
DIVERGENCES = {
    "forward_kl": dict(divergence="forward_kl"),
    "reverse_kl": dict(divergence="reverse_kl"),
    "jsd": dict(divergence="jsd"),
    "jsd_0.1": dict(divergence="jsd", beta=0.1),
    "jsd_0": dict(divergence="jsd", beta=0.0),
    "jsd_1": dict(divergence="jsd", beta=1.0),
    "tvd": dict(divergence="tvd"),
}
# By rows, in chunks and all at once, and by vocabulary.
WAYS = [dict(schedule="rows"), dict(schedule="rows", rows=7), dict(schedule="vocabulary", rows=5)]


@pytest.fixture
def chunks(monkeypatch):
    """Sets how many rows are worked on at a time, whatever fits."""

    def fixed(rows, columns=13):
        plan_of = distillation.make_plan

        def make_plan(*args):
            plan = plan_of(*args)
            return dataclasses.replace(plan, rows=rows, block=rows, columns=columns)

        monkeypatch.setattr(distillation, "make_plan", make_plan)

    return fixed


CASES = [(kind, name, dtype) for kind in DIVERGENCES for name in OPTIONS for dtype in (F64, BF16)]
CASES += [(kind, name, F32) for kind in DIVERGENCES for name in ("bias", "everything")]


@pytest.mark.parametrize("kind, name, dtype", CASES)
def test_two_models(kind, name, dtype, chunks):
    number = list(DIVERGENCES).index(kind) + list(OPTIONS).index(name)
    way = dict(WAYS[number % len(WAYS)])
    p = problems.make((3, 9), 61, 12, dtype, ignored=0.3, seed=number, **OPTIONS[name])
    teacher = teacher_of(p)
    rows = way.pop("rows", None)
    if rows is not None:
        chunks(rows)
    loss = distil(p, teacher, **DIVERGENCES[kind], **way).loss
    assert loss.dtype == (F64 if dtype == F64 else F32)
    check(p, loss, of_two_models(p, teacher, DIVERGENCES[kind]))


# Chunks and schedules -------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("schedule", ["rows", "vocabulary"])
@pytest.mark.parametrize("rows, columns", [(1, 2), (11, 17), (24, 61), (30, 100)])
def test_chunks_of_any_size(rows, columns, schedule, reduction, chunks):
    p = problems.make((24,), 61, 12, problems.widest(), bias=True, ignored=0.0)
    teacher = teacher_of(p)
    options = dict(divergence="jsd", hard_weight=0.5, temperature=2.0, reduction=reduction)
    want = distil(p, teacher, **options).loss
    chunks(rows, columns)
    got = distil(p, teacher, schedule=schedule, **options).loss
    torch.testing.assert_close(got, want)
    upstream = upstream_of(want)
    got, want = (torch.autograd.grad(t, p.parameters, upstream) for t in (got, want))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)


def test_the_same_bits_and_a_second_backward(chunks):
    p = problems.make((40,), 211, 16, BF16, bias=True)
    teacher = teacher_of(p)
    for options in (dict(schedule="rows"), dict(schedule="vocabulary"), dict(reduction="none")):
        results = []
        for _ in range(2):
            loss = distil(p, teacher, divergence="jsd", **options).loss.sum()
            for keep in (True, False):
                upstream = torch.full_like(loss, 3.0)
                grads = torch.autograd.grad(loss, p.parameters, upstream, retain_graph=keep)
                results.append((loss, *(g.clone() for g in grads)))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", losses.DIVERGENCES)
def test_gradcheck(kind, reduction, chunks):
    p = problems.make((5,), 6, 3, problems.widest(), bias=True, ignored=0.0)
    if p.e.dtype != F64:
        pytest.skip("no fp64 here")
    p.targets[2] = -100
    teacher = tuple(None if t is None else t.detach() for t in teacher_of(p))
    chunks(2, 4)

    def f(e, c, bias):
        return losses.linear_distillation(
            e, c, teacher[0], teacher[1], p.targets, bias, teacher[2], divergence=kind,
            hard_weight=0.4, temperature=1.5, softcap=3.0, reduction=reduction,
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(f, p.parameters)


# Stored top k ---------------------------------------------------------------------------------


def of_top_k(p, ids, log_t, tail, options):
    options = p.options | options
    of_e, _ = shifted(p, int(options.get("shift", 0)))
    rows, values = of_e(ids), of_e(log_t)

    def pair_of(dtype):
        return lambda n, z: by_hand.top_k(z, rows[n], values[n], tail)

    return lambda q: hand(q, pair_of, **options)


TOP_K = {
    name: OPTIONS[name]
    for name in ("plain", "bias", "none", "hard", "hard_temperature", "num_items")
} | {
    "everything": dict(shift=1, softcap=5.0, logit_scale=1.5, bias=True, hard_weight=0.5,
                       temperature=0.5, reduction="none", **WEIGHTED),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [F64, BF16], ids=str)
@pytest.mark.parametrize("name", TOP_K)
@pytest.mark.parametrize("tail", ["bucket", "renormalise", "ignore"])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd_0.1", "tvd"])
def test_stored_top_k(kind, tail, name, dtype, chunks):
    number = sum(map(ord, kind + tail + name))
    way = dict(WAYS[number % len(WAYS)])
    p = problems.make((3, 9), 61, 12, dtype, ignored=0.3, seed=number, **TOP_K[name])
    ids, log_t = stored(p, K=(5, 1)[number % 2 and kind != "tvd"])
    rows = way.pop("rows", None)
    if rows is not None:
        chunks(rows)
    options = DIVERGENCES[kind]
    loss = losses.linear_distillation_top_k(
        p.e, p.c, ids, log_t, p.targets, p.bias, tail=tail, **p.options, **options, **way
    ).loss
    check(p, loss, of_top_k(p, ids, log_t, tail, options), lenience=3)


@pytest.mark.parametrize("tail", ["bucket", "renormalise", "ignore"])
@pytest.mark.parametrize("kind", losses.DIVERGENCES)
def test_all_classes_stored_are_a_teacher(kind, tail):
    p = problems.make((24,), 31, 12, problems.widest(), bias=True)
    teacher = teacher_of(p)
    log_t = torch.log_softmax(by_hand.logits(*teacher), -1)
    ids = torch.rand(log_t.shape, device=log_t.device).argsort(-1)
    got = losses.linear_distillation_top_k(
        p.e, p.c, ids, log_t.gather(-1, ids), p.targets, p.bias, tail=tail, divergence=kind
    ).loss
    want = distil(p, teacher, divergence=kind).loss
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    got, want = (torch.autograd.grad(t, p.parameters) for t in (got, want))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

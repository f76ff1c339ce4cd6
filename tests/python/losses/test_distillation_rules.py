"""What distillation promises beside its formulas: edges, memory, where gradients go, refusals."""

import dataclasses

import pytest
import torch
from helpers import losses_by_hand as by_hand
from helpers import problems
from helpers.distillation import check, distil, of_two_models, stored, teacher_of
from helpers.inside import _chunks
from helpers.live_bytes import LiveBytes
from helpers.problems import BF16, F16, F32, F64

from cutloss import losses
from cutloss.losses import distillation

pytestmark = pytest.mark.usefixtures("device")

every_divergence = pytest.mark.parametrize("kind", losses.DIVERGENCES)
schedules = pytest.mark.parametrize("schedule", ["rows", "vocabulary"])


def gradients(loss, p):
    return torch.autograd.grad(loss, [t for t in p.parameters if t.requires_grad])


def top_k(p, ids, log_t, **options):
    return losses.linear_distillation_top_k(p.e, p.c, ids, log_t, p.targets, p.bias, **options)


# Edges ----------------------------------------------------------------------------------------


@schedules
@every_divergence
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_teacher_that_is_the_student(kind, dtype, schedule):
    p = problems.make((40,), 211, 24, dtype, bias=True)
    same = tuple(t.detach() for t in p.parameters)
    loss = distil(p, same, divergence=kind, temperature=2.0, schedule=schedule).loss
    assert loss.abs() < 1e-6
    for grad in gradients(loss, p):
        assert grad.abs().max() < 1e-6


@every_divergence
def test_a_common_offset_keeps_the_digits(kind):
    """Exact logits, and 8192 more in one of the models or both."""
    p = problems.make((40,), 211, 16, bias=True)
    teacher = tuple(t.detach() for t in (p.e.roll(1, 0), p.c, torch.zeros_like(p.bias)))
    for t in (p.e, p.c, teacher[0]):
        t.data.mul_(4).round_().div_(4)
    teacher = (teacher[0], p.c.detach().clone(), teacher[2])
    p.bias.data.zero_()
    loss = distil(p, teacher, divergence=kind).loss
    want = loss, *gradients(loss, p)
    p.bias.data.fill_(8192.0)
    for offset in (0.0, 8192.0):
        loss = distil(p, (*teacher[:2], teacher[2] + offset), divergence=kind).loss
        for a, b in zip((loss, *gradients(loss, p)), want):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@every_divergence
def test_logits_of_ten_thousand(kind):
    p = problems.make((24,), 61, 12, kind="offset")
    check(p, distil(p, teacher_of(p), divergence=kind).loss,
          of_two_models(p, teacher_of(p), dict(divergence=kind)))  # fmt: skip


@schedules
@every_divergence
def test_classes_that_cannot_be(kind, schedule):
    """In both models: as if they were not there. A gradient of exactly 0."""
    p = problems.make((40,), 61, 12, bias=True)
    teacher = teacher_of(p)
    p.targets.clamp_(max=49)
    options = dict(divergence=kind, hard_weight=0.5, temperature=2.0)
    fewer = problems.Problem(p.e, p.c[:50], p.targets, p.bias[:50], {})
    want = distil(fewer, (teacher[0], teacher[1][:50], teacher[2][:50]), **options).loss
    want = want, *torch.autograd.grad(want, p.parameters)
    p.bias.data[50:] = teacher[2][50:] = -torch.inf
    loss = distil(p, teacher, schedule=schedule, **options).loss
    for a, b in zip((loss, *gradients(loss, p)), want):
        torch.testing.assert_close(a, b)
    assert not gradients(distil(p, teacher, **options).loss, p)[1][50:].any()


def test_a_class_that_cannot_be_in_one_of_the_models():
    """As the formulas have it, and never a large finite number in place of infinity."""
    p = problems.make((12,), 31, 12, bias=True, ignored=0.0)
    teacher = teacher_of(p)
    for student, kind, value in (
        (True, "forward_kl", torch.inf), (True, "reverse_kl", None), (True, "jsd", None),
        (True, "tvd", None), (False, "forward_kl", None), (False, "reverse_kl", torch.inf),
        (False, "jsd", None), (False, "tvd", None),
    ):  # fmt: skip
        q, other = p.to(F32), [t.clone() for t in teacher]
        q.bias.data = q.bias.data.clone()
        (q.bias.data if student else other[2])[7] = -torch.inf
        loss = distil(q, tuple(other), divergence=kind).loss
        grads = gradients(loss, q)
        if value is None:
            expected = of_two_models(q, tuple(other), dict(divergence=kind))
            torch.testing.assert_close(loss, expected(q))
            assert all(g.isfinite().all() for g in grads)
        else:
            assert loss == value
            assert all(g.isfinite().all() if student else g.isnan().all() for g in grads)


def test_no_class_can_be():
    p = problems.make((12,), 31, 12, bias=True)
    p.bias.data.fill_(-torch.inf)
    assert distil(p, teacher_of(p)).loss.isnan()


@every_divergence
@pytest.mark.parametrize("batch, V", [((5,), 1), ((1,), 2), ((), 3), ((0,), 4), ((2, 0), 4)])
def test_small_sizes(kind, batch, V):
    p = problems.make(batch or (1,), V, 12, F64 if problems.has_engine(F64) else F32, ignored=0.0)
    teacher = teacher_of(p)
    if batch == ():
        p.e, p.targets = p.e.detach()[0].requires_grad_(), p.targets[0]
        teacher = (teacher[0][0], *teacher[1:])
    for reduction in ("mean", "none"):
        loss = distil(p, teacher, divergence=kind, hard_weight=1.0, reduction=reduction).loss
        assert loss.shape == (() if reduction == "mean" else batch)
        grads = gradients(loss.sum(), p)
        assert loss.isfinite().all() and all(g.isfinite().all() for g in grads)
        if V == 1 or not p.targets.numel():
            assert not loss.any() and not any(g.any() for g in grads)


@pytest.mark.parametrize("way", [{}, dict(schedule="vocabulary"), dict(num_valid=0)], ids=str)
def test_nothing_counts(way):
    """A mean of 0, as TRL and Liger have it; gradients of 0."""
    p = problems.make((12,), 31, 12, bias=True)
    p.targets.fill_(-100)
    for reduction in ("mean", "sum", "none"):
        made = distil(p, teacher_of(p), hard_weight=1.0, reduction=reduction, **way)
        assert not made.loss.any() and not any(g.any() for g in gradients(made.loss.sum(), p))
        assert made.metrics["divergence"] == 0 and made.metrics["cross_entropy"] == 0


@pytest.mark.parametrize("look", [True, False])
@pytest.mark.parametrize("way", [{}, dict(schedule="vocabulary"), dict(reduction="none")], ids=str)
def test_what_ignored_rows_hold_goes_nowhere(way, look, monkeypatch):
    """NaN in hidden states of both, stored entries that are none; with ids and targets looked at
    (and rows left out), and as on CUDA, without."""
    p = problems.make((24,), 53, 16, bias=True, ignored=0.4)
    teacher, (ids, log_t) = teacher_of(p), stored(p, 5)
    ignored = p.targets == -100
    calls = (lambda: distil(p, teacher, **way), lambda: top_k(p, ids, log_t, **way))
    want = [[made.loss, *gradients(made.loss.sum(), p)] for made in (call() for call in calls)]
    p.e.data[ignored] = torch.nan
    teacher[0][ignored] = torch.nan
    ids[ignored], log_t[ignored] = 10**6, torch.nan
    monkeypatch.setattr("cutloss.losses._arguments.may_look", lambda device: look)
    for call, wanted in zip(calls, want):
        made = call()
        for a, b in zip([made.loss, *gradients(made.loss.sum(), p)], wanted):
            torch.testing.assert_close(a, b)


def test_ignored_rows_cost_nothing(monkeypatch):
    """Rows that do not count are left out before the products."""
    p = problems.make((40,), 53, 16, ignored=0.5)
    seen = []
    product = _chunks._product
    monkeypatch.setattr(
        _chunks, "_product", lambda out, a, b: (seen.append(out.shape[0]), product(out, a, b))
    )
    monkeypatch.setattr("cutloss.losses._arguments.may_look", lambda device: True)
    distil(p, teacher_of(p))
    count = (p.targets != -100).sum().item()
    assert seen == [count, count]
    seen.clear()
    monkeypatch.setattr("cutloss.losses._arguments.may_look", lambda device: False)
    loss = distil(p, teacher_of(p), num_valid=count).loss
    assert seen == [count, count] and loss.isfinite()
    assert distil(p, teacher_of(p), num_valid=count - 1).loss.isnan()


def test_mask_and_targets():
    p = problems.make((2, 12), 53, 16, ignored=0.3)
    teacher = teacher_of(p)
    mask = torch.rand(2, 12, generator=torch.Generator().manual_seed(3)).to(p.e.device) < 0.6
    both = p.targets.where(mask, -100)
    want = losses.linear_distillation(p.e, p.c, *teacher[:2], both, shift=1).loss
    got = losses.linear_distillation(p.e, p.c, *teacher[:2], p.targets, mask=mask, shift=1).loss
    torch.testing.assert_close(got, want)
    mask &= p.targets != -100
    got = losses.linear_distillation(p.e, p.c, *teacher[:2], mask=mask, shift=1).loss
    torch.testing.assert_close(got, want)
    without = losses.linear_distillation(p.e, p.c, *teacher[:2], reduction="none").loss
    assert without.shape == (2, 12) and (without > 0).all()


# Gradients ------------------------------------------------------------------------------------


@schedules
@pytest.mark.parametrize("frozen", ["e", "c", "bias", "e c", "c bias"])
def test_what_is_frozen_gets_nothing(frozen, schedule):
    p = problems.make((24,), 53, 16, bias=True)
    teacher = teacher_of(p)
    want = dict(zip(("e", "c", "bias"), gradients(distil(p, teacher, schedule=schedule).loss, p)))
    for name in frozen.split():
        getattr(p, name).requires_grad_(False)
        want.pop(name)
    for reduction in ("mean", "none"):
        loss = distil(p, teacher, schedule=schedule, reduction=reduction).loss
        factor = 1.0 if reduction == "mean" else 1 / (p.targets != -100).sum()
        for a, b in zip(gradients((loss * factor).sum(), p), want.values(), strict=True):
            torch.testing.assert_close(a, b)


def test_without_gradients_nothing_is_made_for_them():
    p = problems.make((24,), 53, 16, bias=True)
    teacher = teacher_of(p)
    trained = distil(p, teacher, hard_weight=1.0)
    with torch.no_grad(), LiveBytes() as bytes_of:
        made = distil(p, teacher, hard_weight=1.0)
    torch.testing.assert_close(made.loss, trained.loss.detach(), rtol=1e-6, atol=0)
    assert not made.loss.requires_grad
    assert not any(m.requires_grad for m in trained.metrics.values())
    torch.testing.assert_close(sum(trained.metrics.values()), trained.loss.detach())
    with LiveBytes() as with_gradients:
        distil(p, teacher, hard_weight=1.0)
    assert bytes_of.most <= with_gradients.most - p.c.numel() * 4


def test_the_teacher_gets_no_gradient():
    p = problems.make((24,), 53, 16)
    e, c, _ = teacher_of(p)
    c.requires_grad_()
    losses.linear_distillation(p.e, p.c, e, c, p.targets).loss.backward()
    assert c.grad is None and p.c.grad is not None
    ids, log_t = stored(p, 5)
    for call in (
        lambda: losses.linear_distillation(p.e, p.c, e.clone().requires_grad_(), c),
        lambda: losses.linear_distillation_top_k(p.e, p.c, ids, log_t.requires_grad_()),
    ):
        with pytest.raises(ValueError, match="the teacher gets no gradient, and teacher_.*no_grad"):
            call()
        with torch.no_grad():
            call()


def test_one_head_for_both():
    """A classifier that the teacher shares gets the student's gradient."""
    p = problems.make((24,), 53, 16)
    before = p.e.detach() + 0.3
    got = losses.linear_distillation(p.e, p.c, before, p.c, p.targets).loss
    want = losses.linear_distillation(p.e, p.c, before, p.c.detach().clone(), p.targets).loss
    for a, b in zip(gradients(got, p), gradients(want, p)):
        assert torch.equal(a, b)


def test_token_weights_carry_a_gradient():
    p = problems.make((24,), 53, 16, F32)
    weight = torch.rand(24, device=p.e.device, requires_grad=True)
    loss = distil(p, teacher_of(p), token_weight=weight).loss
    per_token = distil(p, teacher_of(p), reduction="none").loss
    counts = p.targets != -100
    same = (per_token * weight).sum() / (weight * counts).sum()
    torch.testing.assert_close(loss, same)
    leaves = (*p.parameters, weight)
    for a, b in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(same, leaves)):
        torch.testing.assert_close(a, b)


def test_a_sum_over_one_number_is_the_mean_of_parts():
    p = problems.make((6, 16), 53, 16, bias=True)
    e, c, bias = teacher_of(p)
    items = (p.targets != -100).sum()
    whole = distil(p, (e, c, bias), hard_weight=0.5).loss
    parts = sum(
        losses.linear_distillation(
            p.e[i : i + 2], p.c, e[i : i + 2], c, p.targets[i : i + 2], p.bias, bias,
            hard_weight=0.5, num_items_in_batch=items,
        ).loss
        for i in (0, 2, 4)
    )  # fmt: skip
    torch.testing.assert_close(parts, whole)


@schedules
@pytest.mark.parametrize("items", [64.0, 2.0**22])
def test_fp16_has_gradients_that_the_loss_scale_saves(schedule, items):
    """Divided by many items they are nothing in fp16, times the loss scale something."""
    if not problems.has_engine(F16):
        pytest.skip("no fp16 here")
    p = problems.make((64,), 211, 16, F16)
    teacher, scale = teacher_of(p), 2.0**16
    options = dict(num_items_in_batch=items)
    loss = distil(p, teacher, schedule=schedule, **options).loss
    q = p.to(F64)
    truth = of_two_models(p, teacher, options)(q)
    got = torch.autograd.grad(loss, p.parameters, torch.full_like(loss, scale))
    want = torch.autograd.grad(truth * scale, q.parameters)
    for a, b in zip(got, want):
        assert (a.double() - b).norm() < 3e-3 * b.norm()


# Frameworks -----------------------------------------------------------------------------------


@schedules
@pytest.mark.parametrize("dtypes", [(F32, F32, BF16), (BF16, F32, F32), (F32, BF16, F32)], ids=str)
def test_autocast(dtypes, schedule):
    """Gradients in each tensor's own dtype; the loss in fp32, of logits that are not rounded."""
    p = problems.make((40,), 211, 16)
    e, c = (t.detach().to(d).requires_grad_() for t, d in zip(p.parameters, dtypes))
    teacher = tuple(t.to(dtypes[2]) for t in teacher_of(p)[:2])
    with torch.autocast(problems.device, BF16):
        loss = losses.linear_distillation(e, c, *teacher, p.targets, schedule=schedule).loss
    grads = torch.autograd.grad(loss, (e, c))
    assert loss.dtype == F32 and (grads[0].dtype, grads[1].dtype) == dtypes[:2]
    want = distil(p, (*(t.float() for t in teacher), None)).loss
    torch.testing.assert_close(loss, want, rtol=1e-2, atol=0)
    for a, b in zip(grads, gradients(want, p)):
        assert (a.float() - b).norm() < 2e-2 * b.norm()


def test_dtypes_that_do_not_fit():
    p = problems.make((4,), 7, 3)
    e, c, _ = teacher_of(p)
    with pytest.raises(TypeError, match="teacher_e and teacher_c must have one dtype: teacher_e"):
        losses.linear_distillation(p.e, p.c, e, c.to(BF16))
    with pytest.raises(TypeError, match="e and c must have one dtype: e is torch.bfloat16"):
        losses.linear_distillation(p.e.to(BF16), p.c, e, c)
    mixed = losses.linear_distillation(p.e, p.c, e.to(BF16), c.to(BF16)).loss
    torch.testing.assert_close(mixed, losses.linear_distillation(p.e, p.c, e, c).loss, rtol=2e-2,
                               atol=1e-2)  # fmt: skip


def test_under_compile():
    """A break in the graph, and the same numbers."""
    torch._dynamo.reset()
    p = problems.make((2, 12), 53, 16)
    teacher = teacher_of(p)

    def f(e):
        return distil(problems.Problem(2 * e, p.c, p.targets, None, {}), teacher).loss * 3

    got, want = torch.compile(f, backend="eager")(p.e), f(p.e)
    assert torch.equal(got, want)
    assert torch.equal(*(torch.autograd.grad(t, p.e)[0] for t in (got, want)))


def test_under_checkpointing_and_twice():
    from torch.utils.checkpoint import checkpoint

    p = problems.make((24,), 53, 16)
    teacher = teacher_of(p)

    def f(e, c):
        return losses.linear_distillation(e, c, *teacher[:2], p.targets).loss

    want = gradients(f(p.e, p.c), p)
    for a, b in zip(gradients(checkpoint(f, p.e, p.c, use_reentrant=False), p), want):
        assert torch.equal(a, b)
    for a, b in zip(gradients(3 * f(p.e, p.c), p), want):
        torch.testing.assert_close(a, 3 * b)
    grad = torch.autograd.grad(f(p.e, p.c), p.e, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        torch.autograd.grad(grad.sum(), p.c)


def test_a_teacher_changed_before_backward_is_noticed():
    p = problems.make((24,), 53, 16)
    teacher = teacher_of(p)
    loss = distil(p, teacher, reduction="none").loss
    teacher[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


def test_layouts_that_are_not_contiguous():
    p = problems.make((4, 8), 53, 16)
    e, c, _ = teacher_of(p)
    want = distil(p, (e, c, None)).loss
    grads = gradients(want, p)
    for f in (lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
              lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]]):  # fmt: skip
        got = losses.linear_distillation(f(p.e), f(p.c), f(e), f(c), p.targets).loss
        torch.testing.assert_close(got, want)
        for a, b in zip(gradients(got, p), grads):
            torch.testing.assert_close(a, b)


# Memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["forward_kl", "jsd", "top_k"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("schedule, limit", [("rows", 3 << 19), ("vocabulary", 5 << 18)])
@pytest.mark.parametrize(
    "options",
    [{}, dict(hard_weight=0.5, temperature=2.0, softcap=9.0, logit_scale=1.5),
     dict(reduction="none")], ids=["plain", "options", "none"],
)  # fmt: skip
def test_no_more_memory_than_granted(options, schedule, limit, dtype, kind):
    """Beside inputs and gradients; the logits of one model are 1.8 MB."""
    p = problems.make((150,), 3000, 16, dtype, bias=True, ignored=0.1)
    if problems.device != "cpu":
        pytest.skip("measured there in devices/test_cuda.py's way, by test_distillation_cuda.py")
    teacher, (ids, log_t) = teacher_of(p), stored(p, 8)
    options = dict(options, schedule=schedule, max_workspace=limit)
    with LiveBytes() as bytes_of:
        if kind == "top_k":
            loss = top_k(p, ids, log_t, **options).loss
        else:
            loss = distil(p, teacher, divergence=kind, **options).loss
        grads = gradients(loss.sum(), p)
    assert bytes_of.most - sum(g.numel() * g.element_size() for g in grads) <= limit


@schedules
@every_divergence
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_errors_are_those_of_the_plain_path(dtype, kind, schedule):
    p = problems.make((250,), 1021, 16, dtype, bias=True, ignored=0.1)
    teacher = teacher_of(p)
    counts = p.targets != -100

    def by_definition(q):
        z = by_hand.logits(q.e, q.c, q.bias), by_hand.logits(*(t.to(q.e.dtype) for t in teacher))
        log_p = (torch.log_softmax(t[counts], -1) for t in z)
        return by_hand.divergence(*log_p, kind, 0.5).mean()

    loss = distil(p, teacher, divergence=kind, schedule=schedule).loss
    check(p, loss, by_definition, lenience=1)


@schedules
def test_many_tokens_add_up_in_fp32(schedule, monkeypatch):
    """2048 tokens in bf16, 64 at a time: dC is off by hardly more than its last rounding."""
    p = problems.make((2048,), 31, 16, BF16, ignored=0.0)
    teacher = teacher_of(p)
    make_plan = distillation.make_plan
    monkeypatch.setattr(
        distillation, "make_plan",
        lambda *given: dataclasses.replace(make_plan(*given), rows=64, block=64),
    )  # fmt: skip
    dc = gradients(distil(p, teacher, schedule=schedule).loss, p)[1]
    q = p.to(F64)
    of_teacher = by_hand.logits(*(t if t is None else t.to(F64) for t in teacher))
    log_p = (torch.log_softmax(z, -1) for z in (by_hand.logits(q.e, q.c, None), of_teacher))
    truth = gradients(by_hand.divergence(*log_p, "forward_kl", 0.5).mean(), q)[1]
    assert (dc.double() - truth).norm() < 1.4 * (truth.to(BF16).double() - truth).norm()


def test_too_little_memory():
    p = problems.make((40,), 6000, 16)
    for schedule in ("auto", "rows", "vocabulary"):
        with pytest.raises(ValueError, match=r"max_workspace is 1000 bytes.*40 rows.* needs \d+"):
            distil(p, teacher_of(p), max_workspace=1000, schedule=schedule)


# Refusals -------------------------------------------------------------------------------------

E, C, T = torch.zeros(4, 3), torch.zeros(7, 3), torch.zeros(4, dtype=torch.long)
IDS, LOG_T = torch.arange(8).reshape(4, 2) % 7, torch.full((4, 2), -2.0)
REFUSED = [
    (dict(divergence="kl"), ValueError, "divergence must be one of 'forward_kl', .* got 'kl'"),
    (dict(beta=0.3), ValueError, "beta is for divergence 'jsd' alone, got 0.3 with 'forward_kl'"),
    (dict(divergence="jsd", beta=1.5), ValueError, r"beta must be in \[0.0, 1.0\], got 1.5"),
    (dict(temperature=0.0), ValueError, "temperature must be finite and > 0"),
    (dict(soft_weight=0), ValueError, "soft_weight must be finite and > 0"),
    (dict(hard_weight=-1), ValueError, "hard_weight must be finite and >= 0"),
    (dict(hard_weight=1.0), ValueError, "hard_weight is not 0 and there are no targets"),
    (dict(hard_weight=1.0, targets=T + 7), ValueError, "the target of row 0 is 7, outside"),
    (dict(targets=T[:3]), ValueError, r"targets must have the shape of e .* got targets \(3,\)"),
    (dict(targets=T.float()), TypeError, "targets must be int64 or int32, got torch.float32"),
    (dict(mask=T), TypeError, "mask must be a bool tensor, got torch.int64"),
    (dict(token_weight=T), TypeError, "token_weight must be a floating-point tensor"),
    (dict(reduction="batchmean"), ValueError, "reduction must be one of"),
    (dict(reduction="sum", num_items_in_batch=4), ValueError, "leave one of them out"),
    (dict(num_valid=3), ValueError, "num_valid is 3, but without targets and mask 4 count"),
    (dict(num_valid=3, targets=T), ValueError, "num_valid is 3, but 4 tokens count"),
    (dict(schedule="columns"), ValueError, "schedule must be one of"),
    (dict(max_workspace=1.5), TypeError, "max_workspace must be a number of bytes"),
    (dict(shift=-4), ValueError, "shift must be >= 0, got -4"),
    (dict(softcap=-1.0), ValueError, "softcap must be finite and > 0"),
    (dict(e=E[:, :2]), ValueError, r"e must be \(..., D\) and c \(V, D\).* got e \(4, 2\)"),
    (dict(bias=torch.zeros(3)), ValueError, r"bias must be \(V\): got bias \(3,\)"),
    (dict(c=None), TypeError, "c must be a torch.Tensor, got NoneType"),
]
OF_MODELS = [
    (dict(teacher_e=None), TypeError, "teacher_e must be a torch.Tensor, got None"),
    (dict(teacher_e=E[:3]), ValueError, r"teacher_e must have the rows of e.*teacher_e \(3, 3\)"),
    (dict(teacher_c=C[:6]), ValueError, r"c has 7, teacher_c 6; where one is padded, cut it, \[:6"),
    (dict(teacher_bias=torch.zeros(3)), ValueError, r"teacher_bias must be \(V\)"),
]
OF_STORED = [
    (dict(tail="rest"), ValueError, "tail must be one of 'bucket', .* got 'rest'"),
    (dict(teacher_ids=IDS.float()), TypeError, "teacher_ids must be int64 or int32, got torch.fl"),
    (dict(teacher_log_probs=IDS), TypeError, "teacher_log_probs must be floating point"),
    (dict(teacher_ids=IDS[:, :1]), ValueError, r"and K > 0: got \(4, 1\), \(4, 2\) and e \(4, 3\)"),
    (dict(teacher_ids=IDS + 5), ValueError, r"teacher_ids at \(1,\) must be in \[0, V = 7\)"),
    (dict(teacher_ids=-IDS), ValueError, r"teacher_ids at \(0,\) must be in .* got \[0, -1\]"),
    (dict(teacher_ids=IDS // 2), ValueError, r"at \(0,\) must all be different, got \[0, 0\]"),
    (dict(teacher_log_probs=-LOG_T), ValueError, r"the probabilities at \(0,\) .* is 14.7781"),
]


@pytest.mark.parametrize("options, error, message", REFUSED + OF_MODELS)
def test_refused(options, error, message):
    given = dict(e=E, c=C, teacher_e=E, teacher_c=C) | options
    with pytest.raises(error, match=message):
        losses.linear_distillation(**given)


@pytest.mark.parametrize("options, error, message", REFUSED + OF_STORED)
def test_refused_of_stored(options, error, message):
    given = dict(e=E, c=C, teacher_ids=IDS, teacher_log_probs=LOG_T) | options
    with pytest.raises(error, match=message):
        losses.linear_distillation_top_k(**given)


FAULTS = [
    lambda ids, log_t: ids[3].fill_(53),
    lambda ids, log_t: ids[3].fill_(-1),
    lambda ids, log_t: ids[3, 1:2].copy_(ids[3, :1]),
    lambda ids, log_t: log_t[3].fill_(0.0),
    lambda ids, log_t: log_t[3, :1].fill_(torch.nan),
]


@pytest.mark.parametrize("number", range(len(FAULTS)))
@schedules
def test_faults_where_nothing_may_look(schedule, number, monkeypatch):
    """NaN: in the row, in what sums over rows, and nowhere else."""
    monkeypatch.setattr("cutloss.losses._arguments.may_look", lambda device: False)
    p = problems.make((12,), 53, 16, bias=True, ignored=0.0)
    ids, log_t = stored(p, 5)
    FAULTS[number](ids, log_t)
    options = dict(reduction="none", schedule=schedule)
    loss = top_k(p, ids, log_t, **options).loss
    de, dc, dbias = gradients(loss.sum(), p)
    others = torch.arange(12, device=p.e.device) != 3
    assert loss[3].isnan() and loss[others].isfinite().all()
    assert de[3].isnan().all() and de[others].isfinite().all() and dc.isnan().any()
    p.targets[5] = 53
    made = distil(p, teacher_of(p), hard_weight=0.5, **options).loss
    assert made[5].isnan() and made.isnan().sum() == 1 and gradients(made.sum(), p)[1].isnan().all()


def test_transforms_are_refused():
    p = problems.make((6,), V=11)
    e, c = p.e.detach(), p.c.detach()

    def of(x):
        return losses.linear_distillation(x, c, e, c, p.targets).loss

    with pytest.raises(NotImplementedError, match="no transforms of torch.func"):
        torch.func.grad(of)(e)

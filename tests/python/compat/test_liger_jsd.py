"""cutloss.compat.liger's fused JSD against what liger-kernel 0.8 documents: order, names, defaults,
and numbers, by stored logits."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from helpers import losses_by_hand as by_hand
from helpers import problems
from helpers.distillation import teacher_of

from cutloss.compat import liger

pytestmark = pytest.mark.usefixtures("device")


def by_definition(p, teacher, beta, temperature, hard=0.0, soft=1.0):
    e, c, bias = teacher
    z, z_t = by_hand.logits(p.e, p.c, p.bias), by_hand.logits(e, c, bias)
    counts = p.targets != -100
    pair = (torch.log_softmax(t[counts] / temperature, -1) for t in (z, z_t))
    jsd = by_hand.divergence(*pair, "jsd", beta).sum() / counts.sum().clamp(min=1)
    nll = F.cross_entropy(z, p.targets, reduction="sum") / counts.sum().clamp(min=1)
    return soft * jsd + hard * nll, jsd, nll


def assert_same(p, got, want):
    torch.testing.assert_close(got, want)
    got, want = (torch.autograd.grad(t, p.parameters) for t in (got, want))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("beta, temperature", [(0.5, 1.0), (0.1, 2.0), (0.0, 0.7), (1.0, 1.0)])
def test_fused_linear_jsd(beta, temperature):
    p = problems.make((24,), 53, 16, problems.widest())
    teacher = teacher_of(p)
    module = liger.LigerFusedLinearJSD(beta, -100, temperature)
    got = module(p.e, p.c, teacher[0], teacher[1], p.targets)
    assert_same(p, got, by_definition(p, teacher, beta, temperature)[0])
    without = module(p.e, p.c, teacher[0], teacher[1])
    p.targets.clamp_(min=0)
    torch.testing.assert_close(without, by_definition(p, teacher, beta, temperature)[0])


@pytest.mark.parametrize("hard, soft", [(0.5, 0.5), (0.0, 1.0), (0.3, 2.0)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_fused_linear_jsd_loss(temperature, hard, soft):
    p = problems.make((24,), 53, 16, problems.widest(), bias=True)
    e, c, bias = teacher = teacher_of(p)
    made = dict(weight_hard_loss=hard, weight_soft_loss=soft, temperature=temperature, beta=0.3)
    expected = by_definition(p, teacher, 0.3, temperature, hard, soft)
    args = (p.e, p.c, e, c, p.targets, p.bias, bias)
    assert_same(p, liger.LigerFusedLinearJSDLoss(**made)(*args), expected[0])
    parts = liger.LigerFusedLinearJSDLoss(**made, return_soft_hard_loss=True)(*args)
    for a, b in zip(parts, expected, strict=True):
        torch.testing.assert_close(a.detach(), b.detach())
    assert [t.requires_grad for t in parts] == [True, False, False]


def test_half_is_cross_entropy_by_default():
    """As with theirs; a teacher that is the student leaves it."""
    p = problems.make((24,), 53, 16)
    same = p.e.detach(), p.c.detach()
    got = liger.LigerFusedLinearJSDLoss()(p.e, p.c, *same, p.targets)
    want = 0.5 * F.cross_entropy(p.e @ p.c.T, p.targets)
    torch.testing.assert_close(got, want)


def test_no_token_counts():
    p = problems.make((24,), 53, 16)
    e, c, _ = teacher_of(p)
    p.targets.fill_(-100)
    loss = liger.LigerFusedLinearJSD()(p.e, p.c, e, c, p.targets)
    parts = liger.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, return_soft_hard_loss=True)(
        p.e, p.c, e, c, p.targets
    )
    assert loss == 0 and all(t == 0 for t in parts)
    assert not any(g.any() for g in torch.autograd.grad(loss, p.parameters))


def test_names_and_defaults():
    def of(f):
        parameters = inspect.signature(f).parameters.values()
        return [(q.name, q.default) for q in parameters if q.name != "self"]

    assert of(liger.LigerFusedLinearJSD) == [
        ("jsd_beta", 0.5), ("ignore_index", -100), ("temperature", 1.0),
    ]  # fmt: skip
    assert of(liger.LigerFusedLinearJSDLoss) == [
        ("weight_hard_loss", 0.5), ("weight_soft_loss", 0.5), ("beta", 0.5), ("ignore_index", -100),
        ("temperature", 1.0), ("compiled", True), ("chunk_size", 1024),
        ("return_soft_hard_loss", False),
    ]  # fmt: skip
    operands = ["student_input", "student_weight", "teacher_input", "teacher_weight"]
    assert [n for n, _ in of(liger.LigerFusedLinearJSD.forward)] == [*operands, "shift_labels"]
    assert [n for n, _ in of(liger.LigerFusedLinearJSDLoss.forward)] == [
        *operands, "true_labels", "student_bias", "teacher_bias",
    ]  # fmt: skip


def test_a_teacher_with_more_classes_is_refused():
    p = problems.make((24,), 53, 16)
    e, c, _ = teacher_of(p)
    with pytest.raises(ValueError, match=r"c has 53, teacher_c 60; where one is padded, cut it"):
        liger.LigerFusedLinearJSDLoss()(p.e, p.c, e, torch.cat([c, c[:7]]), p.targets)

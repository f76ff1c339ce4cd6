"""Label smoothing where all logits of a row have a common offset: the difference of W lse / V and
zbar, each as large as the offset, keeps the digits that the logits have among each other."""

import pytest
import torch
import torch.nn.functional as F
from helpers import problems
from helpers.problems import F32, F64

from cutloss import cross_entropy, linear_cross_entropy

pytestmark = pytest.mark.usefixtures("device")

V, D, N, EPS = 1043, 16, 24, 0.3
OFFSETS = [1e4, -3e4]


def make(offset: float, weighted: bool):
    """e, c, targets, weight: products of small numbers and of one large one, exact in fp32."""
    random = torch.Generator().manual_seed(1)
    e = torch.randint(-2, 3, (N, D), generator=random) / 2
    c = torch.randint(-8, 9, (V, D), generator=random) / 8
    e[:, 0], c[:, 0] = offset / 100, 100.0
    targets = torch.randint(V, (N,), generator=random)
    targets[5] = -100
    weight = torch.rand(V, generator=random) + 0.5 if weighted else None
    moved = [t if t is None else t.to(problems.device) for t in (e, c, targets, weight)]
    return [t.requires_grad_() for t in moved[:2]] + moved[2:]


def truth(z, targets, weight, token_weight=None):
    """Per token, of logits in fp64."""
    weight = None if weight is None else weight.double()
    options = dict(weight=weight, label_smoothing=EPS, reduction="none")
    loss = F.cross_entropy(z, targets, **options)
    return loss if token_weight is None else loss * token_weight.double()


def assert_close(value, want):
    """Some tens of fp32's roundings of what a token's loss is made of: distances of logits from the
    largest, of 10 or so, and of the sums over V. An offset of 1e4 rounded once makes 5e-4."""
    assert value.dtype == F32
    u, distances = 2.0**-24, 20.0
    allowed = (8 + 4 * V**0.5) * u * EPS * distances + 8 * u * want.abs().max()
    error = (value.double() - want).abs().max()
    assert error <= allowed, f"{error:.3e} > {allowed:.3e}"


def gradients(loss, e, c):
    """de but for its first column, where g, which adds up to 0, is multiplied with 100; and dc."""
    de, dc = torch.autograd.grad(loss, (e, c))
    return de[:, 1:], dc


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("how", ["rows", "vocabulary", "torch", "compiled"])
def test_linear(how, offset, weighted):
    e, c, targets, weight = make(offset, weighted)
    options = dict(label_smoothing=EPS, weight=weight)
    options |= {"impl": "torch"} if how == "torch" else {}
    options |= {"schedule": how} if how in ("rows", "vocabulary") else {}
    call = linear_cross_entropy
    if how == "compiled":
        torch._dynamo.reset()
        call = torch.compile(call, backend="eager", fullgraph=True)
    want = truth(e.detach().double() @ c.detach().double().T, targets, weight)
    for reduction in ("sum", "none"):
        loss = call(e, c, targets, reduction=reduction, **options)
        if reduction == "sum":
            assert_close(loss / N, want.sum() / N)
        else:
            assert_close(loss, want)
    # The derivative of the difference, whatever it is made of.
    e64, c64 = (t.detach().double().requires_grad_() for t in (e, c))
    truths = gradients(truth(e64 @ c64.T, targets, weight).sum(), e64, c64)
    for got, want in zip(gradients(call(e, c, targets, reduction="sum", **options), e, c), truths):
        assert (got.double() - want).norm() <= 1e-5 * want.norm()
    per_token = call(e, c, targets, reduction="none", **options)
    for got, want in zip(gradients(per_token.sum(), e, c), truths):
        assert (got.double() - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("offset", OFFSETS)
def test_weights_of_tokens_that_are_trained(offset):
    e, c, targets, _ = make(offset, False)
    token_weight = torch.linspace(0.5, 1.5, N, device=problems.device).requires_grad_()
    loss = linear_cross_entropy(
        e, c, targets, label_smoothing=EPS, token_weight=token_weight, reduction="sum"
    )
    each = truth(e.detach().double() @ c.detach().double().T, targets, None)
    assert_close(loss / N, (each * token_weight.detach().double()).sum() / N)
    (g,) = torch.autograd.grad(loss, token_weight)
    assert_close(g, each)


@pytest.mark.parametrize("offset", OFFSETS)
def test_other_outputs_and_z_loss(offset):
    """lse itself is what it was, and its gradient joins that of the smoothing."""
    e, c, targets, _ = make(offset, False)
    loss, lse = linear_cross_entropy(
        e, c, targets, label_smoothing=EPS, reduction="sum", return_lse=True
    )
    e64, c64 = (t.detach().double().requires_grad_() for t in (e, c))
    z = e64 @ c64.T
    lse64 = torch.where(targets == -100, 0.0, z.logsumexp(-1))
    torch.testing.assert_close(lse.double(), lse64, rtol=1e-6, atol=0)
    d = torch.linspace(-1, 1, N, device=problems.device, dtype=F64)
    truths = gradients(truth(z, targets, None).sum() + (d * lse64).sum(), e64, c64)
    for got, want in zip(gradients(loss + (d.float() * lse).sum(), e, c), truths):
        assert (got.double() - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_given_logits(offset, weighted, reduction):
    e, c, targets, weight = make(offset, weighted)
    z = (e @ c.T).detach().requires_grad_()
    z64 = z.detach().double().requires_grad_()
    want = truth(z64, targets, weight)
    loss = cross_entropy(z, targets, label_smoothing=EPS, weight=weight, reduction=reduction)
    value, expected = (loss, want) if reduction == "none" else (loss / N, want.sum() / N)
    assert_close(value, expected.detach())
    (g,) = torch.autograd.grad(loss.sum(), z)
    (true,) = torch.autograd.grad(want.sum(), z64)
    assert (g.double() - true).norm() <= 1e-5 * true.norm()

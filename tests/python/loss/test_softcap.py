"""Gradients where a softcap has flattened all logits of a row: then they are of the size of its
slopes, 4 e^(-2|a|/softcap), and a slope that is 0 or some times too large there shows."""

import pytest
import torch
from helpers import problems
from helpers.problems import BF16, F32, F64

import cutloss
from cutloss import cross_entropy, linear_cross_entropy

pytestmark = pytest.mark.usefixtures("device")

SOFTCAP, V, D, N = 2.0, 211, 16, 24
SATURATIONS = [3, 6, 10, 20]
DTYPES = [F32, BF16]
# Twice an operand's rounding, once where g is kept, once where it is multiplied, and the gradient's
# own; in fp32 the error of a logit before the softcap, some 1e-6 of it, is twice that of its slope.
ALLOWED = {F32: 2e-4, BF16: 2e-2}


def make(saturation: float, dtype: torch.dtype):
    """e (N,D), c (V,D), targets: each logit about `saturation` softcaps from 0."""
    random = torch.Generator().manual_seed(1)
    e = 0.3 * torch.randn(N, D, generator=random)
    c = 0.1 * SOFTCAP * torch.randn(V, D, generator=random)
    e[:, 0] = 1.0
    sign = torch.where(torch.arange(V) % 4 == 0, 1.0, -1.0)
    c[:, 0] = SOFTCAP * saturation * sign * (1 + 0.002 * (torch.arange(V) % 17))
    targets = torch.randint(V, (N,), generator=random)
    targets[3] = -100
    moved = [t.to(problems.device, dtype).requires_grad_() for t in (e, c)]
    return *moved, targets.to(problems.device)


def slope(a):
    """Of softcap tanh(a / softcap), in fp64, digits and all."""
    return torch.cosh(a / SOFTCAP).reciprocal().square()


def by_formula(a, targets, eps=0.0):
    """d(sum of losses)/da, in fp64."""
    z = SOFTCAP * torch.tanh(a / SOFTCAP)
    valid = targets != -100
    one_hot = torch.nn.functional.one_hot(targets.clamp(min=0), V)
    g = z.softmax(-1) - (1 - eps) * one_hot - eps / V
    return torch.where(valid[:, None], g, 0.0) * slope(a)


def gradients_by_formula(e, c, targets, eps=0.0):
    e, c = e.detach().double(), c.detach().double()
    da = by_formula(e @ c.T, targets, eps)
    return da @ c, da.T @ e


def assert_close(value, want, dtype, what):
    """Relative to the tensor: to its root mean square, and its largest entry."""
    error = (value.double() - want).abs()
    assert want.abs().max() > 0
    for measure in (lambda t: t.square().mean().sqrt(), torch.max):
        ours, size = measure(error).item(), measure(want.abs()).item()
        assert ours <= ALLOWED[dtype] * size, f"{what}: error {ours:.3e} of {size:.3e}"


# The plain path rounds logits to bf16, and with them their slopes: 2 a/softcap times as much.
WAYS = [(F32, "torch")] + [(dtype, way) for dtype in DTYPES for way in ("rows", "vocabulary")]


@pytest.mark.parametrize("dtype, schedule", WAYS, ids=str)
@pytest.mark.parametrize("eps", [0.0, 0.2], ids=["plain", "smoothing"])
@pytest.mark.parametrize("saturation", SATURATIONS)
def test_linear_cross_entropy(saturation, eps, dtype, schedule):
    e, c, targets = make(saturation, dtype)
    how = {"impl": "torch"} if schedule == "torch" else {"schedule": schedule}
    options = dict(softcap=SOFTCAP, reduction="sum", label_smoothing=eps, **how)
    loss = linear_cross_entropy(e, c, targets, **options)
    de, dc = torch.autograd.grad(loss, (e, c))
    want = gradients_by_formula(e, c, targets, eps)
    assert_close(de, want[0], dtype, "de")
    assert_close(dc, want[1], dtype, "dc")


@pytest.mark.parametrize("schedule", ["rows", "vocabulary"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("saturation", SATURATIONS)
def test_gradients_of_entropy_and_loss(saturation, dtype, schedule):
    """Where logits are kept, not exponentials, it is the entropy's gradient that needs them."""
    e, c, targets = make(saturation, dtype)
    loss, entropy = linear_cross_entropy(
        e, c, targets, softcap=SOFTCAP, reduction="sum", schedule=schedule, return_entropy=True
    )
    de, dc = torch.autograd.grad(loss + 0.3 * entropy.sum(), (e, c))
    e64, c64 = e.detach().double(), c.detach().double()
    a = e64 @ c64.T
    log_p = (SOFTCAP * torch.tanh(a / SOFTCAP)).log_softmax(-1)
    p = log_p.exp()
    g_entropy = -p * (log_p - (p * log_p).sum(-1, keepdim=True)) * (targets != -100)[:, None]
    da = by_formula(a, targets) + 0.3 * g_entropy * slope(a)
    assert_close(de, da @ c64, dtype, "de")
    assert_close(dc, da.T @ e64, dtype, "dc")


@pytest.mark.parametrize("consume", [False, True], ids=["beside", "in_place"])
@pytest.mark.parametrize("eps", [0.0, 0.2], ids=["plain", "smoothing"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("saturation", SATURATIONS)
def test_cross_entropy(saturation, dtype, eps, consume):
    e, c, targets = make(saturation, dtype)
    a = (e @ c.T).detach().requires_grad_()
    want = by_formula(a.detach().double(), targets, eps)
    options = dict(softcap=SOFTCAP, reduction="sum", label_smoothing=eps, consume_logits=consume)
    # A leaf may not be consumed; a product with 1 is a copy.
    loss = cross_entropy(a * 1.0, targets, **options)
    (g,) = torch.autograd.grad(loss, a)
    assert_close(g, want, dtype, "gradient")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("saturation", SATURATIONS)
def test_logits_of_a_head(saturation, dtype):
    """Its logits are those of softcap * torch.tanh(logits / softcap) to the bit, its gradient is
    better than theirs."""
    e, c, _ = make(saturation, dtype)
    classifier = torch.nn.Linear(D, V, bias=False, device=problems.device, dtype=dtype)
    with torch.no_grad():
        classifier.weight.copy_(c)
    z = cutloss.CausalLMHead(classifier, softcap=SOFTCAP).logits(e)
    a = torch.nn.functional.linear(e, classifier.weight).detach()
    torch.testing.assert_close(z, SOFTCAP * torch.tanh(a / SOFTCAP), rtol=0, atol=0)
    d = torch.linspace(0.5, 1.5, V, device=problems.device, dtype=F64)
    (de,) = torch.autograd.grad((z * d.to(dtype)).sum(), e)
    # The products in bf16 round the logits themselves: the truth is of those.
    want = (d.to(dtype).double() * slope(a.double())) @ c.detach().double()
    assert_close(de, want, dtype, "de")


@pytest.mark.parametrize("schedule", ["rows", "vocabulary"])
@pytest.mark.parametrize("saturation", SATURATIONS)
def test_distillation(saturation, schedule):
    e, c, targets = make(saturation, F32)
    random = torch.Generator().manual_seed(2)
    teacher = [torch.randn(n, D, generator=random).to(problems.device) for n in (N, V)]
    options = dict(softcap=SOFTCAP, reduction="sum", schedule=schedule)
    loss = cutloss.losses.linear_distillation(e, c, *teacher, targets, **options).loss
    de, dc = torch.autograd.grad(loss, (e, c))
    e64, c64, te, tc = (t.detach().double() for t in (e, c, *teacher))
    a = e64 @ c64.T
    p = (SOFTCAP * torch.tanh(a / SOFTCAP)).softmax(-1)
    da = (p - (te @ tc.T).softmax(-1)) * (targets != -100)[:, None] * slope(a)
    assert_close(de, da @ c64, F32, "de")
    assert_close(dc, da.T @ e64, F32, "dc")


def test_second_derivatives_and_other_transforms():
    """impl="torch" has every derivative that PyTorch's own operators have."""
    from helpers.inside import capped

    x = torch.linspace(-4, 4, 9, dtype=F64, requires_grad=True, device=problems.device)
    assert torch.autograd.gradcheck(lambda a: capped(a, 1.5), x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda a: capped(a, 1.5), x)
    one_by_one = torch.vmap(torch.func.grad(lambda a: capped(a, 1.5)))(x.detach())
    torch.testing.assert_close(one_by_one, torch.cosh(x.detach() / 1.5).reciprocal().square())
    far = torch.tensor([-200.0, 0.0, 200.0], device=problems.device, requires_grad=True)
    (g,) = torch.autograd.grad(capped(far, 1.5).sum(), far, create_graph=True)
    assert g.tolist() == [0.0, 1.0, 0.0]
    assert torch.autograd.grad(g.sum(), far)[0].tolist() == [0.0, 0.0, 0.0]


def test_one_graph():
    """torch.compile traces impl="torch", with the derivative that it has uncompiled."""
    from helpers.inside import capped

    torch._dynamo.reset()
    compiled = torch.compile(lambda a: capped(a, 1.5), fullgraph=True, backend="aot_eager")
    x = torch.linspace(-30, 30, 13, device=problems.device, requires_grad=True)
    got, want = (f(x) for f in (compiled, lambda a: capped(a, 1.5)))
    assert torch.equal(got, want)
    got, want = (torch.autograd.grad(z.sum(), x)[0] for z in (got, want))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert want.abs().min() > 0

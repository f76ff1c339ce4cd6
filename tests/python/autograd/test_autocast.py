"""Under autocast: products in its dtype, gradients in each tensor's own."""

import pytest
import torch
from helpers import problems, reference
from helpers.problems import BF16, F16, F32, F64
from helpers.tolerance import assert_close

from cutloss import linear_cross_entropy

pytestmark = pytest.mark.usefixtures("device")

WAYS = [{}, {"schedule": "vocabulary"}, {"return_lse": True}]


def loss_of(p, **options):
    result = linear_cross_entropy(p.e, p.c, p.targets, p.bias, **options)
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_fp32_parameters(dtype, options):
    """The classifier in fp32: its gradient is summed, and stays, in fp32."""
    p = problems.make((60,), V=503, D=32, bias=True)
    with torch.autocast(problems.device, dtype):
        loss = loss_of(p, **options)
        plain = reference.evaluate(p)["loss"]
    grads = torch.autograd.grad(loss, p.parameters)
    plain_grads = torch.autograd.grad(plain, p.parameters)
    assert loss.dtype == F32 and all(g.dtype == F32 for g in grads)
    # The truth has the operands that the products see.
    rounded = p.to(dtype).to(F64)
    truth = reference.evaluate(rounded)["loss"]
    truth_grads = torch.autograd.grad(truth, rounded.parameters)
    assert_close(loss, truth, plain, "loss")
    for name, got, want, simple in zip("e c bias".split(), grads, truth_grads, plain_grads):
        assert_close(got, want, simple, f"d{name}")


def test_gradients_are_more_than_16_bits():
    """dC in fp32 is the sum of 16-bit products, not their rounding."""
    p = problems.make((60,), V=503, D=32)
    with torch.autocast(problems.device, BF16):
        (dc,) = torch.autograd.grad(loss_of(p), p.c)
    assert not torch.equal(dc, dc.to(BF16).float())


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_dtypes_may_differ(options):
    """E from a 16-bit model, C a parameter in fp32."""
    p = problems.make((60,), V=503, D=32, bias=True)
    mixed = p.to(F32)
    mixed.e = p.e.detach().to(BF16).requires_grad_()
    with torch.autocast(problems.device, BF16):
        loss, expected = loss_of(mixed, **options), loss_of(p, **options)
    torch.testing.assert_close(loss, expected)
    grads = torch.autograd.grad(loss, mixed.parameters)
    assert [g.dtype for g in grads] == [BF16, F32, F32]
    expected_grads = torch.autograd.grad(expected, p.parameters)
    torch.testing.assert_close(grads[0], expected_grads[0].to(BF16), rtol=2e-2, atol=1e-4)
    torch.testing.assert_close(grads[1], expected_grads[1], rtol=1e-2, atol=1e-5)


def test_backward_outside_the_context():
    p = problems.make()
    with torch.autocast(problems.device, BF16):
        loss = loss_of(p)
        inside = torch.autograd.grad(loss, p.parameters, retain_graph=True)
    outside = torch.autograd.grad(loss, p.parameters)
    for a, b in zip(inside, outside):
        assert torch.equal(a, b)


def test_fp64_stays_fp64():
    """As F.linear: autocast leaves fp64 alone, and refuses to mix it."""
    p = problems.make(dtype=F64)
    with torch.autocast(problems.device, BF16):
        loss = loss_of(p)
        assert loss.dtype == F64
        with pytest.raises(TypeError, match="e is torch.float64, c torch.float32"):
            linear_cross_entropy(p.e, p.c.float(), p.targets)
    assert torch.equal(loss, loss_of(p))


def test_loss_scale_of_fp16():
    """Gradients that fp16 cannot hold survive with a loss scale, as in the plain path."""
    p = problems.make((512,), V=40, D=8, dtype=F16, ignored=0.0)
    scale = 1024.0
    scaled = torch.autograd.grad(loss_of(p) * scale, p.parameters)
    q = p.to(F64)
    truth = torch.autograd.grad(reference.evaluate(q)["loss"], q.parameters)
    for got, want in zip(scaled, truth):
        # g itself may be fp16: what cancels in a sum leaves that much of the largest terms.
        atol = 1e-3 * want.abs().max().item()
        torch.testing.assert_close(got.double() / scale, want, rtol=5e-3, atol=atol)


def test_disabled_autocast_is_no_autocast():
    p = problems.make()
    with torch.autocast(problems.device, BF16, enabled=False):
        with pytest.raises(TypeError, match="must have one dtype"):
            linear_cross_entropy(p.e.to(BF16), p.c, p.targets)

"""Perplexity, accuracy, z-loss: sums over batches, in fp64."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import problems
from helpers.problems import BF16, F32

from cutloss import linear_cross_entropy, losses

pytestmark = pytest.mark.usefixtures("device")


def stored(p, shift=0):
    """logits and targets of the tokens that count"""
    e = p.e[:, : p.e.shape[1] - shift] if shift else p.e
    targets = p.targets[:, shift:] if shift else p.targets
    counts = targets != -100
    return (e @ p.c.T)[counts].double(), targets[counts], counts


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shift", [0, 1])
def test_evaluate(shift, weighted):
    p = problems.make((3, 12), 53, 16, F32, ignored=0.3)
    p.targets[0, :6] = (p.e @ p.c.T).argmax(-1)[0, :6]  # some are right
    weight = torch.rand(3, 12, device=p.e.device) if weighted else None
    made = losses.evaluate(p.e, p.c, p.targets, shift=shift, token_weight=weight)
    z, targets, counts = stored(p, shift)
    w = (weight[:, shift:][counts] if weighted else torch.ones(len(z), device=z.device)).double()
    nll = (F.cross_entropy(z, targets, reduction="none") * w).sum() / w.sum()
    torch.testing.assert_close(made.nll(), nll, rtol=1e-5, atol=0)
    torch.testing.assert_close(made.perplexity(), nll.exp(), rtol=1e-5, atol=0)
    right = ((z.argmax(-1) == targets) * w).sum() / w.sum()
    torch.testing.assert_close(made.accuracy(), right)
    assert made.sums.dtype == torch.float64 and not made.sums.requires_grad
    assert 0 < right < 1


def test_batches_add_up():
    """To what one batch gives; a mean of their perplexities does not."""
    p = problems.make((4, 12), 53, 16, ignored=0.3)
    p.targets[1, 2:], p.targets[2] = -100, -100
    whole = losses.evaluate(p.e, p.c, p.targets)
    parts = [losses.evaluate(e, p.c, t) for e, t in zip(p.e, p.targets)]
    total = sum(parts[1:], parts[0])
    torch.testing.assert_close(total.sums, whole.sums)
    assert parts[2].perplexity().isnan() and parts[2].accuracy().isnan()
    of_parts = torch.stack([part.perplexity() for part in parts]).nanmean()
    assert abs(of_parts - whole.perplexity()) > 1e-3


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_perplexity_and_accuracy_of_results(dtype):
    p = problems.make((30,), 53, 16, dtype)
    p.targets[:9] = (p.e.float() @ p.c.float().T).argmax(-1)[:9]
    nll, predictions = linear_cross_entropy(
        p.e, p.c, p.targets, reduction="none", return_predictions=True
    )
    made, counts = losses.evaluate(p.e, p.c, p.targets), p.targets != -100
    torch.testing.assert_close(losses.perplexity(nll, counts), made.perplexity())
    torch.testing.assert_close(losses.token_accuracy(predictions, p.targets), made.accuracy())
    nll.data[~counts] = torch.nan
    torch.testing.assert_close(losses.perplexity(nll, counts), made.perplexity())
    assert losses.perplexity(nll[:0]).isnan()


def test_a_mean_in_fp32_would_lose_it():
    nll = torch.full((1 << 22,), 1.0)
    nll[0] = 3.0e7
    mean = (3.0e7 + (1 << 22) - 1) / (1 << 22)
    assert losses.perplexity(nll).item() == pytest.approx(math.exp(mean), rel=1e-12)


def test_z_loss():
    p = problems.make((30,), 53, 16, problems.widest())
    nll, lse = linear_cross_entropy(p.e, p.c, p.targets, reduction="none", return_lse=True)
    counts = p.targets != -100
    got = nll.sum() / counts.sum() + losses.z_loss(lse, counts, coefficient=0.01)
    want = linear_cross_entropy(p.e, p.c, p.targets, z_loss=0.01)
    torch.testing.assert_close(got, want)
    got, want = (torch.autograd.grad(t, p.parameters) for t in (got, want))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)
    lse = torch.tensor([1.0, torch.nan, 3.0], requires_grad=True)
    mask = torch.tensor([True, False, True])
    loss = losses.z_loss(lse, mask, coefficient=1.0, num_items_in_batch=4)
    (d_lse,) = torch.autograd.grad(loss, lse)
    assert loss == 2.5 and torch.equal(d_lse, torch.tensor([0.5, 0.0, 1.5]))
    assert losses.z_loss(lse[:0]) == 0 and losses.z_loss(lse.detach()[::2], coefficient=1) == 5


def test_refused():
    nll, targets = torch.zeros(4), torch.zeros(4, dtype=torch.long)
    cases = [
        (lambda: losses.perplexity(nll, targets), ValueError, r"mask must be bool of shape \(4,\)"),
        (lambda: losses.perplexity(targets), TypeError, "nll must be a floating-point tensor"),
        (lambda: losses.perplexity(nll, None, nll[:3]), ValueError, r"shape \(4,\), got \(3,\)"),
        (lambda: losses.token_accuracy(targets[1:], targets), ValueError, r"pass targets\[..., sh"),
        (lambda: losses.z_loss(nll, coefficient=-1.0), ValueError, "coefficient must be finite"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()

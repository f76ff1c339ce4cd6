"""Losses of cutloss.losses at the ends: exponentials that overflow, one token, many tokens."""

import pytest
import torch
from helpers.inside import _policy_terms

from cutloss import losses


def log_probs(*rows):
    values = torch.tensor(rows, requires_grad=True)
    return values, losses.TokenLogProbs(values, torch.ones(values.shape, dtype=torch.bool))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["grpo", "dapo", "sapo", "cispo"])
def test_a_ratio_that_overflows(kind, level):
    """The clipped loss of e^200 is that of 1 + epsilon, and its gradient 0."""
    values, policy = log_probs([-1.0, -1.0], [-2.0, -1.0])
    old = torch.tensor([[-201.0, -201.0], [-2.0, -1.0]])
    options = dict(epsilon_high=5.0) if kind == "cispo" else {}
    result = losses.policy_loss(policy, torch.tensor([1.0, 0.5]), old_log_probs=old, loss_type=kind,
                                importance_sampling_level=level, **options)  # fmt: skip
    (grad,) = torch.autograd.grad(result.loss, values)
    assert result.loss.isfinite() and grad.isfinite().all() and (grad[1] != 0).all()
    if kind in ("grpo", "dapo"):
        assert result.loss.item() == pytest.approx(-(1.2 + 0.5) / 2) and (grad[0] == 0).all()


@pytest.mark.parametrize("corrected", [True, False])
def test_a_kl_that_overflows(corrected):
    values, policy = log_probs([-200.0, -1.0])
    result = losses.policy_loss(policy, torch.zeros(1), reference=torch.tensor([[-1.0, -2.0]]),
                                beta=0.1, use_bias_correction_kl=corrected)  # fmt: skip
    (grad,) = torch.autograd.grad(result.loss, values)
    assert result.loss.isfinite() and result.metrics["kl"].isfinite()
    assert grad[0, 0] == 0 and grad[0, 1].isfinite() and grad[0, 1] > 0


@pytest.mark.parametrize("kind", ["forward_kl", "alpha_divergence"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "sigmoid_norm", "exo_pair"])
def test_a_score_that_overflows(kind, loss_type):
    """Of both sequences, whose difference was NaN."""
    values, policy = log_probs([-200.0], [-201.0], [-1.0], [-200.0], [-199.0], [-2.0])
    smoothing = 0.1 if loss_type == "exo_pair" else 0.0
    loss = losses.dpo_loss(policy, torch.tensor([-1.0, -1, -2, -1, -1, -2]), loss_type=loss_type,
                           f_divergence_type=kind, f_alpha_divergence_coef=-0.5,
                           label_smoothing=smoothing).loss  # fmt: skip
    (grad,) = torch.autograd.grad(loss, values)
    assert loss.isfinite() and grad.isfinite().all() and grad[2] != 0


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
def test_alpha_of_sums(loss_type):
    values, policy = log_probs([-500.0, -500.0], [-1.0, -1.0], [-600.0, -500.0], [-2.0, -1.0])
    loss = losses.cpo_loss(policy, loss_type=loss_type, alpha=0.25).loss
    (grad,) = torch.autograd.grad(loss, values)
    assert loss.isfinite() and grad.isfinite().all() and (grad[1] != 0).all()


def test_metrics_of_one_token():
    """L = 1: what is of tokens is a mean over tokens that count, what is of sequences over all."""
    lp, mask = torch.tensor([[-1.0], [-1.0], [0.0]]), torch.tensor([[True], [True], [False]])
    policy = losses.TokenLogProbs(lp, mask, entropy=torch.ones(3, 1))
    old = lp - torch.tensor([[1.0], [0.0], [0.0]])
    for level, share in (("token", 1 / 2), ("sequence", 1 / 3)):
        metrics = losses.policy_loss(
            policy, torch.ones(3), old_log_probs=old, importance_sampling_level=level,
            reference=lp - 1, beta=0.1, use_bias_correction_kl=False,
        ).metrics  # fmt: skip
        assert metrics["clip_ratio/high_mean"].item() == pytest.approx(share)
        assert metrics["entropy"].item() == 1
        assert metrics["kl"].item() == pytest.approx(torch.e**-1)


def test_the_quantile_is_torchs():
    g = torch.Generator().manual_seed(0)
    for n in (1, 2, 7, 200):
        t, mask = torch.rand(3, n, generator=g), torch.rand(3, n, generator=g) < 0.6
        mask[0, 0] = True
        for q in (0.0, 0.1, 0.5, 0.83, 1.0):
            expected = t.masked_fill(~mask, torch.nan).flatten().nanquantile(q)
            torch.testing.assert_close(_policy_terms._quantile(t, mask, q), expected)


def test_the_quantile_of_many_tokens():
    n = 2**24 + 2
    entropy = torch.arange(n, dtype=torch.float64).view(2, -1) / n
    policy = losses.TokenLogProbs(-entropy, torch.ones(entropy.shape, dtype=torch.bool), entropy)
    # Those from 0.75 (n - 1) = 12582912.75 on.
    assert _policy_terms._high_entropy(policy, 0.25).sum().item() == n - 12582913

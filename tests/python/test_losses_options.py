"""Options of cutloss.losses that belong to several losses: batches in parts, dtypes, masks, bounds."""

import pytest
import torch

from cutloss import losses

B, L = 6, 5


def made(seed=0, dtype=torch.float64):
    """TokenLogProbs with entropies, some tokens masked, and one more tensor like them."""
    g = torch.Generator().manual_seed(seed)
    values = [-torch.rand(B, L, generator=g, dtype=torch.float64) for _ in range(3)]
    mask = torch.rand(B, L, generator=g) < 0.7
    return losses.TokenLogProbs(values[0].to(dtype), mask, -values[1].to(dtype)), values[2]


def part(t, rows):
    if isinstance(t, losses.TokenLogProbs):
        return losses.TokenLogProbs(t.log_probs[rows], t.mask[rows], t.entropy[rows])
    return t[rows]


@pytest.mark.parametrize("kind", ["dapo", "cispo", "vespo"])
def test_a_batch_is_the_sum_of_its_parts(kind):
    """With num_items_in_batch, entropy and KL too."""
    policy, other = made()
    policy.log_probs.requires_grad_()
    policy.entropy.requires_grad_()
    options = dict(loss_type=kind, num_items_in_batch=policy.mask.sum(), beta=0.2,
                   entropy_coef=0.3, epsilon_high=5.0 if kind == "cispo" else None)  # fmt: skip
    whole = (policy, torch.linspace(-1, 2, B, dtype=torch.float64))

    def loss(rows):
        now, a = (part(t, rows) for t in whole)
        return losses.policy_loss(now, a, reference=part(other, rows),
                                  old_log_probs=part(other, rows) + 0.1, **options).loss  # fmt: skip

    leaves = (policy.log_probs, policy.entropy)
    together, apart = loss(slice(None)), loss(slice(0, 2)) + loss(slice(2, 3)) + loss(slice(3, 6))
    torch.testing.assert_close(together, apart)
    for x, y in zip(torch.autograd.grad(together, leaves), torch.autograd.grad(apart, leaves)):
        torch.testing.assert_close(x, y)

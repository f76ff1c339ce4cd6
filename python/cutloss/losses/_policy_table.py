"""The policy-gradient losses: what each makes of a token, and what it divides the sum by.

Names and definitions are those of TRL 1.16's GRPOTrainer. Shapes: (B, L) for tokens, (B, 1) for
what a sequence shares; fp32 (fp64 for fp64). ratio is p(token) under the policy over that under the
old policy, or the sequence's geometric mean of them (Zheng et al. 2025, "Group Sequence Policy
Optimization", arXiv:2507.18071).
"""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor


@dataclasses.dataclass
class Tokens:
    """What the formulas read."""

    log_probs: Tensor  # (B, L)
    log_ratio: Tensor  # (B, L), 0 where masked
    ratio: Tensor  # (B, L), or (B, 1) for a ratio of sequences
    advantages: Tensor  # (B, 1) or (B, L)
    mask: Tensor  # (B, L), bool
    sampling_ratio: Tensor | None  # (B, L) or (B, 1)
    num_items: Tensor | float  # see policy_loss
    max_length: float

    epsilon: float
    epsilon_high: float
    delta: float | None
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    vespo_k_pos: float
    vespo_lambda_pos: float
    vespo_k_neg: float
    vespo_lambda_neg: float


# Of a token ------------------------------------------------------------------------------------


def clipped(t: Tokens) -> Tensor:
    """-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A). Schulman et al. 2017, "Proximal Policy
    Optimization Algorithms" (arXiv:1707.06347), equation 7; two epsilons as in Yu et al. 2025,
    "DAPO" (arXiv:2503.14476), equation 10. With delta the first r is at most delta, which bounds
    the loss where A < 0: Prime Intellect 2025, "INTELLECT-2" (arXiv:2505.07291)."""
    within = t.ratio.clamp(1 - t.epsilon, 1 + t.epsilon_high)
    ratio = t.ratio if t.delta is None else t.ratio.clamp(max=t.delta)
    return -torch.minimum(ratio * t.advantages, within * t.advantages)


def cispo(t: Tokens) -> Tensor:
    """-min(r, epsilon_high) A log p, without a gradient through r: epsilon_high bounds r itself (5,
    say). MiniMax 2025, "MiniMax-M1" (arXiv:2506.13585), without its lower bound; Khatri
    et al. 2025, "The Art of Scaling Reinforcement Learning" (arXiv:2510.13786)."""
    return -t.ratio.clamp(max=t.epsilon_high).detach() * t.advantages * t.log_probs


def sapo(t: Tokens) -> Tensor:
    """-(4 / tau) sigma(tau (r - 1)) A, tau one number for A > 0 and one for A <= 0. Gao et al.
    2025, "Soft Adaptive Policy Optimization" (arXiv:2511.20347)."""
    positive, negative = t.sapo_temperature_pos, t.sapo_temperature_neg
    tau = _chosen(t.advantages > 0, positive, negative, t.advantages)
    return -torch.sigmoid(tau * (t.ratio - 1)) * 4 / tau * t.advantages


def vespo(t: Tokens) -> Tensor:
    """-phi(w) A log p, phi(w) = e^lambda w^k e^(-lambda w) without a gradient; w is the product of
    the sequence's ratios, of the sampler's correction too. Shen et al. 2026, "VESPO"
    (arXiv:2602.10693). As in TRL logs of the tokens' ratios are kept in [-20, 20], of the
    correction's and of w in [log 1e-8, 20]."""
    return -vespo_weight(t) * t.advantages * t.log_probs


@torch.no_grad()
def vespo_weight(t: Tokens) -> Tensor:
    """phi(w): (B, 1), or (B, L) where advantages are."""
    least, most = math.log(1e-8), 20.0
    log_w = t.log_ratio.clamp(-20.0, 20.0).sum(-1, keepdim=True)
    if t.sampling_ratio is not None:
        correction = t.sampling_ratio.log().clamp(least, most)
        log_w = log_w + torch.where(t.mask, correction, 0.0).sum(-1, keepdim=True)
    log_w = log_w.clamp(least, most)
    positive = t.advantages >= 0
    k = _chosen(positive, t.vespo_k_pos, t.vespo_k_neg, t.advantages)
    decay = _chosen(positive, t.vespo_lambda_pos, t.vespo_lambda_neg, t.advantages).clamp(min=1e-4)
    return torch.exp(decay + k * log_w - decay * log_w.exp()).nan_to_num(torch.nan, 0.0, 0.0)


def _chosen(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """In the dtype of `like`, which where() of two numbers is not."""
    return torch.where(condition, torch.full_like(like, yes), no)


# Of the batch ----------------------------------------------------------------------------------
# `losses` is (B, L), 0 where masked.


def mean_of_sequences(losses: Tensor, t: Tokens) -> Tensor:
    """Each sequence's mean over its tokens, then the mean over all sequences. Shao et al. 2024,
    "DeepSeekMath" (arXiv:2402.03300), equation 3."""
    return (losses.sum(-1) / t.mask.sum(-1).clamp(min=1)).sum() / max(losses.shape[0], 1)


def mean_of_tokens(losses: Tensor, t: Tokens) -> Tensor:
    """Over the tokens given here."""
    return losses.sum() / t.mask.sum().clamp(min=1)


def sum_over_items(losses: Tensor, t: Tokens) -> Tensor:
    """The sum, divided by num_items_in_batch. Yu et al. 2025, "DAPO" (arXiv:2503.14476),
    equation 8."""
    return losses.sum() / t.num_items


def sum_over_constant(losses: Tensor, t: Tokens) -> Tensor:
    """The sum, divided by B times max_completion_length. Liu et al. 2025, "Understanding
    R1-Zero-Like Training" (arXiv:2503.20783), Dr. GRPO."""
    return losses.sum() / (max(losses.shape[0], 1) * t.max_length)


def sum_of_sequences(losses: Tensor, t: Tokens) -> Tensor:
    """Each sequence's sum, then the mean over all sequences: a mean over tokens, weighted by
    length. "LUSPO" (arXiv:2602.05261)."""
    return losses.sum() / max(losses.shape[0], 1)


@dataclasses.dataclass(frozen=True)
class PolicyLoss:
    of_token: Callable[[Tokens], Tensor]
    of_batch: Callable[[Tensor, Tokens], Tensor]


POLICY: dict[str, PolicyLoss] = {
    "grpo": PolicyLoss(clipped, mean_of_sequences),
    "bnpo": PolicyLoss(clipped, mean_of_tokens),
    "dr_grpo": PolicyLoss(clipped, sum_over_constant),
    "dapo": PolicyLoss(clipped, sum_over_items),
    "luspo": PolicyLoss(clipped, sum_of_sequences),
    "cispo": PolicyLoss(cispo, sum_over_items),
    "sapo": PolicyLoss(sapo, mean_of_sequences),
    "vespo": PolicyLoss(vespo, sum_over_items),
}

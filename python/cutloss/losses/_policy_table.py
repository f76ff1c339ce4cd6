"""The policy-gradient losses: what each makes of a token, and what it divides that by.

Names and definitions are those of TRL 1.16's GRPOTrainer. Shapes: (B, L) for tokens, (B, 1) for
what a sequence shares; or (R) for all of it, of R tokens of any sequences, where no formula takes
sums over sequences. fp32 (fp64 for fp64). ratio is p(token) under the policy over that under the
old policy, or the sequence's geometric mean of them (Zheng et al. 2025, "Group Sequence Policy
Optimization", arXiv:2507.18071).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ._policy_options import Options


@dataclasses.dataclass
class Tokens:
    """What the formulas read."""

    options: "Options"
    log_probs: Tensor  # (B, L)
    log_ratio: Tensor  # (B, L), 0 where masked
    ratio: Tensor  # (B, L), or (B, 1) for a ratio of sequences
    advantages: Tensor  # (B, 1) or (B, L)
    mask: Tensor  # (B, L), bool
    sampling_ratio: Tensor | None  # (B, L) or (B, 1)


# Of a token ------------------------------------------------------------------------------------


def clipped(t: Tokens) -> Tensor:
    """-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A). Schulman et al. 2017, "Proximal Policy
    Optimization Algorithms" (arXiv:1707.06347), equation 7; two epsilons as in Yu et al. 2025,
    "DAPO" (arXiv:2503.14476), equation 10. With delta the first r is at most delta, which bounds
    the loss where A < 0: Prime Intellect 2025, "INTELLECT-2" (arXiv:2505.07291)."""
    o = t.options
    within = t.ratio.clamp(1 - o.epsilon, 1 + o.epsilon_high)
    ratio = t.ratio if o.delta is None else t.ratio.clamp(max=o.delta)
    return -torch.minimum(ratio * t.advantages, within * t.advantages)


def cispo(t: Tokens) -> Tensor:
    """-min(r, epsilon_high) A log p, without a gradient through r: epsilon_high bounds r itself (5,
    say). MiniMax 2025, "MiniMax-M1" (arXiv:2506.13585), without its lower bound; Khatri
    et al. 2025, "The Art of Scaling Reinforcement Learning" (arXiv:2510.13786)."""
    return -t.ratio.clamp(max=t.options.epsilon_high).detach() * t.advantages * t.log_probs


def sapo(t: Tokens) -> Tensor:
    """-(4 / tau) sigma(tau (r - 1)) A, tau one number for A > 0 and one for A <= 0. Gao et al.
    2025, "Soft Adaptive Policy Optimization" (arXiv:2511.20347)."""
    positive, negative = t.options.sapo_temperature_pos, t.options.sapo_temperature_neg
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
    o, least, most = t.options, math.log(1e-8), 20.0
    log_w = t.log_ratio.clamp(-20.0, 20.0).sum(-1, keepdim=True)
    if t.sampling_ratio is not None:
        correction = t.sampling_ratio.log().clamp(least, most)
        log_w = log_w + torch.where(t.mask, correction, 0.0).sum(-1, keepdim=True)
    log_w = log_w.clamp(least, most)
    positive = t.advantages >= 0
    k = _chosen(positive, o.vespo_k_pos, o.vespo_k_neg, t.advantages)
    decay = _chosen(positive, o.vespo_lambda_pos, o.vespo_lambda_neg, t.advantages).clamp(min=1e-4)
    return torch.exp(decay + k * log_w - decay * log_w.exp()).nan_to_num(torch.nan, 0.0, 0.0)


def _chosen(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """In the dtype of `like`, which where() of two numbers is not."""
    return torch.where(condition, torch.full_like(like, yes), no)


# Of the batch ----------------------------------------------------------------------------------
# What a token's term is divided by before all are summed: (B, 1), or one number. It depends on the
# mask (B, L) alone, so that a token's share of the loss is known before any other token's term.


def by_lengths(mask: Tensor, o: "Options") -> Tensor:
    """Each sequence's mean over its tokens, then the mean over all sequences. Shao et al. 2024,
    "DeepSeekMath" (arXiv:2402.03300), equation 3."""
    return mask.sum(-1, keepdim=True).clamp(min=1) * by_sequences(mask, o)


def by_tokens(mask: Tensor, o: "Options") -> Tensor:
    """The tokens given here."""
    return mask.sum().clamp(min=1)


def by_items(mask: Tensor, o: "Options") -> Tensor | float:
    """num_items_in_batch. Yu et al. 2025, "DAPO" (arXiv:2503.14476), equation 8."""
    items = o.num_items_in_batch
    if items is None:
        return by_tokens(mask, o)
    return items.to(mask.device) if isinstance(items, Tensor) else items


def by_constant(mask: Tensor, o: "Options") -> float:
    """B times max_completion_length. Liu et al. 2025, "Understanding R1-Zero-Like Training"
    (arXiv:2503.20783), Dr. GRPO."""
    return by_sequences(mask, o) * o.max_completion_length


def by_sequences(mask: Tensor, o: "Options") -> int:
    """B, so that the loss is a mean over tokens, weighted by length. "LUSPO" (arXiv:2602.05261)."""
    return max(mask.shape[0], 1)


@dataclasses.dataclass(frozen=True)
class PolicyLoss:
    of_token: Callable[[Tokens], Tensor]
    divisor: Callable[[Tensor, "Options"], Tensor | float]


POLICY: dict[str, PolicyLoss] = {
    "grpo": PolicyLoss(clipped, by_lengths),
    "bnpo": PolicyLoss(clipped, by_tokens),
    "dr_grpo": PolicyLoss(clipped, by_constant),
    "dapo": PolicyLoss(clipped, by_items),
    "luspo": PolicyLoss(clipped, by_sequences),
    "cispo": PolicyLoss(cispo, by_items),
    "sapo": PolicyLoss(sapo, by_lengths),
    "vespo": PolicyLoss(vespo, by_items),
}

"""DPO and its variants: one table of formulas over sequence log-probabilities.

Names and definitions are those of TRL 1.16's DPOTrainer.
"""

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ._arguments import bounded


@dataclasses.dataclass
class Pairs:
    """What the formulas read. Shapes (B), a pair each; fp32 (fp64 for fp64).

    A log-ratio is log p(sequence) under the policy less that under the reference. Scores are
    the f-divergence's function of the log-ratios; with reverse_kl they are the log-ratios.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_score: Tensor
    rejected_score: Tensor
    chosen_length: Tensor  # tokens that count, at least 1
    rejected_length: Tensor
    chosen_nll: Tensor  # a scalar: the mean over all chosen tokens

    beta: float
    label_smoothing: float
    discopop_tau: float

    @property
    def chosen_ratio(self) -> Tensor:
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        return self.rejected - self.ref_rejected

    @property
    def margin(self) -> Tensor:
        return self.chosen_score - self.rejected_score

    @property
    def mean_margin(self) -> Tensor:
        """Of scores per token."""
        return self.chosen_score / self.chosen_length - self.rejected_score / self.rejected_length


def _smoothed(x: Tensor, smoothing: float) -> Tensor:
    return -(1 - smoothing) * F.logsigmoid(x) - smoothing * F.logsigmoid(-x)


def sigmoid(p: Pairs) -> Tensor:
    """-log sigma(beta m), m the margin of scores. Rafailov et al. 2023, "Direct Preference
    Optimization" (arXiv:2305.18290), equation 7; with another f-divergence Wang et al. 2023,
    "Beyond Reverse KL" (arXiv:2309.16240)."""
    return -F.logsigmoid(p.beta * p.margin)


def hinge(p: Pairs) -> Tensor:
    """max(0, 1 - beta m). Zhao et al. 2023, "SLiC-HF" (arXiv:2305.10425), on DPO's margin as in
    Liu et al. 2023, "Statistical Rejection Sampling Improves Preference Optimization"
    (arXiv:2309.06657), whose gamma is beta."""
    return torch.relu(1 - p.beta * p.margin)


def ipo(p: Pairs) -> Tensor:
    """(m - 1 / (2 beta))^2, beta the paper's tau. Azar et al. 2023, "A General Theoretical Paradigm
    to Understand Learning from Human Preferences" (arXiv:2310.12036), equation 17. The paper has
    log-probabilities of sequences; as in TRL each score is divided by its number of tokens."""
    return (p.mean_margin - 1 / (2 * p.beta)) ** 2


def exo_pair(p: Pairs) -> Tensor:
    """KL(q || r), q = (sigma(beta m), sigma(-beta m)), r = (1 - eps, eps), eps = label_smoothing.
    Ji et al. 2024, "Towards Efficient Exact Optimization of Language Model Alignment"
    (arXiv:2402.00856), equation 16."""
    x, eps = p.beta * p.margin, p.label_smoothing
    of_chosen = torch.sigmoid(x) * (F.logsigmoid(x) - math.log1p(-eps))
    return of_chosen + torch.sigmoid(-x) * (F.logsigmoid(-x) - math.log(eps))


def nca_pair(p: Pairs) -> Tensor:
    """-log sigma(r_w) - (log sigma(-r_w) + log sigma(-r_l)) / 2, r = beta times the log-ratio.
    Chen et al. 2024, "Noise Contrastive Alignment of Language Models with Explicit Rewards"
    (arXiv:2402.05369), NCA for pairs."""
    chosen, rejected = p.beta * p.chosen_ratio, p.beta * p.rejected_ratio
    both = F.logsigmoid(-chosen) + F.logsigmoid(-rejected)
    return -F.logsigmoid(chosen) - 0.5 * both


def robust(p: Pairs) -> Tensor:
    """(-(1 - eps) log sigma(x) + eps log sigma(-x)) / (1 - 2 eps), x = beta m, eps =
    label_smoothing, the share of flipped preferences. Chowdhury et al. 2024, "Provably Robust DPO"
    (arXiv:2403.00409)."""
    x, eps = p.beta * p.margin, p.label_smoothing
    return (eps * F.logsigmoid(-x) - (1 - eps) * F.logsigmoid(x)) / (1 - 2 * eps)


def bco_pair(p: Pairs) -> Tensor:
    """-log sigma(r_w) - log sigma(-r_l). Jung et al. 2024, "Binary Classifier Optimization for
    Large Language Model Alignment" (arXiv:2404.04656), without the paper's reward shift, as in
    TRL."""
    return -F.logsigmoid(p.beta * p.chosen_ratio) - F.logsigmoid(-p.beta * p.rejected_ratio)


def sppo_hard(p: Pairs) -> Tensor:
    """(ratio_w - 1 / (2 beta))^2 + (ratio_l + 1 / (2 beta))^2. Wu et al. 2024, "Self-Play
    Preference Optimization" (arXiv:2405.00675), equation 4.7 with probabilities of 1 for the winner
    and 0 for the loser, 1 / beta the paper's eta."""
    half = 0.5 / p.beta
    return (p.chosen_ratio - half) ** 2 + (p.rejected_ratio + half) ** 2


def aot(p: Pairs) -> Tensor:
    """-(1 - eps) log sigma(beta d) - eps log sigma(-beta d), d the difference of the sorted margins
    of policy and reference. Melnyk et al. 2024, "Distributional Preference Alignment of LLMs via
    Optimal Transport" (arXiv:2406.05882), the paired form. Sorted over the pairs given here: with
    the batch split over processes each process sorts its own."""
    policy, reference = p.chosen - p.rejected, p.ref_chosen - p.ref_rejected
    return _smoothed(p.beta * (_sorted(policy) - _sorted(reference)), p.label_smoothing)


def aot_unpaired(p: Pairs) -> Tensor:
    """As aot, d the difference of the sorted log-ratios of chosen and of rejected sequences (the
    same paper's unpaired form)."""
    difference = _sorted(p.chosen_ratio) - _sorted(p.rejected_ratio)
    return _smoothed(p.beta * difference, p.label_smoothing)


def _sorted(t: Tensor) -> Tensor:
    return torch.sort(t, stable=True).values


def apo_zero(p: Pairs) -> Tensor:
    """1 - sigma(r_w) + sigma(r_l). D'Oosterlinck et al. 2024, "Anchored Preference Optimization and
    Contrastive Revisions" (arXiv:2408.06266), equation 7: for chosen sequences better than what the
    model writes."""
    return torch.sigmoid(-p.beta * p.chosen_ratio) + torch.sigmoid(p.beta * p.rejected_ratio)


def apo_down(p: Pairs) -> Tensor:
    """sigma(r_w) + 1 - sigma(r_w - r_l). The same paper, equation 8: for chosen sequences worse
    than what the model writes."""
    difference = p.beta * (p.chosen_ratio - p.rejected_ratio)
    return torch.sigmoid(p.beta * p.chosen_ratio) + torch.sigmoid(-difference)


def discopop(p: Pairs) -> Tensor:
    """-(1 - s) log sigma(x) + s e^-x, x = beta m, s = sigma(x / tau). Lu et al. 2024, "Discovering
    Preference Optimization Algorithms with and for Large Language Models" (arXiv:2406.08414),
    equation 5. The product s e^-x is one exponential, which does not overflow where s is tiny."""
    x = p.beta * p.margin
    gate = x / p.discopop_tau
    return -torch.sigmoid(-gate) * F.logsigmoid(x) + torch.exp(F.logsigmoid(gate) - x)


def sft(p: Pairs) -> Tensor:
    """The mean nll of all chosen tokens of the batch, for every pair: the loss of supervised
    fine-tuning, to be mixed with others as in Wang et al. 2024, "Enhancing the Reasoning Ability of
    Multimodal Large Language Models via Mixed Preference Optimization" (arXiv:2411.10442). 0 where
    no token counts."""
    return p.chosen_nll.expand(p.chosen.shape)


def sigmoid_norm(p: Pairs) -> Tensor:
    """-log sigma(beta m), each score divided by its sequence's number of tokens. Lambert et al.
    2024, "Tulu 3" (arXiv:2411.15124), length-normalised DPO."""
    return -F.logsigmoid(p.beta * p.mean_margin)


DPO: dict[str, Callable[[Pairs], Tensor]] = {
    f.__name__: f
    for f in (
        sigmoid, hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard, aot, aot_unpaired,
        apo_zero, apo_down, discopop, sft, sigmoid_norm,
    )
}  # fmt: skip

# The f-divergence's normaliser cancels in the difference of scores; the others need more than that.
TAKES_F_DIVERGENCE = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft",
                      "sigmoid_norm")  # fmt: skip
TAKES_SMOOTHING = ("exo_pair", "robust", "aot", "aot_unpaired")
SORTS = ("aot", "aot_unpaired")


def _alpha_divergence(ratio: Tensor, alpha: float) -> Tensor:
    if abs(alpha - 1) < 1e-6:
        return ratio
    return torch.expm1(bounded((alpha - 1) * ratio)) / (alpha - 1)


F_DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": lambda ratio, alpha: ratio,
    "forward_kl": lambda ratio, alpha: -torch.expm1(bounded(-ratio)),
    "js_divergence": lambda ratio, alpha: math.log(2) + F.logsigmoid(ratio),
    "alpha_divergence": _alpha_divergence,
}

"""Preference losses without a reference model: CPO, SimPO, AlphaPO, ORPO."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _arguments as args
from ._arguments import Loss
from .dpo import preference_metrics
from .log_probs import TokenLogProbs


def _sigmoid(margin: Tensor, beta: float, smoothing: float) -> Tensor:
    """-(1 - eps) log sigma(beta m) - eps log sigma(-beta m), m the difference of the two sequences'
    log-probabilities, eps = label_smoothing. Xu et al. 2024, "Contrastive Preference Optimization"
    (arXiv:2401.08417), equation 3."""
    x = beta * margin
    return -(1 - smoothing) * F.logsigmoid(x) - smoothing * F.logsigmoid(-x)


def _hinge(margin: Tensor, beta: float, smoothing: float) -> Tensor:
    """max(0, 1 - beta m). Zhao et al. 2023, "SLiC-HF" (arXiv:2305.10425)."""
    return torch.relu(1 - beta * margin)


def _ipo(margin: Tensor, beta: float, smoothing: float) -> Tensor:
    """(m - 1 / (2 beta))^2, m of mean log-probabilities. Azar et al. 2023 (arXiv:2310.12036),
    equation 17, without a reference."""
    return (margin - 1 / (2 * beta)) ** 2


# m, beta, label_smoothing -> (B). "simpo" takes gamma from beta m before.
CPO: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "simpo": _sigmoid,
}
OF_MEANS = ("ipo", "simpo")  # of log-probabilities per token; the others of sums


def cpo_loss(
    policy: TokenLogProbs,
    *,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    cpo_alpha: float = 1.0,
    simpo_gamma: float = 0.5,
    alpha: float = 0.0,
) -> Loss:
    """A preference loss and cpo_alpha times the chosen sequences' nll, as TRL 1.16's CPOTrainer.

    The mean over all pairs, plus cpo_alpha times the mean nll over all chosen tokens (0 where there
    is none). A sequence without a token that counts has a log-probability of 0 (TRL's means make
    NaN of it).

    :param policy: Of 2 B sequences, shape (2 B, L): B chosen ones, then their B rejected ones.
    :param loss_type: "sigmoid", "hinge", "ipo" or "simpo": Meng et al. 2024, "SimPO"
        (arXiv:2405.14734), equation 6, on mean log-probabilities, with simpo_gamma taken from beta
        times their difference. SimPO alone is cpo_alpha=0; with more it is CPO-SimPO.
    :param label_smoothing: For "sigmoid" and "simpo", in [0, 1].
    :param alpha: Not 0: AlphaPO (Gupta et al. 2025, arXiv:2501.03884): log-probabilities l become
        (1 - e^(-alpha l)) / alpha first, -alpha l kept at 80 (700 in fp64) at most. The paper
        has loss_type "simpo" and cpo_alpha=0.
    :return: The loss, and the means of what dpo_loss reports (rewards are beta times what the
        margin is made of), and the nll.
    """
    args.pairs(policy)
    args.choice("loss_type", loss_type, tuple(CPO))
    beta, alpha = args.positive("beta", beta), args.finite("alpha", alpha)
    cpo_alpha = args.not_negative("cpo_alpha", cpo_alpha)
    gamma = args.finite("simpo_gamma", simpo_gamma)
    smoothing = args.within("label_smoothing", label_smoothing, 0.0, 1.0)
    if smoothing and CPO[loss_type] is not _sigmoid:
        raise ValueError(
            f"loss_type {loss_type!r} takes no label_smoothing, got {smoothing}; 'sigmoid' and "
            f"'simpo' do"
        )
    chosen, rejected = (policy.mean() if loss_type in OF_MEANS else policy.sum()).chunk(2)
    rewards = chosen, rejected
    if alpha != 0:
        rewards = tuple(-torch.expm1(args.bounded(-alpha * t)) / alpha for t in rewards)
    margin = rewards[0] - rewards[1]
    if loss_type == "simpo":
        margin = margin - gamma / beta
    nll = args.chosen_nll(policy)
    loss = args.mean(CPO[loss_type](margin, beta, smoothing))
    if cpo_alpha:
        loss = loss + cpo_alpha * nll
    metrics = preference_metrics(chosen, rejected, *(beta * t for t in rewards))
    return Loss(loss, metrics | {"nll_loss": nll.detach()})


def simpo_loss(
    policy: TokenLogProbs,
    *,
    beta: float = 0.1,
    simpo_gamma: float = 0.5,
    label_smoothing: float = 0.0,
    cpo_alpha: float = 0.0,
    alpha: float = 0.0,
) -> Loss:
    """cpo_loss with loss_type "simpo", by itself unless cpo_alpha is given. The defaults are TRL's;
    the paper uses a beta of 2.0 to 2.5."""
    return cpo_loss(
        policy, loss_type="simpo", beta=beta, simpo_gamma=simpo_gamma,
        label_smoothing=label_smoothing, cpo_alpha=cpo_alpha, alpha=alpha,
    )  # fmt: skip


def orpo_loss(
    policy: TokenLogProbs, *, beta: float = 0.1, completion_mask: Tensor | None = None
) -> Loss:
    """The chosen sequences' nll and beta times the odds ratio's loss, as TRL 1.16's ORPOTrainer.

    Hong et al. 2024, "ORPO" (arXiv:2403.07691), equations 4 to 7: -log sigma(log odds_w - log
    odds_l), odds = p / (1 - p), p the geometric mean of the sequence's token probabilities; the
    mean over all pairs. The nll is the mean over all chosen tokens (0 where there is none). Where a
    sequence of the pair has no token, its odds do not exist and the pair's term is 0; a p that is 1
    but for rounding is taken one rounding below.

    :param policy: Of 2 B sequences, shape (2 B, L): B chosen ones, then their B rejected ones.
    :param beta: The paper's lambda.
    :param completion_mask: Tokens of the odds, bool, in the shape of the policy's log_probs; None:
        all that count. The nll is over all that count in any case: TRL's is over prompt and
        completion, so for the same number pass targets that hold the chosen prompts too, and the
        completions' mask here.
    :return: The loss, and the means of what dpo_loss reports (rewards are beta times mean
        log-probabilities), the nll, the log odds ratio and its log-sigmoid, over all pairs.
    """
    args.pairs(policy)
    beta = args.not_negative("beta", beta)
    mask = policy.mask
    if completion_mask is not None:
        mask = mask & args.token_mask("completion_mask", completion_mask, policy)
    means, difference, log_ratio = odds_ratios(policy, mask)
    chosen, rejected = means.chunk(2)
    nll = args.chosen_nll(policy)
    metrics = preference_metrics(chosen, rejected, beta * chosen, beta * rejected)
    metrics["nll_loss"] = nll.detach()
    metrics["log_odds_ratio"] = args.mean(log_ratio.detach())
    metrics["log_odds_chosen"] = args.mean(difference.detach())
    return Loss(nll - beta * args.mean(log_ratio), metrics)


def odds_ratios(
    policy: TokenLogProbs, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the tokens of `mask`, by default all that count: each sequence's mean log-probability,
    (2 B), and of each pair the log odds ratio and its log-sigmoid, (B), 0 where a sequence of the
    pair has no token."""
    mask = policy.mask if mask is None else mask
    lengths = mask.sum(-1)
    means = torch.where(mask, policy.log_probs, 0.0).sum(-1) / lengths.clamp(min=1)
    # The logarithm of 1 - p and its slope stay finite, also at the mean of 0 of an empty sequence.
    below_one = means.clamp(max=-torch.finfo(means.dtype).eps)
    difference = torch.sub(*_log_odds(below_one).chunk(2))
    exists = torch.minimum(*lengths.chunk(2)) > 0
    log_ratio = F.logsigmoid(difference)
    return means, torch.where(exists, difference, 0.0), torch.where(exists, log_ratio, 0.0)


def _log_odds(log_p: Tensor) -> Tensor:
    """log p - log(1 - p)"""
    near_one = log_p > -0.6931471805599453  # where 1 - p is the smaller: expm1 has its digits
    log_1_p = torch.where(near_one, torch.log(-torch.expm1(log_p)), torch.log1p(-torch.exp(log_p)))
    return log_p - log_1_p

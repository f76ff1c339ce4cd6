"""Preference losses with a reference model: DPO and its variants."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _arguments as args
from ._arguments import Loss
from ._dpo_table import DPO, F_DIVERGENCES, SORTS, TAKES_F_DIVERGENCE, TAKES_SMOOTHING, Pairs
from .log_probs import TokenLogProbs


def dpo_loss(
    policy: TokenLogProbs,
    reference: TokenLogProbs | Tensor | None,
    *,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    discopop_tau: float = 0.05,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
) -> Loss:
    """Preference losses with a reference model; options and defaults are those of TRL's DPOConfig.

    The loss is the mean over all pairs. A sequence without a token that counts has a
    log-probability of 0 and its pair stays in the mean; no pair at all makes a loss of 0.

    :param policy: Of 2 B sequences, shape (2 B, L): B chosen ones, then their B rejected ones.
    :param reference: The same tokens under the reference model: TokenLogProbs or a tensor in the
        shape of the policy's, or a tensor (2 B) of sums over each sequence's tokens, computed
        earlier (with the weights of ld_alpha, if that is used). Takes no gradient. None is enough
        for "sft".
    :param loss_type: A name of the table DPO, or several, whose losses are added with loss_weights
        (1 each by default).
    :param beta: How strongly the policy is held to the reference; "ipo"'s tau.
    :param label_smoothing: For "exo_pair" (in (0, 1); the paper has 1e-3), "robust" (in [0, 0.5)),
        "aot" and "aot_unpaired" (in [0, 1]). The others refuse it.
    :param f_divergence_type: "reverse_kl", "forward_kl", "js_divergence" or "alpha_divergence":
        the score of a log-ratio u is u, 1 - e^-u, log(2 sigma(u)) or (e^((a-1) u) - 1) / (a - 1),
        a = f_alpha_divergence_coef (Wang et al. 2023, "Beyond Reverse KL", arXiv:2309.16240). Only
        for the loss types in which the divergence's normaliser cancels (TAKES_F_DIVERGENCE).
    :param ld_alpha: Weight, in [0, 1], of the tokens beyond the shorter length of the pair (Liu et
        al. 2024, "Length Desensitization in Direct Preference Optimization", arXiv:2409.06411).
        "sft" counts every token in full.
    :param use_weighting: Multiplies each pair's loss by how likely the policy is to write both of
        its sequences (Zhou et al. 2024, "WPO", arXiv:2406.11827, equation 2, aligned): the
        exponentials of the means over tokens of log p - log(sum_v p_v^2), without a gradient. The
        policy must come with log_sum_sq_probs.
    :return: The loss, and the means of rewards (beta times log-ratio), of their margin and of how
        often it is > 0, and of the sequences' log-probabilities.
    """
    args.pairs(policy)
    names = (loss_type,) if isinstance(loss_type, str) else tuple(loss_type)
    weights = _weights(names, loss_weights)
    args.choice("f_divergence_type", f_divergence_type, tuple(F_DIVERGENCES))
    args.flags(use_weighting=use_weighting)
    beta = args.positive("beta", beta)
    tau = args.positive("discopop_tau", discopop_tau)
    smoothing = _label_smoothing(label_smoothing, names)
    alpha = args.finite("f_alpha_divergence_coef", f_alpha_divergence_coef)
    if f_divergence_type != "reverse_kl":
        for name in names:
            if name not in TAKES_F_DIVERGENCE:
                raise ValueError(
                    f"loss_type {name!r} takes no f_divergence_type but 'reverse_kl', got "
                    f"{f_divergence_type!r}; the loss types that do are "
                    f"{', '.join(TAKES_F_DIVERGENCE)}"
                )
    of_tokens = _token_weights(policy, ld_alpha)
    chosen, rejected = (policy.log_probs * of_tokens).sum(-1).chunk(2)
    ref_chosen, ref_rejected = _reference_sums(policy, reference, of_tokens, names).chunk(2)
    chosen_length, rejected_length = policy.lengths().clamp(min=1).chunk(2)
    p = Pairs(
        chosen, rejected, ref_chosen, ref_rejected,
        chosen_score=F_DIVERGENCES[f_divergence_type](chosen - ref_chosen, alpha),
        rejected_score=F_DIVERGENCES[f_divergence_type](rejected - ref_rejected, alpha),
        chosen_length=chosen_length, rejected_length=rejected_length,
        chosen_nll=args.chosen_nll(policy),
        beta=beta, label_smoothing=smoothing, discopop_tau=tau,
    )  # fmt: skip

    losses = sum(w * DPO[name](p) for name, w in zip(names, weights))
    if use_weighting:
        losses = losses * _pair_weights(policy, names)
    rewards = beta * p.chosen_ratio, beta * p.rejected_ratio
    return Loss(args.mean(losses), preference_metrics(chosen, rejected, *rewards))


def _weights(names: tuple[str, ...], weights: Sequence[float] | None) -> list[float]:
    if not names:
        raise ValueError("loss_type must name at least one loss, got none")
    for name in names:
        args.choice("loss_type", name, tuple(DPO))
    if weights is None:
        return [1.0] * len(names)
    if len(weights) != len(names):
        raise ValueError(
            f"loss_weights must have a weight for each loss type: got {len(weights)} weights and "
            f"{len(names)} loss types"
        )
    return [args.finite("each of loss_weights", w) for w in weights]


def _label_smoothing(value: float, names: tuple[str, ...]) -> float:
    value = args.within("label_smoothing", value, 0.0, 1.0)
    if "exo_pair" in names and not 0 < value < 1:
        raise ValueError(
            f"loss_type 'exo_pair' needs a label_smoothing > 0 and < 1, got {value}; its paper "
            f"has 1e-3"
        )
    if "robust" in names and value >= 0.5:
        raise ValueError(
            f"loss_type 'robust' needs a label_smoothing < 0.5, got {value}: where more than half "
            f"of the preferences are flipped, exchange chosen and rejected"
        )
    if value and not set(names) & set(TAKES_SMOOTHING):
        raise ValueError(
            f"loss_type {', '.join(map(repr, names))} takes no label_smoothing, got {value}; the "
            f"loss types that do are {', '.join(TAKES_SMOOTHING)} ('robust' is the sigmoid loss "
            f"for noisy labels)"
        )
    return value


def _token_weights(policy: TokenLogProbs, ld_alpha: float | None) -> Tensor:
    """(2 B, L): 1, ld_alpha for the tokens that the pair's shorter sequence has not; masked 0."""
    ones = policy.mask.to(policy.log_probs.dtype)
    if ld_alpha is None:
        return ones
    ld_alpha = args.within("ld_alpha", ld_alpha, 0.0, 1.0)
    shared = torch.minimum(*policy.mask.sum(-1).chunk(2)).repeat(2)
    beyond = policy.mask.cumsum(-1) > shared[:, None]
    return torch.where(beyond, ld_alpha * ones, ones)


def _reference_sums(
    policy: TokenLogProbs,
    reference: TokenLogProbs | Tensor | None,
    of_tokens: Tensor,
    names: tuple[str, ...],
) -> Tensor:
    """(2 B)"""
    if reference is None:
        if set(names) == {"sft"}:
            return policy.log_probs.new_zeros(policy.log_probs.shape[0])
        raise ValueError(
            f"dpo_loss with loss_type {', '.join(map(repr, names))} needs a reference, got None: "
            f"pass token_log_probs of the reference model, or use cpo_loss or orpo_loss, which "
            f"have none"
        )
    if isinstance(reference, Tensor) and reference.dim() == 1:
        return args.per_sequence("reference", reference, policy)
    return (args.per_token("reference", reference, policy) * of_tokens).sum(-1)


def _pair_weights(policy: TokenLogProbs, names: tuple[str, ...]) -> Tensor:
    """(B), without a gradient"""
    for name in names:
        if name in SORTS:
            raise ValueError(
                f"loss_type {name!r} sorts the batch, so that no loss belongs to a pair: it takes "
                f"no use_weighting"
            )
    if policy.log_sum_sq_probs is None:
        raise ValueError(
            "use_weighting needs the policy's log_sum_sq_probs, got None: call token_log_probs "
            "with return_log_sum_sq_probs=True"
        )
    likely = (policy.log_probs - policy.log_sum_sq_probs).detach() * policy.mask
    chosen, rejected = (likely.sum(-1) / policy.lengths().clamp(min=1)).exp().chunk(2)
    return chosen * rejected


def preference_metrics(
    chosen: Tensor, rejected: Tensor, chosen_reward: Tensor, rejected_reward: Tensor
) -> dict[str, Tensor]:
    """Means over pairs, each argument (B)."""
    margins = chosen_reward - rejected_reward
    values = {
        "rewards/chosen": chosen_reward,
        "rewards/rejected": rejected_reward,
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).to(margins.dtype),
        "logps/chosen": chosen,
        "logps/rejected": rejected,
    }
    return {name: args.mean(t.detach()) for name, t in values.items()}

"""Policy-gradient losses: PPO's clipped term, GRPO and what came after it."""

import torch
from torch import Tensor

from . import _arguments as args
from . import _policy_options as options
from ._arguments import Loss
from ._policy_table import POLICY, Tokens, clipped, vespo_weight
from .log_probs import TokenLogProbs

SAMPLING_CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def policy_loss(
    policy: TokenLogProbs,
    advantages: Tensor,
    *,
    old_log_probs: TokenLogProbs | Tensor | None = None,
    reference: TokenLogProbs | Tensor | None = None,
    sampling_log_probs: TokenLogProbs | Tensor | None = None,
    loss_type: str = "dapo",
    importance_sampling_level: str = "token",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    use_bias_correction_kl: bool = True,
    sampling_correction: str | None = "sequence_mask",
    sampling_clip_min: float | None = None,
    sampling_clip_max: float | None = 3.0,
    off_policy_mask_threshold: float | None = None,
    top_entropy_quantile: float = 1.0,
    entropy_coef: float = 0.0,
    num_items_in_batch: float | Tensor | None = None,
    max_completion_length: int | None = None,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> Loss:
    """Policy losses over sampled sequences; options and defaults are those of TRL's GRPOConfig.

    Of each token: the term of its loss type, times the sampler's correction, plus beta times the
    KL term; then the sum over tokens that count, divided as the loss type says (the table POLICY).
    A sequence without such a token adds nothing and still counts as a sequence; no token at all
    makes a loss of 0. What tensors hold where the policy's mask is False is never used. What is
    exponentiated is kept at 80 (700 in fp64) at most, without a gradient beyond: log-ratios, their
    means over sequences, and d of the KL term.

    :param policy: Of B sequences, shape (B, L).
    :param advantages: (B), one of each sequence, or (B, L), one of each token (as PPO has). Takes
        no gradient.
    :param old_log_probs: Of the policy that the ratio is taken against, (B, L). None: the policy
        itself, without a gradient, for batches that are used once.
    :param reference: Log-probabilities of the reference model, (B, L); needed where beta is not 0.
    :param sampling_log_probs: Of the inference engine that wrote the sequences, (B, L). NaN where
        it did not say: no correction there.
    :param loss_type: "grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo" or "vespo". PPO's
        term is "bnpo".
    :param importance_sampling_level: "token": a ratio of each token. "sequence": their geometric
        mean over the sequence (GSPO; meant for "grpo" and, as its paper has it, "luspo").
    :param epsilon: The ratio is clipped below at 1 - epsilon.
    :param epsilon_high: And above at 1 + epsilon_high; by default epsilon. For "cispo" the bound of
        the ratio itself, which has to be given.
    :param delta: Bounds the ratio where advantages are negative (two-sided clipping); more than
        1 + epsilon_high.
    :param beta: Weight of the KL term k = e^d - d - 1, d = log p_reference - log p (Shao et al.
        2024, "DeepSeekMath", arXiv:2402.03300, equation 4).
    :param use_bias_correction_kl: Multiplies k by the ratio, with its gradient, which makes the
        gradient that of the KL divergence (DeepSeek-AI 2025, "DeepSeek-V3.2", arXiv:2512.02556).
    :param sampling_correction: What to do with s = p_old / p_sampler where sampling_log_probs are
        given: each token's own ("token_...") or the product over its sequence ("sequence_..."),
        kept within [sampling_clip_min, sampling_clip_max] ("..._truncate") or set to 0 outside it
        ("..._mask"). "vespo" takes those of tokens. None: no correction. (Yao et al. 2025, "Your
        Efficient RL Framework Secretly Brings You Off-Policy RL Training".)
    :param off_policy_mask_threshold: Leaves out tokens whose advantage is negative in sequences
        whose mean of log p_sampler - log p exceeds this (p_old where there is no sampler). The same
        DeepSeek-V3.2, equation 9.
    :param top_entropy_quantile: Only this share of tokens, those of highest entropy, keep their
        term (not their KL). Wang et al. 2025, "Beyond the 80/20 Rule" (arXiv:2506.01939). The
        policy must come with entropy.
    :param entropy_coef: Times the mean entropy over tokens that count (those of the quantile) is
        subtracted; with num_items_in_batch the sum divided by that. The policy must come with
        entropy.
    :param num_items_in_batch: What "dapo", "cispo" and "vespo" divide by, at least 1: the number of
        tokens of all batches that make one step, divided by the number of processes whose gradients
        are averaged. None: the number of tokens here.
    :param max_completion_length: For "dr_grpo", which divides by B times this.
    :return: The loss, and the policy term alone, the means of KL and entropy, and how often the
        ratio was clipped; means are over tokens that count (over sequences for what is one number a
        sequence).
    """
    args.sequences(policy)
    args.choice("loss_type", loss_type, tuple(POLICY))
    args.choice("importance_sampling_level", importance_sampling_level, ("token", "sequence"))
    args.flags(use_bias_correction_kl=use_bias_correction_kl)
    options.unused(
        loss_type, importance_sampling_level, epsilon, epsilon_high, num_items_in_batch,
        max_completion_length,
    )  # fmt: skip
    beta, entropy_coef = args.finite("beta", beta), args.finite("entropy_coef", entropy_coef)
    mask, now = policy.mask, policy.log_probs
    advantages_of_sequences = isinstance(advantages, Tensor) and advantages.dim() == 1
    advantages = options.advantages(advantages, policy)
    if old_log_probs is None:
        old = now.detach()
    else:
        old = args.per_token("old_log_probs", old_log_probs, policy)
    sampling = None
    if sampling_log_probs is not None:
        sampling = args.per_token(
            "sampling_log_probs", sampling_log_probs, policy, all_known=False
        )
    low, high = options.clipping(loss_type, epsilon, epsilon_high, delta)
    log_ratio = now - old
    t = Tokens(
        log_probs=now,
        log_ratio=log_ratio,
        ratio=_ratio(log_ratio, mask, importance_sampling_level),
        advantages=advantages,
        mask=mask,
        sampling_ratio=_sampling_ratio(
            old, sampling, sampling_correction, sampling_clip_min, sampling_clip_max, loss_type
        ),
        num_items=options.num_items(num_items_in_batch, mask),
        max_length=options.max_length(max_completion_length, loss_type),
        epsilon=low,
        epsilon_high=high,
        delta=None if delta is None else args.positive("delta", delta),
        sapo_temperature_pos=args.positive("sapo_temperature_pos", sapo_temperature_pos),
        sapo_temperature_neg=args.positive("sapo_temperature_neg", sapo_temperature_neg),
        vespo_k_pos=args.not_negative("vespo_k_pos", vespo_k_pos),
        vespo_lambda_pos=args.not_negative("vespo_lambda_pos", vespo_lambda_pos),
        vespo_k_neg=args.not_negative("vespo_k_neg", vespo_k_neg),
        vespo_lambda_neg=args.not_negative("vespo_lambda_neg", vespo_lambda_neg),
    )
    kept = _high_entropy(policy, top_entropy_quantile)

    losses = POLICY[loss_type].of_token(t)
    if off_policy_mask_threshold is not None:
        most = args.positive("off_policy_mask_threshold", off_policy_mask_threshold)
        drift = _difference(old if sampling is None else sampling, now.detach())
        drift = drift.sum(-1, keepdim=True) / policy.lengths().clamp(min=1)[:, None]
        losses = torch.where((advantages < 0) & (drift > most), 0.0, losses)
    if kept is not mask:
        losses = torch.where(kept, losses, 0.0)
    if t.sampling_ratio is not None and loss_type != "vespo":
        losses = losses * t.sampling_ratio
    metrics = {}
    if beta != 0:
        kl = _kl(now, reference, policy, t.ratio if use_bias_correction_kl else None)
        losses = losses + beta * kl
        metrics["kl"] = _mean(kl, mask)
    loss = POLICY[loss_type].of_batch(torch.where(mask, losses, 0.0), t)
    metrics["policy_loss"] = loss.detach()
    if entropy_coef != 0:
        entropy = torch.where(kept, _entropy(policy, "entropy_coef"), 0.0)
        over = kept.sum().clamp(min=1) if num_items_in_batch is None else t.num_items
        loss = loss - entropy_coef * (entropy.sum() / over)
    of_sequences = {
        "ratio": importance_sampling_level == "sequence",
        "advantages": advantages_of_sequences,
        "sampling": sampling_correction is not None and sampling_correction.startswith("sequence"),
    }
    return Loss(loss, metrics | _metrics(t, policy, loss_type, of_sequences))


def _entropy(policy: TokenLogProbs, option: str) -> Tensor:
    if policy.entropy is None:
        raise ValueError(
            f"{option} needs the policy's entropy, got None: call token_log_probs with "
            f"return_entropy=True"
        )
    return policy.entropy


# Terms ------------------------------------------------------------------------------------------


def _ratio(log_ratio: Tensor, mask: Tensor, level: str) -> Tensor:
    """(B, L), or (B, 1) of sequences"""
    if level == "token":
        return args.bounded(log_ratio).exp()
    lengths = mask.sum(-1, keepdim=True).clamp(min=1)
    return args.bounded(log_ratio.sum(-1, keepdim=True) / lengths).exp()


def _difference(sampling: Tensor, of: Tensor) -> Tensor:
    """sampling - of, 0 where the sampler said nothing"""
    return torch.where(sampling.isnan(), 0.0, sampling - of)


def _sampling_ratio(
    old: Tensor,
    sampling: Tensor | None,
    correction: str | None,
    least: float | None,
    most: float | None,
    loss_type: str,
) -> Tensor | None:
    """(B, L), or (B, 1) of sequences"""
    if correction is not None:
        args.choice("sampling_correction", correction, SAMPLING_CORRECTIONS)
    least = None if least is None else args.not_negative("sampling_clip_min", least)
    most = None if most is None else args.positive("sampling_clip_max", most)
    if least is not None and most is not None and least > most:
        raise ValueError(
            f"sampling_clip_min must not exceed sampling_clip_max, got {least} and {most}"
        )
    if sampling is None or correction is None:
        return None
    if loss_type == "vespo" and correction.startswith("sequence"):
        raise ValueError(
            f"loss_type 'vespo' makes the sequence's weight of corrected tokens: it takes "
            f"sampling_correction 'token_truncate', 'token_mask' or None, got {correction!r}"
        )
    log_ratio = -_difference(sampling, old)
    if correction.startswith("sequence"):
        log_ratio = log_ratio.sum(-1, keepdim=True)
    ratio = args.bounded(log_ratio).exp()
    if least is None and most is None:
        return ratio
    if correction.endswith("truncate"):
        return ratio.clamp(min=least, max=most)
    outside = ratio.clamp(min=least, max=most) != ratio
    return ratio.masked_fill(outside, 0.0)


def _kl(
    now: Tensor,
    reference: TokenLogProbs | Tensor | None,
    policy: TokenLogProbs,
    ratio: Tensor | None,
) -> Tensor:
    if reference is None:
        raise ValueError(
            "beta is not 0, and the KL term needs a reference, got None: pass token_log_probs of "
            "the reference model, or beta=0"
        )
    difference = args.per_token("reference", reference, policy) - now
    within = args.bounded(difference)
    kl = torch.expm1(within) - within
    if ratio is None:
        return kl
    # Where the bound took k's gradient it takes the ratio's, of which k's is the other half.
    return kl * torch.where(difference > within, ratio.detach(), ratio)


def _high_entropy(policy: TokenLogProbs, share: float) -> Tensor:
    """The mask, or what is left of it."""
    share = args.within("top_entropy_quantile", share, 0.0, 1.0)
    if share == 1 or policy.mask.numel() == 0:
        return policy.mask
    entropy = _entropy(policy, "top_entropy_quantile").detach()
    return policy.mask & (entropy >= _quantile(entropy, policy.mask, 1 - share))


def _quantile(t: Tensor, mask: Tensor, q: float) -> Tensor:
    """As torch.nanquantile of the entries where mask is True, without its limit of 2^24 entries and
    without reading their number back from the device."""
    ascending = t.masked_fill(~mask, torch.inf).flatten().sort().values
    last = mask.sum().clamp(min=1) - 1
    at = q * last.double()
    low = at.floor().long()
    values = ascending[torch.stack([low, torch.minimum(low + 1, last)])]
    return torch.lerp(values[0], values[1], (at - low).to(t.dtype))


# Metrics ----------------------------------------------------------------------------------------


def _mean(x: Tensor, mask: Tensor, of_sequences: bool = False) -> Tensor:
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    return args.mean(x) if of_sequences else args.masked_mean(x, mask)


def _metrics(
    t: Tokens, policy: TokenLogProbs, loss_type: str, of_sequences: dict[str, bool]
) -> dict[str, Tensor]:
    """of_sequences: whether these are one number a sequence."""
    metrics = {}
    clips = of_sequences["ratio"] and of_sequences["advantages"]
    if policy.entropy is not None:
        metrics["entropy"] = _mean(policy.entropy, t.mask)
    if t.sampling_ratio is not None:
        metrics["sampling/importance_sampling_ratio/mean"] = _mean(
            t.sampling_ratio, t.mask, of_sequences["sampling"]
        )
    if POLICY[loss_type].of_token is clipped:
        low = (t.ratio < 1 - t.epsilon) & (t.advantages < 0)
        high = (t.ratio > 1 + t.epsilon_high) & (t.advantages > 0)
        for name, x in (("low", low), ("high", high), ("region", low | high)):
            metrics[f"clip_ratio/{name}_mean"] = _mean(x, t.mask, clips)
    elif loss_type == "cispo":
        high = (t.ratio > t.epsilon_high) & (t.advantages > 0)
        metrics["cispo_clip_ratio"] = _mean(high, t.mask, clips)
    elif loss_type == "vespo":
        metrics["vespo/phi_seq_mean"] = _mean(
            vespo_weight(t), t.mask, of_sequences["advantages"]
        )
    return metrics

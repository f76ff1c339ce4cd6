"""Policy-gradient losses: PPO's clipped term, GRPO and what came after it."""

from torch import Tensor

from . import _policy_terms as terms
from ._arguments import Loss
from .log_probs import TokenLogProbs


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
    given = terms.given(
        policy, advantages, old_log_probs=old_log_probs, reference=reference,
        sampling_log_probs=sampling_log_probs, loss_type=loss_type,
        importance_sampling_level=importance_sampling_level, epsilon=epsilon,
        epsilon_high=epsilon_high, delta=delta, beta=beta,
        use_bias_correction_kl=use_bias_correction_kl, sampling_correction=sampling_correction,
        sampling_clip_min=sampling_clip_min, sampling_clip_max=sampling_clip_max,
        off_policy_mask_threshold=off_policy_mask_threshold,
        top_entropy_quantile=top_entropy_quantile, entropy_coef=entropy_coef,
        num_items_in_batch=num_items_in_batch, max_completion_length=max_completion_length,
        sapo_temperature_pos=sapo_temperature_pos, sapo_temperature_neg=sapo_temperature_neg,
        vespo_k_pos=vespo_k_pos, vespo_lambda_pos=vespo_lambda_pos, vespo_k_neg=vespo_k_neg,
        vespo_lambda_neg=vespo_lambda_neg,
    )  # fmt: skip
    return terms.loss(policy, given)

"""What policy_loss sums: the term of each token, from its log-probability under the policy and from
what is known before that is."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _arguments as args
from ._arguments import Loss
from ._policy_options import Options
from ._policy_table import POLICY, Tokens, clipped, vespo_weight
from .log_probs import TokenLogProbs


@dataclasses.dataclass(frozen=True)
class Given:
    """What policy_loss is given beside the policy, checked: of tokens (B, L), or of what a sequence
    shares (B, 1). Of `rows`: (R) each."""

    options: Options
    advantages_of_sequences: bool
    mask: Tensor
    kept: Tensor  # those of the mask that keep their term and their entropy
    advantages: Tensor
    old: Tensor | None  # None: the policy itself, without a gradient
    reference: Tensor | None
    sampling: Tensor | None
    sampling_ratio: Tensor | None  # None too where it depends on the policy
    divisor: Tensor | float
    entropy_divisor: Tensor | float

    def flat(self) -> "Given":
        """With numbers of its own for every token, (B * L), of which `rows` chooses."""
        return self._with_tensors(lambda t: t.expand(self.mask.shape).reshape(-1))

    def rows(self, index: Tensor, is_row: Tensor) -> "Given":
        """Of some tokens, (R), of which those count where `is_row` is True."""
        chosen = self._with_tensors(lambda t: t[index])
        return dataclasses.replace(
            chosen, mask=chosen.mask & is_row, kept=chosen.kept & is_row
        )

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> "Given":
        """The same with changed tensors, but for those of one number."""
        tensors = {k: t for k, t in vars(self).items() if isinstance(t, Tensor) and t.dim() > 0}
        return dataclasses.replace(self, **{k: change(t) for k, t in tensors.items()})


def given(
    policy: TokenLogProbs,
    advantages: Tensor,
    old_log_probs: TokenLogProbs | Tensor | None,
    reference: TokenLogProbs | Tensor | None,
    sampling_log_probs: TokenLogProbs | Tensor | None,
    **options: Any,
) -> Given:
    """Of the policy it reads the mask, and where top_entropy_quantile is less than 1 entropies."""
    args.sequences(policy)
    o = Options(**options)
    advantages_of_sequences = isinstance(advantages, Tensor) and advantages.dim() == 1
    if advantages_of_sequences:
        advantages = args.per_sequence("advantages", advantages, policy)[:, None]
    else:
        advantages = args.per_token("advantages", advantages, policy)
    old = None if old_log_probs is None else args.per_token("old_log_probs", old_log_probs, policy)
    sampling = None
    if sampling_log_probs is not None:
        sampling = args.per_token(
            "sampling_log_probs", sampling_log_probs, policy, all_known=False
        )
        if o.loss_type == "vespo" and o.corrects_sequences:
            raise ValueError(
                f"loss_type 'vespo' makes the sequence's weight of corrected tokens: it takes "
                f"sampling_correction 'token_truncate', 'token_mask' or None, got "
                f"{o.sampling_correction!r}"
            )
    if o.beta == 0:
        reference = None
    elif reference is None:
        raise ValueError(
            "beta is not 0, and the KL term needs a reference, got None: pass token_log_probs of "
            "the reference model, or beta=0"
        )
    else:
        reference = args.per_token("reference", reference, policy)
    kept = _high_entropy(policy, o.top_entropy_quantile)
    items = o.num_items_in_batch
    divisor = POLICY[o.loss_type].divisor(policy.mask, o)
    return Given(
        options=o,
        advantages_of_sequences=advantages_of_sequences,
        mask=policy.mask,
        kept=kept,
        advantages=advantages.to(policy.log_probs.dtype),
        old=old,
        reference=reference,
        sampling=sampling,
        sampling_ratio=None if old is None else _sampling_ratio(old, sampling, o),
        divisor=divisor,
        entropy_divisor=kept.sum().clamp(min=1) if items is None else divisor,
    )


class Sums(NamedTuple):
    loss: Tensor
    policy_loss: Tensor  # the loss without the entropy
    kl: Tensor | None  # of each token
    tokens: Tokens


def sums(log_probs: Tensor, entropy: Tensor | None, g: Given) -> Sums:
    """Over tokens (B, L); or over some of them, (R), which gives what these add to the loss. The
    derivatives by their log-probabilities are the same, where keeps_tokens_apart says so."""
    o, mask = g.options, g.mask
    old = log_probs.detach() if g.old is None else g.old
    sampling_ratio = _sampling_ratio(old, g.sampling, o) if g.old is None else g.sampling_ratio
    log_ratio = log_probs - old
    t = Tokens(
        options=o,
        log_probs=log_probs,
        log_ratio=log_ratio,
        ratio=_ratio(log_ratio, mask, o),
        advantages=g.advantages,
        mask=mask,
        sampling_ratio=sampling_ratio,
    )
    losses = POLICY[o.loss_type].of_token(t)
    if o.off_policy_mask_threshold is not None:
        drift = _difference(old if g.sampling is None else g.sampling, log_probs.detach())
        drift = drift.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
        is_off = (g.advantages < 0) & (drift > o.off_policy_mask_threshold)
        losses = torch.where(is_off, 0.0, losses)
    losses = torch.where(g.kept, losses, 0.0)
    if sampling_ratio is not None and o.loss_type != "vespo":
        losses = losses * sampling_ratio
    kl = None
    if g.reference is not None:
        kl = _kl(log_probs, g.reference, t.ratio if o.use_bias_correction_kl else None)
        losses = losses + o.beta * kl
    policy_loss = loss = (torch.where(mask, losses, 0.0) / g.divisor).sum()
    if o.entropy_coef != 0:
        kept = torch.where(g.kept, _known(entropy, "entropy_coef"), 0.0)
        loss = loss - o.entropy_coef * (kept / g.entropy_divisor).sum()
    return Sums(loss, policy_loss, kl, t)


def loss(policy: TokenLogProbs, g: Given) -> Loss:
    s = sums(policy.log_probs, policy.entropy, g)
    metrics = {} if s.kl is None else {"kl": _mean(s.kl, g.mask)}
    metrics["policy_loss"] = s.policy_loss.detach()
    return Loss(s.loss, metrics | _metrics(s.tokens, policy, g.advantages_of_sequences))


def keeps_tokens_apart(options: dict[str, Any]) -> bool:
    """Whether policy_loss with these options, all that it has, couples no token's term to the
    log-probability of another one under the policy."""
    of_sequences = (
        options["importance_sampling_level"] != "token"
        or options["loss_type"] == "vespo"
        or options["off_policy_mask_threshold"] is not None
        or options["top_entropy_quantile"] != 1.0
    )
    # The correction is p_old / p_sampler, and p_old the policy's own where it is not given.
    corrects = options["sampling_log_probs"] is not None and options["old_log_probs"] is None
    of_tokens = options["sampling_correction"] in (None, "token_truncate", "token_mask")
    return not of_sequences and (of_tokens or not corrects)


def _known(entropy: Tensor | None, option: str) -> Tensor:
    if entropy is None:
        raise ValueError(
            f"{option} needs the policy's entropy, got None: call token_log_probs with "
            f"return_entropy=True"
        )
    return entropy


# Terms ------------------------------------------------------------------------------------------


def _ratio(log_ratio: Tensor, mask: Tensor, o: Options) -> Tensor:
    """(B, L), or (B, 1) of sequences"""
    if not o.has_ratios_of_sequences:
        return args.bounded(log_ratio).exp()
    lengths = mask.sum(-1, keepdim=True).clamp(min=1)
    return args.bounded(log_ratio.sum(-1, keepdim=True) / lengths).exp()


def _difference(sampling: Tensor, of: Tensor) -> Tensor:
    """sampling - of, 0 where the sampler said nothing"""
    return torch.where(sampling.isnan(), 0.0, sampling - of)


def _sampling_ratio(old: Tensor, sampling: Tensor | None, o: Options) -> Tensor | None:
    """(B, L), or (B, 1) of sequences"""
    if sampling is None or o.sampling_correction is None:
        return None
    log_ratio = -_difference(sampling, old)
    if o.corrects_sequences:
        log_ratio = log_ratio.sum(-1, keepdim=True)
    ratio = args.bounded(log_ratio).exp()
    least, most = o.sampling_clip_min, o.sampling_clip_max
    if least is None and most is None:
        return ratio
    within = ratio.clamp(min=least, max=most)
    if o.sampling_correction.endswith("truncate"):
        return within
    return ratio.masked_fill(within != ratio, 0.0)


def _kl(now: Tensor, reference: Tensor, ratio: Tensor | None) -> Tensor:
    difference = reference - now
    within = args.bounded(difference)
    kl = torch.expm1(within) - within
    if ratio is None:
        return kl
    # Where the bound took k's gradient it takes the ratio's, of which k's is the other half.
    return kl * torch.where(difference > within, ratio.detach(), ratio)


def _high_entropy(policy: TokenLogProbs, share: float) -> Tensor:
    """The mask, or what is left of it."""
    if share == 1 or policy.mask.numel() == 0:
        return policy.mask
    entropy = _known(policy.entropy, "top_entropy_quantile").detach()
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
    t: Tokens, policy: TokenLogProbs, advantages_of_sequences: bool
) -> dict[str, Tensor]:
    metrics = {}
    o = t.options
    clips = o.has_ratios_of_sequences and advantages_of_sequences
    if policy.entropy is not None:
        metrics["entropy"] = _mean(policy.entropy, t.mask)
    if t.sampling_ratio is not None:
        metrics["sampling/importance_sampling_ratio/mean"] = _mean(
            t.sampling_ratio, t.mask, o.corrects_sequences
        )
    if POLICY[o.loss_type].of_token is clipped:
        low = (t.ratio < 1 - o.epsilon) & (t.advantages < 0)
        high = (t.ratio > 1 + o.epsilon_high) & (t.advantages > 0)
        for name, x in (("low", low), ("high", high), ("region", low | high)):
            metrics[f"clip_ratio/{name}_mean"] = _mean(x, t.mask, clips)
    elif o.loss_type == "cispo":
        high = (t.ratio > o.epsilon_high) & (t.advantages > 0)
        metrics["cispo_clip_ratio"] = _mean(high, t.mask, clips)
    elif o.loss_type == "vespo":
        metrics["vespo/phi_seq_mean"] = _mean(vespo_weight(t), t.mask, advantages_of_sequences)
    return metrics

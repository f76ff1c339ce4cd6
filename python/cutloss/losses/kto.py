"""KTO: sequences that are liked or not, without pairs."""

import math

import torch
from torch import Tensor

from . import _arguments as args
from ._arguments import Loss
from .log_probs import TokenLogProbs

KTO = ("kto", "apo_zero_unpaired")


def kto_loss(
    policy: TokenLogProbs,
    reference: TokenLogProbs | Tensor,
    desirable: Tensor,
    kl: Tensor | float | None = None,
    *,
    loss_type: str = "kto",
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Loss:
    """w (1 - sigma(beta (u - kl))) for a liked sequence, w (1 - sigma(beta (kl - u))) for another.

    u is the sequence's log-probability under the policy less that under the reference; the mean
    over all B sequences (0 for none). Ethayarajh et al. 2024, "KTO" (arXiv:2402.01306), equation
    7, as in TRL 1.16's KTOTrainer. A sequence without a token that counts has u = 0 and stays in
    the mean. (TRL leaves NaN losses out of its mean; here they stay and show.)

    :param policy: Of B sequences, shape (B, L).
    :param reference: The same tokens under the reference model: TokenLogProbs or a tensor in the
        shape of the policy's, or a tensor (B) of sums. Takes no gradient.
    :param desirable: Which sequences are liked, bool, (B).
    :param kl: How far the policy is from the reference, from kto_kl; below 0 it counts as 0. Needed
        for "kto".
    :param loss_type: "kto", or "apo_zero_unpaired", which has no kl (D'Oosterlinck et al. 2024,
        "Anchored Preference Optimization", arXiv:2408.06266, equation 7, without pairs).
    :param desirable_weight: w of liked sequences.
    :param undesirable_weight: w of the others.
    :return: The loss, and kl, and the means over liked sequences ("chosen") and the others
        ("rejected") of rewards (beta u) and log-probabilities; 0 where there are none.
    """
    args.sequences(policy)
    args.choice("loss_type", loss_type, KTO)
    beta = args.positive("beta", beta)
    liked = args.not_negative("desirable_weight", desirable_weight)
    disliked = args.not_negative("undesirable_weight", undesirable_weight)
    kl = _kl(kl, loss_type, policy)
    desirable = args.sequence_mask("desirable", desirable, policy)
    u = policy.sum() - args.sums("reference", reference, policy)
    towards = torch.where(desirable, u - kl, kl - u)
    weight = torch.where(desirable, torch.full_like(u, liked), disliked)
    loss = args.mean(weight * torch.sigmoid(-beta * towards))
    metrics = {"kl": kl}
    for name, which in (("chosen", desirable), ("rejected", ~desirable)):
        metrics[f"rewards/{name}"] = beta * args.masked_mean(u.detach(), which)
        metrics[f"logps/{name}"] = args.masked_mean(policy.sum().detach(), which)
    return Loss(loss, metrics)


def kto_kl(policy: TokenLogProbs, reference: TokenLogProbs | Tensor) -> Tensor:
    """The estimate of KL(policy || reference) that kto_loss takes: a scalar without a gradient.

    The mean over B sequences of the difference of their log-probabilities (0 for none), for
    sequences that do not belong to their prompts: each prompt with the completion of another
    example. It may be below 0: average it over processes before kto_loss sets
    that to 0.

    :param policy: Of B such sequences, shape (B, L), made under torch.no_grad().
    :param reference: As in kto_loss.
    """
    args.sequences(policy)
    return args.mean(policy.sum().detach() - args.sums("reference", reference, policy))


def _kl(kl: Tensor | float | None, loss_type: str, policy: TokenLogProbs) -> Tensor:
    if loss_type == "apo_zero_unpaired":
        if kl is not None:
            raise ValueError(
                f"loss_type 'apo_zero_unpaired' has no KL term: pass kl=None, got {kl}"
            )
        return policy.log_probs.new_zeros(())
    if kl is None:
        raise ValueError(
            "loss_type 'kto' needs kl, got None: pass kto_kl(policy, reference) of sequences that "
            "do not belong to their prompts, or 0.0"
        )
    if isinstance(kl, Tensor):
        if kl.numel() != 1:
            raise ValueError(f"kl must be one number, got a tensor of shape {tuple(kl.shape)}")
        return kl.detach().to(policy.log_probs).reshape(()).clamp(min=0)
    if not math.isfinite(args.number("kl", kl)):
        raise ValueError(f"kl must be finite, got {kl}")
    return policy.log_probs.new_full((), max(float(kl), 0.0))

"""What every loss here is made of: the log-probability of each token."""

import dataclasses
import enum

import torch
from torch import Tensor

from .. import sharded
from .._core import checks
from .._implementations import LinearCrossEntropyImpl
from ..functional import linear_cross_entropy
from ..sharded import VocabParallelOptions


@dataclasses.dataclass(eq=False)
class TokenLogProbs:
    """Log-probabilities of targets, and which of them count. May be made of those of others.

    Every tensor is 0 where the mask is False, whatever it was there before, and at least fp32: sums
    over a sequence in bf16 would have two or three digits.

    :param log_probs: log p(target), shape (..., L), at most 0.
    :param mask: Which tokens count, bool, in the shape of log_probs.
    :param entropy: Of each token's distribution, in the shape of log_probs, where it was asked for.
    :param log_sum_sq_probs: log of the sum of the distribution's squared probabilities, without a
        gradient, where it was asked for.
    """

    log_probs: Tensor
    mask: Tensor
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.mask, Tensor):
            raise TypeError(
                f"the mask must be a bool tensor in the shape of log_probs, got "
                f"{type(self.mask).__name__}: pass torch.ones_like(log_probs, dtype=torch.bool) "
                f"where every token counts"
            )
        checks.layout("mask", self.mask)
        for name in ("log_probs", "entropy", "log_sum_sq_probs"):
            t = getattr(self, name)
            if t is None:
                continue
            checks.layout(name, t)
            if self.mask.dtype != torch.bool or self.mask.shape != t.shape:
                raise ValueError(
                    f"the mask must be bool in the shape of {name}: got {self.mask.dtype} of shape "
                    f"{checks.shape(self.mask)}, and {name} {checks.shape(t)}"
                )
            if not t.is_floating_point():
                raise TypeError(
                    f"{name} must be floating point, got {t.dtype}: pass {name}.float()"
                )
            t = t.to(torch.promote_types(t.dtype, torch.float32))
            setattr(self, name, torch.where(self.mask, t, 0.0))

    def detach(self) -> "TokenLogProbs":
        """The same without gradients, as an old policy or a reference is."""
        rest = (None if t is None else t.detach() for t in (self.entropy, self.log_sum_sq_probs))
        return TokenLogProbs(self.log_probs.detach(), self.mask, *rest)

    def lengths(self) -> Tensor:
        """How many tokens of each sequence count, shape (...), in the dtype of log_probs."""
        return self.mask.sum(-1).to(self.log_probs.dtype)

    def sum(self) -> Tensor:
        """Of each sequence, shape (...): 0 for one without a token that counts."""
        return self.log_probs.sum(-1)

    def mean(self) -> Tensor:
        """Over the tokens of each sequence that count, shape (...): 0 where there is none."""
        return self.sum() / self.lengths().clamp(min=1)


def token_log_probs(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    shift: bool | int = 0,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    max_workspace: int | None = None,
    num_valid: int | None = None,
    impl: str | enum.Enum = LinearCrossEntropyImpl.CCE,
    schedule: str = "auto",
    return_entropy: bool = False,
    return_log_sum_sq_probs: bool = False,
    vocab_parallel_options: VocabParallelOptions | None = None,
) -> TokenLogProbs:
    """log p(target) of each token, without storing the logits; differentiable in e, c and bias.

    The arguments are those of :func:`cutloss.linear_cross_entropy`, of whose loss this is the
    negative. Call it under ``torch.no_grad()`` for a reference model.

    :param targets: Shape (..., L). Prompt and padding are ignore_index: they are masked out.
    :param return_entropy: Also the entropy of each token's distribution, with a gradient.
    :param return_log_sum_sq_probs: Also log(sum_v p_v^2) of each token, for dpo_loss's
        use_weighting. Costs another forward. No gradient. It is a difference of two log-sum-exps,
        whose digits a common offset of the logits takes away.
    :return: fp32 (fp64 for fp64 inputs), of shape (..., L), L less shift.
    """
    checks.flags(
        return_entropy=return_entropy, return_log_sum_sq_probs=return_log_sum_sq_probs
    )
    # Once, for all that follows: a DTensor's gradient goes through what is made of it here.
    e, c, bias, targets, vocab_parallel_options = sharded.local(
        e, c, bias, targets, vocab_parallel_options
    )
    options = dict(
        ignore_index=ignore_index,
        shift=shift,
        softcap=softcap,
        logit_scale=logit_scale,
        max_workspace=max_workspace,
        num_valid=num_valid,
        impl=impl,
        schedule=schedule,
        reduction="none",
        vocab_parallel_options=vocab_parallel_options,
    )
    results = linear_cross_entropy(
        e, c, targets, bias, temperature=temperature, return_entropy=return_entropy,
        return_lse=return_log_sum_sq_probs, **options,
    )  # fmt: skip
    results = list(results) if isinstance(results, tuple) else [results]
    nll = results.pop(0)
    squares = None
    if return_log_sum_sq_probs:
        # sum_v p_v^2 = sum_v e^(2 z_v) / (sum_v e^(z_v))^2, and half the temperature makes 2 z.
        lse = results.pop(0).detach()
        with torch.no_grad():
            _, lse_of_doubled = linear_cross_entropy(
                e, c, targets, bias, temperature=temperature * 0.5, return_lse=True, **options
            )
        squares = lse_of_doubled - 2 * lse
    scored = targets[..., int(shift) :] if shift else targets
    entropy = results.pop(0) if return_entropy else None
    return TokenLogProbs(-nll, scored != ignore_index, entropy, squares)

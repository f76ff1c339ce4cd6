"""Checks and small sums that the losses share."""

import dataclasses
import math

import torch
from torch import Tensor

from .._core.checks import choice, constant, flags, layout, may_look, number, shape  # noqa: F401
from .log_probs import TokenLogProbs


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss to call backward on, and what to log.

    :param loss: A scalar, fp32 (fp64 where the log-probabilities are, or the student is); with
        reduction="none", where there is one, of each token.
    :param metrics: Scalars without gradients, on the device of the loss: reading one waits for it.
    """

    loss: Tensor
    metrics: dict[str, Tensor]

    def backward(self, *args, **options) -> None:
        """That of the loss."""
        self.loss.backward(*args, **options)


def positive(name: str, value: float) -> float:
    value = number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be finite and > 0, got {value}")
    return value


def not_negative(name: str, value: float) -> float:
    value = number(name, value)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and >= 0, got {value}")
    return value


def finite(name: str, value: float) -> float:
    value = number(name, value)
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return value


def floating(name: str, t: Tensor) -> None:
    if not t.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {t.dtype}")


def within(name: str, value: float, least: float, most: float) -> float:
    value = number(name, value)
    if not least <= value <= most:
        raise ValueError(f"{name} must be in [{least}, {most}], got {value}")
    return value


def sequences(policy: TokenLogProbs) -> None:
    """Log-probabilities of a batch of sequences."""
    if not isinstance(policy, TokenLogProbs):
        raise TypeError(
            f"policy must be what cutloss.losses.token_log_probs returns, a TokenLogProbs, got "
            f"{type(policy).__name__}"
        )
    if policy.log_probs.dim() != 2:
        raise ValueError(
            f"these losses take a batch of sequences, log_probs of shape (B, L): got "
            f"{shape(policy.log_probs)}; give targets as (B, L) and e as (B, L, D)"
        )


def pairs(policy: TokenLogProbs) -> None:
    """Chosen sequences and as many rejected ones."""
    sequences(policy)
    if policy.log_probs.shape[0] % 2:
        raise ValueError(
            f"the batch must be B chosen sequences followed by their B rejected ones: got "
            f"{policy.log_probs.shape[0]} sequences, an odd number"
        )


def _here(name: str, t: Tensor, policy: TokenLogProbs) -> Tensor:
    constant(name, t)
    if t.device != policy.log_probs.device:
        raise ValueError(
            f"all tensors must be on one device: the policy's log-probabilities are on "
            f"{policy.log_probs.device}, {name} on {t.device}"
        )
    return t.to(torch.promote_types(t.dtype, policy.log_probs.dtype))  # neither loses digits


def per_token(
    name: str, t: "TokenLogProbs | Tensor", policy: TokenLogProbs, *, all_known: bool = True
) -> Tensor:
    """(B, L), 0 where the policy's mask is False, whatever stands there.

    A token that counts for the policy and not for t (TokenLogProbs) is NaN. With all_known that is
    an error where one may look.
    """
    mask = None
    if isinstance(t, TokenLogProbs):
        t, mask = t.log_probs, t.mask
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor or TokenLogProbs, got {type(t).__name__}")
    layout(name, t)
    if t.shape != policy.log_probs.shape:
        raise ValueError(
            f"{name} must have the shape of the policy's log-probabilities (B, L): got {name} "
            f"{shape(t)} and log-probabilities {shape(policy.log_probs)}"
        )
    t = _here(name, t, policy)
    if mask is not None:
        missing = policy.mask & ~mask
        if all_known and may_look(t.device) and missing.any():
            raise ValueError(
                f"{name} must know every token that counts for the policy: {missing.sum().item()} "
                f"of the policy's {policy.mask.sum().item()} are masked in {name}; make both of "
                f"the same targets"
            )
        t = t.masked_fill(missing, torch.nan)
    return torch.where(policy.mask, t, 0.0)


def per_sequence(name: str, t: Tensor, policy: TokenLogProbs) -> Tensor:
    """(B)"""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    layout(name, t)
    if t.shape != policy.log_probs.shape[:1]:
        raise ValueError(
            f"{name} must be (B): got {name} {shape(t)} and log-probabilities "
            f"{shape(policy.log_probs)}"
        )
    return _here(name, t, policy)


def sums(name: str, t: "TokenLogProbs | Tensor", policy: TokenLogProbs) -> Tensor:
    """(B), from log-probabilities of tokens, or as it is."""
    if isinstance(t, Tensor) and t.dim() == 1:
        return per_sequence(name, t, policy)
    return per_token(name, t, policy).sum(-1)


def _mask(name: str, t: Tensor, expected: torch.Size, policy: TokenLogProbs) -> Tensor:
    if not isinstance(t, Tensor) or t.dtype != torch.bool:
        given = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{name} must be a bool tensor, got {given}: pass {name}.bool()")
    layout(name, t)
    if t.shape != expected:
        raise ValueError(
            f"{name} must be of shape {tuple(expected)}, as the policy's log-probabilities "
            f"{shape(policy.log_probs)} have it: got {shape(t)}"
        )
    return t


def token_mask(name: str, t: Tensor, policy: TokenLogProbs) -> Tensor:
    return _mask(name, t, policy.log_probs.shape, policy)


def sequence_mask(name: str, t: Tensor, policy: TokenLogProbs) -> Tensor:
    return _mask(name, t, policy.log_probs.shape[:1], policy)


def largest_exponent(dtype: torch.dtype) -> float:
    return 700.0 if dtype == torch.float64 else 80.0


def bounded(exponent: Tensor) -> Tensor:
    """At most 80 (700 in fp64): the exponential is finite. No gradient where it was more."""
    return exponent.clamp(max=largest_exponent(exponent.dtype))


def chosen_nll(policy: TokenLogProbs) -> Tensor:
    """The mean over all tokens of the first half of the sequences; 0 where there is none."""
    B = policy.log_probs.shape[0] // 2
    return -masked_mean(policy.log_probs[:B], policy.mask[:B])


def mean(t: Tensor) -> Tensor:
    """0 for nothing."""
    return t.sum() / max(t.numel(), 1)


def masked_mean(t: Tensor, mask: Tensor) -> Tensor:
    """Over the entries where mask is True; 0 where there is none."""
    return torch.where(mask, t, 0.0).sum() / mask.sum().clamp(min=1)

"""Options of policy_loss: what each loss type takes."""

from torch import Tensor

from .._core import checks
from . import _arguments as args
from ._policy_table import POLICY, clipped, sapo, sum_over_items, vespo
from .log_probs import TokenLogProbs


def unused(
    loss_type: str,
    level: str,
    epsilon: float,
    epsilon_high: float | None,
    num_items_in_batch: float | Tensor | None,
    max_completion_length: int | None,
) -> None:
    """Refuses what the loss type would not look at."""
    loss = POLICY[loss_type]
    if loss.of_token in (sapo, vespo) and (epsilon != 0.2 or epsilon_high is not None):
        raise ValueError(
            f"loss_type {loss_type!r} clips no ratio and takes neither epsilon nor epsilon_high, "
            f"got {epsilon} and {epsilon_high}: leave them out"
        )
    if loss.of_token is vespo and level != "token":
        raise ValueError(
            f"loss_type 'vespo' weighs sequences by the product of their tokens' ratios and takes "
            f"no importance_sampling_level but 'token', got {level!r}"
        )
    if loss.of_batch is not sum_over_items and num_items_in_batch is not None:
        taking = ", ".join(n for n, known in POLICY.items() if known.of_batch is sum_over_items)
        given = "a tensor" if isinstance(num_items_in_batch, Tensor) else num_items_in_batch
        raise ValueError(
            f"loss_type {loss_type!r} does not divide by num_items_in_batch, got {given}; the loss "
            f"types that do are {taking}: take one of them, or divide the loss by the number of "
            f"batches of a step"
        )
    if loss_type != "dr_grpo" and max_completion_length is not None:
        raise ValueError(
            f"only loss_type 'dr_grpo' divides by max_completion_length, got "
            f"{max_completion_length} with {loss_type!r}: leave it out"
        )


def advantages(advantages: Tensor, policy: TokenLogProbs) -> Tensor:
    """(B, 1) or (B, L)"""
    if isinstance(advantages, Tensor) and advantages.dim() == 1:
        advantages = args.per_sequence("advantages", advantages, policy)[:, None]
    else:
        advantages = args.per_token("advantages", advantages, policy)
    return advantages.to(policy.log_probs.dtype)


def clipping(
    loss_type: str, epsilon: float, epsilon_high: float | None, delta: float | None
) -> tuple[float, float]:
    if epsilon_high is None and loss_type == "cispo":
        raise ValueError(
            "loss_type 'cispo' needs epsilon_high, the most that the ratio itself may be, got "
            "None: 5.0 is usual"
        )
    if delta is not None and POLICY[loss_type].of_token is not clipped:
        taking = ", ".join(name for name, loss in POLICY.items() if loss.of_token is clipped)
        raise ValueError(
            f"loss_type {loss_type!r} clips no ratio on two sides and takes no delta, got {delta}; "
            f"the loss types that do are {taking}"
        )
    low = args.not_negative("epsilon", epsilon)
    return low, low if epsilon_high is None else args.not_negative("epsilon_high", epsilon_high)


def num_items(value: float | Tensor | None, mask: Tensor) -> Tensor | float:
    if value is None:
        return mask.sum().clamp(min=1)
    items = checks.num_items(value)
    return items.to(mask.device) if isinstance(items, Tensor) else items


def max_length(value: int | None, loss_type: str) -> float:
    if value is not None:
        return args.positive("max_completion_length", value)
    if loss_type == "dr_grpo":
        raise ValueError(
            "loss_type 'dr_grpo' divides by max_completion_length, got None: pass the most tokens "
            "that a completion may have"
        )
    return 1.0

"""Options of policy_loss: what each loss type takes."""

import dataclasses

from torch import Tensor

from .._core import checks
from . import _arguments as args
from ._policy_table import POLICY, by_items, clipped, sapo, vespo

SAMPLING_CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@dataclasses.dataclass
class Options:
    """Those that are no tensors of tokens, by the names of policy_loss; checked."""

    loss_type: str
    importance_sampling_level: str
    epsilon: float
    epsilon_high: float | None
    delta: float | None
    beta: float
    use_bias_correction_kl: bool
    sampling_correction: str | None
    sampling_clip_min: float | None
    sampling_clip_max: float | None
    off_policy_mask_threshold: float | None
    top_entropy_quantile: float
    entropy_coef: float
    num_items_in_batch: float | Tensor | None
    max_completion_length: float | None
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    vespo_k_pos: float
    vespo_lambda_pos: float
    vespo_k_neg: float
    vespo_lambda_neg: float

    def __post_init__(self) -> None:
        args.choice("loss_type", self.loss_type, tuple(POLICY))
        levels = ("token", "sequence")
        args.choice("importance_sampling_level", self.importance_sampling_level, levels)
        args.flags(use_bias_correction_kl=self.use_bias_correction_kl)
        if self.sampling_correction is not None:
            args.choice("sampling_correction", self.sampling_correction, SAMPLING_CORRECTIONS)
        _refuse_unused(self)
        _refuse_missing(self)
        for name, check in _CHECKS.items():
            value = getattr(self, name)
            if value is not None or name not in _MAY_BE_NONE:
                setattr(self, name, check(name, value))
        if self.epsilon_high is None:
            self.epsilon_high = self.epsilon
        if self.num_items_in_batch is not None:
            self.num_items_in_batch = checks.num_items(self.num_items_in_batch)
        self.top_entropy_quantile = args.within(
            "top_entropy_quantile", self.top_entropy_quantile, 0.0, 1.0
        )
        least, most = self.sampling_clip_min, self.sampling_clip_max
        if least is not None and most is not None and least > most:
            raise ValueError(
                f"sampling_clip_min must not exceed sampling_clip_max, got {least} and {most}"
            )

    @property
    def has_ratios_of_sequences(self) -> bool:
        return self.importance_sampling_level == "sequence"

    @property
    def corrects_sequences(self) -> bool:
        """Whether the sampler's correction is one of sequences."""
        return self.sampling_correction in ("sequence_truncate", "sequence_mask")


_CHECKS = dict.fromkeys(("beta", "entropy_coef"), args.finite)
_CHECKS |= dict.fromkeys(("epsilon", "epsilon_high", "sampling_clip_min"), args.not_negative)
_CHECKS |= dict.fromkeys(("vespo_k_pos", "vespo_lambda_pos"), args.not_negative)
_CHECKS |= dict.fromkeys(("vespo_k_neg", "vespo_lambda_neg"), args.not_negative)
_CHECKS |= dict.fromkeys(("sapo_temperature_pos", "sapo_temperature_neg"), args.positive)
_CHECKS |= dict.fromkeys(("delta", "sampling_clip_max", "max_completion_length"), args.positive)
_CHECKS |= dict.fromkeys(("off_policy_mask_threshold",), args.positive)
_MAY_BE_NONE = (
    "epsilon_high", "delta", "sampling_clip_min", "sampling_clip_max",
    "off_policy_mask_threshold", "max_completion_length",
)  # fmt: skip


def _refuse_unused(o: Options) -> None:
    """What the loss type would not look at."""
    loss = POLICY[o.loss_type]
    if loss.of_token in (sapo, vespo) and (o.epsilon != 0.2 or o.epsilon_high is not None):
        raise ValueError(
            f"loss_type {o.loss_type!r} clips no ratio and takes neither epsilon nor epsilon_high, "
            f"got {o.epsilon} and {o.epsilon_high}: leave them out"
        )
    if loss.of_token is vespo and o.importance_sampling_level != "token":
        raise ValueError(
            f"loss_type 'vespo' weighs sequences by the product of their tokens' ratios and takes "
            f"no importance_sampling_level but 'token', got {o.importance_sampling_level!r}"
        )
    items = o.num_items_in_batch
    if loss.divisor is not by_items and items is not None:
        taking = ", ".join(n for n, known in POLICY.items() if known.divisor is by_items)
        raise ValueError(
            f"loss_type {o.loss_type!r} does not divide by num_items_in_batch, got "
            f"{'a tensor' if isinstance(items, Tensor) else items}; the loss types that do are "
            f"{taking}: take one of them, or divide the loss by the number of batches of a step"
        )
    if o.loss_type != "dr_grpo" and o.max_completion_length is not None:
        raise ValueError(
            f"only loss_type 'dr_grpo' divides by max_completion_length, got "
            f"{o.max_completion_length} with {o.loss_type!r}: leave it out"
        )
    if o.delta is not None and loss.of_token is not clipped:
        taking = ", ".join(name for name, known in POLICY.items() if known.of_token is clipped)
        raise ValueError(
            f"loss_type {o.loss_type!r} clips no ratio on two sides and takes no delta, got "
            f"{o.delta}; the loss types that do are {taking}"
        )


def _refuse_missing(o: Options) -> None:
    if o.epsilon_high is None and o.loss_type == "cispo":
        raise ValueError(
            "loss_type 'cispo' needs epsilon_high, the most that the ratio itself may be, got "
            "None: 5.0 is usual"
        )
    if o.max_completion_length is None and o.loss_type == "dr_grpo":
        raise ValueError(
            "loss_type 'dr_grpo' divides by max_completion_length, got None: pass the most tokens "
            "that a completion may have"
        )

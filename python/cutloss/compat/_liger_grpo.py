"""liger-kernel's GRPO, and what came after it."""

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._core import checks
from ..losses import linear_loss
from ._liger_sequences import check

_IGNORED = -100
_BY_ITEMS = ("dapo", "cispo", "vespo")  # divided by num_items_in_batch


class LigerFusedLinearGRPOLoss(nn.Module):
    """``liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss``, by
    :func:`cutloss.losses.policy_loss`.

    What theirs would not look at raises: a reference without a beta, a delta or other epsilons for
    a loss type that does not clip. So does "luspo", unless ratios are of sequences and beta is 0:
    there theirs adds up padding too.

    :param beta: Weight of the KL term.
    :param compiled: Not needed: nothing is compiled.
    :param use_ref_model: False needs beta=0: the KL term would be of the policy with itself.
    :param chunk_size: Not needed.
    :param epsilon_low: cutloss's ``epsilon``.
    :param epsilon_high: As cutloss's; for "cispo" the bound of the ratio itself.
    :param loss_type: "grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo" or "vespo".
    :param max_completion_length: For "dr_grpo"; the others do not divide by it.
    :param importance_sampling_level: "token" or "sequence".
    :param sapo_temperature_pos: As cutloss's.
    :param sapo_temperature_neg: As cutloss's.
    :param temperature: Divides the logits, the reference's too.
    :param delta: As cutloss's.
    :param use_bias_correction_kl: As cutloss's. **False by default**, as theirs.
    :param vespo_k_pos: As cutloss's, as the other three.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ):
        super().__init__()
        checks.flags(compiled=compiled, use_ref_model=use_ref_model)
        checks.temperature(temperature)
        if beta != 0 and not use_ref_model:
            raise ValueError(
                f"beta is {beta} and use_ref_model False, so that the KL term would be of the "
                f"policy with itself, which is 0: pass beta=0.0, or use_ref_model=True and a "
                f"reference"
            )
        if loss_type == "luspo" and (importance_sampling_level != "sequence" or beta != 0):
            raise NotImplementedError(
                f"loss_type 'luspo' of liger-kernel adds up padding with the tokens unless "
                f"importance_sampling_level is 'sequence' and beta 0, got "
                f"{importance_sampling_level!r} and {beta}: pass these, or call "
                f"cutloss.losses.linear_loss('policy', ...), which leaves padding out"
            )
        self.beta = beta
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.chunk_size = chunk_size
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high
        self.loss_type = loss_type
        self.max_completion_length = max_completion_length
        self.importance_sampling_level = importance_sampling_level
        self.sapo_temperature_pos = sapo_temperature_pos
        self.sapo_temperature_neg = sapo_temperature_neg
        self.temperature = temperature
        self.delta = delta
        self.use_bias_correction_kl = use_bias_correction_kl
        self.vespo_k_pos = vespo_k_pos
        self.vespo_lambda_pos = vespo_lambda_pos
        self.vespo_k_neg = vespo_k_neg
        self.vespo_lambda_neg = vespo_lambda_neg

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(B, L, D), (V, D), (B, L), (B, L) of zeros and ones, (B), (V), (B, L), (B, L), the
        reference model's (B, L, D'), (V, D'), (V), the sampler's ratio (B), (B, 1) or (B, L), which
        needs old_per_token_logps, and the number of tokens of a step on all processes. The loss,
        and, where beta is not 0, the mean KL term, and the share of tokens that were clipped."""
        check("(_input, lin_weight, ...)", _input, lin_weight, selected_token_ids)
        mask, weighs = _mask(attention_mask, selected_token_ids)
        # An id that is the mark of ignored tokens is none of the vocabulary: an error, not ignored.
        ids = selected_token_ids.masked_fill(selected_token_ids == _IGNORED, lin_weight.shape[0])
        options = self._options(mask, num_items_in_batch)
        # Where nobody may look at the mask, what is no mask makes the loss NaN.
        of_tokens = _of_tokens("advantages", advantages, mask)
        options["advantages"] = of_tokens.masked_fill(weighs, torch.nan)
        if vllm_is_ratio is not None:
            self._correct(options, vllm_is_ratio, old_per_token_logps, mask)
        result = linear_loss(
            "policy", _input, lin_weight, torch.where(mask, ids, _IGNORED), bias,
            reference=self._reference(ref_per_token_logps, (ref_input, ref_weight, ref_bias)),
            temperature=self.temperature, old_log_probs=old_per_token_logps, **options,
        )  # fmt: skip
        metrics = result.metrics
        clipped = metrics.get("clip_ratio/region_mean", metrics.get("cispo_clip_ratio"))
        if clipped is None:
            clipped = result.loss.new_zeros(())
        return result.loss, (clipped,) if self.beta == 0 else (metrics["kl"], clipped)

    def _options(self, mask: Tensor, num_items_in_batch: float | Tensor | None) -> dict[str, Any]:
        """Those of policy_loss."""
        # sapo and vespo refuse what they do not look at, so what is the default is not passed on.
        same = self.epsilon_high == self.epsilon_low and self.loss_type != "cispo"
        items = num_items_in_batch
        if self.loss_type in _BY_ITEMS:
            items = _items_here(mask, num_items_in_batch)
        return dict(
            beta=self.beta,
            epsilon=self.epsilon_low,
            epsilon_high=None if same else self.epsilon_high,
            loss_type=self.loss_type,
            max_completion_length=(
                self.max_completion_length if self.loss_type == "dr_grpo" else None
            ),
            importance_sampling_level=self.importance_sampling_level,
            sapo_temperature_pos=self.sapo_temperature_pos,
            sapo_temperature_neg=self.sapo_temperature_neg,
            delta=self.delta,
            use_bias_correction_kl=self.use_bias_correction_kl,
            vespo_k_pos=self.vespo_k_pos,
            vespo_lambda_pos=self.vespo_lambda_pos,
            vespo_k_neg=self.vespo_k_neg,
            vespo_lambda_neg=self.vespo_lambda_neg,
            num_items_in_batch=items,
        )

    def _reference(
        self, log_probs: Tensor | None, ref: tuple[Tensor | None, Tensor | None, Tensor | None]
    ) -> Tensor | tuple[Tensor, ...] | None:
        if self.beta == 0:
            if any(t is not None for t in (log_probs, *ref)):
                raise ValueError(
                    "beta is 0, so the reference would not be used: leave it out, or pass a beta"
                )
            return None
        if log_probs is None:
            if ref[0] is None or ref[1] is None:
                raise ValueError(
                    f"beta is {self.beta}, and the KL term needs a reference: pass "
                    f"ref_per_token_logps, or ref_input and ref_weight, or beta=0.0"
                )
            return tuple(t for t in ref if t is not None)
        if ref[0] is not None:
            warnings.warn(
                "both ref_per_token_logps and ref_input are given: ref_per_token_logps are used",
                stacklevel=3,
            )
        return log_probs

    def _correct(
        self, options: dict[str, Any], ratio: Tensor, old: Tensor | None, mask: Tensor
    ) -> None:
        """policy_loss makes the ratio p_old / p_sampler itself: here are the log-probabilities of
        the sampler of which it makes this one."""
        if old is None:
            raise ValueError(
                "vllm_is_ratio needs old_per_token_logps, got None: pass the log-probabilities "
                "from which the ratio was made"
            )
        if self.loss_type == "vespo" and ratio.shape != mask.shape:
            raise NotImplementedError(
                f"loss_type 'vespo' takes the ratio of each token, (B, L), and multiplies them: "
                f"got vllm_is_ratio of shape {checks.shape(ratio)}"
            )
        if self.loss_type == "luspo" and ratio.dim() == 2 and ratio.shape[1] != 1:
            raise NotImplementedError(
                f"loss_type 'luspo' of liger-kernel adds up padding with the tokens where their "
                f"ratios differ, got vllm_is_ratio of shape {checks.shape(ratio)}: pass one of "
                f"each sequence, (B) or (B, 1)"
            )
        ratio = _of_tokens("vllm_is_ratio", ratio, mask)
        # What is no ratio makes the loss NaN: as a log-probability a NaN would mean no correction.
        usable = torch.where(mask, ratio >= 0, True)
        options["advantages"] = options["advantages"].masked_fill(~usable, torch.nan)
        options["sampling_log_probs"] = old.detach() - ratio.detach().log()
        options["sampling_correction"] = "token_truncate"
        options["sampling_clip_max"] = None


def _mask(attention_mask: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens count, and at which the mask is neither 0 nor 1."""
    checks.tensors(attention_mask=attention_mask)
    if attention_mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask must be (B, L) as selected_token_ids are: got attention_mask "
            f"{checks.shape(attention_mask)} and selected_token_ids {checks.shape(ids)}"
        )
    mask = attention_mask != 0
    weighs = mask & (attention_mask != 1)
    if checks.may_look(mask.device) and weighs.any():
        raise ValueError(
            f"attention_mask must be zeros and ones, got {attention_mask[weighs][0].item()}: for "
            f"weights of tokens pass cutloss.losses.linear_loss('policy', ...) advantages (B, L)"
        )
    return mask, weighs


def _of_tokens(name: str, t: Tensor, mask: Tensor) -> Tensor:
    """(B), (B, 1) or (B, L) as (B, L)"""
    checks.tensors(**{name: t})
    B, L = mask.shape
    if t.shape not in ((B,), (B, 1), (B, L)):
        raise ValueError(
            f"{name} must be (B), (B, 1) or (B, L): got {name} {checks.shape(t)}, and B, L are "
            f"{B}, {L}"
        )
    return (t[:, None] if t.dim() == 1 else t).expand(B, L)


def _items_here(mask: Tensor, num_items_in_batch: float | Tensor | None) -> Tensor | float:
    """Tokens of a step on all processes, for each process."""
    several = dist.is_available() and dist.is_initialized()
    processes = dist.get_world_size() if several else 1
    if num_items_in_batch is not None:
        return checks.num_items(num_items_in_batch) / processes
    items = mask.sum()
    if several:
        dist.all_reduce(items)
    return items / processes

"""liger-kernel's fused linear JSD, of both kinds that it has: their names, order and defaults."""

import torch
from torch import Tensor, nn

from .._core import checks
from ..functional import linear_cross_entropy
from ..losses import linear_distillation


class LigerFusedLinearJSD(nn.Module):
    """``liger_kernel.transformers.LigerFusedLinearJSD``: the generalised JSD alone.

    :param jsd_beta: cutloss's ``beta``: 0 is the forward KL, 1 the reverse KL.
    :param ignore_index: As cutloss's.
    :param temperature: As cutloss's: the loss is not multiplied by its square.
    """

    def __init__(
        self, jsd_beta: float = 0.5, ignore_index: int = -100, temperature: float = 1.0
    ):
        super().__init__()
        checks.temperature(temperature)
        checks.ignore_index(ignore_index)
        self.jsd_beta = jsd_beta
        self.ignore_index = ignore_index
        self.temperature = temperature

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None = None,
    ) -> Tensor:
        """(N, D), (V, D), (N, D'), (V, D') and labels (N), of which only ignore_index matters. The
        mean over tokens that count, 0 where there is none."""
        return linear_distillation(
            student_input, student_weight, teacher_input, teacher_weight, shift_labels,
            divergence="jsd", beta=self.jsd_beta, temperature=self.temperature,
            ignore_index=self.ignore_index,
        ).loss  # fmt: skip


class LigerFusedLinearJSDLoss(nn.Module):
    """``liger_kernel.chunked_loss.LigerFusedLinearJSDLoss``: JSD and cross-entropy. **By default
    half of each**, as theirs; the cross-entropy at temperature 1.

    Other than with theirs, a teacher with more classes than the student is an error: theirs gives
    the student a logit of 0 for those.

    :param weight_hard_loss: cutloss's ``hard_weight``.
    :param weight_soft_loss: cutloss's ``soft_weight``.
    :param beta: As cutloss's.
    :param ignore_index: As cutloss's.
    :param temperature: As cutloss's.
    :param compiled: Not needed: nothing is compiled.
    :param chunk_size: Not needed: for memory there is cutloss's ``max_workspace``.
    :param return_soft_hard_loss: Return (loss, JSD, cross-entropy), the latter two without a
        gradient.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ):
        super().__init__()
        checks.temperature(temperature)
        checks.ignore_index(ignore_index)
        checks.flags(compiled=compiled, return_soft_hard_loss=return_soft_hard_loss)
        self.weight_hard_loss = weight_hard_loss
        self.weight_soft_loss = weight_soft_loss
        self.beta = beta
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.compiled = compiled
        self.chunk_size = chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """(N, D), (V, D), (N, D'), (V, D'), labels (N), (V) and (V). Means over tokens that count,
        0 where there is none."""
        result = linear_distillation(
            student_input, student_weight, teacher_input, teacher_weight, true_labels,
            student_bias, teacher_bias, divergence="jsd", beta=self.beta,
            temperature=self.temperature, ignore_index=self.ignore_index,
            soft_weight=self.weight_soft_loss, hard_weight=self.weight_hard_loss,
        )  # fmt: skip
        if not self.return_soft_hard_loss:
            return result.loss
        hard = result.metrics.get("cross_entropy")
        if hard is None:
            with torch.no_grad():
                hard = linear_cross_entropy(
                    student_input, student_weight, true_labels, student_bias,
                    ignore_index=self.ignore_index,
                )  # fmt: skip
            hard = torch.where((true_labels != self.ignore_index).any(), hard, 0.0)
        return result.loss, result.metrics["divergence"], hard

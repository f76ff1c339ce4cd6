"""liger-kernel's KTO."""

import torch
from torch import Tensor, nn

from .._core import checks
from ..losses import _arguments as args
from ..losses import kto_loss, token_log_probs
from ._liger_sequences import averaged, check, logit_sums, reference_sums


class LigerFusedLinearKTOLoss(nn.Module):
    """``liger_kernel.chunked_loss.LigerFusedLinearKTOLoss``, by :func:`cutloss.losses.kto_loss`.

    Its numbers are theirs with a chunk_size of 1, the default: with a larger one theirs multiplies
    each sequence of a chunk by all labels of the chunk.

    :param ignore_index: Targets of prompt and padding.
    :param beta: As cutloss's; more than 0.
    :param compiled: Not needed: nothing is compiled.
    :param use_ref_model: **False by default**, as theirs: the reference's log-probabilities are 0.
    :param average_log_prob: Means over a sequence's tokens in place of sums.
    :param chunk_size: Not needed.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ):
        super().__init__()
        checks.ignore_index(ignore_index)
        checks.flags(
            compiled=compiled, use_ref_model=use_ref_model, average_log_prob=average_log_prob
        )
        self.ignore_index = ignore_index
        self.beta = args.positive("beta", beta)
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        preference_labels: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | float | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(B, L, D), (V, D), (B, L), (V), which sequences are liked (B, bool), the reference
        model's (B, L, D'), (V, D'), (V), and one number, used as it is (below 0 too); None is 0.
        The loss, and sums over liked and over the other sequences of log-probabilities, logits and
        rewards, without gradients."""
        check("(_input, lin_weight, target)", _input, lin_weight, target)
        tokens = token_log_probs(_input, lin_weight, target, bias, ignore_index=self.ignore_index)
        policy = averaged(tokens, self.average_log_prob)
        if preference_labels is None:
            raise ValueError(
                "preference_labels is None: pass which sequences are liked, a bool tensor (B)"
            )
        liked = args.sequence_mask("preference_labels", preference_labels, policy)
        reference = reference_sums(
            self.use_ref_model, (ref_input, ref_weight, ref_bias), target, self.ignore_index,
            self.average_log_prob, policy,
        )  # fmt: skip
        # kto_loss takes no kl below 0; a difference from the reference takes any.
        loss = kto_loss(policy, reference + _number(kl), liked, 0.0, beta=self.beta).loss
        sums = policy.sum().detach()
        of_all = sums, logit_sums(_input, lin_weight, bias), self.beta * (sums - reference)
        beside = [torch.where(group, t, 0.0).sum() for t in of_all for group in (liked, ~liked)]
        return loss, tuple(beside)


def _number(kl: Tensor | float | None) -> Tensor | float:
    if kl is None:
        return 0.0
    if not isinstance(kl, Tensor):
        return args.finite("kl", kl)
    if kl.numel() != 1:
        raise ValueError(
            f"kl must be one number, got a tensor of shape {checks.shape(kl)}, each entry of which "
            f"liger-kernel adds to each sequence's loss: pass kl.mean()"
        )
    return kl.detach().reshape(())

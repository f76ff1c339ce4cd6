"""liger-kernel's cross-entropy of logits that exist: the function and the module."""

from torch import Tensor, nn

from .._core import checks
from ..logits import cross_entropy
from ._liger_outputs import CrossEntropyOutput, output, parts, zero_for_nothing


def liger_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: None = None,
    ignore_index: int = -100,
    reduce: None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    return_z_loss: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
) -> Tensor | CrossEntropyOutput:
    """The loss of logits, or a :class:`CrossEntropyOutput`, by :func:`cutloss.cross_entropy`.

    The logits are left as they are, where theirs writes the gradient over them: for that there is
    ``cutloss.cross_entropy(..., consume_logits=True)``.

    :param input: Logits, (..., V).
    :param target: (...).
    :param weight: Class weights, (V).
    :param size_average: None: theirs has no use for it, so anything else raises.
    :param ignore_index: As cutloss's.
    :param reduce: As size_average.
    :param reduction: "mean" (over no token: 0), "sum" or "none".
    :param label_smoothing: As cutloss's.
    :param lse_square_scale: cutloss's ``z_loss``: is part of the loss.
    :param softcap: As cutloss's.
    :param return_z_loss: Also return that part, without a gradient, reduced as the loss. The logits
        are then read twice.
    :param return_token_accuracy: Also return the share of tokens that count whose target has the
        largest logit; with "none" 1 or 0 for each token.
    :param return_predicted_tokens: Also return the largest logit's index of each token, -1 where
        it is ignored.
    """
    for name, given in dict(size_average=size_average, reduce=reduce).items():
        if given is not None:
            raise ValueError(
                f"{name} has no effect in liger-kernel and is None here, got {given!r}: write "
                f"reduction='mean', 'sum' or 'none'"
            )
    checks.flags(
        return_z_loss=return_z_loss,
        return_token_accuracy=return_token_accuracy,
        return_predicted_tokens=return_predicted_tokens,
    )
    wants_predictions = return_token_accuracy or return_predicted_tokens
    result = cross_entropy(
        input, target, ignore_index=ignore_index, softcap=softcap, reduction=reduction,
        return_lse=return_z_loss, label_smoothing=label_smoothing, weight=weight,
        return_predictions=wants_predictions, z_loss=lse_square_scale,
    )  # fmt: skip
    loss, lse, predictions = parts(result, return_z_loss, wants_predictions)
    valid = target != ignore_index
    if reduction == "mean":
        loss = zero_for_nothing(loss, valid)
    if not (return_z_loss or wants_predictions):
        return loss
    penalty = None if lse is None else lse_square_scale * lse.square()
    return output(
        loss, target, valid, reduction, penalty, predictions, return_token_accuracy,
        return_predicted_tokens,
    )  # fmt: skip


class LigerCrossEntropyLoss(nn.Module):
    """The same as a module; called with (logits, target)."""

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ):
        super().__init__()
        checks.choice("reduction", reduction, checks.REDUCTIONS)
        checks.label_smoothing(label_smoothing)
        checks.softcap(softcap)
        checks.z_loss(lse_square_scale)
        checks.ignore_index(ignore_index)
        self.register_buffer("weight", weight, persistent=False)
        self.ignore_index = ignore_index
        self.lse_square_scale = lse_square_scale
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.softcap = softcap
        self.return_z_loss = return_z_loss
        self.return_token_accuracy = return_token_accuracy
        self.return_predicted_tokens = return_predicted_tokens

    def forward(self, _input: Tensor, target: Tensor) -> Tensor | CrossEntropyOutput:
        return liger_cross_entropy(
            _input, target, self.weight, None, self.ignore_index, None, self.reduction,
            self.label_smoothing, self.lse_square_scale, self.softcap, self.return_z_loss,
            self.return_token_accuracy, self.return_predicted_tokens,
        )  # fmt: skip

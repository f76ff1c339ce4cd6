"""``torch.nn.functional.linear_cross_entropy``'s call, by torch 2.13, with cutloss doing the work.

::

    from cutloss.torch_compat import linear_cross_entropy     # or LinearCrossEntropyLoss
    loss = linear_cross_entropy(hidden, lm_head.weight, labels, label_smoothing=0.1)

Works with every torch that cutloss does, those included that have no such function of their own.
"""

import dataclasses
import math

import torch
from torch import Tensor, nn

from ._core import checks
from .functional import linear_cross_entropy as _loss

try:
    from torch.nn import LinearCrossEntropyOptions
except ImportError:  # before torch 2.13

    @dataclasses.dataclass(frozen=True)
    class LinearCrossEntropyOptions:
        """The fields that torch 2.13's has. None changes a result here."""

        allow_retain_graph: bool = False
        batch_chunk_size: int | None = None
        chunking_method: str | None = "auto"
        acc_policy: str = "auto"
        acc_dtype: torch.dtype | None = None


__all__ = ["LinearCrossEntropyLoss", "LinearCrossEntropyOptions", "linear_cross_entropy"]

_PROBABILITIES = (
    "target holds class probabilities, {found}, which is not supported: as many numbers as the "
    "logits that cutloss does not store; use torch.nn.functional.linear_cross_entropy for them, or "
    "give class indices, with label_smoothing if that is what the probabilities are"
)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: LinearCrossEntropyOptions | None = None,
) -> Tensor:
    """``cross_entropy(linear(input, linear_weight, linear_bias), target, ...)`` without the logits.

    In messages that come from the loss itself ``e`` is input, ``c`` linear_weight and ``bias``
    linear_bias. Other than with torch's function:

    - the loss is fp32 (fp64 for fp64 inputs), where torch's has the dtype of the input, in bf16
      two or three digits; everything accumulates in fp32;
    - memory is bounded whether options are given or not, and gradients may be asked for twice
      (``retain_graph=True``), also in a compiled model; second derivatives are not there;
    - class probabilities as targets, and a class weight that wants a gradient, are refused.

    :param input: (D), or (N, D).
    :param linear_weight: (V, D); or (V, d_1, ..., d_K, D) for a loss of K dimensions, one call and
        one classifier for each position.
    :param target: Class indices: (), (N), or (N, d_1, ..., d_K).
    :param linear_bias: (V), or (V, d_1, ..., d_K).
    :param weight: Class weights, (V).
    :param reduction: "mean", "sum" or "none".
    :param ignore_index: None is -100.
    :param label_smoothing: In [0, 1].
    :param options: torch's LinearCrossEntropyOptions. Not needed, since nothing is stored anyway:
        chunk sizes, acc_policy and allow_retain_graph are accepted and change nothing, and an
        acc_dtype up to fp32 (for fp64 inputs: fp64) is what is used already. A wider one raises.
    """
    _tensors(input, linear_weight, target, linear_bias)
    _shapes(input, linear_weight, target, linear_bias)
    _options(options, input.dtype)
    if target.dtype == torch.uint8:  # which torch takes, too
        target = target.long()
    ignore_index = -100 if ignore_index is None else ignore_index
    shared = dict(weight=weight, ignore_index=ignore_index, label_smoothing=label_smoothing)
    if linear_weight.dim() == 2:
        return _loss(input, linear_weight, target, linear_bias, reduction=reduction, **shared)

    checks.choice("reduction", reduction, checks.REDUCTIONS)
    positions = linear_weight.flatten(1, -2).unbind(1)
    # Unbound, and not one tensor used again and again: its gradients are then summed in one step.
    inputs = input.expand(len(positions), *input.shape).unbind(0)
    targets = target.flatten(1)
    biases = [None] * len(positions)
    if linear_bias is not None:
        biases = linear_bias.flatten(1).unbind(1)
    each = "none" if reduction == "none" else "sum"
    losses = torch.stack(
        [
            _loss(e, c, targets[:, k], bias, reduction=each, **shared)
            for k, (e, c, bias) in enumerate(zip(inputs, positions, biases))
        ],
        dim=-1,
    )
    if reduction == "none":
        return losses.reshape(target.shape)
    total = losses.sum()
    return total if reduction == "sum" else _mean(total, target, weight, ignore_index)


def _mean(total: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """`total` over the sum of the weights; NaN where that is nothing, with gradients of zero."""
    counts = (target != ignore_index).to(total.dtype)
    if weight is not None:
        inside = target.clamp(0, weight.numel() - 1).long()
        counts = counts * weight.to(total.dtype)[inside]
    over = counts.sum()
    nothing = over == 0
    return torch.where(nothing, math.nan, total / torch.where(nothing, 1.0, over))


def _tensors(input: Tensor, linear_weight: Tensor, target: Tensor, bias: Tensor | None) -> None:
    named = dict(input=input, linear_weight=linear_weight, target=target, linear_bias=bias)
    for name, t in named.items():
        if not isinstance(t, Tensor) and not (t is None and name == "linear_bias"):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
        if t is not None:
            checks.layout(name, t)


def _shapes(input: Tensor, linear_weight: Tensor, target: Tensor, bias: Tensor | None) -> None:
    shape = checks.shape
    if input.dim() not in (1, 2):
        raise ValueError(
            f"input must be (D) or (N, D), got {shape(input)}: flatten what lies before D, in "
            f"input and target"
        )
    if linear_weight.dim() < 2 or linear_weight.shape[-1] != input.shape[-1]:
        raise ValueError(
            f"linear_weight must be (V, D) or (V, d_1, ..., d_K, D) with the D of input: got "
            f"linear_weight {shape(linear_weight)} and input {shape(input)}"
        )
    positions = linear_weight.shape[1:-1]
    if len(positions) > 0 and input.dim() == 1:
        raise ValueError(
            f"a linear_weight of K dimensions, {shape(linear_weight)}, takes an input (N, D), got "
            f"{shape(input)}: use input[None] and target[None]"
        )
    if 0 in positions:
        raise ValueError(f"linear_weight has no positions: {shape(linear_weight)}")
    if bias is not None and bias.shape != linear_weight.shape[:-1]:
        raise ValueError(
            f"linear_bias must be {tuple(linear_weight.shape[:-1])}, linear_weight's shape less "
            f"its last: got {shape(bias)}"
        )
    batch = input.shape[:-1]
    if target.shape == (*batch, *linear_weight.shape[:-1]):
        found = f"of the logits' shape {shape(target)}"
        raise NotImplementedError(_PROBABILITIES.format(found=found))
    if target.is_floating_point():
        raise NotImplementedError(_PROBABILITIES.format(found=f"{target.dtype}"))
    if target.shape != (*batch, *positions):
        raise ValueError(
            f"target must be {(*batch, *positions)}, by input {shape(input)} and "
            f"linear_weight {shape(linear_weight)}: got {shape(target)}"
        )


def _options(options: LinearCrossEntropyOptions | None, dtype: torch.dtype) -> None:
    if options is None:
        return
    if not isinstance(options, LinearCrossEntropyOptions):
        raise TypeError(
            f"options must be a LinearCrossEntropyOptions or None, got {type(options).__name__}"
        )
    if options.acc_dtype == torch.float64 and dtype != torch.float64:
        raise NotImplementedError(
            f"options.acc_dtype is torch.float64 and input {dtype}: cutloss accumulates in float32 "
            f"unless its inputs are float64; leave acc_dtype out, or convert the inputs"
        )


class LinearCrossEntropyLoss(nn.Module):
    """``torch.nn.LinearCrossEntropyLoss``, by torch 2.13: same arguments, same state_dict.

    Not to be taken for :class:`cutloss.LinearCrossEntropyLoss`, whose out_features is V and which
    has all the options of cutloss.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: LinearCrossEntropyOptions | None = None,
    ):
        super().__init__()
        if weight is not None and weight.shape != (num_classes,):
            raise ValueError(
                f"weight must be (num_classes) = ({num_classes},), got {checks.shape(weight)}"
            )
        checks.choice("reduction", reduction, checks.REDUCTIONS)
        checks.label_smoothing(label_smoothing)
        self.num_classes = num_classes
        self.out_features = tuple(out_features)
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.options = options
        self.register_buffer("weight", weight)
        rows = math.prod(self.out_features, start=num_classes)
        self.linear = nn.Linear(in_features, rows, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        shape, bias = (self.num_classes, *self.out_features), self.linear.bias
        return linear_cross_entropy(
            input,
            self.linear.weight.reshape(*shape, self.linear.in_features),
            target,
            linear_bias=None if bias is None else bias.reshape(shape),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
        )

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, out_features={self.out_features}, "
            f"reduction={self.reduction!r}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing}"
        )

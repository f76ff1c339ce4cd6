"""``LinearCrossEntropy``: the function as a module that remembers its options."""

import enum
import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ._core import checks
from ._core.options import LossOptions
from ._implementations import LinearCrossEntropyImpl, is_plain
from .functional import linear_cross_entropy
from .sharded import VocabParallelOptions


def _class_weights(values: Sequence[float]) -> Tensor:
    for i, value in enumerate(values):
        checks.number(f"weight[{i}]", value)
    return torch.tensor(values, dtype=torch.float32)


class LinearCrossEntropy(nn.Module):
    """Cross-entropy of the logits ``e @ c.T`` without storing the logits.

    The options are those of :func:`cutloss.linear_cross_entropy`; the classifier ``c`` and its
    bias are given with each call, and stay where they are::

        lce = LinearCrossEntropy(shift=1)
        loss = lce(hidden, lm_head.weight, labels, bias=lm_head.bias)
    """

    def __init__(
        self,
        ignore_index: int = -100,
        softcap: float | None = None,
        reduction: str = "mean",
        shift: bool | int = 0,
        filter_eps: float | str | None = "auto",
        accum_e_fp32: bool = False,
        accum_c_fp32: bool = False,
        filter_e_grad: bool = True,
        filter_c_grad: bool = True,
        impl: str | enum.Enum = LinearCrossEntropyImpl.CCE,
        return_lse: bool = False,
        *,
        logit_scale: float = 1.0,
        temperature: float = 1.0,
        label_smoothing: float = 0.0,
        weight: Tensor | Sequence[float] | None = None,
        return_entropy: bool = False,
        return_predictions: bool = False,
        z_loss: float = 0.0,
        max_workspace: int | None = None,
        schedule: str = "auto",
    ):
        super().__init__()
        if isinstance(temperature, Tensor):
            checks.temperature(temperature)
        said = dict(
            ignore_index=ignore_index,
            softcap=softcap,
            reduction=reduction,
            shift=shift,
            return_lse=return_lse,
            filter_eps=filter_eps,
            logit_scale=logit_scale,
            temperature=temperature,
            label_smoothing=label_smoothing,
            return_entropy=return_entropy,
            return_predictions=return_predictions,
            z_loss=z_loss,
            max_workspace=max_workspace,
            schedule=schedule,
        )
        LossOptions.checked(**said, plain=is_plain(impl))
        if isinstance(weight, (list, tuple)):  # of a configuration
            weight = _class_weights(weight)
        if weight is not None:
            checks.weight(weight)
        for name, value in said.items():
            setattr(self, name, value)
        self.accum_e_fp32 = accum_e_fp32
        self.accum_c_fp32 = accum_c_fp32
        self.filter_e_grad = filter_e_grad
        self.filter_c_grad = filter_c_grad
        self.impl = impl
        self.register_buffer("weight", weight)

    def forward(
        self,
        e: Tensor,
        c: Tensor,
        targets: Tensor,
        bias: Tensor | None = None,
        *,
        token_weight: Tensor | None = None,
        temperature: float | Tensor | None = None,
        reduction: str | None = None,
        num_valid: int | None = None,
        vocab_parallel_options: VocabParallelOptions | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """``temperature`` and ``reduction`` given here take the place of the module's;
        ``vocab_parallel_options`` says what is whose where ``c`` is a shard, which a DTensor with
        Shard(0) says itself (see :class:`VocabParallelOptions`). The module's class weights are
        those of the whole vocabulary in any case."""
        options = {name: getattr(self, name) for name in _OPTIONS}
        if temperature is not None:
            options["temperature"] = temperature
        if reduction is not None:
            options["reduction"] = reduction
        return linear_cross_entropy(
            e,
            c,
            targets,
            bias,
            **options,
            token_weight=token_weight,
            num_valid=num_valid,
            vocab_parallel_options=vocab_parallel_options,
        )

    def extra_repr(self) -> str:
        """Every option that is not its default."""
        parameters = inspect.signature(type(self).__init__).parameters
        values = {name: getattr(self, name) for name in parameters if name != "self"}
        return ", ".join(
            f"{name}={f'({len(value)} class weights)' if isinstance(value, Tensor) else repr(value)}"
            for name, value in values.items()
            if isinstance(value, Tensor) or value != parameters[name].default
        )


# Those that the module remembers: attributes, which may be changed between calls.
_OPTIONS = tuple(inspect.signature(LinearCrossEntropy).parameters)

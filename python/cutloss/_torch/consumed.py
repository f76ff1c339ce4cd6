"""Logits that a loss consumes (consume_logits): the gradient is written over them, once, and the
caller's tensor is left without elements (docs/decisions/0009-consumed-logits-are-emptied.md)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .._core import checks
from . import operators, private
from .autograd import Made, Saved, Tensors

_ops = torch.ops.cutloss


def evaluated(evaluate: Callable, logits: Tensor, *arguments: Any) -> Any:
    """evaluate(logits, *arguments, Consumed), after which the caller's tensor is empty."""
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            "consume_logits cannot be part of a graph of torch.compile, which decides itself what "
            "takes whose memory: leave it out there"
        )
    _check(logits)
    made = _called(evaluate, logits, *arguments, Consumed)
    _empty(logits)
    return made


# What comes after a graph break is traced frame by frame, and may not overwrite anything.
@private.untraced
def _called(evaluate: Callable, *arguments: Any) -> Any:
    return evaluate(*arguments)


@private.untraced
def _check(logits: Tensor) -> None:
    """Whether the gradient may take the memory of the logits without anybody's wrong number."""
    if not private.is_ordinary(logits):
        raise ValueError(
            f"consume_logits takes an ordinary tensor, got {type(logits).__name__}: leave it out"
        )
    base = private.base_of(logits)
    if logits.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
        raise ValueError(
            "consume_logits would overwrite a leaf that requires a gradient, which is yours to "
            "keep: leave it out, or pass what a model has computed"
        )
    if private.has_hooks_of_saved_tensors():
        raise ValueError(
            "consume_logits cannot work under torch.utils.checkpoint or other hooks of saved "
            "tensors, with which PyTorch does not notice that saved logits were overwritten: leave "
            "it out there, or leave the loss out of the region"
        )
    if base is not None and base.numel() != logits.numel():
        raise ValueError(
            f"consume_logits takes whole tensors, got a view {checks.shape(logits)} of a tensor "
            f"{checks.shape(base)}: pass the tensor itself (shift=1 leaves the last position of "
            f"each sequence out), or leave consume_logits out"
        )
    if not logits.is_contiguous():
        raise ValueError(
            f"consume_logits takes contiguous logits, got strides {tuple(logits.stride())} of "
            f"shape {checks.shape(logits)}: pass logits.contiguous(), or leave consume_logits out"
        )


def _empty(logits: Tensor) -> None:
    """Whoever reads the tensor now finds no elements, not a gradient."""
    for t in (logits, private.base_of(logits)):
        if t is not None:
            t.data = t.detach().new_empty(0)


_TWICE = (
    "backward came a second time, but the first one wrote the gradient over the logits: leave "
    "consume_logits out where a graph is gone through twice (retain_graph=True)"
)


class Consumed(operators.Logits):
    """The gradient takes the memory of the logits, once: one object for each loss."""

    of_statistics = _ops.logits_gradient_
    both = _ops.logits_loss_and_gradient_
    is_overwritten = False
    no_batches = (
        "consume_logits writes one gradient over the logits, and here comes a batch of upstream "
        "gradients (is_grads_batched, or torch.vmap around autograd.grad): leave it out there"
    )

    def wanted(self, made: Any) -> Tensors:
        """Nothing is made but what lies in the logits."""
        return ()

    def forward(self, given: Saved) -> Made:
        made = super().forward(given)
        return made._replace(saved=made.saved._replace(operands=_own(given.operands)))

    def begin_backward(self) -> None:
        if self.is_overwritten:
            raise RuntimeError(_TWICE)

    def gradients(self, saved: Saved, needs: tuple[bool, ...], upstream: Tensors) -> Tensors:
        self.is_overwritten = True
        super().gradients(saved, needs, upstream)
        increment_version(saved.operands)
        return saved.operands

    def loss_and_gradients(self, given: Saved, needs: tuple[bool, ...]) -> Made:
        given = given._replace(operands=_own(given.operands))
        made = super().loss_and_gradients(given, needs)
        increment_version(given.operands)
        # The logits are gone, so backward has no use for what else made the loss.
        saved = Saved((), (), (), given.undefined)
        return made._replace(saved=saved, gradients=given.operands)

    def gradients_again(self, saved: Saved, needs: tuple[bool, ...]) -> Tensors:
        raise RuntimeError(_TWICE)


def _own(operands: Tensors) -> Tensors:
    """The memory of the logits under a name of its own, which stays when the caller's is emptied.
    It shares the version counter: whoever has saved the logits for a backward of its own learns
    that they have changed."""
    (logits,) = operands
    return (logits.detach(),)

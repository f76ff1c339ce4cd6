"""From logits that are not made to linear_cross_entropy: what it is given, and where."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._torch import partitioned, private
from ..functional import linear_cross_entropy


class Term(NamedTuple):
    """scale · hidden · linear.weightᵀ + scale · linear.bias"""

    hidden: Tensor  # D where logits have V
    linear: nn.Linear  # weight (V,D), bias (V) or None
    scale: float | Tensor  # a tensor has no dimensions, and fp32 or fp64
    mesh: Any = None  # on which the hidden states came as a DTensor, whole on every rank


class Operands(NamedTuple):
    """z = logit_scale · e · cᵀ + bias"""

    e: Tensor  # (..., D)
    c: Tensor  # (V,D)
    bias: Tensor | None  # (V)
    logit_scale: float


def operands(terms: tuple[Term, ...], vector: Tensor | None) -> Operands:
    """Of the sum of all terms, whose hidden states have their features last, and a vector (V).

    Of several terms e and c are those of all side by side: the sum of products is the product
    of what is concatenated. (Adding an adapter's B·A to a 16-bit weight would round it away.)
    """
    first = terms[0]
    dtype = first.linear.weight.dtype
    biases = [(t.linear.bias, t.scale) for t in terms if t.linear.bias is not None]
    if vector is not None:
        biases.append((vector.to(first.linear.weight.device), 1.0))
    bias = _sum(biases).to(dtype) if biases else None
    if len(terms) == 1 and not isinstance(first.scale, Tensor):
        return Operands(first.hidden, first.linear.weight, bias, first.scale)
    # A scale that is a tensor goes into the hidden states, and gets its gradient through them.
    e = [scaled(t.hidden, t.scale).to(first.hidden.dtype) for t in terms]
    if len(terms) == 1:
        return Operands(e[0], first.linear.weight, bias, 1.0)
    c = torch.cat([t.linear.weight.to(dtype) for t in terms], 1)
    return Operands(torch.cat(e, -1), c, bias, 1.0)


def evaluate(logits, function: Callable[..., object]) -> object:
    """``function(e, c, bias, logit_scale, softcap)`` of an UnmadeLogits, called where the
    classifier's weight is.

    A classifier of one term is called, as a module: what gathers or moves its weight does so in
    hooks around that call (FSDP, ZeRO-3, accelerate)."""
    logits = logits.movedim(logits.class_dim, -1)

    def result_of(terms: tuple[Term, ...]) -> object:
        check_sharded(terms, logits.vector)
        given = operands(terms, logits.vector)
        e, c, bias, scale = given
        return function(e, c, bias, logit_scale=scale, softcap=logits.softcap)

    if len(logits.terms) > 1:
        return result_of(logits.terms)
    (term,) = logits.terms

    computed = []

    def inside(hidden: Tensor, linear: nn.Linear) -> object:
        computed.append(result_of((term._replace(hidden=hidden),)))
        return computed[0]

    # As a DTensor they are left alone by the hook that would take them for a share of the tokens.
    hidden = term.hidden
    hidden = hidden if term.mesh is None else partitioned.replicated(hidden, term.mesh)

    # In a dict, so that a hook that changes an output cannot take this for logits.
    try:
        result = term.linear(hidden, cutloss_inside=inside)["cutloss"]
    except Exception as error:
        if not computed:  # it is not from a hook of the output
            raise
        raise NotImplementedError(_OF_HOOKS + f": {type(error).__name__}: {error}") from error
    if private.has_forward_hooks_of_all_modules() and result is not computed[0]:
        raise NotImplementedError(_OF_HOOKS)
    return result


_OF_HOOKS = (
    "a forward hook, of the classifier or of all modules (register_module_forward_hook), changes "
    "or reads what comes out of the classifier. A loss without logits calls the classifier for the "
    "loss itself, which is in a dict, so that no hook takes it for logits: let the hook leave "
    "alone what is no tensor, put it on other modules, or leave this model as it is"
)


def loss(logits, target: Tensor, options: dict) -> Tensor:
    """linear_cross_entropy of an UnmadeLogits."""

    def cross_entropy(e, c, bias, logit_scale, softcap):
        on_device = target.to(c.device)
        return linear_cross_entropy(
            e, c, on_device, bias, logit_scale=logit_scale, softcap=softcap, **options
        )

    return evaluate(logits, cross_entropy).to(logits.device)


def is_column_parallel(layer: nn.Module) -> bool:
    """Whether parallelize_module has sharded a layer by its classes (ColwiseParallel)."""
    placed = any(map(partitioned.only_places, private.forward_pre_hooks(layer)))
    return placed and partitioned.has_classes(layer.weight)


def check_sharded(terms: tuple[Term, ...], vector: Tensor | None) -> None:
    """That the classifier's weights are whole, or it has one and all ranks have its classes."""
    if not any(is_column_parallel(t.linear) for t in terms):
        for t in terms:
            check(t.linear.weight)
    elif len(terms) > 1 or vector is not None:
        extra = "an adapter" if len(terms) > 1 else "a vector that the forward adds to its logits"
        raise NotImplementedError(
            f"the classifier is sharded by its classes (ColwiseParallel), and has {extra}, which "
            f"cutloss.patch knows for a whole classifier only: leave the head out of the "
            f"tensor-parallel plan"
        )


def check(c: Tensor) -> None:
    """That it is a classifier's whole weight."""
    if type(c) not in (Tensor, nn.Parameter):
        raise NotImplementedError(
            f"the weight of the classifier is a {type(c).__name__}, not a tensor of its own: "
            f"cutloss computes the loss of a classifier that this process holds whole (leave the "
            f"head out of the tensor-parallel or sharding plan, or out of quantisation)"
        )
    if c.dim() != 2 or c.shape[0] == 0:
        raise NotImplementedError(
            f"the weight of the classifier has shape {tuple(c.shape)} where the loss is computed: "
            f"it is sharded or offloaded, and was not gathered for the call of the head"
        )


def _sum(biases: list[tuple[Tensor, float | Tensor]]) -> Tensor:
    """In fp32 at least, so that it is rounded once."""
    wide = [scaled(t.to(torch.promote_types(t.dtype, torch.float32)), s) for t, s in biases]
    return sum(wide[1:], wide[0])


def scaled(t: Tensor, scale: float | Tensor) -> Tensor:
    if not isinstance(scale, Tensor):
        return t if scale == 1.0 else t * scale
    # One on the CPU may multiply what is on any device, as PyTorch has it.
    return t * (scale if scale.device.type == "cpu" else scale.to(t.device))

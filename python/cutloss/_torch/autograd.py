"""The one family of autograd: gradients that are made in backward (Deferred), or along with the
loss (Immediate), over a Computation, which says by which operators and of what.

Deferred takes any upstream gradients. Immediate is for a loss that is one number: its gradients
wait for backward, which multiplies them by one number.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import partitioned
from . import flops, library, private

_ops = torch.ops.cutloss

Tensors = tuple[Tensor | None, ...]


class Saved(NamedTuple):
    """What backward reads, all of it saved by autograd, so that hooks see it and a change in place
    is noticed."""

    operands: Tensors  # those that gradients go to
    constants: Tensors  # what else the loss is made of
    made: Tensors = ()  # in forward, for backward
    undefined: Tensor | None = None  # one bool: the mean of nothing, whose gradients are zero

    def tensors(self) -> list[Tensor]:
        all_of_them = (*self.operands, *self.constants, *self.made, self.undefined)
        return [t for t in all_of_them if t is not None]


class Made(NamedTuple):
    """What forward made."""

    saved: Saved
    outputs: Tensors  # what is differentiable
    constant_outputs: Tensors = ()
    gradients: Tensors = ()  # of the operands


class Computation:
    """One loss, or what a row's loss is made of. It holds no tensor that changes from call to call:
    those come in a Saved, of which forward reads operands, constants and undefined."""

    no_forward_mode = (
        "cutloss has no forward-mode derivative (jvp, jacfwd, hessian): use reverse mode (grad, "
        "vjp, jacrev), or impl='torch'"
    )
    no_batches: str | None = None  # why there may be no batch of upstream gradients
    is_ordinary = False  # it is known that no operand is a tensor of torch.func's

    def forward(self, given: Saved) -> Made:
        """Without gradients."""
        raise NotImplementedError

    def gradients(self, saved: Saved, needs: tuple[bool, ...], upstream: Tensors) -> Tensors:
        """Of the operands, for the gradients of the outputs of `forward`."""
        raise NotImplementedError

    def loss_and_gradients(self, given: Saved, needs: tuple[bool, ...]) -> Made:
        raise NotImplementedError

    def gradients_again(self, saved: Saved, needs: tuple[bool, ...]) -> Tensors:
        """Those of loss_and_gradients, the same bits, where a second backward asks for them."""
        with flops.counted_as(self.products_again(saved, needs)):
            return self.loss_and_gradients(saved, needs).gradients

    def products_again(self, saved: Saved, needs: tuple[bool, ...]) -> list[flops.Product]:
        """Those that count in gradients_again."""
        raise NotImplementedError

    def begin_backward(self) -> None:
        """Before what was saved is taken, which fails where it was changed in place."""

    def check_backward(self, saved: Saved, reads: bool) -> None:
        """That e and c are in backward what they were in forward. `reads`: they will be read."""
        e, c, _ = saved.operands
        if private.is_ordinary(e) and private.is_ordinary(c):
            partitioned.check_shape(e, c)
            if reads:
                partitioned.check_memory(e, c)


# What is kept from forward to backward ------------------------------------------------------------


def keep(ctx: Any, computation: Computation, made: Made) -> None:
    saved = made.saved
    ctx.save_for_backward(*saved.operands, *saved.constants, *saved.made, saved.undefined)
    operands = len(saved.operands)
    ctx.ends = operands, operands + len(saved.constants)
    ctx.set_materialize_grads(False)
    ctx.computation = computation
    ctx.gradients = made.gradients


def kept(ctx: Any) -> Saved:
    tensors = ctx.saved_tensors
    first, second = ctx.ends
    return Saved(tensors[:first], tensors[first:second], tensors[second:-1], tensors[-1])


def _outputs(ctx: Any, made: Made) -> Tensors:
    ctx.mark_non_differentiable(*[t for t in made.constant_outputs if t is not None])
    ctx.outputs = len(made.outputs)
    return *made.outputs, *made.constant_outputs


def for_inputs(ctx: Any, gradients: Tensors = ()) -> Tensors:
    """A gradient for each input of forward: those of the operands, which come first, and nothing
    for the others."""
    return *gradients, *(None,) * (len(ctx.needs_input_grad) - len(gradients))


# Gradients ----------------------------------------------------------------------------------------

_SECOND_ORDER = (
    "cutloss makes first derivatives only: its gradients cannot be differentiated again; where "
    "a second derivative (create_graph=True) is needed use impl='torch', in the calls that have it"
)


class _FirstOrder(torch.autograd.Function):
    """The gradient as it is, depending on what it came from, with no derivative of its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient, *sources):
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(_SECOND_ORDER)


def first_order(gradients, *sources):
    if not torch.is_grad_enabled():  # no create_graph
        return gradients
    return tuple(g if g is None else _FirstOrder.apply(g, *sources) for g in gradients)


def _without_graph(fn: Callable, *args: Any) -> Any:
    """fn(*args) under no_grad, which costs as much as ten calls of Python and is there already
    where nobody asks for a graph."""
    if not torch.is_grad_enabled():
        return fn(*args)
    with torch.no_grad():
        return fn(*args)


def for_each(
    fn: Callable[[Tensors, bool], Tensors],
    upstream: Tensors,
    saved: Saved,
    no_batches: str | None = None,
) -> Tensors:
    """fn(upstream, False), or where upstream gradients come in a batch (is_grads_batched, or
    torch.vmap around autograd.grad), fn(entry, True) for each entry, and their results as a batch:
    the same bits as one by one. Where forward was in torch.vmap too, PyTorch does that. A graph of
    the gradients (create_graph) must be below the batch, or PyTorch loses it."""
    batch = private.batch_of(upstream)
    if batch is None or not all(map(private.is_ordinary, saved.tensors())):
        return fn(upstream, False)
    if no_batches is not None:
        raise NotImplementedError(no_batches)
    wholes: list[Tensor | None] = []
    entries = batch.entries()
    for i, entry in enumerate(entries):
        made = for_each(lambda entry, _: fn(entry, True), entry, saved)
        if i == 0:
            wholes = [None if g is None else g.new_empty((len(entries), *g.shape)) for g in made]
        for whole, g in zip(wholes, made, strict=True):
            if whole is not None:
                whole[i] = g
    return tuple(None if t is None else batch.wrapped(t) for t in wholes)


def deferred_gradients(ctx: Any, *upstream: Tensor | None) -> Tensors:
    """The backward of Computation.forward. `upstream`: of each of its outputs."""
    computation = ctx.computation
    computation.begin_backward()
    saved = kept(ctx)
    computation.check_backward(saved, reads=True)
    needs = ctx.needs_input_grad[: len(saved.operands)]

    def make(upstream: Tensors, _: bool) -> Tensors:
        gradients = _without_graph(computation.gradients, saved, needs, upstream)
        return first_order(gradients, *saved.operands, *upstream)

    return for_inputs(ctx, for_each(make, upstream, saved, computation.no_batches))


def where_defined(d_loss: Tensor, undefined: Tensor | None) -> Tensor:
    """The mean of nothing is NaN, and with it perhaps what comes back; its gradients are zero."""
    if undefined is None:
        return d_loss
    # To look costs a tenth of torch.where, but on a device it would wait.
    if undefined.is_cpu and private.is_ordinary(undefined) and not undefined:
        return d_loss
    return torch.where(undefined, 0.0, d_loss)


def _scaled(
    gradients: Tensors, d_loss: Tensor, undefined: Tensor | None, is_shared: bool
) -> Tensors:
    """gradients * d_loss, in place where nobody else holds them. Traced tensors are not changed in
    place, the tracer decides."""
    factor = where_defined(d_loss, undefined)
    present = [g for g in gradients if g is not None]
    if not all(map(private.is_ordinary, (factor, *present))):
        return tuple(None if g is None else g * factor for g in gradients)
    if is_shared:
        gradients = tuple(None if g is None else g.clone() for g in gradients)
        present = [g for g in gradients if g is not None]
    if factor.is_cpu and factor.item() == 1.0:  # as the operator finds too, at the price of a call
        return gradients
    for g in present:
        library.call(_ops.scale_, g, factor)
    return gradients


def immediate_gradients(ctx: Any, d_loss: Tensor | None, *_: Any) -> Tensors:
    """The backward of Computation.loss_and_gradients. The first one hands over what forward made.
    Another one (retain_graph) finds nothing and makes it again: the same bits, and no copy for
    those who never ask."""
    if d_loss is None:
        return for_inputs(ctx)
    saved = kept(ctx)
    computation = ctx.computation
    computation.check_backward(saved, reads=ctx.gradients is None)
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is None:
        needs = ctx.needs_input_grad[: len(saved.operands)]
        gradients = _without_graph(computation.gradients_again, saved, needs)

    def scale(upstream: Tensors, is_shared: bool) -> Tensors:
        (d_loss,) = upstream
        scaled = _without_graph(_scaled, gradients, d_loss, saved.undefined, is_shared)
        return first_order(scaled, *saved.operands, d_loss)

    return for_inputs(ctx, for_each(scale, (d_loss,), saved))


# Eager code takes Deferred and Immediate, torch.func takes Transformed of operators.py; traced code
# takes the operators, to which the same functions are registered. Eager functions have no
# setup_context: it costs more than the smallest loss, and only torch.func needs it. Of their inputs
# autograd is to see the operands; what they work with is the last two, a Saved and a Computation.


class Function(torch.autograd.Function):
    @classmethod
    def call(cls, given: Saved, computation: Computation) -> Tensors:
        inputs = (*given.operands, given, computation)
        if computation.is_ordinary:
            # Without looking for what torch.func may have left, which counts in a small loss.
            return super(torch.autograd.Function, cls).apply(*inputs)
        return cls.apply(*inputs)

    @staticmethod
    def jvp(ctx, *_):
        raise NotImplementedError(ctx.computation.no_forward_mode)


class Deferred(Function):
    @staticmethod
    def forward(ctx, *inputs):
        *_, given, computation = inputs
        made = computation.forward(given)
        keep(ctx, computation, made)
        return _outputs(ctx, made)

    @staticmethod
    def backward(ctx, *upstream):
        return deferred_gradients(ctx, *upstream[: ctx.outputs])


class Immediate(Function):
    @staticmethod
    def forward(ctx, *inputs):
        *_, given, computation = inputs
        made = computation.loss_and_gradients(given, ctx.needs_input_grad[: len(given.operands)])
        keep(ctx, computation, made)
        return _outputs(ctx, made)

    @staticmethod
    def backward(ctx, *upstream):
        return immediate_gradients(ctx, *upstream)


def deferred(given: Saved, computation: Computation) -> Tensors:
    return Deferred.call(given, computation)


def immediate(given: Saved, computation: Computation) -> Tensors:
    return Immediate.call(given, computation)


# What is asked for --------------------------------------------------------------------------------


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd asks for a gradient of one of them, or may do so: of tensors that are traced
    inside torch.vmap nobody knows, and a gradient that nobody wanted costs work alone."""
    if not torch.is_grad_enabled():
        return False
    present = [t for t in tensors if t is not None]
    if not present:
        return False
    if any([private.requires_grad(t) for t in present]):
        return True
    is_unknown = torch.compiler.is_compiling() and private.is_in_vmap()
    return is_unknown and any(t.is_floating_point() for t in present)


def is_differentiated_by_others(*operands: Tensor | None) -> bool:
    """Whether a tracer, a transform or forward mode differentiates what is done, so that gradients
    made in forward are of no use."""
    is_traced = torch.compiler.is_compiling() or private.is_transformed()
    return is_traced or private.have_tangent(*operands)

"""The operators over logits that exist, torch.ops.cutloss.logits_*: shapes for tracing, autograd,
calls. As in _ops, the gradient is made with the loss where its coefficients are known in forward
(immediate), else in backward (deferred). Either way it may take the memory of the logits.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import _autograd, _ops
from ._ops import call, first_order, hand_over, of_rows, stat_dtype
from ._terms import Rows

_operators = torch.ops.cutloss

Options = dict[str, Any]  # the keyword arguments of the operators


def statistics(operands: tuple, options: Options, consume: bool) -> Rows:
    """Per-row outputs whose gradients are made in backward. `operands`: logits (sequences, length,
    V), targets, row_temperature, class_weight."""
    return _deferred((*operands, None, None), options, consume)[1]


def loss(
    operands: tuple,
    terms: Tensor,
    undefined: Tensor,
    options: Options,
    immediate: bool,
    consume: bool,
) -> tuple[Tensor, Rows]:
    """The loss that loss_terms weighs, and per-row outputs. `immediate`: the gradient is made along
    with it, and of the outputs there are predictions only."""
    inputs = (*operands, terms, undefined)
    if not immediate:
        return _deferred(inputs, options, consume)
    if torch.compiler.is_compiling():
        loss, argmax, _ = _operators.logits_loss_and_gradient(*inputs, **options)
    else:
        loss, argmax = _Immediate.apply(*inputs, options, consume)
    return loss, Rows(argmax=argmax)


def _deferred(inputs: tuple, options: Options, consume: bool) -> tuple[Tensor, Rows]:
    if torch.compiler.is_compiling():
        outputs = _shown(_operators.logits_statistics(*inputs, **options))
    elif _autograd.wants_gradient(inputs[0]) or _ops.have_tangent(inputs[0]):
        outputs = _Deferred.apply(*inputs, options, consume)
    else:
        outputs = _shown(call(_operators.logits_statistics, *inputs, **options))
    loss, *rows = outputs
    return loss, Rows(*rows)


def _shown(outputs: tuple) -> tuple:
    """Those of the outputs of `logits_statistics` that are not for backward alone."""
    loss, nll, lse, _, log_sum, entropy, zbar_centred, argmax = outputs
    return loss, nll, lse, log_sum, entropy, zbar_centred, argmax


# Shapes -----------------------------------------------------------------------------------------


@torch.library.register_fake("cutloss::logits_statistics")
def _(
    logits, targets, row_temperature, class_weight, terms=None, undefined=None, *, shift, **options
):
    stats = stat_dtype(logits.dtype)
    rows = logits.shape[0] * (logits.shape[1] - shift)

    def per_row(wanted: bool = True, dtype: torch.dtype = stats) -> Tensor:
        return logits.new_empty((rows if wanted else 0,), dtype=dtype)

    return (
        logits.new_empty(() if terms is not None else (0,), dtype=stats),
        per_row(),
        per_row(),
        per_row(),
        per_row(),
        per_row(options["wants_entropy"]),
        per_row(options["wants_zbar"]),
        per_row(options["wants_argmax"], torch.int64),
    )


@torch.library.register_fake("cutloss::logits_gradient")
def _(logits, *_, **options):
    return logits.new_empty(logits.shape)


@torch.library.register_fake("cutloss::logits_loss_and_gradient")
def _(
    logits, targets, row_temperature, class_weight, terms, undefined=None, *, shift, **options
):
    rows = logits.shape[0] * (logits.shape[1] - shift) if options["wants_argmax"] else 0
    loss = logits.new_empty((), dtype=stat_dtype(logits.dtype))
    argmax = logits.new_empty((rows,), dtype=torch.int64)
    return loss, argmax, logits.new_empty(logits.shape)


@torch.library.register_fake("cutloss::logits_gradient_")
def _(logits, *_, **options):
    return None


@torch.library.register_fake("cutloss::logits_loss_and_gradient_")
def _(
    logits, targets, row_temperature, class_weight, terms, undefined=None, *, shift, **options
):
    rows = logits.shape[0] * (logits.shape[1] - shift) if options["wants_argmax"] else 0
    loss = logits.new_empty((), dtype=stat_dtype(logits.dtype))
    return loss, logits.new_empty((rows,), dtype=torch.int64)


# Autograd ---------------------------------------------------------------------------------------

_TWICE = (
    "backward came a second time, but the first one wrote the gradient over the logits: leave "
    "consume_logits out where a graph is gone through twice (retain_graph=True)"
)


def _own(logits: Tensor) -> Tensor:
    """The memory of the logits under a name of its own, which stays when the caller's is emptied.
    It shares the version counter: whoever has saved the logits for a backward of its own learns
    that they have changed."""
    return logits.detach()


def _statistics_backward(ctx, *d_outputs):
    options = ctx.options
    *operands, terms, undefined, nll, row_max, log_sum, entropy = ctx.saved_tensors
    with torch.no_grad():
        d_rows = of_rows(options, terms, undefined, *d_outputs[:6])
        rows = (nll, row_max, log_sum, entropy, *d_rows)
        if getattr(ctx, "consume", False):
            gradient = operands[0]
            call(_operators.logits_gradient_, *operands, *rows, **options)
            increment_version(gradient)
        else:
            gradient = call(_operators.logits_gradient, *operands, *rows, **options)
    return *first_order((gradient,), operands[0], *d_outputs[:6]), *(None,) * 5


def _statistics_context(ctx, inputs, keyword_only_inputs, output):
    _, nll, _, row_max, log_sum, entropy, _, _ = output
    ctx.save_for_backward(*inputs, nll, row_max, log_sum, entropy)
    ctx.set_materialize_grads(False)
    ctx.options = keyword_only_inputs


def _traced_statistics_context(ctx, inputs, keyword_only_inputs, output):
    _statistics_context(ctx, inputs, keyword_only_inputs, output)
    *_, row_max, _, _, _, argmax = output
    ctx.mark_non_differentiable(row_max, argmax)


def _traced_statistics_backward(ctx, *d_outputs):
    return _statistics_backward(ctx, *_shown(d_outputs))


def _immediate_context(ctx, inputs, keyword_only_inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)
    ctx.options = keyword_only_inputs
    ctx.gradients = (output[2],)


def _traced_immediate_context(ctx, inputs, keyword_only_inputs, output):
    _immediate_context(ctx, inputs, keyword_only_inputs, output)
    ctx.mark_non_differentiable(*output[1:])


def _immediate_backward(ctx, d_loss, *_):
    if d_loss is None:
        return (None,) * 6
    inputs, consume = ctx.saved_tensors, getattr(ctx, "consume", False)

    def remake():
        if consume:
            raise RuntimeError(_TWICE)
        return (call(_operators.logits_loss_and_gradient, *inputs, **ctx.options)[2],)

    sources = () if consume else inputs[:1]
    return *hand_over(ctx, d_loss, sources, inputs[-1], remake), *(None,) * 5


class _Deferred(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, *inputs):
        *tensors, options, consume = inputs
        output = call(_operators.logits_statistics, logits, *tensors, **options)
        saved = _own(logits) if consume else logits
        _statistics_context(ctx, (saved, *tensors), options, output)
        ctx.consume, ctx.done = consume, False
        shown = _shown(output)
        ctx.mark_non_differentiable(shown[-1])  # argmax
        return shown

    @staticmethod
    def backward(ctx, *d_outputs):
        if ctx.consume:
            if ctx.done:
                raise RuntimeError(_TWICE)
            ctx.done = True
        return *_statistics_backward(ctx, *d_outputs), None, None

    @staticmethod
    def jvp(ctx, *_):
        raise NotImplementedError(_FORWARD_MODE)


class _Immediate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, *inputs):
        *tensors, options, consume = inputs
        ctx.consume = consume
        if consume:
            gradient = _own(logits)
            output = call(_operators.logits_loss_and_gradient_, gradient, *tensors, **options)
            increment_version(gradient)
            # The logits are gone, so backward has no use for what else made the loss but the last.
            _immediate_context(ctx, tensors[-1:], options, (*output, gradient))
        else:
            output = call(_operators.logits_loss_and_gradient, logits, *tensors, **options)
            _immediate_context(ctx, (logits, *tensors), options, output)
        loss, argmax = output[:2]
        ctx.mark_non_differentiable(argmax)
        return loss, argmax

    @staticmethod
    def backward(ctx, d_loss, *_):
        return *_immediate_backward(ctx, d_loss), None, None

    @staticmethod
    def jvp(ctx, *_):
        raise NotImplementedError(_FORWARD_MODE)


_FORWARD_MODE = (
    "cutloss has no forward-mode derivative (jvp, jacfwd, hessian): use reverse mode, or "
    "torch.nn.functional.cross_entropy"
)

torch.library.register_autograd(
    "cutloss::logits_statistics",
    _traced_statistics_backward,
    setup_context=_traced_statistics_context,
)
torch.library.register_autograd(
    "cutloss::logits_loss_and_gradient",
    _immediate_backward,
    setup_context=_traced_immediate_context,
)

"""The operators of torch.ops.cutloss: shapes for tracing, autograd, calls.

Two families make the same gradients:

* deferred: ``statistics`` in forward, ``gradients`` in backward, when the gradients of the
  per-row outputs are known;
* immediate: ``loss_and_gradients``, when the loss is a weighted sum of the per-row outputs whose
  weights are known in forward. The gradients are made with the loss and wait for backward, which
  multiplies them by one number.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _errors, _flops, _load, _sharded
from ._terms import Rows, Weighting, unpacked

_load.load()
_flops.register_when_imported()
_ops = torch.ops.cutloss

HAS_CUDA: bool = _ops.has_cuda()  # whether this build has CUDA engines; says nothing of a device

SCHEDULES = {"auto": 0, "none": 1, "rows": 2, "vocabulary": 3}

Options = dict[str, Any]  # the keyword arguments of the operators


def options(compute_dtype: torch.dtype, **changes: Any) -> Options:
    """Options of a loss without options, and what is different."""
    return {
        "compute_dtype": compute_dtype,
        "shift": 0,
        "ignore_index": -100,
        "softcap": None,
        "logit_scale": 1.0,
        "temperature": 1.0,
        "wants_entropy": False,
        "wants_zbar": False,
        "wants_argmax": False,
        "needs_de": False,
        "needs_dc": False,
        "needs_dbias": False,
        "schedule": SCHEDULES["auto"],
        "max_workspace": None,
        "kept_bytes": 0,
        "num_valid": None,
        "allow_tf32": False,
        **changes,
    }


def version() -> str:
    return _ops.version()


def allow_tf32(e: Tensor, compute_dtype: torch.dtype) -> bool:
    """Whether products of fp32 may round their operands to tf32: where PyTorch's own may."""
    return e.device.type == "cuda" and compute_dtype == torch.float32 and _tf32_is_on()


def _tf32_is_on() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


# What torch.compiler.assume_constant_result does, without importing the compiler. PyTorch compiles
# again where the setting changes.
_tf32_is_on._dynamo_marked_constant = True


def describe_machine() -> str:
    """What was found on this machine: engines, the libraries behind them, processor features."""
    return _ops.describe_machine()


def call(operator: Any, *args: Any, **options: Any) -> Any:
    """Calls an operator; its errors become Python's. A traced call is left as it is.

    The operator's own autograd, which is for traced code, is passed over: it costs more than the
    smallest loss, and whoever calls from here has the gradient in hand, or wants none. Transforms
    of torch.func work by autograd's dispatch, so under them nothing is passed over.
    """
    if torch.compiler.is_compiling():
        return operator(*args, **options)
    try:
        if is_transformed():
            return operator(*args, **options)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args, **options)
    except RuntimeError as error:
        known = _errors.translated(error)
        if known is error:
            raise
        raise known from None


def plan(sizes: tuple, options: Options) -> list[int]:
    """[schedule, bytes kept from forward to backward, bytes of scratch in forward, in backward,
    products]."""
    return call(_ops.plan, *sizes, **options)


def describe_plan(sizes: tuple, options: Options) -> str:
    """The plan in words, with the reasons."""
    return call(_ops.describe_plan, *sizes, **options)


def loss_terms(
    targets: Tensor, V: int, how: Weighting, options: Options
) -> tuple[Tensor, Tensor]:
    """What _terms.terms makes, without a gradient: the coefficients in one tensor, and whether
    they are those of a mean of nothing. `targets`: (sequences, length)."""
    stats = stat_dtype(options["compute_dtype"])
    token_weight = None if how.token_weight is None else how.token_weight.to(stats)
    weight = None if how.weight is None else how.weight.to(stats)
    return call(
        _ops.loss_terms,
        targets,
        token_weight,
        weight,
        options["compute_dtype"],
        V,
        options["shift"],
        options["ignore_index"],
        how.reduction == "mean",
        how.label_smoothing,
        how.z_loss,
    )


def statistics(operands: tuple, options: Options) -> Rows:
    """Per-row outputs whose gradients are made in backward."""
    return _deferred((*operands, None, None), options)[1]


def loss(
    operands: tuple, terms: Tensor, undefined: Tensor, options: Options, immediate: bool
) -> tuple[Tensor, Rows]:
    """The loss that loss_terms weighs, and per-row outputs. `immediate`: its gradients are made
    along with it, and of the outputs there are predictions only."""
    inputs = (*operands, terms, undefined)
    if not immediate:
        return _deferred(inputs, options)
    if torch.compiler.is_compiling():
        loss, argmax, *_ = _ops.loss_and_gradients(*inputs, **options)
    else:
        loss, argmax, *_ = _Immediate.apply(*inputs, options)
    return loss, Rows(argmax=argmax)


def _deferred(inputs: tuple, options: Options) -> tuple[Tensor, Rows]:
    if is_transformed():
        outputs = _shown(_Transformed.apply(*inputs, options))
    elif torch.compiler.is_compiling():
        outputs = _shown(_ops.statistics(*inputs, **options))
    elif _is_differentiated(options):
        outputs = _Deferred.apply(*inputs, options)
    else:
        outputs = _shown(call(_ops.statistics, *inputs, **options))
    loss, *rows = outputs
    return loss, Rows(*rows)


def _shown(outputs: tuple) -> tuple:
    """Those of the outputs of `statistics` that are not for backward alone."""
    loss, nll, lse, _, log_sum, entropy, zbar_centred, argmax, _ = outputs
    return loss, nll, lse, log_sum, entropy, zbar_centred, argmax


def is_transformed() -> bool:
    """Whether a transform of torch.func is at work, for which the gradient of forward's rows is
    made in backward."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def have_tangent(*tensors: Tensor | None) -> bool:
    """Whether one of them carries a derivative of forward mode."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def is_differentiated_by_others(*operands: Tensor | None) -> bool:
    """Whether a tracer, a transform or forward mode differentiates what is done, so that gradients
    made in forward are of no use."""
    is_traced = torch.compiler.is_compiling() or is_transformed()
    return is_traced or have_tangent(*operands)


def _is_differentiated(options: Options) -> bool:
    """Whether a derivative may be asked for: one that is made, or one that is refused."""
    needed = options["needs_de"] or options["needs_dc"] or options["needs_dbias"]
    return needed or forward_ad._current_level >= 0


# Shapes -----------------------------------------------------------------------------------------


def stat_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """The dtype of per-row numbers."""
    return torch.float64 if compute_dtype == torch.float64 else torch.float32


def _rows(e: Tensor, options: Options) -> int:
    return e.shape[0] * (e.shape[1] - options["shift"])


def _fake_gradients(e: Tensor, c: Tensor, bias: Tensor | None, options: Options):
    de = e.new_empty(e.shape if options["needs_de"] else (0,))
    dc = c.new_empty(c.shape if options["needs_dc"] else (0,))
    if options["needs_dbias"]:
        return de, dc, bias.new_empty(bias.shape)
    return de, dc, e.new_empty((0,), dtype=torch.float32 if bias is None else bias.dtype)


@torch.library.register_fake("cutloss::statistics")
def _(e, c, bias, targets, row_temperature, class_weight, terms=None, undefined=None, **options):
    stats = stat_dtype(options["compute_dtype"])
    rows = _rows(e, options)

    def per_row(wanted: bool = True, dtype: torch.dtype = stats) -> Tensor:
        return e.new_empty((rows if wanted else 0,), dtype=dtype)

    return (
        e.new_empty(() if terms is not None else (0,), dtype=stats),
        per_row(),
        per_row(),
        per_row(),
        per_row(),
        per_row(options["wants_entropy"]),
        per_row(options["wants_zbar"]),
        per_row(options["wants_argmax"], torch.int64),
        e.new_empty((options["kept_bytes"],), dtype=torch.uint8),
    )


@torch.library.register_fake("cutloss::gradients")
def _(e, c, bias, *_, **options):
    return _fake_gradients(e, c, bias, options)


@torch.library.register_fake("cutloss::loss_and_gradients")
def _(e, c, bias, *_, **options):
    loss = e.new_empty((), dtype=stat_dtype(options["compute_dtype"]))
    rows = _rows(e, options) if options["wants_argmax"] else 0
    argmax = e.new_empty((rows,), dtype=torch.int64)
    return loss, argmax, *_fake_gradients(e, c, bias, options)


@torch.library.register_fake("cutloss::loss_terms")
def _(
    targets,
    token_weight,
    class_weight,
    compute_dtype,
    V,
    shift,
    ignore_index,
    mean,
    label_smoothing,
    z_loss,
):
    count = 1 + (2 if label_smoothing > 0 else 0) + (1 if z_loss > 0 else 0)
    rows = targets.shape[0] * (targets.shape[1] - shift)
    terms = targets.new_empty((count, rows), dtype=stat_dtype(compute_dtype))
    return terms, targets.new_empty((), dtype=torch.bool)


@torch.library.register_fake("cutloss::scale_")
def _(t, factor):
    return None


# Autograd ---------------------------------------------------------------------------------------

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


def wanted(gradients, options: Options):
    needs = (options["needs_de"], options["needs_dc"], options["needs_dbias"])
    return tuple(g if needed else None for g, needed in zip(gradients, needs))


def _statistics_context(ctx, inputs, keyword_only_inputs, output):
    _, nll, _, row_max, log_sum, entropy, _, _, kept = output
    ctx.save_for_backward(*inputs, nll, row_max, log_sum, entropy, kept)
    ctx.set_materialize_grads(False)
    ctx.options = keyword_only_inputs


def _traced_statistics_context(ctx, inputs, keyword_only_inputs, output):
    _statistics_context(ctx, inputs, keyword_only_inputs, output)
    *_, row_max, _, _, _, argmax, kept = output
    ctx.mark_non_differentiable(row_max, argmax, kept)


def _where_defined(d_loss: Tensor, undefined: Tensor | None) -> Tensor:
    """The mean of nothing is NaN, and with it perhaps what comes back; its gradients are zero."""
    return d_loss if undefined is None else torch.where(undefined, 0.0, d_loss)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def of_rows(
    options: Options, terms, undefined, d_loss, d_nll, d_lse, d_log_sum, d_entropy, d_zbar
) -> tuple:
    """The upstream gradients of the rows, in the operators' order: what comes back for the loss and
    for each output of `statistics`. Called under no_grad."""
    d_lse = _sum(d_lse, d_log_sum)  # row_max is a constant (_terms)
    # What was not asked for has no elements, and its gradient says nothing.
    d_entropy = d_entropy if options["wants_entropy"] else None
    d_zbar = d_zbar if options["wants_zbar"] else None
    d_lse_squared = None
    if terms is not None and d_loss is not None:
        t = unpacked(terms * _where_defined(d_loss, undefined))
        d_nll, d_lse, d_zbar = _sum(d_nll, t.nll), _sum(d_lse, t.lse), _sum(d_zbar, t.zbar)
        d_lse_squared = t.lse_squared
    return d_nll, d_lse, d_lse_squared, d_entropy, d_zbar


def _statistics_backward(ctx, *d_outputs):
    options = ctx.options
    *operands, terms, undefined, nll, row_max, log_sum, entropy, kept = ctx.saved_tensors
    check_backward(*operands[:2], reads=True)
    with torch.no_grad():
        saved = (nll, row_max, log_sum, entropy, kept)
        d_rows = of_rows(options, terms, undefined, *d_outputs[:6])
        gradients = call(_ops.gradients, *operands, *saved, *d_rows, **options)
    sources = (*operands[:3], *d_outputs[:6])
    return *first_order(wanted(gradients, options), *sources), *(None,) * 5


def _traced_statistics_backward(ctx, *d_outputs):
    return _statistics_backward(ctx, *_shown(d_outputs))


def _immediate_context(ctx, inputs, keyword_only_inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)
    ctx.options = keyword_only_inputs
    ctx.gradients = wanted(output[2:], keyword_only_inputs)


def _traced_immediate_context(ctx, inputs, keyword_only_inputs, output):
    _immediate_context(ctx, inputs, keyword_only_inputs, output)
    ctx.mark_non_differentiable(*output[1:])


def is_ordinary(t: Tensor) -> bool:
    """Whether a tensor is one with memory of its own, not one for a tracer or for torch.func."""
    ordinary = type(t) in (Tensor, torch.nn.Parameter)
    return ordinary and not torch._C._functorch.is_functorch_wrapped_tensor(t)


def check_backward(e: Tensor, c: Tensor, reads: bool) -> None:
    if is_ordinary(e) and is_ordinary(c):
        _sharded.check_shape(e, c)
        if reads:
            _sharded.check_memory(e, c)


def _scaled(gradient: Tensor | None, factor: Tensor) -> Tensor | None:
    """gradient * factor, in place: nobody else holds the gradient. Traced tensors are not
    changed in place, the tracer decides."""
    if gradient is None:
        return None
    if not (is_ordinary(gradient) and is_ordinary(factor)):
        return gradient * factor
    call(_ops.scale_, gradient, factor)
    return gradient


def hand_over(ctx, d_loss: Tensor, sources, undefined: Tensor | None, remake) -> tuple:
    """ctx.gradients, of `sources`, times d_loss. The first backward hands over what forward made.
    Another one (retain_graph) finds nothing and makes it again: the same bits, and no copy for
    those who never ask."""
    gradients, ctx.gradients = ctx.gradients, None
    with torch.no_grad():
        if gradients is None:
            gradients = remake()
        factor = _where_defined(d_loss, undefined)
        gradients = tuple(_scaled(g, factor) for g in gradients)
    return first_order(gradients, *sources, d_loss)


def _immediate_backward(ctx, d_loss, *_):
    if d_loss is None:
        return (None,) * 8
    inputs = ctx.saved_tensors
    check_backward(*inputs[:2], reads=ctx.gradients is None)

    def remake():
        products = _flops.products_of_gradients(*inputs[:2], ctx.options)
        with _flops.counted_as(products):
            made = call(_ops.loss_and_gradients, *inputs, **ctx.options)
        return wanted(made[2:], ctx.options)

    return *hand_over(ctx, d_loss, inputs[:3], inputs[-1], remake), *(None,) * 5


# Eager code takes _Deferred and _Immediate, torch.func takes _Transformed; traced code takes the
# operators, to which the same functions are registered. Eager functions have no setup_context: it
# costs more than the smallest loss, and only torch.func needs it.

NO_FORWARD_MODE = (
    "cutloss has no forward-mode derivative (jvp, jacfwd, hessian): use reverse mode (grad, vjp, "
    "jacrev), or impl='torch'"
)


class _Deferred(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        *tensors, options = inputs
        output = call(_ops.statistics, *tensors, **options)
        _statistics_context(ctx, tensors, options, output)
        shown = _shown(output)  # each tensor that autograd wraps costs time
        ctx.mark_non_differentiable(shown[-1])  # argmax
        return shown

    @staticmethod
    def backward(ctx, *d_outputs):
        return *_statistics_backward(ctx, *d_outputs), None

    @staticmethod
    def jvp(ctx, *_):
        raise NotImplementedError(NO_FORWARD_MODE)


class _Transformed(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs):
        *tensors, options = inputs
        return tuple(call(_ops.statistics, *tensors, **options))

    @staticmethod
    def setup_context(ctx, inputs, output):
        _traced_statistics_context(ctx, inputs[:-1], inputs[-1], output)

    @staticmethod
    def backward(ctx, *d_outputs):
        return *_traced_statistics_backward(ctx, *d_outputs), None

    @staticmethod
    def jvp(ctx, *_):
        raise NotImplementedError(NO_FORWARD_MODE)


class _Immediate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        *tensors, options = inputs
        output = call(_ops.loss_and_gradients, *tensors, **options)
        _immediate_context(ctx, tensors, options, output)
        loss, argmax = output[:2]
        ctx.mark_non_differentiable(argmax)
        return loss, argmax

    @staticmethod
    def backward(ctx, d_loss, *_):
        return *_immediate_backward(ctx, d_loss), None

    @staticmethod
    def jvp(ctx, *_):
        raise NotImplementedError(NO_FORWARD_MODE)


torch.library.register_autograd(
    "cutloss::statistics", _traced_statistics_backward, setup_context=_traced_statistics_context
)
torch.library.register_autograd(
    "cutloss::loss_and_gradients", _immediate_backward, setup_context=_traced_immediate_context
)

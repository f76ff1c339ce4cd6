"""The losses that operators make whole: from E and C (`linear`), and from logits that exist
(`logits`). Two kinds of operators make the same gradients:

* deferred: ``statistics`` in forward, ``gradients`` in backward, when the gradients of the
  per-row outputs are known;
* immediate: ``loss_and_gradients``, when the loss is a weighted sum of the per-row outputs whose
  weights are known in forward. The gradients are made with the loss and wait for backward, which
  multiplies them by one number.
"""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core.options import Options
from .._core.weighting import WEIGHTS_OF_ROWS, Rows, unpacked
from . import autograd, fakes, flops, library, private  # noqa: F401  fakes are registered
from .autograd import Made, Saved, Tensors

_ops = torch.ops.cutloss
flops.register_when_imported()


class Outputs(NamedTuple):
    """What `statistics` returns, or the gradients of it."""

    loss: Tensor | None
    nll: Tensor | None
    lse: Tensor | None
    row_max: Tensor | None
    log_sum: Tensor | None
    entropy: Tensor | None
    zbar_centred: Tensor | None
    argmax: Tensor | None
    kept: Tensor | None = None  # of `linear` alone

    def differentiable(self) -> Tensors:
        return self.loss, self.nll, self.lse, self.log_sum, self.entropy, self.zbar_centred

    def saved(self) -> Tensors:
        """What `gradients` takes."""
        rows = (self.nll, self.row_max, self.log_sum, self.entropy)
        return rows if self.kept is None else (*rows, self.kept)

    def constant(self) -> Tensors:
        constant = (self.row_max, self.argmax)
        return constant if self.kept is None else (*constant, self.kept)


class Constants(NamedTuple):
    """What the operators take after the operands, in their order."""

    targets: Tensor
    row_temperature: Tensor | None
    class_weight: Tensor | None
    terms: Tensor | None = None

    def without_terms(self) -> Tensors:
        return self[:3]


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def of_rows(
    options: Options, terms, undefined, d_loss, d_nll, d_lse, d_log_sum, d_entropy, d_zbar
) -> tuple:
    """The upstream gradients of the rows, in the operators' order: what comes back for the loss and
    for each output of `statistics`. Called under no_grad."""
    d_lse = _sum(d_lse, d_log_sum)  # row_max is a constant (weighting)
    # What was not asked for has no elements, and its gradient says nothing.
    d_entropy = d_entropy if options.wants_entropy else None
    d_zbar = d_zbar if options.wants_zbar else None
    d_lse_squared = None
    if terms is not None and d_loss is not None:
        t = unpacked(terms * autograd.where_defined(d_loss, undefined))
        d_nll, d_lse, d_zbar = _sum(d_nll, t.nll), _sum(d_lse, t.lse), _sum(d_zbar, t.zbar)
        d_lse_squared = t.lse_squared
    return d_nll, d_lse, d_lse_squared, d_entropy, d_zbar


@dataclasses.dataclass
class ByOperators(autograd.Computation):
    """What Linear and Logits share; they name the operators and their operands."""

    options: Options

    def given(self, inputs: Tensors) -> Saved:
        """What the operators take by position."""
        return Saved(inputs[: self.operands], inputs[self.operands : -1], (), inputs[-1])

    def outputs(self, given: Saved) -> Outputs:
        inputs = (*given.operands, *given.constants, given.undefined)
        return Outputs(*library.call(self.statistics, *inputs, **self.keywords()))

    def forward(self, given: Saved) -> Made:
        made = self.outputs(given)
        saved = given._replace(made=made.saved())
        # Each tensor that autograd wraps costs time: nothing else is shown.
        return Made(saved, made.differentiable(), (made.argmax,))

    def gradients(self, saved: Saved, needs: tuple[bool, ...], upstream: Tensors) -> Tensors:
        constants = Constants(*saved.constants)
        d_rows = of_rows(self.options, constants.terms, saved.undefined, *upstream)
        inputs = (*saved.operands, *constants.without_terms(), *saved.made, *d_rows)
        return self.wanted(self.call_of_gradients(saved, inputs))

    def call_of_gradients(self, saved: Saved, inputs: tuple) -> Any:
        return library.call(self.of_statistics, *inputs, **self.keywords())

    def loss_and_gradients(self, given: Saved, needs: tuple[bool, ...]) -> Made:
        return self.made_of_both(given, self.call_of_both(given))

    # The operator that makes a loss and its gradients: what it takes by position, the call, what
    # becomes of its results.

    def given_to_both(self, inputs: Tensors) -> Saved:
        return self.given(inputs)

    def call_of_both(self, given: Saved) -> Tensors:
        inputs = (*given.operands, *given.constants, given.undefined)
        return library.call(self.both, *inputs, **self.keywords())

    def made_of_both(self, given: Saved, made: Tensors) -> Made:
        loss, argmax, *gradients = made
        return Made(given, (loss,), (argmax,), self.wanted(gradients))


@dataclasses.dataclass
class Linear(ByOperators):
    """Operands e (sequences, length, D), c (V,D), bias (V)."""

    # With Options.dc_adds, and then there is no gradient of c.
    dc_into: Tensor | None = dataclasses.field(default=None, kw_only=True)
    # How rows count (Weighting.of_operator), for the operator that makes loss and gradients.
    weighs: dict[str, Any] = dataclasses.field(default_factory=dict, kw_only=True)
    # As repeated.key says: nothing is traced, transformed or wrapped.
    is_ordinary: bool = dataclasses.field(default=False, kw_only=True)

    statistics = _ops.statistics
    of_statistics = _ops.gradients
    both = _ops.loss_and_gradients
    operands = 3

    @classmethod
    def traced(cls, inputs: Tensors, keywords: dict[str, Any]) -> "Linear":
        """Of the operators' own arguments."""
        weighs = {name: keywords.pop(name) for name in WEIGHTS_OF_ROWS if name in keywords}
        return cls(Options(**keywords), weighs=weighs)

    def keywords(self) -> dict[str, Any]:
        return self.options.of_linear()

    def given_to_both(self, inputs: Tensors) -> Saved:
        return Saved(inputs[:3], inputs[3:])

    def call_of_both(self, given: Saved) -> Tensors:
        inputs = (*given.operands, *given.constants)
        return library.call(self.both, *inputs, **self.weighs, **self.options.of_linear())

    def made_of_both(self, given: Saved, made: Tensors) -> Made:
        loss, undefined, argmax, *gradients = made
        given = given._replace(undefined=undefined)
        return Made(given, (loss,), (argmax, undefined), self.wanted(gradients))

    def call_of_gradients(self, saved: Saved, inputs: tuple) -> tuple:
        """What the operator makes: de, dc, dbias."""
        if not self.options.dc_adds:
            return library.call(self.of_statistics, *inputs, **self.keywords())
        _, c, _ = saved.operands
        # A backward that was asked for other gradients alone adds nothing.
        is_asked_for = private.will_go_on_to(c.grad_fn)
        into = self.dc_into if is_asked_for else torch.zeros_like(self.dc_into)
        de, dbias = library.call(_ops.gradients_, *inputs, into, **self.keywords())
        return de, None, dbias

    @property
    def no_batches(self) -> str | None:
        if not self.options.dc_adds:
            return None
        return (
            "the gradient of the weight is added to its main_grad (gradient_accumulation_fusion), "
            "and here comes a batch of upstream gradients (is_grads_batched, or torch.vmap around "
            "autograd.grad), each of which would be added"
        )

    def is_differentiated(self, given: Saved) -> bool:
        """Whether a derivative may be asked for: one that is made, or one that is refused."""
        return any(self.options.needs) or private.is_in_forward_mode()

    def wanted(self, made: Any) -> Tensors:
        """Of what the operators make those gradients that are asked for."""
        (de, dc, dbias), (e_needs, c_needs, bias_needs) = made, self.options.needs
        c_needs = c_needs and not self.options.dc_adds
        return de if e_needs else None, dc if c_needs else None, dbias if bias_needs else None

    def products_again(self, saved: Saved, needs: tuple[bool, ...]) -> list[flops.Product]:
        e, c, _ = saved.operands
        return flops.products_of_gradients(e, c, self.options)


class Logits(ByOperators):
    """Operands: logits (sequences, length, V)."""

    statistics = _ops.logits_statistics
    of_statistics = _ops.logits_gradient
    both = _ops.logits_loss_and_gradient
    operands = 1
    no_forward_mode = (
        "cutloss has no forward-mode derivative (jvp, jacfwd, hessian): use reverse mode, or "
        "torch.nn.functional.cross_entropy"
    )

    def is_differentiated(self, given: Saved) -> bool:
        (logits,) = given.operands
        return autograd.wants_gradient(logits) or private.have_tangent(logits)

    @classmethod
    def traced(cls, inputs: Tensors, keywords: dict[str, Any]) -> "Logits":
        return cls(Options(inputs[0].dtype, **keywords))

    def keywords(self) -> dict[str, Any]:
        return self.options.of_logits()

    def wanted(self, made: Any) -> Tensors:
        return (made,) if isinstance(made, Tensor) else tuple(made)

    def check_backward(self, saved: Saved, reads: bool) -> None:
        """Logits are not what FSDP and ZeRO-3 take apart."""

    def products_again(self, saved: Saved, needs: tuple[bool, ...]) -> list[flops.Product]:
        return []


# Calls --------------------------------------------------------------------------------------------


def statistics(computation: ByOperators, operands: tuple) -> Rows:
    """Per-row outputs whose gradients are made in backward. `operands`: e, c, bias, or logits
    (sequences, length, V); targets, row_temperature, class_weight."""
    return deferred(computation, computation.given((*operands, None, None)))[1]


def loss_at_once(
    computation: Linear, operands: tuple, weights: Tensors
) -> tuple[Tensor, Rows, Tensor]:
    """The loss of one operator, with the gradients that are wanted, the rows' predictions, and
    whether it is the mean of nothing. `weights`: of tokens and of classes."""
    given = computation.given_to_both((*operands, *weights))
    if any(computation.options.needs) and not torch.compiler.is_compiling():
        loss, argmax, undefined = autograd.immediate(given, computation)
    else:
        loss, undefined, argmax, *_ = computation.call_of_both(given)
    return loss, Rows(argmax=argmax), undefined


def loss(
    computation: ByOperators, operands: tuple, terms: Tensor, undefined: Tensor, immediate: bool
) -> tuple[Tensor, Rows]:
    """The loss that loss_terms weighs, and per-row outputs. `immediate`: its gradients are made
    along with it, and of the outputs there are predictions only."""
    inputs = (*operands, terms, undefined)
    if not immediate:
        return deferred(computation, computation.given(inputs))
    if torch.compiler.is_compiling():
        loss, argmax, *_ = computation.both(*inputs, **computation.keywords())
    else:
        loss, argmax = autograd.immediate(computation.given(inputs), computation)
    return loss, Rows(argmax=argmax)


def deferred(computation: ByOperators, given: Saved) -> tuple[Tensor, Rows]:
    is_traced = torch.compiler.is_compiling()
    if not is_traced and private.are_transforms_active():
        inputs = (*given.operands, *given.constants, given.undefined)
        made = Outputs(*_Transformed.apply(*inputs, computation))
        shown = (*made.differentiable(), made.argmax)
    elif not is_traced and computation.is_differentiated(given):
        shown = autograd.deferred(given, computation)
    else:
        made = computation.outputs(given)
        shown = (*made.differentiable(), made.argmax)
    loss, nll, lse, log_sum, entropy, zbar_centred, argmax = shown
    rows = Rows(
        nll=nll, lse=lse, log_sum=log_sum, entropy=entropy, zbar_centred=zbar_centred, argmax=argmax
    )
    return loss, rows


# Under torch.func, and traced --------------------------------------------------------------------


def _keep_of_statistics(
    ctx: Any, computation: ByOperators, inputs: Tensors, output: Tensors
) -> None:
    made = Outputs(*output)
    saved = computation.given(inputs)._replace(made=made.saved())
    autograd.keep(ctx, computation, Made(saved, made.differentiable()))
    ctx.mark_non_differentiable(*made.constant())


def _gradients_of_statistics(ctx: Any, *d_outputs: Tensor | None) -> Tensors:
    return autograd.deferred_gradients(ctx, *Outputs(*d_outputs).differentiable())


class _Transformed(autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs):
        *tensors, computation = inputs
        return tuple(library.call(computation.statistics, *tensors, **computation.keywords()))

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, computation = inputs
        _keep_of_statistics(ctx, computation, tuple(tensors), output)

    @staticmethod
    def backward(ctx, *d_outputs):
        return _gradients_of_statistics(ctx, *d_outputs)


def _register(kind: type[ByOperators], statistics: str, both: str) -> None:
    """The autograd of the operators themselves, which traced code takes."""

    def keep_of_statistics(ctx, inputs, keyword_only_inputs, output):
        computation = kind.traced(inputs, keyword_only_inputs)
        _keep_of_statistics(ctx, computation, inputs, output)

    def keep_of_both(ctx, inputs, keyword_only_inputs, output):
        computation = kind.traced(inputs, keyword_only_inputs)
        made = computation.made_of_both(computation.given_to_both(inputs), output)
        autograd.keep(ctx, computation, made)
        ctx.mark_non_differentiable(*output[1:])

    torch.library.register_autograd(
        statistics, _gradients_of_statistics, setup_context=keep_of_statistics
    )
    torch.library.register_autograd(
        both, autograd.immediate_gradients, setup_context=keep_of_both
    )


_register(Linear, "cutloss::statistics", "cutloss::loss_and_gradients")
_register(Logits, "cutloss::logits_statistics", "cutloss::logits_loss_and_gradient")

"""Training steps of one model, variant beside variant: loss and gradients of the first, memory, times.

Every variant first makes its loss and gradients from the same weights, before any step of the
optimizer: these are compared. Times are then those of whole steps, in rounds as timing.py has them.
"""

import contextlib
import dataclasses
import functools
import gc

import torch

from cutloss.cli.bench import device_memory, timing
from cutloss.cli.bench.memory import HostPeak
from cutloss.cli.bench.measure import clean_up, time_limit
from cutloss.cli.bench.rivals import first_line
from cutloss.cli.bench.train_models import Setup, most_layers, set_up, sharing_parameters
from cutloss.cli.bench.variants import REFERENCE, VARIANTS
from cutloss.cli.usage import UserError

# Between two ways to compute the same loss, relative. In 16 bits a model rounds its logits, which
# variants that do not make them leave out; over thousands of tokens that is about 1e-4.
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-3, "bf16-autocast": 2e-3}
SPARE_BYTES = 2**30  # left free where layers are counted, for what measuring needs itself


@dataclasses.dataclass
class Result:
    """Of one variant; None is what was not measured."""

    first_ms: float  # the first forward and backward, with all that they compile
    loss: float  # of them
    reference_loss: float
    loss_err: float | None = None  # relative to that
    grad_err: float | None = None  # the greater one of the classifier's and the first layer's
    is_wrong: bool = False
    ms: float | None = None
    peak: int | None = None  # bytes, everything that is held
    outside: int | None = None  # bytes outside of PyTorch's allocator, on CUDA


@dataclasses.dataclass
class Measured:
    setup: Setup
    model_bytes: int  # parameters and the optimizer's state
    results: dict[str, Result]


def measure(shape, names, layers, settings, report):
    """`names`: variants beside the reference, which is always measured; `layers`: a number, or None
    for as many as fit."""
    torch.compiler.reset()
    setup = _fitting(shape, layers, report)
    results, calls = _first_losses(shape, setup, [REFERENCE, *names], settings, report)
    if REFERENCE not in results:
        raise UserError(f"{shape.model} cannot be trained here, so there is nothing to compare with")
    steps = {
        name: functools.partial(run_step, shape, setup, call) for name, call in calls.items()
    }
    steps[REFERENCE]()  # makes the optimizer's state
    setup.optimizer.zero_grad(set_to_none=True)
    model_bytes = _model_bytes(shape, setup)
    if settings.measures_memory:
        _memory(shape, setup, results, steps, report)
    _times(shape, setup, results, steps, settings, report)
    return Measured(setup, model_bytes, results)


def loss_of(shape, setup, call):
    with autocast(shape):
        return call(input_ids=setup.tokens, labels=setup.tokens).loss


def autocast(shape):
    to = shape.autocast_to
    return torch.autocast(shape.device, to) if to else contextlib.nullcontext()


def run_step(shape, setup, call):
    """Forward, backward, and the optimizer's step; gradients are gone after it."""
    loss_of(shape, setup, call).backward()
    setup.optimizer.step()
    setup.optimizer.zero_grad(set_to_none=True)


def free(device):
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


# How many layers ----------------------------------------------------------------------------------


def _fitting(shape, layers, report):
    if layers is not None:
        return set_up(shape, layers)
    fits, setup = most_layers(shape.all_layers, functools.partial(_attempt, shape))
    if setup is None:
        raise UserError(
            f"one layer of {shape.model} with {shape.tokens} tokens is too much for this device: "
            f"take fewer --tokens"
        )
    if fits < shape.all_layers:
        report.note(f"{shape.model}: {fits} of {shape.all_layers} layers fit, as {REFERENCE} is")
    return setup


def _attempt(shape, layers):
    """The model after a step as Transformers has it, or None where memory does not suffice."""
    free(shape.device)
    try:
        spare = torch.empty(SPARE_BYTES, dtype=torch.uint8, device=shape.device)
        setup = set_up(shape, layers)
        run_step(shape, setup, setup.model)
        run_step(shape, setup, setup.model)  # beside the optimizer's state
        del spare
        return setup
    except torch.OutOfMemoryError:
        return None


# The first loss -----------------------------------------------------------------------------------


def _first_losses(shape, setup, names, settings, report):
    """({variant: Result}, {variant: what is called}); a line for each that fails."""
    results, calls = {}, {}
    reference, of_reference = None, None
    for name in names:
        try:
            with time_limit(settings.first_call_limit):
                call = VARIANTS[name].prepare(sharing_parameters(setup.model))
                seconds, loss = timing.wall_seconds(
                    functools.partial(_forward_and_backward, shape, setup, call), shape.device
                )
            loss = loss.item()
            if reference is None:
                reference, of_reference = loss, [g.clone() for g in _gradients(setup)]
            result = Result(1e3 * seconds, loss, reference)
            if name != REFERENCE:
                _compare(shape, result, _gradients(setup), of_reference)
            results[name], calls[name] = result, call
            setup.optimizer.zero_grad(set_to_none=True)
            continue
        except Exception as error:  # whatever a rival raises
            reason = first_line(error)
        report.note(f"{name} failed: {reason}")
        call = None
        clean_up(name, shape.device, setup.model.parameters())
    return results, calls


def _forward_and_backward(shape, setup, call):
    loss = loss_of(shape, setup, call)
    loss.backward()
    return loss.detach()


def _gradients(setup):
    """Of the classifier, and of the first layer as one vector."""
    model = setup.model
    layer = getattr(model, model.base_model_prefix).layers[0]
    of_layer = torch.cat([p.grad.flatten() for p in layer.parameters()])
    return [model.get_output_embeddings().weight.grad, of_layer]


def _compare(shape, result, gradients, of_reference):
    result.loss_err = abs(result.loss - result.reference_loss) / abs(result.reference_loss)
    result.is_wrong = not result.loss_err <= TOLERANCE[shape.dtype]  # NaN is wrong
    result.grad_err = max(_distance(g, r) for g, r in zip(gradients, of_reference))


def _distance(got, want):
    norm = functools.partial(torch.linalg.vector_norm, dtype=torch.float32)
    return (norm(got - want) / norm(want)).item()


# Memory and times ---------------------------------------------------------------------------------


def _model_bytes(shape, setup):
    if shape.device == "cuda":
        return torch.cuda.memory_allocated()
    state = [t for of_one in setup.optimizer.state.values() for t in of_one.values()]
    return sum(t.nbytes for t in (*setup.model.parameters(), *filter(torch.is_tensor, state)))


def _memory(shape, setup, results, steps, report):
    """On the CPU of a step that is not its variant's first: what libraries hold from then on does
    not count."""
    peak_of = _peak_on_device if shape.device == "cuda" else _peak_on_host
    for name in list(results):
        try:
            results[name].peak, results[name].outside = peak_of(shape, setup, steps[name])
        except torch.OutOfMemoryError as error:
            _drop(shape, setup, name, first_line(error), results, steps, report)


def _peak_on_device(shape, setup, step):
    meter = device_memory.Meter()
    meter.start()
    before = torch.cuda.memory_allocated()
    step()
    added = meter.added()
    return before + added.torch_peak, added.outside


def _peak_on_host(shape, setup, step):
    """Of the model and what a step adds to the process; None where the system does not count it."""
    free(shape.device)
    meter = HostPeak()
    try:
        meter.start()
    except OSError:
        return None, None
    step()
    return _model_bytes(shape, setup) + meter.added(), None


def _times(shape, setup, results, steps, settings, report):
    failures = {}

    def once(name):
        if name in failures:
            return
        try:
            steps[name]()
        except Exception as error:  # out of memory, between the others
            failures[name] = first_line(error)
            setup.optimizer.zero_grad(set_to_none=True)

    calls = {name: functools.partial(once, name) for name in steps}
    with report.progress(shape.model, len(calls), settings.rounds) as advance:
        ms = timing.time_rounds(
            calls, settings.rounds, shape.device, shape.seed, advance, settings.pause
        )
    for name, reason in failures.items():
        _drop(shape, setup, name, reason, results, steps, report)
    for name, result in results.items():
        result.ms = ms[name]


def _drop(shape, setup, name, reason, results, steps, report):
    del results[name], steps[name]
    report.note(f"{name} failed: {reason}")
    clean_up(name, shape.device, setup.model.parameters())

"""All measurements of one case: first calls with their errors, memory, times."""

import contextlib
import dataclasses
import functools
import gc
import signal

import torch

from cutloss._core.plan import Plan
from cutloss.cli.bench import device_memory, errors, kernels, memory, softmax, timing
from cutloss.cli.bench.cases import bias_of, inputs, leaves
from cutloss.cli.bench.methods import Method, cannot, forget_gradients, run_pass
from cutloss.cli.bench.plan import Refusal, decide, with_workspace
from cutloss.cli.bench.products import products
from cutloss.cli.bench.rivals import first_line
from cutloss.cli.usage import UserError


@dataclasses.dataclass
class Settings:
    passes: list[str]
    rounds: int
    measures_memory: bool = True
    measures_errors: bool = True
    pause: float = 0.0  # seconds before each timed call
    first_call_limit: float | None = None  # seconds
    lists_kernels: bool = False


@dataclasses.dataclass
class Result:
    """Of one method and pass; None is what was not measured. Memory in bytes."""

    method: Method  # with its workspace in MiB
    decision: Plan | None = None
    ms: float | None = None
    first_ms: float | None = None
    peak: int | None = None  # over inputs and gradients
    total: int | None = None  # over inputs
    outside: int | None = None
    kept: int | None = None
    de_err: float | None = None
    dc_err: float | None = None
    loss_err: float | None = None
    nll_err: float | None = None
    kernels: list[dict] | None = None


@dataclasses.dataclass
class Measured:
    gemm_ms: float
    reference: str | None  # the dtype that errors are against
    results: dict[tuple[Method, str], Result]


def measure(case, methods, settings, report):
    """Everything about one case, or None where no method is left."""
    results = _planned(case, methods, settings.passes, report)
    if not results:
        return None
    if any(method.name.endswith("compile") for method, _ in results):
        torch.compiler.reset()  # PyTorch compiles a function for a few shapes, and then no longer
    tensors = (*inputs(case), bias_of(case))
    if case.data == "softmax":
        report.note(softmax.describe(*tensors[:3]))
    leaves_of = {pass_name: leaves(tensors, pass_name) for pass_name in settings.passes}
    units = products(case, *tensors[:2])
    for unit in units.values():  # loads the library, makes its workspace
        unit()

    expected = _reference(case, tensors, settings, report)
    for (method, pass_name), result in list(results.items()):
        try:
            with time_limit(settings.first_call_limit):
                _first_call(case, pass_name, result, leaves_of[pass_name], expected)
            if expected and pass_name == "fw":
                _row_losses(case, result, leaves_of[pass_name], expected, report)
            if settings.measures_memory:
                _memory(case, pass_name, result, leaves_of[pass_name])
            continue
        except Exception as error:  # whatever a rival raises
            reason = first_line(error)
        del results[method, pass_name]
        report.note(f"{method.label} failed, {pass_name}: {reason}")
        clean_up(method.label, case.device, leaves_of[pass_name])
    reference = str(expected.dtype).removeprefix("torch.") if expected else None
    del expected
    if not results:
        return None
    gemm_ms = _times(case, results, units, leaves_of, settings, report)
    if settings.lists_kernels:
        for (method, pass_name), result in results.items():
            of_pass = leaves_of[pass_name]
            call = functools.partial(run_pass, result.method, case, pass_name, *of_pass)
            result.kernels = kernels.of_call(call)
            forget_gradients(*of_pass)
            report.kernels(method, pass_name, result.kernels, gemm_ms)
    return Measured(gemm_ms, reference, results) if results else None


def _planned(case, methods, passes, report):
    """{(method, pass): Result} of what can be measured; a line for all else."""
    results, left_out = {}, {}
    for pass_name in passes:
        for method in methods:
            if pass_name == "fw":  # has no schedule: once for all of them
                method = dataclasses.replace(method, schedule="auto")
            result, reason = Result(method), cannot(method, case)
            if method.name == "cutloss":
                try:
                    result.method = with_workspace(case, method, pass_name)
                    result.decision = decide(case, result.method, pass_name)
                except Refusal as error:
                    reason = str(error)
            if reason:
                among = left_out.setdefault((method, reason), [])
                among += [] if pass_name in among else [pass_name]
            else:
                results[method, pass_name] = result
    for (method, reason), among in left_out.items():
        report.note(f"{method.label} is left out, {', '.join(among)}: {reason}")
    return results


def _reference(case, tensors, settings, report):
    if not settings.measures_errors:
        return None
    dtype = errors.reference_dtype(case)
    if dtype is None:
        report.note("errors are left out: the reference would be too large")
        return None
    return errors.reference(case, tensors, dtype)


def _first_call(case, pass_name, result, tensors, expected):
    """Its time, what it leaves in memory, and the errors of what it returns."""
    meter = device_memory.Meter() if case.device == "cuda" else None
    if meter:
        meter.start()
    seconds, loss = timing.wall_seconds(
        lambda: run_pass(result.method, case, pass_name, *tensors), case.device
    )
    result.first_ms = 1e3 * seconds
    if expected:
        result.loss_err = errors.loss_error(loss.item(), expected)
        gradients = (tensors[0].grad, tensors[1].grad)
        result.de_err, result.dc_err = errors.errors_of(gradients, (expected.de, expected.dc))
    del loss
    forget_gradients(*tensors)
    if meter:
        result.kept = max(0, meter.added().kept)


def _row_losses(case, result, tensors, expected, report):
    try:
        result.nll_err = errors.row_error(result.method, case, tensors, expected)
    except Exception as error:  # the mean is measured all the same
        report.note(f"{result.method.label} gives no losses by row: {first_line(error)}")


def _memory(case, pass_name, result, tensors):
    if case.device == "cpu":
        threads = torch.get_num_threads()
        result.peak = memory.peak_bytes(case, result.method, pass_name, threads)
        if result.peak is not None:
            result.total = result.peak + case.gradient_bytes(pass_name)
        return
    meter = device_memory.Meter()
    meter.start()
    run_pass(result.method, case, pass_name, *tensors)
    added = meter.added()
    forget_gradients(*tensors)
    result.total = added.peak
    result.outside = added.outside
    result.peak = max(0, added.peak - case.gradient_bytes(pass_name))


def _times(case, results, units, leaves_of, settings, report):
    """Fills in the times, drops what fails; returns that of the unit."""
    failures = {}

    def once(key, method, tensors):
        if key in failures:
            return
        try:
            run_pass(method, case, key[1], *tensors)
        except Exception as error:  # out of memory, between the others
            failures[key] = first_line(error)
        forget_gradients(*tensors)

    calls = {
        key: functools.partial(once, key, result.method, leaves_of[key[1]])
        for key, result in results.items()
    }
    # Everything is divided by the unit's time.
    twice = tuple(units) if case.device == "cuda" else ()
    count = len(calls) + len(units) + len(twice)
    with report.progress(case.label, count, settings.rounds) as advance:
        ms = timing.time_rounds(
            {**calls, **units},
            settings.rounds,
            case.device,
            case.seed,
            advance,
            settings.pause,
            twice,
        )
    for (method, pass_name), reason in failures.items():
        del results[method, pass_name]
        report.note(f"{method.label} failed, {pass_name}: {reason}")
        clean_up(method.label, case.device, leaves_of[pass_name])
    for key, result in results.items():
        result.ms = ms[key]
    flops = 2 * case.N * case.D * case.V
    shown = (f"{name} {ms[name]:.2f} ms, {flops / ms[name] / 1e9:.1f} TFLOP/s" for name in units)
    report.note("E·Cᵀ: " + "; ".join(shown))
    return min(ms[name] for name in units)


def clean_up(label, device, tensors):
    """After a failure: its tensors go. A fault on the device ends everything."""
    forget_gradients(*tensors)
    gc.collect()
    if device != "cuda":
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        raise UserError(
            f"{label} left the device unusable ({first_line(error)}); run again without it"
        ) from None


@contextlib.contextmanager
def time_limit(seconds):
    """Raises TimeoutError in the middle of what takes longer."""
    if seconds is None:
        yield
        return

    def stop(*_):
        raise TimeoutError(f"its first call took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

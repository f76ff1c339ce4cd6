"""Losses over logits that exist, against a copy of the logits: cutloss bench --logits.

The unit is `copy`, PyTorch's copy of the logits to other memory: one read and one write, which is
what a loss with its gradient cannot do without.

Every method gets the logits as the output of something that wants their gradient and drops it. Some
write the gradient over the logits: the next call then finds that there, and takes as long.
"""

import functools

import torch
import torch.nn.functional as F

from cutloss import cross_entropy
from cutloss.cli.bench import device_memory, record, rivals, timing

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PASSES = ("fw", "fwbw")
ROWS = 64  # whose gradient is compared with one in fp64


def _torch(z, targets):
    return F.cross_entropy(z, targets)


def _torch_fp32(z, targets):
    return F.cross_entropy(z.float(), targets)


@functools.cache
def _compiled(function):
    return torch.compile(function)


def _liger(z, targets):
    from liger_kernel.transformers.functional import liger_cross_entropy

    loss = liger_cross_entropy(z, targets)
    return loss[0] if isinstance(loss, tuple) else loss


METHODS = {
    "cutloss": cross_entropy,
    "cutloss_consumed": functools.partial(cross_entropy, consume_logits=True),
    "torch": _torch,
    "torch_fp32": _torch_fp32,
    "compile": lambda z, targets: _compiled(_torch)(z, targets),
    "compile_fp32": lambda z, targets: _compiled(_torch_fp32)(z, targets),
    "liger": _liger,
}
ABOUT = {
    "cutloss": "cutloss.cross_entropy",
    "cutloss_consumed": "the same with consume_logits: the gradient over the logits",
    "torch": "F.cross_entropy of the logits as they are",
    "torch_fp32": "F.cross_entropy of logits.float(), as transformers has it",
    "compile": "torch under torch.compile",
    "compile_fp32": "torch_fp32 under torch.compile",
    "liger": "liger-kernel's cross-entropy in Triton, which writes over the logits",
}


def missing(name, device):
    """Why a method cannot be run here, or None."""
    if name == "liger":
        return rivals.lacks("liger-kernel", "liger_kernel", device)
    return None


class _Source(torch.autograd.Function):
    """Logits that something has computed, as far as autograd knows."""

    @staticmethod
    def forward(ctx, wish, logits, kept):
        ctx.kept = kept
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx, gradient):
        ctx.kept.append(gradient)
        return None, None, None


def _call(method, z, targets, pass_name):
    """Loss, and the gradient where the pass makes one."""
    if pass_name == "fw":
        with torch.no_grad():
            return method(z.data, targets), None
    kept = []
    wish = torch.empty((), device=z.device, requires_grad=True)
    loss = method(_Source.apply(wish, z.data, kept), targets)
    loss.backward()
    return loss, kept[0]


def _gradient_error(gradient, before, targets):
    """||a - b|| / ||b|| over a few rows; `before`: their logits."""
    rows = len(before)
    want = before.double().softmax(-1)
    want[torch.arange(rows), targets[:rows]] -= 1
    want /= len(targets)
    return ((gradient[:rows].double() - want).norm() / want.norm()).item()


def measure(N, V, dtype, device, names, passes, settings, report):
    """(copy's milliseconds, {(method, pass): its numbers})."""
    random = torch.Generator(device).manual_seed(settings.seed)
    fresh = functools.partial(torch.randn, N, V, device=device, dtype=DTYPES[dtype])
    z = fresh(generator=random)
    targets = torch.randint(0, V, (N,), device=device, generator=random)
    first_rows = z[:ROWS].clone()
    results, calls = {}, {}
    for pass_name in passes:
        for name in names:
            if name == "cutloss_consumed" and pass_name == "fw":  # without a gradient nothing is
                continue
            call = functools.partial(_call, METHODS[name], z, targets, pass_name)
            z[:ROWS] = first_rows  # an earlier method may have written over them
            try:
                seconds, (_, gradient) = timing.wall_seconds(call, device)
                found = {"first_ms": round(1e3 * seconds, 2), "gradient_err": None}
                if gradient is not None:
                    found["gradient_err"] = _gradient_error(gradient, first_rows, targets)
                del gradient
                found["peak_mib"] = _peak(call) if device == "cuda" else None
            except Exception as error:  # whatever a rival raises
                report.note(f"{name} failed, {pass_name}: {rivals.first_line(error)}")
                continue
            results[name, pass_name], calls[name, pass_name] = found, call
    other = torch.empty_like(z)
    calls["copy"] = functools.partial(other.copy_, z)
    with report.progress(f"N {N}, V {V}, {dtype}", len(calls), settings.rounds) as progress:
        times = timing.time_rounds(
            calls, settings.rounds, device, settings.seed, progress, settings.pause
        )
    for key, found in results.items():
        found["ms"] = times[key]
    return times["copy"], results


def _peak(call):
    meter = device_memory.Meter()
    meter.start()
    kept = call()
    added = meter.added()
    del kept
    return round(added.peak / 2**20, 2)


def run(args, shapes):
    """[line of a result file], shown on the way."""
    from cutloss.cli.bench import report

    names = []
    for name in METHODS:
        reason = missing(name, args.device)
        if reason:
            report.note(f"{name} is left out: {reason}")
        else:
            names.append(name)
    packages = ["liger-kernel"] if "liger" in names else []
    shared = record.surroundings(args.device, torch.get_num_threads(), packages)
    report.heading(shared)
    for sentence in filter(None, map(rivals.another_version, packages)):
        report.note(sentence)
    lines = []
    for N, _, V in shapes:
        for dtype in args.dtype:
            if any(name.startswith("compile") for name in names):
                torch.compiler.reset()
            copy_ms, results = measure(
                N, V, dtype, args.device, names, args.passes, args, report
            )
            size = DTYPES[dtype].itemsize
            shown = [
                {
                    **shared,
                    "N": N,
                    "V": V,
                    "dtype": dtype,
                    "method": name,
                    "pass": pass_name,
                    "ms": round(found["ms"], 4),
                    "copy_ms": round(copy_ms, 4),
                    "copies": round(found["ms"] / copy_ms, 4),
                    "peak_mib": found["peak_mib"],
                    "first_ms": found["first_ms"],
                    "gradient_err": found["gradient_err"],
                }
                for (name, pass_name), found in results.items()
            ]
            rate = 2 * N * V * size / copy_ms / 1e6
            report.logits_table(f"logits N {N}, V {V}, {dtype}", copy_ms, rate, shown)
            lines += shown
    return lines

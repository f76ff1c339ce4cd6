"""cutloss bench: time, memory and errors of the loss against plain PyTorch."""

import json
import pathlib
import shlex
import sys

import torch

from cutloss._bench import errors, memory, record, timing
from cutloss._bench.cases import DATA, DTYPES, PASSES, Case
from cutloss._bench.methods import METHODS, Method, missing
from cutloss._bench.plan import Refusal, decide
from cutloss._cli import UserError, check_device, count, needed, shape

SCHEDULES = ("auto", "rows", "vocabulary")
DEFAULT_WORKSPACE_MIB = 512  # cutloss::kDefaultWorkspace
PICTURES = (".png", ".svg", ".pdf")
DEFAULT_SHAPE = (512, 768, 50257)  # GPT-2's, with few rows


def add_arguments(parser):
    add = parser.add_argument
    add("--model", action="append", default=[], metavar="NAME", help="the shape of a named model")
    add("--rows", type=count, metavar="N", help="rows of the named models, instead of their own")
    add("--shape", type=shape, action="append", default=[], metavar="N,D,V")
    add("--list-models", action="store_true", help="list the named models and stop")
    add("--dtype", nargs="+", choices=DTYPES, default=["fp32"])
    add("--data", nargs="+", choices=DATA, default=["randn"])
    add("--passes", nargs="+", choices=PASSES, default=["fw", "fwbw"])
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--schedule", nargs="+", choices=SCHEDULES, default=["auto"], help="cutloss: the schedules")
    add(
        "--max-workspace",
        nargs="+",
        type=count,
        default=[None],
        metavar="MIB",
        help=f"cutloss: granted workspaces (not given: {DEFAULT_WORKSPACE_MIB})",
    )
    add("--rounds", type=count, default=5, help="rounds after the warm-up (default 5)")
    add("--threads", type=count, help="CPU threads (default: PyTorch's)")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--seed", type=int, default=0)
    add("--no-memory", action="store_true", help="leave the peak memory out")
    add("--no-errors", action="store_true", help="leave the errors against fp64 out")
    add("--json", metavar="FILE", help="append one line for each measurement")
    add("--plot", metavar="FILE", help="write a picture (PNG, SVG or PDF by its name)")


def named_models():
    text = (pathlib.Path(__file__).parent / "data" / "models.json").read_text()
    return {name: (m["N"], m["D"], m["V"]) for name, m in json.loads(text).items()}


def run(args):
    if args.list_models:
        for name, (N, D, V) in named_models().items():
            print(f"{name:18} N {N:6}  D {D:5}  V {V:7}")
        return 0
    needed("rich", *(["matplotlib"] if args.plot else []))
    check_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    shapes = _shapes(args)
    methods = _methods(args)
    _check_files(args)
    from cutloss._bench import report

    shared = record.surroundings(args.device, torch.get_num_threads())
    shared["command"] = shlex.join(["cutloss", *args.argv])
    report.heading(shared)
    records = []
    for N, D, V in shapes:
        for dtype in args.dtype:
            for data in args.data:
                case = Case(N, D, V, dtype, data, args.device, args.seed)
                measured = measure(case, methods, args, shared, report)
                report.table(case, measured)
                if args.json:
                    record.append(args.json, [line for _, line in measured])
                records += measured
    if args.plot:
        report.plot(args.plot, records)
        print(f"plot: {args.plot}")
    if args.json:
        print(f"{len(records)} lines appended to {args.json}")
    return 0


def measure(case, methods, args, shared, report):
    """[(method, record)] of one case."""
    decisions, refused = {}, set()
    for method in methods:
        for which in args.passes:
            if method.name != "cutloss":
                continue
            try:
                decisions[method, which] = decide(case, method, which)
            except Refusal as error:
                refused.add(method)
                report.note(f"{method.label} is left out, {which}: {error}")
    methods = [method for method in methods if method not in refused]
    if not methods:
        raise UserError(f"no method is left to measure for {case.label}")

    with report.progress(case, len(methods), len(args.passes), args.rounds) as advance:
        ms, unit_ms = timing.time_case(case, methods, args.passes, args.rounds, advance)
    unit = min(unit_ms, key=unit_ms.get)
    report.note("E·Cᵀ: " + ", ".join(f"{name} {t:.2f} ms" for name, t in unit_ms.items()))

    reference = None
    if not args.no_errors and set(args.passes) != {"fw"}:
        if errors.size_allows(case):
            reference = errors.reference_gradients(case)
        else:
            report.note("errors are left out: the fp64 reference would be too large")

    measured = []
    for which in args.passes:
        for method in methods:
            decision = decisions.get((method, which))
            de_err = dc_err = None
            if reference and which != "fw":
                de_err, dc_err = errors.gradient_errors(method, case, which, reference)
            peak = None
            if not args.no_memory:
                peak = memory.peak_bytes(case, method, which, torch.get_num_threads())
            line = {
                **shared,
                "N": case.N,
                "D": case.D,
                "V": case.V,
                "dtype": case.dtype,
                "data": case.data,
                "method": method.name,
                "engine": decision.engine if decision else "torch",
                "gradient": "exact",
                "schedule": decision.schedule if decision else "none",
                "workspace_mib": _granted(method),
                "pass": which,
                "ms": round(ms[method, which], 4),
                "gemm_ms": round(unit_ms[unit], 4),
                "gemms": round(ms[method, which] / unit_ms[unit], 4),
                "peak_mib": None if peak is None else round(peak / 2**20, 2),
                "de_err": de_err,
                "dc_err": dc_err,
            }
            measured.append((method, {key: line[key] for key in record.KEYS}))
    return measured


def _granted(method):
    if method.name != "cutloss":
        return None
    return method.max_workspace_mib or DEFAULT_WORKSPACE_MIB


def _shapes(args):
    models = named_models()
    shapes = list(args.shape)
    for name in args.model:
        if name not in models:
            raise UserError(f"--model {name} is not known; known are {', '.join(models)}")
        N, D, V = models[name]
        shapes.append((args.rows or N, D, V))
    if args.rows and not args.model:
        raise UserError("--rows goes with --model; --shape N,D,V names its rows itself")
    return shapes or [DEFAULT_SHAPE]


def _methods(args):
    methods = []
    for name in args.methods:
        if name == "cutloss":
            methods += [Method(name, s, w) for s in args.schedule for w in args.max_workspace]
            continue
        reason = missing(name)
        if reason:
            print(f"{name} is left out: {reason}", file=sys.stderr)
        else:
            methods.append(Method(name))
    if not methods:
        raise UserError("no method is left to measure")
    return methods


def _check_files(args):
    """Before anything is measured: what cannot be written would be lost."""
    if args.json:
        try:
            record.append(args.json, [])
        except OSError as error:
            raise UserError(f"--json {args.json} cannot be written: {error.strerror}") from None
    if args.plot:
        folder, kind = pathlib.Path(args.plot).parent, pathlib.Path(args.plot).suffix
        if not folder.is_dir():
            raise UserError(f"--plot {args.plot} cannot be written: {folder} is not a folder")
        if kind not in PICTURES:
            raise UserError(f"--plot must end in {', '.join(PICTURES)}, got {args.plot!r}")

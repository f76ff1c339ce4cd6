"""cutloss bench: time, memory and errors of the loss against plain PyTorch and other projects."""

import dataclasses
import json
import pathlib
import shlex

import torch

from cutloss.cli.bench import logits, record, rivals
from cutloss.cli.bench.arguments import DEFAULT_DTYPES, DEFAULT_WORKSPACE_MIB, add_arguments
from cutloss.cli.bench.cases import Case
from cutloss.cli.bench.measure import Settings, measure
from cutloss.cli.bench.methods import DEFAULT_METHODS, METHODS, Method, missing
from cutloss.cli.bench.train_models import TRAIN_DTYPES
from cutloss.cli.usage import UserError, check_device, needed

__all__ = ["add_arguments", "named_models", "run"]
PICTURES = (".png", ".svg", ".pdf")
DEFAULT_SHAPE = (512, 768, 50257)  # GPT-2's, with few rows
# Options that some ways to measure have no use for, and what they are where nobody gave them.
OF_A_LOSS = dict(methods=None, data=["randn"], schedule=["auto"], max_workspace=[None])
OF_A_LOSS |= dict(engines=[None], ignored=[0.0], options=["none"], kernels=False)
OF_TRAINING = dict(tokens=None, sequence=None, layers=None, variants=None)


def named_models():
    text = (pathlib.Path(__file__).parents[1] / "data" / "models.json").read_text()
    return {name: (m["N"], m["D"], m["V"]) for name, m in json.loads(text).items()}


def run(args):
    if args.list_models:
        for name, (N, D, V) in named_models().items():
            print(f"{name:18} N {N:6}  D {D:5}  V {V:7}")
        return 0
    needed("rich", *(["matplotlib"] if args.plot else []))
    check_device(args.device)
    if args.kernels and args.device != "cuda":
        raise UserError("--kernels lists what runs on a GPU: it goes with --device cuda")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.dtype = args.dtype or DEFAULT_DTYPES[args.train]
    settings = Settings(
        passes=args.passes,
        rounds=args.rounds,
        measures_memory=not args.no_memory,
        measures_errors=not args.no_errors,
        pause=args.pause,
        first_call_limit=args.first_call_limit,
        lists_kernels=args.kernels,
    )
    if args.train:
        return _run_train(args, settings)
    _refuse(args, "without --train", OF_TRAINING)
    shapes = _shapes(args)
    _check_files(args)
    if args.logits:
        return _run_logits(args, shapes)
    from cutloss.cli.bench import report

    methods = _methods(args, report)
    packages = {method.kind.package for method in methods} - {"torch"}
    shared = record.surroundings(args.device, torch.get_num_threads(), sorted(packages))
    shared["command"] = shlex.join(["cutloss", *args.argv])
    report.heading(shared)
    for sentence in filter(None, map(rivals.another_version, sorted(packages))):
        report.note(sentence)
    records = []
    try:
        for case in _cases(args, shapes):
            records += _case(case, methods, settings, shared, args.json)
    finally:  # what ends the run does not take what was measured along
        if args.plot and records:
            report.plot(args.plot, records)
    if not records:
        raise UserError("no method was left to measure")
    if args.plot:
        print(f"plot: {args.plot}")
    if args.json:
        print(f"{len(records)} lines appended to {args.json}")
    return 0


def _refuse(args, where, defaults):
    """Not every option has a meaning everywhere: one that would be passed over is refused."""
    for name, default in defaults.items():
        if getattr(args, name) != default:
            raise UserError(f"--{name.replace('_', '-')} has no meaning {where}: leave it out")


def _refuse_values(args, where, known_by_name):
    for name, known in known_by_name.items():
        unknown = [value for value in getattr(args, name) if value not in known]
        if unknown:
            raise UserError(
                f"--{name} {unknown[0]} has no meaning {where}, which takes {', '.join(known)}"
            )


def _run_train(args, settings):
    where = "with --train"
    _refuse_values(args, where, {"dtype": TRAIN_DTYPES})
    _refuse(args, where, OF_A_LOSS)
    of_shapes = dict(logits=False, shape=[], rows=None, passes=["fw", "fwbw"], no_errors=False)
    _refuse(args, where, of_shapes)
    needed("transformers", install="transformers")
    _check_files(args)
    from cutloss.cli.bench import train

    lines = train.run(args, settings)
    if args.plot:
        print(f"plot: {args.plot}")
    if args.json:
        print(f"{len(lines)} lines appended to {args.json}")
    return 1 if any(line["is_wrong"] for line in lines) else 0


def _run_logits(args, shapes):
    where = "with --logits"
    _refuse_values(args, where, {"dtype": logits.DTYPES, "passes": logits.PASSES})
    _refuse(args, where, OF_A_LOSS | dict(plot=None))
    lines = logits.run(args, shapes)
    for line in lines:
        line["command"] = shlex.join(["cutloss", *args.argv])
    if not lines:
        raise UserError("no method was left to measure")
    if args.json:
        record.append(args.json, lines)
        print(f"{len(lines)} lines appended to {args.json}")
    return 0


def _case(case, methods, settings, shared, path):
    """[(method, record)] of a case, shown and written."""
    from cutloss.cli.bench import report

    measured = measure(case, _for_case(case, methods), settings, report)
    if measured is None:
        report.note(f"no method is left to measure for {case.label}")
        return []
    lines = _lines(case, measured, shared)
    report.table(case, lines)
    if path:
        record.append(path, [line for _, line in lines])
    return lines


def _cases(args, shapes):
    for N, D, V in shapes:
        for dtype in args.dtype:
            for data in args.data:
                for ignored in args.ignored:
                    for options in args.options:
                        options = "" if options == "none" else options
                        device, seed = args.device, args.seed
                        yield Case(N, D, V, dtype, data, device, seed, ignored, options)


def _for_case(case, methods):
    """Where rows are ignored, cutloss is also told how many are not."""
    if not case.ignored:
        return methods
    found = []
    for method in methods:
        found.append(method)
        if method.name == "cutloss":
            found.append(dataclasses.replace(method, num_valid=True))
    return found


def _lines(case, measured, shared):
    """[(method, record)], by pass."""
    lines = []
    for (method, pass_name), r in measured.results.items():
        line = {
            **shared,
            "N": case.N,
            "D": case.D,
            "V": case.V,
            "dtype": case.dtype,
            "data": case.data,
            "method": method.name,
            "engine": r.decision.engine if r.decision else method.kind.package,
            "gradient": method.kind.gradient,
            "schedule": r.decision.schedule if r.decision else "none",
            "workspace_mib": _granted(r.method),
            "pass": pass_name,
            "ms": round(r.ms, 4),
            "gemm_ms": round(measured.gemm_ms, 4),
            "gemms": round(r.ms / measured.gemm_ms, 4),
            "peak_mib": record.mib(r.peak),
            "de_err": r.de_err,
            "dc_err": r.dc_err,
            "first_ms": round(r.first_ms, 2),
            "total_mib": record.mib(r.total),
            "outside_mib": record.mib(r.outside),
            "kept_mib": record.mib(r.kept),
            "loss_err": r.loss_err,
            "nll_err": r.nll_err,
            "reference": measured.reference,
            "ignored": case.ignored,
            "num_valid": method.num_valid,
            "options": case.options,
            "kernels": r.kernels,
            "variant": method.label,
        }
        lines.append((method, {key: line[key] for key in (*record.KEYS, *record.OPTIONAL)}))
    return lines


def _granted(method):
    if method.name != "cutloss":
        return None
    return DEFAULT_WORKSPACE_MIB if method.max_workspace_mib is None else method.max_workspace_mib


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


def _methods(args, report):
    names = args.methods or DEFAULT_METHODS[args.device]
    names = METHODS if "all" in names else names
    methods = []
    for name in names:
        reason = missing(name, args.device)
        if reason:
            report.note(f"{name} is left out: {reason}")
        elif name == "cutloss":
            methods += [
                Method(name, schedule, workspace, engine)
                for engine in args.engines
                for schedule in args.schedule
                for workspace in args.max_workspace
            ]
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

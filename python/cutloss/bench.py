"""cutloss bench: time, memory and errors of the loss against plain PyTorch and other projects."""

import argparse
import json
import pathlib
import re
import shlex

import torch

from cutloss._bench import record, rivals
from cutloss._bench.cases import ALL_DATA, DTYPES, OPTIONS, PASSES, Case
from cutloss._bench.measure import Settings, measure
from cutloss._bench.methods import (
    DEFAULT_METHODS,
    ENGINE_VARIABLE,
    LOSSES,
    METHODS,
    Method,
    missing,
    takes_num_valid,
)
from cutloss._bench.plan import WORKSPACES
from cutloss._cli import UserError, check_device, count, needed, seconds, shape

SCHEDULES = ("auto", "rows", "vocabulary")
DEFAULT_WORKSPACE_MIB = 512  # cutloss::kDefaultWorkspace
PICTURES = (".png", ".svg", ".pdf")
DEFAULT_SHAPE = (512, 768, 50257)  # GPT-2's, with few rows
UNITS = {"": 1, "mib": 1, "gib": 1024, "m": 1, "g": 1024}


class _Lists(argparse.Action):
    """Values that are lists themselves, one after the other."""

    def __call__(self, parser, namespace, values, option_string=None):
        flat = [value for part in values for value in part]
        setattr(namespace, self.dest, flat)


class _MoreLists(_Lists):
    """The same for an option that may be given several times."""

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest)
        super().__call__(parser, namespace, values)
        setattr(namespace, self.dest, [*before, *getattr(namespace, self.dest)])


def add_arguments(parser):
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "methods:\n" + "\n".join(
        f"  {name:18} {loss.about}" for name, loss in LOSSES.items()
    )
    add = parser.add_argument
    add("--model", action="append", default=[], metavar="NAME", help="the shape of a named model")
    add("--rows", type=count, metavar="N", help="rows of the named models, instead of their own")
    add(
        "--shape",
        "--shapes",
        type=_shapes_in,
        nargs="+",
        action=_MoreLists,
        default=[],
        metavar="N,D,V",
        help="one or more, separated by spaces or semicolons",
    )
    add("--list-models", action="store_true", help="list the named models and stop")
    _add_list(add, "--dtype", DTYPES, ["fp32"], "Of E and C; autocast: C is fp32")
    _add_list(add, "--data", ALL_DATA, ["randn"], "softmax: generated, like a trained model's")
    _add_list(add, "--passes", PASSES, ["fw", "fwbw"], "frozen: C gets no gradient")
    _add_list(
        add,
        "--methods",
        (*METHODS, "all"),
        None,
        f"see below (CPU: {', '.join(DEFAULT_METHODS['cpu'])}; CUDA: all)",
        metavar="NAME",
    )
    _add_list(add, "--schedule", SCHEDULES, ["auto"], "For cutloss", "--schedules")
    add(
        "--max-workspace",
        "--memory",
        nargs="+",
        action=_Lists,
        type=_workspaces,
        default=[None],
        metavar="MIB",
        help=f"cutloss: granted workspaces, as 64, 64MiB, 1GiB; smallest: the least there is a "
        f"plan for; logits: enough for all of them (not given: {DEFAULT_WORKSPACE_MIB})",
    )
    add(
        "--engines",
        nargs="+",
        action=_Lists,
        type=_words,
        default=[None],
        metavar="NAME",
        help=f"cutloss: only these, through {ENGINE_VARIABLE}; auto: as planned",
    )
    add(
        "--ignored",
        nargs="+",
        action=_Lists,
        type=_fractions,
        default=[0.0],
        metavar="PART",
        help="the part of the targets that is ignored, such as 0,0.5; cutloss is measured with "
        "and without num_valid",
    )
    _add_list(
        add,
        "--options",
        ("none", *_option_sets()),
        ["none"],
        f"what the loss has besides: none, or of {', '.join(OPTIONS)} some joined by +; methods "
        "that lack it are left out",
        metavar="NAME",
    )
    add("--rounds", type=count, default=5, help="rounds after the warm-up (default 5)")
    add("--pause", type=seconds, default=0.0, metavar="S", help="wait before each timed call")
    add(
        "--first-call-limit",
        type=seconds,
        metavar="S",
        help="leave out what takes longer to compile and tune",
    )
    add("--threads", type=count, help="CPU threads (default: PyTorch's)")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--seed", type=int, default=0)
    add("--no-memory", action="store_true", help="leave the peak memory out")
    add("--no-errors", action="store_true", help="leave the errors against fp64 out")
    add("--json", metavar="FILE", help="append one line for each measurement")
    add("--plot", metavar="FILE", help="write a picture (PNG, SVG or PDF by its name)")


def _add_list(add, name, choices, default, help, *aliases, metavar=None):
    """An option of one or more names, separated by spaces or commas."""
    if metavar is None:
        metavar, help = "NAME", f"{', '.join(choices)} (default {','.join(default)}). {help}"

    def names(text):
        found = [part for part in text.split(",") if part]
        for part in found:
            if part not in choices:
                raise argparse.ArgumentTypeError(
                    f"invalid choice: {part!r} (choose from {', '.join(choices)})"
                )
        return found

    add(
        name,
        *aliases,
        nargs="+",
        action=_Lists,
        type=names,
        default=default,
        metavar=metavar,
        help=help,
    )


def _option_sets():
    names = tuple(OPTIONS)
    sets = [()]
    for name in names:
        sets += [(*part, name) for part in sets]
    return tuple("+".join(part) for part in sets if part)


def _shapes_in(text):
    return [shape(part) for part in text.split(";") if part.strip()]


def _words(text):
    return [None if part == "auto" else part for part in text.split(",") if part]


def _fractions(text):
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [-1.0]
    if not all(0 <= part < 1 for part in found):
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, got {text!r}")
    return found


def _workspaces(text):
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(\w*)", part)
        if part in WORKSPACES:
            found.append(part)
        elif match and match[2].lower() in UNITS and float(match[1]) > 0:
            mib = float(match[1]) * UNITS[match[2].lower()]
            found.append(int(mib) if mib == int(mib) else mib)
        else:
            raise argparse.ArgumentTypeError(
                f"must be MiB (64, 64MiB, 1GiB) or one of {', '.join(WORKSPACES)}, got {part!r}"
            )
    return found


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
    _check_files(args)
    from cutloss._bench import report

    methods = _methods(args, report)
    packages = {method.kind.package for method in methods} - {"torch"}
    shared = record.surroundings(args.device, torch.get_num_threads(), sorted(packages))
    shared["command"] = shlex.join(["cutloss", *args.argv])
    report.heading(shared)
    for sentence in filter(None, map(rivals.another_version, sorted(packages))):
        report.note(sentence)
    settings = Settings(
        passes=args.passes,
        rounds=args.rounds,
        measures_memory=not args.no_memory,
        measures_errors=not args.no_errors,
        pause=args.pause,
        first_call_limit=args.first_call_limit,
    )
    records = []
    for case in _cases(args, shapes):
        measured = measure(case, _for_case(case, methods, report), settings, report)
        if measured is None:
            raise UserError(f"no method is left to measure for {case.label}")
        lines = _lines(case, measured, shared)
        report.table(case, lines)
        if args.json:
            record.append(args.json, [line for _, line in lines])
        records += lines
        if args.plot:  # after each case: a later one may end the run
            report.plot(args.plot, records)
    if args.plot:
        print(f"plot: {args.plot}")
    if args.json:
        print(f"{len(records)} lines appended to {args.json}")
    return 0


def _cases(args, shapes):
    for N, D, V in shapes:
        for dtype in args.dtype:
            for data in args.data:
                for ignored in args.ignored:
                    for options in args.options:
                        options = "" if options == "none" else options
                        device, seed = args.device, args.seed
                        yield Case(N, D, V, dtype, data, device, seed, ignored, options)


def _for_case(case, methods, report):
    """Where rows are ignored, cutloss is also told how many are not."""
    if not case.ignored:
        return methods
    if not takes_num_valid():
        report.note("cutloss with num_valid is left out: this version has no such argument")
        return methods
    found = []
    for m in methods:
        found.append(m)
        if m.name == "cutloss":
            found.append(
                Method(m.name, m.schedule, m.max_workspace_mib, m.engine, num_valid=True)
            )
    return found


def _lines(case, measured, shared):
    """[(method, record)], by pass."""
    lines = []
    for (method, which), r in measured.results.items():
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
            "pass": which,
            "ms": round(r.ms, 4),
            "gemm_ms": round(measured.gemm_ms, 4),
            "gemms": round(r.ms / measured.gemm_ms, 4),
            "peak_mib": _mib(r.peak),
            "de_err": r.de_err,
            "dc_err": r.dc_err,
            "first_ms": round(r.first_ms, 2),
            "total_mib": _mib(r.total),
            "outside_mib": _mib(r.outside),
            "kept_mib": _mib(r.kept),
            "loss_err": r.loss_err,
            "nll_err": r.nll_err,
            "reference": measured.reference,
            "ignored": case.ignored,
            "num_valid": method.num_valid,
            "options": case.options,
            "variant": method.label,
        }
        lines.append((method, {key: line[key] for key in (*record.KEYS, *record.OPTIONAL)}))
    return lines


def _mib(number):
    return None if number is None else round(number / 2**20, 2)


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

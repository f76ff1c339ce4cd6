"""The arguments of cutloss bench."""

import argparse
import re

from cutloss.cli.bench import logits
from cutloss.cli.bench.cases import ALL_DATA, DTYPES, OPTIONS, PASSES
from cutloss.cli.bench.methods import DEFAULT_METHODS, ENGINE_VARIABLE, LOSSES, METHODS
from cutloss.cli.bench.plan import WORKSPACES
from cutloss.cli.bench.train_models import TRAIN_DTYPES, entries
from cutloss.cli.bench.variants import REFERENCE, VARIANTS
from cutloss.cli.usage import count, seconds, shape

DEFAULT_DTYPES = {False: ["fp32"], True: ["bf16"]}  # by whether whole models are trained
SCHEDULES = ("auto", "rows", "vocabulary")
DEFAULT_WORKSPACE_MIB = 512  # cutloss::kDefaultWorkspace
MIB_OF = {"": 1, "m": 1, "mib": 1, "g": 1024, "gib": 1024}


def add_arguments(parser):
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "\n".join(
        ["methods:"]
        + [f"  {name:18} {loss.about}" for name, loss in LOSSES.items()]
        + ["variants, of --train:"]
        + [f"  {name:18} {variant.about}" for name, variant in VARIANTS.items()]
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
    add(
        "--logits",
        action="store_true",
        help=f"losses over logits that exist instead, N and V of the shapes: "
        f"{', '.join(f'{name} ({about})' for name, about in logits.ABOUT.items())}",
    )
    add("--list-models", action="store_true", help="list the named models and stop")
    _add_training(add)
    _add_list(
        add,
        "--dtype",
        DTYPES,
        None,
        f"{', '.join(DTYPES)} (default {DEFAULT_DTYPES[False][0]}, with --train "
        f"{DEFAULT_DTYPES[True][0]} of {', '.join(TRAIN_DTYPES)}). Of E and C; autocast: C, the "
        f"parameters, are fp32",
        metavar="NAME",
    )
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
    _add_list(
        add,
        "--schedule",
        SCHEDULES,
        ["auto"],
        "For cutloss; a forward alone has none",
        "--schedules",
    )
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
    add("--kernels", action="store_true", help="CUDA: also list the kernels of a call, by time")
    add("--json", metavar="FILE", help="append one line for each measurement")
    add("--plot", metavar="FILE", help="write a picture (PNG, SVG or PDF by its name)")


def _add_training(add):
    add(
        "--train",
        action="store_true",
        help=f"training steps of whole models instead, random weights at the sizes of --model: "
        f"{', '.join(entries())} (default: all of them); needs transformers",
    )
    add("--tokens", type=count, help="--train: of a step (default 8192)")
    add("--sequence", type=count, help="--train: tokens of each sequence (default 1024, or fewer)")
    add(
        "--layers",
        type=count,
        help="--train: how many of the model's (default: all, on CUDA as many as fit)",
    )
    _add_list(
        add,
        "--variants",
        tuple(VARIANTS),
        None,
        f"--train: see below (default: all that can be run; {REFERENCE} is always measured)",
        metavar="NAME",
    )


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
        elif match and match[2].lower() in MIB_OF and float(match[1]) > 0:
            mib = float(match[1]) * MIB_OF[match[2].lower()]
            found.append(int(mib) if mib == int(mib) else mib)
        else:
            raise argparse.ArgumentTypeError(
                f"must be MiB (64, 64MiB, 1GiB) or one of {', '.join(WORKSPACES)}, got {part!r}"
            )
    return found


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

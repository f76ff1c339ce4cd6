"""The command line: cutloss demo | doctor | bench."""

import os
import sys

from cutloss.cli.usage import Parser, UserError


def build_parser():
    # Imported here, since the commands start modules of this package as programs
    # (python -m cutloss.cli.bench.memory), which must not be imported before they run.
    from cutloss.cli import doctor
    from cutloss.cli.bench import command as bench
    from cutloss.cli.demo import command as demo

    summary = "The loss of a large vocabulary, without the logits."
    parser = Parser(prog="cutloss", description=summary)
    commands = parser.add_subparsers(dest="command", required=True, metavar="demo|doctor|bench")
    summaries = {
        "demo": "train a small language model with cutloss and, beside it, with plain PyTorch",
        "doctor": "say what was found here, and which engine a loss would get",
        "bench": "measure time, memory and errors against plain PyTorch",
    }
    for (name, summary), module in zip(summaries.items(), (demo, doctor, bench), strict=True):
        command = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


# Where one of these is set, somebody decided how OpenMP's threads wait.
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def main(argv=None):
    """Returns the exit code: 0, 1 where something is broken, 2 where the arguments are wrong.

    Without `argv` this process is the command's own (`cutloss demo`), and may be started anew.
    """
    is_own_process = argv is None
    argv = sys.argv[1:] if is_own_process else list(argv)
    args = build_parser().parse_args(argv)
    args.argv = argv
    if is_own_process and args.command == "demo" and args.device == "cpu":
        _let_threads_sleep()
    try:
        return args.run(args)
    except UserError as error:
        print(f"cutloss {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"cutloss {args.command}: interrupted", file=sys.stderr)
        return 130


def _let_threads_sleep():
    """Starts this process anew with OMP_WAIT_POLICY=passive, unless how to wait is decided already.

    OpenMP's threads spin while they wait for each other. Beside another program they so keep the very
    thread that they wait for from running, and the demo takes several times as long. OpenMP reads the
    setting when it is loaded, and `import cutloss` has loaded it with PyTorch by now. The benchmark
    stays as a training process is: threads that sleep make its smallest calls slower on a quiet machine
    (benchmarks/results/2026-11-29-epyc-waiting.txt).
    """
    if any(name in os.environ for name in _WAITING):
        return
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

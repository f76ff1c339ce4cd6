"""The command line: cutloss demo | doctor | bench."""

import sys

from cutloss import bench, demo, doctor
from cutloss._cli import Parser, UserError

_COMMANDS = {
    "demo": (demo, "train a small language model with cutloss and, beside it, with plain PyTorch"),
    "doctor": (doctor, "say what was found here, and which engine a loss would get"),
    "bench": (bench, "measure time, memory and errors against plain PyTorch"),
}


def build_parser():
    summary = "The loss of a large vocabulary, without the logits."
    parser = Parser(prog="cutloss", description=summary)
    commands = parser.add_subparsers(dest="command", required=True, metavar="demo|doctor|bench")
    for name, (module, summary) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv=None):
    """Returns the exit code: 0, 1 where something is broken, 2 where the arguments are wrong."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = build_parser().parse_args(argv)
    args.argv = argv
    try:
        return args.run(args)
    except UserError as error:
        print(f"cutloss {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"cutloss {args.command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

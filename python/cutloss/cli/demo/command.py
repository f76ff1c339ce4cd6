"""cutloss demo: a small language model trained with cutloss and, beside it, with plain PyTorch."""

import pathlib

from cutloss.cli.usage import UserError, check_device, count, needed, seconds

LENGTH = 128  # tokens of a sequence
BATCH = 8  # sequences of a step
WIDTH = 192  # D
LAYERS = 4
LEARNING_RATE = 1e-3


def add_arguments(parser):
    add = parser.add_argument
    add("--steps", type=count, default=60, help="training steps (default 60)")
    add(
        "--seconds",
        type=seconds,
        default=60.0,
        help="stop training after this time, whatever --steps says (default 60)",
    )
    add("--vocab", type=count, default=32768, metavar="V", help="vocabulary (default 32768)")
    add("--text", metavar="FILE", help="train on this text (default: five novels that come along)")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16 is autocast (default fp32)")
    add(
        "--max-workspace",
        type=count,
        default=24,
        metavar="MIB",
        help="memory that the loss of cutloss may use (default 24)",
    )
    add("--no-compare", action="store_true", help="train with cutloss only")
    add("--out", default="cutloss-demo", metavar="DIR", help="folder of the picture")
    add("--seed", type=int, default=0)
    add("--batch", type=count, default=BATCH, help=f"sequences of a step (default {BATCH})")
    add("--length", type=count, default=LENGTH, help=f"tokens of a sequence (default {LENGTH})")


def run(args):
    needed("rich", "matplotlib")
    check_device(args.device)
    out = pathlib.Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made: {error.strerror}") from None

    import torch

    from cutloss.cli.bench import memory
    from cutloss.cli.bench.cases import Case
    from cutloss.cli.bench.methods import Method
    from cutloss.cli.demo import report, text, train

    words = text.read_text(args.text)
    vocabulary = text.Vocabulary.of(words, args.vocab)
    ids = vocabulary.encode(words)
    setting = train.Setting(
        V=vocabulary.size,
        D=WIDTH,
        layers=LAYERS,
        length=args.length,
        batch=args.batch,
        learning_rate=LEARNING_RATE,
        dtype=args.dtype,
        device=args.device,
        seed=args.seed,
    )
    methods = [Method("cutloss", max_workspace_mib=args.max_workspace)]
    if not args.no_compare:
        methods.append(Method("plain"))
    runs = [train.Run(method.name, flat(method.loss), setting) for method in methods]
    batches = train.Batches(ids, setting)
    report.opening(setting, vocabulary, ids, args.text, runs[0].model)

    with report.progress(runs, args.steps, setting) as show:
        train.train(runs, batches, args.steps, args.seconds, show)
    agreement = None
    if len(runs) == 2:
        agreement = train.agreement(runs[0], *(run.loss_function for run in runs), batches)

    dtype = "fp32" if args.dtype == "fp32" else "bf16-autocast"
    case = Case(setting.tokens, setting.D, setting.V, dtype, device=args.device, seed=args.seed)
    peaks = [memory.peak_bytes(case, m, "fwbw", torch.get_num_threads()) for m in methods]

    report.table(runs, peaks, agreement, args)
    picture = out / "cutloss-demo.png"
    report.plot(picture, runs, peaks, setting)
    print(f"picture: {picture}")
    return 0


def flat(loss):
    """The loss of all positions of a batch: E (batch, length, D), targets (batch, length)."""
    return lambda e, c, targets: loss(e.flatten(0, 1), c, targets.flatten())

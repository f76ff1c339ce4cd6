"""cutloss bench --train: training steps of whole models."""

import shlex

import torch

from cutloss.cli.bench import record, report, rivals, train_report
from cutloss.cli.bench.train_measure import measure
from cutloss.cli.bench.train_models import Shape, checked_layers, entries
from cutloss.cli.bench.variants import REFERENCE, VARIANTS
from cutloss.cli.usage import UserError

DEFAULT_TOKENS = 8192
DEFAULT_SEQUENCE = 1024


def run(args, settings):
    """[line of a result file], shown and written on the way; the picture at the end."""
    shapes = _shapes(args)
    names = _names(args)
    packages = {VARIANTS[name].package for name in names} - {"torch", "cutloss"}
    packages = sorted({"transformers", *packages})
    shared = record.surroundings(args.device, torch.get_num_threads(), packages)
    shared["command"] = shlex.join(["cutloss", *args.argv])
    report.heading(shared)
    for sentence in filter(None, map(rivals.another_version, packages)):
        report.note(sentence)
    lines = []
    try:
        for shape in shapes:
            lines += _of_shape(shape, names, settings, args, shared)
    finally:  # what ends the run does not take what was measured along
        if args.plot and lines:
            train_report.plot(args.plot, lines)
    return lines


def _of_shape(shape, names, settings, args, shared):
    layers = checked_layers(shape, args.layers)
    measured = measure(shape, names, layers, settings, report)
    lines = [
        {**shared, **_of_setup(shape, measured), **_of_result(shape, name, result)}
        for name, result in measured.results.items()
    ]
    train_report.table(lines)
    if args.json:
        record.append(args.json, lines)
    return lines


def _of_setup(shape, measured):
    model = measured.setup.model
    state = str(shape.parameter_dtype).removeprefix("torch.")
    return {
        "model": shape.model,
        "layers": measured.setup.layers,
        "all_layers": shape.all_layers,
        "parameters": sum(p.numel() for p in model.parameters()),
        "N": shape.tokens,
        "sequence": shape.sequence,
        "D": model.config.hidden_size,
        "V": model.config.vocab_size,
        "dtype": shape.dtype,
        "optimizer": f"AdamW, fused, its state in {state}",
        "attention": model.config._attn_implementation,
        "pass": "step",
        "model_mib": record.mib(measured.model_bytes),
    }


def _of_result(shape, name, result):
    return {
        "method": name,
        "ms": round(result.ms, 4),
        "tokens_per_s": round(1e3 * shape.tokens / result.ms, 1),
        "peak_mib": record.mib(result.peak),
        "outside_mib": record.mib(result.outside),
        "first_ms": round(result.first_ms, 2),
        "loss": result.loss,
        "reference_loss": result.reference_loss,
        "loss_err": result.loss_err,
        "grad_err": result.grad_err,
        "is_wrong": result.is_wrong,
    }


def _shapes(args):
    known = entries()
    for name in args.model:
        if name not in known:
            raise UserError(
                f"--model {name} cannot be trained by --train, which knows {', '.join(known)}"
            )
    tokens = args.tokens or DEFAULT_TOKENS
    sequence = args.sequence or min(tokens, DEFAULT_SEQUENCE)
    if tokens % sequence:
        raise UserError(f"--tokens {tokens} is not a multiple of --sequence {sequence}")
    if sequence < 2:
        raise UserError("--sequence 1 leaves no token to predict: it must be at least 2")
    return [
        Shape(name, tokens, sequence, dtype, args.device, args.seed)
        for name in args.model or known
        for dtype in args.dtype
    ]


def _names(args):
    """Of the variants beside the reference, those that can be run."""
    names = []
    for name in args.variants or VARIANTS:
        reason = VARIANTS[name].missing(args.device)
        if reason:
            report.note(f"{name} is left out: {reason}")
        elif name != REFERENCE and name not in names:
            names.append(name)
    return names

"""What cutloss bench --train shows."""

from rich.table import Table

from cutloss.cli.bench.report import COLOURS, bars, console
from cutloss.cli.bench.train_measure import TOLERANCE
from cutloss.cli.bench.variants import REFERENCE, VARIANTS

# heading, key, how it is written, what stands below the table
COLUMNS = (
    ("ms", "ms", "{:.1f}", "a whole step: forward, backward, optimizer; median of the rounds"),
    ("tokens/s", "tokens_per_s", "{:,.0f}", "tokens of a step by its time"),
    ("peak MiB", "peak_mib", "{:,.0f}", "everything that PyTorch's allocator held in a step; on a "
     "CPU parameters, optimizer and what a step adds to the resident memory of the process"),
    ("outside", "outside_mib", "{:.1f}", "MiB held outside of it"),
    ("first ms", "first_ms", "{:.0f}", "the very first forward and backward"),
    ("loss", "loss", "{:.5f}", "the first one, of the same weights for all"),
    ("loss error", "loss_err", "{:.1e}", f"relative to that of {REFERENCE}"),
    ("gradient error", "grad_err", "{:.1e}",
     "‖a - b‖ / ‖b‖ against it, the greater one of the classifier's and the first layer's"),
)  # fmt: skip


def title(line):
    model = f"{line['layers']} of {line['all_layers']} layers"
    if line["layers"] == line["all_layers"]:
        model = f"all {line['all_layers']} layers"
    millions = f"{line['parameters'] / 1e6:,.0f} M parameters, random"
    step = f"{line['N']} tokens in sequences of {line['sequence']}, {line['dtype']}"
    return (
        f"{line['model']}: {model}, {millions}, D {line['D']}, V {line['V']}\n"
        f"{step}, {line['optimizer']}, attention {line['attention']}"
    )


def table(lines):
    """Of one model; what is wrong is said loudly below it."""
    shown = Table(title=title(lines[0]), title_justify="left")
    shown.add_column("variant")
    columns = [c for c in COLUMNS if any(line[c[1]] is not None for line in lines)]
    for name, *_ in columns:
        shown.add_column(name, justify="right")
    for line in lines:
        cells = ("" if line[key] is None else form.format(line[key]) for _, key, form, _ in columns)
        style = "bold red" if line["is_wrong"] else None
        shown.add_row(name_of(line), *cells, style=style)
    console().print(shown)
    about = [f"{line['method']}: {VARIANTS[line['method']].about}" for line in lines]
    about += [f"{name}: {sentence}" for name, *_, sentence in columns]
    if lines[0]["peak_mib"] is not None:
        about.append(f"parameters and optimizer: {lines[0]['model_mib']:,.0f} MiB of each peak")
    console().print(f"{'; '.join(about)}.", markup=False, style="dim")
    for sentence in wrong(lines):
        console().print(sentence, markup=False, style="bold red", soft_wrap=True)


def name_of(line):
    return f"{line['method']} WRONG" if line["is_wrong"] else line["method"]


def wrong(lines):
    """A sentence for each line whose loss is not the reference's."""
    for line in lines:
        if line["is_wrong"]:
            yield (
                f"WRONG: {line['model']}, {line['method']}: the first loss is {line['loss']:.6g}, "
                f"and {REFERENCE}'s {line['reference_loss']:.6g}: they differ by "
                f"{line['loss_err']:.2g} of it, and rounding in {line['dtype']} by less than "
                f"{TOLERANCE[line['dtype']]:g}. Its time is of another computation"
            )


def plot(path, lines):
    """Bars of time, and of memory where it was measured; each model a row."""
    groups = {}
    for line in lines:
        colour = COLOURS[VARIANTS[line["method"]].package]
        groups.setdefault(title(line), []).append((name_of(line), colour, line))
    panels = [("ms", "{:.1f}", "time of a training step, ms")]
    if any(line["peak_mib"] is not None for line in lines):
        panels.append(("peak_mib", "{:.0f}", "peak memory, MiB, parameters and all"))
    bars(path, groups, panels)

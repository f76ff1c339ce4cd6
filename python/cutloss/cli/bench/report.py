"""What cutloss bench shows."""

import contextlib

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

COLOURS = {
    "cutloss": "#1b7f5c",
    "torch": "#8a8f98",
    "cut-cross-entropy": "#c9822b",
    "liger-kernel": "#7a5ea8",
    "quack-kernels": "#3b7fb8",
}
# What stands below a table: a sentence for each pass and column in it, by their keys.
PASSES = {
    "fw": "fw: the loss alone",
    "fwbw": "fwbw: loss and gradients",
    "fwbw_frozen": "fwbw_frozen: loss and gradient of E",
}
TIMES = {
    "ms": "ms: median of the rounds",
    "gemms": "GEMMs: ms in units of this run's product E·Cᵀ",
    "copies": "copies: ms in units of a copy of the logits",
    "first_ms": "first ms: the very first call",
}
LEGEND = {
    **TIMES,
    "peak_mib": "peak MiB: memory beside inputs and gradients",
    "total_mib": "with gradients: the same and the gradients, MiB",
    "outside_mib": "outside: the part of the peak outside of PyTorch's allocator, MiB",
    "kept_mib": "kept: what the first call left behind, MiB",
    "loss_err": "errors: ‖a - b‖ / ‖b‖ against what the title names",
}
LOGITS_LEGEND = {
    **TIMES,
    "peak_mib": "peak MiB: memory beside the logits, on CUDA",
    "gradient_err": "gradient error: ‖a - b‖ / ‖b‖ against fp64, of the first 64 rows",
}
# heading, key, how it is written
COLUMNS = (
    ("ms", "ms", "{:.2f}"),
    ("GEMMs", "gemms", "{:.2f}"),
    ("first ms", "first_ms", "{:.0f}"),
    ("peak MiB", "peak_mib", "{:.1f}"),
    ("with gradients", "total_mib", "{:.1f}"),
    ("outside", "outside_mib", "{:.1f}"),
    ("kept", "kept_mib", "{:.1f}"),
    ("dE error", "de_err", "{:.1e}"),
    ("dC error", "dc_err", "{:.1e}"),
    ("loss error", "loss_err", "{:.1e}"),
    ("nll error", "nll_err", "{:.1e}"),
)


def console():
    """Wide enough for the tables, whose columns say nothing where they are cut: in a narrow terminal
    lines go on in the next one."""
    return Console(highlight=False, width=max(Console().width, 180))


def note(text):
    console().print(text, markup=False, style="dim", soft_wrap=True)


def heading(shared):
    versions = ", ".join(f"{name} {number}" for name, number in shared["versions"].items())
    console().print(f"{shared['device']}; {versions}; commit {shared['commit']}", markup=False)


@contextlib.contextmanager
def progress(label, calls, rounds):
    """Yields a function to call after each measured call."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=console(), transient=True) as bar:
        task = bar.add_task(label, total=(rounds + 1) * calls)
        yield lambda: bar.advance(task)


def table(case, lines):
    first = lines[0][1]
    against = f", errors against {first['reference']}" if first["reference"] else ""
    title = f"{case.label}   (1 GEMM = {first['gemm_ms']:.2f} ms{against})"
    shown = Table(title=title, title_justify="left")
    for name in ("pass", "method", "engine", "schedule"):
        shown.add_column(name)
    columns = [c for c in COLUMNS if any(line[c[1]] for _, line in lines)]
    for name, *_ in columns:
        shown.add_column(name, justify="right")
    for method, r in lines:
        ours = r["method"] == "cutloss"
        plan = (r["engine"], r["schedule"]) if ours else ("", "")
        cells = (_number(r[key], form) for _, key, form in columns)
        shown.add_row(r["pass"], method.label, *plan, *cells)
    console().print(shown)
    _legend(LEGEND, [r for _, r in lines], columns)


def _legend(meanings, lines, columns):
    shown = {r["pass"] for r in lines} | {key for _, key, _ in columns}
    about = (sentence for key, sentence in {**PASSES, **meanings}.items() if key in shown)
    console().print(f"{'; '.join(about)}.", markup=False, style="dim")


def logits_table(label, copy_ms, rate, lines):
    """`rate`: of the copy, in GB/s, read and written."""
    shown = Table(title=f"{label}   (1 copy = {copy_ms:.3f} ms, {rate:.0f} GB/s)")
    shown.title_justify = "left"
    columns = [
        ("ms", "ms", "{:.3f}"),
        ("copies", "copies", "{:.2f}"),
        ("first ms", "first_ms", "{:.0f}"),
        ("peak MiB", "peak_mib", "{:.1f}"),
        ("gradient error", "gradient_err", "{:.1e}"),
    ]
    for name in ("pass", "method"):
        shown.add_column(name)
    for name, *_ in columns:
        shown.add_column(name, justify="right")
    for r in lines:
        cells = (_number(r[key], form) for _, key, form in columns)
        shown.add_row(r["pass"], r["method"], *cells)
    console().print(shown)
    _legend(LOGITS_LEGEND, lines, columns)


def kernels(method, pass_name, lines, gemm_ms):
    """Those that matter; the file of results has them all."""
    shown = Table(title=f"kernels of {method.label}, {pass_name}", title_justify="left")
    shown.add_column("kernel")
    for name in ("launches", "ms", "GEMMs"):
        shown.add_column(name, justify="right")
    for line in lines:
        part = line["ms"] / gemm_ms
        if part >= 0.001:
            ms = f"{line['ms']:.3f}"
            shown.add_row(line["name"], str(line["launches"]), ms, f"{part:.3f}")
    console().print(shown)


def _number(value, form):
    return "" if value is None else form.format(value)


def plot(path, records):
    """Bars: time in matrix products, and peak memory, of each method for each case and pass."""
    groups = {}
    for method, r in records:
        case = [r["dtype"], r["data"], *([r["options"]] if r["options"] else []), r["pass"]]
        if r["ignored"]:
            case.insert(2, f"{r['ignored']:.0%} ignored")
        title = f"N {r['N']}, D {r['D']}, V {r['V']}\n{', '.join(case)}"
        groups.setdefault(title, []).append((method.label, _colour(method), r))
    panels = (
        ("gemms", "{:.2f}", "time, in products E·Cᵀ"),
        ("peak_mib", "{:.0f}", "peak memory over inputs and gradients, MiB"),
    )
    bars(path, groups, panels)


def bars(path, groups, panels):
    """A row of pictures for each group, {title: [(name, colour, record)]}; in it one for each panel,
    which is the key of a record, how its number is written, and the label of the axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    heights = [0.9 + 0.2 * len(lines) for lines in groups.values()]
    figure, axes = plt.subplots(
        len(groups),
        len(panels),
        figsize=(10, 0.6 + sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for (title, lines), of_group in zip(groups.items(), axes):
        names, colours, records = zip(*lines[::-1])
        for axis, (key, form, _) in zip(of_group, panels):
            values = [r[key] for r in records]
            drawn = axis.barh(range(len(names)), [v or 0 for v in values], color=colours)
            axis.bar_label(drawn, [" " + _number(v, form) for v in values], fontsize=8)
            axis.margins(x=0.15)
            axis.set_yticks([])
            axis.spines[["top", "right"]].set_visible(False)
        of_group[0].set_yticks(range(len(names)), names, fontsize=8)
        of_group[0].set_title(title, fontsize=8, loc="left")
    for axis, (_, _, label) in zip(axes[-1], panels):
        axis.set_xlabel(label)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _colour(method):
    return COLOURS.get(method.name) or COLOURS[method.kind.package]

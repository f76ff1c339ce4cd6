"""What cutloss bench shows."""

import contextlib

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cutloss._bench.methods import METHODS

MOST_PRODUCTS = 3  # library products measured beside the methods, at most


def console():
    """Wide enough for the tables where the output is not a terminal."""
    shown = Console(highlight=False)
    return shown if shown.is_terminal else Console(highlight=False, width=120)


def note(text):
    console().print(text, markup=False, style="dim")


def heading(shared):
    versions = ", ".join(f"{name} {number}" for name, number in shared["versions"].items())
    console().print(f"{shared['device']}; {versions}; commit {shared['commit']}", markup=False)


@contextlib.contextmanager
def progress(case, methods, passes, rounds):
    """Yields a function to call after each measured call."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=console(), transient=True) as bar:
        calls = (rounds + 1) * (methods * passes + MOST_PRODUCTS)
        task = bar.add_task(case.label, total=calls)
        yield lambda: bar.advance(task)


def table(case, measured):
    unit = measured[0][1]["gemm_ms"]
    shown = Table(title=f"{case.label}   (1 GEMM = {unit:.2f} ms)", title_justify="left")
    shown.add_column("pass")
    shown.add_column("method")
    shown.add_column("schedule")
    for name in ("ms", "GEMMs", "peak MiB", "dE error", "dC error"):
        shown.add_column(name, justify="right")
    for method, r in measured:
        shown.add_row(
            r["pass"],
            method.label,
            r["schedule"] if r["method"] == "cutloss" else "",
            f"{r['ms']:.2f}",
            f"{r['gemms']:.2f}",
            _number(r["peak_mib"], "{:.1f}"),
            _number(r["de_err"], "{:.1e}"),
            _number(r["dc_err"], "{:.1e}"),
        )
    console().print(shown)


def _number(value, form):
    return "" if value is None else form.format(value)


def plot(path, records):
    """Bars: time in matrix products, and peak memory, of each method for each case and pass."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups = {}
    for method, r in records:
        title = f"N {r['N']}, D {r['D']}, V {r['V']}\n{r['dtype']}, {r['data']}, {r['pass']}"
        groups.setdefault(title, []).append((method, r))
    colours = dict(zip(METHODS, ("#1b7f5c", "#8a8f98", "#c9822b", "#7a5ea8")))
    figure, axes = plt.subplots(
        len(groups), 2, figsize=(10, 0.6 + 1.9 * len(groups)), squeeze=False, layout="constrained"
    )
    for (title, lines), (time_axis, memory_axis) in zip(groups.items(), axes):
        names = [method.label for method, _ in lines][::-1]
        bar_colours = [colours[method.name] for method, _ in lines][::-1]
        for axis, key, form in (
            (time_axis, "gemms", "{:.2f}"),
            (memory_axis, "peak_mib", "{:.0f}"),
        ):
            values = [r[key] for _, r in lines][::-1]
            bars = axis.barh(range(len(names)), [v or 0 for v in values], color=bar_colours)
            axis.bar_label(bars, [" " + _number(v, form) for v in values], fontsize=8)
            axis.margins(x=0.15)
            axis.spines[["top", "right"]].set_visible(False)
        time_axis.set_yticks(range(len(names)), names, fontsize=8)
        memory_axis.set_yticks([])
        time_axis.set_title(title, fontsize=8, loc="left")
    axes[-1][0].set_xlabel("time, in products E·Cᵀ")
    axes[-1][1].set_xlabel("peak memory over inputs and gradients, MiB")
    figure.savefig(path, dpi=150)
    plt.close(figure)

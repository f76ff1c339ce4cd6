"""What cutloss demo shows."""

import contextlib
import os
import statistics

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cutloss.cli.bench.report import console

COLOURS = {"cutloss": "#1b7f5c", "plain": "#8a8f98"}
NAMES = {"cutloss": "cutloss", "plain": "plain PyTorch"}


def opening(setting, vocabulary, ids, path, model):
    parameters = sum(p.numel() for p in model.parameters())
    table = setting.V * setting.D
    console().print(
        f"Text: {path or 'five novels (public domain)'}, {len(ids):,} tokens; "
        f"{vocabulary.known:,} of the {setting.V:,} ids of the vocabulary stand for something.\n"
        f"Model: {parameters / 1e6:.1f} million parameters, {table / 1e6:.1f} of them the word "
        f"table, which is the classifier too; D {setting.D}.\n"
        f"A step is {setting.tokens:,} tokens: {setting.tokens:,} x {setting.V:,} logits, "
        f"{setting.tokens * setting.V * 4 / 2**20:.0f} MiB in fp32, which cutloss never stores.\n"
        f"{setting.dtype} on {setting.device}, {torch.get_num_threads()} threads"
        f"{', which sleep while they wait (OMP_WAIT_POLICY=passive)' if _threads_sleep() else ''}.",
        markup=False,
    )


@contextlib.contextmanager
def progress(runs, steps, setting):
    """Yields a function to call after each step."""
    shown = console()
    columns = BarColumn(bar_width=12), MofNCompleteColumn()
    state = TextColumn("{task.fields[state]}")
    with Progress(*columns, TimeElapsedColumn(), state, console=shown) as bar:
        task = bar.add_task("training", total=steps, state="")

        def show(step):
            losses = ", ".join(f"{run.name} {run.losses[-1]:.3f}" for run in runs)
            rates = ", ".join(f"{setting.tokens / run.step_seconds[-1]:,.0f}" for run in runs)
            state = f"loss: {losses}   tokens/s: {rates}"
            bar.update(task, completed=step, state=state)
            # A log has no bar that moves.
            if not shown.is_terminal and (step == 1 or step % 10 == 0):
                shown.print(f"step {step:4}  {state}")

        yield show


def table(runs, peaks, agreement, args):
    shown = Table(title=f"{len(runs[0].losses)} steps, same parameters, same batches")
    shown.title_justify = "left"
    shown.add_column("")
    for run in runs:
        shown.add_column(NAMES[run.name], justify="right")
    for step in _milestones(len(runs[0].losses)):
        shown.add_row(f"loss at step {step}", *(f"{run.losses[step - 1]:.5f}" for run in runs))
    if len(runs) == 2:
        shown.add_row("largest difference of the losses", f"{largest_difference(runs):.1e}", "")
    if agreement:
        shown.add_section()
        shown.add_row("same parameters, same batch: relative difference", "", "")
        shown.add_row("  of the loss", f"{agreement.loss:.1e}", "")
        shown.add_row("  of the gradient of E", f"{agreement.de:.1e}", "")
        shown.add_row("  of the gradient of C", f"{agreement.dc:.1e}", "")
    shown.add_section()
    shown.add_row("peak memory of the loss", *(_mib(peak) for peak in peaks))
    shown.add_row(
        "time of the loss, forward + backward (median)",
        *(f"{1e3 * statistics.median(run.loss_seconds):.0f} ms" for run in runs),
    )
    shown.add_row(
        "time of a whole step (median)",
        *(f"{1e3 * statistics.median(run.step_seconds):.0f} ms" for run in runs),
    )
    console().print(shown)
    counter = "PyTorch's allocator" if args.device == "cuda" else "the kernel (resident memory)"
    console().print(
        "Peak memory: what one forward and backward of the loss adds to its inputs and gradients, "
        f"as counted by {counter}, each in a process of its own. "
        f"cutloss was granted {args.max_workspace} MiB (--max-workspace).",
        markup=False,
    )
    if len(runs[0].losses) < args.steps:
        console().print(
            f"Training stopped after {len(runs[0].losses)} of {args.steps} steps: "
            f"{args.seconds:g} seconds were up (--seconds)."
        )
    if hint := slowness(runs, args.device):
        console().print(hint, markup=False)


def _threads_sleep():
    return os.environ.get("OMP_WAIT_POLICY", "").strip().lower() == "passive"


def slowness(runs, device):
    """What to do where cutloss took longer on a CPU; else nothing."""
    if device != "cpu" or len(runs) < 2:
        return None
    ours, plain = (statistics.median(run.loss_seconds) for run in runs)
    if ours <= plain:
        return None
    setting = "" if _threads_sleep() else ", with OMP_WAIT_POLICY=passive in the environment"
    return (
        "cutloss took longer than plain PyTorch here. On a machine that others keep busy its threads "
        f"wait for each other: try again on a quiet one{setting}. "
        "The results in the README say what it takes there."
    )


def _milestones(steps):
    """The first step, the last, and quarters between them."""
    return sorted({1, *(max(1, round(steps * part / 4)) for part in (1, 2, 3, 4))})


def largest_difference(runs):
    first, second = runs
    return max(abs(a - b) for a, b in zip(first.losses, second.losses))


def _mib(peak):
    return "not measured here" if peak is None else f"{peak / 2**20:.1f} MiB"


def plot(path, runs, peaks, setting):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (curves, bars) = plt.subplots(
        1, 2, figsize=(9, 3.8), width_ratios=(2.6, 1), layout="constrained"
    )
    # The curves lie on each other: a wide line below, a thin dashed one above, show both.
    styles = {"plain": {"linewidth": 5, "alpha": 0.55}, "cutloss": {"linewidth": 1.4}}
    for run in reversed(runs):
        steps = range(1, len(run.losses) + 1)
        label, colour = NAMES[run.name], COLOURS[run.name]
        curves.plot(steps, run.losses, label=label, color=colour, **styles[run.name])
    curves.xaxis.get_major_locator().set_params(integer=True)
    curves.set_xlabel("step")
    curves.set_ylabel("loss")
    title = "The same numbers"
    if len(runs) == 2:
        title += f": largest difference {largest_difference(runs):.0e}"
    curves.set_title(title, fontsize=10, loc="left")
    curves.legend(frameon=False)

    names = [NAMES[run.name] for run in runs]
    values = [0 if peak is None else peak / 2**20 for peak in peaks]
    drawn = bars.bar(names, values, color=[COLOURS[run.name] for run in runs], width=0.6)
    bars.bar_label(drawn, [_mib(peak) for peak in peaks], fontsize=9)
    bars.margins(x=0.15, y=0.1)
    bars.set_ylabel("MiB")
    bars.set_title("Peak memory of the loss", fontsize=10, loc="left")
    for axis in (curves, bars):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"N {setting.tokens:,}, D {setting.D}, V {setting.V:,}, {setting.dtype}", fontsize=9
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)

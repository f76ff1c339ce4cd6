#!/usr/bin/env python3
"""Draws docs/time-memory.png, time against memory of a loss and its gradients, for cutloss and the
others, and writes the table and the caption beside it into README.md and docs/measurements.md.

    .venv/bin/python scripts/time_memory.py            draws the picture and rewrites the text
    .venv/bin/python scripts/time_memory.py --text     prints the text only; needs no matplotlib

Every figure is read from a file of benchmarks/results. Nothing is measured here."""

import argparse
import dataclasses
import hashlib
import json
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "time-memory.png"
# The pages, each with the way from it to the results.
PAGES = {
    ROOT / "README.md": "benchmarks/results",
    ROOT / "docs" / "measurements.md": "../benchmarks/results",
}
BEGIN, END = "<!-- time-memory: made by scripts/time_memory.py -->", "<!-- time-memory ends -->"

# The case, which every record must be of. Of cutloss's engines only Hopper's own is shown.
CASE = {"N": 8192, "D": 4096, "V": 131072, "dtype": "bf16", "data": "randn", "pass": "fwbw",
        "ignored": 0.0, "device": "NVIDIA H200"}  # fmt: skip
ENGINE = "cuda/fused_sm90"
OURS = "cutloss"


@dataclasses.dataclass(frozen=True)
class Series:
    """What is shown under one name: the records of `method` in these files of benchmarks/results.
    Of cutloss they are those of one schedule and, unless `limit` is None, of that limit in MiB."""

    name: str
    method: str
    files: tuple
    colour: str
    schedule: str = "none"
    limit: int | None = None


SWEEP = "2026-11-29-h200-budgets.json"
AFTER = "2026-11-29-h200-after.json"
PYTORCH = "2026-11-21-h200-bf16.json"
RIVALS = "2026-11-21-h200-rivals.json"
GREEN, GREY, ORANGE, VIOLET = "#1b7f5c", "#6b7078", "#c9822b", "#7a5ea8"

AS_IT_COMES = Series("cutloss, as it comes", OURS, (SWEEP, AFTER), GREEN, "vocabulary", 512)
BY_ROWS = Series("cutloss, room for bf16 logits granted", OURS, (AFTER,), GREEN, "rows")
FILTERED = Series("cut-cross-entropy, as it comes", "cce", (RIVALS,), ORANGE)
SERIES = (
    AS_IT_COMES,
    BY_ROWS,
    Series("cutloss, `max_workspace` of 64 MiB", OURS, (SWEEP,), GREEN, "vocabulary", 64),
    Series("cutloss, `max_workspace` of 16 MiB", OURS, (SWEEP,), GREEN, "vocabulary", 16),
    Series("plain PyTorch", "plain", (PYTORCH,), GREY),
    Series("plain PyTorch under torch.compile", "compile", (PYTORCH, RIVALS), GREY),
    Series("liger-kernel, Triton", "liger", (RIVALS,), VIOLET),
    Series("liger-kernel for Hopper, recomputing", "liger_sm90", (RIVALS,), VIOLET),
    Series("liger-kernel for Hopper, storing", "liger_sm90_stored", (RIVALS,), VIOLET),
    FILTERED,
    Series("cut-cross-entropy, `cce_exact`", "cce_exact", (RIVALS,), ORANGE),
)
# In the picture alone: the line through all memory limits.
CURVE = Series("cutloss, by the memory granted", OURS, (SWEEP,), GREEN, "vocabulary")


def records(series):
    """The records of a series, file by file; an error where one of its files has none."""
    found = []
    for file in series.files:
        lines = (RESULTS / file).read_text(encoding="utf-8").splitlines()
        of_file = [r for r in map(json.loads, lines) if belongs(r, series)]
        if not of_file:
            raise LookupError(f"{file} has no record of {series.name} for {CASE}")
        found += [r | {"file": file} for r in of_file]
    return found


def belongs(record, series):
    return (
        record["method"] == series.method
        and record["schedule"] == series.schedule
        and (series.method != OURS or record["engine"] == ENGINE)
        and series.limit in (None, record["workspace_mib"])
        and not record.get("options")
        and all(record.get(key) == value for key, value in CASE.items())
    )


def between(values, form):
    """One number, or the least and the greatest, as they are printed."""
    least, most = form(min(values)), form(max(values))
    return least if least == most else f"{least} to {most}"


def mebibytes(value):
    return f"{value:,.0f}"


def products(value):
    return f"{value:.3g}" if value >= 10 else f"{value:.2f}"


def table():
    """The quickest first."""
    lines = [
        "| loss and gradients | time, in products E·Cᵀ | memory, MiB | gradients |",
        "|---|---|---|---|",
    ]
    found = [(series, records(series)) for series in SERIES]
    for series, of_row in sorted(found, key=lambda row: min(r["gemms"] for r in row[1])):
        name, time = series.name, between([r["gemms"] for r in of_row], products)
        memory = between([r["peak_mib"] for r in of_row], mebibytes)
        (gradient,) = {r["gradient"] for r in of_row}
        if gradient == "filtered":
            gradient = "small probabilities left out"
        if series.method == OURS:
            name, time = f"**{name}**", f"**{time}**"
        lines.append(f"| {name} | {time} | {memory} | {gradient} |")
    return "\n".join(lines)


def source(of_some, link):
    """Where some records are from: dates, commits, files."""
    dates = sorted({r["date"] for r in of_some})
    commits = sorted({r["commit"] for r in of_some})
    files = sorted({r["file"] for r in of_some})
    named = [f"[{file.removesuffix('.json')}]({link}/{file})" for file in files]
    return f"{' and '.join(dates)}, commits {' and '.join(commits)}, {' and '.join(named)}"


def caption(link):
    found = [(series, records(series)) for series in SERIES]
    ours = [r for series, of_it in found if series.method == OURS for r in of_it]
    others = [r for series, of_it in found if series.method != OURS for r in of_it]
    versions = {}
    for r in [*ours, *others]:
        for package, version in r["versions"].items():
            versions.setdefault(package, set()).add(version)
    # One version of each, or this fails: the caption names no more.
    (torch,), (liger,) = versions["torch"], versions["liger-kernel"]
    (cce,), (version,) = versions["cut-cross-entropy"], {r["versions"][OURS] for r in ours}
    unit = between([r["gemm_ms"] for r in [*ours, *others]], "{:.1f}".format)
    return "\n".join(
        (
            f"One {CASE['device']}, N {CASE['N']:,} tokens, D {CASE['D']:,}, V {CASE['V']:,}, "
            f"{CASE['dtype']}, random data, PyTorch {torch}; medians of whole calls from Python.",
            f"The unit of time is PyTorch's product E·Cᵀ in the same run ({unit} ms). "
            "Memory is the peak beside inputs and gradients.",
            f"cutloss {version}: {source(ours, link)}.",
            f"PyTorch, liger-kernel {liger}, cut-cross-entropy {cce}: {source(others, link)}.",
            "Those are other runs than cutloss's, so a few hundredths between them mean nothing.",
        )
    )


def block(link):
    return f"{BEGIN}\n{table()}\n\n{caption(link)}\n{END}"


def fingerprint():
    """Of all that the picture shows. The file has it, and a test compares it with the results."""
    shown = [
        [series.name, r["peak_mib"], r["gemms"], r["gradient"]]
        for series in (CURVE, *SERIES)
        for r in records(series)
    ]
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()


def draw():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    # Where a label stands, in points from its mark; those of cutloss's limits stand at the curve.
    places = {
        AS_IT_COMES: (0, -17, "right"),
        BY_ROWS: (-12, -6, "right"),
        "plain": (0, 10, "center"),
        "compile": (8, 8, "left"),
        "liger": (2, 9, "left"),
        "liger_sm90": (6, 7, "left"),
        "liger_sm90_stored": (13, -1, "left"),
        "cce": (9, -10, "left"),
        "cce_exact": (-9, -3, "right"),
    }
    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    curve = sorted(records(CURVE), key=lambda r: r["peak_mib"])
    axis.plot(
        [r["peak_mib"] for r in curve], [r["gemms"] for r in curve], "-o", color=CURVE.colour
    )
    label(axis, CURVE, curve[0], CURVE.name, (4, 10, "left"))
    for series in SERIES:
        found = records(series)
        exact = all(r["gradient"] == "exact" for r in found)
        axis.plot(
            [r["peak_mib"] for r in found],
            [r["gemms"] for r in found],
            "o",
            color=series.colour,
            markerfacecolor=series.colour if exact else "white",
        )
        name = series.name.replace("`", "")
        place = places.get(series) or places.get(series.method)
        if series.limit and series is not AS_IT_COMES:
            name, place = f"{series.limit} MiB", (-5, -13, "right")
        if not exact:
            name += "\n(small probabilities left out)"
        label(axis, series, found[0], name, place)
    axis.set_xscale("log")
    axis.set_yscale("log")
    sizes = [1, 10, 100, 1000, 10000]
    axis.set_xticks(sizes, [f"{size:,} MiB" for size in sizes])
    ticks = [3, 4, 5, 6, 8, 12, 16]
    axis.set_yticks(ticks, map(str, ticks))
    axis.minorticks_off()
    axis.set_xlim(0.9, 60000)
    axis.set_ylim(2.6, 19)
    axis.grid(color="#e6e6e6", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("peak memory beside inputs and gradients (further left is less)")
    axis.set_ylabel("time, in products E·Cᵀ (lower is quicker)")
    axis.set_title(
        f"Loss and gradients of {CASE['N']:,} tokens, D {CASE['D']:,}, V {CASE['V']:,}, "
        f"{CASE['dtype']}, on one {CASE['device']}",
        fontsize=10, loc="left",
    )  # fmt: skip
    # The version of matplotlib is left out: it changes the file and not the picture.
    figure.savefig(PICTURE, dpi=110, metadata={"Software": None, "Source": fingerprint()})


def label(axis, series, record, name, place):
    x, y, side = place
    axis.annotate(
        name, (record["peak_mib"], record["gemms"]), xytext=(x, y), textcoords="offset points",
        ha=side, color=series.colour, fontsize=9,
        weight="bold" if series.method == OURS else "normal",
    )  # fmt: skip


def rewritten(page, link):
    """The text of a page with the block as the records have it."""
    text = page.read_text(encoding="utf-8")
    inside = re.escape(BEGIN) + ".*?" + re.escape(END)
    if len(re.findall(inside, text, re.DOTALL)) != 1:
        raise LookupError(f"{page} has not one block between {BEGIN} and {END}")
    return re.sub(inside, lambda _: block(link), text, flags=re.DOTALL)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    text = "print table and caption, write nothing"
    parser.add_argument("--text", action="store_true", help=text)
    if parser.parse_args().text:
        print(block(PAGES[ROOT / "README.md"]))
        return
    draw()
    for page, link in PAGES.items():
        page.write_text(rewritten(page, link), encoding="utf-8")


if __name__ == "__main__":
    main()

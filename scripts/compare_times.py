"""How long calls take here and in another build of cutloss, on one GPU in one run.

    .venv/bin/python scripts/compare_times.py --old DIRECTORY [--out FILE]

DIRECTORY/cutloss is the other package, built (scripts/digests.py --against TAG builds one in
build/digests/TAG/python). Each package runs in a process of its own; the two are asked in turn
(old, new, new, old, ...), so that both meet the same clocks, and the figure of a case is the
median of the rounds' ratios. Timed are calls queued back to back, of random operands, by CUDA
events; a call moves more memory than the L2 cache holds. A line of JSON is written for each case,
with the quartiles of the ratios, which say how far the median can be trusted."""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHAPES = ((8192, 4096, 131072), (8192, 2304, 256000), (8192, 2048, 131072), (4096, 2048, 151936))
WAYS = {  # keyword arguments of linear_cross_entropy, and whether gradients are made
    "forward": ({}, False),
    "by rows": ({"schedule": "rows", "max_workspace": 16 << 30}, True),
    "by vocabulary, 256 MiB": ({"schedule": "vocabulary", "max_workspace": 256 << 20}, True),
}


def worker():
    """Answers each line "SHAPE WAY CALLS" by milliseconds a call."""
    import torch

    import cutloss

    held = {}

    def operands(index):
        if index not in held:
            held.clear()
            torch.cuda.empty_cache()
            n, d, v = SHAPES[index]
            draw = torch.Generator(device="cuda").manual_seed(index)
            e = torch.randn(n, d, generator=draw, device="cuda").bfloat16()
            c = (torch.randn(v, d, generator=draw, device="cuda") * 2 / d**0.5).bfloat16()
            y = torch.randint(v, (n,), generator=draw, device="cuda")
            held[index] = (e.requires_grad_(), c.requires_grad_(), y)
        return held[index]

    for line in sys.stdin:
        index, way, calls = line.split("\t")
        e, c, y = operands(int(index))
        options, gradients = WAYS[way]

        def call(e=e, c=c, y=y, options=options, gradients=gradients):
            if not gradients:
                with torch.no_grad():
                    cutloss.linear_cross_entropy(e, c, y, **options)
                return
            e.grad = c.grad = None
            cutloss.linear_cross_entropy(e, c, y, **options).backward()

        call()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(int(calls)):
            call()
        end.record()
        torch.cuda.synchronize()
        print(begin.elapsed_time(end) / int(calls), flush=True)


class Package:
    """A process that has the package of a directory."""

    def __init__(self, directory):
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker"],
            env={**os.environ, "PYTHONPATH": str(directory)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def milliseconds(self, shape, way, calls):
        self.process.stdin.write(f"{shape}\t{way}\t{calls}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"compare_times: a package ended in {SHAPES[shape]}, {way}")
        return float(answer)


def compared(old, new, shape, way, rounds):
    one = max(old.milliseconds(shape, way, 1), new.milliseconds(shape, way, 1))
    calls = max(2, round(120 / one))  # about an eighth of a second in each turn
    pairs = []
    for turn in range(rounds):
        first, second = (old, new) if turn % 2 == 0 else (new, old)
        times = {}
        for package in (first, second):
            times[package] = package.milliseconds(shape, way, calls)
        pairs.append((times[old], times[new]))
    ratios = sorted(b / a for a, b in pairs)
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "shape": SHAPES[shape],
        "way": way,
        "rounds": rounds,
        "calls": calls,
        "old_ms": round(statistics.median(a for a, _ in pairs), 4),
        "new_ms": round(statistics.median(b for _, b in pairs), 4),
        "new/old": round(middle, 4),
        "quartiles": [round(low, 4), round(high, 4)],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--old", type=pathlib.Path, help="the folder that holds the other package")
    parser.add_argument("--out", type=pathlib.Path, help="a file for the lines, besides printing")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker()
    if not arguments.old:
        parser.error("--old DIRECTORY is needed")
    old, new = Package(arguments.old.resolve()), Package(ROOT / "python")
    lines = []
    for shape in range(len(SHAPES)):
        for way in WAYS:
            lines.append(json.dumps(compared(old, new, shape, way, arguments.rounds)))
            print(lines[-1], flush=True)
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

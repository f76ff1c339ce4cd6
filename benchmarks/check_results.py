#!/usr/bin/env python3
"""Checks that every line of the result files is in the one format; names those that are not.

    benchmarks/check_results.py [FILE ...]     without a file: all of benchmarks/results
"""

import json
import pathlib
import sys

from cutloss.cli.bench.record import problems

RESULTS = pathlib.Path(__file__).parent / "results"


def check(path):
    """Sentences about the lines of a file that are wrong."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            yield f"{path}:{number}: not JSON: {error}"
            continue
        if not isinstance(record, dict):
            yield f"{path}:{number}: not an object"
            continue
        yield from (f"{path}:{number}: {problem}" for problem in problems(record))


def main(names):
    paths = [pathlib.Path(name) for name in names] or sorted(RESULTS.glob("*.json*"))
    found = [sentence for path in paths for sentence in check(path)]
    print("\n".join(found) or f"{len(paths)} files are in the format")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

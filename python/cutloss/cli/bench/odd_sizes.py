"""Losses of odd sizes against fp64, on the CPU: python -m cutloss.cli.bench.odd_sizes

A matrix library can be wrong at some sizes on some processors, or kill the process there: oneDNN 2.6
is, and does, on those with AMX. `cutloss doctor` runs this in a process of its own. Prints what is
wrong, a line each, and exits with 1 then."""

import sys

import torch

from cutloss.cli.bench.cases import Case
from cutloss.cli.bench.errors import gradient_errors, reference_gradients
from cutloss.cli.bench.methods import Method
from cutloss.cli.bench.plan import with_workspace

# N, D, V around the sizes of vectors and tiles; the smallest workspace makes products of 63 rows or
# columns and fewer out of them.
SIZES = (
    (63, 33, 511),
    (45, 33, 511),
    (127, 64, 1023),
    (63, 64, 4096),
    (33, 65, 1071),
    (257, 127, 129),
)
# How many roundings are added to twice plain PyTorch's error. In bf16 that error is one rounding of
# its own; in fp64 the reference is one order of summation among several.
DTYPES = {"bf16": 0.25, "fp32": 4, "fp64": 64}


def wrong():
    """What is wrong, in words: one string for each loss."""
    for size in SIZES:
        for dtype in DTYPES:
            case = Case(*size, dtype=dtype)
            reference = reference_gradients(case)
            plain = gradient_errors(Method("plain"), case, "fwbw", reference)
            roundings = DTYPES[dtype] * torch.finfo(case.product_dtype).eps
            for schedule in ("rows", "vocabulary"):
                for workspace in ("smallest", None):
                    method = Method("cutloss", schedule, workspace)
                    method = with_workspace(case, method, "fwbw")
                    ours = gradient_errors(method, case, "fwbw", reference)
                    # The rule of the tests; NaN does not keep it.
                    if not all(a <= 2 * b + roundings for a, b in zip(ours, plain)):
                        yield (
                            f"{case.label}, {method.label}: errors of dE and dC "
                            f"{ours[0]:.1e} and {ours[1]:.1e}, plain PyTorch's {plain[0]:.1e} "
                            f"and {plain[1]:.1e}"
                        )


def main():
    found = list(wrong())
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

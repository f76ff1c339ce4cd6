#!/usr/bin/env python3
"""What a call costs the host: small losses on a CPU with one thread, and on a GPU that has nothing else
to do the time from the call until all is done.

    OMP_NUM_THREADS=1 benchmarks/host_time.py [--json FILE]                       (4, 16, 50), fp32
    benchmarks/host_time.py --device cuda [--shape 128,4096,128256] [--json FILE]  bf16

Of cutloss and of plain PyTorch (matmul, `F.cross_entropy`) in one process: `ms` and `plain_ms` are medians
of calls that are timed one by one, in random order, as `cutloss bench` times them; `least_ms` and
`plain_least_ms` are of each by itself, call after call, the least of many runs of 50: what it costs where
caches hold nothing else. `product_ms`, on CUDA, is that of E·Cᵀ alone.
"""

import argparse
import shlex
import sys
import time

import torch
import torch.nn.functional as F

from cutloss import linear_cross_entropy
from cutloss.cli import usage
from cutloss.cli.bench import record, timing

ROUNDS, RUNS, CALLS = 2000, 100, 50


def plain(e, c, targets):
    return F.cross_entropy(e @ c.T, targets)


def product(e, c, targets):
    return e @ c.T


def calls_of(pass_name, shape, device):
    """A call of each method, without arguments."""
    N, D, V = shape
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    e, c = torch.randn(N, D, device=device, dtype=dtype), torch.randn(V, D, device=device, dtype=dtype)
    targets = torch.randint(V, (N,), device=device)
    c /= D**0.5
    makes_gradients = pass_name == "host_fwbw"
    e.requires_grad_(makes_gradients)
    c.requires_grad_(makes_gradients)

    def call(loss):
        e.grad = c.grad = None
        result = loss(e, c, targets)
        if makes_gradients:
            result.backward()
        if device == "cuda":
            torch.cuda.synchronize()

    methods = {"ms": linear_cross_entropy, "plain_ms": plain}
    if device == "cuda" and not makes_gradients:
        methods["product_ms"] = product
    return {name: lambda loss=loss: call(loss) for name, loss in methods.items()}


def least(call):
    """Of one call among others of its kind, in ms."""
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times) / CALLS


def measured(pass_name, shape, device):
    calls = calls_of(pass_name, shape, device)
    for call in calls.values():
        for _ in range(100):
            call()
    # By the clock on CUDA too: each call waits for the device.
    times = timing.time_rounds(calls, ROUNDS, "cpu")
    return times | {f"least_{name}".replace("least_plain", "plain_least"): least(call)
                    for name, call in calls.items() if name != "product_ms"}  # fmt: skip


def main():
    parser = usage.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", type=usage.shape, metavar="N,D,V")
    parser.add_argument("--json", metavar="FILE", help="append the lines to it")
    args = parser.parse_args()
    usage.check_device(args.device)
    torch.set_num_threads(1)
    shape = args.shape or ((4, 16, 50) if args.device == "cpu" else (128, 4096, 128256))
    command = shlex.join(["benchmarks/host_time.py", *sys.argv[1:]])
    for pass_name in ("host_fw", "host_fwbw"):
        found = {key: round(ms, 5) for key, ms in measured(pass_name, shape, args.device).items()}
        line = {
            **record.surroundings(args.device, 1),
            **dict(zip("NDV", shape, strict=True)),
            "dtype": "fp32" if args.device == "cpu" else "bf16",
            "method": "cutloss",
            "pass": pass_name,
            **found,
            "command": command,
        }
        print(
            f"{pass_name}: {found['ms'] * 1e3:.1f} us, plain {found['plain_ms'] * 1e3:.1f}: "
            f"{found['ms'] / found['plain_ms']:.2f} times; call after call "
            f"{found['least_ms'] * 1e3:.1f} and {found['plain_least_ms'] * 1e3:.1f}: "
            f"{found['least_ms'] / found['plain_least_ms']:.2f} times"
            + (f"; {found['ms'] / found['product_ms']:.3f} products" if "product_ms" in found else "")
        )
        if args.json:
            record.append(args.json, [line])


if __name__ == "__main__":
    main()

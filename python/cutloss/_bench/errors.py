"""Errors of the gradients against fp64, ‖a - b‖ / ‖b‖."""

import os

import torch

from cutloss._bench.cases import inputs, leaves
from cutloss._bench.methods import run_pass

_SLAB = 4096  # vocabulary columns at a time


def reference_bytes(case):
    """C, dC and the logits of the reference, and copies on the way."""
    return 8 * (3 * case.V * case.D + 2 * case.N * _SLAB + 3 * case.N * case.D)


def size_allows(case):
    """Whether the reference takes at most half of the memory that is there, and not minutes."""
    free = _available_bytes(case.device)
    return reference_bytes(case) <= free // 2 and case.N * case.V * case.D <= 4e11


def _available_bytes(device):
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def reference_gradients(case):
    """dE, dC of the mean loss in fp64, slab by slab; knows nothing of the code it judges."""
    e, c, targets = inputs(case)
    e, c = e.double(), c.double()
    row_max = torch.full((case.N,), -torch.inf, dtype=torch.float64, device=e.device)
    for v in range(0, case.V, _SLAB):
        row_max = torch.maximum(row_max, (e @ c[v : v + _SLAB].t()).amax(1))
    total = torch.zeros_like(row_max)
    for v in range(0, case.V, _SLAB):
        total += (e @ c[v : v + _SLAB].t() - row_max[:, None]).exp_().sum(1)
    de, dc = torch.zeros_like(e), torch.empty_like(c)
    for v in range(0, case.V, _SLAB):
        part = c[v : v + _SLAB]
        g = (e @ part.t() - row_max[:, None]).exp_().div_(total[:, None])  # (N, slab)
        rows = ((targets >= v) & (targets < v + len(part))).nonzero().squeeze(1)
        g[rows, targets[rows] - v] -= 1.0
        g /= case.N
        de += g @ part
        dc[v : v + _SLAB] = g.t() @ e
    return de, dc


def gradient_errors(method, case, which, reference):
    """(error of dE, error of dC), None where the pass makes no such gradient."""
    e, c, targets = leaves(inputs(case), which)
    run_pass(method, case, which, e, c, targets)
    return tuple(
        None if tensor.grad is None else _error(tensor.grad, exact)
        for tensor, exact in zip((e, c), reference)
    )


def _error(gradient, exact):
    return ((gradient.double() - exact).norm() / exact.norm()).item()

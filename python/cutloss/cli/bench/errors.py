"""Errors of losses and gradients against a reference in fp64 or fp32, ‖a - b‖ / ‖b‖."""

import dataclasses
import os

import torch

from cutloss._torch.softcap import slope as slope_of_tanh
from cutloss.cli import proc
from cutloss.cli.bench.cases import IGNORED_TARGET, bias_of, inputs, leaves
from cutloss.cli.bench.methods import row_losses, run_pass

_LOGITS = {"cpu": 1 << 28, "cuda": 1 << 31}  # bytes of logits at a time
# Compute capabilities whose fp64 products are not many times slower than those in fp32.
_FP64_DEVICES = ((6, 0), (7, 0), (8, 0), (9, 0), (10, 0))


@dataclasses.dataclass
class Reference:
    dtype: torch.dtype  # it was computed in
    nll: torch.Tensor  # (N), 0 where ignored
    loss: float
    de: torch.Tensor  # (N,D)
    dc: torch.Tensor  # (V,D)


def reference_bytes(case, dtype=torch.float64):
    """C, dC and the logits of the reference, and copies on the way."""
    elements = 3 * case.V * case.D + 3 * case.N * case.D
    return dtype.itemsize * elements + 4 * max(_LOGITS[case.device], dtype.itemsize * case.V)


def reference_dtype(case):
    """What the reference is computed in: fp64 where it takes at most half of the memory that is
    there, and not minutes; on CUDA fp32 where that is so of fp32 alone; else None."""
    free = _available_bytes(case.device)
    if case.device == "cpu":
        fits = reference_bytes(case) <= free // 2 and case.N * case.V * case.D <= 4e11
        return torch.float64 if fits else None
    dtypes = (torch.float64, torch.float32)
    if torch.cuda.get_device_capability() not in _FP64_DEVICES and case.dtype != "fp64":
        dtypes = (torch.float32,)
    return next((d for d in dtypes if reference_bytes(case, d) <= free // 2), None)


def _available_bytes(device):
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    if kib := proc.value("/proc/meminfo", "MemAvailable"):
        return int(kib.split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def reference(case, tensors, dtype=torch.float64):
    """The mean loss and its gradients, chunk by chunk of rows; knows nothing of what it judges."""
    e, c, targets, bias = tensors
    e, c = e.detach().to(dtype), c.detach().to(dtype)
    softcap, temperature = case.option("softcap"), case.option("temperature")
    valid = targets != IGNORED_TARGET
    count = valid.sum()
    nll = torch.zeros(case.N, dtype=dtype, device=e.device)
    de, dc = torch.zeros_like(e), torch.zeros_like(c)
    rows = max(1, _LOGITS[case.device] // (dtype.itemsize * case.V))
    for start in range(0, case.N, rows):
        chosen = torch.arange(start, min(start + rows, case.N), device=e.device)
        chosen = chosen[valid[chosen]]
        part, picked = e[chosen], targets[chosen, None]
        z = part @ c.t()  # (rows, V)
        if bias is not None:
            z += bias.detach().to(dtype)
        slope = 1.0 / (temperature or 1.0)
        if softcap is not None:
            slope = slope * slope_of_tanh(z / softcap)
            z = torch.tanh(z / softcap) * softcap
        if temperature is not None:
            z /= temperature
        z -= z.amax(1, keepdim=True)
        log_sum = z.exp().sum(1).log_()
        nll[chosen] = log_sum - z.gather(1, picked).squeeze(1)
        g = z.sub_(log_sum[:, None]).exp_()
        g.scatter_add_(1, picked, torch.full_like(picked, -1, dtype=dtype))
        g *= slope
        g /= count
        de[chosen] = g @ c
        dc.addmm_(g.t(), part)
    return Reference(dtype, nll, (nll.sum() / count).item(), de, dc)


def reference_gradients(case):
    """dE, dC of the mean loss in fp64."""
    found = reference(case, (*inputs(case), bias_of(case)))
    return found.de, found.dc


def gradient_errors(method, case, pass_name, expected):
    """(error of dE, error of dC) of one call; None where the pass makes no such gradient."""
    e, c, targets, bias = leaves((*inputs(case), bias_of(case)), pass_name)
    run_pass(method, case, pass_name, e, c, targets, bias)
    return errors_of((e.grad, c.grad), expected)


def errors_of(gradients, expected):
    return tuple(None if g is None else error(g, b) for g, b in zip(gradients, expected))


def loss_error(loss, expected):
    return abs(loss - expected.loss) / max(abs(expected.loss), 1e-30)


def row_error(method, case, tensors, expected):
    """The error of the losses of the rows, or None where the method gives only their mean."""
    if not method.kind.per_row:
        return None
    nll = row_losses(method, case, *leaves(tensors, "fw"))
    valid = tensors[2] != IGNORED_TARGET
    return error(nll[valid], expected.nll[valid])


def error(a, b):
    """In slices: in fp64, a - b of a large classifier would be the largest tensor of all."""
    difference = norm = 0.0
    step = max(1, (1 << 26) // max(1, b[0].numel()))
    for i in range(0, len(b), step):
        exact = b[i : i + step].double()
        difference += (a[i : i + step].double() - exact).square().sum().item()
        norm += exact.square().sum().item()
    return (difference / norm) ** 0.5 if norm > 0 else float(difference > 0)

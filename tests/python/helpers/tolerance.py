"""How far results may be from the fp64 reference: twice the error of the plain path in the same
dtype, or a few units in the last place where the plain path happens to be exact.

Errors are measured twice. The root mean square over a tensor says how accurate the arithmetic is,
and is held to the factor 2. The largest one says that no entry is wrong; it is luck of a single
rounding, on both sides, and is held to twice as much.

A unit in the last place is that of the sums (fp32 or fp64), relative to the tensor's root mean
square or largest entry, and one of the dtype that the result is stored in: half of it for the
result, half for the operand of its product, which is rounded to the same dtype. In fp64 the
truth is the plain path itself, so only rounding is left as a measure there, and where a loss of
nearly 0 comes from logits and embeddings of order 10, the truth itself is off by TRUTH_F64.
"""

import torch
from torch import Tensor

FACTOR = 2
ULPS = {torch.float32: 8, torch.float64: 1000}
TRUTH_F64 = 1e-13

# Of a whole model's gradients in another order of layers, batches and processes: relative to their
# norm, some hundred roundings of fp32, or five of bf16 where products are in it.
OF_A_MODEL = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def rms(t: Tensor) -> float:
    return t.double().square().mean().sqrt().item()


def largest(t: Tensor) -> float:
    return t.double().abs().max().item()


def _sums(value: Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def floor(value: Tensor) -> float:
    """Relative."""
    sums = _sums(value)
    return ULPS[sums] * torch.finfo(sums).eps + torch.finfo(value.dtype).eps


def assert_close(
    value: Tensor, truth: Tensor, plain: Tensor, what: str, lenience: float = 1
) -> None:
    """`lenience` multiplies what is allowed, and adds as many units of 1, for problems too small
    to say more than right or wrong: with two rows the error of either side is luck, and with one
    class terms of order 1 cancel to nothing."""
    assert value.shape == truth.shape, f"{what}: shape {value.shape}, expected {truth.shape}"
    if truth.numel() == 0:
        return
    for measure, slack in ((rms, lenience), (largest, 2 * lenience)):
        ours, theirs = measure(value - truth), measure(plain - truth)
        allowed = slack * max(FACTOR * theirs, floor(value) * measure(truth)) + TRUTH_F64
        allowed += (lenience - 1) * torch.finfo(_sums(value)).eps
        assert ours <= allowed, (
            f"{what}: {measure.__name__} error {ours:.3e}, of the plain path {theirs:.3e}, "
            f"allowed {allowed:.3e}"
        )


def assert_near(
    value: Tensor, other: Tensor, what: str, products: torch.dtype = torch.float32
) -> None:
    """`value` and `other` are both the gradient of a parameter of a model."""
    assert value.shape == other.shape, f"{what}: shape {value.shape}, expected {other.shape}"
    if other.numel() == 0:
        return
    error, allowed = rms(value.double() - other.double()), OF_A_MODEL[products] * rms(other)
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}"

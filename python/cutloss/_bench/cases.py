"""What is measured: a shape, a dtype and data."""

import contextlib
import dataclasses
import math

import torch

DATA = ("randn", "peaked", "flat", "offset")
PASSES = ("fw", "fwbw", "fwbw_frozen")

# name: (dtype of E, dtype of C, autocast to)
DTYPES = {
    "fp32": (torch.float32, torch.float32, None),
    "bf16": (torch.bfloat16, torch.bfloat16, None),
    "fp16": (torch.float16, torch.float16, None),
    "fp64": (torch.float64, torch.float64, None),
    # Mixed-precision training: the network's output is 16-bit, the parameters stay fp32.
    "bf16-autocast": (torch.bfloat16, torch.float32, torch.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class Case:
    N: int
    D: int
    V: int
    dtype: str = "fp32"
    data: str = "randn"
    device: str = "cpu"
    seed: int = 0

    @property
    def e_dtype(self):
        return DTYPES[self.dtype][0]

    @property
    def c_dtype(self):
        return DTYPES[self.dtype][1]

    @property
    def product_dtype(self):
        return DTYPES[self.dtype][2] or self.e_dtype

    def autocast(self):
        to = DTYPES[self.dtype][2]
        return torch.autocast(self.device, to) if to else contextlib.nullcontext()

    @property
    def label(self):
        data = "" if self.data == "randn" else f", {self.data}"
        return f"N {self.N}, D {self.D}, V {self.V}, {self.dtype}{data}"

    def gradient_bytes(self, which):
        e = self.N * self.D * self.e_dtype.itemsize
        c = self.V * self.D * self.c_dtype.itemsize
        return {"fw": 0, "fwbw": e + c, "fwbw_frozen": e}[which]


def inputs(case):
    """E (N,D), C (V,D), targets (N)."""
    random = torch.Generator().manual_seed(case.seed)
    e = torch.randn(case.N, case.D, generator=random)
    c = torch.randn(case.V, case.D, generator=random).mul_(case.D**-0.5)  # logits of deviation 1
    targets = torch.randint(case.V, (case.N,), generator=random)
    if case.data == "peaked":  # the target's logit dominates: its probability is about 0.98
        direction = c[targets]
        e += direction * ((math.log(case.V) + 4.5) / direction.square().sum(1, keepdim=True))
    elif case.data == "flat":
        e *= 1e-3
    elif case.data == "offset":  # 100 is exact in every dtype, so every logit gains exactly 1e4
        e[:, 0] = 100.0
        c[:, 0] = 100.0
    elif case.data != "randn":
        raise ValueError(f"data must be one of {', '.join(DATA)}, got {case.data!r}")
    return (
        e.to(case.device, case.e_dtype),
        c.to(case.device, case.c_dtype),
        targets.to(case.device),
    )


def leaves(tensors, which):
    """The same tensors, with gradients asked for as the pass needs them."""
    e, c, targets = tensors
    return (
        e.detach().requires_grad_(which != "fw"),
        c.detach().requires_grad_(which == "fwbw"),
        targets,
    )

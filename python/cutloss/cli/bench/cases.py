"""What is measured: a shape, a dtype, data, and what is asked of the loss."""

import contextlib
import dataclasses
import math

import torch

from cutloss.cli.bench import softmax

DATA = ("randn", "peaked", "flat", "offset")
ALL_DATA = (*DATA, "softmax")
PASSES = ("fw", "fwbw", "fwbw_frozen")
IGNORED_TARGET = -100
OPTIONS = {"softcap": 30.0, "temperature": 0.8, "bias": 0.5}  # the bias: its deviation

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
    ignored: float = 0.0  # the part of the targets that is ignored
    options: str = ""  # names of OPTIONS, joined by +

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
    def option_names(self):
        return tuple(name for name in self.options.split("+") if name)

    def option(self, name):
        """The value of an option that is a number, or None where it is not asked for."""
        return OPTIONS[name] if name in self.option_names else None

    @property
    def num_valid(self):
        return self.N - round(self.N * self.ignored)

    @property
    def label(self):
        parts = [f"N {self.N}, D {self.D}, V {self.V}, {self.dtype}"]
        if self.data != "randn":
            parts.append(self.data)
        if self.ignored:
            parts.append(f"{self.ignored:.0%} ignored")
        if self.options:
            parts.append(self.options)
        return ", ".join(parts)

    def gradient_bytes(self, pass_name):
        e = self.N * self.D * self.e_dtype.itemsize
        c = self.V * self.D * self.c_dtype.itemsize
        bias = self.V * self.c_dtype.itemsize if "bias" in self.option_names else 0
        return {"fw": 0, "fwbw": e + c + bias, "fwbw_frozen": e}[pass_name]


def inputs(case):
    """E (N,D), C (V,D), targets (N)."""
    if case.data == "softmax":
        e, c, targets = softmax.generate(case.N, case.D, case.V, case.device, case.seed)
    else:
        e, c, targets = _random(case)
    if case.ignored:
        random = torch.Generator().manual_seed(case.seed + 1)
        rows = torch.randperm(case.N, generator=random)[case.num_valid :]
        targets[rows.to(targets.device)] = IGNORED_TARGET
    return e.to(case.e_dtype), c.to(case.c_dtype), targets


def _random(case):
    device = case.device  # drawn there: C can have a billion elements
    random = torch.Generator(device).manual_seed(case.seed)
    e = torch.randn(case.N, case.D, generator=random, device=device)
    c = torch.randn(case.V, case.D, generator=random, device=device)
    c.mul_(case.D**-0.5)  # logits of deviation 1
    targets = torch.randint(case.V, (case.N,), generator=random, device=device)
    if case.data == "peaked":  # the target's logit dominates: its probability is about 0.98
        direction = c[targets]
        e += direction * ((math.log(case.V) + 4.5) / direction.square().sum(1, keepdim=True))
    elif case.data == "flat":
        e *= 1e-3
    elif case.data == "offset":  # 100 is exact in every dtype, so every logit gains exactly 1e4
        e[:, 0] = 100.0
        c[:, 0] = 100.0
    elif case.data != "randn":
        raise ValueError(f"data must be one of {', '.join(ALL_DATA)}, got {case.data!r}")
    return e, c, targets


def bias_of(case):
    """(V), or None where the case has no bias."""
    deviation = case.option("bias")
    if deviation is None:
        return None
    random = torch.Generator().manual_seed(case.seed + 2)
    bias = torch.randn(case.V, generator=random) * deviation
    return bias.to(case.device, case.c_dtype)


def leaves(tensors, pass_name):
    """The same tensors, with gradients asked for as the pass needs them; a bias may follow."""
    e, c, targets, *bias = tensors
    return (
        e.detach().requires_grad_(pass_name != "fw"),
        c.detach().requires_grad_(pass_name == "fwbw"),
        targets,
        *(b if b is None else b.detach().requires_grad_(pass_name == "fwbw") for b in bias),
    )

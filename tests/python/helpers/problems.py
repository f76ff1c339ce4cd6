"""Problems for the tests: sizes, kinds of data, sets of options."""

import dataclasses
import functools
import gc
import os
from typing import Any

import pytest
import torch
from helpers.inside import Options, decide, library
from torch import Tensor

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16

device = "cpu"  # where `make` puts its tensors; the fixture of this name sets it

# (batch shape of targets, V, D): one of everything, primes, around the tiles of the engines
# (multiples of 16, 64 rows and columns and up), V a multiple of nothing.
SIZES = [
    ((1,), 1, 1),
    ((1,), 2, 1),
    ((7,), 11, 3),
    ((13,), 101, 17),
    ((63,), 255, 16),
    ((64,), 256, 32),
    ((65,), 257, 33),
    ((2, 37), 1021, 31),
    ((2, 3, 11), 1500, 48),
    ((300,), 3001, 24),
]

# One logit dominates; all are equal; all are large.
KINDS = ["random", "peaked", "flat", "offset"]


@dataclasses.dataclass
class Problem:
    e: Tensor
    c: Tensor
    targets: Tensor
    bias: Tensor | None
    options: dict[str, Any]

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return tuple(t for t in (self.e, self.c, self.bias) if t is not None)

    def to(self, dtype: torch.dtype) -> "Problem":
        """The same values, in another dtype, with gradients of their own."""

        def moved(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.detach().to(dtype).requires_grad_()

        return Problem(moved(self.e), moved(self.c), self.targets, moved(self.bias), self.options)


@functools.cache
def _has_engine(dtype: torch.dtype, device: str, only: str | None) -> bool:
    """`only`: what CUTLOSS_ENGINE says, on which the answer depends."""
    on_cuda = device == "cuda"
    sizes = decide.Sizes(1, 8, 8, 8, dtype, dtype, None, torch.int64, on_cuda=on_cuda)
    try:
        library.plan(sizes.arguments(known_at_forward=True), Options(dtype))
    except NotImplementedError:
        return False
    return True


def has_engine(dtype: torch.dtype) -> bool:
    return _has_engine(dtype, device, os.environ.get("CUTLOSS_ENGINE"))


def graph() -> torch.cuda.CUDAGraph:
    """An empty one. Other tests' graphs that wait for the garbage collector go first: one that is
    freed while another is captured spoils it."""
    gc.collect()
    return torch.cuda.CUDAGraph()


def widest() -> torch.dtype:
    """The dtype with the least rounding that the device has an engine for."""
    return F64 if has_engine(F64) else F32


def make(
    batch: tuple[int, ...] = (24,),
    V: int = 101,
    D: int = 16,
    dtype: torch.dtype = F32,
    kind: str = "random",
    bias: bool = False,
    ignored: float = 0.2,
    seed: int = 0,
    **options: Any,
) -> Problem:
    """A share `ignored` of the targets is ignored. Tensors in `options` that depend on sizes may
    be given as functions of (batch, V, generator). Made on the CPU, so that every device gets the
    same numbers."""
    if not has_engine(dtype):
        pytest.skip(f"no engine takes {dtype} on {device}")
    g = torch.Generator().manual_seed(seed)
    ignore_index = options.get("ignore_index", -100)
    targets = torch.randint(0, V, batch, generator=g)
    e = torch.randn(*batch, D, generator=g, dtype=F64)
    c = torch.randn(V, D, generator=g, dtype=F64) / D**0.5
    b = torch.randn(V, generator=g, dtype=F64)
    if kind == "peaked":
        # The target's logit stands 20 to 40 above the others where D allows.
        e = 30 * D**0.5 * c[targets] / c[targets].norm(dim=-1, keepdim=True) ** 2
        e = e + 0.1 * torch.randn(e.shape, generator=g, dtype=F64)
    elif kind == "flat":
        c = torch.zeros_like(c)
        b = torch.zeros_like(b)
    elif kind == "offset":
        bias, b = True, b + 1e4
    if ignored > 0:
        targets[torch.rand(batch, generator=g) < ignored] = ignore_index
    made = {k: v(batch, V, g) if callable(v) else v for k, v in options.items()}
    made = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in made.items()}

    def parameter(t: Tensor) -> Tensor:
        return t.to(device, dtype).requires_grad_()

    b = parameter(b) if bias else None
    return Problem(parameter(e), parameter(c), targets.to(device), b, made)


def _row_temperature(batch, V, g):
    return 0.5 + torch.rand(batch, generator=g)


def _class_weight(batch, V, g):
    return 0.1 + torch.rand(V, generator=g)


def _token_weight(batch, V, g):
    return torch.rand(batch, generator=g)


# Every option, alone and together. The values are keyword arguments of `make`.
OPTION_SETS: dict[str, dict[str, Any]] = {
    "default": {},
    "sum": dict(reduction="sum"),
    "none": dict(reduction="none"),
    "bias": dict(bias=True),
    "ignore_index": dict(ignore_index=5),
    "nothing_ignored": dict(ignored=0.0),
    "softcap": dict(softcap=3.0),
    "logit_scale": dict(logit_scale=-0.5),
    "temperature": dict(temperature=0.7),
    "row_temperature": dict(temperature=_row_temperature),
    "shift": dict(shift=1),
    "shift_3_none": dict(shift=3, reduction="none"),
    "smoothing": dict(label_smoothing=0.1),
    "smoothing_one": dict(label_smoothing=1.0),
    "weight": dict(weight=_class_weight),
    "weight_smoothing": dict(weight=_class_weight, label_smoothing=0.2),
    "weight_smoothing_none": dict(weight=_class_weight, label_smoothing=0.2, reduction="none"),
    "token_weight": dict(token_weight=_token_weight),
    "z_loss": dict(z_loss=1e-2),
    "z_loss_weight": dict(z_loss=1e-2, weight=_class_weight),
    "lse": dict(return_lse=True),
    "entropy": dict(return_entropy=True),
    "predictions": dict(return_predictions=True),
    "lse_entropy_none": dict(return_lse=True, return_entropy=True, reduction="none"),
    "everything": dict(
        bias=True,
        softcap=4.0,
        logit_scale=1.5,
        temperature=_row_temperature,
        shift=True,
        label_smoothing=0.1,
        weight=_class_weight,
        token_weight=_token_weight,
        z_loss=1e-3,
        return_lse=True,
        return_entropy=True,
        return_predictions=True,
    ),
    "everything_mean": dict(
        bias=True,
        softcap=4.0,
        logit_scale=1.5,
        temperature=_row_temperature,
        shift=2,
        label_smoothing=0.1,
        weight=_class_weight,
        token_weight=_token_weight,
        z_loss=1e-3,
    ),
}

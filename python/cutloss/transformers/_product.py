"""Whether a forward is the product with its layer's weight, in whatever dtypes, and nothing else.

It is called on made-up rows, with made-up weights in place of the layer's, and what comes out is
compared with F.linear: with a few classes of ordinary numbers, to rounding, and where gradients
would go; and with as many classes and features as the layer has, of whole numbers so small that
every dtype has their products exactly, for equality. So no class, feature, scale, vector or
quantisation goes unseen. The layer's own weight is not needed: it may be sharded, or not there yet.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._torch import private
from .._torch.partitioned import whole_shape

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_CLASSES = 8192  # that are compared at a time


class Found(NamedTuple):
    rounds_input: bool  # a wider input is cast to the weight's dtype
    outside_autocast: bool  # the product is not done in the dtype of autocast


def found(head: nn.Module, layer: nn.Linear, function: Callable) -> Found | None:
    """Of a function that a head, which is or holds the layer, is called by. None where it is not
    the product, or can not be called so."""
    if not _is_all(head, layer):
        return None
    modes = [(m, m.training) for m in head.modules()]
    device = torch.device("cpu") if layer.weight.is_meta else layer.weight.device
    devices = [device.index] if device.type == "cuda" else []
    whole = _whole_numbers(layer, device)
    try:
        with (
            torch.random.fork_rng(devices),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            of_modes = []
            for training in (False, True):  # dropout is in one of them
                head.train(training)
                of_modes.append(_compared(layer, function, device, whole))
    finally:
        for module, training in modes:
            module.training = training
    return of_modes[0] if of_modes[0] == of_modes[1] else None


class _Caller(nn.Module):
    """So that functional_call puts other weights into the layer, whoever reads them there."""

    def __init__(self, layer: nn.Linear, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.layer = layer
        self.function = (function,)  # in a tuple: a module would be registered

    def forward(self, x: Tensor) -> Tensor:
        return self.function[0](x)


class _Whole(NamedTuple):
    """Rows, a weight, a bias, and what the product of them is."""

    x: Tensor  # (1, n, D)
    w: Tensor  # (V, D)
    b: Tensor | None  # (V)
    want: Tensor  # (1, n, V), fp32


def _is_all(head: nn.Module, layer: nn.Linear) -> bool:
    """Whether the head's only parameters are those of the layer, with a dtype to compute in."""
    own = private.parameters_of(layer)
    names = {id(p) for p in own.values()}
    parameters = {id(p) for p in head.parameters()}
    known = set(own) == {"weight", "bias"} and parameters <= names
    known = known and len(whole_shape(layer.weight)) == 2 and layer.weight.dtype in DTYPES
    return known and not any(True for _ in head.buffers())


def _compared(
    layer: nn.Linear, function: Callable, device: torch.device, whole: _Whole
) -> Found | None:
    dtype = layer.weight.dtype
    D = whole.w.shape[1]
    draw = torch.Generator().manual_seed(1)
    w = torch.randn(5, D, generator=draw, dtype=torch.float64) / D**0.5
    w = w.to(device, dtype).requires_grad_()
    b = None
    if layer.bias is not None:
        b = torch.tensor([0.5, -1.0, 0.0, 2.0, 100.0], device=device, dtype=dtype).requires_grad_()
    caller = _Caller(layer, function)

    def call(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor | None:
        weights = {"layer.weight": w} | ({} if b is None else {"layer.bias": b})
        try:
            return torch.func.functional_call(caller, weights, (x,))
        except torch.OutOfMemoryError:
            raise
        except Exception:  # it does not cast this dtype, and a product of two dtypes is an error
            return None

    def is_exact(dtype_of_x: torch.dtype) -> bool:
        y = call(whole.x.to(dtype_of_x).requires_grad_(), whole.w, whole.b)
        return y is not None and _is(y, whole.want)

    rounds_input = False
    taken = None
    for dtype_of_x in DTYPES:
        x = rows(D).to(device, dtype_of_x).view(2, -1, D).requires_grad_()
        y = call(x, w, b)
        if y is None:
            continue
        if not _is_product(y, x, w, b, dtype):
            return None
        if _leaves(y) != {id(t) for t in (x, w, b) if t is not None}:
            return None
        # A copy of the whole weight in fp64 may be more than there is memory for.
        if (dtype_of_x.itemsize <= 4 or dtype_of_x == dtype) and not is_exact(dtype_of_x):
            return None
        if torch.promote_types(dtype_of_x, dtype) != dtype:
            rounded = F.linear(x.to(dtype), w, b)
            rounds_input = rounds_input or equal(y, rounded.to(y.dtype))
        taken = x
    if taken is None:
        return None
    with torch.autocast(device.type, torch.bfloat16):
        y = call(taken, w, b)
        exact = is_exact(taken.dtype)
    if y is None or not exact or not _is_product(y, taken, w, b, torch.bfloat16):
        return None
    # Of a weight in 16 bits the product is the same to rounding.
    outside_autocast = dtype.itemsize > 2 and not equal(y, y.bfloat16().to(y.dtype))
    return Found(rounds_input, outside_autocast)


def _whole_numbers(layer: nn.Linear, device: torch.device) -> _Whole:
    """Of which no operand, product, sum or part of a sum needs more bits than the 8 of bf16.

    The first feature of the weight has whole numbers of all 8 bits, the others have signs. The
    rows: the first feature alone; zero; numbers of 8 bits times a sign; and signs of all features
    but the first, in each row as many as can be added up.
    """
    V, D = whole_shape(layer.weight)
    draw = torch.Generator().manual_seed(2)

    def whole(low: int, high: int, n: int) -> Tensor:
        return torch.randint(low, high + 1, (n,), generator=draw)

    signs = (2 * whole(0, 1, V + D) - 1).to(device, layer.weight.dtype)
    w = signs.as_strided((V, D), (1, 1)).clone(memory_format=torch.contiguous_format)
    w[:, 0] = whole(-251, 251, V).to(w)
    b = whole(-4, 4, V).to(w).requires_grad_() if layer.bias is not None else None

    x = torch.zeros(2 + 3 + -(-D // 192), D)
    x[0, 0] = 1
    if D > 1:
        x[2:5, 1] = torch.tensor([151.0, -201.0, 251.0])
    for row, start in enumerate(range(1, D, 192), 5):
        x[row, start : start + 192] = (2 * whole(0, 1, D) - 1)[start : start + 192].float()
    x = x[None].to(device)

    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        parts = [F.linear(x, w[c].float(), None if b is None else b[c].float()) for c in _slices(V)]
    return _Whole(x, w.requires_grad_(), b, torch.cat(parts, -1))


def _slices(V: int) -> list[slice]:
    return [slice(v, v + _CLASSES) for v in range(0, V, _CLASSES)]


def _is(y: object, want: Tensor) -> bool:
    if not isinstance(y, Tensor) or not y.is_floating_point() or y.shape != want.shape:
        return False
    return all(bool((y[..., v] == want[..., v]).all()) for v in _slices(want.shape[-1]))


def _is_product(y: object, x: Tensor, w: Tensor, b: Tensor | None, dtype: torch.dtype) -> bool:
    """Within the rounding of that dtype, or of y's where it is coarser."""
    if not isinstance(y, Tensor) or not y.is_floating_point() or y.shape != (*x.shape[:-1], len(w)):
        return False
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        x, w = x.double(), w.double()
        b = torch.zeros(len(w), dtype=x.dtype, device=x.device) if b is None else b.double()
        want, size = F.linear(x, w, b), F.linear(x.abs(), w.abs(), b.abs())
        kinds = [torch.finfo(dtype), torch.finfo(y.dtype)]
        eps, tiny = max(k.eps for k in kinds), max(k.tiny for k in kinds)
        if y.is_cuda and torch.backends.cuda.matmul.allow_tf32:
            eps = max(eps, 2.0**-10)
        near = (y.double() - want).abs() <= 4 * eps * size + tiny
        return bool((near | (y.isnan() & want.isnan())).all())


def _leaves(y: Tensor) -> set[int]:
    """The tensors that gradients of y would go to."""
    found, seen, open_nodes = set(), set(), [y.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.add(id(variable))
        open_nodes += [n for n, _ in node.next_functions]
    return found


def rows(D: int) -> Tensor:
    """6 rows of D numbers: ordinary, large, zero, and one that is not a number."""
    rows = torch.randn(6, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[1] *= 100
    rows[2] *= 1000
    rows[3] = 0
    rows[5, 0] = float("nan")
    return rows


def equal(a: Tensor, b: Tensor) -> bool:
    """Where one is not a number the other is none either."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())

"""Classifiers that cast: a forward, a wrapper or a hook that changes dtypes and nothing else.

Whether that is all is found out by calling them on a few made-up rows, with a small weight in place
of theirs, and comparing what comes out, and where its gradients would go, with F.linear.
"""

import contextlib
import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "_cutloss_cast"  # the attribute of a layer that has one
_HOOKS = "_cutloss_cast_hooks"  # those of a layer that were found to cast

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(eq=False)
class Cast:
    """What a classifier's layer does beside its product."""

    own: Callable[[Tensor], Tensor] | None  # the forward of the instance; None: of the class
    rounds_input: bool  # a wider input is cast to the weight's dtype
    outside_autocast: bool  # the product is not done in the dtype of autocast
    checked: int  # the id of the layer; that of a copy is another

    def logits(self, layer: nn.Linear, hidden: Tensor) -> Tensor:
        return self.own(hidden) if self.own is not None else type(layer).forward(layer, hidden)

    def operand(self, layer: nn.Linear, hidden: Tensor) -> Tensor:
        """A wider one that is not rounded stays what it is, and is refused where it is used."""
        dtype = layer.weight.dtype
        wider = torch.promote_types(hidden.dtype, dtype) != dtype
        return hidden if wider and not self.rounds_input else hidden.to(dtype)

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        if self.outside_autocast:
            return torch.autocast(device.type, enabled=False)
        return contextlib.nullcontext()


class Result(dict):
    """What comes out of a layer in place of logits, through hooks that would cast them."""

    def _itself(self, *args, **kwargs) -> "Result":
        return self

    to = type = float = double = half = bfloat16 = _itself


def result(layer: nn.Linear, value: object) -> dict:
    # In a dict, so that a hook that changes an output cannot take this for logits.
    return (Result if layer.__dict__.get(_HOOKS) else dict)(cutloss=value)


def of_layer(layer: nn.Linear, own: Callable[[Tensor], Tensor] | None) -> Cast | None:
    """None where its forward, which is not nn.Linear's, does more than to cast, or nothing."""
    found = layer.__dict__.get(NAME)
    if found is not None and own is None:
        if found.checked == id(layer):
            return found
        own = found.own
    if not _is_all(layer, layer):
        return None
    forward = own or (lambda x: type(layer).forward(layer, x))
    return _probed(layer, layer, forward, own)


def of_wrapper(head: nn.Module) -> tuple[nn.Linear, Cast] | None:
    """A module without weights of its own around one nn.Linear."""
    layers = [m for m in head.modules() if isinstance(m, nn.Linear)]
    if len(layers) != 1 or layers[0] is head or not _is_all(head, layers[0]):
        return None
    cast = _probed(head, layers[0], head, None)
    return None if cast is None else (layers[0], cast)


def forget(layer: nn.Linear) -> Cast | None:
    layer.__dict__.pop(_HOOKS, None)
    return layer.__dict__.pop(NAME, None)


def is_cast(layer: nn.Linear, hook: Callable, of_input: bool) -> bool:
    """Whether a hook of the layer casts its input or output, and does nothing else."""
    known = layer.__dict__.get(_HOOKS, [])
    if any(hook is h for h in known):
        return True
    casts = False
    rows = _rows(8)
    try:
        for dtype in _DTYPES:
            given = rows.to(dtype, copy=True).requires_grad_()
            with torch.enable_grad():
                got = hook(layer, (given,)) if of_input else hook(layer, (rows,), given)
            if of_input and isinstance(got, tuple) and len(got) == 1:
                got = got[0]
            if got is None:
                continue  # as if there were no hook
            same = got.is_floating_point() and _equal(got, given.to(got.dtype))
            if not same or not torch.equal(_gradient(got, given), torch.ones_like(given)):
                return False
            casts = casts or got.dtype != dtype
    except Exception:
        return False
    if casts:
        layer.__dict__[_HOOKS] = [*known, hook]
    return casts


class _Caller(nn.Module):
    """So that functional_call puts other weights into the layer, whoever reads them there."""

    def __init__(self, layer: nn.Linear, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.layer = layer
        self.function = (function,)  # in a tuple: a module would be registered

    def forward(self, x: Tensor) -> Tensor:
        return self.function[0](x)


def _is_all(head: nn.Module, layer: nn.Linear) -> bool:
    """Whether the head's only parameters are those of the layer, with a dtype to compute in."""
    names = {id(p) for p in layer._parameters.values()}
    parameters = {id(p) for p in head.parameters()}
    known = set(layer._parameters) == {"weight", "bias"} and parameters <= names
    return known and not any(True for _ in head.buffers()) and layer.weight.dtype in _DTYPES


def _probed(
    head: nn.Module, layer: nn.Linear, function: Callable, own: Callable | None
) -> Cast | None:
    modes = [(m, m.training) for m in head.modules()]
    devices = [layer.weight.device] if layer.weight.device.type == "cuda" else []
    try:
        with torch.random.fork_rng([d.index for d in devices]), torch.enable_grad():
            found = []
            for training in (False, True):  # dropout is in one of them
                head.train(training)
                found.append(_compared(layer, function))
    finally:
        for module, training in modes:
            module.training = training
    if found[0] is None or found[0] != found[1]:
        return None
    return Cast(own, *found[0], id(layer))


def _compared(layer: nn.Linear, function: Callable) -> tuple[bool, bool] | None:
    """rounds_input and outside_autocast; None where it is not a product with the weight, cast."""
    dtype = layer.weight.dtype
    device = torch.device("cpu") if layer.weight.is_meta else layer.weight.device
    D = getattr(layer.weight, "ds_shape", layer.weight.shape)[1]
    draw = torch.Generator().manual_seed(1)
    w = torch.randn(5, D, generator=draw, dtype=torch.float64) / D**0.5
    w = w.to(device, dtype).requires_grad_()
    b = None
    if layer.bias is not None:
        b = torch.tensor([0.5, -1.0, 0.0, 2.0, 100.0], device=device, dtype=dtype).requires_grad_()
    caller = _Caller(layer, function)
    weights = {"layer.weight": w} | ({} if b is None else {"layer.bias": b})

    def call(x: Tensor) -> Tensor | None:
        try:
            return torch.func.functional_call(caller, weights, (x,))
        except Exception:  # it does not cast this dtype, and a product of two dtypes is an error
            return None

    casts = rounds_input = False
    taken = None
    for dtype_of_x in _DTYPES:
        x = _rows(D).to(device, dtype_of_x).view(2, -1, D).requires_grad_()
        y = call(x)
        if y is None:
            continue
        if not _is_product(y, x, w, b, dtype):
            return None
        if _leaves(y) != {id(t) for t in (x, *weights.values())}:
            return None
        casts = casts or dtype_of_x != dtype or y.dtype != dtype
        if torch.promote_types(dtype_of_x, dtype) != dtype:
            rounded = F.linear(x.to(dtype), w, b)
            rounds_input = rounds_input or _equal(y, rounded.to(y.dtype))
        taken = x
    if not casts:
        return None
    with torch.autocast(device.type, torch.bfloat16):
        y = call(taken)
    if y is None:
        return None
    if not _is_product(y, taken, w, b, torch.bfloat16):
        return None
    # Of a weight in 16 bits the product is the same to rounding.
    outside_autocast = dtype.itemsize > 2 and not _equal(y, y.bfloat16().to(y.dtype))
    return rounds_input, outside_autocast


def _is_product(y: object, x: Tensor, w: Tensor, b: Tensor | None, dtype: torch.dtype) -> bool:
    """Within the rounding of that dtype, or of y's where it is coarser."""
    if not isinstance(y, Tensor) or not y.is_floating_point() or y.shape != (*x.shape[:-1], len(w)):
        return False
    with torch.no_grad():
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


def _rows(D: int) -> Tensor:
    """6 rows of D numbers: ordinary, large, zero, and one that is not a number."""
    rows = torch.randn(6, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[1] *= 100
    rows[2] *= 1000
    rows[3] = 0
    rows[5, 0] = float("nan")
    return rows


def _equal(a: Tensor, b: Tensor) -> bool:
    """Where one is not a number the other is none either."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _gradient(y: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(y.sum(), x)[0] if y is not x else torch.ones_like(x)

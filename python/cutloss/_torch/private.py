"""Every private name of PyTorch that cutloss takes, and nothing of it elsewhere.

Each stands with the versions it was seen in; tests/python/project/test_private_names.py tries each,
and that no other file has one.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_functorch = torch._C._functorch  # 2.11, 2.13: what torch.func and torch.vmap are made of

# The compiler ------------------------------------------------------------------------------------


def untraced(fn: Callable) -> Callable:
    """What torch.compiler.disable makes, without importing the compiler before somebody uses it."""
    left_alone = torch._disable_dynamo(fn)  # 2.11, 2.13

    @functools.wraps(fn)
    def call(*args, **options):
        if torch.compiler.is_compiling():
            return left_alone(*args, **options)
        return fn(*args, **options)

    return call


def while_traced(fn: Callable) -> Callable:
    """torch.compile calls it once, while it traces, and takes what it returns for a constant: for
    what is said once, in a graph that stays whole. Where PyTorch itself watches what the function
    reads, it compiles again when that changes.

    What torch.compiler.assume_constant_result makes, without importing the compiler."""
    fn._dynamo_marked_constant = True  # 2.11, 2.13
    return fn


def is_static(*numbers: Any) -> bool:
    """Whether each is a number of which a tracer knows the value, no symbol."""
    # Here, since the module takes long to import; who traces has it.
    from torch.fx.experimental.symbolic_shapes import has_static_value  # 2.11, 2.13

    return all([has_static_value(number) for number in numbers])


def is_known_to_be(condition: Any) -> bool:
    """Whether a condition on symbols holds: a guard where they are those of sizes, and False where
    they depend on data."""
    from torch.fx.experimental import symbolic_shapes

    guarded = getattr(symbolic_shapes, "guard_or_false", None)  # 2.11, 2.13; not in 2.10
    return bool(condition) if guarded is None else guarded(condition)


def is_compiled(module: nn.Module) -> bool:
    """Whether it is what torch.compile made of a module."""
    return hasattr(module, "_orig_mod")  # 2.11, 2.13


# Process groups ----------------------------------------------------------------------------------


def group_named(name: str) -> Any:
    """The process group whose group_name it is."""
    return torch.distributed.distributed_c10d._resolve_process_group(name)  # 2.11, 2.13


# Autograd and transforms -------------------------------------------------------------------------


# A context in which operators are called without their autograd.
below_autograd = torch._C._AutoDispatchBelowAutograd  # 2.11, 2.13

are_transforms_active = torch._C._are_functorch_transforms_active  # 2.11, 2.13


def is_transformed() -> bool:
    """Whether a transform of torch.func is at work, for which the gradient of forward's rows is
    made in backward."""
    return not torch.compiler.is_compiling() and are_transforms_active()


@while_traced  # PyTorch compiles again where the stack changes
def is_in_vmap() -> bool:
    stack = _functorch.get_interpreter_stack() or ()  # 2.11, 2.13
    return any(i.key() == _functorch.TransformType.Vmap for i in stack)  # 2.11, 2.13


_is_wrapped = _functorch.is_functorch_wrapped_tensor  # 2.11, 2.13
_is_legacy = _functorch.is_legacy_batchedtensor  # 2.13


# The types of tensors that are no subclass with a meaning of its own.
ORDINARY = (Tensor, nn.Parameter)


def is_ordinary(t: Tensor) -> bool:
    """Whether a tensor is one with memory of its own, not one for a tracer, for torch.func, or for
    a batch of upstream gradients."""
    if type(t) not in ORDINARY:
        return False
    return not (_is_wrapped(t) or _is_legacy(t))


def requires_grad(t: Tensor) -> bool:
    """t.requires_grad; inside torch.vmap, where each tensor says no, that of the tensor that it
    stands for. A tracer cannot look there: see wants_gradient."""
    if t.requires_grad or torch.compiler.is_compiling():
        return t.requires_grad
    while _is_wrapped(t):
        t = _functorch.get_unwrapped(t)  # 2.11, 2.13
        if t.requires_grad:
            return True
    return False


def is_in_forward_mode() -> bool:
    return forward_ad._current_level >= 0  # 2.11, 2.13


def have_tangent(*tensors: Tensor | None) -> bool:
    """Whether one of them carries a derivative of forward mode."""
    if torch.compiler.is_compiling() or not is_in_forward_mode():
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def has_hooks_of_saved_tensors() -> bool:
    """Whether torch.utils.checkpoint or another hook takes what is saved for backward."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # 2.11, 2.13


def will_go_on_to(node: Any) -> bool:
    """In backward: whether it goes on to that node, or was asked for other gradients alone."""
    return torch._C._will_engine_execute_node(node)  # 2.11, 2.13


def version_of(t: Tensor) -> int:
    """A number that changes when the tensor is changed in place."""
    return t._version  # 2.11, 2.13


def base_of(t: Tensor) -> Tensor | None:
    """The tensor of which this one is a view, if any."""
    return t._base  # 2.11, 2.13


# Batches of upstream gradients --------------------------------------------------------------------

_is_batched = _functorch.is_batchedtensor  # 2.13
_level_of = _functorch.maybe_get_level  # 2.13


class Batch(NamedTuple):
    """Upstream gradients of which some stand for many: under torch.vmap around autograd.grad, or
    with its is_grads_batched, which has a kind of batched tensors of its own."""

    level: int  # of vmap's nesting
    is_legacy: bool  # of is_grads_batched
    upstream: tuple[Tensor | None, ...]
    wholes: tuple[Tensor | None, ...]  # of what is batched, with the batch as dimension 0

    def entries(self) -> list[tuple[Tensor | None, ...]]:
        size = next(t.shape[0] for t in self.wholes if t is not None)
        pairs = list(zip(self.upstream, self.wholes))
        return [tuple(t if all_ is None else all_[i] for t, all_ in pairs) for i in range(size)]

    def wrapped(self, t: Tensor) -> Tensor:
        """The tensor whose dimension 0 is the batch, as vmap has it."""
        wrap = torch._add_batch_dim if self.is_legacy else _functorch._add_batch_dim  # 2.13
        return wrap(t, 0, self.level)


def batch_of(upstream: tuple[Tensor | None, ...]) -> Batch | None:
    """The innermost one; None: nothing is batched."""
    if torch.compiler.is_compiling():
        return None
    levels = [0]
    for t in upstream:
        if t is not None and _is_legacy(t):
            wholes = tuple(map(_whole_of_legacy, upstream))
            return Batch(_LEGACY_LEVEL, True, upstream, wholes)
        if t is not None and _is_batched(t):
            levels.append(_level_of(t))
    level = max(levels)
    if level == 0:
        return None
    return Batch(level, False, upstream, tuple(_whole(t, level) for t in upstream))


def _whole(t: Tensor | None, level: int) -> Tensor | None:
    if t is None or not _is_batched(t) or _level_of(t) != level:
        return None
    at = _functorch.maybe_get_bdim(t)  # 2.13
    return _functorch.get_unwrapped(t).movedim(at, 0)  # 2.13


_LEGACY_LEVEL = 1  # 2.13: what is not nested is at the first


def _whole_of_legacy(t: Tensor | None) -> Tensor | None:
    if t is None or not _is_legacy(t):
        return None
    whole = torch._remove_batch_dim(t, _LEGACY_LEVEL, 1, 0)  # 2.13
    if _is_legacy(whole):
        raise NotImplementedError(
            "cutloss makes gradients for a batch of upstream gradients, not for batches inside "
            "batches (is_grads_batched inside is_grads_batched): loop over the outer one"
        )
    return whole


# The counter of floating-point operations ---------------------------------------------------------

FLOP_COUNTER = "torch.utils.flop_counter"


def flop_counters() -> list[Any]:
    """The FlopCounterModes that are counting at this moment."""
    module = sys.modules.get(FLOP_COUNTER)
    if module is None:
        return []
    modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()  # 2.11, 2.13
    return [m.counter for m in modes if isinstance(m, module._FlopCounterMode)]  # 2.11, 2.13


# What a module has --------------------------------------------------------------------------------


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Its own, those that are None too."""
    return module._parameters  # 2.11, 2.13


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """Its own, which may be exchanged here."""
    return module._buffers  # 2.11, 2.13


def forward_pre_hooks(module: nn.Module) -> list[Callable]:
    return list(module._forward_pre_hooks.values())  # 2.11, 2.13


def forward_hooks(module: nn.Module) -> list[Callable]:
    return list(module._forward_hooks.values())  # 2.11, 2.13


def backward_hooks(module: nn.Module) -> list[Callable]:
    return [*module._backward_pre_hooks.values(), *module._backward_hooks.values()]  # 2.11, 2.13


def has_hooks_before_load(module: nn.Module) -> bool:
    return bool(module._load_state_dict_pre_hooks)  # 2.11, 2.13


def has_forward_hooks_of_all_modules() -> bool:
    return bool(nn.modules.module._global_forward_hooks)  # 2.11, 2.13

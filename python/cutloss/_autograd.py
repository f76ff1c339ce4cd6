"""What autograd asks for: of which tensors it wants gradients, and whether inside torch.vmap."""

import torch
from torch import Tensor


def requires_grad(t: Tensor) -> bool:
    """t.requires_grad; inside torch.vmap, where each tensor says no, that of the tensor that it
    stands for. A tracer cannot look there: see wants_gradient."""
    if t.requires_grad or torch.compiler.is_compiling():
        return t.requires_grad
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        t = torch._C._functorch.get_unwrapped(t)
        if t.requires_grad:
            return True
    return False


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd asks for a gradient of one of them, or may do so: of tensors that are traced
    inside torch.vmap nobody knows, and a gradient that nobody wanted costs work alone."""
    if not torch.is_grad_enabled():
        return False
    present = [t for t in tensors if t is not None]
    if any(requires_grad(t) for t in present):
        return True
    is_unknown = torch.compiler.is_compiling() and is_in_vmap()
    return is_unknown and any(t.is_floating_point() for t in present)


def is_in_vmap() -> bool:
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(i.key() == torch._C._functorch.TransformType.Vmap for i in stack)


is_in_vmap._dynamo_marked_constant = True  # PyTorch compiles again where the stack changes

"""tanh, whose derivative keeps its digits where tanh itself is 1 to the last of them.

PyTorch takes 1 - tanh^2, which in fp32 is 0 from 9 on and off by a factor before, in bf16 from 3.
Made of x it is right everywhere, as src/core/transform.h has it:

    tanh'(x) = 4 u / (1 + u)^2 = 4 sigmoid(2x) sigmoid(-2x),   u = e^(-2|x|)
"""

import torch
from torch import Tensor


def capped(a: Tensor, softcap: float | None) -> Tensor:
    """softcap tanh(a / softcap), the same bits as written that way; a without a softcap."""
    if softcap is None:
        return a
    tanh = _Tanh if torch.compiler.is_compiling() else _TanhForwardToo
    return softcap * tanh.apply(a / softcap)


def slope(x: Tensor) -> Tensor:
    """The derivative of tanh at x."""
    return 4 * torch.sigmoid(2 * x) * torch.sigmoid(-2 * x)


def mul_slope_(g: Tensor, x: Tensor) -> Tensor:
    """g times the slope at x, in place; x is used up. No third tensor of their size is made."""
    # 1 / cosh^2: where cosh is infinite the slope is 0.
    x.cosh_()
    return g.div_(x).div_(x)


class _Tanh(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return torch.tanh(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, d):
        return d * slope(*ctx.saved_tensors)


class _TanhForwardToo(_Tanh):
    """With forward-mode derivatives. torch.compile takes no function that has them."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx, tangent):
        return tangent * slope(*ctx.saved_tensors)

"""A model with cutloss.patch beside the same without: its losses, its gradients, and no logits."""

import torch
from helpers.architectures import V
from torch.utils._python_dispatch import TorchDispatchMode


class NoLogits(TorchDispatchMode):
    """Every tensor that PyTorch makes, in backward too, has another last dimension than logits."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(results):
            if isinstance(t, torch.Tensor) and t.dim() > 0 and t.shape[-1] == V:
                assert t.numel() == V, f"{function} made a tensor of shape {tuple(t.shape)}"
        return results


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def run(model, **inputs):
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return output, gradients(model)


def assert_same(got, want):
    (output, grads), (stock, stock_grads) = got, want
    torch.testing.assert_close(output.loss, stock.loss, rtol=2e-6, atol=2e-6)
    assert grads.keys() == stock_grads.keys()
    for name, want_grad in stock_grads.items():
        scale = want_grad.abs().max().item()
        limits = dict(rtol=1e-4, atol=2e-5 * scale + 1e-9)
        torch.testing.assert_close(grads[name], want_grad, **limits, msg=lambda m: f"{name}: {m}")

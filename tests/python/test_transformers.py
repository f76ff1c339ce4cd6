"""cutloss.patch: loss and gradients are those of the model itself, and no logits are made."""

import pytest
import torch
from architectures import ARCHITECTURES, V, batch, make
from torch.utils._python_dispatch import TorchDispatchMode

import cutloss


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


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_and_gradients_are_the_models_own(name):
    model, inputs = make(name), batch()
    want = run(model, **inputs), run(model, **inputs, num_items_in_batch=torch.tensor(29))
    cutloss.patch(model)
    with NoLogits():
        got = run(model, **inputs), run(model, **inputs, num_items_in_batch=torch.tensor(29))
    for g, w in zip(got, want):
        assert_same(g, w)
        assert type(g[0]) is type(w[0])
        assert "logits" not in g[0] and g[0].logits is None
        assert [k for k in w[0] if k != "logits"] == list(g[0])
    if want[0][0].get("aux_loss") is not None:
        assert want[0][0].aux_loss > 0
        torch.testing.assert_close(got[0][0].aux_loss, want[0][0].aux_loss)

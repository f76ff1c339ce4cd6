"""Tensors whose elements do not lie at strides (nested, sparse, oneDNN's): each function says which
it was given, and what to pass instead, before it does anything else."""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cutloss
from cutloss import losses
from cutloss.compat.liger import LigerFusedLinearCrossEntropyLoss
from cutloss.losses import TokenLogProbs

B, L, D, V = 3, 4, 8, 16
OFFSETS = torch.tensor([0, 1, 3, B])


def jagged(t):
    return torch.nested.nested_tensor_from_jagged(t, OFFSETS)


def nested(t):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, that these are a prototype
        return torch.nested.nested_tensor(list(t))


INSTEAD = r"torch.cat\({name}.unbind\(\)\).*torch.nested.to_padded_tensor\({name}, 0.0\)"
# How it is made, what the message says of it, and what to do.
LAYOUTS = {
    "jagged": (jagged, r"is a nested tensor \(of layout torch.jagged\)", INSTEAD),
    "nested": (nested, r"is a nested tensor \(of layout torch.strided\)", INSTEAD),
    "coo": (lambda t: t.to_sparse(), "has the layout torch.sparse_coo", r"{name}.to_dense\(\)"),
    "csr": (lambda t: t.to_sparse_csr(), "has the layout torch.sparse_csr", r"{name}.to_dense\(\)"),
    "mkldnn": (lambda t: t.to_mkldnn(), "has the layout torch._mkldnn", r"{name}.to_dense\(\)"),
}


def inputs():
    g = torch.Generator().manual_seed(0)
    e, c = torch.randn(B, L, D, generator=g), torch.randn(V, D, generator=g)
    return dict(
        e=e, c=c, targets=torch.randint(0, V, (B, L), generator=g), bias=torch.randn(V, generator=g),
        z=e @ c.T, weight=torch.rand(V, generator=g), token_weight=torch.rand(B, L, generator=g),
        temperature=torch.ones(B, L), nll=torch.rand(B, L, generator=g),
        mask=torch.ones(B, L, dtype=torch.bool), ids=torch.arange(3).expand(B, L, 3).contiguous(),
        log_probs=torch.full((B, L, 3), -2.0),
    )  # fmt: skip


def head(i):
    made = cutloss.CausalLMHead(D, V)
    with torch.no_grad():
        made.output_embeddings.weight.copy_(i["c"])
    return made


# What is called with which of the inputs, by the names that its messages have for them.
CALLS = {
    "linear_cross_entropy": (
        lambda i: cutloss.linear_cross_entropy(
            i["e"], i["c"], i["targets"], i["bias"], weight=i["weight"],
            temperature=i["temperature"], token_weight=i["token_weight"]),
        "e c targets bias weight temperature token_weight"),
    "impl_torch": (
        lambda i: cutloss.linear_cross_entropy(i["e"], i["c"], i["targets"], impl="torch"),
        "e c targets"),
    "cross_entropy": (
        lambda i: cutloss.cross_entropy(
            i["z"], i["targets"], weight=i["weight"], token_weight=i["token_weight"],
            temperature=i["temperature"]),
        "z=logits targets weight temperature token_weight"),
    "CausalLMLoss": (
        lambda i: cutloss.CausalLMLoss(V)(i["z"], i["targets"]), "z=logits targets=labels"),
    "CausalLMHead": (lambda i: head(inputs())(i["e"], i["targets"]), "e=hidden targets=labels"),
    "LinearCrossEntropy": (
        lambda i: cutloss.LinearCrossEntropy()(i["e"], i["c"], i["targets"]), "e c targets"),
    "token_log_probs": (
        lambda i: losses.token_log_probs(i["e"], i["c"], i["targets"], i["bias"]),
        "e c targets bias"),
    "linear_token_loss": (
        lambda i: losses.linear_token_loss(
            i["e"], i["c"], i["targets"], lambda nll, w: nll * w,
            per_token={"w": i["token_weight"]}),
        "e c targets token_weight=per_token['w']"),
    "evaluate": (
        lambda i: losses.evaluate(i["e"], i["c"], i["targets"], token_weight=i["token_weight"]),
        "e c targets token_weight"),
    "perplexity": (
        lambda i: losses.perplexity(i["nll"], i["mask"], i["token_weight"]),
        "nll mask token_weight"),
    "token_accuracy": (
        lambda i: losses.token_accuracy(i["ids"], i["ids"]), "ids=predictions"),
    "z_loss": (lambda i: losses.z_loss(i["nll"], i["mask"]), "nll=lse mask"),
    "linear_loss": (
        lambda i: losses.linear_loss(
            "policy", i["e"], i["c"], i["targets"], advantages=i["token_weight"]),
        "e c targets token_weight=advantages"),
    "linear_distillation": (
        lambda i: losses.linear_distillation(
            i["e"], i["c"], i["nll"][..., None].expand(B, L, D), i["c"], i["targets"],
            mask=i["mask"], token_weight=i["token_weight"]),
        "e c targets mask token_weight"),
    "linear_distillation_top_k": (
        lambda i: losses.linear_distillation_top_k(
            i["e"], i["c"], i["ids"], i["log_probs"], i["targets"]),
        "e c ids=teacher_ids log_probs=teacher_log_probs targets"),
    "TokenLogProbs": (
        lambda i: TokenLogProbs(i["nll"], i["mask"]), "nll=log_probs mask"),
    "torch_compat": (
        lambda i: cutloss.torch_compat.linear_cross_entropy(
            i["e"][:, 0], i["c"], i["targets"][:, 0], linear_bias=i["bias"]),
        "c=linear_weight bias=linear_bias"),
    "liger": (
        lambda i: LigerFusedLinearCrossEntropyLoss()(
            i["c"], i["e"].flatten(0, 1), i["targets"].flatten()),
        "c=weight"),
}  # fmt: skip
GIVEN = [(call, *(pair.split("=") * 2)[:2]) for call in CALLS for pair in CALLS[call][1].split()]


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("call, given, name", GIVEN)
def test_refused(call, given, name, kind):
    made, says, instead = LAYOUTS[kind]
    i = inputs()
    if kind == "mkldnn" and not i[given].dtype.is_floating_point:
        pytest.skip("there is no such tensor")
    if kind == "csr" and i[given].dim() == 1:
        pytest.skip("there is no such tensor")
    if kind in ("jagged", "nested") and i[given].dim() == 1:
        pytest.skip("one number for each class is not nested")
    i[given] = made(i[given])
    name = re.escape(name)
    with pytest.raises(TypeError, match=f"{name} {says}.*{instead.format(name=name)}"):
        CALLS[call][0](i)


def test_what_the_table_refuses_is_the_layout_alone():
    for name, (call, _) in CALLS.items():
        assert call(inputs()) is not None, name


def test_the_advice_for_nested_tensors_is_right():
    """Of sequences of 1, 2 and 3 tokens: the loss of each token, and gradients; with a shift too."""
    g = torch.Generator().manual_seed(0)
    lengths, c = (1, 2, 3), torch.randn(V, D, generator=g)
    parts = [torch.randn(n, D, generator=g) for n in lengths]
    of_parts = [torch.randint(0, V, (n,), generator=g) for n in lengths]
    e = torch.nested.nested_tensor(parts, layout=torch.jagged).requires_grad_()
    targets = torch.nested.nested_tensor(of_parts, layout=torch.jagged)

    loss = cutloss.linear_cross_entropy(torch.cat(e.unbind()), c, torch.cat(targets.unbind()))
    torch.testing.assert_close(loss, F.cross_entropy(torch.cat(parts) @ c.T, torch.cat(of_parts)))
    loss.backward()
    assert all((g != 0).any() for g in e.grad.unbind())

    padded = torch.nested.to_padded_tensor(e, 0.0), torch.nested.to_padded_tensor(targets, -100)
    loss = cutloss.linear_cross_entropy(padded[0], c, padded[1], shift=1)
    want = F.cross_entropy(
        torch.cat([e[:-1] for e in parts]) @ c.T, torch.cat([t[1:] for t in of_parts])
    )
    torch.testing.assert_close(loss, want)


def test_heads_without_labels_are_plain_layers():
    """PyTorch's own operators make the logits, of whatever they take."""
    made = nn.Linear(D, V, bias=False)
    e = jagged(torch.randn(B, D))
    assert cutloss.CausalLMHead(made)(e).logits.is_nested

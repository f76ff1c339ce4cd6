"""cutloss.compat.liger's cross-entropy of logits, and its LigerForCausalLMLoss, against PyTorch,
and against liger-kernel 0.8.5 where that runs: on CUDA, or with TRITON_INTERPRET=1."""

import inspect
import os

import pytest
import torch
from helpers import problems
from helpers.liger_cross_entropy import OPTIONS, REQUIRED, options_of, plain
from helpers.problems import BF16, F32

import cutloss
from cutloss.compat import liger

pytestmark = pytest.mark.usefixtures("device")

OF_MODULE = [
    ("weight", None),
    ("ignore_index", -100),
    ("lse_square_scale", 0.0),
    ("label_smoothing", 0.0),
    ("reduction", "mean"),
    ("softcap", None),
    ("return_z_loss", False),
    ("return_token_accuracy", False),
    ("return_predicted_tokens", False),
]
OF_FUNCTION = [
    ("input", REQUIRED),
    ("target", REQUIRED),
    ("weight", None),
    ("size_average", None),
    ("ignore_index", -100),
    ("reduce", None),
    ("reduction", "mean"),
    ("label_smoothing", 0.0),
    ("lse_square_scale", 0.0),
    ("softcap", None),
    ("return_z_loss", False),
    ("return_token_accuracy", False),
    ("return_predicted_tokens", False),
]
OF_CAUSAL_LM = [
    ("hidden_states", REQUIRED),
    ("lm_head_weight", REQUIRED),
    ("labels", REQUIRED),
    ("hidden_size", REQUIRED),
    ("num_items_in_batch", None),
    ("ignore_index", -100),
    ("shift_labels", None),
    ("final_logit_softcapping", None),
    ("return_token_accuracy", False),
    ("return_predicted_tokens", False),
    ("kwargs", REQUIRED),
]
OUTPUTS = dict(return_z_loss=True, return_token_accuracy=True, return_predicted_tokens=True)
WITHOUT_SCALING = [name for name in OPTIONS if "scal" not in name]


def described(f):
    return [(p.name, p.default) for p in inspect.signature(f).parameters.values()]


def test_signatures_are_theirs():
    assert described(liger.LigerCrossEntropyLoss) == OF_MODULE
    assert described(liger.liger_cross_entropy) == OF_FUNCTION
    assert described(liger.LigerForCausalLMLoss) == OF_CAUSAL_LM
    forward = list(inspect.signature(liger.LigerCrossEntropyLoss.forward).parameters)
    assert forward == ["self", "_input", "target"]


def theirs(options):
    functional = pytest.importorskip("liger_kernel.transformers.functional")
    if problems.device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs CUDA, or TRITON_INTERPRET=1 in the environment")
    unknown = {"softcap", "final_logit_softcapping", "weight"} & set(options)
    if problems.device != "cuda" and unknown:
        pytest.skip(f"Triton's interpreter cannot run their kernel with {unknown.pop()}")
    return functional


# Logits -----------------------------------------------------------------------------------------


def problem(name, reduction):
    """Options under the names of the function for logits, and under those of `plain`."""
    options = options_of(name, reduction)
    ignored = options.get("ignore_index", -100)
    p = problems.make((60,), V=211, D=24, ignore_index=ignored)
    given = dict(options)
    if "ce_weight" in given:
        given["weight"] = given.pop("ce_weight")
    return p, (p.e @ p.c.T).detach().requires_grad_(), given, options


def values(output):
    return [output.loss, output.z_loss, output.token_accuracy, output.predicted_tokens]


@pytest.mark.parametrize("outputs", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", WITHOUT_SCALING)
def test_as_the_formula(name, reduction, outputs):
    p, z, given, options = problem(name, reduction)
    got = liger.LigerCrossEntropyLoss(**given, **(OUTPUTS if outputs else {})).to(z.device)(
        z, p.targets
    )
    assert isinstance(got, liger.CrossEntropyOutput) == outputs
    one = torch.eye(211, device=z.device)
    want = plain(z, one, p.targets, **options)
    found = values(got) if outputs else [got]
    for a, b in zip(found, want):
        torch.testing.assert_close(a, b.to(a.dtype))
    assert not any(t.requires_grad for t in found[1:])
    upstream = torch.linspace(0.5, 1.5, found[0].numel(), device=z.device)
    upstream = upstream.reshape(found[0].shape)
    for a, b in zip(*(torch.autograd.grad(t, z, upstream) for t in (found[0], want[0]))):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", WITHOUT_SCALING)
def test_logits_as_theirs(name, reduction):
    p, z, given, _ = problem(name, reduction)
    functional = theirs(given)
    results = []
    for f in (liger.liger_cross_entropy, functional.liger_cross_entropy):
        out = f(1.0 * z, p.targets, **given, **OUTPUTS)
        results.append([*values(out), *torch.autograd.grad(out.loss.sum(), z)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-4, atol=1e-6)


def test_function_and_module_are_one():
    p, z, _, _ = problem("default", "mean")
    got = liger.liger_cross_entropy(z, p.targets, None, None, -100, None, "sum", 0.1, 1e-3, 5.0)
    module = liger.LigerCrossEntropyLoss(None, -100, 1e-3, 0.1, "sum", 5.0)
    assert torch.equal(got, module(z, p.targets))
    assert not module.state_dict()
    weighted = liger.LigerCrossEntropyLoss(torch.ones(211))
    assert not weighted.state_dict() and weighted.to("meta").weight.device.type == "meta"


def test_logits_stay_and_no_token_is_zero():
    p, z, _, _ = problem("default", "mean")
    before = z.detach().clone()
    liger.liger_cross_entropy(z, p.targets).backward()
    assert torch.equal(z, before)
    loss = liger.liger_cross_entropy(z, torch.full_like(p.targets, -100))
    assert loss == 0 and not torch.autograd.grad(loss, z)[0].any()


@pytest.mark.parametrize("name", ["size_average", "reduce"])
def test_what_has_no_effect_is_refused(name):
    p, z, _, _ = problem("default", "mean")
    with pytest.raises(ValueError, match=f"{name} has no effect .* got False: write reduction="):
        liger.liger_cross_entropy(z, p.targets, **{name: False})


# A causal language model ------------------------------------------------------------------------


def causal(ignore_index=-100):
    return problems.make((3, 20), V=211, D=24, bias=True, ignore_index=ignore_index)


CALLS = {
    "mean": {},
    "items": dict(num_items_in_batch=77),
    "items_of_a_tensor": dict(num_items_in_batch=torch.tensor(77)),
    "softcap": dict(final_logit_softcapping=2.0),
    "more": dict(label_smoothing=0.1, lse_square_scale=1e-2, bias=True),
    "ignore_index": dict(ignore_index=5),
}


def call_of(name):
    call = dict(CALLS[name])
    p = causal(call.get("ignore_index", -100))
    if call.get("bias"):
        call["bias"] = p.bias
    return p, call


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_causal_lm_as_the_formula(name, shifted):
    p, call = call_of(name)
    ignored = call.get("ignore_index", -100)
    end = torch.full_like(p.targets[:, :1], ignored)
    labels = torch.cat([p.targets[:, 1:], end], 1)
    by_name = {"final_logit_softcapping": "softcap", "num_items_in_batch": None}
    options = {by_name.get(k, k): v for k, v in call.items() if by_name.get(k, k)}
    items = call.get("num_items_in_batch")
    want = plain(
        p.e.flatten(0, 1), p.c, labels.flatten(), reduction="mean" if items is None else "sum",
        **options,
    )  # fmt: skip
    given = dict(shift_labels=labels) if shifted else {}
    got = liger.LigerForCausalLMLoss(
        p.e, p.c, None if shifted else p.targets, 24, **call, **given, use_cache=True,
        return_token_accuracy=True, return_predicted_tokens=True,
    )  # fmt: skip
    expected = want[0] / (items or 1)
    torch.testing.assert_close(got.loss, expected)
    torch.testing.assert_close(got.token_accuracy, want[2])
    assert torch.equal(got.predicted_tokens, want[3]) and got.z_loss is None
    alone = liger.LigerForCausalLMLoss(p.e, p.c, p.targets, 24, **call)
    torch.testing.assert_close(alone, expected)
    for a, b in zip(*(torch.autograd.grad(t, (p.e, p.c)) for t in (alone, expected))):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", CALLS)
def test_causal_lm_as_theirs(name):
    p, call = call_of(name)
    theirs(call)
    loss_utils = pytest.importorskip("liger_kernel.transformers.model.loss_utils")
    results, call = [], call | dict(return_token_accuracy=True, return_predicted_tokens=True)
    for f in (liger.LigerForCausalLMLoss, loss_utils.LigerForCausalLMLoss):
        out = f(p.e, p.c, p.targets, 24, **call)
        grads = torch.autograd.grad(out.loss, (p.e, p.c))
        results.append([out.loss, out.token_accuracy, out.predicted_tokens, *grads])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-4, atol=1e-6)


def test_causal_lm_is_that_of_transformers():
    p = causal()
    logits = p.e @ p.c.T
    want = cutloss.CausalLMLoss(211)(logits, p.targets, num_items_in_batch=9)
    got = liger.LigerForCausalLMLoss(p.e, p.c, p.targets, 24, num_items_in_batch=9)
    torch.testing.assert_close(got, want)
    half = [t.to(BF16) for t in (p.e, p.c)]
    assert liger.LigerForCausalLMLoss(*half, p.targets, 24).dtype == F32


def test_causal_lm_in_one_graph():
    torch._dynamo.reset()
    p = causal()

    def call():
        return liger.LigerForCausalLMLoss(
            p.e, p.c, p.targets, 24, num_items_in_batch=9, label_smoothing=0.1, use_cache=True
        )

    torch.testing.assert_close(torch.compile(call, fullgraph=True)(), call())


def test_causal_lm_refusals():
    p = causal()
    with pytest.raises(NotImplementedError, match="return_z_loss=True: leave it out, or call"):
        liger.LigerForCausalLMLoss(p.e, p.c, p.targets, 24, return_z_loss=True)
    with pytest.raises(ValueError, match=r"got \(3, 20, 24\) and hidden_size 48"):
        liger.LigerForCausalLMLoss(p.e, p.c, p.targets, 48)
    with pytest.raises(TypeError, match="labels must be a torch.Tensor, got NoneType"):
        liger.LigerForCausalLMLoss(p.e, p.c, None, 24)
    with pytest.raises(TypeError, match="reduction"):
        liger.LigerForCausalLMLoss(p.e, p.c, p.targets, 24, reduction="sum")

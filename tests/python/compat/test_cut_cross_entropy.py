"""All names of cut_cross_entropy 25.6 under one, and its cce_patch."""

import inspect

import pytest
import torch
from helpers.architectures import batch, make
from helpers.patched import NoLogits, assert_same, run

import cutloss
from cutloss import LinearCrossEntropyImpl
from cutloss.compat import cut_cross_entropy
from cutloss.compat.cut_cross_entropy import transformers
from cutloss.compat.cut_cross_entropy.transformers import cce_patch

NAMES = ["LinearCrossEntropy", "LinearCrossEntropyImpl", "VocabParallelOptions"]
NAMES += ["linear_cross_entropy"]
OPTIONS = [
    ("model_type_or_model", inspect.Parameter.empty),
    ("impl", LinearCrossEntropyImpl.CCE),
    ("reduction", "mean"),
    ("filter_eps", "auto"),
    ("accum_e_fp32", False),
    ("accum_c_fp32", False),
    ("filter_e_grad", True),
    ("filter_c_grad", True),
    ("train_only", False),
]


def test_names():
    assert set(cut_cross_entropy.__all__) == {*NAMES, "cce_patch"}
    for name in NAMES:
        assert getattr(cut_cross_entropy, name) is getattr(cutloss, name)
    assert cut_cross_entropy.cce_patch is transformers.cce_patch
    assert cutloss.compat.cut_cross_entropy is cut_cross_entropy
    parameters = inspect.signature(cce_patch).parameters.values()
    assert [(p.name, p.default) for p in parameters] == OPTIONS


@pytest.mark.parametrize("impl", [None, "cce_kahan_full", LinearCrossEntropyImpl.CCE_EXACT])
def test_a_model(impl):
    model, inputs = make("LlamaForCausalLM"), batch()
    want = run(model, **inputs), run(model, **inputs, num_items_in_batch=torch.tensor(29))
    options = {} if impl is None else dict(impl=impl, filter_eps=1e-3, accum_c_fp32=True)
    assert cce_patch(model, **options) is model
    with NoLogits():
        got = run(model, **inputs), run(model, **inputs, num_items_in_batch=torch.tensor(29))
    for g, w in zip(got, want):
        assert_same(g, w)
        assert g[0].logits is None


@pytest.mark.parametrize("train_only", [False, True])
def test_evaluation(train_only):
    model, inputs = make("LlamaForCausalLM").eval(), batch()
    want = model(**inputs)
    cce_patch(model, train_only=train_only)
    got = model(**inputs)
    torch.testing.assert_close(got.loss, want.loss)
    assert (got.logits is not None) == train_only
    labels = inputs.pop("labels")
    assert model(**inputs).logits.shape == want.logits.shape
    model.train()
    assert model(**inputs, labels=labels).logits is None


def test_what_is_said_in_place_of_a_sum_is_true():
    model, inputs = make("LlamaForCausalLM"), batch()
    mean = model(**inputs).loss
    tokens = (inputs["labels"][:, 1:] != -100).sum()
    cce_patch(model)
    torch.testing.assert_close(model(**inputs, num_items_in_batch=1).loss, mean * tokens)


def test_refusals():
    model = make("LlamaForCausalLM")
    for given in ("llama", model.config):
        with pytest.raises(NotImplementedError, match=r"got 'llama': make .* cce_patch\(model\)"):
            cce_patch(given)
    with pytest.raises(TypeError, match="takes a model of Transformers, got int"):
        cce_patch(1)
    for reduction, instead in (("sum", "num_items_in_batch=1"), ("none", "reduction='none'")):
        with pytest.raises(NotImplementedError, match=f"got reduction '{reduction}'.*{instead}"):
            cce_patch(model, reduction=reduction)
    with pytest.raises(ValueError, match="'mean', 'sum', 'none', got 'batchmean'"):
        cce_patch(model, reduction="batchmean")
    with pytest.raises(NotImplementedError, match="impl 'fast' is not known"):
        cce_patch(model, impl="fast")
    with pytest.raises(TypeError, match="filter_eps must be a number"):
        cce_patch(model, filter_eps=[1])
    with pytest.raises(TypeError, match="train_only"):
        cce_patch(model, train_only="yes")
    assert not [name for name in vars(model) if "cutloss" in name]  # none of this patched it

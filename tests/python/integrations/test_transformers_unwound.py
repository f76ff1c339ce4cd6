"""A patched model whose forward others wrap, unwind or replace: the patch stays, or a training call
says that it is gone; and unpatch and patch always work."""

import copy
import functools
import types

import pytest
import torch
from accelerate import Accelerator
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.state import AcceleratorState
from helpers.architectures import V, batch, make
from helpers.patched import NoLogits, assert_same, run
from peft import AdaLoraConfig, LoraConfig, PromptTuningConfig, get_peft_model
from trl.trainer.utils import add_fused_lm_head

import cutloss

LLAMA = "LlamaForCausalLM"


def assert_patched(model):
    with NoLogits():
        got = run(model, **batch())
    assert_same(got, run(make(LLAMA), **batch()))


def assert_stock(model):
    got = run(model, **batch())
    assert got[0].logits.shape == (2, 10, V)
    assert_same(got, run(make(LLAMA), **batch()))


def assert_leads_back(model):
    """And forth, as often as one likes."""
    for _ in range(2):
        cutloss.unpatch(model)
        assert_stock(model)
        with pytest.raises(ValueError, match="is not patched"):
            cutloss.unpatch(model)
        cutloss.patch(model)
        assert_patched(model)
        with pytest.raises(ValueError, match="is patched already"):
            cutloss.patch(model)
    assert_stock(cutloss.unpatch(model))


@pytest.fixture
def accelerator():
    """Its settings are the process's, and may be those of another test."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("keep", [True, False])
def test_accelerates_mixed_precision(keep, accelerator):
    """It wraps the forward, and unwinds every wrapper that shows what it wraps."""
    model = cutloss.patch(make(LLAMA))
    prepared = accelerator.prepare(model)
    assert prepared(**batch()).logits is None
    inner = accelerator.unwrap_model(prepared, keep_fp32_wrapper=keep)
    assert inner is model and inner(**batch()).logits is None
    if keep:
        over = inner.__dict__["forward"]
        cutloss.unpatch(inner)
        assert inner.__dict__["forward"] is over  # and does its work still
        assert inner(**batch()).logits.shape == (2, 10, V)
        inner = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        assert_stock(inner)
        cutloss.patch(inner)
    assert_patched(inner)
    assert_leads_back(inner)


class Counting(ModelHook):
    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("order", ["hook patch remove", "patch hook remove", "patch hook unpatch"])
def test_a_hook_of_accelerate_on_the_model(order):
    model, hook = make(LLAMA), Counting()
    for step in order.split():
        if step == "hook":
            add_hook_to_module(model, hook)
        elif step == "patch":
            cutloss.patch(model, verify=False)
        elif step == "unpatch":
            assert_patched(model)
            cutloss.unpatch(model)
            assert_stock(model)
            assert hook.calls == 2
            remove_hook_from_module(model)
            assert_stock(model)
            cutloss.patch(model)
        else:
            assert_patched(model)
            assert hook.calls == 1
            remove_hook_from_module(model)
    assert_patched(model)
    assert hook.calls <= 2
    assert_leads_back(model)


def test_a_hook_of_accelerate_on_the_classifier_that_stays_and_goes():
    model = cutloss.patch(make(LLAMA))
    add_hook_to_module(model.lm_head, ModelHook())
    cutloss.unpatch(model)
    remove_hook_from_module(model.lm_head)
    assert_stock(model)
    cutloss.patch(model)
    assert_patched(model)
    assert_leads_back(model)


def wrapped(model):
    """As somebody does who knows nothing of us. Returns what was there."""
    inner = model.forward

    @functools.wraps(inner)
    def forward(*args, **kwargs):
        return inner(*args, **kwargs)

    model.forward = forward
    return inner


@pytest.mark.parametrize("wraps", [1, 2])
def test_wrapped_for_good(wraps):
    """What lies under the wrapper goes and comes."""
    model = cutloss.patch(make(LLAMA))
    for _ in range(wraps):
        wrapped(model)
    assert_patched(model)
    assert_leads_back(model)


def test_wrapped_between_two_patches():
    model = cutloss.patch(make(LLAMA))
    first = wrapped(model)
    cutloss.unpatch(model)
    cutloss.patch(model, return_logits=True)
    wrapped(model)
    assert model(**batch()).logits is not None
    cutloss.unpatch(model)
    model.forward = first  # of a patch that was undone
    assert_stock(model)
    cutloss.patch(model)
    assert_patched(model)
    assert_leads_back(model)


def test_a_forward_of_ones_own_comes_back():
    model = make(LLAMA)
    wrapped(model)
    own = model.forward
    cutloss.patch(model)
    assert_patched(model)
    cutloss.unpatch(model)
    assert model.forward is own


def under_a_hook(model):
    """Which calls the model's own forward, and not what was there."""
    add_hook_to_module(model, ModelHook())
    model._old_forward = types.MethodType(type(model).forward, model)


TAKEN_OFF = {
    "deleted": lambda m: m.__dict__.pop("forward"),
    "put back": lambda m: setattr(m, "forward", types.MethodType(type(m).forward, m)),
    "replaced": lambda m: setattr(m, "forward", functools.partial(type(m).forward, m)),
    "under a hook": under_a_hook,
}


@pytest.mark.parametrize("how", TAKEN_OFF)
def test_taken_off_is_said(how):
    """In the first training call with labels; other calls need no patch."""
    model, stock, inputs = cutloss.patch(make(LLAMA)), make(LLAMA), batch()
    TAKEN_OFF[how](model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no part in .* is now .*forward.*unpatch"):
            model(**inputs)
    ids = inputs["input_ids"]
    assert torch.equal(model(ids).logits, stock(ids).logits)
    assert torch.equal(model.eval()(**inputs).logits, stock.eval()(**inputs).logits)
    assert_leads_back(model.train())


def test_labels_by_position_are_seen():
    model, inputs = cutloss.patch(make(LLAMA)), batch()
    TAKEN_OFF["deleted"](model)
    with pytest.raises(RuntimeError, match="no part in this call"):
        model(inputs["input_ids"], None, None, None, None, inputs["labels"])


def test_a_wrapper_that_asks_for_logits_is_heeded():
    model = cutloss.patch(make(LLAMA))
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs, return_logits=True)
    assert_stock(model)


ADAPTERS = {
    "lora": LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    # It calls the forward of the model past the model's hooks.
    "adalora": AdaLoraConfig(total_step=9, target_modules=["q_proj"], task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_taken_off_under_an_adapter(name):
    model, inputs = get_peft_model(make(LLAMA), ADAPTERS[name]).train(), batch()
    cutloss.patch(model)
    for each in (model, copy.deepcopy(model)):
        assert each(**inputs).logits is None
        TAKEN_OFF["deleted"](each.get_base_model())
        with pytest.raises(RuntimeError, match="no part in this call of .*ForCausalLM with labels"):
            each(**inputs)
        cutloss.unpatch(each)
        assert each(**inputs).logits is not None
        assert cutloss.patch(each)(**inputs).logits is None


def test_the_forward_of_trl_is_said():
    """It reads the classifier's weight, and never calls the model's own forward."""
    model, inputs = cutloss.patch(make(LLAMA)), batch()
    add_fused_lm_head(model)
    assert_patched(model)  # without fused_lm_head it calls the patch
    with pytest.raises(RuntimeError, match="is now .*trl.trainer.utils.py.*cutloss.trl"):
        model(**inputs, fused_lm_head=True)
    cutloss.unpatch(model)
    assert model(**inputs, fused_lm_head=True).loss > 0
    assert_stock(model)


def test_a_copy_is_told_for_itself():
    model, inputs = cutloss.patch(make(LLAMA)), batch()
    other = copy.deepcopy(model)
    TAKEN_OFF["deleted"](other)
    assert model(**inputs).logits is None
    with pytest.raises(RuntimeError, match="no part in this call"):
        other(**inputs)
    assert_leads_back(other)
    assert_patched(model)

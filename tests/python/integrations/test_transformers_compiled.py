"""torch.compile of a patched model, also where the compiler breaks its graph: the numbers are those
of the model itself, logits are as without the compiler, and nothing of ours makes it warn."""

import copy
import functools
import threading
import types
import warnings

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from helpers.architectures import batch, make
from helpers.patched import NoLogits, assert_same, gradients, run
from helpers.trainers import arguments, history, pad, rows
from helpers.trainers import assert_same as assert_same_history
from peft import LoraConfig, get_peft_model
from torch._dynamo.testing import CompileCounter
from transformers import Trainer, TrainingArguments

import cutloss

LLAMA = "LlamaForCausalLM"


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Dynamo does not know how to trace")
        yield
    torch._dynamo.reset()


def stays(model):
    return model


def breaks_in_a_hook(model):
    model.model.norm.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    return model


def breaks_in_the_loss(model):
    """Where logits that were not made are alive."""
    plain = type(model).loss_function.fget(model)

    def loss_function(logits, labels, vocab_size, **kwargs):
        torch._dynamo.graph_break()
        return plain(logits, labels, vocab_size, **kwargs)

    model.loss_function = loss_function
    return model


def checkpointed(model):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    return model


def has_a_forward_of_its_own(model):
    def forward(self, *args, **kwargs):
        return type(self).forward(self, *args, **kwargs)

    model.forward = types.MethodType(forward, model)
    return breaks_in_a_hook(model)


def hooked(model):
    add_hook_to_module(model, ModelHook())
    return breaks_in_a_hook(model)


def adapted(model):
    torch.manual_seed(2)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    breaks_in_a_hook(model.get_base_model())
    return model.train()


BROKEN = {
    "GPT-2": ("GPT2LMHeadModel", stays),  # breaks by itself
    "BERT": ("BertLMHeadModel", stays),  # and this
    "Mixtral": ("MixtralForCausalLM", breaks_in_a_hook),
    "softcap": ("Gemma2ForCausalLM", breaks_in_the_loss),
    "checkpointing": (LLAMA, checkpointed),
    "own forward": (LLAMA, has_a_forward_of_its_own),
    "hook of accelerate": (LLAMA, hooked),
    "LoRA": (LLAMA, adapted),
    "whole": (LLAMA, stays),
}


@pytest.mark.parametrize("name", BROKEN)
def test_graphs_that_break(name):
    kind, change = BROKEN[name]
    stock, inputs = change(make(kind, num_hidden_layers=1)), batch()
    model = cutloss.patch(copy.deepcopy(stock))
    compiled = torch.compile(model, backend="eager")
    without = {k: v for k, v in inputs.items() if k != "labels"}
    want = run(stock, **inputs)
    for _ in range(2):
        model.zero_grad()
        with NoLogits():
            output = compiled(**inputs)
            output.loss.backward()
        assert output.logits is None
        assert_same((output, gradients(model)), want)
        torch.testing.assert_close(compiled(**without).logits, stock(**without).logits)
    made = compiled(**inputs, return_logits=True)
    torch.testing.assert_close(made.logits, want[0].logits)
    stock.eval(), model.eval()
    with torch.no_grad():
        for given in (inputs, without):
            got, expected = compiled(**given), stock(**given)
            torch.testing.assert_close(got.logits, expected.logits)
            if given is inputs:
                torch.testing.assert_close(got.loss, expected.loss)


@pytest.mark.parametrize("change", [stays, breaks_in_a_hook, checkpointed])
def test_shapes_that_change(change):
    stock = change(make(LLAMA, num_hidden_layers=1))
    model = cutloss.patch(copy.deepcopy(stock))
    compiled = torch.compile(model, backend="eager", dynamic=True)
    for length in (7, 10, 5):
        inputs = {k: v[:, :length] for k, v in batch().items()}
        model.zero_grad()
        with NoLogits():
            output = compiled(**inputs)
            output.loss.backward()
        assert_same((output, gradients(model)), run(stock, **inputs))


def test_backward_of_a_compiler():
    """Not only of eager operators."""
    stock, inputs = breaks_in_a_hook(make(LLAMA, num_hidden_layers=1)), batch()
    model = cutloss.patch(copy.deepcopy(stock))
    output = torch.compile(model, backend="aot_eager")(**inputs)
    output.loss.backward()
    assert output.logits is None
    assert_same((output, gradients(model)), run(stock, **inputs))


def test_whole_graphs_stay_whole():
    """In training, without labels, and inside of another call's loss."""
    stock, inputs = make(LLAMA, num_hidden_layers=1), batch()
    model = cutloss.patch(copy.deepcopy(stock))
    whole = functools.partial(torch.compile, backend="eager", fullgraph=True)
    compiled = whole(model)
    assert_same((compiled(**inputs), {}), (stock(**inputs), {}))
    without = {k: v for k, v in inputs.items() if k != "labels"}
    torch.testing.assert_close(compiled(**without).logits, stock(**without).logits)

    def distilled(model, plain, logits, labels, vocab_size, **kwargs):
        return plain(logits, labels, vocab_size) + model(**without).logits.square().mean()

    for m in (stock, model):
        plain = type(m).loss_function.fget(m)
        m.loss_function = functools.partial(distilled, m, plain)
    torch._dynamo.reset()
    output = whole(model)(**inputs)
    assert output.logits is None
    torch.testing.assert_close(output.loss, stock(**inputs).loss)


def test_nothing_is_compiled_again():
    """From one step to the next."""
    model, inputs = cutloss.patch(make(LLAMA, num_hidden_layers=1)), batch()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    compiled(**inputs)
    first = counter.frame_count
    assert first >= 1
    for _ in range(4):
        compiled(**inputs)
    assert counter.frame_count == first


def test_code_compiled_in_one_thread_asks_the_state_of_another():
    """While a training call runs here, another thread calls what was compiled here."""
    model, inputs = cutloss.patch(make(LLAMA, num_hidden_layers=1)), batch()
    without = {k: v for k, v in inputs.items() if k != "labels"}
    compiled, plain = torch.compile(model, backend="eager"), type(model).loss_function.fget(model)
    want, seen = compiled(**without).logits, []

    @torch.compiler.disable
    def loss_function(logits, labels, vocab_size, **kwargs):
        thread = threading.Thread(target=lambda: seen.append(compiled(**without).logits))
        thread.start()
        thread.join(60)
        return plain(logits, labels, vocab_size, **kwargs)

    model.loss_function = loss_function
    output = compiled(**inputs)
    assert output.logits is None and output.loss > 0
    torch.testing.assert_close(seen[0], want)


def test_a_patch_that_is_gone_is_said():
    model, inputs = cutloss.patch(make(LLAMA, num_hidden_layers=1)), batch()
    del model.forward
    with pytest.raises(RuntimeError, match="no part in this call of LlamaForCausalLM"):
        torch.compile(model, backend="eager")(**inputs)


@pytest.mark.parametrize("name, more", [("GPT2LMHeadModel", {}), (LLAMA, dict(checkpoint=True))])
def test_trainer(name, more, tmp_path):
    def trained(model, **given):
        if more:
            given.update(gradient_checkpointing=True)
        args = arguments(TrainingArguments, tmp_path, **given)
        trainer = Trainer(model=model, args=args, train_dataset=rows(), data_collator=pad)
        return history(trainer)

    want = trained(make(name, num_hidden_layers=1))
    model = cutloss.patch(make(name, num_hidden_layers=1))
    with NoLogits():
        got = trained(model, torch_compile=True, torch_compile_backend="eager")
    assert_same_history(got, want)

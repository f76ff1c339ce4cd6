"""PEFT: adapters anywhere, on the classifier too; loss and gradients are those without cutloss."""

import copy

import pytest
import torch
from helpers.architectures import batch, make
from helpers.patched import NoLogits, assert_same, run
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
    prepare_model_for_kbit_training,
)

import cutloss

BODY = dict(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"])
HEAD = dict(r=4, lora_alpha=6, target_modules=["q_proj", "lm_head"])


def adapted(config, name="GraniteForCausalLM", **changes):
    torch.manual_seed(3)
    model = get_peft_model(make(name, **changes), config)
    with torch.no_grad():
        for key, p in model.named_parameters():  # lora_B starts at zero, which hides what it does
            if "lora_" in key or "modules_to_save" in key:
                p.add_(0.1 * torch.randn_like(p))
    model.train()
    return model


def seeded(model):
    torch.manual_seed(4)  # of the dropout
    return run(model, **batch())


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(**BODY),
        LoraConfig(**HEAD),
        LoraConfig(**HEAD, lora_dropout=0.5),
        LoraConfig(**HEAD, use_rslora=True, lora_bias=True),
        LoraConfig(**BODY, modules_to_save=["lm_head"]),
        LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 7]),
        PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3),
    ],
    ids=["body", "head", "dropout", "biased", "modules_to_save", "tokens", "prompt"],
)
def test_adapters(config):
    config.task_type = TaskType.CAUSAL_LM
    stock = adapted(config)
    model = cutloss.patch(copy.deepcopy(stock))
    with NoLogits():
        got = seeded(model)
    assert got[0].logits is None
    assert_same(got, seeded(stock))


def test_adapters_on_a_softcapped_and_biased_head():
    for name in ("Gemma2ForCausalLM", "PhiForCausalLM"):
        stock = adapted(LoraConfig(**HEAD), name, tie_word_embeddings=False)
        model = cutloss.patch(copy.deepcopy(stock))
        assert_same(seeded(model), seeded(stock))


def test_an_adapter_in_fp32_on_a_head_in_bf16():
    """Added to a 16-bit weight, a small B·A would be rounded away."""
    stock = adapted(LoraConfig(**HEAD))
    with torch.no_grad():
        for key, p in stock.named_parameters():
            if "lora_B" in key:
                p.mul_(1e-2)
    exact = seeded(copy.deepcopy(stock))[1]
    for key, p in stock.named_parameters():
        p.data = p.data if "lora_" in key else p.data.bfloat16()
    _, got = seeded(cutloss.patch(stock))
    for key, want in exact.items():
        assert (got[key] - want).norm() < 0.05 * want.norm(), key


def test_an_adapter_that_comes_goes_and_is_merged():
    stock = adapted(LoraConfig(**HEAD))
    model = cutloss.patch(copy.deepcopy(stock))
    with stock.disable_adapter(), model.disable_adapter():
        torch.testing.assert_close(model(**batch()).loss, stock(**batch()).loss)
    stock.merge_adapter(), model.merge_adapter()
    torch.testing.assert_close(model(**batch()).loss, stock(**batch()).loss)
    stock.unmerge_adapter(), model.unmerge_adapter()
    assert_same(seeded(model), seeded(stock))
    before = stock.merge_and_unload()
    after = cutloss.unpatch(model).merge_and_unload()
    torch.testing.assert_close(after(**batch()).logits, before(**batch()).logits)


@pytest.mark.parametrize("config", [BODY, HEAD], ids=["body", "head"])
def test_an_adapter_put_on_a_patched_model(config):
    stock = adapted(LoraConfig(**config))
    model = cutloss.patch(make("GraniteForCausalLM"))
    model = get_peft_model(model, LoraConfig(**config))
    model.load_state_dict(stock.state_dict())
    assert_same(seeded(model), seeded(stock))


def test_two_adapters_at_once():
    stock = adapted(LoraConfig(**HEAD))
    stock.add_adapter("other", LoraConfig(**{**HEAD, "r": 2}))
    with torch.no_grad():
        stock.base_model.model.lm_head.lora_B["other"].weight.normal_()
    stock.base_model.set_adapter(["default", "other"])
    model = cutloss.patch(copy.deepcopy(stock))
    assert isinstance(model, PeftModel)
    assert_same(seeded(model), seeded(stock))


def test_dora_on_the_head_is_refused():
    with pytest.raises(NotImplementedError, match="under PEFT's DoraLinearLayer.*plain LoRA"):
        cutloss.patch(adapted(LoraConfig(**HEAD, use_dora=True)))
    cutloss.patch(adapted(LoraConfig(**BODY, use_dora=True)))


def test_other_adapters_on_the_head_are_refused():
    known = dict(task_type=TaskType.CAUSAL_LM)
    with pytest.raises(NotImplementedError, match="the product with a tensor"):
        model = make("LlamaForCausalLM")
        config = IA3Config(target_modules=["lm_head"], feedforward_modules=[], **known)
        cutloss.patch(get_peft_model(model, config))
    with pytest.raises(NotImplementedError, match="without a call of its classifier"):
        model = make("LlamaForCausalLM", tie_word_embeddings=True)
        config = LoraConfig(**BODY, trainable_token_indices=[5], **known)
        cutloss.patch(get_peft_model(model, config))


def test_prepared_for_quantised_training():
    stock = prepare_model_for_kbit_training(make("LlamaForCausalLM").bfloat16())
    stock.train()
    stock = get_peft_model(stock, LoraConfig(**BODY))
    model = cutloss.patch(copy.deepcopy(stock))
    want, got = run(stock, **batch())[0].loss, run(model, **batch())[0].loss
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)

"""A few steps under Transformers' Trainer and TRL's: the same losses as without cutloss."""

import copy

import datasets
import pytest
import torch
import transformers
import trl
from helpers.architectures import make
from helpers.patched import NoLogits
from helpers.trainers import (
    LORA,
    arguments,
    assert_same,
    grpo,
    history,
    pad,
    rows,
    sft,
    tokenizer,
    without_logits_in_the_loss,
    words,
)
from transformers import Trainer, TrainingArguments

import cutloss
import cutloss.trl

__all__ = ["tokenizer"]  # the fixture


# Transformers' Trainer ----------------------------------------------------------------------------


def train(model, tmp_path, **more):
    args = arguments(TrainingArguments, tmp_path, **more)
    trainer = Trainer(model=model, args=args, train_dataset=rows(), data_collator=pad)
    return history(trainer), trainer


def test_trainer(tmp_path):
    want, _ = train(make("Gemma2ForCausalLM"), tmp_path)
    model = cutloss.patch(make("Gemma2ForCausalLM"))
    with NoLogits():
        got, _ = train(model, tmp_path)
    assert_same(got, want)


def test_accumulated_gradients_are_those_of_one_batch(tmp_path):
    """Of sequences with unequal numbers of tokens."""
    whole, _ = train(cutloss.patch(make("LlamaForCausalLM")), tmp_path)
    more = dict(per_device_train_batch_size=1, gradient_accumulation_steps=4)
    parts, _ = train(cutloss.patch(make("LlamaForCausalLM")), tmp_path, **more)
    stock, _ = train(make("LlamaForCausalLM"), tmp_path, **more)
    assert_same(parts, whole)
    assert_same(parts, stock)


def test_autocast(tmp_path):
    want, _ = train(make("LlamaForCausalLM"), tmp_path, bf16=True)
    got, _ = train(cutloss.patch(make("LlamaForCausalLM")), tmp_path, bf16=True)
    for g, w in zip(got, want):
        assert list(g.values()) == pytest.approx(list(w.values()), rel=2e-2)


@pytest.mark.parametrize("return_logits", [None, False])
def test_evaluation(tmp_path, return_logits):
    """compute_metrics gets logits, unless they are declined; the loss is the same."""
    seen = []

    def metrics(prediction):
        seen.append(prediction.predictions)
        return {}

    def evaluate(model, **more):
        args = arguments(TrainingArguments, tmp_path, per_device_eval_batch_size=8, **more)
        given = dict(model=model, args=args, eval_dataset=rows(), data_collator=pad)
        return Trainer(**given, compute_metrics=metrics).evaluate()["eval_loss"]

    stock = make("LlamaForCausalLM")
    want = evaluate(stock)
    model = cutloss.patch(copy.deepcopy(stock), return_logits=return_logits)
    if return_logits is None:
        assert evaluate(model) == want
        torch.testing.assert_close(seen[1], seen[0])
    else:
        with NoLogits():
            got = evaluate(model, prediction_loss_only=True)
        assert got == pytest.approx(want, rel=1e-5)


# TRL ----------------------------------------------------------------------------------------------


def both(make_trainer, kind, *args, **more):
    """The history of TRL's trainer, and of ours, which makes no logits."""
    name = "Gemma2ForCausalLM" if "model" not in more else more.pop("model")
    stock = history(make_trainer(getattr(trl, kind), make(name), *args, **more))
    trainer = make_trainer(getattr(cutloss.trl, kind), make(name), *args, **more)
    with NoLogits():
        return history(trainer), stock


@pytest.mark.parametrize(
    "more",
    [{}, dict(loss_type="dft"), dict(peft_config=LORA), dict(model="MixtralForCausalLM")],
    ids=["nll", "dft", "lora", "mixture_of_experts"],
)
def test_sft(tokenizer, tmp_path, more):
    got, want = both(sft, "SFTTrainer", tokenizer, tmp_path, **more)
    assert {"loss", "grad_norm", "entropy", "mean_token_accuracy"} <= got[0].keys()
    assert_same(got, want)


def test_a_trainer_of_ones_own_with_a_patched_model(tokenizer, tmp_path):
    class Mine(trl.SFTTrainer):
        pass

    stock = history(sft(trl.SFTTrainer, make("LlamaForCausalLM"), tokenizer, tmp_path))
    kind = cutloss.trl.with_cutloss(Mine)
    assert kind is cutloss.trl.with_cutloss(Mine) and kind.__name__ == "Mine"
    model = cutloss.patch(make("LlamaForCausalLM"))
    assert_same(history(sft(kind, model, tokenizer, tmp_path)), stock)
    assert model(**pad(rows())).logits is None  # and is as patched as it was
    assert trl.trainer.sft_trainer.add_fused_lm_head is trl.trainer.utils.add_fused_lm_head


def test_what_trl_may_not_be(tokenizer, tmp_path, monkeypatch):
    with pytest.raises(NotImplementedError, match=r"Trainer does not take its .*\(trl 1.16.0"):
        cutloss.trl.with_cutloss(Trainer)
    module = trl.trainer.sft_trainer
    with monkeypatch.context() as m:
        m.setattr(module, "add_fused_lm_head", lambda model, outputs: None)
        with pytest.raises(NotImplementedError, match=r"takes \['model', 'outputs'\]"):
            sft(cutloss.trl.SFTTrainer, make("LlamaForCausalLM"), tokenizer, tmp_path)

    class Elsewhere(trl.SFTTrainer):
        def __init__(self, *args, **kwargs):
            before = module.add_fused_lm_head
            module.add_fused_lm_head = lambda *args, **kwargs: None
            super().__init__(*args, **kwargs)
            module.add_fused_lm_head = before

    with pytest.raises(NotImplementedError, match="without a call of add_fused_lm_head"):
        sft(cutloss.trl.with_cutloss(Elsewhere), make("LlamaForCausalLM"), tokenizer, tmp_path)
    with pytest.raises(NotImplementedError, match="asks for .'quantiles'.*knows nothing"):
        cutloss.trl.add_fused_lm_head(make("LlamaForCausalLM"), outputs=("quantiles",))


def test_sft_accumulated(tokenizer, tmp_path):
    more = dict(per_device_train_batch_size=1, gradient_accumulation_steps=4)
    whole = history(sft(cutloss.trl.SFTTrainer, make("LlamaForCausalLM"), tokenizer, tmp_path))
    parts = history(
        sft(cutloss.trl.SFTTrainer, make("LlamaForCausalLM"), tokenizer, tmp_path, **more)
    )
    for g, w in zip(parts, whole):
        assert (g["loss"], g["grad_norm"]) == pytest.approx((w["loss"], w["grad_norm"]), rel=1e-4)


def test_what_needs_logits_in_trl_gets_them(tokenizer, tmp_path):
    """Label smoothing is computed by TRL from logits; only the metrics are ours."""
    more = dict(label_smoothing_factor=0.1)
    stock = history(sft(trl.SFTTrainer, make("LlamaForCausalLM"), tokenizer, tmp_path, **more))
    ours = history(
        sft(cutloss.trl.SFTTrainer, make("LlamaForCausalLM"), tokenizer, tmp_path, **more)
    )
    assert_same(ours, stock)


def dpo(base, model, tokenizer, tmp_path, peft_config=None, **more):
    data = [
        dict(prompt=words(i, 3), chosen=" " + words(50 + i, 4), rejected=" " + words(90 + i, 3))
        for i in range(8)
    ]
    args = arguments(trl.DPOConfig, tmp_path, **more)
    data = datasets.Dataset.from_list(data)
    transformers.set_seed(2)
    return base(
        model=model, args=args, train_dataset=data, processing_class=tokenizer,
        peft_config=peft_config, ref_model=None if peft_config else make("Gemma2ForCausalLM"),
    )  # fmt: skip


@pytest.mark.parametrize(
    "more",
    [{}, dict(use_weighting=True, loss_type="ipo"), dict(peft_config=LORA)],
    ids=["sigmoid", "weighted", "lora"],
)
def test_dpo(tokenizer, tmp_path, more):
    got, want = both(dpo, "DPOTrainer", tokenizer, tmp_path, **more)
    assert {"loss", "rewards/margins", "logits/chosen"} <= got[0].keys()
    assert_same(got, want)


def rloo(base, model, tokenizer, tmp_path, peft_config=None, **more):
    def reward(completions, **kwargs):
        return [float(len(set(c)) % 5) for c in completions]

    args = arguments(trl.RLOOConfig, tmp_path, num_generations=2, max_completion_length=5, **more)
    data = datasets.Dataset.from_list([dict(prompt=words(i, 3)) for i in range(8)])
    transformers.set_seed(2)
    return base(
        model=model, args=args, train_dataset=data, processing_class=tokenizer,
        reward_funcs=reward, peft_config=peft_config,
    )  # fmt: skip


def kto(base, model, tokenizer, tmp_path, peft_config=None, **more):
    data = [
        dict(prompt=words(i, 3), completion=" " + words(50 + i, 4), label=i % 2 == 0)
        for i in range(8)
    ]
    args = arguments(trl.KTOConfig, tmp_path, **more)
    transformers.set_seed(2)
    return base(
        model=model, args=args, train_dataset=datasets.Dataset.from_list(data),
        processing_class=tokenizer, peft_config=peft_config,
    )  # fmt: skip


def test_kto(tokenizer, tmp_path):
    got, want = both(kto, "KTOTrainer", tokenizer, tmp_path, peft_config=LORA)
    assert_same(got, want)


def test_rloo(tokenizer, tmp_path):
    given = (make("Gemma2ForCausalLM"), tokenizer, tmp_path, LORA)
    want = history(rloo(trl.RLOOTrainer, *copy.deepcopy(given)))
    got = history(without_logits_in_the_loss(rloo(cutloss.trl.RLOOTrainer, *given)))
    assert_same(got, want)


@pytest.mark.parametrize(
    "more",
    [{}, dict(beta=0.1, top_entropy_quantile=0.5, peft_config=LORA)],
    ids=["dapo", "kl_and_entropies"],
)
def test_grpo(tokenizer, tmp_path, more):
    given = (make("Gemma2ForCausalLM"), tokenizer, tmp_path)
    stock = history(grpo(trl.GRPOTrainer, *copy.deepcopy(given), **more))
    trainer = grpo(cutloss.trl.GRPOTrainer, *given, **more)
    got = history(without_logits_in_the_loss(trainer))
    assert any(entry["loss"] != 0 for entry in got)
    assert_same(got, stock)

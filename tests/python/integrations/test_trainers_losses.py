"""Losses of TRL's trainers that come from elsewhere than TRL's fused head: done, or refused."""

import threading

import pytest
import torch
import transformers
import trl
from helpers.architectures import batch, make
from helpers.patched import NoLogits
from helpers.trainers import (
    LORA,
    ForMetrics,
    NoLogitsOfSequences,
    Own,
    WithoutGradients,
    assert_same,
    gkd,
    grpo,
    history,
    sft,
    tokenizer,
)

import cutloss
import cutloss.trl

__all__ = ["tokenizer"]  # the fixture
LLAMA = "LlamaForCausalLM"


# GKD ----------------------------------------------------------------------------------------------


def gradients(trainer):
    """Of the first step, before the optimizer takes it."""
    found = {}

    class Look(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_, **__):
            if not found:
                named = trainer.model.named_parameters()
                found.update({n: p.grad.clone() for n, p in named if p.grad is not None})

    trainer.add_callback(Look())
    return found


@pytest.mark.parametrize(
    "more",
    [
        {},
        dict(beta=0.1, gradient_accumulation_steps=2, per_device_train_batch_size=2),
        dict(beta=0.0),
        dict(beta=1.0, temperature=0.7),
        dict(lmbda=1.0, max_new_tokens=4),
        dict(peft_config=LORA),
        dict(model="Gemma2ForCausalLM"),
    ],
    ids=["jsd", "accumulated", "forward_kl", "reverse_kl", "on_policy", "lora", "softcap"],
)
def test_gkd(tokenizer, tmp_path, more):
    """The same losses, and the same gradients of every parameter, without anybody's logits."""
    from trl.experimental.gkd import GKDTrainer

    name = more.pop("model", LLAMA)
    stock = gkd(GKDTrainer, make(name), tokenizer, tmp_path, **more)
    want_grads, want = gradients(stock), history(stock)
    trainer = gkd(cutloss.trl.GKDTrainer, make(name), tokenizer, tmp_path, **more)
    got_grads = gradients(trainer)
    if "lmbda" in more:  # generating makes logits
        got = history(trainer)
    else:
        with NoLogitsOfSequences():
            got = history(trainer)
    assert got[0]["loss"] > 0
    assert_same(got, want)
    assert got_grads.keys() == want_grads.keys()
    for key, want_grad in want_grads.items():
        scale = want_grad.abs().max().item()
        torch.testing.assert_close(got_grads[key], want_grad, rtol=1e-3, atol=1e-4 * scale + 1e-9)


def test_gkd_in_evaluation(tokenizer, tmp_path):
    """Logits are made where metrics want them."""
    from trl.experimental.gkd import GKDTrainer

    stock = gkd(GKDTrainer, make(LLAMA), tokenizer, tmp_path)
    want = stock.evaluate()["eval_loss"]
    with NoLogitsOfSequences(), pytest.raises(AssertionError, match="made a tensor"):
        stock.evaluate()
    trainer = gkd(cutloss.trl.GKDTrainer, make(LLAMA), tokenizer, tmp_path)
    with NoLogitsOfSequences():
        assert trainer.evaluate()["eval_loss"] == pytest.approx(want, rel=1e-5)
    shapes = []

    def metrics(prediction):
        shapes.append(prediction.predictions.shape)
        return {}

    trainer.compute_metrics = metrics
    assert trainer.evaluate()["eval_loss"] == pytest.approx(want, rel=1e-5)
    assert shapes[0][-1] == 97


def test_gkd_of_a_class_of_ones_own(tokenizer, tmp_path):
    """What calls super().compute_loss gets the loss of cutloss, as its author meant it."""
    from trl.experimental.gkd import GKDTrainer

    class Doubled(GKDTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return 2 * super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    kind = cutloss.trl.with_cutloss(Doubled)
    want = history(gkd(Doubled, make(LLAMA), tokenizer, tmp_path))
    trainer = gkd(kind, make(LLAMA), tokenizer, tmp_path)
    with NoLogitsOfSequences():
        assert_same(history(trainer), want)

    class Other(GKDTrainer):
        @staticmethod
        def generalized_jsd_loss(student_logits, teacher_logits, labels=None, **_):
            return (student_logits - teacher_logits).square().mean()

    with pytest.raises(NotImplementedError, match="Other has a generalized_jsd_loss of its own"):
        cutloss.trl.with_cutloss(Other)


def test_another_formula_of_trl_is_refused(tokenizer, tmp_path, monkeypatch):
    from trl.experimental.gkd import GKDTrainer

    jsd = GKDTrainer.generalized_jsd_loss

    def at_a_temperature(*args, **more):
        return jsd(*args, **more, temperature=0.5)

    monkeypatch.setattr(GKDTrainer, "generalized_jsd_loss", staticmethod(at_a_temperature))
    with pytest.raises(NotImplementedError, match=r"GKDTrainer's loss is .* with trl .*, and "):
        gkd(cutloss.trl.GKDTrainer, make(LLAMA), tokenizer, tmp_path)


# A loss of a user's own ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Own, ForMetrics, WithoutGradients])
def test_a_loss_of_logits_is_refused_in_the_first_step(tokenizer, tmp_path, kind):
    trainer = sft(cutloss.trl.with_cutloss(kind), make(LLAMA), tokenizer, tmp_path)
    before = [p.clone() for p in trainer.model.parameters()]
    match = rf"{kind.__name__}.compute_loss .*fused_lm_head=True.*cutloss.patch\(model\)"
    with pytest.raises(NotImplementedError, match=match):
        trainer.train()
    assert all(map(torch.equal, before, trainer.model.parameters()))


def test_the_refusal_comes_before_logits(tokenizer, tmp_path):
    trainer = sft(cutloss.trl.with_cutloss(Own), make(LLAMA), tokenizer, tmp_path)
    with NoLogits(), pytest.raises(NotImplementedError, match="Own.compute_loss"):
        trainer.train()


def test_a_loss_of_log_probs(tokenizer, tmp_path):
    """And a second call of the model, for its logits."""

    class Mine(trl.SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs, fused_lm_head=True)
            with torch.no_grad():
                self.logits = model(inputs["input_ids"], inputs["attention_mask"]).logits
            return -outputs.log_probs.mean()

    want = history(sft(Mine, make(LLAMA), tokenizer, tmp_path))
    trainer = sft(cutloss.trl.with_cutloss(Mine), make(LLAMA), tokenizer, tmp_path)
    assert_same(history(trainer), want)
    assert trainer.logits.shape[-1] == 97


def test_compute_loss_func_is_refused(tokenizer, tmp_path):
    def function(outputs, labels, num_items_in_batch=None):
        return outputs.logits.mean()

    class Given(cutloss.trl.SFTTrainer):
        def __init__(self, **more):
            super().__init__(**more, compute_loss_func=function)

    with pytest.raises(NotImplementedError, match="compute_loss_func is .*function.*fused_lm_head"):
        sft(Given, make(LLAMA), tokenizer, tmp_path)


@pytest.mark.parametrize("more", [{}, dict(loss_type="dft")], ids=["nll", "dft"])
def test_label_smoothing(tokenizer, tmp_path, more):
    """TRL's is of logits, for loss_type "nll"; "dft" has none."""
    more = dict(label_smoothing_factor=0.1, eval_strategy="steps", eval_steps=1, **more)
    want = sft(trl.SFTTrainer, make("Gemma2ForCausalLM"), tokenizer, tmp_path, **more)
    trainer = sft(cutloss.trl.SFTTrainer, make("Gemma2ForCausalLM"), tokenizer, tmp_path, **more)
    want = history(want)
    with NoLogits():
        got = history(trainer)
    assert_same(got, want)
    assert trainer.label_smoother is not None


def test_label_smoothing_of_a_mixture_of_experts_is_refused(tokenizer, tmp_path):
    with pytest.raises(NotImplementedError, match="label_smoothing_factor=0.1 with router_aux"):
        sft(cutloss.trl.SFTTrainer, make("MixtralForCausalLM"), tokenizer, tmp_path,
            label_smoothing_factor=0.1)  # fmt: skip


# What belongs to a call, not to the model ---------------------------------------------------------


def test_calls_of_other_threads_and_inside_get_logits(tokenizer, tmp_path):
    model = make(LLAMA)
    trainer = sft(cutloss.trl.SFTTrainer, model, tokenizer, tmp_path)
    inputs, found = batch(), []
    ids = inputs["input_ids"]
    want = model(ids).logits.detach()

    def look(*_):
        """While the fused forward runs, in the middle of the model."""
        handle.remove()
        with torch.no_grad():
            found.append(model(ids).logits)
        other = threading.Thread(target=lambda: found.append(model(ids).logits.detach()))
        other.start()
        other.join()

    handle = model.model.norm.register_forward_hook(look)
    outputs = trainer.model(**inputs, fused_lm_head=True)
    assert len(found) == 2
    for logits in found:
        torch.testing.assert_close(logits, want)
    log_p = torch.log_softmax(want[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
    counts = inputs["labels"][:, 1:] != -100
    torch.testing.assert_close(outputs.log_probs, log_p * counts, rtol=1e-4, atol=1e-5)


def test_a_reward_that_calls_the_policy(tokenizer, tmp_path):
    """With gradients, though nobody wants them: it is in the step, and not in the loss."""
    trainer = grpo(cutloss.trl.GRPOTrainer, make(LLAMA), tokenizer, tmp_path)
    shapes = []

    def reward(completion_ids, **_):
        with torch.enable_grad():
            logits = [trainer.model(torch.tensor([ids])).logits for ids in completion_ids]
        shapes.extend(z.shape for z in logits)
        return [z.mean().item() for z in logits]

    trainer.reward_funcs[0] = reward
    assert history(trainer) and all(shape[-1] == 97 for shape in shapes) and shapes


def test_grpo_with_a_step_of_accumulation(tokenizer, tmp_path):
    """Each step is looked at by itself."""
    more = dict(gradient_accumulation_steps=2, per_device_train_batch_size=2)
    want = history(grpo(trl.GRPOTrainer, make(LLAMA), tokenizer, tmp_path, **more))
    got = history(grpo(cutloss.trl.GRPOTrainer, make(LLAMA), tokenizer, tmp_path, **more))
    assert_same(got, want)

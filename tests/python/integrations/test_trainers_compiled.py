"""TRL's trainers under torch_compile: the numbers of TRL's own, and the refusals too."""

import pytest
import torch
import trl
from helpers.architectures import make
from helpers.patched import NoLogits
from helpers.trainers import (
    ForMetrics,
    NoLogitsOfSequences,
    Own,
    WithoutGradients,
    assert_same,
    gkd,
    history,
    sft,
    tokenizer,
)

import cutloss.trl

__all__ = ["tokenizer"]  # the fixture
COMPILED = dict(torch_compile=True, torch_compile_backend="eager")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small(name="LlamaForCausalLM"):
    return make(name, num_hidden_layers=1)


@pytest.mark.parametrize(
    "name, more",
    [("LlamaForCausalLM", {}), ("GPT2LMHeadModel", dict(label_smoothing_factor=0.3))],
    ids=["whole graph", "graph that breaks"],
)
def test_sft(tokenizer, tmp_path, name, more):
    want = history(sft(trl.SFTTrainer, small(name), tokenizer, tmp_path, **more))
    trainer = sft(cutloss.trl.SFTTrainer, small(name), tokenizer, tmp_path, **more, **COMPILED)
    with NoLogits():
        got = history(trainer)
    assert_same(got, want)


def test_gkd(tokenizer, tmp_path):
    """Whose teacher is compiled too, before cutloss sees it."""
    from trl.experimental.gkd import GKDTrainer

    want = history(gkd(GKDTrainer, small(), tokenizer, tmp_path))
    trainer = gkd(cutloss.trl.GKDTrainer, small(), tokenizer, tmp_path, **COMPILED)
    assert isinstance(trainer.teacher_model, torch._dynamo.OptimizedModule)
    with NoLogitsOfSequences():
        got = history(trainer)
    assert_same(got, want)


@pytest.mark.parametrize("kind", [Own, ForMetrics, WithoutGradients])
def test_a_loss_of_logits_is_refused_in_the_first_step(tokenizer, tmp_path, kind):
    trainer = sft(cutloss.trl.with_cutloss(kind), small(), tokenizer, tmp_path, **COMPILED)
    before = [p.clone() for p in trainer.model.parameters()]
    with pytest.raises(NotImplementedError, match=rf"{kind.__name__}.compute_loss .*fused_lm_head"):
        trainer.train()
    assert all(map(torch.equal, before, trainer.model.parameters()))


@pytest.mark.parametrize("name", ["loss", "log_probs"])
def test_a_loss_of_either_result(tokenizer, tmp_path, name):
    class Mine(trl.SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs, fused_lm_head=True)[name].mean()

    want = history(sft(Mine, small(), tokenizer, tmp_path))
    kind = cutloss.trl.with_cutloss(Mine)
    assert_same(history(sft(kind, small(), tokenizer, tmp_path, **COMPILED)), want)

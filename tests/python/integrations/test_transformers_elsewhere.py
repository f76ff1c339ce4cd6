"""Training calls of a patched model whose loss somebody else makes, of logits: said, or refused."""

import copy
import functools
import warnings

import pytest
import torch
from helpers.architectures import batch, make
from helpers.patched import run
from helpers.trainers import arguments, history, pad, rows, sft, tokenizer
from transformers import Trainer, TrainingArguments

import cutloss
import cutloss.trl

__all__ = ["tokenizer"]  # the fixture
LLAMA = "LlamaForCausalLM"
SAID = "a training call of LlamaForCausalLM without labels"


def patched(**options):
    return cutloss.patch(make(LLAMA, num_hidden_layers=1), **options)


def without_labels():
    return {k: v for k, v in batch().items() if k != "labels"}


def quiet(function, *args, **given):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="a training call of")
        return function(*args, **given)


def of_logits(outputs, labels, num_items_in_batch=None):
    z, y = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(z, y)


@pytest.mark.parametrize("compiled", [{}, dict(torch_compile=True, torch_compile_backend="eager")])
@pytest.mark.parametrize("how", ["label_smoothing_factor", "compute_loss_func"])
def test_trainer(how, compiled, tmp_path):
    """As Trainer makes it where it takes the labels out."""
    torch._dynamo.reset()

    def trainer(model):
        more = dict(label_smoothing_factor=0.1) if how == "label_smoothing_factor" else {}
        args = arguments(TrainingArguments, tmp_path, **more, **compiled)
        given = dict(model=model, args=args, train_dataset=rows(), data_collator=pad)
        return Trainer(**given, compute_loss_func=None if more else of_logits)

    with pytest.warns(UserWarning, match=f"{SAID}.*label_smoothing_factor") as said:
        got = history(trainer(patched()))
    assert len(got) == 2 and len([w for w in said if SAID in str(w.message)]) == 1
    for options in (dict(z_loss=1e-4), dict(label_smoothing=0.2, z_loss=0.5)):
        written = ", ".join(sorted((f"{k}={v}" for k, v in options.items()), reverse=True))
        with pytest.raises(ValueError, match=f"given {written}, and this training call of Llama"):
            trainer(patched(**options)).train()


def test_what_is_said_once_and_of_which_calls():
    model, inputs = patched(), without_labels()
    model.eval()
    quiet(model, **inputs)
    model.train()
    with torch.no_grad():
        quiet(model, **inputs)
    quiet(model, **batch())
    quiet(model, **batch(), return_logits=True)
    quiet(model, **inputs, return_logits=True)
    other = copy.deepcopy(model)
    for m in (model, other):
        with pytest.warns(UserWarning, match=SAID):
            m(**inputs)
        quiet(m, **inputs)
    frozen = patched().requires_grad_(False)
    quiet(frozen, **inputs)
    unpatched = cutloss.unpatch(patched())
    quiet(unpatched, **inputs)


def test_gradients_in_evaluation_are_spoken_of_once():
    model = patched().eval()  # as from_pretrained gives it
    with pytest.warns(UserWarning, match=r"in evaluation mode .* model.train\(\)"):
        assert model(**batch()).logits is not None
    others = [patched().eval(), patched(return_logits=False).eval()]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="a call of")
        model(**batch())
        patched(return_logits=True).eval()(**batch())
        others[0](**batch(), return_logits=True)
        assert others[1](**batch()).logits is None
        with torch.no_grad():
            patched().eval()(**batch())


def test_a_whole_graph_stays_whole():
    model = torch.compile(patched(), backend="eager", fullgraph=True)
    with pytest.warns(UserWarning, match=SAID):
        model(**without_labels())
    quiet(model, **without_labels())


@pytest.mark.parametrize("options", [dict(z_loss=0.01), dict(label_smoothing=0.1)])
def test_regularisers_are_not_lost(options):
    (name,) = options
    model, inputs = patched(**options), without_labels()
    with pytest.raises(ValueError, match=rf"{name}=.*no labels.*Pass the labels.*without {name}"):
        model(**inputs)
    with pytest.warns(UserWarning, match=rf"return_logits=True is the model's own, .* {name}="):
        model(**batch(), return_logits=True)
    assert quiet(model, **inputs, return_logits=True).logits.requires_grad
    with torch.no_grad():
        quiet(model, **inputs)
    model.eval()
    quiet(model, **inputs)
    quiet(model, **batch())


def test_a_call_inside_of_a_loss():
    """Whose own call has labels, and the loss of cutloss."""

    def distilled(model, plain, logits, labels, vocab_size, **kwargs):
        own = model(**without_labels()).logits
        return plain(logits, labels, vocab_size) + own.square().mean()

    model = patched(z_loss=0.01)
    logits = model(**without_labels(), return_logits=True).logits
    want = model(**batch()).loss + logits.square().mean()
    model.loss_function = functools.partial(distilled, model, model.loss_function)
    output, _ = quiet(run, model, **batch())
    torch.testing.assert_close(output.loss, want)


def test_trl(tokenizer, tmp_path):
    """Whose losses have no such terms; and whose calls are no reason for a warning."""
    quiet(history, sft(cutloss.trl.SFTTrainer, patched(), tokenizer, tmp_path))
    with pytest.raises(ValueError, match="given z_loss=0.5, which a loss of TRL would be without"):
        sft(cutloss.trl.SFTTrainer, patched(z_loss=0.5), tokenizer, tmp_path)

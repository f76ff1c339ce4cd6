"""patch(model, verify=batch): the comparison with the model's own loss on a batch of the user, for
models that need more than text."""

import collections
import copy
import re

import pytest
import torch
import transformers
from helpers.architectures import make
from helpers.patched import NoLogits, assert_same, run
from peft import LoraConfig, get_peft_model
from transformers import BatchEncoding

import cutloss

V, IMAGE = 97, 96  # the token in whose place BLIP-2 puts an image
LLAMA = "LlamaForCausalLM"
_SIZES = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
_IMAGES = dict(**_SIZES, image_size=8, patch_size=4)
_TOKENS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)


def labels(length=7):
    found = torch.randint(3, 90, (2, length))
    found[1, -2:] = -100
    return found


def whisper():
    config = transformers.WhisperConfig(
        vocab_size=V,
        num_mel_bins=8,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_source_positions=10,
        max_target_positions=12,
        decoder_start_token_id=3,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **_TOKENS,
    )
    model = transformers.WhisperForConditionalGeneration(config)
    return model, dict(input_features=torch.randn(2, 8, 20), labels=labels())


def vision_encoder_decoder():
    decoder = transformers.GPT2Config(
        vocab_size=V, n_embd=16, n_layer=1, n_head=2, n_positions=16, **_TOKENS
    )
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**_IMAGES), decoder
    )
    config.pad_token_id, config.decoder_start_token_id = 0, 1
    model = transformers.VisionEncoderDecoderModel(config)
    return model, dict(pixel_values=torch.randn(2, 3, 8, 8), labels=labels())


def blip2(text_config):
    config = transformers.Blip2Config(
        vision_config=transformers.Blip2VisionConfig(**_IMAGES).to_dict(),
        qformer_config=transformers.Blip2QFormerConfig(
            **{**_SIZES, "num_hidden_layers": 2}, vocab_size=V, encoder_hidden_size=16
        ).to_dict(),
        text_config=text_config.to_dict(),
        num_query_tokens=3,
        image_token_index=IMAGE,
    )
    ids = torch.randint(3, 90, (2, 9))
    ids[:, :3] = IMAGE
    batch = dict(pixel_values=torch.randn(2, 3, 8, 8), input_ids=ids, labels=labels(9))
    return transformers.Blip2ForConditionalGeneration(config), batch


def blip2_opt():
    return blip2(
        transformers.OPTConfig(
            vocab_size=V,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            ffn_dim=16,
            max_position_embeddings=32,
            word_embed_proj_dim=16,
            **_TOKENS,
        )
    )


def blip2_t5():
    return blip2(
        transformers.T5Config(
            vocab_size=V,
            d_model=16,
            d_kv=8,
            d_ff=16,
            num_layers=1,
            num_heads=2,
            pad_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=0,
        )
    )


MODELS = [whisper, vision_encoder_decoder, blip2_opt, blip2_t5]


def made(build):
    torch.manual_seed(0)
    model, batch = build()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for part in model.modules():  # GPT-2 has its own rates in functions
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)
    return model.train(), batch


def text():
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    return dict(input_ids=ids, labels=ids.clone())


def values_of(batch):
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def assert_unpatched(model):
    assert "forward" not in model.__dict__ and "_cutloss_patches" not in model.__dict__
    with pytest.raises(ValueError, match="is not patched"):
        cutloss.unpatch(model)


@pytest.mark.parametrize("build", MODELS)
def test_models_that_need_more_than_text(build):
    model, batch = made(build)
    with pytest.raises(RuntimeError, match="the model itself can not take .* pass verify=batch"):
        cutloss.patch(model)
    assert_unpatched(model)
    stock, given = copy.deepcopy(model), values_of(batch)
    assert cutloss.patch(model, verify=batch) is model
    assert batch.keys() == given.keys()
    assert all(torch.equal(v, given[k]) for k, v in batch.items())
    with NoLogits():
        got = run(model, **batch)
    assert_same(got, run(stock, **batch))
    outputs = model(**batch)
    assert outputs.logits is None
    inner = outputs.get("language_model_outputs")
    assert inner is None or inner.logits is None


def test_an_adapter():
    model, batch = made(whisper)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
    assert cutloss.patch(adapted, verify=batch) is adapted
    with NoLogits():
        adapted.train()(**batch).loss.backward()


def test_the_batch_stays_as_it_is():
    """Also where a forward writes into what it is given, as BLIP-2 does into a dict."""

    def writes(self, input_ids, labels, found, seen, cache):
        labels[0, 0] = -100
        found["seen"] = labels.sum()
        seen[0].add_(1)
        hidden = self.model(input_ids, past_key_values=cache).last_hidden_state
        logits = self.lm_head(hidden)
        loss = self.loss_function(logits, labels, V) * seen[0]
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)

    model = make(LLAMA)
    model.__class__ = type("Writes", (type(model),), {"forward": writes})
    cache = transformers.DynamicCache(config=model.config)
    batch = {**text(), "found": {}, "seen": [torch.zeros(())], "cache": cache}
    before = text()["labels"]
    cutloss.patch(model, verify=batch)
    assert list(batch) == ["input_ids", "labels", "found", "seen", "cache"]
    assert torch.equal(batch["labels"], before) and batch["found"] == {}
    assert batch["seen"][0] == 0 and cache.get_seq_length() == 0


@pytest.mark.parametrize("error", [False, True])
def test_nothing_is_left_behind(error):
    """Gradients, modes, random state, buffers; after an error too."""
    model, batch = make(LLAMA).train(), text()

    class Draws(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(32)

        def forward(self, x):
            x = self.norm.train()(x.flatten(0, 1)).view_as(x)  # its buffers change
            return x + 0.1 * torch.rand_like(x)  # different numbers in each call

    model.model.norm = torch.nn.Sequential(model.model.norm, Draws())
    if error:
        model.loss_function = lambda logits, labels, **_: (logits * 1.0).sin().sum()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    model.model.norm[0].weight.grad = torch.ones(32)
    state = torch.get_rng_state()
    modes = [m.training for m in model.modules()]
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    if error:
        with pytest.raises(NotImplementedError, match="'sin'"):
            cutloss.patch(model, verify=batch)
        assert_unpatched(model)
    else:
        cutloss.patch(model, verify=batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        "model.norm.0.weight"
    }
    assert model.model.norm[0].weight.grad.sum() == 32
    assert not model.lm_head.weight.requires_grad


# Where it is not the model's own ------------------------------------------------------------------


class Penalised(transformers.LlamaForCausalLM):
    """With weights it adds a term to the loss, of logits that are tensors only."""

    def forward(self, input_ids, labels=None, weights=None, **kwargs):
        logits = self.lm_head(self.model(input_ids, **kwargs).last_hidden_state)
        loss = self.loss_function(logits, labels, self.config.vocab_size)
        if weights is not None and isinstance(logits, torch.Tensor):
            term = logits.square().sum(-1)
            # Its own value, or its gradient alone.
            loss = loss + ((term - term.detach() * (weights < 0)) * weights).mean()
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


@pytest.mark.parametrize("kind", [dict, BatchEncoding, collections.UserDict])
def test_a_loss_that_differs_on_this_batch_alone(kind):
    model, batch = Penalised(make(LLAMA).config), text()
    for fine in (True, kind(batch)):
        cutloss.patch(model, verify=fine)
        cutloss.unpatch(model)
    weights = torch.ones(2, 7)
    want = model(**batch, weights=weights).loss.item()
    got = model(**batch).loss.item()
    match = r"that verify was given the loss of Penalised is (\S+), and (\S+) with cutloss"
    with pytest.raises(NotImplementedError, match=match) as raised:
        cutloss.patch(model, verify=kind({**batch, "weights": weights}))
    said = map(float, re.search(match, str(raised.value)).groups())
    assert list(said) == pytest.approx([want, got], rel=1e-5)
    assert_unpatched(model)


def test_a_gradient_that_differs():
    model, batch = Penalised(make(LLAMA).config), text()
    match = r"the gradient for the hidden states of Penalised has norm .*, and .* with cutloss, and"
    with pytest.raises(NotImplementedError, match=match):
        cutloss.patch(model, verify={**batch, "weights": torch.full((2, 7), -1.0)})
    assert_unpatched(model)


def test_other_hidden_states():
    def otherwise(self, input_ids, labels, **kwargs):
        hidden = self.model(input_ids).last_hidden_state
        if not isinstance(self.lm_head(hidden), torch.Tensor):
            hidden, labels = hidden.repeat(2, 1, 1), labels.repeat(2, 1)
        logits = self.lm_head(hidden)
        loss = self.loss_function(logits, labels, V)  # the same mean
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)

    model = make(LLAMA)
    model.__class__ = type("Twice", (type(model),), {"forward": otherwise})
    with pytest.raises(NotImplementedError, match=r"of shape .*\(2, 7, 32\).* of .*\(4, 7, 32\)"):
        cutloss.patch(model, verify=text())


# Batches that are none ----------------------------------------------------------------------------


def without(name):
    return {k: v for k, v in text().items() if k != name}


BAD = {
    "no labels": (lambda: without("labels"), ValueError, "has no labels, .*it has input_ids"),
    "None": (lambda: {**text(), "labels": None}, ValueError, "has no labels"),
    "empty": (dict, ValueError, "has no labels.*it has nothing"),
    "a list": (lambda: [text()], TypeError, "verify must be True, False or a batch.*got list"),
    "a tensor": (lambda: text()["input_ids"], TypeError, "got Tensor"),
    "lists in it": (
        lambda: BatchEncoding({k: v.tolist() for k, v in text().items()}),
        TypeError,
        "labels .* must be a tensor, got list: .*return_tensors='pt'",
    ),
    "elsewhere": (
        lambda: {k: v.to("meta") for k, v in text().items()},
        ValueError,
        "input_ids in the batch .* is on meta, and LlamaForCausalLM on cpu: move",
    ),
    "an argument that is none": (
        lambda: {**text(), "lengths": torch.ones(2), "input_ids": None},
        RuntimeError,
        r"can not take \(ValueError: .*\): verify takes what LlamaForCausalLM\(\*\*batch\) takes",
    ),
    "no label counts": (
        lambda: {**text(), "labels": torch.full((2, 7), -100)},
        ValueError,
        "the loss of LlamaForCausalLM itself is nan.*some label counts",
    ),
    "no label counts, of a number that is given": (
        lambda: {**text(), "labels": torch.full((2, 7), -100), "num_items_in_batch": 5},
        ValueError,
        "the loss of LlamaForCausalLM itself is 0 with a gradient of zeros .*some label counts",
    ),
}


def test_a_classifier_of_zeros():
    """Has a gradient of zeros for the hidden states, whatever the batch."""
    model = make(LLAMA)
    torch.nn.init.zeros_(model.lm_head.weight)
    with pytest.raises(ValueError, match="classifier whose weights are not all zeros"):
        cutloss.patch(model, verify=text())
    assert_unpatched(model)
    cutloss.patch(model)


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_batch(name):
    make_batch, error, match = BAD[name]
    model = make(LLAMA)
    with pytest.raises(error, match=match):
        cutloss.patch(model, verify=make_batch())
    assert_unpatched(model)


LOSSES = {
    "none": (lambda loss: None, "NoneType in its place"),
    "of each token": (lambda loss: loss.expand(3), r"a tensor of shape \(3,\) in place of one"),
    "detached": (
        lambda loss: loss.detach(),
        r"a tensor of shape \(\) in place of one number with a gradient",
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_model_that_returns_no_loss(name):
    change, match = LOSSES[name]

    def forward(self, input_ids, labels, **kwargs):
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        loss = change(self.loss_function(logits, labels, V))
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)

    model = make(LLAMA)
    model.__class__ = type("Changed", (type(model),), {"forward": forward})
    for verify in (True, text()):
        with pytest.raises(ValueError, match=f"the forward of Changed returns no loss .{match}"):
            cutloss.patch(model, verify=verify)
        assert_unpatched(model)


def test_tuples():
    cutloss.patch(make(LLAMA), verify={**text(), "return_dict": False})


def test_without_weights():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(make(LLAMA).config)
    with pytest.raises(ValueError, match="meta device.*verify=False"):
        cutloss.patch(model, verify=text())

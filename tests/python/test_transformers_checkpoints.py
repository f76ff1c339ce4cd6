"""Checkpoints of Transformers' models: those with a head of ours in place of lm_head, and patched
ones, are saved as the model of Transformers is, and load what it saved."""

import json

import pytest
import torch
import transformers
from architectures import V, batch, make
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import cutloss
from cutloss import CausalLMHead

LLAMA = "LlamaForCausalLM"


class WithHead(transformers.LlamaForCausalLM):
    """Its lm_head is ours, made as somebody does who writes the model's class."""

    def __init__(self, config):
        super().__init__(config)
        classifier = (config.hidden_size, V)
        if config.tie_word_embeddings:
            classifier = (self.model.embed_tokens,)
        self.lm_head = CausalLMHead(*classifier)
        self.post_init()

    def forward(self, input_ids, labels=None, **kwargs):
        return self.lm_head(self.model(input_ids, **kwargs).last_hidden_state, labels)


def stock(tied, seed=0):
    torch.manual_seed(seed)
    config = make(LLAMA).config
    config.tie_word_embeddings = tied
    return transformers.LlamaForCausalLM(config)


def names_in(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return sorted(file.keys())


def assert_same(model, other):
    got, want = (m.eval()(**batch()) for m in (model, other))
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.logits, want.logits)


@pytest.mark.parametrize("tied", [False, True])
def test_there_and_back(tied, tmp_path):
    before = stock(tied)
    before.save_pretrained(tmp_path / "stock")
    model, said = WithHead.from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert not any(said.values())
    assert list(model.state_dict()) == list(before.state_dict())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert_same(model, before)
    model.load_state_dict(before.state_dict(), strict=True)

    model.save_pretrained(tmp_path / "ours")
    assert names_in(tmp_path / "ours") == names_in(tmp_path / "stock")
    assert ("lm_head.weight" in names_in(tmp_path / "ours")) != tied
    for kind in (transformers.LlamaForCausalLM, WithHead):
        loaded, said = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not any(said.values())
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
        assert_same(loaded, before)


def test_a_head_in_place_of_the_layer_of_a_model_that_was_loaded(tmp_path):
    before = stock(False)
    model = stock(False, seed=1)
    model.lm_head = CausalLMHead(model.lm_head)
    model.load_state_dict(before.state_dict(), strict=True)
    model.save_pretrained(tmp_path)
    assert_same(transformers.LlamaForCausalLM.from_pretrained(tmp_path), before)


def test_several_files(tmp_path):
    before = stock(False)
    model = WithHead(before.config)
    model.load_state_dict(before.state_dict())
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == before.state_dict().keys()
    assert_same(transformers.LlamaForCausalLM.from_pretrained(tmp_path), before)


def test_a_checkpoint_without_the_head(tmp_path):
    """Of a base model: Transformers makes the weight that is missing, and says so."""
    before = stock(False)
    before.model.save_pretrained(tmp_path)
    model, said = WithHead.from_pretrained(tmp_path, output_loading_info=True)
    assert said["missing_keys"] == {"lm_head.weight"}
    weight = model.lm_head.weight
    assert isinstance(weight, torch.nn.Parameter) and weight.requires_grad
    assert weight.device.type == "cpu" and 0.01 < weight.std() < 0.04  # initializer_range


def test_a_checkpoint_of_an_earlier_version(tmp_path):
    """Transformers reads files itself: it is told the new name."""
    before = stock(False)
    before.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    state["lm_head.output_embeddings.weight"] = state.pop("lm_head.weight")
    save_file(state, path, metadata={"format": "pt"})
    renamed = {r"^lm_head\.output_embeddings\.": "lm_head."}
    model, said = WithHead.from_pretrained(tmp_path, key_mapping=renamed, output_loading_info=True)
    assert not any(said.values())
    assert_same(model, before)


@pytest.mark.parametrize("tied", [False, True])
def test_a_patched_model(tied, tmp_path):
    before = stock(tied)
    model = cutloss.patch(stock(tied, seed=1))
    assert list(model.state_dict()) == list(before.state_dict())
    model.load_state_dict(before.state_dict(), strict=True)
    model.save_pretrained(tmp_path / "ours")
    before.save_pretrained(tmp_path / "stock")
    assert names_in(tmp_path / "ours") == names_in(tmp_path / "stock")
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    assert_same(loaded, before)

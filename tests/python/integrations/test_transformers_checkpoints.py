"""Checkpoints of Transformers' models: those with a head of ours in place of lm_head load what
Transformers saved, and are saved for it, as docs/transformers.md says; patched ones as they are."""

import pytest
import torch
import transformers
from helpers.architectures import V, batch, make
from safetensors import safe_open

import cutloss
from cutloss import CausalLMHead

LLAMA = "LlamaForCausalLM"
OF_THE_LAYER = {r"^lm_head\.(?!output_embeddings\.)": "lm_head.output_embeddings."}


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


class Tied(WithHead):
    _tied_weights_keys = {"lm_head.output_embeddings.weight": "model.embed_tokens.weight"}


def test_there_and_back(tmp_path):
    """Transformers reads files itself, and is told the names; it saves with the names it read."""
    before = stock(False)
    before.save_pretrained(tmp_path / "stock")
    model, said = WithHead.from_pretrained(
        tmp_path / "stock", key_mapping=OF_THE_LAYER, output_loading_info=True
    )
    assert not any(said.values())
    assert_same(model, before)
    model.save_pretrained(tmp_path / "ours")
    assert names_in(tmp_path / "ours") == names_in(tmp_path / "stock")
    for kind, names in ((transformers.LlamaForCausalLM, None), (WithHead, OF_THE_LAYER)):
        loaded, said = kind.from_pretrained(
            tmp_path / "ours", key_mapping=names, output_loading_info=True
        )
        assert not any(said.values())
        assert_same(loaded, before)


def test_there_and_back_tied(tmp_path):
    before = stock(True)
    before.save_pretrained(tmp_path / "stock")
    model, said = Tied.from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert not any(said.values())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same(model, before)
    model.save_pretrained(tmp_path / "ours")
    assert names_in(tmp_path / "ours") == names_in(tmp_path / "stock")
    loaded, said = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(said.values())
    assert_same(loaded, before)


def test_a_tied_head_of_which_transformers_knows_nothing(tmp_path):
    """It does not save one of the two names in silence."""
    with pytest.raises(RuntimeError, match="shared tensors.*lm_head.output_embeddings.weight"):
        WithHead(stock(True).config).save_pretrained(tmp_path)


@pytest.mark.parametrize("names", [None, OF_THE_LAYER])
def test_under_its_own_names(names, tmp_path):
    """Which no other model has; with the mapping they are loaded as well."""
    before = stock(False)
    model = WithHead(before.config)
    model.load_state_dict(before.state_dict(), strict=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.output_embeddings.weight" in names_in(tmp_path)
    loaded, said = WithHead.from_pretrained(tmp_path, key_mapping=names, output_loading_info=True)
    assert not any(said.values())
    assert_same(loaded, before)


@pytest.mark.parametrize("tied", [False, True])
def test_a_state_dict_for_transformers(tied, tmp_path):
    before = stock(tied)
    model = stock(tied, seed=1)
    model.lm_head = CausalLMHead(model.model.embed_tokens if tied else model.lm_head)
    model.load_state_dict(before.state_dict(), strict=True)
    state = {k.replace("output_embeddings.", ""): v for k, v in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    assert_same(transformers.LlamaForCausalLM.from_pretrained(tmp_path), before)


@pytest.mark.parametrize("tied", [False, True])
def test_what_decays(tied, tmp_path):
    """Trainer finds parameters by names that it makes by walking through modules."""
    for kind in (transformers.LlamaForCausalLM, WithHead):
        model = kind(stock(tied).config)
        arguments = transformers.TrainingArguments(
            output_dir=tmp_path, weight_decay=0.1, use_cpu=True, report_to=[]
        )
        optimizer = transformers.Trainer(model=model, args=arguments).create_optimizer()
        groups = optimizer.param_groups
        decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        assert decays[id(model.lm_head.weight)] == 0.1
        assert decays[id(model.model.norm.weight)] == 0.0
        assert len(decays) == len(list(model.parameters()))


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

"""Checkpoints of models in which one of our heads took a layer's place: those of the model before
are loaded, and one line makes one for it. Names are the same wherever PyTorch has them."""

import copy
import pickle

import pytest
import torch
from helpers import processes
from helpers.processes import checks
from safetensors.torch import load_model, save_model
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers.trainer_pt_utils import get_parameter_names

from cutloss import (
    CausalLMHead,
    LinearCrossEntropy,
    LinearCrossEntropyImpl,
    LinearCrossEntropyLoss,
)

V, D = 23, 8


class Stock(nn.Module):
    def __init__(self, tied=False, bias=False):
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.body = nn.Linear(D, D)
        self.lm_head = nn.Linear(D, V, bias=bias)
        self.norm = nn.LayerNorm(D)
        if tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, tokens):
        hidden = torch.tanh(self.body(self.embedding(tokens)))
        return self.lm_head(self.norm(hidden), tokens)


def stock(seed=0, **options):
    torch.manual_seed(seed)
    return Stock(**options)


# How a head comes into the model's place for lm_head.
HEADS = {
    "of its own": (dict(), lambda m: CausalLMHead(D, V)),
    "of its own, with a bias": (dict(bias=True), lambda m: CausalLMHead(D, V, bias=True)),
    "over the layer": (dict(bias=True), lambda m: CausalLMHead(m.lm_head)),
    "a loss": (dict(bias=True), lambda m: LinearCrossEntropyLoss(m.lm_head)),
    "tied": (dict(tied=True), lambda m: CausalLMHead(m.embedding)),
    "tied, with a bias": (
        dict(tied=True, bias=True),
        lambda m: CausalLMHead(m.embedding, bias=True),
    ),
    "with a bias more": (
        dict(bias=True),
        lambda m: CausalLMHead(nn.Linear(D, V, bias=False), bias=True),
    ),
}


def pair(name, seed=1):
    """A model as it was, and one of other values with our head."""
    options, head = HEADS[name]
    changed = stock(seed, **options)
    changed.lm_head = head(changed)
    # where it was among the modules, as a head has that is made in the model's __init__
    changed.norm = changed._modules.pop("norm")
    return stock(**options), changed


def for_the_layer(model):
    """A state_dict for the model as it was: the line is in docs/own-loop.md."""
    own = model.state_dict()
    return {k.replace("output_embeddings.", "").replace("own_bias", "bias"): own[k] for k in own}


def assert_same_state(got, want):
    assert sorted(got) == sorted(want)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=0)
    for state in (got, want):
        shared = state["embedding.weight"].data_ptr() == state["lm_head.weight"].data_ptr()
        assert shared == (want["embedding.weight"].data_ptr() == want["lm_head.weight"].data_ptr())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_there_and_back(name, assign):
    before, model = pair(name)
    model.load_state_dict(before.state_dict(), strict=True, assign=assign)
    assert_same_state(for_the_layer(model), before.state_dict())
    assert torch.equal(model.lm_head.weight, before.lm_head.weight)
    if before.lm_head.bias is not None:
        assert torch.equal(model.lm_head.bias, before.lm_head.bias)
    again = stock(2, **HEADS[name][0])
    again.load_state_dict(for_the_layer(model), strict=True)
    assert_same_state(again.state_dict(), before.state_dict())


@pytest.mark.parametrize("name", HEADS)
def test_under_its_own_names(name):
    _, model = pair(name)
    _, other = pair(name, seed=2)
    other.load_state_dict(model.state_dict(), strict=True)
    assert_same_state(for_the_layer(other), for_the_layer(model))


@pytest.mark.parametrize("name", HEADS)
def test_what_is_given_stays_as_it_is(name):
    before, model = pair(name)
    state = before.state_dict()
    model.load_state_dict(state)
    assert list(state) == list(before.state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("name", HEADS)
def test_a_copy(name, copied):
    before, model = pair(name)
    other = copied(model)
    other.load_state_dict(before.state_dict(), strict=True)
    assert_same_state(for_the_layer(other), before.state_dict())
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)


def test_a_head_that_an_earlier_version_pickled_whole():
    """It lacks the hook of now."""
    before, model = pair("tied, with a bias")
    state = model.lm_head.__getstate__()
    state["_load_state_dict_pre_hooks"] = type(state["_load_state_dict_pre_hooks"])()
    model.lm_head = CausalLMHead.__new__(CausalLMHead)
    model.lm_head.__setstate__(state)
    model.load_state_dict(before.state_dict(), strict=True)
    assert_same_state(for_the_layer(model), before.state_dict())


def test_a_module_that_an_earlier_version_pickled_whole():
    """Its impl is a member of an enum, which a pickle names by the path that it had in 0.1."""
    pickled = b"ccutloss._implementations\nLinearCrossEntropyImpl\n(I1\ntR."
    assert pickle.loads(pickled) is LinearCrossEntropyImpl.CCE
    assert b"cutloss._implementations" in pickle.dumps(LinearCrossEntropy())


@pytest.mark.parametrize("name", HEADS)
def test_a_head_alone(name):
    before, model = pair(name)
    model.lm_head.load_state_dict(before.lm_head.state_dict(), strict=True)
    assert torch.equal(model.lm_head.weight, before.lm_head.weight)


@pytest.mark.parametrize("name", HEADS)
def test_files_of_safetensors(name, tmp_path):
    """Which has each tensor once, and asks the model for its other names: its own, therefore."""
    _, model = pair(name)
    _, other = pair(name, seed=2)
    save_model(model, tmp_path / "file")
    load_model(other, tmp_path / "file")
    assert_same_state(for_the_layer(other), for_the_layer(model))


class Wider(CausalLMHead):
    """With a parameter, a buffer and a state of its own."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.gain = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros(1))
        self.steps = 0

    def get_extra_state(self):
        return self.steps

    def set_extra_state(self, state):
        self.steps = state


@pytest.mark.parametrize("strict", [False, True])
def test_what_a_subclass_adds(strict):
    head, other = Wider(D, V, bias=True), Wider(D, V, bias=True)
    nn.init.constant_(head.gain, 7.0)
    head.seen.fill_(5.0)
    head.steps = 3
    result = nn.ModuleList([other]).load_state_dict(
        {f"0.{name}": value for name, value in head.state_dict().items()}, strict=strict
    )
    assert not result.missing_keys and not result.unexpected_keys
    assert (other.gain.item(), other.seen.item(), other.steps) == (7.0, 5.0, 3)


def test_a_shallow_copy():
    before, model = pair("of its own")
    head = copy.copy(model.lm_head)
    head.load_state_dict(before.lm_head.state_dict())
    assert torch.equal(model.lm_head.weight, before.lm_head.weight)


def test_what_is_missing_or_not_expected():
    before, model = pair("of its own, with a bias")
    state = before.state_dict()
    del state["lm_head.bias"]
    state["lm_head.scale"] = torch.ones(1)
    result = model.load_state_dict(state, strict=False)
    assert result.missing_keys == ["lm_head.output_embeddings.bias"]
    assert result.unexpected_keys == ["lm_head.scale"]
    without_bias = pair("of its own")[1]
    with pytest.raises(RuntimeError, match='Unexpected key.* "lm_head.bias"'):
        without_bias.load_state_dict(before.state_dict())
    state = before.state_dict()
    state["lm_head.weight"] = torch.zeros(V + 1, D)
    with pytest.raises(RuntimeError, match="size mismatch for lm_head.output_embeddings.weight: "):
        model.load_state_dict(state)


@pytest.mark.parametrize("strict", [False, True])
def test_a_name_of_both_kinds_is_an_error(strict):
    before, model = pair("of its own")
    state = before.state_dict()
    state["lm_head.output_embeddings.weight"] = torch.zeros(V, D)
    match = "lm_head.weight is there a second time, as lm_head.output_embeddings.weight"
    with pytest.raises(RuntimeError, match=match):
        model.load_state_dict(state, strict=strict)


def test_what_a_head_has_beside_the_classifier():
    """Is loaded too; a checkpoint of a stock layer lacks it, and that is said."""
    head = CausalLMHead(D, V, bias=True, hidden_size=12, weight=torch.rand(V))
    other = CausalLMHead(D, V, bias=True, hidden_size=12, weight=torch.rand(V))
    other.load_state_dict(head.state_dict())
    for name, value in head.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    result = other.load_state_dict(nn.Linear(D, V).state_dict(), strict=False)
    assert sorted(result.missing_keys) == ["loss.weight", "projection.weight"]
    assert not result.unexpected_keys
    assert list(LinearCrossEntropy(weight=torch.ones(V)).state_dict()) == ["weight"]


def test_a_weight_that_is_computed():
    """Is none of the names, and lm_head.weight has no place."""
    head, other = CausalLMHead(D, V, bias=True), CausalLMHead(D, V, bias=True)
    for one in (head, other):
        torch.nn.utils.parametrizations.weight_norm(one.output_embeddings)
    other.load_state_dict(head.state_dict(), strict=True)
    torch.testing.assert_close(other.weight, head.weight)
    with pytest.raises(RuntimeError, match='Unexpected key.* "weight"'):
        head.load_state_dict(nn.Linear(D, V).state_dict())


# Names and values elsewhere -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["of its own", "with a bias more"])
def test_tying_by_assignment(name):
    """As one ties an nn.Linear; Transformers does so where a checkpoint is loaded."""
    _, model = pair(name)
    model.lm_head.weight = model.embedding.weight
    assert model.lm_head.weight is model.embedding.weight
    assert len([p for p in model.parameters() if p is model.embedding.weight]) == 1
    state = for_the_layer(model)
    assert state["lm_head.weight"].data_ptr() == state["embedding.weight"].data_ptr()


@pytest.mark.parametrize("name", HEADS)
def test_a_bias_that_is_set(name):
    """Where there is none the head alone gets one, as by bias=True."""
    _, model = pair(name)
    shared, had = model.lm_head.output_embeddings, model.lm_head.bias is not None
    is_own = not had or model.lm_head.own_bias is not None
    bias = nn.Parameter(torch.randn(V))
    model.lm_head.bias = bias
    assert model.lm_head.bias is bias
    assert (getattr(shared, "bias", None) is None) == is_own
    assert [p is bias for p in model.parameters()].count(True) == 1
    hidden, labels = torch.randn(3, D), torch.tensor([1, 2, 3])
    want = nn.functional.linear(hidden, model.lm_head.weight, bias)
    if name == "a loss":
        got, want = model.lm_head(hidden, labels), nn.functional.cross_entropy(want, labels)
    else:
        got = model.lm_head(hidden).logits
    torch.testing.assert_close(got, want)
    with pytest.raises(TypeError, match="cannot assign"):
        model.lm_head.bias = torch.zeros(V)


@pytest.mark.parametrize("name", HEADS)
def test_names_of_parameters(name):
    """Are those of the state_dict, and of modules and their parameters, as libraries walk them."""
    _, model = pair(name)
    named = dict(model.named_parameters(remove_duplicate=False))
    assert sorted(named) == sorted(model.state_dict())
    for path, parameter in named.items():
        assert model.get_parameter(path) is parameter
    assert set(dict(model.named_parameters())) <= set(get_parameter_names(model, []))
    modules = dict(model.named_modules(remove_duplicate=False))
    assert modules["lm_head"] is model.lm_head
    assert modules["lm_head.output_embeddings"] is model.lm_head.output_embeddings


@pytest.mark.parametrize("name", [n for n in HEADS if n != "a loss"])
def test_functional_call(name):
    """Other values, with gradients, and the model as it was afterwards. Of a module with two names,
    as a tied head's, PyTorch itself puts back the parameters with tie_weights=False alone."""
    before, model = pair(name)
    _, other = pair(name, seed=2)
    tied = {"tie_weights": not HEADS[name][0].get("tied", False)}
    parameters = dict(model.named_parameters())
    given = {n: p.detach() for n, p in other.named_parameters()}
    tokens = torch.arange(18).view(2, 9) % V
    values = {n: v.clone().requires_grad_() for n, v in given.items()}
    scaled = {n: v * 1.0 for n, v in values.items()}
    loss = torch.func.functional_call(model, scaled, tokens, **tied).loss
    gradients = torch.autograd.grad(loss, list(values.values()))

    def of(values):
        return torch.func.functional_call(model, values, tokens, **tied).loss

    again = torch.func.grad(of)(given)
    detached = of(dict(given))
    assert dict(model.named_parameters()).keys() == parameters.keys()
    for n, p in model.named_parameters():
        assert p is parameters[n] and p.requires_grad
    want = other(tokens).loss
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(detached, want)
    for n, got, wanted in zip(values, gradients, torch.autograd.grad(want, other.parameters())):
        torch.testing.assert_close(got, wanted)
        torch.testing.assert_close(again[n], wanted)


# In two processes ---------------------------------------------------------------------------------


def loss_of(model, world):
    result = model(torch.arange(2 * 9, device=world.device).view(2, 9) % V)
    return getattr(result, "loss", result)


def assert_loads(state, name):
    """Into a model on one process, which then has the values of the model as it was."""
    before, other = pair(name, seed=3)
    other.load_state_dict(state, strict=True)
    assert_same_state(for_the_layer(other), before.state_dict())


def own_state(name):
    """The values of the model as it was, under the names of the one with our head."""
    before, other = pair(name)
    other.load_state_dict(before.state_dict())
    return other.state_dict()


def check_fsdp(world, name, broadcast):
    """torch.distributed.checkpoint looks for the model's own names, and says so of others."""
    before, model = pair(name)
    model.to(world.device)
    tied = HEADS[name][0].get("tied", False)
    if tied:  # of a module with two names PyTorch distributes the values of the first alone
        model.load_state_dict(before.state_dict())
    else:
        fully_shard(model.lm_head, mesh=world.mesh)
    fully_shard(model, mesh=world.mesh)
    if not tied:
        full = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
        given = own_state(name) if world.rank == 0 or not broadcast else {}
        set_model_state_dict(model, given, options=full)
    assert isinstance(model.state_dict()["lm_head.output_embeddings.weight"], DTensor)
    sharded = get_model_state_dict(model)
    set_model_state_dict(model, sharded)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    loss_of(model, world).backward()
    optimizer.step()
    moments = get_optimizer_state_dict(model, optimizer)
    assert moments["state"].keys() == dict(model.named_parameters()).keys()
    set_optimizer_state_dict(model, optimizer, moments)
    state = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if world.rank == 0:
        assert_loads(state, name)


def check_names_of_the_layer_in_distributed_checkpoints(world):
    """Are not loaded there, and that is an error."""
    before, model = pair("of its own")
    fully_shard(model.to(world.device), mesh=world.mesh)
    with pytest.raises((RuntimeError, KeyError), match="lm_head"):
        set_model_state_dict(
            model, before.state_dict(), options=StateDictOptions(full_state_dict=True)
        )


def check_tensor_parallel(world):
    name = "of its own, with a bias"
    _, model = pair(name)
    model.to(world.device)
    parallelize_module(model, world.mesh, {"lm_head.output_embeddings": ColwiseParallel()})
    set_model_state_dict(
        model, own_state(name), options=StateDictOptions(full_state_dict=True)
    )
    state = model.state_dict()
    assert isinstance(state["lm_head.output_embeddings.weight"], DTensor)
    whole = {k: (v.full_tensor() if isinstance(v, DTensor) else v).cpu() for k, v in state.items()}
    assert_loads(whole, name)


def check_ddp(world, name):
    before, model = pair(name)
    wrapped = DistributedDataParallel(model.to(world.device))
    state = {f"module.{k}": v for k, v in before.state_dict().items()}
    wrapped.load_state_dict(state, strict=True)
    loss_of(wrapped, world).backward()
    assert_loads({k: v.cpu() for k, v in model.state_dict().items()}, name)


def check_fsdp1(world, name, use_orig_params):
    before, model = pair(name)
    names = dict(model.named_parameters()).keys()
    wrapped = FullyShardedDataParallel(
        model, use_orig_params=use_orig_params, device_id=world.device
    )
    wrapped.load_state_dict(before.state_dict())
    state = {k: v.clone() for k, v in wrapped.state_dict().items()}
    wrapped.load_state_dict(state)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.1)
    loss_of(wrapped, world).backward()
    optimizer.step()
    moments = FullyShardedDataParallel.optim_state_dict(wrapped, optimizer)
    assert moments["state"].keys() == names
    assert get_optimizer_state_dict(wrapped, optimizer)["state"].keys() == names
    assert_loads({k: v.cpu() for k, v in state.items()}, name)


WITH_BIAS = ("of its own, with a bias", "tied, with a bias", "with a bias more")
CHECKS = [
    *checks(check_fsdp, [n for n in HEADS if n != "a loss"], (False, True)),
    *checks(check_names_of_the_layer_in_distributed_checkpoints),
    *checks(check_tensor_parallel),
    *checks(check_ddp, WITH_BIAS),
    *checks(check_fsdp1, ("of its own", *WITH_BIAS), (False, True)),
]


BY_SIZE = {2: CHECKS}
test_processes = processes.on_cpu(BY_SIZE)

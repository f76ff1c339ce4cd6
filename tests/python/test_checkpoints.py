"""Checkpoints of models in which one of our heads took a layer's place: the names, shapes and order
of the state_dict are those of the model before, in both directions."""

import copy
import io

import processes
import pytest
import torch
from processes import checks
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

from cutloss import CausalLMHead, LinearCrossEntropy, LinearCrossEntropyLoss

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


def assert_same_state(got, want):
    assert list(got) == list(want)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=0)
    for state in (got, want):
        shared = state["embedding.weight"].data_ptr() == state["lm_head.weight"].data_ptr()
        assert shared == (want["embedding.weight"].data_ptr() == want["lm_head.weight"].data_ptr())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_there_and_back(name, assign):
    before, model = pair(name)
    assert list(model.state_dict()) == list(before.state_dict())
    model.load_state_dict(before.state_dict(), strict=True, assign=assign)
    assert_same_state(model.state_dict(), before.state_dict())
    assert torch.equal(model.lm_head.weight, before.lm_head.weight)
    if before.lm_head.bias is not None:
        assert torch.equal(model.lm_head.bias, before.lm_head.bias)
    again = stock(2, **HEADS[name][0])
    again.load_state_dict(model.state_dict(), strict=True)
    assert_same_state(again.state_dict(), before.state_dict())


@pytest.mark.parametrize("name", HEADS)
def test_a_copy_and_a_file(name):
    before, model = pair(name)
    model = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    model.load_state_dict(torch.load(file))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    whole = torch.load(file, weights_only=False)
    assert_same_state(whole.state_dict(), before.state_dict())
    whole.load_state_dict(model.state_dict())


@pytest.mark.parametrize("name", HEADS)
def test_a_head_alone(name):
    before, model = pair(name)
    assert list(model.lm_head.state_dict()) == list(before.lm_head.state_dict())
    model.lm_head.load_state_dict(before.lm_head.state_dict())
    assert torch.equal(model.lm_head.weight, before.lm_head.weight)


def formerly(state, bias):
    """As cutloss 0.1 saved it."""
    new = {"lm_head.weight": "lm_head.output_embeddings.weight", "lm_head.bias": f"lm_head.{bias}"}
    return {new.get(name, name): value for name, value in state.items()}


@pytest.mark.parametrize("name", HEADS)
def test_checkpoints_of_earlier_versions(name):
    before, model = pair(name)
    bias = "output_embeddings.bias" if model.lm_head.own_bias is None else "own_bias"
    model.load_state_dict(formerly(before.state_dict(), bias), strict=True)
    assert_same_state(model.state_dict(), before.state_dict())


@pytest.mark.parametrize("bias", [False, True])
def test_a_head_that_an_earlier_version_pickled_whole(bias):
    head = CausalLMHead(nn.Embedding(V, D), bias=bias)
    if bias:
        nn.init.normal_(head.bias)
    state = dict(head.__dict__)
    state["_parameters"] = {"own_bias": head.own_bias}
    state["_modules"] = {k: v for k, v in state["_modules"].items() if k != "_own"}
    for name in state:
        if "state_dict" in name:
            state[name] = type(state[name])()
    old = CausalLMHead.__new__(CausalLMHead)
    old.__setstate__(state)
    assert old.bias is head.bias and old.own_bias is head.bias
    assert list(old.state_dict()) == ["weight", "bias"][: 1 + bias]
    old.load_state_dict(head.state_dict())


@pytest.mark.parametrize("name", HEADS)
def test_files_of_safetensors(name, tmp_path):
    """Which has each tensor once, and asks the model for its other names."""
    before, model = pair(name)
    save_model(before, tmp_path / "file")
    load_model(model, tmp_path / "file")
    assert_same_state(model.state_dict(), before.state_dict())
    again = stock(2, **HEADS[name][0])
    save_model(model, tmp_path / "file")
    load_model(again, tmp_path / "file")
    assert_same_state(again.state_dict(), before.state_dict())


def test_a_shallow_copy():
    before, model = pair("of its own")
    head = copy.copy(model.lm_head)
    head.load_state_dict(before.lm_head.state_dict())
    assert torch.equal(model.lm_head.weight, before.lm_head.weight)


def test_what_is_said_of_names_is_said_of_those_in_the_checkpoint():
    before, model = pair("of its own, with a bias")
    state = before.state_dict()
    del state["lm_head.bias"]
    state["lm_head.scale"] = torch.ones(1)
    result = model.load_state_dict(state, strict=False)
    assert result.missing_keys == ["lm_head.bias"]
    assert result.unexpected_keys == ["lm_head.scale"]
    state = before.state_dict()
    state["lm_head.weight"] = torch.zeros(V + 1, D)
    with pytest.raises(RuntimeError, match="size mismatch for lm_head.weight: "):
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
    """Keeps its name, which no stock layer has: a checkpoint without it says so."""
    head = CausalLMHead(D, V, bias=True, hidden_size=12, weight=torch.rand(V))
    assert list(head.state_dict()) == ["weight", "bias", "loss.weight", "projection.weight"]
    copied = CausalLMHead(D, V, bias=True, hidden_size=12, weight=torch.rand(V))
    copied.load_state_dict(head.state_dict())
    for name, value in head.state_dict().items():
        assert torch.equal(copied.state_dict()[name], value)
    result = copied.load_state_dict(nn.Linear(D, V).state_dict(), strict=False)
    assert result.missing_keys == ["loss.weight", "projection.weight"]
    assert list(LinearCrossEntropy(weight=torch.ones(V)).state_dict()) == ["weight"]


def test_a_weight_that_is_computed():
    layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(D, V))
    names = list(layer.state_dict())
    head = CausalLMHead(D, V, bias=True)
    torch.nn.utils.parametrizations.weight_norm(head.output_embeddings)
    assert list(head.state_dict()) == names
    assert [n for n, _ in head.named_parameters()] == [n for n, _ in layer.named_parameters()]
    for name, parameter in head.named_parameters():
        assert head.get_parameter(name) is parameter
    head.load_state_dict(layer.state_dict())
    torch.testing.assert_close(head.weight, layer.weight)


@pytest.mark.parametrize("name", ["of its own", "with a bias more"])
def test_tying_by_assignment(name):
    """As one ties an nn.Linear; Transformers does so where a checkpoint is loaded."""
    _, model = pair(name)
    model.lm_head.weight = model.embedding.weight
    assert model.lm_head.weight is model.embedding.weight
    assert len([p for p in model.parameters() if p is model.embedding.weight]) == 1
    state = model.state_dict()
    assert state["lm_head.weight"].data_ptr() == state["embedding.weight"].data_ptr()
    if model.lm_head.bias is not None:
        model.lm_head.bias = nn.Parameter(torch.ones(V))
        assert model.lm_head.own_bias is model.lm_head.bias and model.lm_head.bias.sum() == V


@pytest.mark.parametrize("name", HEADS)
def test_names_of_parameters(name):
    """Are those of the state_dict, and lead to the parameters."""
    before, model = pair(name)
    named = dict(model.named_parameters(remove_duplicate=False))
    assert sorted(named) == sorted(before.state_dict())
    assert list(dict(model.named_parameters())) == list(dict(before.named_parameters()))
    for path, parameter in named.items():
        assert model.get_parameter(path) is parameter
    modules = list(model.modules())
    assert len(modules) == len({id(m) for m in modules})
    assert {model.lm_head, model.lm_head.output_embeddings} <= set(modules)
    assert next(model.lm_head.modules()) is model.lm_head


UNTIED = [n for n in HEADS if n != "a loss" and not n.startswith("tied")]


@pytest.mark.parametrize("name", UNTIED)  # PyTorch does not put back a module with two names
def test_functional_call(name):
    """Other values under these names, with gradients, and the model as it was afterwards."""
    before, model = pair(name)
    before, parameters = before.state_dict(), dict(model.named_parameters())
    tokens = torch.arange(18).view(2, 9) % V
    values = {n: before[n].clone().requires_grad_() for n in parameters}
    scaled = {n: v * 1.0 for n, v in values.items()}
    loss = torch.func.functional_call(model, scaled, tokens).loss
    gradients = torch.autograd.grad(loss, list(values.values()))

    def of(values):
        return torch.func.functional_call(model, values, tokens).loss

    again = torch.func.grad(of)({n: v.detach() for n, v in values.items()})
    detached = of({n: v.detach() for n, v in values.items()})
    assert dict(model.named_parameters()).keys() == parameters.keys()
    for n, p in model.named_parameters():
        assert p is parameters[n] and p.requires_grad
    model.load_state_dict(before)
    want = model(tokens).loss
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(detached, want)
    for n, got, wanted in zip(values, gradients, torch.autograd.grad(want, model.parameters())):
        torch.testing.assert_close(got, wanted)
        torch.testing.assert_close(again[n], wanted)


# In two processes ---------------------------------------------------------------------------------


def loss_of(model, world):
    result = model(torch.arange(2 * 9, device=world.device).view(2, 9) % V)
    return getattr(result, "loss", result)


def assert_loads(state, name):
    """Into the model as it was, whose values it has."""
    before, other = pair(name)
    again = stock(3, **HEADS[name][0])
    again.load_state_dict(state, strict=True)
    assert_same_state(again.state_dict(), before.state_dict())
    other.load_state_dict(state, strict=True)


def check_fsdp(world, name, broadcast):
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
        given = before.state_dict() if world.rank == 0 or not broadcast else {}
        set_model_state_dict(model, given, options=full)
    assert list(model.state_dict()) == list(before.state_dict())
    assert isinstance(model.state_dict()["lm_head.weight"], DTensor)
    sharded = get_model_state_dict(model)
    set_model_state_dict(model, sharded)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    loss_of(model, world).backward()
    optimizer.step()
    moments = get_optimizer_state_dict(model, optimizer)
    set_optimizer_state_dict(model, optimizer, moments)
    state = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if world.rank == 0:
        assert list(state) == list(before.state_dict())
        assert_loads(state, name)


def check_tensor_parallel(world):
    name = "of its own, with a bias"
    before, model = pair(name)
    model.to(world.device)
    parallelize_module(model, world.mesh, {"lm_head.output_embeddings": ColwiseParallel()})
    set_model_state_dict(
        model, before.state_dict(), options=StateDictOptions(full_state_dict=True)
    )
    state = model.state_dict()
    assert isinstance(state["lm_head.weight"], DTensor)
    whole = {k: (v.full_tensor() if isinstance(v, DTensor) else v).cpu() for k, v in state.items()}
    assert_loads(whole, name)


def check_ddp(world, name):
    before, model = pair(name)
    wrapped = DistributedDataParallel(model.to(world.device))
    state = {f"module.{k}": v for k, v in before.state_dict().items()}
    wrapped.load_state_dict(state, strict=True)
    loss_of(wrapped, world).backward()
    assert list(wrapped.state_dict()) == list(state)
    assert_loads({k: v.cpu() for k, v in model.state_dict().items()}, name)


def check_fsdp1(world, name, use_orig_params):
    before, model = pair(name)
    wrapped = FullyShardedDataParallel(
        model, use_orig_params=use_orig_params, device_id=world.device
    )
    wrapped.load_state_dict(before.state_dict())
    state = wrapped.state_dict()
    assert list(state) == list(before.state_dict())
    wrapped.load_state_dict(state)
    loss_of(wrapped, world).backward()
    assert_loads({k: v.cpu() for k, v in state.items()}, name)


WITH_BIAS = ("of its own, with a bias", "tied, with a bias", "with a bias more")
CHECKS = [
    *checks(check_fsdp, [n for n in HEADS if n != "a loss"], (False, True)),
    *checks(check_tensor_parallel),
    *checks(check_ddp, WITH_BIAS),
    *checks(check_fsdp1, WITH_BIAS, (False, True)),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return processes.run(CHECKS, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_two_processes(results, check):
    processes.passed(results, check)

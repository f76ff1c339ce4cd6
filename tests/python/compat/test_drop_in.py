"""Changing the import is the whole migration from cut_cross_entropy."""

import dataclasses
import enum
import importlib
import inspect

import pytest
import torch
import torch.distributed as dist
from helpers import problems

import cutloss
from cutloss import LinearCrossEntropy, LinearCrossEntropyImpl, linear_cross_entropy

pytestmark = pytest.mark.usefixtures("device")

# Parameters and defaults of cut_cross_entropy 25.6, in order.
THEIR_FUNCTION = [
    ("e", inspect.Parameter.empty),
    ("c", inspect.Parameter.empty),
    ("targets", inspect.Parameter.empty),
    ("bias", None),
    ("ignore_index", -100),
    ("softcap", None),
    ("reduction", "mean"),
    ("shift", 0),
    ("return_lse", False),
    ("filter_eps", "auto"),
    ("accum_e_fp32", False),
    ("accum_c_fp32", False),
    ("filter_e_grad", True),
    ("filter_c_grad", True),
    ("impl", LinearCrossEntropyImpl.CCE),
    ("vocab_parallel_options", None),
]
THEIR_MODULE = [
    ("ignore_index", -100),
    ("softcap", None),
    ("reduction", "mean"),
    ("shift", 0),
    ("filter_eps", "auto"),
    ("accum_e_fp32", False),
    ("accum_c_fp32", False),
    ("filter_e_grad", True),
    ("filter_c_grad", True),
    ("impl", LinearCrossEntropyImpl.CCE),
    ("return_lse", False),
]
THEIR_NAMES = {
    "LinearCrossEntropy",
    "LinearCrossEntropyImpl",
    "VocabParallelOptions",
    "linear_cross_entropy",
}
THEIR_ENUM = [
    "CCE",
    "TORCH_COMPILE",
    "CCE_KAHAN_FULL_C",
    "CCE_KAHAN_FULL_E",
    "CCE_EXACT",
    "CCE_KAHAN_FULL_C_FULL_E",
    "CCE_KAHAN_FULL",
]

# Every name of impl, and whether it stores the logits in plain PyTorch.
IMPLEMENTATIONS = {
    "cce": False,
    "torch_compile": False,
    "cce_exact": False,
    "cce_kahan": False,
    "cce_kahan_full": False,
    "cce_kahan_full_c": False,
    "cce_kahan_full_e": False,
    "cce_kahan_full_c_full_e": False,
    "auto": False,
    "exact": False,
    "torch": True,
}


def signature(f):
    return [(p.name, p.default) for p in inspect.signature(f).parameters.values()]


def test_signatures_begin_as_theirs():
    assert signature(linear_cross_entropy)[: len(THEIR_FUNCTION)] == THEIR_FUNCTION
    own = list(inspect.signature(linear_cross_entropy).parameters.values())[len(THEIR_FUNCTION) :]
    assert own and all(p.kind == inspect.Parameter.KEYWORD_ONLY for p in own)
    assert signature(LinearCrossEntropy)[: len(THEIR_MODULE)] == THEIR_MODULE
    forward = list(inspect.signature(LinearCrossEntropy.forward).parameters)
    assert forward[:5] == ["self", "e", "c", "targets", "bias"]


def test_module_has_every_option_of_the_function():
    given_with_each_call = {"e", "c", "targets", "bias", "token_weight", "vocab_parallel_options"}
    given_with_each_call.add("num_valid")
    of_function = set(inspect.signature(linear_cross_entropy).parameters) - given_with_each_call
    assert of_function == set(inspect.signature(LinearCrossEntropy).parameters)


def test_names():
    assert THEIR_NAMES <= set(cutloss.__all__)
    assert [m.name for m in LinearCrossEntropyImpl][: len(THEIR_ENUM)] == THEIR_ENUM


def test_the_table_of_implementations_is_complete():
    from helpers.inside import IS_PLAIN

    assert IS_PLAIN == IMPLEMENTATIONS
    assert {m.name.lower() for m in LinearCrossEntropyImpl} == set(IMPLEMENTATIONS)


@pytest.mark.parametrize("as_enum", [False, True])
@pytest.mark.parametrize("impl, plain", IMPLEMENTATIONS.items())
def test_implementations(impl, plain, as_enum):
    p = problems.make((3, 8), dtype=problems.widest(), shift=1, softcap=5.0)
    exact = linear_cross_entropy(p.e, p.c, p.targets, **p.options)
    name = LinearCrossEntropyImpl[impl.upper()] if as_enum else impl
    loss = linear_cross_entropy(p.e, p.c, p.targets, impl=name, **p.options)
    torch.testing.assert_close(loss, exact)
    assert plain or torch.equal(loss, exact)
    grads, expected = (torch.autograd.grad(t, p.parameters) for t in (loss, exact))
    for a, b in zip(grads, expected):
        torch.testing.assert_close(a, b)
        assert plain or torch.equal(a, b)


def test_their_enum_is_understood():
    theirs = enum.IntEnum("LinearCrossEntropyImpl", THEIR_ENUM)
    p = problems.make()
    for member in theirs:
        assert linear_cross_entropy(p.e, p.c, p.targets, impl=member).isfinite()


@pytest.mark.parametrize(
    "options",
    [
        {"filter_eps": None},
        {"filter_eps": 1e-3},
        {"filter_eps": "auto"},
        {"accum_e_fp32": True, "accum_c_fp32": True},
        {"filter_e_grad": False, "filter_c_grad": False},
    ],
    ids=str,
)
def test_options_that_need_nothing(options):
    p = problems.make()
    plain = linear_cross_entropy(p.e, p.c, p.targets)
    loss = linear_cross_entropy(p.e, p.c, p.targets, **options)
    assert torch.equal(loss, plain)
    grads, expected = (torch.autograd.grad(t, p.parameters) for t in (loss, plain))
    for a, b in zip(grads, expected):
        assert torch.equal(a, b)


def test_positional_call():
    p = problems.make((3, 8), bias=True)
    loss, lse = linear_cross_entropy(
        p.e, p.c, p.targets, p.bias, -100, 5.0, "none", True, True, None, True, True, False, False,
        "cce_exact", None,
    )  # fmt: skip
    assert loss.shape == lse.shape == (3, 7)


def test_module():
    p = problems.make((3, 8), bias=True)
    module = LinearCrossEntropy(-100, 5.0, "sum", True, return_lse=True, z_loss=1e-3)
    expected = linear_cross_entropy(
        p.e, p.c, p.targets, p.bias, softcap=5.0, reduction="sum", shift=1, return_lse=True,
        z_loss=1e-3,
    )  # fmt: skip
    for a, b in zip(module(p.e, p.c, p.targets, p.bias), expected):
        assert torch.equal(a, b)
    assert "sum" in repr(module) and not list(module.parameters())


def test_module_keeps_class_weights_with_it():
    p = problems.make()
    weight = torch.rand(101, device=problems.device)
    module = LinearCrossEntropy(weight=weight)
    assert set(module.state_dict()) == {"weight"}
    expected = linear_cross_entropy(p.e, p.c, p.targets, weight=weight)
    assert torch.equal(module(p.e, p.c, p.targets), expected)
    token_weight, temperature = torch.rand(2, 24, device=problems.device) + 0.5
    assert torch.equal(
        module(p.e, p.c, p.targets, token_weight=token_weight, temperature=temperature),
        linear_cross_entropy(
            p.e, p.c, p.targets, weight=weight, token_weight=token_weight, temperature=temperature
        ),
    )


@dataclasses.dataclass
class LookAlike:
    """The fields of theirs, in order."""

    start: int
    stop: int
    group: object = None
    reduce_e_grad: bool = True


def their_options():
    try:
        return importlib.import_module("cut_cross_entropy").VocabParallelOptions
    except (ImportError, AttributeError):
        return LookAlike


@pytest.fixture
def group_of_one(tmp_path):
    dist.init_process_group(
        "nccl" if problems.device == "cuda" else "gloo",
        init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1,
    )  # fmt: skip
    yield
    dist.destroy_process_group()


def test_their_options_of_a_shard_are_taken(group_of_one):
    """By their class and by ours, whose fields come in the same order; in more processes they are
    tested by test_sharded."""
    ours = [f.name for f in dataclasses.fields(cutloss.VocabParallelOptions) if not f.kw_only]
    assert ours == [f.name for f in dataclasses.fields(LookAlike)]
    p = problems.make()
    V = p.c.shape[0]
    expected = linear_cross_entropy(p.e, p.c, p.targets)
    grads = torch.autograd.grad(expected, (p.e, p.c))
    theirs = their_options()
    for own in (theirs(0, V), theirs(0, V, None, True), cutloss.VocabParallelOptions(0, V),
                cutloss.VocabParallelOptions.from_vocab(V)):  # fmt: skip
        loss = linear_cross_entropy(p.e, p.c, p.targets, vocab_parallel_options=own)
        torch.testing.assert_close(loss, expected)
        for got, want in zip(torch.autograd.grad(loss, (p.e, p.c)), grads, strict=True):
            torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match="stop - start rows"):
        linear_cross_entropy(p.e, p.c, p.targets, vocab_parallel_options=theirs(0, V - 1))


def test_what_has_not_their_fields_is_no_shard():
    p = problems.make()
    with pytest.raises(TypeError, match="without start, stop, group, reduce_e_grad"):
        linear_cross_entropy(p.e, p.c, p.targets, vocab_parallel_options=object())
    with pytest.raises(RuntimeError, match="init_process_group first"):
        cutloss.VocabParallelOptions.from_vocab(100)

"""PyTorch's private names: each that cutloss takes is there and does what it is taken for, and all
of them are in one file."""

import ast
import pathlib
import re

import pytest
import torch
from helpers.inside import private
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import cutloss
from cutloss import linear_cross_entropy

PACKAGE = pathlib.Path(cutloss.__file__).parent
PRIVATE = PACKAGE / "_torch" / "private.py"
# Not PyTorch's: where accelerate keeps a forward, where Transformers says which attention it takes,
# methods of named tuples.
OF_OTHERS = {"_old_forward", "_attn_implementation", "_replace", "_make", "_asdict", "_fields"}


def is_private(name):
    return re.match(r"_[^_]", name) is not None


def trees():
    return {path: ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def own_names(nodes):
    """What a file defines under a private name: modules, functions, classes, variables, arguments."""
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                yield node.attr


def foreign_names(nodes, own):
    """Private names that it takes from elsewhere, with their lines."""
    for node in nodes:
        found = []
        if isinstance(node, ast.Attribute):
            found = [node.attr]
        elif isinstance(node, ast.Import):
            found = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found = [*node.module.split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("getattr", "hasattr", "setattr", "delattr"):
                found = [a.value for a in node.args[1:2] if isinstance(a, ast.Constant)]
        for name in found:
            if is_private(name) and name not in own:
                yield node.lineno, name


def test_they_are_in_one_file():
    files = trees()
    own = {path.stem for path in files} | {path.parent.name for path in files} | OF_OTHERS
    for path, tree in files.items():
        if path != PRIVATE:
            own |= {name for name in own_names(ast.walk(tree)) if is_private(name)}
    found = {
        str(path.relative_to(PACKAGE)): sorted(set(foreign_names(ast.walk(tree), own)))
        for path, tree in files.items()
    }
    here = found.pop("_torch/private.py")
    assert {file: names for file, names in found.items() if names} == {}
    names = {name for _, name in here}
    assert {"_C", "_dynamo_marked_constant", "_orig_mod", "_version", "_base"} <= names


def test_each_says_where_it_was_seen():
    own = set(own_names(ast.walk(ast.parse(PRIVATE.read_text()))))
    lines = PRIVATE.read_text().splitlines()
    for line, name in foreign_names(ast.walk(ast.parse(PRIVATE.read_text())), own):
        assert re.search(r"# .*\b2\.\d+", lines[line - 1]), (line, name)
    of_functorch = [line for line in lines if "_functorch." in line]
    assert len(of_functorch) > 5
    for line in of_functorch:
        assert re.search(r"# .*\b2\.\d+", line), line


# What each is taken for ---------------------------------------------------------------------------


def test_untraced():
    @private.untraced
    def is_traced(x):
        return x * (2 if torch.compiler.is_compiling() else 3)

    compiled = torch.compile(lambda x: is_traced(x) + 1, backend="eager")
    assert compiled(torch.ones(())) == 4
    with pytest.raises(Exception, match="disable|skip"):
        torch.compile(lambda x: is_traced(x) + 1, backend="eager", fullgraph=True)(torch.ones(()))


def test_while_traced():
    called = []

    @private.while_traced
    def number():
        called.append(torch.compiler.is_compiling())
        return 5.0

    compiled = torch.compile(lambda x: x * number(), backend="eager", fullgraph=True)
    assert compiled(torch.ones(())) == compiled(torch.ones(())) == 5
    assert len(called) == 1


def test_is_compiled():
    layer = nn.Linear(2, 2)
    assert private.is_compiled(torch.compile(layer)) and not private.is_compiled(layer)


def test_below_autograd():
    x = torch.ones(2, requires_grad=True)
    with private.below_autograd():
        assert not (x * 2).requires_grad
    assert (x * 2).requires_grad


def test_transforms():
    seen = {}

    def look(x):
        seen["inside"] = private.is_transformed(), private.is_in_vmap(), private.is_ordinary(x)
        return x.sum()

    torch.vmap(look)(torch.ones(2, 3))
    assert seen["inside"] == (True, True, False)
    torch.func.grad(look)(torch.ones(3))
    assert seen["inside"] == (True, False, False)
    look(torch.ones(3))
    assert seen["inside"] == (False, False, True)
    assert private.is_ordinary(nn.Parameter(torch.ones(1)))


def test_requires_grad_inside_vmap():
    seen = []

    def look(x):
        seen.append((x.requires_grad, private.requires_grad(x)))
        return x.sum()

    x = torch.ones(2, 3, requires_grad=True)
    torch.vmap(look)(x)
    torch.vmap(torch.vmap(look))(x)
    torch.vmap(look)(x.detach())
    assert seen == [(False, True), (False, True), (False, False)]


def test_forward_mode():
    assert not private.is_in_forward_mode()
    with forward_ad.dual_level():
        x = torch.ones(2)
        assert private.is_in_forward_mode() and not private.have_tangent(x, None)
        assert private.have_tangent(None, x, forward_ad.make_dual(x, torch.ones(2)))
    assert not private.is_in_forward_mode()


def test_hooks_of_saved_tensors():
    seen = []

    def look(x):
        seen.append(private.has_hooks_of_saved_tensors())
        return x * 2

    x = torch.ones(2, requires_grad=True)
    look(x)
    checkpoint(look, x, use_reentrant=False)
    assert seen == [False, True]


def test_versions_and_views():
    x = torch.zeros(3)
    before = private.version_of(x)
    x.add_(1)
    assert private.version_of(x) > before
    assert private.base_of(x) is None and private.base_of(x[1:]) is x


def test_counters_of_operations():
    assert private.flop_counters() == []
    with FlopCounterMode(display=False) as counter:
        assert private.flop_counters() == [counter]
    assert private.flop_counters() == []


def test_what_a_module_has():
    bn = nn.BatchNorm1d(2)
    assert set(private.parameters_of(bn)) == {"weight", "bias"}
    assert private.buffers_of(bn)["running_mean"] is bn.running_mean
    other = torch.ones(2)
    private.buffers_of(bn)["running_mean"] = other
    assert bn.running_mean is other

    def hook(*_):
        return None

    bn.register_forward_pre_hook(hook)
    assert private.forward_pre_hooks(bn) == [hook] and private.forward_hooks(bn) == []
    bn.register_forward_hook(hook)
    assert private.forward_hooks(bn) == [hook] and private.backward_hooks(bn) == []
    bn.register_full_backward_hook(hook)
    bn.register_full_backward_pre_hook(hook)
    assert private.backward_hooks(bn) == [hook, hook]
    assert not private.has_hooks_before_load(bn)
    bn.register_load_state_dict_pre_hook(hook)
    assert private.has_hooks_before_load(bn)
    assert not private.has_forward_hooks_of_all_modules()
    handle = nn.modules.module.register_module_forward_hook(hook)
    assert private.has_forward_hooks_of_all_modules()
    handle.remove()


# Batches ------------------------------------------------------------------------------------------


def upstream_of(way, whole):
    """What a backward is given for a batch of upstream gradients, and what it makes of it."""
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            batch = private.batch_of((None, g, torch.ones(())))
            seen.append(batch)
            return None if batch is None else batch.wrapped(batch.wholes[1] * 3)

    x = torch.ones(whole.shape[1:], requires_grad=True)
    y = Look.apply(x)
    if way == "is_grads_batched":
        (g,) = torch.autograd.grad(y, x, whole, is_grads_batched=True)
    elif way == "vmap":
        g = torch.vmap(lambda u: torch.autograd.grad(y, x, u)[0])(whole)
    else:
        last = whole.movedim(0, -1)
        g = torch.vmap(lambda u: torch.autograd.grad(y, x, u)[0], in_dims=-1)(last)
    return g, seen


@pytest.mark.parametrize("way", ["is_grads_batched", "vmap", "vmap, last dimension"])
@pytest.mark.parametrize("shape", [(4,), (4, 2), (4, 2, 3)], ids=str)
def test_a_batch_of_upstream_gradients(way, shape):
    whole = torch.randn(shape)
    g, (batch,) = upstream_of(way, whole)
    assert torch.equal(g, whole * 3)
    assert batch.is_legacy == (way == "is_grads_batched")
    for (none, entry, one), expected in zip(batch.entries(), whole, strict=True):
        assert none is None and one == 1
        assert torch.equal(entry, expected)
        assert private.is_ordinary(entry)


def test_no_batch():
    assert private.batch_of((None, torch.ones(2))) is None
    assert private.batch_of(()) is None


def test_batched_tensors_are_not_ordinary():
    ordinary = []
    e = torch.ones(2, 3, requires_grad=True)
    loss = linear_cross_entropy(e, torch.ones(5, 3), torch.ones(2).long())
    y = loss * 1
    y.register_hook(lambda g: ordinary.append(private.is_ordinary(g)))
    torch.autograd.grad(y, loss, torch.ones(4), is_grads_batched=True)
    assert ordinary == [False]

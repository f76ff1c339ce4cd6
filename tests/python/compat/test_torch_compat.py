"""torch's own linear_cross_entropy is the judge: same call, same loss, same gradients."""

import dataclasses
import importlib.util
import inspect

import pytest
import torch
import torch.nn.functional as F
from helpers import problems
from helpers.problems import BF16, F16, F32, F64
from helpers.tolerance import assert_close

import cutloss
from cutloss import torch_compat
from cutloss.torch_compat import LinearCrossEntropyLoss, LinearCrossEntropyOptions

pytestmark = pytest.mark.usefixtures("device")

HAS_TORCHS = hasattr(F, "linear_cross_entropy")
needs_torchs = pytest.mark.skipif(
    not HAS_TORCHS, reason=f"torch {torch.__version__} has no linear_cross_entropy to compare with"
)

V, D = 53, 12

# batch of the input, positions (d_1, ..., d_K)
SHAPES = [((), ()), ((1,), ()), ((37,), ()), ((9,), (3,)), ((5,), (2, 3)), ((1,), (1,))]
OPTIONS = {
    "default": {},
    "sum": dict(reduction="sum"),
    "none": dict(reduction="none"),
    "smoothing": dict(label_smoothing=0.1),
    "smoothing_sum": dict(label_smoothing=0.3, reduction="sum"),
    "smoothing_none": dict(label_smoothing=1.0, reduction="none"),
    "ignore_index": dict(ignore_index=3),
    "weight": dict(weight=True),
    "weight_none": dict(weight=True, reduction="none"),
    "everything": dict(weight=True, label_smoothing=0.2, ignore_index=7),
}


def make(batch=(37,), positions=(), dtype=F32, bias=False, weight=False, seed=0, **options):
    """A call's tensors, in torch's names, some targets ignored; and its options."""
    if not problems.has_engine(dtype):
        pytest.skip(f"no engine takes {dtype} on {problems.device}")
    g = torch.Generator().manual_seed(seed)

    def parameter(*shape):
        t = torch.randn(*shape, generator=g, dtype=F64)
        return t.to(problems.device, dtype).requires_grad_()

    target = torch.randint(0, V, (*batch, *positions), generator=g)
    ignored = torch.rand(target.shape, generator=g) < 0.2
    if ignored.numel() > 1:
        target[ignored] = options.get("ignore_index", -100)
    tensors = dict(
        input=parameter(*batch, D),
        linear_weight=parameter(V, *positions, D),
        target=target.to(problems.device),
    )
    if bias:
        tensors["linear_bias"] = parameter(V, *positions)
    if weight:
        options["weight"] = (0.1 + torch.rand(V, generator=g)).to(problems.device, dtype)
    return tensors, options


def to(dtype, tensors, options):
    def moved(t):
        if not isinstance(t, torch.Tensor) or not t.is_floating_point():
            return t
        return t.detach().to(dtype).requires_grad_(t.requires_grad)

    return tuple({k: moved(v) for k, v in d.items()} for d in (tensors, options))


def results(function, tensors, options):
    """The loss, and the gradients of a sum with different weights."""
    loss = function(**tensors, **options)
    weights = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype, device=loss.device)
    parameters = [t for t in tensors.values() if t.requires_grad]
    return [loss, *torch.autograd.grad((loss * weights.reshape(loss.shape)).sum(), parameters)]


def assert_as_torchs(tensors, options, lenience=1):
    """Compared with torch's function in fp64, and with its errors in the same dtype."""
    got = results(torch_compat.linear_cross_entropy, tensors, options)
    exact, how = to(F64, tensors, options)
    how.pop("options", None)
    truth = results(F.linear_cross_entropy, exact, how)
    plain = results(F.linear_cross_entropy, tensors, options)
    for name, a, b, c in zip(("loss", *tensors), got, truth, plain):
        assert_close(a, b, c, name, lenience)


@needs_torchs
def test_signature_is_torchs():
    def described(f):
        return [(p.name, p.default, p.kind) for p in inspect.signature(f).parameters.values()]

    assert described(torch_compat.linear_cross_entropy) == described(F.linear_cross_entropy)
    assert described(LinearCrossEntropyLoss) == described(torch.nn.LinearCrossEntropyLoss)
    assert LinearCrossEntropyOptions is torch.nn.LinearCrossEntropyOptions


@needs_torchs
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch, positions", SHAPES, ids=str)
def test_as_torchs(batch, positions, bias, name):
    made = make(batch, positions, dtype=problems.widest(), bias=bias, **OPTIONS[name])
    assert_as_torchs(*made, lenience=10)


@needs_torchs
@pytest.mark.parametrize("positions", [(), (2,)], ids=str)
@pytest.mark.parametrize("name", ["default", "none", "everything"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_dtypes(dtype, name, positions):
    assert_as_torchs(*make((300,), positions, dtype=dtype, bias=True, **OPTIONS[name]))


@needs_torchs
def test_many_positions_add_up_in_fp32():
    """The gradient of input is a sum over all of them, rounded to bf16 once."""
    tensors, options = make((30,), (64,), dtype=BF16, reduction="sum")
    assert_as_torchs(tensors, options)


@needs_torchs
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(batch_chunk_size=7),
        dict(chunking_method="aspect_ratio:2"),
        dict(acc_policy="accurate", allow_retain_graph=True),
        dict(acc_dtype=F32),
    ],
    ids=str,
)
def test_options_as_torchs(fields, reduction):
    tensors, options = make((61,), bias=True, weight=True, reduction=reduction)
    options["options"] = LinearCrossEntropyOptions(**fields)
    assert_as_torchs(tensors, options, lenience=2)


@needs_torchs
def test_no_rows():
    tensors, _ = make((0,))
    for reduction in ("mean", "sum", "none"):
        got = torch_compat.linear_cross_entropy(**tensors, reduction=reduction)
        want = F.linear_cross_entropy(**tensors, reduction=reduction)
        torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("positions", [(), (3,)], ids=str)
def test_all_ignored(positions):
    tensors, _ = make((6,), positions)
    tensors["target"] = torch.full_like(tensors["target"], -100)
    loss, de, dc = results(torch_compat.linear_cross_entropy, tensors, {})
    assert loss.isnan() and not de.any() and not dc.any()


@needs_torchs
def test_targets_in_uint8():
    tensors, _ = make((20,))
    tensors["target"] = tensors["target"].clamp(min=0).to(torch.uint8)
    assert_as_torchs(tensors, {}, lenience=2)


@needs_torchs
def test_autocast():
    tensors, _ = make((300,), bias=True)
    with torch.autocast(problems.device, BF16):
        got = torch_compat.linear_cross_entropy(**tensors)
        plain = F.linear_cross_entropy(**tensors)
    assert got.dtype == plain.dtype == F32
    assert_close(got, F.linear_cross_entropy(**to(F64, tensors, {})[0]), plain, "loss", 2)


def test_without_options_of_torch():
    """Positions are one problem each, whatever torch has."""
    tensors, _ = make((9,), (3,), dtype=F32, bias=True)
    z = torch.einsum("nd,vkd->nvk", tensors["input"], tensors["linear_weight"])
    z = z + tensors["linear_bias"]
    want = F.cross_entropy(z, tensors["target"])
    torch.testing.assert_close(torch_compat.linear_cross_entropy(**tensors), want)


@pytest.mark.parametrize("positions", [(), (3,)], ids=str)
def test_one_graph(positions):
    torch._dynamo.reset()
    tensors, _ = make((9,), positions, bias=True)
    options = {"options": LinearCrossEntropyOptions(batch_chunk_size=4)}
    compiled = torch.compile(torch_compat.linear_cross_entropy, fullgraph=True)
    got = results(compiled, tensors, options)
    want = results(torch_compat.linear_cross_entropy, tensors, options)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_gradients_twice():
    tensors, _ = make()
    loss = torch_compat.linear_cross_entropy(**tensors)
    first = torch.autograd.grad(loss, tensors["input"], retain_graph=True)[0].clone()
    assert torch.equal(first, torch.autograd.grad(loss, tensors["input"])[0])


@needs_torchs
@pytest.mark.parametrize("positions", [(), (2, 3)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_module(bias, positions):
    """The same state_dict, the same loss."""
    how = dict(out_features=positions, bias=bias, weight=torch.rand(V), label_smoothing=0.1)
    theirs = torch.nn.LinearCrossEntropyLoss(D, V, **how).to(problems.device)
    ours = LinearCrossEntropyLoss(D, V, **how).to(problems.device)
    ours.load_state_dict(theirs.state_dict())
    tensors, _ = make((9,), positions)
    got, want = (m(tensors["input"], tensors["target"]) for m in (ours, theirs))
    torch.testing.assert_close(got, want)
    got, want = (torch.autograd.grad(t, m.linear.weight) for t, m in ((got, ours), (want, theirs)))
    torch.testing.assert_close(got, want)
    assert "num_classes=53" in repr(ours)


def test_options_where_torch_has_none(monkeypatch):
    """Before 2.13: a class of ours with the same fields."""
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    name = "cutloss._without_torchs"
    spec = importlib.util.spec_from_file_location(name, torch_compat.__file__)
    old = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(old)
    assert old.LinearCrossEntropyOptions.__module__ == name

    def fields(options):
        return [(f.name, f.default) for f in dataclasses.fields(options)]

    assert fields(old.LinearCrossEntropyOptions) == fields(LinearCrossEntropyOptions)
    tensors, _ = make()
    options = old.LinearCrossEntropyOptions(batch_chunk_size=3)
    got = old.linear_cross_entropy(**tensors, options=options)
    assert torch.equal(got, torch_compat.linear_cross_entropy(**tensors))


def test_attribute_of_the_package():
    assert cutloss.torch_compat is torch_compat
    with pytest.raises(AttributeError, match="no attribute 'torch_compatt'"):
        cutloss.torch_compatt


def changed(**changes):
    return lambda t: {**t, **{k: f(t) for k, f in changes.items()}}


REFUSALS = {
    "probabilities": (
        changed(target=lambda t: torch.softmax(torch.randn(37, V), -1)),
        NotImplementedError,
        r"class probabilities, of the logits' shape \(37, 53\).*torch.nn.functional",
    ),
    "floats": (
        changed(target=lambda t: torch.rand(37)),
        NotImplementedError,
        "class probabilities, torch.float32",
    ),
    "target_shape": (
        changed(target=lambda t: t["target"][:, None]),
        ValueError,
        r"target must be \(37,\).*got \(37, 1\)",
    ),
    "target_dtype": (changed(target=lambda t: t["target"].short()), TypeError, "got torch.int16"),
    "three_dimensions": (
        changed(input=lambda t: t["input"][None]),
        ValueError,
        r"input must be \(D\) or \(N, D\), got \(1, 37, 12\): flatten",
    ),
    "hidden_size": (
        changed(linear_weight=lambda t: t["linear_weight"][:, :-1]),
        ValueError,
        r"linear_weight \(53, 11\) and input \(37, 12\)",
    ),
    "linear_bias": (
        changed(linear_bias=lambda t: torch.zeros(7)),
        ValueError,
        r"linear_bias must be \(53,\).*got \(7,\)",
    ),
    "unbatched_positions": (
        changed(
            input=lambda t: t["input"][0],
            linear_weight=lambda t: t["linear_weight"][:, None],
            target=lambda t: t["target"][:1],
        ),
        ValueError,
        r"takes an input \(N, D\), got \(12,\): use input\[None\]",
    ),
    "no_positions": (
        changed(
            linear_weight=lambda t: t["linear_weight"][:, None][:, :0],
            target=lambda t: t["target"][:, None][:, :0],
        ),
        ValueError,
        r"no positions: \(53, 0, 12\)",
    ),
    "not_a_tensor": (changed(target=lambda t: [1, 2]), TypeError, "target must be a torch.Tensor"),
    "reduction": (changed(reduction=lambda t: "batchmean"), ValueError, "'mean', 'sum', 'none'"),
    "label_smoothing": (changed(label_smoothing=lambda t: 2.0), ValueError, r"\[0, 1\], got 2.0"),
    "weight_gradient": (
        changed(weight=lambda t: torch.ones(V, requires_grad=True)),
        ValueError,
        "weight.detach",
    ),
    "options": (changed(options=lambda t: {"acc_dtype": F32}), TypeError, "got dict"),
    "acc_dtype": (
        changed(options=lambda t: LinearCrossEntropyOptions(acc_dtype=F64)),
        NotImplementedError,
        "acc_dtype is torch.float64 and input torch.float32: cutloss accumulates in float32",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    change, error, message = REFUSALS[name]
    tensors, _ = make()
    tensors = {
        k: t.to(problems.device) if isinstance(t, torch.Tensor) else t
        for k, t in change(tensors).items()
    }
    with pytest.raises(error, match=message):
        torch_compat.linear_cross_entropy(**tensors)


def test_module_refuses_a_weight_of_another_size():
    with pytest.raises(ValueError, match=r"weight must be \(num_classes\) = \(53,\), got \(5,\)"):
        LinearCrossEntropyLoss(D, V, weight=torch.ones(5))

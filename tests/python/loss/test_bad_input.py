"""Bad input: an error that says what is wrong, with the values; nothing written, process alive."""

import os
import re
import subprocess
import sys
import textwrap
import types

import pytest
import torch
from helpers import problems, reference
from helpers.inside import Options, checks, decide, library
from helpers.problems import BF16, F32, F64

from cutloss import linear_cross_entropy

N, V, D = 24, 101, 16


def tensors(device="cpu"):
    g = torch.Generator().manual_seed(0)
    return {
        "e": torch.randn(N, D, generator=g).to(device),
        "c": torch.randn(V, D, generator=g).to(device),
        "targets": torch.randint(0, V, (N,), generator=g).to(device),
    }


def target(value, at=7, dtype=torch.int64):
    def change(t):
        t = t.to(dtype)
        t[at] = value
        return t

    return change


def cast(dtype):
    return lambda t: t.to(dtype)


# What is changed in a good call (a value, or a function of the good one), the error, and what
# its message says.
TABLE = {
    # shapes
    "batch": (
        {"targets": torch.zeros(23, dtype=torch.int64)},
        ValueError,
        r"got e \(24, 16\) and targets \(23,\)",
    ),
    "batch_dimensions": (
        {"targets": torch.zeros(2, 12, dtype=torch.int64)},
        ValueError,
        r"got e \(24, 16\) and targets \(2, 12\)",
    ),
    "hidden_size": ({"c": torch.zeros(V, 15)}, ValueError, r"got c \(101, 15\) and e \(24, 16\)"),
    "transposed_c": ({"c": torch.zeros(D, V)}, ValueError, r"\(16, 101\).*; transpose c"),
    "c_dimensions": ({"c": torch.zeros(V)}, ValueError, r"c must be \(V, D\).*got c \(101,\)"),
    "bias": ({"bias": torch.zeros(V + 1)}, ValueError, r"bias \(102,\) and c \(101, 16\)"),
    "bias_dimensions": ({"bias": torch.zeros(1, V)}, ValueError, r"bias \(1, 101\)"),
    "weight": ({"weight": torch.ones(5)}, ValueError, r"weight \(5,\) and c \(101, 16\)"),
    "token_weight": (
        {"token_weight": torch.ones(23)},
        ValueError,
        r"token_weight \(23,\) and targets \(24,\)",
    ),
    "temperature_shape": (
        {"temperature": torch.ones(23)},
        ValueError,
        r"temperature \(23,\) and targets \(24,\)",
    ),
    "no_vocabulary": ({"c": torch.zeros(0, D)}, ValueError, r"at least one row.*got \(0, 16\)"),
    "no_hidden_size": (
        {"e": torch.zeros(N, 0), "c": torch.zeros(V, 0)},
        ValueError,
        r"one column.*got \(101, 0\)",
    ),
    # targets
    "target_too_large": ({"targets": target(101)}, ValueError, r"position \(0, 7\) is 101.*101"),
    "target_negative": ({"targets": target(-1)}, ValueError, r"position \(0, 7\) is -1,"),
    "target_int32": ({"targets": target(500, 2, torch.int32)}, ValueError, r"\(0, 2\) is 500"),
    "default_ignore_index_replaced": (
        {"targets": target(-100), "ignore_index": 0},
        ValueError,
        r"is -100.*ignore_index = 0",
    ),
    "target_of_plain_path": (
        {"targets": target(101), "impl": "torch"},
        ValueError,
        r"position \(0, 7\) is 101.*101.*-100",
    ),
    "float_targets": (
        {"targets": cast(F32)},
        TypeError,
        "int64 or int32, got torch.float32; class probabilities are not supported",
    ),
    "short_targets": ({"targets": cast(torch.int16)}, TypeError, "got torch.int16"),
    # dtypes
    "mixed_e_c": ({"e": cast(BF16)}, TypeError, "e is torch.bfloat16, c torch.float32"),
    "mixed_bias": ({"bias": torch.zeros(V, dtype=F64)}, TypeError, "bias torch.float64"),
    "integer_e": ({"e": cast(torch.int64)}, TypeError, "e must be float32.*got torch.int64"),
    "complex_c": ({"c": cast(torch.complex64)}, TypeError, "c must be float32.*torch.complex64"),
    "float8_e": ({"e": cast(torch.float8_e4m3fn)}, TypeError, "got torch.float8_e4m3fn"),
    "integer_weight": ({"weight": torch.ones(V, dtype=torch.int64)}, TypeError, "torch.int64"),
    "integer_token_weight": ({"token_weight": torch.ones(N).bool()}, TypeError, "torch.bool"),
    "integer_temperature": ({"temperature": torch.ones(N).int()}, TypeError, "torch.int32"),
    # devices
    "c_elsewhere": ({"c": lambda t: t.to("meta")}, ValueError, r"e is on (cpu|cuda:\d), c on meta"),
    "targets_elsewhere": ({"targets": lambda t: t.to("meta")}, ValueError, "targets on meta"),
    "weight_elsewhere": ({"weight": torch.ones(V, device="meta")}, ValueError, "weight on meta"),
    # not tensors
    "list": ({"e": lambda t: t.tolist()}, TypeError, "e must be a torch.Tensor, got list"),
    "none": ({"c": None}, TypeError, "c must be a torch.Tensor, got NoneType"),
    # options
    "shift_negative": ({"shift": -1}, ValueError, "shift must be >= 0, got -1"),
    "shift_float": ({"shift": 1.0}, TypeError, "shift must be a bool or an int, got 1.0"),
    "softcap_zero": ({"softcap": 0.0}, ValueError, "softcap must be finite and > 0.*got 0.0"),
    "softcap_negative": ({"softcap": -2}, ValueError, "got -2.0"),
    "softcap_nan": ({"softcap": float("nan")}, ValueError, "got nan"),
    "softcap_inf": ({"softcap": float("inf")}, ValueError, "got inf"),
    "softcap_text": ({"softcap": "30"}, TypeError, "softcap must be a number, got '30'"),
    "temperature_zero": ({"temperature": 0}, ValueError, "temperature must be finite and > 0"),
    "temperature_negative": ({"temperature": -1.0}, ValueError, "got -1.0"),
    "row_temperature_zero": (
        {"temperature": torch.ones(N).index_fill(0, torch.tensor([5]), 0.0)},
        ValueError,
        r"temperature at position \(0, 5\) is 0.*> 0",
    ),
    "row_temperature_negative": (
        {"temperature": torch.ones(N).index_fill(0, torch.tensor([5]), -2.0)},
        ValueError,
        r"temperature at position \(0, 5\) is -2.*> 0",
    ),
    "row_temperature_of_plain_path": (
        {"temperature": torch.ones(N).index_fill(0, torch.tensor([5]), -2.0), "impl": "torch"},
        ValueError,
        r"temperature at position \(0, 5\) is -2.0.*> 0",
    ),
    "temperature_gradient": (
        {"temperature": torch.ones(N, requires_grad=True)},
        ValueError,
        "no gradient for temperature: pass temperature.detach",
    ),
    "weight_gradient": (
        {"weight": torch.ones(V, requires_grad=True)},
        ValueError,
        "no gradient for weight",
    ),
    "logit_scale_zero": ({"logit_scale": 0.0}, ValueError, "finite and not 0, got 0.0"),
    "logit_scale_inf": ({"logit_scale": float("-inf")}, ValueError, "got -inf"),
    "logit_scale_tensor": ({"logit_scale": torch.ones(())}, TypeError, "multiply e by the tensor"),
    "label_smoothing": ({"label_smoothing": 1.1}, ValueError, r"\[0, 1\], got 1.1"),
    "label_smoothing_negative": ({"label_smoothing": -0.1}, ValueError, "got -0.1"),
    "z_loss": ({"z_loss": -1.0}, ValueError, "z_loss must be finite and >= 0, got -1.0"),
    "reduction": ({"reduction": "avg"}, ValueError, "'mean', 'sum', 'none', got 'avg'"),
    "schedule": (
        {"schedule": "columns"},
        ValueError,
        "'auto', 'rows', 'vocabulary', got 'columns'",
    ),
    "impl": ({"impl": "fused"}, NotImplementedError, "impl 'fused' is not known; use one of auto,"),
    "impl_type": ({"impl": 3}, TypeError, "impl must be a name.*got 3"),
    "filter_eps": ({"filter_eps": "high"}, TypeError, "filter_eps.*'high'"),
    "ignore_index": ({"ignore_index": 1.5}, TypeError, "ignore_index must be an int, got 1.5"),
    "ignore_index_wide": (
        {"targets": cast(torch.int32), "ignore_index": 2**32 + 5},
        ValueError,
        "ignore_index.*it is 4294967301, targets are torch.int32",
    ),
    "ignore_index_wider": ({"ignore_index": 2**70}, ValueError, "targets are torch.int64"),
    "softcap_without_reciprocal": ({"softcap": 1e-50}, ValueError, "softcap.*got 1e-50"),
    "temperature_without_reciprocal": ({"temperature": 1e-40}, ValueError, "got 1e-40"),
    "logit_scale_too_large": ({"logit_scale": 1e60}, ValueError, "logit_scale.*got 1e[+]60"),
    "max_workspace_wide": ({"max_workspace": 2**70}, ValueError, r"max_workspace must be in \[0"),
    "max_workspace_negative": ({"max_workspace": -1}, ValueError, "bytes, got -1"),
    "max_workspace_float": ({"max_workspace": 1e6}, TypeError, "bytes.*got 1000000.0"),
    "max_workspace_too_small": (
        {"max_workspace": 100},
        ValueError,
        r"max_workspace is 100 bytes, but the smallest plan needs \d+ bytes",
    ),
    "plain_path_with_schedule": (
        {"impl": "torch", "schedule": "rows"},
        ValueError,
        "impl='torch' stores all logits.*schedule='rows'",
    ),
}


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("name", TABLE)
def test_table(name, gradient, device, monkeypatch):
    """On CUDA in checked mode, where calls look at what is in the tensors."""
    monkeypatch.setenv("CUTLOSS_CHECK", "1")
    change, error, message = TABLE[name]
    arguments = tensors(device)
    if gradient:
        arguments["e"].requires_grad_()
    for key, value in change.items():
        good = arguments.get(key)
        if callable(value):
            good = good.detach() if good.is_floating_point() else good.clone()
            value = value(good)
        elif isinstance(value, torch.Tensor) and value.device.type == "cpu":
            value = value.to(device)
        arguments[key] = value
    with pytest.raises(error, match=message) as caught:
        linear_cross_entropy(**arguments)
    assert type(caught.value) is error
    assert "cutloss[" not in str(caught.value)  # the code is for the mapping, not for people
    assert linear_cross_entropy(**tensors(device)).isfinite()  # and the next call works


def test_gradients_of_targets():
    """PyTorch itself has no integer tensor that requires one."""
    with pytest.raises(RuntimeError, match="floating point"):
        tensors()["targets"].requires_grad_()


@pytest.mark.usefixtures("device")
def test_the_number_of_tokens():
    """A number that is checked where looking costs nothing, or is asked for."""
    p = problems.make((4, 9))
    right = (p.targets[:, 2:] != -100).sum().item()
    for options in [{}, {"impl": "torch"}]:
        expected = linear_cross_entropy(p.e, p.c, p.targets, shift=2, **options)
        got = linear_cross_entropy(p.e, p.c, p.targets, shift=2, num_valid=right, **options)
        torch.testing.assert_close(got, expected)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"impl": "torch"}], ids=str)
@pytest.mark.parametrize("off", [-1, 1])
def test_a_wrong_number_of_tokens(off, options, monkeypatch):
    monkeypatch.setenv("CUTLOSS_CHECK", "1")
    p = problems.make((4, 9))
    right = (p.targets[:, 2:] != -100).sum().item()
    with pytest.raises(ValueError, match=f"num_valid is {right + off}, but {right} of the 28 tar"):
        linear_cross_entropy(p.e, p.c, p.targets, shift=2, num_valid=right + off, **options)


def test_a_build_without_cuda():
    """What CUDA tensors get from a build that has no engine for them."""
    with pytest.raises(NotImplementedError, match="built without CUDA.*README.*impl='torch'"):
        checks.device(types.SimpleNamespace(device=torch.device("cuda")), has_cuda=False)


def test_checked_mode(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for value, looks in [(None, False), ("0", False), ("", False), ("1", True)]:
        monkeypatch.delenv("CUTLOSS_CHECK", raising=False)
        if value is not None:
            monkeypatch.setenv("CUTLOSS_CHECK", value)
        assert checks.may_look(cpu) and checks.may_look(cuda) == looks


def test_checked_mode_says_what_the_cpu_says():
    """The same errors: from Python, where CUDA is checked, and from C++."""
    for change in (
        {"targets": target(V + 3)},
        {"temperature": torch.ones(N).index_fill(0, torch.tensor([5]), -2.5)},
        {"num_valid": 23},
    ):
        arguments = tensors()
        for key, value in change.items():
            arguments[key] = value(arguments[key]) if callable(value) else value
        with pytest.raises(ValueError) as theirs:
            linear_cross_entropy(**arguments)
        with pytest.raises(ValueError) as ours:
            checks.values(
                arguments["targets"][None],
                arguments.get("temperature"),
                0,
                V,
                -100,
                arguments.get("num_valid"),
            )
        assert str(ours.value) == str(theirs.value)


def test_unknown_device():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        e, c = torch.empty(N, D, device="xpu"), torch.empty(V, D, device="xpu")
        targets = torch.empty(N, dtype=torch.int64, device="xpu")
        with pytest.raises(NotImplementedError, match="no engine for tensors on xpu.*impl='torch'"):
            linear_cross_entropy(e, c, targets)


@pytest.mark.skipif(library.HAS_CUDA, reason="this build has CUDA engines")
def test_no_engine_for_a_device():
    sizes = decide.Sizes(1, N, V, D, F32, F32, None, torch.int64, on_cuda=True)
    with pytest.raises(NotImplementedError, match=r"no engine supports this.*:\n  engine cpu: "):
        library.plan(sizes.arguments(known_at_forward=True), Options(F32))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("options", [{}, {"schedule": "vocabulary"}], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["e", "c"])
def test_not_finite_input(where, value, options):
    """NaN where the plain path gives NaN, and only there."""
    for reduction in ("none", "sum"):
        p = problems.make((12,), V=40, D=6, dtype=F32, ignored=0.0, reduction=reduction)
        with torch.no_grad():
            getattr(p, where)[3, 2] = value
        loss = linear_cross_entropy(p.e, p.c, p.targets, reduction=reduction, **options)
        expected = reference.evaluate(p)["loss"]
        assert torch.equal(loss.isnan(), expected.isnan())
        grads = torch.autograd.grad(loss.sum(), p.parameters)
        for got, want in zip(grads, torch.autograd.grad(expected.sum(), p.parameters)):
            assert torch.equal(got.isnan(), want.isnan())


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("schedule", ["rows", "vocabulary"])
def test_minus_infinite_bias_removes_a_class(schedule):
    p = problems.make(bias=True, dtype=problems.widest(), ignored=0.0)
    p.targets[p.targets == 50] = 49
    with torch.no_grad():
        p.bias[50] = -float("inf")
    loss = linear_cross_entropy(p.e, p.c, p.targets, p.bias, schedule=schedule)
    q = p.to(F64)
    expected = reference.evaluate(q)["loss"]
    torch.testing.assert_close(loss, expected.to(loss.dtype))
    grads = torch.autograd.grad(loss, p.parameters)
    for got, want in zip(grads, torch.autograd.grad(expected, q.parameters)):
        torch.testing.assert_close(got, want.to(got.dtype))
    assert (grads[1][50] == 0).all() and grads[2][50] == 0


@pytest.mark.usefixtures("device")
def test_more_than_2_to_the_31_logits():
    """The same few rows, many times: loss and gradients are known from the few."""
    few, times, vocabulary = 64, 700, 50021
    p = problems.make((few,), V=vocabulary, D=4, ignored=0.0)
    assert few * times * vocabulary > 2**31
    loss = linear_cross_entropy(p.e, p.c, p.targets)
    de, dc = torch.autograd.grad(loss, p.parameters)
    e = p.e.detach().repeat(times, 1).requires_grad_()
    targets = p.targets.repeat(times)
    for schedule in ("rows", "vocabulary"):
        total = linear_cross_entropy(e, p.c, targets, schedule=schedule)
        torch.testing.assert_close(total, loss)
        big_de, big_dc = torch.autograd.grad(total, (e, p.c))
        torch.testing.assert_close(big_dc, dc, rtol=1e-4, atol=1e-8)
        expected = (de / times).expand(times, few, 4)
        torch.testing.assert_close(big_de.view(times, few, 4), expected, rtol=1e-4, atol=1e-10)


def test_memory_that_cannot_be_had():
    """A process that may not have the memory gets MemoryError, and goes on."""
    script = """
        import resource, torch
        from cutloss import cross_entropy, linear_cross_entropy
        e = torch.randn(4096, 8, requires_grad=True)
        c = torch.randn(100_000, 8, requires_grad=True)
        t = torch.randint(0, 100_000, (4096,))
        linear_cross_entropy(e[:64], c, t[:64]).backward()
        columns = torch.empty(8, 14_000_000)  # read as it lies: (V, D) is another layout
        pages = int(open("/proc/self/statm").read().split()[0])
        room = pages * resource.getpagesize() + (400 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (room, room))
        for options in ({}, {"reduction": "none"}):
            try:
                linear_cross_entropy(e, c, t, max_workspace=1 << 40, schedule="rows", **options)
                print("no error")
            except MemoryError as error:
                print("MemoryError:", error)
        copies = (lambda: linear_cross_entropy(e[:8].detach(), columns.T, t[:8]),
                  lambda: cross_entropy(columns.T, torch.zeros(14_000_000).long()))
        for copy in copies:
            try:
                copy()
                print("no error")
            except MemoryError as error:
                print("MemoryError:", error)
        print("then", linear_cross_entropy(e, c, t, max_workspace=64 << 20).isfinite().item())
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert len(lines) == 5 and lines[4] == "then True", done.stdout
    assert "could not allocate a copy of c, 112000000 elements" in lines[2]
    assert "could not allocate a copy of the logits, 112000000 elements" in lines[3]
    for line in lines[:2]:
        assert line.startswith("MemoryError: could not allocate"), line
        assert any(word.isdigit() and int(word) > 400 << 20 for word in line.split()), line


def test_what_pytorch_refuses_is_said_in_its_words():
    """Its headers put a place in the sources of this build into the message, and no reason."""
    scale = torch.ops.cutloss.scale_
    for call in (scale, lambda *args: library.call(scale, *args)):
        with pytest.raises(RuntimeError, match="PyTorch's aten::mul_ failed: ") as caught:
            call(torch.ones(3, dtype=torch.int64), torch.tensor(0.5))
        assert not re.search(r"\.h\b|\.cpp\b|line \d|/|API call", str(caught.value))


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="PyTorch does not say why it failed")
def test_a_copy_that_fails_for_another_reason_than_memory():
    """As after a fault of an earlier kernel, which a copy is the next to report."""
    V, D = 1 << 40, 1 << 21
    e, c = torch.zeros(1, D), torch.zeros(1, 1).expand(V, D)
    with pytest.raises(RuntimeError, match="Storage size calculation overflowed") as caught:
        linear_cross_entropy(e, c, torch.zeros(1, dtype=torch.int64))
    assert "could not allocate" not in str(caught.value)

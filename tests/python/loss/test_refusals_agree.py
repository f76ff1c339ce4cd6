"""Python and the operators refuse the same calls, with errors of one class, and mean one thing by
what they take.

What an option may be stands twice: in _core/checks.py, since compilers, modules and impl="torch"
ask before an operator is called, or call none, and in src/core/validate.cpp, which whoever calls
torch.ops.cutloss meets. Here both are asked about the same numbers, those at the ends of each range
and those just beyond. Where they differ on purpose a test says why, and fails where they
no longer do.
"""

import math

import pytest
import torch
from helpers.inside import SCHEDULES, library
from helpers.problems import BF16, F32, F64

import cutloss
from cutloss import LinearCrossEntropy, linear_cross_entropy

S, L, V, D = 2, 12, 101, 16  # sequences, length
N = S * L
OF_SCHEMA = "by the operator's schema"  # which PyTorch reads, of numbers that are none of its type
TAKEN = None


def tensors(dtype=F32):
    g = torch.Generator().manual_seed(0)
    return {
        "e": torch.randn(S, L, D, generator=g).to(dtype),
        "c": torch.randn(V, D, generator=g).to(dtype),
        "targets": torch.randint(0, V, (S, L), generator=g),
    }


def by_operator(given, **options):
    """(the class of the error that a user would see, or TAKEN; the loss). `given`: tensors, and
    options by the operator's names."""
    weights = [given.get(name) for name in ("token_weight", "weight")]
    operands = [given.get(name) for name in ("e", "c", "bias", "targets", "temperature")]
    options.setdefault("wants_zbar", options.get("label_smoothing", 0.0) > 0)
    options.setdefault("compute_dtype", given["e"].dtype)
    try:
        made = torch.ops.cutloss.loss_and_gradients(*operands, None, *weights, **options)
    except (RuntimeError, ValueError, TypeError) as error:
        if not str(error).startswith("cutloss["):
            return OF_SCHEMA, None
        return type(library.translated(error)), None
    return TAKEN, made[0]


def by_python(call, *args, **options):
    try:
        return TAKEN, call(*args, **options)
    except Exception as error:
        assert "cutloss[" not in str(error)
        return type(error), None


def agree(in_python, in_operator):
    if in_operator is OF_SCHEMA:
        return in_python in (ValueError, TypeError)
    return in_python is in_operator


# Numbers ------------------------------------------------------------------------------------------


def around(*numbers):
    return [f(x) for x in numbers for f in (_before, float, _after)]


def _before(x):
    return math.nextafter(x, -math.inf)


def _after(x):
    return math.nextafter(x, math.inf)


LEAST = {F32: 2.0**-126, BF16: 2.0**-126, F64: 2.0**-1022}  # by the dtype of the operands
ENDS = [x for least in (2.0**-126, 2.0**-1022) for x in (least, 1 / least)]
FLOATS = [0.0, -0.0, 5e-324, -5e-324, -1.0, 1.0, *around(*ENDS), *around(*[-x for x in ENDS])]
FLOATS += [*around(1.0), math.ulp(0.0), 1.7e308, math.inf, -math.inf, math.nan]
FLOATS += [0, 1, 2**31, 2**62, 2**63, 2**1023, 2**1024, -(2**1024)]
INTS = [0, -1, 1, 2, L - 1, L, L + 1, N - 1, N, N + 1, 10**6, 10**9]
INTS += [sign * 2**k + d for k in (31, 32, 59, 62, 63, 70) for sign in (1, -1) for d in (-1, 0, 1)]
OTHERS = ["1", 1.5, [1], b"1", 1j, math.nan]

NUMBERS = {
    "softcap": FLOATS,
    "logit_scale": FLOATS,
    "temperature": FLOATS,
    "label_smoothing": FLOATS,
    "z_loss": FLOATS,
    "shift": INTS,
    "ignore_index": INTS,
    "max_workspace": INTS,
    "num_valid": INTS,
}
CASES = [
    (name, dtype)
    for name, values in NUMBERS.items()
    for dtype in ((F32, F64, BF16) if values is FLOATS else (F32,))
]


def is_settled_before(name, value):
    """A shift that is longer than a sequence: the operator gets the sequence's length."""
    return name == "shift" and isinstance(value, int) and value >= 2**63


def in_a_module(given, **option):
    of_call = {k: option.pop(k) for k in ("num_valid",) if k in option}
    return LinearCrossEntropy(**option)(**given, **of_call)


def with_gradients(given, **option):
    return linear_cross_entropy(**given | {"e": given["e"].clone().requires_grad_()}, **option)


WAYS = {
    "call": lambda given, **option: linear_cross_entropy(**given, **option),
    "gradients": with_gradients,
    "module": in_a_module,
    "plain": lambda given, **option: linear_cross_entropy(**given, **option, impl="torch"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name, dtype", CASES, ids=str)
def test_numbers(name, dtype, way):
    if way == "plain" and name == "max_workspace":
        pytest.skip("impl='torch' takes none")
    given = tensors(dtype)
    seen = set()
    for value in [*NUMBERS[name], *OTHERS]:
        needs_de = way == "gradients" and name == "max_workspace"  # on which the least depends
        in_operator, want = by_operator_of(name, value, given, needs_de)
        in_python, got = by_python(WAYS[way], given, **{name: value})
        if is_settled_before(name, value):
            assert (in_operator, in_python) == (OF_SCHEMA, TAKEN)
            continue
        assert agree(in_python, in_operator), (name, value, in_python, in_operator)
        seen.add(in_operator)
        if in_operator is TAKEN and way in ("call", "module"):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert {TAKEN, ValueError, OF_SCHEMA} <= seen or name == "ignore_index"


def by_operator_of(name, value, given, needs_de):
    try:
        return by_operator(given, **{name: value}, needs_de=needs_de)
    except (TypeError, ValueError):  # `> 0` of no number
        return OF_SCHEMA, None


@pytest.mark.parametrize("name", [name for name in NUMBERS if name != "num_valid"])
def test_a_plan_refuses_what_the_call_refuses(name):
    """num_valid it cannot compare with targets."""
    given = tensors()
    wanted = given | {"e": given["e"].clone().requires_grad_()}
    for value in [*NUMBERS[name], *OTHERS]:
        in_call, _ = by_python(linear_cross_entropy, **wanted, **{name: value})
        in_plan, _ = by_python(cutloss.plan, **wanted, **{name: value})
        assert in_plan is in_call, (name, value)


@pytest.mark.parametrize(
    "option",
    [
        {"softcap": _before(LEAST[F32])},
        {"logit_scale": -_after(1 / LEAST[F32])},
        {"temperature": _before(LEAST[F32])},
        {"max_workspace": -1},
        {"num_valid": N + 1},
    ],
    ids=str,
)
def test_compiled_code_refuses_what_the_call_refuses(option):
    """Of numbers that depend on the call, just beyond an end: all others are refused by what
    test_numbers calls, too."""
    torch._dynamo.reset()
    given = tensors()
    call = torch.compile(lambda: linear_cross_entropy(**given, **option), backend="eager")
    assert by_python(call)[0] is ValueError


# Choices ------------------------------------------------------------------------------------------


def test_reductions():
    given = tensors()
    for reduction, mean in {"mean": True, "sum": False}.items():
        in_operator, want = by_operator(given, mean=mean)
        got = linear_cross_entropy(**given, reduction=reduction)
        assert in_operator is TAKEN and torch.equal(got, want)


def test_schedules():
    """By number as by name. "none" is of a call without gradients, which no caller asks for."""
    given = tensors()
    numbers = set(SCHEDULES.values())
    for number in [*INTS, *range(8)]:
        in_operator, _ = by_operator(given, schedule=number)
        is_wide = not -(2**63) <= number < 2**63
        assert in_operator is (TAKEN if number in numbers else OF_SCHEMA if is_wide else ValueError)
    for name, number in SCHEDULES.items():
        in_python, _ = by_python(linear_cross_entropy, **given, schedule=name)
        assert in_python is (ValueError if name == "none" else TAKEN)


# Tensors ------------------------------------------------------------------------------------------


def zeros(*shape, dtype=F32):
    return torch.zeros(shape, dtype=dtype)


SHAPES = {
    "e": [(3, L, D), (S, 11, D), (S, L, D - 1), (S, L, D + 1), (S, L, 0), (L, D), (S, L, D, 1)],
    "c": [(V, D - 1), (V, D + 1), (0, D), (V, 0), (V,), (D, V), (1, V, D)],
    "targets": [(S, L - 1), (S + 1, L), (L, S), (S, L, 1), (N,), ()],
    "bias": [(V - 1,), (V + 1,), (0,), (1,), (), (1, V), (V, 1)],
    "weight": [(V - 1,), (V + 1,), (0,), (1,), ()],
    "token_weight": [(S, L - 1), (S + 1, L), (0,), (1,), ()],
}
FLOAT_DTYPES = [F32, F64, BF16, torch.float16]
OTHER_DTYPES = [torch.int64, torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn]
MIXES = {BF16, torch.float16}  # with float32


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("plain", [False, True], ids=["engine", "plain"])
def test_shapes(name, plain):
    impl = {"impl": "torch"} if plain else {}
    for shape in SHAPES[name]:
        dtype = torch.int64 if name == "targets" else F32
        given = tensors() | {name: zeros(*shape, dtype=dtype)}
        if name == "e" and shape[-1] == 0:
            given["c"] = zeros(V, 0)
        assert by_operator(given)[0] is ValueError, shape
        assert by_python(linear_cross_entropy, **given, **impl)[0] is ValueError, shape


@pytest.mark.parametrize("name", ["e", "c", "bias", "targets"])
@pytest.mark.parametrize("plain", [False, True], ids=["engine", "plain"])
def test_dtypes(name, plain):
    impl = {"impl": "torch"} if plain else {}
    taken = set()
    for dtype in [*FLOAT_DTYPES, *OTHER_DTYPES, torch.int16, torch.uint8]:
        given = tensors() | {"bias": zeros(V)}
        given[name] = given[name].to(dtype)
        in_operator, want = by_operator(given, compute_dtype=F32)
        in_python, got = by_python(linear_cross_entropy, **given, **impl)
        if name != "targets" and dtype in MIXES:
            # What autocast mixes; without it Python takes one dtype, as PyTorch's products do.
            assert (in_operator, in_python) == (TAKEN, TypeError)
            continue
        assert in_python is in_operator, dtype
        assert in_operator in (TAKEN, TypeError)
        if in_operator is TAKEN:
            taken.add(dtype)
            torch.testing.assert_close(got, want)
    assert taken == ({torch.int64, torch.int32} if name == "targets" else {F32})


@pytest.mark.parametrize("name", ["temperature", "weight", "token_weight"])
def test_dtypes_of_what_python_converts(name):
    """To that of per-row numbers, in which alone the operator takes them."""
    shape = {"temperature": (S, L), "weight": (V,), "token_weight": (S, L)}[name]
    for dtype in [*FLOAT_DTYPES, *OTHER_DTYPES]:
        ones = torch.ones(shape).to(dtype)
        of_operator = ones.reshape(-1) if name == "temperature" else ones
        in_operator, _ = by_operator(tensors() | {name: of_operator})
        in_python, _ = by_python(linear_cross_entropy, **tensors(), **{name: ones})
        assert in_operator is (TAKEN if dtype == F32 else TypeError), dtype
        is_float = dtype.is_floating_point
        assert in_python is (TAKEN if is_float else TypeError), dtype


def test_row_temperatures():
    for dtype in (F32, F64):
        least = LEAST[dtype]
        ends = [least / 2, least, _after(least), 1 / least, 2 / least]
        ends += [0.0, -1.0, math.inf, math.nan]
        seen = set()
        for value in ends:
            t = torch.ones(S, L, dtype=dtype)
            t[1, 3] = value
            given = tensors(dtype)
            in_operator, want = by_operator(given | {"temperature": t.reshape(-1)})
            in_python, got = by_python(linear_cross_entropy, **given, temperature=t)
            in_plain, _ = by_python(linear_cross_entropy, **given, temperature=t, impl="torch")
            assert in_python is in_plain is in_operator, value
            seen.add(in_operator)
        assert seen == {TAKEN, ValueError}


# What depends on several arguments ----------------------------------------------------------------


@pytest.mark.parametrize(
    "name, shape",
    [("token_weight", (L, S)), ("token_weight", (N,)), ("weight", (1, V)), ("weight", (V, 1))],
    ids=str,
)
def test_weights_of_another_shape(name, shape):
    given = tensors() | {name: torch.ones(shape)}
    assert by_operator(given)[0] is ValueError
    assert by_python(linear_cross_entropy, **given)[0] is ValueError
    assert by_python(linear_cross_entropy, **given, impl="torch")[0] is ValueError


@pytest.mark.parametrize("value", [2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**32 - 100])
def test_an_ignore_index_that_no_target_can_be(value):
    """Nothing would be ignored."""
    given = tensors()
    given["targets"] = given["targets"].int()
    expected = TAKEN if -(2**31) <= value < 2**31 else ValueError
    assert by_operator(given, ignore_index=value)[0] is expected
    assert by_python(linear_cross_entropy, **given, ignore_index=value)[0] is expected


def test_a_quotient_that_is_out_of_range():
    """Each number is fine, and what the logits are multiplied by is not."""
    said = dict(logit_scale=1e30, temperature=1e-30)
    assert by_operator(tensors(), **said)[0] is ValueError
    for impl in ("cce", "torch"):
        assert by_python(linear_cross_entropy, **tensors(), **said, impl=impl)[0] is ValueError
    assert by_python(linear_cross_entropy, **tensors(F64), **said)[0] is TAKEN


# What Python refuses and operators take -----------------------------------------------------------


@pytest.mark.parametrize("name", ["shift", "ignore_index", "max_workspace", "num_valid"])
def test_a_bool_is_no_number(name):
    """But a shift, where True is the 1 that it says, as it is in operators."""
    given = tensors()
    assert by_operator(given, **{name: True})[0] is by_operator(given, **{name: 1})[0]
    in_python, _ = by_python(linear_cross_entropy, **given, **{name: True})
    assert in_python is (TAKEN if name == "shift" else TypeError)

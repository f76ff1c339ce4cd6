"""Random shapes, dtypes and options against the reference."""

import pytest
import torch
from helpers import problems, reference
from helpers.problems import BF16, F16, F32, F64
from helpers.tolerance import assert_close
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cutloss import linear_cross_entropy

pytestmark = pytest.mark.usefixtures("device")

settings.register_profile(
    "cutloss", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
settings.load_profile("cutloss")

numbers = dict(allow_nan=False, allow_infinity=False)


@st.composite
def calls(draw):
    """A good problem, as keyword arguments of problems.make, and how to compute it."""
    batch = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    maybe = st.booleans()
    made = dict(
        batch=batch,
        V=draw(st.integers(1, 300)),
        D=draw(st.integers(1, 40)),
        dtype=draw(st.sampled_from([problems.widest(), F32, BF16, F16])),
        kind=draw(st.sampled_from(["random", "random", "peaked", "flat"])),
        bias=draw(maybe),
        ignored=draw(st.sampled_from([0.0, 0.3])),
        seed=draw(st.integers(0, 1000)),
        reduction=draw(st.sampled_from(["mean", "sum", "none"])),
    )
    optional = {
        "softcap": st.floats(0.5, 50.0, **numbers),
        "logit_scale": st.floats(0.1, 4.0, **numbers) | st.floats(-4.0, -0.1, **numbers),
        "temperature": st.floats(0.2, 5.0, **numbers) | st.just(problems._row_temperature),
        "shift": st.integers(0, batch[-1] - 1),
        "label_smoothing": st.floats(0.0, 1.0, **numbers),
        "z_loss": st.floats(0.0, 0.1, **numbers),
        "weight": st.just(problems._class_weight),
        "token_weight": st.just(problems._token_weight),
        "ignore_index": st.sampled_from([-100, -1, 0, 10**9]),
        "return_lse": st.just(True),
        "return_entropy": st.just(True),
    }
    for name, values in optional.items():
        if draw(maybe):
            made[name] = draw(values)
    how = dict(
        schedule=draw(st.sampled_from(["auto", "rows", "vocabulary"])),
        max_workspace=draw(st.sampled_from([None, 8 << 20])),
    )
    return made, how


@given(calls())
@settings(max_examples=150)
def test_against_the_reference(call):
    made, how = call
    p = problems.make(**made)
    result = linear_cross_entropy(p.e, p.c, p.targets, p.bias, **p.options, **how)
    outputs = list(result) if isinstance(result, tuple) else [result]
    grads = reference.gradients(outputs, p.parameters)
    q = p.to(F64)
    truth = reference.chosen(reference.evaluate(q), p.options)
    truth_grads = reference.gradients(truth, q.parameters)
    plain = reference.chosen(reference.evaluate(p), p.options)
    plain_grads = reference.gradients(plain, p.parameters)
    counted = p.targets != p.options.get("ignore_index", -100)
    if not counted[..., p.options.get("shift", 0) :].any():  # the plain path's are NaN there
        assert all((g == 0).all() for g in grads)
        return
    for value, true, simple in zip(outputs + grads, truth + truth_grads, plain + plain_grads):
        assert_close(value, true, simple, "result", lenience=16)


anything = (
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats()
    | st.sampled_from(["", "auto", "mean", "rows", "torch"])
    | st.just(torch.ones(24))
)
OPTIONS = [
    "bias", "ignore_index", "softcap", "reduction", "shift", "return_lse", "filter_eps", "impl",
    "logit_scale", "temperature", "label_smoothing", "weight", "token_weight", "return_entropy",
    "return_predictions", "z_loss", "max_workspace", "schedule", "num_valid",
]  # fmt: skip


@given(st.dictionaries(st.sampled_from(OPTIONS), anything, max_size=3))
@settings(max_examples=300)
def test_any_option_works_or_is_refused(options):
    """Never a crash, an internal error, or an error of somebody else."""
    p = problems.make((24,), V=50, D=8)
    options = {k: v.to(p.e) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    try:
        result = linear_cross_entropy(p.e, p.c, p.targets, **options)
    except (ValueError, TypeError, NotImplementedError) as error:
        message = str(error)
        assert message and "cutloss[" not in message and "internal" not in message
        return
    loss = result[0] if isinstance(result, tuple) else result
    assert loss.dtype == F32


shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
dtypes = st.sampled_from([F64, F32, BF16, F16, torch.int64, torch.int32, torch.bool])


@given(shapes, shapes, shapes, st.none() | shapes, dtypes, dtypes, dtypes)
@settings(max_examples=300)
def test_any_shape_works_or_is_refused(e, c, targets, bias, e_dtype, c_dtype, target_dtype):
    e_dtype, c_dtype = (problems.widest() if d == F64 else d for d in (e_dtype, c_dtype))

    def tensor(shape, dtype):
        return torch.zeros(shape, dtype=dtype, device=problems.device)

    good = (
        e[:-1] == targets
        and len(e) > 0
        and len(c) == 2
        and c[1] == e[-1]
        and min(c) > 0
        and (bias is None or bias == c[:1])
        and e_dtype == c_dtype
        and e_dtype.is_floating_point
        and target_dtype in (torch.int64, torch.int32)
    )

    def call():
        return linear_cross_entropy(
            tensor(e, e_dtype),
            tensor(c, c_dtype),
            tensor(targets, target_dtype),
            None if bias is None else tensor(bias, e_dtype),
            reduction="none",
        )

    if good:
        assert call().shape == targets
        return
    with pytest.raises((ValueError, TypeError), match="must"):
        call()

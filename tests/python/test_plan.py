"""What a call decides before it starts, and the bound that decides while sizes are symbols."""

import dataclasses
import itertools

import problems
import pytest
import torch
from problems import BF16, F16, F32, F64

from cutloss._core import decide
from cutloss._core.options import SCHEDULES, Options
from cutloss._torch import library

pytestmark = pytest.mark.usefixtures("device")

ROWS, VOCABULARY = SCHEDULES["rows"], SCHEDULES["vocabulary"]


def sizes(N, V, D, c_dtype=F32, e_dtype=None):
    on_cuda = problems.device == "cuda"
    return decide.Sizes(1, N, V, D, e_dtype or c_dtype, c_dtype, None, torch.int64, on_cuda=on_cuda)


def options(compute, **changes):
    return Options(compute, needs_de=True, needs_dc=True, **changes)


BUDGETS = [1 << 16, 1 << 20, 3 << 20, 10 << 20, 100 << 20, None]
SHAPES = list(itertools.product([1, 100, 5000], [10, 3001, 151936], [1, 64, 2048]))


@pytest.mark.parametrize("N, V, D", SHAPES)
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
def test_the_bound_is_sufficient(N, V, D, dtype):
    """Where the bound says that the schedule by rows fits, the plan says so too."""
    outputs = [{}, {"wants_entropy": True, "wants_zbar": True}]
    for budget, extra in itertools.product(BUDGETS, outputs):
        s, o = sizes(N, V, D, dtype), options(dtype, max_workspace=budget, **extra)
        if decide.rows_fit(s, o):
            limit = decide.DEFAULT_WORKSPACE if budget is None else budget
            forced = o.but(schedule=ROWS, max_workspace=limit)
            schedule, kept, forward, backward, _ = library.plan(s.arguments(at_forward=True), forced)
            assert schedule == ROWS and kept + max(forward, backward) <= limit


def test_the_bound_says_both():
    assert decide.rows_fit(sizes(2048, 50257, 768), options(F32))
    assert not decide.rows_fit(sizes(2048, 50257, 768), options(F32, max_workspace=1 << 20))
    assert not decide.rows_fit(sizes(512, 151936, 2048, BF16), options(BF16))
    assert decide.rows_fit(sizes(512, 151936, 2048, F32, BF16), options(BF16))


def test_choices():
    s = sizes(256, 1000, 64)
    assert decide.choose(s, options(F32), True) == decide.Choice(True, ROWS)
    later = decide.choose(s, options(F32), False)
    assert not later.immediate and later.schedule == ROWS and later.kept_bytes > 0
    recompute = decide.choose(s, options(F32, schedule=VOCABULARY), True)
    assert recompute == decide.Choice(False, VOCABULARY)
    nothing = Options(F32)
    assert decide.choose(s, nothing, True) == decide.Choice(False, SCHEDULES["none"])


def test_a_small_workspace_recomputes():
    s = sizes(4096, 30000, 64)
    for known in (True, False):
        choice = decide.choose(s, options(F32, max_workspace=8 << 20), known)
        assert choice == decide.Choice(False, VOCABULARY)


@pytest.mark.parametrize("compute, e_dtype", [(F16, F16), (F16, F32), (F32, F16)], ids=str)
def test_fp16_waits_for_the_loss_scale(compute, e_dtype):
    choice = decide.choose(sizes(256, 1000, 64, F32, e_dtype), options(compute), True)
    assert not choice.immediate


def test_the_default_workspace_is_that_of_the_library():
    s = sizes(100, 1000, 64)
    text = library.describe_plan(s.arguments(at_forward=True), options(F32))
    assert f"fits in {decide.DEFAULT_WORKSPACE} bytes" in text


def test_a_plan_of_strides():
    s = sizes(64, 300, 32)
    packed = library.describe_plan(s.arguments(at_forward=True), options(F32))
    s = s._replace(e=decide.Place((64 * 32, 32, 1)), c=decide.Place((32, 1)))
    assert library.describe_plan(s.arguments(at_forward=True), options(F32)) == packed
    s = s._replace(c=decide.Place((1, 300)))  # of a transposed matrix, which is copied
    assert library.describe_plan(s.arguments(at_forward=True), options(F32)) == packed
    s = s._replace(c=decide.Place((32,)))
    with pytest.raises(ValueError, match="c_strides must be 2 numbers or none, got 1"):
        library.describe_plan(s.arguments(at_forward=True), options(F32))


def test_a_plan_says_why():
    text = library.describe_plan(
        sizes(4096, 30000, 64).arguments(at_forward=True), options(F32, max_workspace=8 << 20)
    )
    assert "vocabulary" in text and "needs at least" in text and "8388608" in text


def test_what_was_found_on_this_machine():
    text = library.describe_machine()
    assert "engine cpu" in text and "threads" in text


def test_one_engine_only(device, monkeypatch):
    """CUTLOSS_ENGINE in the environment, for tests and measurements."""
    engine = {"cpu": "cpu", "cuda": "cuda/library"}[device]
    arguments = sizes(64, 300, 32).arguments(at_forward=True)
    monkeypatch.setenv("CUTLOSS_ENGINE", engine)
    assert f"engine {engine} " in library.describe_plan(arguments, options(F32))
    monkeypatch.setenv("CUTLOSS_ENGINE", "none")
    with pytest.raises(ValueError, match="there is no engine 'none' in this build; it has .*cpu"):
        library.describe_plan(arguments, options(F32))


@pytest.mark.parametrize("name", ["statistics", "gradients", "loss_and_gradients", "plan"])
def test_options_are_those_of_the_operators(name):
    schema = getattr(torch.ops.cutloss, name).default._schema
    names = [a.name for a in schema.arguments if a.kwarg_only]
    assert sorted(names) == sorted(Options(F32).of_linear())
    schema = torch.ops.cutloss.logits_statistics.default._schema
    names = [a.name for a in schema.arguments if a.kwarg_only]
    assert sorted(names) == sorted(Options(F32).of_logits())


def test_options_are_not_changed():
    options = Options(F32, softcap=3.0)
    changed = options.but(schedule=ROWS, needs_de=True)
    assert (changed.schedule, changed.needs, changed.softcap) == (ROWS, (True, False, False), 3.0)
    assert options == Options(F32, softcap=3.0)
    assert changed == dataclasses.replace(options, schedule=ROWS, needs_de=True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        changed.schedule = VOCABULARY
    with pytest.raises(TypeError, match="wants_zebra"):
        options.but(wants_zebra=True)

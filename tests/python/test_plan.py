"""What a call decides before it starts, and the bound that decides while sizes are symbols."""

import dataclasses
import inspect
import itertools

import problems
import pytest
import torch
from problems import BF16, F16, F32, F64

import cutloss
import cutloss.losses
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
            plan = library.plan(s.arguments(known_at_forward=True), forced)
            assert plan.schedule == "rows" and plan.peak_bytes <= limit


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


def planned(s, o, known_at_forward=True):
    return library.plan(s.arguments(known_at_forward), o)


def test_the_default_workspace_is_that_of_the_library():
    assert f"fits in {decide.DEFAULT_WORKSPACE} bytes" in str(planned(sizes(100, 1000, 64), options(F32)))


def test_a_plan_of_strides():
    s = sizes(64, 300, 32)
    packed = planned(s, options(F32))
    s = s._replace(e=decide.Place((64 * 32, 32, 1)), c=decide.Place((32, 1)))
    assert planned(s, options(F32)) == packed
    s = s._replace(c=decide.Place((1, 300)))  # of a transposed matrix, which is copied
    assert planned(s, options(F32)) == packed
    s = s._replace(c=decide.Place((32,)))
    with pytest.raises(ValueError, match="c_strides must be 2 numbers or none, got 1"):
        planned(s, options(F32))


def test_a_plan_says_why():
    plan = planned(sizes(4096, 30000, 64), options(F32, max_workspace=8 << 20))
    assert plan.schedule == "vocabulary"
    why = "with the loss: rows, 3 products: needs at least"
    assert any(r.startswith(why) and "8388608" in r for r in plan.reasons)


def meta(N, V, D, dtype=F32, **more):
    tensors = [torch.empty(shape, dtype=dtype, device="meta") for shape in ((N, D), (V, D))]
    targets = torch.empty(N, dtype=torch.int64, device="meta")
    return cutloss.plan(
        *(t.requires_grad_() for t in tensors), targets, device=problems.device, **more
    )


def test_a_plan_is_fields():
    """What its text says, and what the memory adds up to."""
    plan = meta(256, 1000, 64)
    assert plan.in_forward and plan.schedule == "rows" and not plan.keeps_logits
    assert plan.rows == 256 and plan.chunks * plan.chunk_rows >= 256
    assert plan.products == 3 and 3 <= plan.predicted_time < 10
    assert plan.kept_bytes == 0 and plan.peak_bytes == plan.forward_bytes
    assert f"algorithm {plan.algorithm}" in str(plan) and f"engine {plan.engine}" in str(plan)
    assert plan.reasons and all(reason in str(plan) for reason in plan.reasons)
    assert plan.algorithm.startswith(plan.engine)


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"schedule": "vocabulary"}], ids=str)
def test_the_ledger_is_the_memory(options):
    plan = meta(256, 1000, 64, **options)
    sums = dict.fromkeys(("kept", "forward", "backward"), 0)
    for buffer in plan.ledger:
        assert f"{buffer.name} {buffer.bytes}" in str(plan)
        assert buffer.lifetime in ("step", "seam", "call", "kept")
        assert bool(buffer.lies_in) == bool(buffer.until)
        if not buffer.lies_in:
            sums[buffer.memory] += buffer.bytes
    # Each buffer begins at a multiple of the alignment, 1 KiB at most.
    kept, forward, backward = sums.values()
    if not plan.keeps_logits:
        kept, forward = 0, kept + forward
    for booked, bytes_ in ((kept, plan.kept_bytes), (forward, plan.forward_bytes), (backward, plan.backward_bytes)):
        assert booked <= bytes_ <= booked + 1024 * len(plan.ledger)
    assert plan.peak_bytes > 0


@pytest.mark.parametrize("how", [{}, {"schedule": "rows"}, {"reduction": "none"}], ids=str)
def test_the_least_bytes_are_enough(how):
    least = meta(5000, 3001, 64, **how).least_bytes
    assert meta(5000, 3001, 64, max_workspace=least, **how).peak_bytes <= least
    with pytest.raises(ValueError, match=f"the smallest plan needs {least} bytes"):
        meta(5000, 3001, 64, max_workspace=least - 1, **how)


def test_a_plan_is_that_of_the_call(monkeypatch, capfd):
    """Of tensors that are there, those of the call that follows; it reads nothing of them."""
    p = problems.make((3, 40), bias=True, shift=1, label_smoothing=0.1)
    plan = cutloss.plan(p.e, p.c, p.targets, p.bias, **p.options)
    said = cutloss.plan(p.e, p.c, p.targets, p.bias, **p.options, schedule=plan.schedule)
    monkeypatch.setenv("CUTLOSS_VERBOSE", "1")
    cutloss.linear_cross_entropy(p.e, p.c, p.targets, p.bias, **p.options).backward()
    assert said.text in capfd.readouterr().err
    with torch.no_grad():
        assert cutloss.plan(p.e, p.c, p.targets, p.bias, **p.options).schedule == "none"
    p.targets.fill_(12345)  # of no class
    assert cutloss.plan(p.e, p.c, p.targets, p.bias, **p.options) == plan


def test_what_has_no_plan():
    with pytest.raises(ValueError, match="impl='torch' stores all logits and has no plan"):
        meta(8, 8, 8, impl="torch")
    with pytest.raises(TypeError, match="unexpected keyword argument 'softcup'"):
        meta(8, 8, 8, softcup=3.0)
    with pytest.raises(ValueError, match="softcap must be finite"):
        meta(8, 8, 8, softcap=-3.0)


def test_what_was_found_on_this_machine():
    engines = {engine.name: engine for engine in library.engines()}
    assert not engines["cpu"].absent and "threads" in engines["cpu"].description


def test_one_engine_only(device, monkeypatch):
    """CUTLOSS_ENGINE in the environment, for tests and measurements."""
    engine = {"cpu": "cpu", "cuda": "cuda/library"}[device]
    monkeypatch.setenv("CUTLOSS_ENGINE", engine)
    assert planned(sizes(64, 300, 32), options(F32)).engine == engine
    monkeypatch.setenv("CUTLOSS_ENGINE", "none")
    with pytest.raises(ValueError, match="there is no engine 'none' in this build; it has .*cpu"):
        planned(sizes(64, 300, 32), options(F32))


def keywords(name):
    """Name, default and type of an operator's options."""
    schema = getattr(torch.ops.cutloss, name).default._schema
    return {
        a.name: (a.default_value if a.has_default_value() else dataclasses.MISSING, str(a.type))
        for a in schema.arguments
        if a.kwarg_only
    }


TYPES = {
    "dtype": ("ScalarType", "int"), "int": ("int", "SymInt"), "float": ("float",),
    "bool": ("bool",), "float | None": ("Optional[float]",),
    "int | None": ("Optional[int]", "Optional[SymInt]"),
}  # fmt: skip
OF_LINEAR = (
    "statistics", "gradients", "gradients_", "loss_and_gradients", "open_statistics", "chunks_begin",
    "chunk_statistics", "chunk_gradients", "chunks_finish", "plan",
)  # fmt: skip
OF_LOGITS = (
    "logits_statistics", "logits_gradient", "logits_gradient_", "logits_loss_and_gradient",
    "logits_loss_and_gradient_",
)  # fmt: skip


@pytest.mark.parametrize("name", OF_LINEAR)
def test_options_are_those_of_the_table(name):
    """Names, order, defaults and types: those of bindings/spec/options.inc, of which the schemas are
    made."""
    of_table = keywords(name)
    fields = dataclasses.fields(Options)
    assert [field.name for field in fields] == list(of_table)
    for field in fields:
        default, type_ = of_table[field.name]
        assert field.default is default or field.default == default, field.name
        assert type_ in TYPES[getattr(field.type, "__name__", str(field.type))], field.name


@pytest.mark.parametrize("name", OF_LOGITS)
def test_options_of_logits_are_those_of_the_table(name):
    of_table, of_linear = keywords(name), keywords("statistics")
    assert {k: of_linear[k] for k in of_table} == of_table
    changed = {k: object() for k in of_table}
    assert Options(F32).but(**changed).of_logits() == changed
    assert Options(F32).of_logits() == {}


# What users call an option of the table, where it is something else.
SAID = {"return_entropy": "wants_entropy", "return_predictions": "wants_argmax"}


@pytest.mark.parametrize(
    "function",
    [
        cutloss.linear_cross_entropy, cutloss.LinearCrossEntropy, cutloss.cross_entropy,
        cutloss.CausalLMLoss, cutloss.losses.linear_token_loss, cutloss.losses.token_log_probs,
        cutloss.losses.evaluate,
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_signatures_are_those_of_the_table(function):
    """What a signature has of the table, it has with the table's default."""
    of_table = keywords("statistics")
    parameters = inspect.signature(function).parameters
    shared = {SAID.get(name, name): p.default for name, p in parameters.items()}
    shared = {name: default for name, default in shared.items() if name in of_table}
    assert {"softcap", "logit_scale", "temperature", "ignore_index"} <= shared.keys()
    for name, default in shared.items():
        if name == "schedule":
            default = SCHEDULES[default]
        assert default == of_table[name][0], name


def test_options_say_what_is_not_the_default():
    options = Options(F32, needs_de=True, schedule=ROWS)
    assert options.of_linear() == {"compute_dtype": F32, "needs_de": True, "schedule": ROWS}
    changed = options.but(schedule=0)
    assert changed.of_linear() == {"compute_dtype": F32, "needs_de": True}
    assert changed == Options(*changed.values()) and hash(changed) == hash(Options(*changed.values()))


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

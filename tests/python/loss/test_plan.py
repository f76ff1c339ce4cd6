"""What is decided before a call starts: the plan, and what is said of sizes that are symbols."""

import dataclasses
import inspect

import pytest
import torch
from helpers import problems
from helpers.inside import SCHEDULES, LossOptions, Options, decide, library, weighting
from helpers.problems import BF16, F16, F32, F64

import cutloss
import cutloss.losses

pytestmark = pytest.mark.usefixtures("device")

ROWS, VOCABULARY = SCHEDULES["rows"], SCHEDULES["vocabulary"]


def sizes(N, V, D, c_dtype=F32, e_dtype=None):
    on_cuda = problems.device == "cuda"
    return decide.Sizes(1, N, V, D, e_dtype or c_dtype, c_dtype, None, torch.int64, on_cuda=on_cuda)


def options(compute, **changes):
    return Options(compute, needs_de=True, needs_dc=True, **changes)


def ways_for_rows(V, D, o, dtype=F32, known_at_forward=True):
    return library.plan_for_rows(sizes(1, V, D, dtype).arguments(known_at_forward), o)


@pytest.mark.parametrize("known_at_forward", [True, False])
@pytest.mark.parametrize(
    "V, D, dtype, budget",
    [
        (101, 16, F32, None),
        (3001, 64, F64, 1 << 20),
        (3001, 64, F32, 3 << 20),
        (50257, 768, F32, 64 << 20),
        (151936, 2048, BF16, None),
        (32000, 2048, BF16, 256 << 20),
    ],
    ids=str,
)  # fmt: skip
def test_ways_for_rows_are_those_of_plans(V, D, dtype, budget, known_at_forward):
    """On both sides of each border that the library names, and in the middle, what is said of such
    numbers of rows is what the plan of the number says."""
    o = options(dtype, max_workspace=budget)
    ways = ways_for_rows(V, D, o, dtype, known_at_forward)
    least = 1
    for most, in_forward, schedule in ways:
        assert least <= most
        for N in {least, (least + most) // 2, most}:
            if N > 1 << 30:
                continue
            try:
                plan = planned(sizes(N, V, D, dtype), o, known_at_forward)
            except (ValueError, NotImplementedError):  # which the call says too
                assert N > least
                continue
            assert plan.in_forward == in_forward, N
            # Of a symbol nothing is kept: where eager code keeps logits, they are made again.
            assert plan.schedule == schedule or plan.keeps_logits, N
        least = most + 1
    if known_at_forward and dtype == BF16 and problems.device == "cpu":
        assert len(ways) > 1  # else no border was tried
    if not known_at_forward:
        assert [way[1:] for way in ways] == [(False, "vocabulary")]


def test_ways_for_rows_of_a_schedule_that_is_asked_for():
    how = dict(dtype=F32, known_at_forward=True)
    rows, vocabulary = options(F32, schedule=ROWS), options(F32, schedule=VOCABULARY)
    assert [way[1:] for way in ways_for_rows(101, 16, rows, **how)] == [(True, "rows")]
    assert [way[1:] for way in ways_for_rows(101, 16, vocabulary, **how)] == [(False, "vocabulary")]
    how["known_at_forward"] = False  # logits would be kept
    assert [way[1:] for way in ways_for_rows(101, 16, rows, **how)] == [(False, "rows")]


def test_choices():
    s = sizes(256, 1000, 64)
    assert decide.choose(s, options(F32), True) == decide.Choice(True, ROWS)
    later = decide.choose(s, options(F32), False)
    assert not later.in_forward and later.schedule == ROWS and later.kept_bytes > 0
    recompute = decide.choose(s, options(F32, schedule=VOCABULARY), True)
    assert recompute == decide.Choice(False, VOCABULARY)
    nothing = Options(F32)
    assert decide.choose(s, nothing, True) == decide.Choice(False, SCHEDULES["none"])


def test_a_small_workspace_recomputes():
    s = sizes(4096, 30000, 64)
    for known in (True, False):
        choice = decide.choose(s, options(F32, max_workspace=8 << 20), known)
        assert choice == decide.Choice(False, VOCABULARY)


@pytest.mark.parametrize(
    "compute, e_dtype, waits", [(F16, F16, True), (F32, F16, True), (F16, F32, False)], ids=str
)
def test_fp16_gradients_wait_for_the_loss_scale(compute, e_dtype, waits):
    """Gradients in fp16, whatever the products are made in: under fp16 autocast those of fp32
    tensors are fp32, of which nothing underflows."""
    choice = decide.choose(sizes(256, 1000, 64, F32, e_dtype), options(compute), True)
    assert choice.in_forward == (not waits)
    assert library.WAITS_FOR_LOSS_SCALE == {F32: False, F64: False, BF16: False, F16: True}


def planned(s, o, known_at_forward=True):
    return library.plan(s.arguments(known_at_forward), o)


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
    said = plan.kept_bytes, plan.forward_bytes, plan.backward_bytes
    for booked, bytes_ in zip((kept, forward, backward), said):
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


def test_a_printed_plan_has_all_reasons():
    """Those of gradients with the loss too, which take less memory than kept logits."""
    e = torch.empty(8192, 4096, dtype=BF16, device="meta", requires_grad=True)
    c = torch.empty(128256, 4096, dtype=BF16, device="meta", requires_grad=True)
    plan = cutloss.plan(e, c, torch.empty(8192, dtype=torch.int64, device="meta"))
    assert any(reason.startswith("with the loss: rows, 3 products") for reason in plan.reasons)
    assert all(reason in str(plan) for reason in plan.reasons)


def test_a_wrong_option_is_named():
    p = problems.make((5,))
    with pytest.raises(TypeError, match="cutloss.plan .* 'softcapp'.*did you mean 'softcap'"):
        cutloss.plan(p.e, p.c, p.targets, softcapp=3.0)


@pytest.mark.skipif(library.HAS_CUDA, reason="a build with CUDA")
def test_no_plan_of_a_gpu_without_cuda():
    p = problems.make((5,))
    with pytest.raises(NotImplementedError, match="device='cuda' .* built without CUDA"):
        cutloss.plan(p.e, p.c, p.targets, device="cuda")


def test_no_plan_of_other_devices():
    p = problems.make((5,))
    with pytest.raises(NotImplementedError, match="'cpu' and 'cuda', not for 'mps'"):
        cutloss.plan(p.e, p.c, p.targets, device="mps")


def test_a_plan_under_autocast_without_data():
    """That of the device which the plan is for."""
    with torch.autocast("cpu", BF16):
        for dtype in (F32, BF16):
            e = torch.empty(256, 64, dtype=dtype, requires_grad=True)
            c = torch.empty(5000, 64, requires_grad=True)
            targets = torch.zeros(256, dtype=torch.int64)
            want = cutloss.plan(e, c, targets)
            assert "compute bf16" in want.text
            there = [t.detach().to("meta").requires_grad_(t.requires_grad) for t in (e, c, targets)]
            assert cutloss.plan(*there, device="cpu").text == want.text
            assert cutloss.plan(*there).text == want.text


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
    """Names, order, defaults and types: those of bindings/spec/options.inc, of which the schemas
    are made."""
    of_table = keywords(name)
    if name == "loss_and_gradients":  # which also takes how rows count
        weighs = {k: of_table.pop(k)[0] for k in weighting.WEIGHTS_OF_ROWS}
        assert weighs == weighting.WEIGHTS_OF_ROWS
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


def test_what_callers_say_is_what_the_function_takes():
    """LossOptions has the names and defaults of linear_cross_entropy, the module those of both."""
    of_function = inspect.signature(cutloss.linear_cross_entropy).parameters
    of_module = inspect.signature(cutloss.LinearCrossEntropy).parameters
    fields = {field.name: field.default for field in dataclasses.fields(LossOptions)}
    assert fields.pop("plain") is False  # impl
    for name, default in fields.items():
        assert of_function[name].default == of_module[name].default == default, name
    tensors = {"e", "c", "targets", "bias", "weight", "token_weight"}
    of_a_call = {"num_valid", "vocab_parallel_options", "impl"}
    unused = {"accum_e_fp32", "accum_c_fp32", "filter_e_grad", "filter_c_grad"}
    assert set(of_function) == {*fields, *tensors, *of_a_call, *unused}


def test_what_is_wrong_is_not_remembered():
    """True equals 1.0 and is no softcap, whatever was said before."""
    assert LossOptions.checked(softcap=1.0) is LossOptions.checked(softcap=1.0)
    for _ in range(2):
        with pytest.raises(TypeError, match="softcap must be a number, got True"):
            LossOptions.checked(softcap=True)
        with pytest.raises(ValueError, match="softcap must be finite"):
            LossOptions.checked(softcap=-1.0)
        with pytest.raises(TypeError, match="max_workspace must be a number of bytes"):
            LossOptions.checked(max_workspace=[1])  # which has no hash


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

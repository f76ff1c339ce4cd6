"""What only Hopper has: an engine of its own, which takes every 16-bit loss, and chunks that it
does again on the device's word. What the loss and its gradients are, the other files test."""

import math

import pytest
import torch
from helpers import problems, reference
from helpers.inside import SCHEDULES, Options, decide, library
from helpers.problems import BF16, F16, F32, F64
from helpers.tolerance import assert_close

import cutloss
from cutloss import linear_cross_entropy

pytestmark = pytest.mark.skipif(
    not (
        torch.cuda.is_available()
        and library.HAS_CUDA
        and torch.cuda.get_device_capability() == (9, 0)
    ),
    reason="needs a GPU of compute capability 9.0, and a build with CUDA",
)

FUSED = "cuda/fused_sm90"


@pytest.fixture(autouse=True)
def _on_hopper(monkeypatch):
    monkeypatch.setattr(problems, "device", "cuda")
    monkeypatch.delenv("CUTLOSS_CHECK", raising=False)
    monkeypatch.delenv("CUTLOSS_ENGINE", raising=False)


def everything(p, **more):
    """The results of a call and the gradients of their sum."""
    result = linear_cross_entropy(p.e, p.c, p.targets, p.bias, **p.options, **more)
    outputs = result if isinstance(result, tuple) else (result,)
    total = sum(out.sum() for out in outputs if out.is_floating_point())
    return *outputs, *torch.autograd.grad(total, p.parameters)


# Which engine -------------------------------------------------------------------------------------

# Of the products' operands: E, C, autocast's.
KINDS = {
    "bf16": (BF16, BF16, None),
    "f16": (F16, F16, None),
    "autocast": (F32, F32, BF16),
    "autocast_of_c": (BF16, F32, BF16),
}
kinds = pytest.mark.parametrize("kind", KINDS)

OPTIONS = {
    "none": {},
    "bias": dict(bias=True),
    "softcap": dict(softcap=30.0),
    "temperature": dict(temperature=0.7),
    "row_temperature": dict(temperature=problems._row_temperature),
    "logit_scale": dict(logit_scale=0.0625),
    "smoothing": dict(label_smoothing=0.1),
    "weight": dict(weight=problems._class_weight),
    "token_weight": dict(token_weight=problems._token_weight),
    "z_loss": dict(z_loss=1e-4),
    "lse": dict(return_lse=True),
    "entropy": dict(return_entropy=True),
    "predictions": dict(return_predictions=True),
    "per_token": dict(reduction="none"),
    "sum": dict(reduction="sum"),
    "shift": dict(shift=1),
    "num_valid": dict(num_valid=120, ignored=0.0),
    "together": dict(
        bias=True,
        softcap=30.0,
        logit_scale=0.5,
        temperature=problems._row_temperature,
        shift=1,
        label_smoothing=0.1,
        weight=problems._class_weight,
        token_weight=problems._token_weight,
        z_loss=1e-4,
        return_lse=True,
        return_entropy=True,
        return_predictions=True,
        num_valid=117,
        ignored=0.0,
    ),
}
# These need the logits themselves, where the engine keeps exponentials.
NEED_LOGITS = ("smoothing", "entropy", "predictions", "together")


def engines_and_schedules(kind, options, monkeypatch, capfd):
    """What the calls of a loss and its gradients went by: the plan, which they print."""
    e_dtype, c_dtype, autocast = KINDS[kind]
    p = problems.make((3, 40), V=1021, D=64, dtype=c_dtype, **options)
    p.e = p.e.detach().to(e_dtype).requires_grad_()
    monkeypatch.setenv("CUTLOSS_VERBOSE", "1")
    with torch.autocast("cuda", autocast, enabled=autocast is not None):
        everything(p)
        plan = cutloss.plan(p.e, p.c, p.targets, p.bias, **p.options)
        # Calls are told the schedule that was chosen.
        said = cutloss.plan(
            p.e, p.c, p.targets, p.bias, **{**p.options, "schedule": plan.schedule}
        )
    printed = capfd.readouterr().err
    calls = 1 if plan.in_forward else 2  # forward and backward
    assert printed.count(said.text) == printed.count("cutloss ") == calls, printed
    return said.engine, said.schedule


@kinds
@pytest.mark.parametrize("schedule", ["auto", "vocabulary"])
@pytest.mark.parametrize("name", OPTIONS)
def test_hopper_takes_its_own_engine(name, schedule, kind, monkeypatch, capfd):
    options = {**OPTIONS[name], "schedule": schedule}
    engine, used = engines_and_schedules(kind, options, monkeypatch, capfd)
    assert engine == FUSED and used in ("rows", "vocabulary")
    assert schedule == "auto" or used == schedule


@kinds
@pytest.mark.parametrize("name", OPTIONS)
def test_by_rows_it_takes_what_exponentials_suffice_for(name, kind, monkeypatch, capfd):
    """The rest is the library's: the schedule that was asked for is the one that is taken."""
    options = {**OPTIONS[name], "schedule": "rows"}
    found = engines_and_schedules(kind, options, monkeypatch, capfd)
    left = kind == "f16" or name in NEED_LOGITS
    assert found == ("cuda/library" if left else FUSED, "rows")


def test_a_schedule_that_it_refuses(monkeypatch):
    monkeypatch.setenv("CUTLOSS_ENGINE", FUSED)
    p = problems.make((3, 40), V=1021, D=64, dtype=BF16, label_smoothing=0.1)
    for most in (None, 1 << 30):
        with pytest.raises(NotImplementedError, match="no engine goes by schedule rows"):
            everything(p, schedule="rows", max_workspace=most)


@kinds
@pytest.mark.parametrize("name", ["none", "softcap", "smoothing", "lse"])
def test_forward_alone_is_its_own_too(name, kind, monkeypatch, capfd):
    with torch.no_grad():
        e_dtype, c_dtype, autocast = KINDS[kind]
        p = problems.make((3, 40), V=1021, D=64, dtype=c_dtype, **OPTIONS[name])
        monkeypatch.setenv("CUTLOSS_VERBOSE", "1")
        with torch.autocast("cuda", autocast, enabled=autocast is not None):
            linear_cross_entropy(p.e.to(e_dtype), p.c, p.targets, **p.options)
            plan = cutloss.plan(p.e.to(e_dtype), p.c, p.targets, **p.options)
    assert (plan.engine, plan.schedule) == (FUSED, "none")
    assert plan.text in capfd.readouterr().err


PLANS = {
    "default": {},
    "forward": dict(needs_de=False, needs_dc=False),
    "frozen": dict(needs_dc=False),
    "smoothing": dict(wants_zbar=True),
    "entropy": dict(wants_entropy=True, at_forward=False),
    "per_token": dict(at_forward=False),
    "vocabulary": dict(schedule=SCHEDULES["vocabulary"]),
}


@pytest.mark.parametrize("changes", PLANS.values(), ids=PLANS.keys())
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_it_is_planned_for_models(dtype, changes):
    """Sizes at which memory counts."""
    sizes = decide.Sizes(8, 512, 32768, 2048, dtype, dtype, None, torch.int64, on_cuda=True)
    changes = {"needs_de": True, "needs_dc": True, "at_forward": True, **changes}
    arguments = sizes.arguments(changes.pop("at_forward"))
    assert library.plan(arguments, Options(dtype, **changes)).engine == FUSED


# Chunks that are done again -----------------------------------------------------------------------

# The last axis of C is for two columns alone. A row of E that has something there has its target,
# one of the two, far from all other logits: so far that exponentials relative to the target leave
# the range of fp32.
UP, DOWN, LEVER = 200, 301, 4.0
FAR_ROWS = {300: -95.0, 301: 70.0, 402: -125.0, 403: 100.0, 480: -64.0}  # logit of the target


def with_far_rows(seed, far, **options):
    p = problems.make((600,), V=403, D=8, dtype=BF16, bias=True, ignored=0.1, seed=seed, **options)
    softcap, temperature = options.get("softcap"), options.get("temperature", 1.0)
    with torch.no_grad():
        p.c[:, -1] = 0.0
        p.c[UP, -1], p.c[DOWN, -1] = LEVER, -LEVER
        for row, z in FAR_ROWS.items():
            p.targets[row] = UP if z > 0 else DOWN
            a = abs(z) * temperature
            if softcap is not None:
                a = softcap * math.atanh(a / softcap)
            p.e[row, -1] = a / LEVER if far else 0.5
    assert far_rows(p) == (list(FAR_ROWS) if far else [])
    return p


def far_rows(p):
    """Where the sum of e^(z - r) without the target, r the target's logit and 15, leaves the range
    in which the engine lets it be (docs/math.md, "Reference exponents")."""
    q = p.to(F64)
    z = q.e @ q.c.T + q.bias
    softcap = p.options.get("softcap")
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / p.options.get("temperature", 1.0)
    targets = p.targets.clamp(min=0)[:, None]
    others = z.scatter(1, targets, -math.inf).logsumexp(1)
    sums = (others - z.gather(1, targets)[:, 0] - 15) / math.log(10)
    return torch.nonzero((p.targets >= 0) & ((sums < -30) | (sums > 20)))[:, 0].tolist()


def assert_accurate(p, results):
    q = p.to(F64)
    truth, plain = reference.evaluate(q)["loss"], reference.evaluate(p)["loss"]
    expected = (truth, *torch.autograd.grad(truth, q.parameters))
    simple = (plain, *torch.autograd.grad(plain, p.parameters))
    for name, *values in zip("loss de dc dbias".split(), results, expected, simple, strict=True):
        assert_close(*values, name)


@pytest.mark.parametrize("options", [{}, {"softcap": 250.0, "temperature": 1.25}], ids=str)
def test_a_graph_of_chunks_that_are_done_again(options):
    """Captured where nothing is known of the data, replayed where a chunk has rows that need it,
    where none has, and back."""
    sets = [with_far_rows(seed, far, **options) for seed, far in ((0, True), (1, False), (2, True))]
    # Not with the tensors that are captured: autograd would tie them to today's stream.
    p = sets[0]
    how = {"schedule": "rows"}  # in several chunks
    plan = cutloss.plan(p.e, p.c, p.targets, p.bias, **p.options, **how)
    how["max_workspace"] = plan.least_bytes

    p = with_far_rows(0, True, **options)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            everything(p, **how)
    torch.cuda.current_stream().wait_stream(side)
    graph = problems.graph()
    with torch.cuda.graph(graph):
        captured = everything(p, **how)
    for data in (*sets, sets[0]):
        with torch.no_grad():
            for mine, other in zip((*p.parameters, p.targets), (*data.parameters, data.targets)):
                mine.copy_(other)
        graph.replay()
        for a, b in zip(captured, everything(data, **how), strict=True):
            assert torch.equal(a, b)
        assert_accurate(data, captured)

"""E and C with gaps, as slices of larger tensors have them, on every engine: read where they lie or
copied, with the same result, and by the plan that was asked for before the call."""

import pytest
import torch
from helpers import problems
from helpers.inside import SCHEDULES, Options, decide, library
from helpers.problems import BF16, F16, F32
from helpers.tolerance import rms

import cutloss
from cutloss import linear_cross_entropy

pytestmark = pytest.mark.usefixtures("engine")

SEQUENCES, LENGTH, V, D = 4, 33, 203, 16

wide_and_narrow = pytest.mark.parametrize("dtype", [F32, BF16], ids=str)

# Elements between rows and between sequences of E, between rows of C, and before either begins.
# Hopper's kernels read in place what lies at multiples of 8.
GAPS = {
    "sequences_by_8": dict(sequences=8),
    "sequences_by_a_row": dict(sequences=D),
    "sequences_by_odd": dict(sequences=5),
    "rows_by_8": dict(rows=8),
    "rows_by_odd": dict(rows=5),
    "both_by_16": dict(rows=16, sequences=48),
    "c_by_odd": dict(rows_of_c=3),
    "all_by_8": dict(rows=8, sequences=24, rows_of_c=16),
    "all_by_odd": dict(rows=3, sequences=1, rows_of_c=5),
    "odd_begin": dict(begin=1, sequences=D, rows_of_c=8),
}
gaps = pytest.mark.parametrize("gaps", GAPS.values(), ids=GAPS.keys())

WAYS = {
    "default": {},
    "lse": dict(return_lse=True),
    "none": dict(reduction="none"),
    "vocabulary": dict(schedule="vocabulary"),
    "shift": dict(shift=1),
    "shift_lse": dict(shift=1, return_lse=True),
    "shift_none": dict(shift=1, reduction="none"),
    "shift_vocabulary": dict(shift=1, schedule="vocabulary"),
}
ways = pytest.mark.parametrize("options", WAYS.values(), ids=WAYS.keys())


def spread(t, rows=0, sequences=0, begin=0):
    """The same values in memory with gaps, which hold NaN."""
    count, length, columns = t.shape if t.dim() == 3 else (1, *t.shape)
    row = columns + rows
    sequence = length * row + sequences
    memory = torch.full((begin + count * sequence,), float("nan")).to(t)
    view = memory.as_strided(t.shape, (sequence, row, 1)[3 - t.dim() :], begin)
    return view.copy_(t).requires_grad_()


def with_gaps(p, rows=0, sequences=0, rows_of_c=0, begin=0):
    e = spread(p.e.detach(), rows, sequences, begin)
    return e, spread(p.c.detach(), rows_of_c, begin=begin)


def make(dtype, **more):
    return problems.make((SEQUENCES, LENGTH), V, D, dtype=dtype, **more)


def counted(p, options):
    """num_valid; with it more is read in place."""
    return (p.targets[:, options.get("shift", 0) :] != -100).sum().item()


def results(e, c, targets, **options):
    """What a call returns and the gradients of its sum, rows weighted differently."""
    outputs = linear_cross_entropy(e, c, targets, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = 0.0
    for t in outputs:
        total = total + (t * torch.linspace(0.5, 1.5, t.numel()).to(t).reshape(t.shape)).sum()
    return *outputs, *torch.autograd.grad(total, (e, c))


def assert_near(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        assert rms(a - b) <= tolerance * rms(b)


def assert_same(got, want):
    """The same bits. On CUDA the library's product may follow the alignment of its operands: a unit
    in the last place of what is 16 bits wide, or of sums."""
    if got[0].device.type == "cpu":
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    else:
        assert_near(got, want, max(1e-5, torch.finfo(got[-1].dtype).eps))


@gaps
@ways
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("ignored", [0.0, 0.2])
def test_gaps_change_nothing(ignored, dtype, options, gaps):
    p = make(dtype, ignored=ignored)
    expected = results(p.e, p.c, p.targets, **options)
    e, c = with_gaps(p, **gaps)
    assert torch.equal(e, p.e) and torch.equal(c, p.c)
    assert_same(results(e, c, p.targets, **options), expected)
    assert_same(results(e, c, p.targets, num_valid=counted(p, options), **options), expected)


@gaps
@pytest.mark.parametrize("way", ["shift", "shift_lse", "shift_vocabulary"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("gives_num_valid", [False, True])
def test_rows_that_predict_nothing_are_not_read(gives_num_valid, dtype, way, gaps):
    """A sequence's last row, and rows whose target is ignored: they hold NaN here."""
    p = make(dtype, ignored=0.3)
    options = dict(WAYS[way])
    expected = results(p.e, p.c, p.targets, **options)
    if gives_num_valid:
        options["num_valid"] = counted(p, options)
    e, c = with_gaps(p, **gaps)
    unread = torch.ones_like(p.targets, dtype=torch.bool)
    unread[:, :-1] = p.targets[:, 1:] == -100
    with torch.no_grad():
        e[unread] = float("nan")
    got = results(e, c, p.targets, **options)
    assert_same(got, expected)
    de = got[-2]
    assert (de[unread] == 0).all() and (de[~unread] != 0).any(-1).all()


def reads_in_place(t):
    """Whether a tensor with gaps is read where it lies."""
    if t.is_contiguous():
        return False
    if t.device.type == "cpu":
        return True
    narrow = t.dtype in (BF16, F16)
    even = not narrow or all(stride % 8 == 0 for stride in t.stride()[:-1])
    return even and t.data_ptr() % 16 == 0


@gaps
@wide_and_narrow
def test_a_call_goes_by_the_plan_that_was_asked_for(dtype, gaps, monkeypatch, capfd):
    """Word for word, strides and bytes included."""
    p = make(dtype, ignored=0.0)
    e, c = with_gaps(p, **gaps)
    n = SEQUENCES * LENGTH
    options = Options(dtype, needs_de=True, needs_dc=True, num_valid=n)
    sizes = decide.sizes_of(e, c, None, p.targets, None, None)
    plan = library.plan(sizes.arguments(known_at_forward=False), options)
    options = options.but(schedule=SCHEDULES[plan.schedule])
    asked = library.plan(sizes.arguments(known_at_forward=False), options).text
    assert ("elements apart" in asked) == (reads_in_place(e) or reads_in_place(c))

    monkeypatch.setenv("CUTLOSS_VERBOSE", "1")
    results(e, c, p.targets, return_lse=True, num_valid=n)
    printed = capfd.readouterr().err
    lines = printed.splitlines(keepends=True)
    assert [line.split()[1] for line in lines if line.startswith("cutloss ")] == [
        "forward,", "backward,"
    ]
    assert "".join(line for line in lines if not line.startswith("cutloss ")) == asked + asked


@gaps
@pytest.mark.parametrize("way", ["default", "lse", "vocabulary", "shift_none"])
@wide_and_narrow
def test_the_least_workspace_is_enough(dtype, way, gaps):
    """What the error names suffices: the plan that named it knew of the gaps."""
    p = make(dtype, ignored=0.0)
    options = {**WAYS[way], "num_valid": counted(p, WAYS[way])}
    expected = results(p.e, p.c, p.targets, **options)
    e, c = with_gaps(p, **gaps)
    with pytest.raises(ValueError, match="max_workspace is 0 bytes") as error:
        results(e, c, p.targets, max_workspace=0, **options)
    plan = cutloss.plan(e, c, p.targets, **options)
    least = plan.least_bytes
    assert f"the smallest plan needs {least} bytes" in str(error.value)
    with pytest.raises(ValueError, match=f"max_workspace is {least - 1} bytes"):
        results(e, c, p.targets, max_workspace=least - 1, **options)
    for budget in (least, 2 * least, 8 * least):
        got = results(e, c, p.targets, max_workspace=budget, **options)
        # Other slabs and schedules round g elsewhere.
        assert_near(got, expected, max(1e-5, 2 * torch.finfo(dtype).eps))

"""The function against fp64 and against the plain path: options, dtypes, schedules, data."""

import pytest
import torch
from helpers import problems, reference
from helpers.problems import BF16, F16, F32, F64, KINDS, OPTION_SETS, SIZES, Problem
from helpers.tolerance import assert_close

from cutloss import linear_cross_entropy

pytestmark = pytest.mark.usefixtures("device")

DTYPES = [F64, F32, BF16, F16]
SCHEDULES = ["auto", "rows", "vocabulary"]
# fp16 holds nothing between 1e4 and 1e4 + 8: that problem itself is lost.
KINDS_AND_DTYPES = [
    (kind, dtype) for kind in KINDS for dtype in DTYPES if (kind, dtype) != ("offset", F16)
]


def run(p: Problem, **options):
    result = linear_cross_entropy(p.e, p.c, p.targets, p.bias, **p.options, **options)
    outputs = list(result) if isinstance(result, tuple) else [result]
    return outputs, reference.gradients(outputs, p.parameters)


def compare(p: Problem, **options) -> None:
    truth_p = p.to(F64)
    truth = reference.chosen(reference.evaluate(truth_p), p.options)
    truth_g = reference.gradients(truth, truth_p.parameters)
    plain = reference.chosen(reference.evaluate(p), p.options)
    plain_g = reference.gradients(plain, p.parameters)
    outputs, grads = run(p, **options)

    assert len(outputs) == len(truth)
    stats = F64 if p.e.dtype == F64 else F32
    for i, (value, true, simple) in enumerate(zip(outputs, truth, plain)):
        if value.dtype == torch.int64:
            # Where two logits are equal but for rounding, either is the largest.
            chosen_by_plain = (simple == value) | (true == value)
            assert chosen_by_plain.all(), "predictions"
            continue
        assert value.dtype == stats
        assert_close(value, true, simple, f"output {i}")
    named = zip("e c bias".split(), p.parameters)
    for (name, t), value, true, simple in zip(named, grads, truth_g, plain_g):
        assert value.dtype == t.dtype and value.is_contiguous()
        assert_close(value, true, simple, f"d{name}")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTION_SETS.values(), ids=OPTION_SETS.keys())
def test_options(options, dtype, schedule):
    compare(problems.make((3, 29), V=211, D=24, dtype=dtype, **options), schedule=schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch, V, D", SIZES, ids=str)
def test_sizes(batch, V, D, dtype, schedule):
    compare(problems.make(batch, V, D, dtype, bias=True, ignored=0.1), schedule=schedule)


@pytest.mark.parametrize("schedule", ["rows", "vocabulary"])
@pytest.mark.parametrize("kind, dtype", KINDS_AND_DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_kinds_of_data(kind, dtype, schedule, reduction):
    p = problems.make((40,), 307, 32, dtype, kind, reduction=reduction)
    compare(p, schedule=schedule)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_nll_is_never_negative(kind, dtype):
    p = problems.make((64,), 500, 24, dtype, kind, reduction="none", ignored=0.0)
    assert (linear_cross_entropy(p.e, p.c, p.targets, p.bias, reduction="none") >= 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("gap", [5.0, 20.0, 60.0])
def test_confident_rows_keep_their_digits(gap, schedule):
    """nll = log(1 + sum of e^-gap) needs its own digits, not those of the logits."""
    V, N = 100, 8
    e = torch.ones(N, 1, device=problems.device)
    c = torch.full((V, 1), -gap, device=problems.device)
    c[3] = 0.0
    c.requires_grad_()
    targets = torch.full((N,), 3, device=problems.device)
    loss = linear_cross_entropy(e, c, targets, schedule=schedule)
    truth = torch.log1p((V - 1) * torch.tensor(-gap, dtype=F64).exp())
    assert abs(loss.item() / truth.item() - 1) < 1e-6
    others = torch.tensor(-gap, dtype=F64).exp() / truth.exp()
    (dc,) = torch.autograd.grad(loss, c)
    assert abs(dc[0].item() / others.item() - 1) < 1e-6
    assert abs(dc[3].item() / (-99 * others.item()) - 1) < 1e-6


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("upstream", ["known", "later"])
def test_workspace_bounds_the_plan_not_the_result(dtype, upstream):
    """A small workspace means many chunks and slabs, and the same numbers."""
    options = {} if upstream == "known" else {"return_lse": True}
    p = problems.make((300,), 5003, 40, dtype, bias=True, **options)
    # On CUDA 3 MiB would mean slabs of few columns: many sums in fp32, one after the other.
    compare(p, max_workspace=(16 if problems.device == "cuda" else 3) << 20)
    compare(p, max_workspace=256 << 20)


def test_only_what_is_wanted_gets_a_gradient():
    for wanted in [(True, False, False), (False, True, False), (False, False, True)]:
        for options in [{}, {"return_lse": True}, {"schedule": "vocabulary"}]:
            p = problems.make(bias=True)
            full = problems.make(bias=True)
            for t, keep in zip(p.parameters, wanted):
                t.requires_grad_(keep)
            for q in (p, full):
                result = linear_cross_entropy(q.e, q.c, q.targets, q.bias, **options)
                (result[0] + result[1].sum() if isinstance(result, tuple) else result).backward()
            for t, other, keep in zip(p.parameters, full.parameters, wanted):
                assert (t.grad is not None) == keep
                if keep:
                    torch.testing.assert_close(t.grad, other.grad)


def test_no_gradient_at_all():
    p = problems.make(bias=True)
    expected = linear_cross_entropy(p.e, p.c, p.targets, p.bias)
    with torch.no_grad():
        assert linear_cross_entropy(p.e, p.c, p.targets, p.bias).grad_fn is None
    with torch.inference_mode():
        value = linear_cross_entropy(p.e, p.c, p.targets, p.bias)
    torch.testing.assert_close(value, expected.detach())
    constants = [t.detach() for t in p.parameters]
    e, c, bias = constants
    assert not linear_cross_entropy(e, c, p.targets, bias).requires_grad


def test_token_weight_carries_a_gradient():
    for schedule in SCHEDULES:
        p = problems.make((24,), dtype=F64, token_weight=problems._token_weight)
        q = p.to(F64)
        for r in (p, q):
            r.options = {"token_weight": r.options["token_weight"].double().requires_grad_()}
        linear_cross_entropy(p.e, p.c, p.targets, schedule=schedule, **p.options).backward()
        reference.evaluate(q)["loss"].backward()
        torch.testing.assert_close(p.options["token_weight"].grad, q.options["token_weight"].grad)
        torch.testing.assert_close(p.e.grad, q.e.grad)


def test_the_order_of_results():
    p = problems.make(return_lse=True, return_entropy=True, return_predictions=True)
    loss, lse, entropy, predictions = linear_cross_entropy(p.e, p.c, p.targets, **p.options)
    assert loss.shape == () and lse.shape == entropy.shape == predictions.shape == (24,)
    assert predictions.dtype == torch.int64 and not predictions.requires_grad
    assert lse.requires_grad and entropy.requires_grad
    ignored = p.targets == -100
    assert ignored.any() and (predictions[ignored] == -1).all()
    assert (lse[ignored] == 0).all() and (entropy[ignored] == 0).all()


def test_predictions_do_not_change_the_loss():
    p = problems.make()
    loss, predictions = linear_cross_entropy(p.e, p.c, p.targets, return_predictions=True)
    assert torch.equal(loss, linear_cross_entropy(p.e, p.c, p.targets))
    counted = p.targets != -100
    assert torch.equal(predictions[counted], (p.e @ p.c.T).argmax(-1)[counted])


def test_first_of_equal_logits_is_the_prediction():
    e, c, targets = (
        t.to(problems.device) for t in (torch.ones(3, 4), torch.ones(50, 4), torch.arange(3))
    )
    _, predictions = linear_cross_entropy(e, c, targets, return_predictions=True)
    assert predictions.tolist() == [0, 0, 0]


def test_targets_of_each_integer_dtype():
    p = problems.make()
    expected = linear_cross_entropy(p.e, p.c, p.targets)
    assert torch.equal(linear_cross_entropy(p.e, p.c, p.targets.int()), expected)


def test_no_batch_dimension():
    p = problems.make((1,), ignored=0.0)
    loss, lse = linear_cross_entropy(
        p.e[0], p.c, p.targets[0], reduction="none", return_lse=True
    )
    assert loss.shape == lse.shape == ()
    torch.testing.assert_close(loss, reference.evaluate(p)["loss"])


@pytest.mark.parametrize("options", [{}, {"return_lse": True}], ids=["immediate", "deferred"])
@pytest.mark.parametrize("batch", [(0,), (0, 5), (3, 0)], ids=str)
def test_no_rows(batch, options):
    e = torch.randn(*batch, 8, device=problems.device, requires_grad=True)
    c = torch.randn(20, 8, device=problems.device, requires_grad=True)
    targets = torch.zeros(batch, dtype=torch.int64, device=problems.device)
    result = linear_cross_entropy(e, c, targets, **options)
    loss = result[0] if options else result
    assert loss.isnan()
    loss.backward()
    assert torch.equal(c.grad, torch.zeros_like(c)) and e.grad.shape == e.shape
    assert linear_cross_entropy(e, c, targets, reduction="sum") == 0
    assert linear_cross_entropy(e, c, targets, reduction="none").shape == batch


@pytest.mark.parametrize("impl", ["auto", "torch"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_all_rows_ignored(schedule, impl):
    p = problems.make((4, 9), bias=True)
    targets = torch.full_like(p.targets, -100)
    options = {"impl": impl} if impl == "torch" else {"schedule": schedule}
    loss = linear_cross_entropy(p.e, p.c, targets, p.bias, **options)
    assert loss.isnan()  # as F.cross_entropy
    for g in torch.autograd.grad(loss, p.parameters):
        assert torch.equal(g, torch.zeros_like(g))
    total = linear_cross_entropy(p.e, p.c, targets, p.bias, reduction="sum", **options)
    assert total == 0


def test_ignored_rows_are_not_looked_at():
    """A padded batch may hold NaN, and a temperature of 0, where nothing counts."""
    p = problems.make((24,), dtype=F32, temperature=torch.ones(24))
    expected = linear_cross_entropy(p.e, p.c, p.targets)
    expected_grads = torch.autograd.grad(expected, (p.e, p.c))
    ignored = p.targets == -100
    with torch.no_grad():
        p.e[ignored] = float("nan")
    p.options["temperature"][ignored] = 0.0
    weight = torch.ones(24, device=problems.device)
    weight[ignored] = float("inf")
    for options in [{}, {"schedule": "vocabulary"}, {"return_lse": True}, {"impl": "torch"}]:
        result = linear_cross_entropy(
            p.e, p.c, p.targets, token_weight=weight, **p.options, **options
        )
        loss = result[0] if isinstance(result, tuple) else result
        torch.testing.assert_close(loss, expected)
        for got, want in zip(torch.autograd.grad(loss, (p.e, p.c)), expected_grads):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", OPTION_SETS)
def test_plain_path_is_a_reference_too(name):
    """impl="torch" has every option, for whoever wants to compare."""
    p = problems.make((3, 29), V=211, D=24, dtype=F64, **OPTION_SETS[name])
    outputs, grads = run(p, impl="torch")
    q = p.to(F64)
    truth = reference.chosen(reference.evaluate(q), q.options)
    for value, true in zip(outputs + grads, truth + reference.gradients(truth, q.parameters)):
        torch.testing.assert_close(value, true, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("schedule", ["rows", "vocabulary"])
def test_frequent_targets_keep_their_digits(schedule):
    """In dC's row of a frequent token two large parts nearly cancel where E has a mean: what comes
    from rows with this target, and from all others. Neither may be rounded before they meet."""
    N, D, V = 2048, 64, 500
    random = torch.Generator().manual_seed(3)
    share = 1 / torch.arange(1, V + 1, dtype=F64)
    targets = torch.multinomial(share, N, replacement=True, generator=random)
    e = (1 + 0.5 * torch.randn(N, D, generator=random, dtype=F64)).to(BF16)
    # Columns that predict the shares: what is left of the two parts is small.
    c = 0.02 * torch.randn(V, D, generator=random, dtype=F64) + share.log()[:, None] / D
    e, c, targets = (t.to(problems.device) for t in (e, c.to(BF16), targets))

    def error_of_dc(**options):
        leaf = c.clone().requires_grad_()
        loss = linear_cross_entropy(e, leaf, targets, **options)
        (dc,) = torch.autograd.grad(loss, leaf)
        return ((dc.double() - truth)[:8].norm() / truth[:8].norm()).item()

    exact = c.double().requires_grad_()
    z = e.double() @ exact.T
    (truth,) = torch.autograd.grad(torch.nn.functional.cross_entropy(z, targets), exact)
    ours = error_of_dc(schedule=schedule, max_workspace=256 << 20)
    assert ours <= 2 * error_of_dc(impl="torch") + 1e-3


@pytest.mark.parametrize("name, size", [("token_weight", 33), ("weight", 50)])
def test_weights_are_the_callers_to_change(name, size):
    """Between forward and backward; and they may come from inference, as those of a rollout do."""
    e = torch.randn(33, 16, device=problems.device, requires_grad=True)
    c = torch.randn(50, 16, device=problems.device, requires_grad=True)
    targets = torch.randint(50, (33,), device=problems.device)
    with torch.inference_mode():
        weights = torch.rand(size, device=problems.device)
    mine = weights.clone()
    expected = torch.autograd.grad(
        linear_cross_entropy(e, c, targets, impl="torch", **{name: mine.clone()}), (e, c)
    )
    for given in (weights, mine):
        loss = linear_cross_entropy(e, c, targets, **{name: given})
        if given is mine:
            mine.mul_(2)
        for got, want in zip(torch.autograd.grad(loss, (e, c)), expected, strict=True):
            torch.testing.assert_close(got, want)

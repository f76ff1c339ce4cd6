"""linear_token_loss against the same functions of stored logits."""

import pytest
import torch
from helpers import problems, reference
from helpers.labels import without_address
from helpers.problems import BF16, F16, F32, F64, OPTION_SETS, Problem
from helpers.token_losses import (  # noqa: F401
    FUNCTIONS,
    call,
    chunks,
    cuda,
    dft,
    focal,
    functions,
    inputs_of,
    on_cuda,
    slices_of,
    smallest,
)
from helpers.tolerance import assert_close

from cutloss import losses
from cutloss.losses import linear_token_loss

HEADS = {
    name: OPTION_SETS[name]
    for name in ("default", "bias", "softcap", "row_temperature", "shift", "nothing_ignored")
}
HEADS["everything"] = dict(
    bias=True, softcap=4.0, logit_scale=1.5, shift=2, temperature=HEADS["row_temperature"]["temperature"]
)
heads = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())


def by_hand(p: Problem, fn, takes, normalizer=None) -> torch.Tensor:
    """With stored logits, in the dtype of p."""
    names = ("entropy", "lse") if takes else ()
    options = dict(p.options, reduction="none", **{f"return_{name}": True for name in names})
    rows = reference.evaluate(Problem(p.e, p.c, p.targets, p.bias, options))
    shift = int(p.options.get("shift", 0))
    counts = p.targets[..., shift:] != -100
    named = {name: rows[name][counts] for name in names}
    if takes:
        named["w"] = slices_of(p)[..., shift:, :][counts].to(rows["loss"].dtype)
    total = fn(rows["loss"][counts], **named).sum()
    return total / (counts.sum() if normalizer is None else normalizer)


def check(p: Problem, value, fn, takes, normalizer=None) -> None:
    q = p.to(F64)
    truth, plain = by_hand(q, fn, takes, normalizer), by_hand(p, fn, takes, normalizer)
    values = value, *torch.autograd.grad(value, p.parameters)
    truths = truth, *torch.autograd.grad(truth, q.parameters)
    plains = plain, *torch.autograd.grad(plain, p.parameters)
    for name, ours, true, simple in zip(("loss", "de", "dc", "dbias"), values, truths, plains):
        assert_close(ours, true, simple, name, lenience=4)


# What it is ---------------------------------------------------------------------------------------


@functions
@heads
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_the_formula(engine, dtype, head, fn, takes):
    p = problems.make((3, 43), V=531, D=16, dtype=dtype, **head)
    for schedule in ("auto", "vocabulary"):
        check(p, call(p, fn, takes, schedule=schedule), fn, takes)


@functions
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
def test_several_chunks(engine, dtype, fn, takes, chunks):
    p = problems.make((3, 270), V=531, D=16, dtype=dtype, bias=True, shift=1)
    most = smallest(p, fn, takes)
    check(p, call(p, fn, takes, schedule="rows", max_workspace=most), fn, takes)
    assert len(chunks) == 1 and chunks[0] > 1


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("normalizer", [1, 77.0, torch.tensor(12), torch.tensor([3.5])], ids=str)
@pytest.mark.parametrize("schedule", ["rows", "vocabulary"])
def test_normalizer(normalizer, schedule):
    p = problems.make(V=101)
    n = normalizer.to(p.e.device) if isinstance(normalizer, torch.Tensor) else normalizer
    check(p, call(p, dft, {}, normalizer=n, schedule=schedule), dft, {}, float(normalizer))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("schedule", ["rows", "vocabulary"])
def test_what_per_token_may_be(schedule):
    """Of any dtype, and of the length that a shift leaves as well."""
    p = problems.make((2, 30), V=101, shift=1)
    ids = torch.randint(0, 3, (2, 30), device=p.e.device)

    def fn(nll, w):
        return torch.where(w == 1, nll, 0.5 * nll)

    results = [
        linear_token_loss(p.e, p.c, p.targets, fn, per_token={"w": w}, shift=1, schedule=schedule)
        for w in (ids, ids[:, 1:])
    ]
    assert torch.equal(*results)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("schedule", ["rows", "vocabulary"])
def test_rows_are_returned(schedule):
    p = problems.make((2, 30), V=101, shift=1)
    _, rows = call(p, dft, {}, return_rows=True, schedule=schedule)
    nll = losses.token_log_probs(p.e, p.c, p.targets, shift=1).log_probs
    assert rows.keys() == {"nll"} and not rows["nll"].requires_grad
    torch.testing.assert_close(rows["nll"], -nll.detach())


# Autograd -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("schedule", ["rows", "vocabulary"])
def test_backward_twice_and_scaled(schedule):
    p = problems.make((330,), V=1021, bias=True)
    loss = call(p, focal, {}, schedule=schedule)
    first = torch.autograd.grad(3 * loss, p.parameters, retain_graph=True)
    again = torch.autograd.grad(3 * loss, p.parameters)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    once = torch.autograd.grad(call(p, focal, {}, schedule=schedule), p.parameters)
    for a, b in zip(first, once):
        torch.testing.assert_close(a, 3 * b)


def test_what_a_second_backward_reads_may_not_change():
    """The first is made with the loss: it may."""
    p = problems.make((64,), V=101)
    w, advantages = torch.ones(64), torch.ones(1)
    weighted = linear_token_loss(p.e, p.c, p.targets, lambda nll, w: nll * w, per_token={"w": w})
    policy = losses.linear_loss(
        "policy", p.e[None], p.c, p.targets[None], advantages=advantages, loss_type="bnpo"
    ).loss
    for loss, tensor in ((weighted, w), (policy, advantages)):
        first = torch.autograd.grad(loss, p.e, retain_graph=True)[0]
        again = torch.autograd.grad(loss, p.e, retain_graph=True)[0]
        assert torch.equal(first, again)
        tensor.mul_(2)
        with pytest.raises(RuntimeError, match="changed in place since forward"):
            torch.autograd.grad(loss, p.e)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("frozen", ["e", "c", "bias"])
def test_frozen(frozen):
    p = problems.make((64,), V=101, bias=True)
    whole = dict(zip("e c bias".split(), torch.autograd.grad(call(p, dft, {}), p.parameters)))
    getattr(p, frozen).requires_grad_(False)
    call(p, dft, {}).backward()
    for name, gradient in whole.items():
        if name == frozen:
            assert getattr(p, name).grad is None
        else:
            torch.testing.assert_close(getattr(p, name).grad, gradient)


@pytest.mark.usefixtures("device")
def test_without_gradients():
    p = problems.make((64,), V=101)
    expected = call(p, dft, {})
    with torch.no_grad():
        loss = call(p, dft, {})
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach())


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("schedule", ["rows", "vocabulary"])
def test_no_token_counts(schedule):
    p = problems.make((9,), V=11)
    p.targets.fill_(-100)
    loss = call(p, dft, {}, schedule=schedule)
    assert loss.isnan()
    assert not any(g.any() for g in torch.autograd.grad(loss, p.parameters))
    assert call(p, dft, {}, schedule=schedule, normalizer=3) == 0


@pytest.mark.usefixtures("device")
def test_autocast(device):
    p = problems.make((64,), V=256, D=32)
    rounded = p.to(BF16)
    with torch.autocast(device, BF16):
        loss = call(p, focal, {})
    grads = torch.autograd.grad(loss, p.parameters)
    assert all(g.dtype == F32 for g in grads)
    q = Problem(*(t.detach().double().requires_grad_() for t in rounded.parameters), p.targets,
                None, {})  # fmt: skip
    q = Problem(q.e, q.c, p.targets, None, {})
    truth = by_hand(q, focal, {})
    torch.testing.assert_close(loss.double(), truth, rtol=1e-3, atol=1e-4)
    for a, b in zip(grads, torch.autograd.grad(truth, q.parameters)):
        torch.testing.assert_close(a.double(), b, rtol=2e-2, atol=2e-4)


@pytest.mark.usefixtures("device")
def test_layouts_that_are_copied():
    p = problems.make((64,), V=256, D=32)
    expected = torch.autograd.grad(call(p, dft, {}, schedule="rows"), p.parameters)
    p.c = p.c.detach().T.contiguous().T.requires_grad_()
    p.e = p.e.detach().T.contiguous().T.requires_grad_()
    for a, b in zip(torch.autograd.grad(call(p, dft, {}, schedule="rows"), p.parameters), expected):
        assert torch.equal(a, b)


def test_no_second_derivative():
    p = problems.make()
    (de,) = torch.autograd.grad(call(p, dft, {}, schedule="rows"), p.e, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        de.sum().backward()


def test_compiled():
    p = problems.make((65,), V=101)
    compiled = torch.compile(lambda e, c: linear_token_loss(e, c, p.targets, focal), fullgraph=True)
    values = [
        (loss, *torch.autograd.grad(loss, p.parameters))
        for loss in (compiled(p.e, p.c), call(p, focal, {}))
    ]
    for a, b in zip(*values):
        torch.testing.assert_close(a, b)


# Refusals -----------------------------------------------------------------------------------------

_parameter = torch.ones((), requires_grad=True)
REFUSED = {
    "mean": (lambda nll: nll / nll.mean().detach(), ValueError, "depends on other rows"),
    "gradient_of_mean": (lambda nll: nll + (nll.sum() - nll.sum().detach()), ValueError, "depends on other rows"),
    "order": (lambda nll: nll.cumsum(0), ValueError, "depends on other rows"),
    "number": (lambda nll: nll / nll.numel(), ValueError, "depends on other rows"),
    "first": (lambda nll: nll - nll[0].detach(), ValueError, "depends on other rows"),
    "place": (lambda nll: nll * torch.arange(len(nll)), ValueError, "depends on other rows"),
    "largest": (lambda nll: nll / nll.max().detach(), ValueError, "depends on other rows"),
    "least": (lambda nll: nll - nll.min().detach(), ValueError, "depends on other rows"),
    "neighbours": (lambda nll: nll * nll.detach().roll(2), ValueError, "depends on other rows"),
    "chance": (lambda nll: nll * torch.rand_like(nll), ValueError, "differs from call to call"),
    "one_number": (lambda nll: nll.mean(), ValueError, r"shape \(\d+,\), got \(\): leave sums"),
    "detached": (lambda nll: nll.detach(), ValueError, "has no gradient"),
    "whole": (lambda nll: nll.long(), TypeError, "got torch.int64"),
    "no_tensor": (lambda nll: 3.0, TypeError, "got float"),
    "parameter": (lambda nll: nll * _parameter, NotImplementedError, r"shape \(\) that requires"),
}


@pytest.mark.parametrize("schedule", ["rows", "vocabulary"])
@pytest.mark.parametrize("fn, error, message", REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize("rows", [2, 24, 77])
def test_functions_that_are_refused(fn, error, message, schedule, rows):
    if rows == 2 and fn is REFUSED["neighbours"][0]:
        return  # rolls onto itself
    for seed in range(4):
        p = problems.make((rows,), ignored=0.0, seed=seed)
        with pytest.raises(error, match=message):
            call(p, fn, {}, schedule=schedule)


@pytest.mark.parametrize(
    "how, error, message",
    [
        (dict(per_token=torch.ones(24)), TypeError, "dict of tensors by name, got Tensor"),
        (dict(per_token={"w": 3.0}), TypeError, "w.*must be a torch.Tensor, got float"),
        (dict(per_token={"nll": torch.ones(24)}), ValueError, "'nll': fn has its own"),
        (dict(per_token={"w": torch.ones(23)}), ValueError, r"\(24,\).*got \(23,\)"),
        (dict(per_token={"w": torch.ones(24, requires_grad=True)}), ValueError, "no gradient for"),
        (dict(normalizer=0), ValueError, "normalizer must be finite and > 0, got 0"),
        (dict(normalizer=torch.ones(2)), ValueError, r"one number, got \(2,\)"),
        (dict(entropy=1), TypeError, "entropy"),
        (dict(fn=3), TypeError, "function of nll, got int"),
        (dict(fn=lambda nll, entropy: nll), TypeError, "called with nll .*: entropy=True"),
        (dict(per_token={"w": torch.ones(24)}), TypeError, "called with nll, w"),
        (dict(schedule="columns"), ValueError, "columns"),
    ],
    ids=without_address,
)
def test_arguments_that_are_refused(how, error, message):
    p = problems.make()
    with pytest.raises(error, match=message):
        linear_token_loss(p.e, p.c, p.targets, how.pop("fn", dft), **how)


def test_an_error_in_fn_is_the_callers():
    p = problems.make()

    def fails(nll):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        call(p, fails, {})


# CUDA --------------------------------------------------------------------------------------------


@cuda
@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@functions
def test_nothing_waits_on_cuda(dtype, fn, takes):
    p = problems.make((3, 40), V=1021, D=64, dtype=dtype)
    normalizer = torch.tensor(7.0, device="cuda")
    how = dict(inputs_of(p, takes), normalizer=normalizer)
    expected = linear_token_loss(p.e, p.c, p.targets, fn, **how)  # a function that is new waits
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = linear_token_loss(p.e, p.c, p.targets, fn, **how)
        grads = torch.autograd.grad(loss, p.parameters)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(loss, expected)
    assert all(g.isfinite().all() for g in grads)


@cuda
@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize("fn, takes", [FUNCTIONS["dft"]], ids=["dft"])
def test_graph_on_cuda(fn, takes):
    p = problems.make((300,), V=1021, D=64, dtype=BF16)
    other = problems.make((300,), V=1021, D=64, dtype=BF16, seed=1)

    def step(p):
        loss = call(p, fn, takes)
        return loss, *torch.autograd.grad(loss, p.parameters)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(p)
    torch.cuda.current_stream().wait_stream(side)
    graph = problems.graph()
    with torch.cuda.graph(graph):
        captured = step(p)
    with torch.no_grad():
        for mine, theirs in zip((*p.parameters, p.targets), (*other.parameters, other.targets)):
            mine.copy_(theirs)
    graph.replay()
    for a, b in zip(captured, step(other), strict=True):
        assert torch.equal(a, b)

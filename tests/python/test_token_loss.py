"""linear_token_loss, and policy losses by rows, against the same functions of stored logits."""

import collections
import enum
import functools
import types

import problems
import pytest
import reference
import torch
from labels import without_address
from problems import BF16, F16, F32, F64, OPTION_SETS, Problem
from tolerance import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from cutloss import losses
from cutloss._core import decide
from cutloss._core.options import SCHEDULES, Options
from cutloss._core.plan import Plan
from cutloss._torch import by_rows, library
from cutloss.losses import _row_function, linear_token_loss


def dft(nll):
    return nll.neg().exp().detach() * nll


def focal(nll):
    return (1 - nll.neg().exp()) ** 2 * nll


def of_everything(nll, entropy, lse, w):
    return w[:, 0] * nll.exp().clamp(max=3.0) + w[:, 1] * entropy - 1e-2 * lse**2


FUNCTIONS = {
    "dft": (dft, {}),
    "focal": (focal, {}),
    "of_everything": (of_everything, dict(entropy=True, lse=True)),
}
functions = pytest.mark.parametrize("fn, takes", FUNCTIONS.values(), ids=FUNCTIONS.keys())

HEADS = {
    name: OPTION_SETS[name]
    for name in ("default", "bias", "softcap", "row_temperature", "shift", "nothing_ignored")
}
HEADS["everything"] = dict(
    bias=True, softcap=4.0, logit_scale=1.5, shift=2, temperature=HEADS["row_temperature"]["temperature"]
)
heads = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())


def slices_of(p: Problem) -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    return torch.rand(*p.targets.shape, 2, generator=g).to(p.targets.device)


def inputs_of(p: Problem, takes) -> dict:
    return dict(takes, per_token={"w": slices_of(p)}) if takes else {}


def call(p: Problem, fn, takes, **how):
    return linear_token_loss(
        p.e, p.c, p.targets, fn, p.bias, **inputs_of(p, takes), **p.options, **how
    )


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


def smallest(p: Problem, fn, takes) -> int:
    """Bytes of the plan by rows with the smallest chunks."""
    with pytest.raises((ValueError, NotImplementedError)) as error:
        call(p, fn, takes, schedule="rows", max_workspace=0)
    if "no engine goes by schedule rows" in str(error.value):
        pytest.skip(str(error.value))
    least = plan_by_rows(p, wants_entropy="entropy" in takes).least_bytes
    assert f"the smallest plan needs {least} bytes" in str(error.value)
    return least


def plan_by_rows(p: Problem, **options) -> Plan:
    needs = dict(needs_de=True, needs_dc=True, needs_dbias=p.bias is not None)
    options = Options(
        p.e.dtype, **needs, schedule=SCHEDULES["rows"], shift=p.options.get("shift", 0), **options
    )
    e = p.e.reshape(-1, *p.e.shape[-2:])
    targets = p.targets.reshape(e.shape[:-1])
    sizes = decide.sizes_of(e, p.c, p.bias, targets, None, None)
    return library.plan(sizes.arguments(known_at_forward=True), options)


@pytest.fixture
def chunks(monkeypatch):
    """How many chunks each call went by: its length says how many calls went by rows."""
    seen = []
    make = by_rows._make

    def counted(operands, options, start):
        seen.append(0)

        class Counted:
            def __init__(self):
                self.inner = start()

            def coefficients(self, rows, at):
                seen[-1] += 1
                return self.inner.coefficients(rows, at)

            def value(self, at):
                return self.inner.value(at)

        return make(operands, options, Counted)

    monkeypatch.setattr(by_rows, "_make", counted)
    return seen


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


@pytest.fixture
def calls(monkeypatch):
    """How many rows each call of a caller's function had."""
    seen = []
    inner = _row_function._call

    def counted(fn, rows):
        seen.append(len(rows["nll"]))
        return inner(fn, rows)

    monkeypatch.setattr(_row_function, "_call", counted)
    monkeypatch.setattr(_row_function, "_known", collections.OrderedDict())
    return seen


def test_a_function_is_looked_at_once(calls, chunks):
    p = problems.make((3, 270), V=531, D=16)
    most = smallest(p, dft, {})
    del calls[:], chunks[:]
    for extra in (2, 0):  # with other rows changed, and with fewer rows
        call(p, dft, {}, schedule="rows", max_workspace=most)
        assert chunks[-1] > 4 and len(calls) == chunks[-1] + extra
        del calls[:]
    call(p, dft, {}, schedule="vocabulary")
    assert len(calls) == 1
    call(p.to(F64), dft, {})  # of another dtype
    assert len(calls) == 1 + 3
    again = types.FunctionType(dft.__code__, globals())  # as in a cell that is run again
    call(p, again, {}, schedule="rows")
    assert len(calls) == 1 + 3 + 1


def test_a_function_is_looked_at_in_every_call_where_that_is_asked_for(calls, monkeypatch):
    monkeypatch.setenv("CUTLOSS_CHECK", "1")
    p = problems.make((64,))
    for _ in range(2):
        call(p, dft, {}, schedule="vocabulary")
    assert len(calls) == 2 * 3


def maybe_coupled(nll, couples):
    return nll / nll.mean().detach() if couples else 2 * nll


class Flag(enum.Enum):
    OFF = 0
    ON = 1


class Switched:
    """A function that lies in an object, whole or as a method."""

    def __init__(self, couples):
        self.options = {"couples": couples}

    def __call__(self, nll):
        return maybe_coupled(nll, self.options["couples"])

    method = __call__


switch = types.ModuleType("switch")


def by_module(couples):
    switch.couples = couples
    return lambda nll: maybe_coupled(nll, switch.couples)


def by_function_of_module(couples):
    switch.helper = by_helper(couples)
    return lambda nll: switch.helper(nll)


def by_global(couples):
    scope = {"maybe_coupled": maybe_coupled, "couples": couples}
    exec("def fn(nll): return maybe_coupled(nll, couples)", scope)
    return scope["fn"]


def by_helper(couples):
    def helper(nll):
        return maybe_coupled(nll, couples)

    return lambda nll: helper(nll)


def by_attribute(couples):
    def fn(nll):
        return maybe_coupled(nll, fn.couples)

    fn.couples = couples
    return fn


STEERED = {
    "closure": lambda couples: lambda nll: maybe_coupled(nll, couples),
    "tuple": lambda couples: lambda nll, of=(1, couples): maybe_coupled(nll, of[1]),
    "keyword": lambda couples: lambda nll, *, of=couples: maybe_coupled(nll, of),
    "number": lambda couples: lambda nll, power=float(couples): nll / nll.mean().detach() ** power,
    "string": lambda couples: lambda nll, way="ab"[couples]: maybe_coupled(nll, way == "b"),
    "enum": lambda couples: lambda nll, of=Flag(int(couples)): maybe_coupled(nll, of is Flag.ON),
    "none": lambda couples: lambda nll, of=1 if couples else None: maybe_coupled(nll, of),
    "partial": lambda couples: functools.partial(maybe_coupled, couples=couples),
    "partials": lambda couples: functools.partial(functools.partial(maybe_coupled), couples=couples),
    "object": Switched,
    "method": lambda couples: Switched(couples).method,
    "global": by_global,
    "module": by_module,
    "helper": by_helper,
    "helper_of_module": by_function_of_module,
    "attribute": by_attribute,
    "decorated": lambda couples: torch.enable_grad()(by_helper(couples)),
}


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("schedule", ["rows", "vocabulary"])
@pytest.mark.parametrize("steered", STEERED.values(), ids=STEERED.keys())
def test_a_function_is_looked_at_again_where_it_is_steered_otherwise(steered, schedule):
    """Of the same code, after it was seen to keep rows apart."""
    p = problems.make((77,))
    for _ in range(2):
        call(p, steered(False), {}, schedule=schedule)
        with pytest.raises(ValueError, match="depends on other rows"):
            call(p, steered(True), {}, schedule=schedule)
    assert _row_function._known


@pytest.mark.parametrize("steered", STEERED.values(), ids=STEERED.keys())
def test_a_function_that_is_made_anew_is_known(steered, calls):
    p = problems.make((77,))
    for n in (3, 1):
        del calls[:]
        call(p, steered(False), {})
        assert len(calls) == n


def test_a_switch_that_is_turned_between_calls(calls):
    p, fn = problems.make((77,)), Switched(False)
    call(p, fn, {})
    fn.options["couples"] = True
    with pytest.raises(ValueError, match="depends on other rows"):
        call(p, fn, {})


def test_what_shows_nothing_is_not_remembered(calls):
    """A few rows, or rows that are alike: a classifier of zeros makes them so, and the mean of the
    loss over rows is each row's own."""
    mean = REFUSED["mean"][0]
    alike = problems.make((77,))
    alike.c.data.zero_()
    for p, fn in ((alike, mean), (problems.make((15,)), dft)):
        for _ in range(2):
            del calls[:]
            call(p, fn, {})
            assert len(calls) == 3 and not _row_function._known
    with pytest.raises(ValueError, match="depends on other rows"):
        call(problems.make((77,)), mean, {})


def test_what_is_alike_in_one_column_shows_nothing(calls):
    p = problems.make((77,))

    def loss(w):
        return linear_token_loss(
            p.e, p.c, p.targets, lambda nll, w: nll * w[:, 0] / w[:, 1].mean(), per_token={"w": w}
        )

    loss(torch.stack([torch.rand(77), torch.ones(77)], 1))
    assert not _row_function._known
    with pytest.raises(ValueError, match="depends on other rows"):
        loss(torch.rand(77, 2))


def test_a_single_row_shows_nothing(calls):
    mean = REFUSED["mean"][0]
    call(problems.make((1,), ignored=0.0), mean, {})
    assert len(calls) == 1 and not _row_function._known
    with pytest.raises(ValueError, match="depends on other rows"):
        call(problems.make((77,)), mean, {})


def test_without_a_gradient_its_derivative_is_not_seen(calls):
    fn, *_ = REFUSED["gradient_of_mean"]
    p = problems.make((77,))
    with torch.no_grad():
        call(p, fn, {})
    with pytest.raises(ValueError, match="depends on other rows"):
        call(p, fn, {})


def test_what_is_remembered_is_bounded(calls):
    p = problems.make((77,))
    for i in range(_row_function._MOST_KNOWN + 3):
        call(p, lambda nll, i=i: nll * i + nll, {}, schedule="vocabulary")
    assert len(_row_function._known) == _row_function._MOST_KNOWN


def test_what_steers_a_function_beyond_what_is_compared(calls):
    """Too much to compare, or of a kind that cannot be: it is looked at in every call."""

    class Slots:
        __slots__ = ("couples",)

    slots, many = Slots(), [[i] for i in range(1000)]
    slots.couples = False
    p = problems.make((77,))
    for fn in (lambda nll: maybe_coupled(nll, slots.couples), lambda nll: nll * (1 + len(many[7]))):
        for _ in range(2):
            del calls[:]
            call(p, fn, {})
            assert len(calls) == 3


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


# Policy losses ------------------------------------------------------------------------------------

TOKENS = (6, 23)
POLICY = {name: dict(loss_type=name) for name in ("grpo", "bnpo", "dapo", "luspo", "sapo")}
POLICY |= {
    "cispo": dict(loss_type="cispo", epsilon_high=1.1),
    "dr_grpo": dict(loss_type="dr_grpo", max_completion_length=30),
    "delta": dict(loss_type="bnpo", delta=1.5, old=True),
    "kl": dict(loss_type="grpo", beta=0.1, old=True),
    "plain_kl": dict(loss_type="dapo", beta=0.1, use_bias_correction_kl=False),
    "entropy": dict(loss_type="bnpo", entropy_coef=0.02, old=True),
    "items": dict(loss_type="dapo", num_items_in_batch=200),
    "sampler": dict(loss_type="dapo", old=True, sampled=True),
    "sampler_of_tokens": dict(
        loss_type="dapo", sampled=True, sampling_correction="token_truncate"
    ),
    "token_advantages": dict(loss_type="bnpo", token_advantages=True),
}
COUPLED = {
    "gspo": dict(loss_type="grpo", importance_sampling_level="sequence", old=True),
    "vespo": dict(loss_type="vespo", old=True),
    "off_policy": dict(loss_type="grpo", off_policy_mask_threshold=0.1, old=True),
    "quantile": dict(loss_type="grpo", top_entropy_quantile=0.5),
    "own_sampler": dict(loss_type="grpo", sampled=True),
}


def policy_case(dtype, options, shift) -> tuple[Problem, torch.Tensor, dict]:
    p = problems.make(TOKENS, V=211, D=16, dtype=dtype, ignored=0.3, shift=shift, bias=True)
    p.targets[-1] = -100
    options = dict(options)
    kinds = {k: options.pop(k, False) for k in ("old", "sampled", "token_advantages")}
    with torch.no_grad():
        now = losses.token_log_probs(p.e, p.c, p.targets, p.bias, shift=shift).log_probs
    g = torch.Generator().manual_seed(1)

    def near(t, by):
        return t + by * torch.randn(t.shape, generator=g).to(t.device)

    advantages = torch.randn(now.shape if kinds["token_advantages"] else now.shape[0], generator=g)
    if kinds["old"]:
        options["old_log_probs"] = near(now, 0.3)
    if kinds["sampled"]:
        options["sampling_log_probs"] = near(now, 0.1)
    if "beta" in options:
        options["reference"] = near(now, 0.3)
    return p, advantages.to(now), options


def compare(p: Problem, advantages, options, **how):
    needs_entropy = bool(options.keys() & {"entropy_coef", "top_entropy_quantile"})
    rows = losses.linear_loss(
        "policy", p.e, p.c, p.targets, p.bias, advantages=advantages, **p.options, **options, **how
    )
    policy = losses.token_log_probs(
        p.e, p.c, p.targets, p.bias, return_entropy=needs_entropy, **p.options
    )
    whole = losses.policy_loss(policy, advantages, **options)
    assert rows.metrics.keys() == whole.metrics.keys()
    pairs = [(rows.loss, whole.loss), *((rows.metrics[k], whole.metrics[k]) for k in rows.metrics)]
    pairs += zip(
        torch.autograd.grad(rows.loss, p.parameters), torch.autograd.grad(whole.loss, p.parameters)
    )
    tolerance = dict(rtol=3e-2, atol=1e-3) if p.e.dtype == BF16 else dict(rtol=1e-4, atol=1e-6)
    for a, b in pairs:
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("options", POLICY.values(), ids=POLICY.keys())
def test_policy_losses_by_rows(options, dtype, shift, chunks):
    p, advantages, options = policy_case(dtype, options, shift)
    compare(p, advantages, options)
    # On Hopper entropies rule out the schedule by rows.
    assert len(chunks) == 1 or ("entropy_coef" in options and p.e.device.type == "cuda")


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("options", COUPLED.values(), ids=COUPLED.keys())
def test_policy_losses_that_couple_tokens(options, chunks):
    compare(*policy_case(F32, options, 1))
    assert not chunks


def long_policy_case(options) -> tuple[Problem, torch.Tensor, dict, int]:
    """Sequences that do not fit into one chunk of the smallest plan, whose bytes come last."""
    p, advantages, options = policy_case(F32, options, 1)
    p.e = p.e.detach().repeat(1, 20, 1).requires_grad_()
    p.targets = p.targets.repeat(1, 20)
    p.targets[2, 40:] = -100  # of another length
    with torch.no_grad():
        now = losses.token_log_probs(p.e, p.c, p.targets, p.bias, shift=1).log_probs
    for name in options.keys() & {"old_log_probs", "reference", "sampling_log_probs"}:
        options[name] = now + 0.1 * torch.randn(now.shape)
    if advantages.dim() == 2:
        advantages = torch.randn(now.shape)
    wants_entropy = "entropy_coef" in options
    return p, advantages, options, plan_by_rows(p, wants_entropy=wants_entropy).least_bytes


@pytest.mark.parametrize("options", POLICY.values(), ids=POLICY.keys())
def test_policy_losses_in_several_chunks(options, chunks):
    p, advantages, options, most = long_policy_case(options)
    with pytest.raises(ValueError, match=f"the smallest plan needs {most} bytes"):
        compare(p, advantages, options, schedule="rows", max_workspace=0)
    compare(p, advantages, options, schedule="rows", max_workspace=most)
    assert chunks[-1] > 4
    compare(p, advantages, options, schedule="rows")
    assert chunks[-1] == 1


def test_a_policy_loss_of_no_token():
    p, advantages, options = policy_case(F32, POLICY["entropy"], 0)
    p.targets.fill_(-100)
    how = dict(options, advantages=advantages, schedule="rows")
    loss = losses.linear_loss("policy", p.e, p.c, p.targets, p.bias, **how).loss
    assert loss == 0
    assert not any(g.any() for g in torch.autograd.grad(loss, p.parameters))


def test_entries_that_are_no_row_change_nothing(monkeypatch):
    """As lists of rows have them on CUDA, in chunks without any row too."""
    p, advantages, options, most = long_policy_case(POLICY["kl"])
    of_chunk = by_rows._coefficients

    def grads():
        how = dict(schedule="rows", max_workspace=most, shift=1)
        policy = losses.linear_loss(
            "policy", p.e, p.c, p.targets, p.bias, advantages=advantages, **options, **how
        ).loss
        token = linear_token_loss(p.e, p.c, p.targets, focal, p.bias, **how)
        return policy, token, *torch.autograd.grad(policy + token, p.parameters)

    def padded(row_loss, listed, *rest):
        none = torch.full((3,), -1)
        of_chunk(row_loss, none, *rest)
        return of_chunk(row_loss, torch.cat([none, listed, none]), *rest)

    expected = grads()
    monkeypatch.setattr(by_rows, "_coefficients", padded)
    for a, b in zip(grads(), expected, strict=True):
        torch.testing.assert_close(a, b)


class Written(TorchDispatchMode):
    """How many elements operators have written."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op is torch.ops.aten.index_copy_.default:  # into a tensor of all rows
            self.elements += args[3].numel()
        elif not op.is_view and op is not torch.ops.aten.new_empty.default:
            made = out if isinstance(out, (tuple, list)) else [out]
            self.elements += sum(t.numel() for t in made if isinstance(t, torch.Tensor))
        return out


@pytest.mark.parametrize("options", POLICY.values(), ids=POLICY.keys())
def test_a_chunk_of_a_policy_loss_costs_its_own_rows(options, chunks, monkeypatch):
    """Between the products no chunk works on the batch: their work adds up to that of one."""
    p, advantages, options, most = long_policy_case(options)
    of_chunk, written = by_rows._coefficients, []

    def counted(*args):
        with Written() as mode:
            made = of_chunk(*args)
        written[-1] += mode.elements
        return made

    monkeypatch.setattr(by_rows, "_coefficients", counted)
    for max_workspace in (None, most):
        written.append(0)
        losses.linear_loss(
            "policy", p.e, p.c, p.targets, p.bias, advantages=advantages, schedule="rows",
            max_workspace=max_workspace, **p.options, **options,
        )  # fmt: skip
    one, several = written
    assert chunks[0] == 1 and chunks[1] > 4
    assert one > p.targets.numel() and several < 1.2 * one


# CUDA ---------------------------------------------------------------------------------------------

cuda = pytest.mark.skipif(
    not (torch.cuda.is_available() and library.HAS_CUDA),
    reason="no CUDA device, or a build without CUDA",
)


@pytest.fixture
def _on_cuda(monkeypatch):
    monkeypatch.setattr(problems, "device", "cuda")
    monkeypatch.delenv("CUTLOSS_CHECK", raising=False)


@cuda
@pytest.mark.usefixtures("_on_cuda")
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
@pytest.mark.usefixtures("_on_cuda")
def test_policy_losses_wait_for_nothing_on_cuda():
    p, advantages, options = policy_case(BF16, POLICY["kl"], 1)
    how = dict(advantages=advantages, **p.options, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = losses.linear_loss("policy", p.e, p.c, p.targets, p.bias, **how).loss
        torch.autograd.grad(loss, p.parameters)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@cuda
@pytest.mark.usefixtures("_on_cuda")
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


@cuda
@pytest.mark.usefixtures("_on_cuda")
def test_a_coupled_function_on_cuda():
    """An error when it is new; never a plausible number."""
    p = problems.make((40,), V=101, D=16)

    def depends(nll, power):
        return nll / nll.mean().detach() ** power

    seen = functools.partial(depends, power=0)  # its rows are apart, as far as can be seen
    call(p, seen, {})
    with pytest.raises(ValueError, match="depends on other rows"):
        call(p, functools.partial(depends, power=1), {})
    for i in range(_row_function._MOST_LOOKS):
        call(p, functools.partial(depends, power=1e-30 * i), {})
    assert call(p, functools.partial(depends, power=2), {}).isnan()

    with pytest.raises(ValueError, match="depends on other rows"):
        call(p, lambda nll: nll - nll.mean(), {})

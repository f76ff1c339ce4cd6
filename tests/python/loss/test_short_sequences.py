"""Sequences that are no longer than the shift: a last micro-batch, a rank's share of a sequence.

They predict nothing, as in the models of transformers: a sum of 0, a mean of NaN, gradients of
zero, no per-token results, and logits all the same where logits are made.
"""

import math

import pytest
import torch
from helpers import problems
from helpers.problems import BF16, F16, F32
from helpers.sequence_losses import CALLS, TYPES

import cutloss
from cutloss import losses

pytestmark = pytest.mark.usefixtures("device")

V, D, B = 37, 8, 4
SHORT = [(1, 1), (1, 5), (3, 3), (0, 1)]  # length, shift
short = pytest.mark.parametrize("length, shift", SHORT)


def inputs(length, dtype=F32):
    g = torch.Generator().manual_seed(0)
    e, c, bias = (
        torch.randn(*shape, generator=g).to(problems.device, dtype).requires_grad_()
        for shape in ((B, length, D), (V, D), (V,))
    )
    targets = torch.randint(0, V, (B, length), generator=g).to(problems.device)
    return e, c, targets, bias


def expect_nothing(loss, parameters, mean=False):
    """Of a loss of no tokens: its value, and zeros for all that it depends on."""
    assert loss.shape == () and (loss.isnan() if mean else loss == 0), loss
    for t, g in zip(parameters, torch.autograd.grad(loss, parameters)):
        assert g.shape == t.shape and (g == 0).all()


def of_shape(length, make):
    return make(B, length, device=problems.device)


# Everything that makes another path through the library; each by the length.
OPTIONS = {
    "default": lambda n: {},
    "vocabulary": lambda n: dict(schedule="vocabulary"),
    "rows": lambda n: dict(schedule="rows"),
    "torch": lambda n: dict(impl="torch"),
    "torch_extras": lambda n: dict(impl="torch", return_lse=True, return_entropy=True),
    "extras": lambda n: dict(return_lse=True, return_entropy=True, return_predictions=True),
    "terms": lambda n: dict(label_smoothing=0.1, z_loss=1e-3, softcap=5.0, logit_scale=0.5,
                            weight=torch.rand(V, device=problems.device)),
    "token_weight": lambda n: dict(token_weight=of_shape(n, torch.rand)),
    "weights_with_gradient": lambda n: dict(token_weight=of_shape(n, torch.rand).requires_grad_()),
    "temperatures": lambda n: dict(temperature=of_shape(n, torch.ones)),
    "num_valid": lambda n: dict(num_valid=0),
}  # fmt: skip
ONLY_LINEAR = ("schedule", "impl", "num_valid")


@short
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_cross_entropy(length, shift, name, reduction):
    e, c, targets, bias = inputs(length)
    options = OPTIONS[name](length)
    result = cutloss.linear_cross_entropy(
        e, c, targets, bias, shift=shift, reduction=reduction, **options
    )
    loss, *rows = result if isinstance(result, tuple) else (result,)
    assert len(rows) == sum(k.startswith("return_") for k in options)
    if reduction == "none":
        rows.append(loss)
        loss = loss.sum()
    assert all(r.shape == (B, 0) for r in rows)
    expect_nothing(loss, (e, c, bias), mean=reduction == "mean")


@short
@pytest.mark.parametrize("name", [n for n in OPTIONS if not {*OPTIONS[n](1)} & {*ONLY_LINEAR}])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy(length, shift, name, reduction):
    z = inputs(length)[0] @ inputs(length)[1].T
    z = z.detach().requires_grad_()
    targets = inputs(length)[2]
    options = OPTIONS[name](length)
    result = cutloss.cross_entropy(z, targets, shift=shift, reduction=reduction, **options)
    loss, *rows = result if isinstance(result, tuple) else (result,)
    if reduction == "none":
        rows.append(loss)
        loss = loss.sum()
    assert all(r.shape == (B, 0) for r in rows)
    expect_nothing(loss, (z,), mean=reduction == "mean")


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_in_16_bits(dtype):
    if not problems.has_engine(dtype):
        pytest.skip(f"no engine takes {dtype} on {problems.device}")
    e, c, targets, bias = inputs(1, dtype)
    loss = cutloss.linear_cross_entropy(e, c, targets, bias, shift=1, reduction="sum")
    expect_nothing(loss, (e, c, bias))
    z = (e @ c.T).detach().requires_grad_()
    expect_nothing(cutloss.cross_entropy(z, targets, shift=1), (z,), mean=True)


def test_consumed_logits():
    e, c, targets, _ = inputs(1)
    loss = cutloss.cross_entropy(e @ c.T, targets, shift=1, reduction="sum", consume_logits=True)
    expect_nothing(loss, (e, c))


def test_one_sequence_without_a_batch():
    e, c, targets, _ = inputs(1)
    e = e.detach()[0].requires_grad_()
    loss = cutloss.linear_cross_entropy(e, c, targets[0], shift=1, reduction="none")
    assert loss.shape == (0,)
    expect_nothing(loss.sum(), (e, c))


@pytest.mark.parametrize("consume", [False, True])
def test_causal_lm_loss(consume):
    e, c, labels, _ = inputs(1)
    loss = cutloss.CausalLMLoss(V, consume_logits=consume)
    expect_nothing(loss(e @ c.T, labels, num_items_in_batch=6), (e, c))
    expect_nothing(loss(e @ c.T, labels), (e, c), mean=True)
    expect_nothing(loss((e @ c.T)[0, 0].clone(), labels[0, 0]), (e, c), mean=True)


@pytest.mark.parametrize("hidden_size", [None, 6], ids=["", "projected"])
def test_heads(hidden_size):
    head = cutloss.CausalLMHead(D, V, hidden_size=hidden_size, bias=True).to(problems.device)
    hidden = torch.randn(B, 1, hidden_size or D, device=problems.device, requires_grad=True)
    labels = inputs(1)[2]
    parameters = (hidden, *head.parameters())
    out = head(hidden, labels, num_items_in_batch=6)
    assert out.logits is None
    expect_nothing(out.loss, parameters)
    expect_nothing(head(hidden, labels).loss, parameters, mean=True)
    out = head.eval()(hidden, labels)
    assert out.logits.shape == (B, 1, V) and out.logits.isfinite().all() and out.loss.isnan()


def test_modules():
    e, c, targets, bias = inputs(1)
    made = cutloss.LinearCrossEntropy(shift=1, reduction="sum")(e, c, targets, bias)
    expect_nothing(made, (e, c, bias))
    owner = cutloss.LinearCrossEntropyLoss(in_features=D, out_features=V, shift=1)
    owner = owner.to(problems.device)
    expect_nothing(owner(e, targets), (e, owner.weight), mean=True)
    by_name = cutloss.get_loss("cut_cross_entropy", shift=1, reduction="sum")
    expect_nothing(by_name(e, c, targets), (e, c))


@short
@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_log_probs(length, shift, impl):
    e, c, targets, bias = inputs(length)
    made = losses.token_log_probs(
        e, c, targets, bias, shift=shift, impl=impl, return_entropy=True,
        return_log_sum_sq_probs=True,
    )  # fmt: skip
    assert made.log_probs.shape == made.entropy.shape == made.mask.shape == (B, 0)
    expect_nothing(made.log_probs.sum() + made.entropy.sum(), (e, c, bias))


@short
@pytest.mark.parametrize("schedule", ["rows", "vocabulary"])
@pytest.mark.parametrize("normalizer", [None, 6.0])
def test_token_loss(length, shift, schedule, normalizer):
    e, c, targets, bias = inputs(length)
    loss, rows = losses.linear_token_loss(
        e, c, targets, lambda nll, w: w * nll.exp(), bias, shift=shift, schedule=schedule,
        per_token={"w": of_shape(length, torch.rand)}, normalizer=normalizer, return_rows=True,
    )  # fmt: skip
    assert all(t.shape == (B, 0) for t in rows.values())
    expect_nothing(loss, (e, c, bias), mean=normalizer is None)


@short
def test_evaluation(length, shift):
    e, c, targets, bias = inputs(length)
    weight = of_shape(length, torch.rand)
    for token_weight in (None, weight):
        made = losses.evaluate(e, c, targets, bias, shift=shift, token_weight=token_weight)
        assert (made.sums == 0).all()
        assert all(t.isnan() for t in (made.nll(), made.perplexity(), made.accuracy()))
    nll = cutloss.linear_cross_entropy(e, c, targets, shift=shift, reduction="none")
    assert losses.perplexity(nll).isnan()


KINDS = [(name, kind) for name in CALLS for kind in TYPES.get(name, [None])]


@pytest.mark.parametrize("name, kind", KINDS)
def test_losses_by_name(name, kind):
    """As where no token counts, which padding alone makes of longer sequences."""
    options = dict(CALLS[name])
    pairs = name not in ("kto", "policy")
    for key, value in options.items():
        if isinstance(value, list):
            options[key] = torch.tensor(value[:B], device=problems.device)
    if kind is not None:
        options["loss_type"] = kind
    if kind == "dr_grpo":
        options["max_completion_length"] = 16
    assert not pairs or B % 2 == 0

    def made(length, ignored):
        e, c, targets, bias = inputs(length)
        if ignored:
            targets = torch.full_like(targets, -100)
        how = dict(options)
        if how.pop("reference", False):
            how["reference"] = tuple(t.detach() + 0.1 for t in (e, c, bias))
        result = losses.linear_loss(name, e, c, targets, bias, shift=1, **how)
        gradients = torch.autograd.grad(result.loss, (e, c, bias), allow_unused=True)
        return result, gradients

    short, gradients = made(1, ignored=False)
    padded, of_padding = made(3, ignored=True)
    assert torch.equal(short.loss.isnan(), padded.loss.isnan())
    torch.testing.assert_close(short.loss, padded.loss, equal_nan=True)
    assert short.metrics.keys() == padded.metrics.keys()
    for key in short.metrics:
        torch.testing.assert_close(short.metrics[key], padded.metrics[key], equal_nan=True)
    for g, other in zip(gradients, of_padding):
        assert (g is None) == (other is None)
        assert g is None or torch.equal(g.isnan().any(), other.isnan().any())
        assert g is None or other.isnan().any() or (g == 0).all()


@short
@pytest.mark.parametrize("kind", ["dense", "top_k"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_distillation(length, shift, kind, reduction):
    e, c, targets, bias = inputs(length)
    how = dict(bias=bias, shift=shift, reduction=reduction, hard_weight=0.5)
    if kind == "dense":
        teacher = e.detach() + 0.1, c.detach()
        made = losses.linear_distillation(e, c, *teacher, targets, **how)
    else:
        ids = torch.arange(3, device=problems.device).expand(B, length, 3)
        log_probs = torch.full(ids.shape, math.log(0.25), device=problems.device)
        made = losses.linear_distillation_top_k(e, c, ids, log_probs, targets, **how)
    assert made.loss.shape == ((B, 0) if reduction == "none" else ())
    assert all(value == 0 for value in made.metrics.values())
    expect_nothing(made.loss.sum(), (e, c, bias))


def test_compiled():
    torch.compiler.reset()
    compiled = torch.compile(
        lambda e, c, t: cutloss.linear_cross_entropy(e, c, t, shift=2, reduction="sum"),
        fullgraph=True, dynamic=True,
    )  # fmt: skip
    for length in (5, 1, 2):
        e, c, targets, _ = inputs(length)
        want = cutloss.linear_cross_entropy(e, c, targets, shift=2, reduction="sum")
        loss = compiled(e, c, targets)
        torch.testing.assert_close(loss, want)
        for a, b in zip(torch.autograd.grad(loss, (e, c)), torch.autograd.grad(want, (e, c))):
            torch.testing.assert_close(a, b)


REFUSED = [
    (dict(shift=-1), ValueError, "shift must be >= 0, got -1"),
    (dict(shift=1.5), TypeError, "shift must be a bool or an int, got 1.5"),
]


@pytest.mark.parametrize("options, error, message", REFUSED)
def test_what_stays_refused(options, error, message):
    e, c, targets, _ = inputs(1)
    for call in (
        lambda: cutloss.linear_cross_entropy(e, c, targets, **options),
        lambda: cutloss.cross_entropy(e @ c.T, targets, **options),
        lambda: losses.token_log_probs(e, c, targets, **options),
    ):
        with pytest.raises(error, match=message):
            call()


def test_a_target_is_no_sequence():
    e, c, targets, _ = inputs(1)
    with pytest.raises(ValueError, match=r"shape \(\), which are no sequence, got 1"):
        cutloss.linear_cross_entropy(e[0, 0], c, targets[0, 0], shift=1)

"""The coefficients of the loss: those of the operator are those of PyTorch's own operators."""

import itertools
import math

import pytest
import torch
from helpers import problems
from helpers.inside import Options, library, weighting
from helpers.problems import BF16, F32, F64
from torch.autograd import forward_ad

from cutloss import linear_cross_entropy

pytestmark = pytest.mark.usefixtures("device")

V = 13
WEIGHTS = list(itertools.product([False, True], repeat=2))


def targets_of(kind, dtype):
    targets = torch.randint(0, V, (3, 700), generator=torch.Generator().manual_seed(1))
    if kind == "some_ignored":
        targets[targets == 4] = -100
        targets[0] = -100
    elif kind == "all_ignored":
        targets[:] = -100
    elif kind == "out_of_range":
        targets[1, 5], targets[1, 6] = V, -7
    elif kind == "none":
        targets = targets[:0]
    return targets.to(problems.device, dtype)


def both(targets, how, shift, stats):
    torch_made = weighting.terms(targets, V, how, shift, -100, stats)
    options = Options(stats, shift=shift)
    packed, undefined = library.loss_terms(targets, V, how, options)
    return torch_made, weighting.unpacked(packed), undefined


@pytest.mark.parametrize("stats", [F32, F64], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
def test_operator_and_torch_agree(stats, reduction, smoothing, z_loss):
    generator = torch.Generator().manual_seed(2)
    kinds = ("dense", "some_ignored", "all_ignored", "out_of_range", "none")
    for kind, (has_weight, has_tokens), shift in itertools.product(kinds, WEIGHTS, (0, 2)):
        targets = targets_of(kind, torch.int64 if shift else torch.int32)
        weight = torch.rand(V, generator=generator).to(problems.device) if has_weight else None
        tokens = None
        if has_tokens:
            tokens = torch.rand(targets.shape, generator=generator).to(problems.device, BF16)
            tokens[targets == -100] = math.nan  # not read
        how = weighting.Weighting(reduction, smoothing, z_loss, weight, tokens)
        want, got, undefined = both(targets, how, shift, stats)
        name = f"{kind} weight={has_weight} tokens={has_tokens} shift={shift}"
        assert undefined.item() == (want.undefined is not None and want.undefined.item()), name
        assert undefined.item() == (reduction == "mean" and kind in ("all_ignored", "none")), name
        for term in ("nll", "lse", "lse_squared", "zbar"):
            a, b = getattr(got, term), getattr(want, term)
            assert (a is None) == (b is None), f"{name}: {term}"
            if a is not None:  # sums in another order may round the last digit otherwise
                rtol = 4 * torch.finfo(stats).eps
                torch.testing.assert_close(a, b, rtol=rtol, atol=0.0, msg=f"{name}: {term}")


def test_weights_of_which_none_count():
    """A total of 0, though tokens count: undefined, and coefficients of 0."""
    targets = targets_of("dense", torch.int64)
    tokens = torch.ones_like(targets, dtype=F32)
    tokens[:, 1::2] = -1.0
    no_class = torch.zeros(V, device=problems.device)
    for weight, token_weight in ((None, tokens), (no_class, None)):
        how = weighting.Weighting("mean", 0.1, 1e-3, weight, token_weight)
        want, got, undefined = both(targets, how, 0, F32)
        assert undefined.item() and want.undefined.item()
        for term in ("nll", "lse", "lse_squared", "zbar"):
            assert not getattr(got, term).any() and not getattr(want, term).any()


@pytest.mark.parametrize("schedule", ["rows", "vocabulary"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_with_a_gradient_change_nothing_else(reduction, schedule):
    """Token weights that carry a gradient take PyTorch's coefficients, others the operator's."""
    p = problems.make((3, 9), z_loss=1e-2, label_smoothing=0.1, shift=1, reduction=reduction)
    token_weight = torch.rand(3, 9).to(problems.device)

    def run(weights):
        loss = linear_cross_entropy(
            p.e, p.c, p.targets, token_weight=weights, schedule=schedule, **p.options
        )
        return loss, torch.autograd.grad(loss.sum(), p.parameters)

    loss, gradients = run(token_weight)
    same, same_gradients = run(token_weight.clone().requires_grad_())
    torch.testing.assert_close(loss, same, rtol=1e-6, atol=1e-6)
    for a, b in zip(gradients, same_gradients):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:token_weight adds up to 0")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("undefined", [False, True])
def test_the_gradient_of_token_weights(reduction, undefined):
    """That of PyTorch's own formula; where the weights add up to nothing, zero and not NaN."""
    p = problems.make((3, 9), z_loss=1e-2, label_smoothing=0.1, reduction=reduction)
    weights = torch.zeros(3, 9) if undefined else torch.rand(3, 9)

    def gradient(impl):
        w = weights.to(problems.device).requires_grad_()
        more = dict(p.options, impl=impl)
        loss = linear_cross_entropy(p.e, p.c, p.targets, token_weight=w, **more)
        return torch.autograd.grad(loss.sum(), w)[0]

    got = gradient("cce")
    assert got.isfinite().all()
    if undefined and reduction == "mean":
        assert not got.any()
    torch.testing.assert_close(got, gradient("torch"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_with_a_tangent(reduction):
    """Forward mode reaches weights through PyTorch's own operators."""
    p = problems.make((3, 9), reduction=reduction)
    e, c = p.e.detach(), p.c.detach()
    for name, values in (("token_weight", torch.rand(3, 9)), ("weight", torch.rand(c.shape[0]))):
        values = values.to(problems.device)
        tangents = []
        for impl in ("cce", "torch"):
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(values, torch.ones_like(values))
                more = {**p.options, name: dual, "impl": impl}
                loss = linear_cross_entropy(e, c, p.targets, **more)
                tangents.append(forward_ad.unpack_dual(loss).tangent)
        assert tangents[0].any()
        torch.testing.assert_close(*tangents, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{}, {"schedule": "vocabulary"}, {"label_smoothing": 0.1, "z_loss": 1e-3}, {"return_lse": True}],
    ids=["auto", "vocabulary", "terms", "lse"],
)
@pytest.mark.filterwarnings("ignore:token_weight adds up to 0")
@pytest.mark.parametrize("nothing", ["ignored", "weights"])
def test_gradients_of_a_mean_of_nothing_are_zero_whatever_comes_back(nothing, options):
    p = problems.make((3, 9))
    more = dict(options)
    if nothing == "ignored":
        p.targets.fill_(-100)
    else:
        more["token_weight"] = torch.zeros(3, 9, device=problems.device)
    loss = linear_cross_entropy(p.e, p.c, p.targets, **more)
    loss = loss[0] if isinstance(loss, tuple) else loss
    assert loss.isnan()
    for gradient in torch.autograd.grad(loss.square(), (p.e, p.c)):  # NaN comes back
        assert not gradient.any()


def test_the_loss_may_be_changed_in_place():
    """Backward needs what forward returned of nll; the loss is the caller's own."""
    p = problems.make(reduction="none")
    loss = linear_cross_entropy(p.e, p.c, p.targets, **p.options)
    expected = torch.autograd.grad(2 * loss.sum(), p.parameters, retain_graph=True)
    loss.mul_(2.0)
    for got, want in zip(torch.autograd.grad(loss.sum(), p.parameters), expected):
        torch.testing.assert_close(got, want)

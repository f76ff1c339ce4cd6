"""Many upstream gradients for one loss, as Jacobians of several losses have them: is_grads_batched,
and torch.vmap around autograd.grad. Each loss gives the same bits as one by one, or an error."""

import pytest
import torch
from helpers import problems
from torch.autograd.functional import jacobian
from torch.utils.flop_counter import FlopCounterMode

from cutloss import cross_entropy, linear_cross_entropy, losses

pytestmark = [
    pytest.mark.usefixtures("device"),
    pytest.mark.filterwarnings("error:There is a performance drop"),
]

V, D = 29, 8


def nll_of(h, c, y, **options):
    return linear_cross_entropy(h, c, y, **options)


def distilled(h, c, y, **options):
    torch.manual_seed(1)
    teacher = torch.randn(h.shape).to(h), torch.randn(V, D).to(h)
    return losses.linear_distillation(h, c, *teacher, y, hard_weight=0.5, **options).loss


def policy(h, c, y, **options):
    advantages = torch.linspace(-1, 1, len(y)).to(h.device)[None]
    options = {"advantages": advantages, **options}
    return losses.linear_loss("policy", h[None], c, y[None], **options).loss


def logits_of(h, c):
    """Logits whose own gradient has no sum of many terms: a product of PyTorch's rounds otherwise
    where it is batched."""
    return torch.cat((h, -h, 2 * h, h[:, : V - 3 * D]), dim=1) + 0 * c.sum()


def with_lse(h, c, y):
    loss, lse = linear_cross_entropy(h, c, y, return_lse=True)
    return torch.stack((loss, lse.sum()))


LOSSES = {
    "mean by rows": lambda h, c, y: nll_of(h, c, y, schedule="rows"),
    "mean by vocabulary": lambda h, c, y: nll_of(h, c, y, schedule="vocabulary"),
    "sum": lambda h, c, y: nll_of(h, c, y, reduction="sum"),
    "none": lambda h, c, y: nll_of(h, c, y, reduction="none"),
    "smoothed": lambda h, c, y: nll_of(h, c, y, label_smoothing=0.1, z_loss=1e-3),
    "kept logits and lse": with_lse,
    "frozen classifier": lambda h, c, y: nll_of(h, c.detach(), y) + 0 * c.sum(),
    "logits": lambda h, c, y: cross_entropy(logits_of(h, c), y),
    "logits, none": lambda h, c, y: cross_entropy(logits_of(h, c), y, reduction="none"),
    "log-probabilities": lambda h, c, y: losses.token_log_probs(h, c, y).log_probs,
    "token loss": lambda h, c, y: losses.linear_token_loss(h, c, y, lambda nll: nll.square()),
    "policy": policy,
    "distillation": distilled,
    "distillation by vocabulary": lambda h, c, y: distilled(h, c, y, schedule="vocabulary"),
    "distillation, none": lambda h, c, y: distilled(h, c, y, reduction="none"),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def one_by_one(y, x, upstream):
    made = [torch.autograd.grad(y, x, u, retain_graph=True) for u in upstream]
    return tuple(map(torch.stack, zip(*made)))


def grads_batched(y, x, upstream):
    return torch.autograd.grad(y, x, upstream, is_grads_batched=True)


def in_vmap(y, x, upstream):
    return torch.vmap(lambda u: torch.autograd.grad(y, x, u))(upstream)


def in_vmap_of_vmap(y, x, upstream):
    both = torch.stack((upstream, 3 * upstream), dim=1)
    inner = torch.vmap(lambda u: torch.autograd.grad(y, x, u))
    return tuple(g[:, 0] for g in torch.vmap(inner)(both))


WAYS = (grads_batched, in_vmap, in_vmap_of_vmap)
every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


def inputs(dtype=torch.float32, ignored=True):
    torch.manual_seed(0)
    h = torch.randn(6, D).to(problems.device, dtype).requires_grad_()
    c = torch.randn(V, D).to(problems.device, dtype).requires_grad_()
    y = torch.randint(V, (6,))
    if ignored:
        y[2] = -100
    return h, c, y.to(problems.device)


def upstream_of(value):
    return torch.randn(3, *value.shape).to(value)


@every_loss
@every_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_same_bits_as_one_by_one(loss, way, dtype):
    h, c, y = inputs(dtype)
    upstream = upstream_of(loss(h, c, y))
    expected = one_by_one(loss(h, c, y), (h, c), upstream)
    got = way(loss(h, c, y), (h, c), upstream)
    for g, want in zip(got, expected, strict=True):
        assert g.dtype == dtype and torch.equal(g, want)
    assert all((want != 0).any() for want in expected[:1])


@every_loss
@every_way
def test_more_than_once(loss, way):
    """Before and after others; nothing writes into what an earlier one has returned."""
    h, c, y = inputs()
    upstream = upstream_of(loss(h, c, y))
    expected = one_by_one(loss(h, c, y), (h, c), upstream)
    value = loss(h, c, y)
    first = torch.autograd.grad(value, (h, c), upstream[0], retain_graph=True)
    kept = [g.clone() for g in first]

    def once_more(y, x, upstream):
        return torch.autograd.grad(y, x, upstream, is_grads_batched=True, retain_graph=True)

    for _ in range(2):
        for got, want in zip(once_more(value, (h, c), upstream), expected, strict=True):
            assert torch.equal(got, want)
    last = torch.autograd.grad(value, (h, c), upstream[0])
    for a, b, k in zip(first, last, kept, strict=True):
        assert torch.equal(a, k) and torch.equal(b, k)


def test_the_jacobian_of_two_losses():
    h, c, y = inputs()
    for loss in LOSSES.values():
        both = (loss(h, c, y).sum(), h.square().sum() + c.sum())
        (want,) = torch.autograd.grad(both[0], h, retain_graph=True)
        eye = torch.eye(2, device=h.device)
        got, _ = torch.autograd.grad(both, (h, c), tuple(eye), is_grads_batched=True)
        torch.testing.assert_close(got, torch.stack((want, 2 * h.detach())))


def test_vectorized_jacobian():
    h, c, y = inputs()

    def f(h):
        return linear_cross_entropy(h, c, y, reduction="none")

    assert torch.equal(jacobian(f, h, vectorize=True), jacobian(f, h))


def test_a_mean_of_nothing():
    h, c, y = inputs()
    for loss in (LOSSES["mean by rows"], LOSSES["mean by vocabulary"], LOSSES["logits"]):
        for way in WAYS:
            value = loss(h, c, torch.full_like(y, -100))
            assert value.isnan()
            for g in way(value, (h, c), torch.ones(3, device=h.device)):
                assert g.shape[0] == 3 and (g == 0).all()


@every_way
def test_second_order_is_still_refused(way):
    h, c, y = inputs()
    for loss in (LOSSES["mean by rows"], LOSSES["mean by vocabulary"], LOSSES["distillation"]):
        value = loss(h, c, y)
        v = torch.ones(2, device=h.device)
        (g,) = torch.autograd.grad(value, h, v, is_grads_batched=True, create_graph=True)
        with pytest.raises(NotImplementedError, match="first derivatives only"):
            torch.autograd.grad(g.sum(), h)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@every_way
def test_consumed_logits(reduction, way):
    """A gradient made in forward is there to be multiplied; one that is to be written over the
    logits in backward can be written once."""
    h, c, y = inputs()
    v = upstream_of(cross_entropy(logits_of(h, c), y, reduction=reduction))
    want = one_by_one(cross_entropy(logits_of(h, c), y, reduction=reduction), (h, c), v)
    loss = cross_entropy(logits_of(h, c), y, reduction=reduction, consume_logits=True)
    if reduction == "none":
        with pytest.raises(NotImplementedError, match="consume_logits writes one gradient"):
            way(loss, (h, c), v)
        return
    for a, b in zip(way(loss, (h, c), v), want, strict=True):
        assert torch.equal(a, b)


@every_way
def test_operations_are_counted_for_each(way):
    for name in ("mean by vocabulary", "distillation, none"):
        h, c, y = inputs()
        counted = []
        for how in (one_by_one, way):
            value = LOSSES[name](h, c, y)
            with FlopCounterMode(display=False) as counter:
                how(value, (h, c), upstream_of(value))
            counted.append(counter.get_total_flops())
        assert counted[0] > 0
        assert counted[1] == counted[0] * (2 if way is in_vmap_of_vmap else 1)


@pytest.mark.parametrize("loss", ["mean by rows", "none", "logits"])
def test_compiled(loss):
    """Right, or an error of PyTorch's, which decides there; never another number."""
    torch._dynamo.reset()
    h, c, y = inputs()
    f = LOSSES[loss]
    upstream = upstream_of(f(h, c, y))
    expected = one_by_one(f(h, c, y), (h, c), upstream)
    value = torch.compile(f, backend="aot_eager")(h, c, y)
    for got, want in zip(grads_batched(value, (h, c), upstream), expected, strict=True):
        torch.testing.assert_close(got, want)

"""Inside torch.vmap a tensor says that it requires no gradient though it may stand for one that
does: gradients are there all the same, or the call is refused."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import problems

from cutloss import cross_entropy, linear_cross_entropy, losses

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

B, N, V, D = 3, 6, 29, 8
NAMES = ("e", "c", "bias", "targets", "weight")


def torch_loss(e, c, bias, targets, weight):
    return (weight * F.cross_entropy(F.linear(e, c, bias), targets, reduction="none")).sum()


def by_rows(e, c, bias, targets, weight):
    return linear_cross_entropy(
        e, c, targets, bias, token_weight=weight, reduction="sum", schedule="rows"
    )


def by_vocabulary(e, c, bias, targets, weight):
    return linear_cross_entropy(
        e, c, targets, bias, token_weight=weight, reduction="sum", schedule="vocabulary"
    )


def per_token(e, c, bias, targets, weight):
    return (weight * linear_cross_entropy(e, c, targets, bias, reduction="none")).sum()


def log_probs(e, c, bias, targets, weight):
    return -(weight * losses.token_log_probs(e, c, targets, bias=bias).log_probs).sum()


def tensors(batched, wanted=()):
    torch.manual_seed(0)
    shapes = dict(e=(N, D), c=(V, D), bias=(V,), targets=(N,), weight=(N,))
    made = {}
    for name, shape in shapes.items():
        shape = (B, *shape) if name in batched else shape
        made[name] = torch.randint(V, shape) if name == "targets" else torch.randn(shape)
        made[name].requires_grad_(name in wanted)
    return made


def gradients(loss, batched, wanted):
    given = tensors(batched, wanted)
    dims = tuple(0 if name in batched else None for name in NAMES)
    torch.vmap(loss, in_dims=dims)(*given.values()).sum().backward()
    return {name: t.grad for name, t in given.items()}


def check(loss, batched, wanted):
    expected = gradients(torch_loss, batched, wanted)
    for name, got in gradients(loss, batched, wanted).items():
        assert (got is None) == (name not in wanted), name
        if got is not None:
            torch.testing.assert_close(got, expected[name], rtol=1e-4, atol=1e-5)


def subsets(names):
    return [s for n in range(1, len(names) + 1) for s in itertools.combinations(names, n)]


@pytest.mark.parametrize("batched", subsets(NAMES), ids="-".join)
def test_each_in_dims(batched):
    for wanted in subsets(("e", "c", "bias")):
        check(by_rows, batched, wanted)
    check(by_vocabulary, batched, ("e", "c", "bias"))


@pytest.mark.parametrize("loss", (by_rows, by_vocabulary, per_token, log_probs))
@pytest.mark.parametrize("wanted", (("e",), ("e", "c", "bias"), ("weight",)), ids="-".join)
def test_leaves_that_are_batched(loss, wanted):
    check(loss, NAMES, wanted)
    check(loss, ("e", "targets", "weight"), wanted)


def test_nested():
    def twice(loss):
        dims = (0, None, None, 0, 0)
        e, c, bias, targets, weight = tensors(("e", "targets", "weight"), ("e", "c")).values()
        inner = torch.vmap(loss, in_dims=dims)
        args = (e.expand(2, *e.shape), c, bias, targets.expand(2, *targets.shape))
        torch.vmap(inner, in_dims=dims)(*args, weight.expand(2, *weight.shape)).sum().backward()
        return e.grad, c.grad

    for got, want in zip(twice(by_rows), twice(torch_loss), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", ("grad of vmap", "vmap of grad"))
def test_transforms_of_transforms(order):
    e, c, bias, targets, weight = tensors(("e", "targets", "weight")).values()

    def gradients_of(loss):
        def f(e, c, targets, weight):
            return loss(e, c, bias, targets, weight)

        dims = (0, None, 0, 0)
        if order == "vmap of grad":
            return torch.vmap(torch.func.grad(f, argnums=(0, 1, 3)), in_dims=dims)(
                e, c, targets, weight
            )

        def total(*args):
            return torch.vmap(f, in_dims=dims)(*args).sum()

        return torch.func.grad(total, argnums=(0, 1, 3))(e, c, targets, weight)

    for got, want in zip(gradients_of(by_rows), gradients_of(torch_loss), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", (by_rows, per_token))
def test_compiled(loss):
    """A tracer cannot ask the tensor that is batched."""
    whole = torch.compile(
        lambda *args: torch.vmap(loss, in_dims=(0, None, None, 0, 0))(*args).sum(),
        backend="aot_eager",
    )
    batched, wanted = ("e", "targets", "weight"), ("e", "c")
    given = tensors(batched, wanted)
    whole(*given.values()).backward()
    expected = gradients(torch_loss, batched, wanted)
    for name in wanted:
        torch.testing.assert_close(given[name].grad, expected[name], rtol=1e-4, atol=1e-5)


def test_compiled_loss_of_logits():
    def f(logits, targets):
        return torch.vmap(lambda z, t: cross_entropy(z, t, reduction="sum"))(logits, targets).sum()

    z, targets = torch.randn(B, N, V, requires_grad=True), torch.randint(V, (B, N))
    torch.compile(f, backend="aot_eager", fullgraph=True)(z, targets).backward()
    (expected,) = torch.autograd.grad(
        F.cross_entropy(z.flatten(0, 1), targets.flatten(), reduction="sum"), z
    )
    torch.testing.assert_close(z.grad, expected)


def test_policy_loss():
    given = tensors(("e", "targets", "weight"), ("e", "c", "bias"))
    e, c, bias, targets, advantages = given.values()

    def loss(e, targets, advantages):
        options = dict(advantages=advantages[None], schedule="rows")
        return losses.linear_loss("policy", e[None], c, targets[None], bias, **options).loss

    together = torch.vmap(loss)(e, targets, advantages).sum()
    one_by_one = sum(map(loss, e, targets, advantages))
    got, want = (torch.autograd.grad(total, (e, c, bias)) for total in (together, one_by_one))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_constants_that_require_a_gradient():
    """They are refused inside as they are outside."""
    p = problems.make(dtype=torch.float32)
    V = p.c.shape[0]
    weight = torch.rand(B, V, requires_grad=True)
    temperature = torch.ones(B, 1, requires_grad=True)
    with pytest.raises(ValueError, match="no gradient for weight"):
        torch.vmap(lambda w: linear_cross_entropy(p.e, p.c, p.targets, weight=w))(weight)
    with pytest.raises(ValueError, match="no gradient for temperature"):
        torch.vmap(lambda t: linear_cross_entropy(p.e, p.c, p.targets, temperature=t))(temperature)


def test_losses_that_refuse():
    e, c, _, targets, _ = tensors(("e", "targets"), ("e", "c")).values()

    def token(e, t):
        return losses.linear_token_loss(e, c, t, lambda nll: nll.square())

    def distillation(e, t):
        return losses.linear_distillation(e, c, e.detach(), c.detach(), t).loss

    def of_logits(e, t):
        return cross_entropy(e @ c.T, t)

    refusals = (
        (token, "inside torch.vmap: loop over the batch"),
        (distillation, "no transforms of torch.func"),
        (of_logits, "use torch.nn.functional.cross_entropy there"),
    )
    for loss, words in refusals:
        with pytest.raises(NotImplementedError, match=words):
            torch.vmap(loss)(e, targets)

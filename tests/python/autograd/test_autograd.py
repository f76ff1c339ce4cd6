"""What autograd promises: gradients, repetition, second order refused, transforms, checkpoints."""

import gc
import weakref

import pytest
import torch
from helpers import problems, reference
from helpers.inside import library
from helpers.problems import BF16, F16, F32, F64
from torch.utils.checkpoint import checkpoint

from cutloss import LinearCrossEntropy, linear_cross_entropy

pytestmark = pytest.mark.usefixtures("device")

# The two families of operators, and both schedules of the second.
WAYS = {
    "immediate": {},
    "kept_logits": {"return_lse": True},
    "vocabulary": {"return_lse": True, "schedule": "vocabulary"},
    "vocabulary_mean": {"schedule": "vocabulary"},
}
ways = pytest.mark.parametrize("options", WAYS.values(), ids=WAYS.keys())


def loss_of(p, **options):
    result = linear_cross_entropy(p.e, p.c, p.targets, p.bias, **p.options, **options)
    return result[0] + result[1].sum() if isinstance(result, tuple) else result


@ways
@pytest.mark.parametrize(
    "name", ["default", "bias", "softcap", "weight_smoothing", "shift", "z_loss"]
)
def test_gradcheck(name, options):
    p = problems.make((2, 5), V=13, D=4, dtype=F64, **problems.OPTION_SETS[name])

    def f(*parameters):
        bias = parameters[2] if len(parameters) == 3 else None
        return linear_cross_entropy(*parameters[:2], p.targets, bias, **p.options, **options)

    assert torch.autograd.gradcheck(f, p.parameters)


def test_gradcheck_of_every_output():
    p = problems.make((2, 5), V=13, D=4, dtype=F64, **problems.OPTION_SETS["lse_entropy_none"])
    for schedule in ("rows", "vocabulary"):
        assert torch.autograd.gradcheck(
            lambda e, c: linear_cross_entropy(e, c, p.targets, schedule=schedule, **p.options),
            (p.e, p.c),
        )


@ways
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_second_backward_gives_the_same_gradients(options, dtype):
    p = problems.make(bias=True, dtype=dtype)
    loss = loss_of(p, **options)
    first = torch.autograd.grad(loss, p.parameters, retain_graph=True)
    kept = [g.clone() for g in first]
    scaled = torch.autograd.grad(loss * 4, p.parameters, retain_graph=True)
    last = torch.autograd.grad(loss, p.parameters)
    for a, b, c, d in zip(first, scaled, last, kept):
        assert torch.equal(a, c)
        if dtype == F16:  # entries near 0 have fewer digits in fp16 than four times them
            torch.testing.assert_close(b, 4 * a, rtol=1e-3, atol=1e-6)
        else:
            assert torch.equal(b, 4 * a)
        assert torch.equal(a, d), "a later backward changed an earlier result"
        assert len({a.data_ptr(), b.data_ptr(), c.data_ptr()}) == 3
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, p.parameters)


@ways
def test_gradients_accumulate(options):
    p = problems.make(bias=True)
    loss_of(p, **options).backward()
    once = [t.grad.clone() for t in p.parameters]
    (2 * loss_of(p, **options)).backward()
    for t, g in zip(p.parameters, once):
        torch.testing.assert_close(t.grad, 3 * g)


def test_forward_gradients_are_handed_over():
    """Nothing keeps the gradients that forward made once backward has returned them."""
    p = problems.make()
    loss = loss_of(p)
    de, dc = torch.autograd.grad(loss, p.parameters, retain_graph=True)
    alive = [weakref.ref(t) for t in (de, dc)]
    del de, dc
    gc.collect()
    assert all(ref() is None for ref in alive)


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize("factor", [1.0, 1 / 3, 1e-3, 65536.0])
def test_upstream_factor(factor, dtype):
    """The factor is not rounded to the dtype of the gradient before it multiplies."""
    p = problems.make(bias=True, dtype=dtype)
    ones = torch.autograd.grad(loss_of(p), p.parameters)
    scaled = torch.autograd.grad(loss_of(p) * factor, p.parameters)
    for a, b in zip(ones, scaled):
        rounded = torch.tensor(factor, dtype=F64 if dtype == F64 else F32)
        expected = a.double() * rounded.to(a.device)
        assert torch.equal(b, expected.to(dtype))


@ways
def test_second_order_is_refused(options):
    p = problems.make()
    (de,) = torch.autograd.grad(loss_of(p, **options), p.e, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only.*impl='torch'"):
        torch.autograd.grad(de.square().sum(), p.e)
    (de,) = torch.autograd.grad(loss_of(p, **options), p.e, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        (loss_of(p, **options) + de.sum()).backward()


def test_second_order_of_the_plain_path():
    p = problems.make((6,), V=9, D=3, dtype=F64)
    assert torch.autograd.gradgradcheck(
        lambda e, c: linear_cross_entropy(e, c, p.targets, impl="torch"), (p.e, p.c)
    )


@ways
def test_create_graph_without_a_second_derivative(options):
    p = problems.make()
    expected = torch.autograd.grad(loss_of(p, **options), p.parameters)
    for g, want in zip(
        torch.autograd.grad(loss_of(p, **options), p.parameters, create_graph=True), expected
    ):
        assert torch.equal(g.detach(), want)


@ways
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(options, use_reentrant):
    p = problems.make(bias=True)
    loss_of(p, **options).backward()
    expected = [t.grad for t in p.parameters]
    for t in p.parameters:
        t.grad = None

    def f(e, c, bias):
        result = linear_cross_entropy(e * 1, c, p.targets, bias, **options)
        return result[0] + result[1].sum() if isinstance(result, tuple) else result

    checkpoint(f, *p.parameters, use_reentrant=use_reentrant).backward()
    for t, want in zip(p.parameters, expected):
        torch.testing.assert_close(t.grad, want)


@pytest.mark.parametrize(
    "use_reentrant, expected",
    [(False, [3, 3]), (True, [1, 3])],
)
def test_what_a_checkpoint_costs(use_reentrant, expected, monkeypatch):
    """docs/training-stacks.md says it in matrix products."""
    p = problems.make()
    called, call = [], library.call
    monkeypatch.setattr(
        library, "call", lambda op, *a, **k: (called.append((op, k)), call(op, *a, **k))[1]
    )
    loss = checkpoint(lambda e: loss_of(p, schedule="rows"), p.e, use_reentrant=use_reentrant)
    loss.backward()
    products = [
        1 + k.get("needs_de", False) + k.get("needs_dc", False)
        for op, k in called
        if str(op) == "cutloss.loss_and_gradients"
    ]
    assert products == expected


@pytest.mark.parametrize("name", ["e", "c"])
@ways
def test_memory_that_was_freed(name, options):
    """As FSDP frees a weight, which keeps its shape: an error where it would be read."""
    p = problems.make()
    whole = {"e": p.e, "c": p.c}
    rows = torch.cat([torch.zeros(1, 16).to(problems.device), whole[name].detach()])
    gone = rows[1:].requires_grad_()  # not at the beginning of its storage
    arguments = {**whole, name: gone}

    def loss():
        result = linear_cross_entropy(**arguments, targets=p.targets, **options)
        return result[0] + result[1].sum() if isinstance(result, tuple) else result

    expected = torch.autograd.grad(loss(), arguments.values())
    waiting = loss()
    gone.untyped_storage().resize_(0)
    match = rf"memory of {name}, .* has been freed.* in the forward of the module"
    with pytest.raises(RuntimeError, match=match):
        loss()
    if not options:  # gradients that forward made need nothing more
        for got, want in zip(torch.autograd.grad(waiting, arguments.values()), expected):
            assert torch.equal(got, want)
        return
    with pytest.raises(RuntimeError, match=match):
        torch.autograd.grad(waiting, arguments.values())


def test_saved_tensors_can_be_moved_away():
    p = problems.make(bias=True)
    expected = torch.autograd.grad(loss_of(p, return_lse=True), p.parameters)
    with torch.autograd.graph.save_on_cpu():
        loss = loss_of(p, return_lse=True)
    for got, want in zip(torch.autograd.grad(loss, p.parameters), expected):
        assert torch.equal(got, want)


@ways
def test_a_changed_input_is_noticed(options):
    """The second backward reads the inputs again: they must be those of forward."""
    p = problems.make()
    loss = loss_of(p, **options)
    torch.autograd.grad(loss, p.parameters, retain_graph=True)
    with torch.no_grad():
        p.c.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, p.parameters)


def test_a_loss_that_uses_part_of_the_results():
    p = problems.make(return_lse=True, return_entropy=True)
    q = p.to(F64)
    _, lse, entropy = linear_cross_entropy(p.e, p.c, p.targets, **p.options)
    expected = reference.evaluate(q)
    for ours, theirs in ((lse, expected["lse"]), (entropy, expected["entropy"])):
        got = torch.autograd.grad(ours.sum(), p.parameters, retain_graph=True)
        want = torch.autograd.grad(theirs.sum(), q.parameters, retain_graph=True)
        for a, b in zip(got, want):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def functional(p, **options):
    def f(e, c):
        result = linear_cross_entropy(e, c, p.targets, **options)
        return result[0] + result[1].sum() if isinstance(result, tuple) else result

    return f


@ways
def test_torch_func_reverse_mode(options):
    p = problems.make(dtype=problems.widest())
    f = functional(p, **options)
    expected = torch.autograd.grad(f(p.e, p.c), p.parameters)
    e, c = p.e.detach(), p.c.detach()
    for got, want in zip(torch.func.grad(f, argnums=(0, 1))(e, c), expected):
        torch.testing.assert_close(got, want)
    value, pull = torch.func.vjp(f, e, c)
    for got, want in zip(pull(torch.full_like(value, 2.0)), expected):
        torch.testing.assert_close(got, 2 * want)
    value, grads = torch.vmap(torch.func.grad_and_value(f), in_dims=(0, None))(
        torch.stack([e, 2 * e]), c
    )[::-1]
    for i in range(2):
        x = (e * (i + 1)).requires_grad_()
        one = f(x, c)
        torch.testing.assert_close(value[i], one.detach())
        torch.testing.assert_close(grads[i], torch.autograd.grad(one, x)[0])


@ways
def test_torch_func_refuses_what_it_cannot_do(options):
    """Forward mode and second order: an error, never a zero."""
    p = problems.make(dtype=problems.widest())
    f = functional(p, **options)
    e, c = p.e.detach(), p.c.detach()
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda e: f(e, c), (e,), (torch.ones_like(e),))
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.hessian(f)(e, c)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        torch.func.grad(lambda e: torch.func.grad(f)(e, c).square().sum())(e)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(e, torch.ones_like(e))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            f(dual, c)


def test_functional_call_of_a_module():
    p = problems.make()
    module = LinearCrossEntropy(shift=True, z_loss=1e-3)
    batch = (p.e[None], p.c, p.targets[None])
    expected = module(*batch)
    torch.testing.assert_close(torch.func.functional_call(module, {}, batch), expected)

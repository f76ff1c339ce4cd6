"""What went wrong in losses of this kind before, elsewhere: each a test, named after the symptom.

Short on purpose, and a second time where another file looks closer: a look through the names says
what is guarded against. Elsewhere alone: more than 2^31 logits and sharded tensors in
test_bad_input.py, waiting for the device in devices/test_cuda.py.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers import problems, reference
from helpers.problems import BF16, F16, F32, F64
from helpers.tolerance import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from cutloss import CausalLMHead, LinearCrossEntropyLoss, linear_cross_entropy, losses

pytestmark = pytest.mark.usefixtures("device")


def gradients_of(loss, p, upstream=None):
    wanted = [t for t in p.parameters if t.requires_grad]
    return torch.autograd.grad(loss, wanted, upstream)


def ours(p, **more):
    return linear_cross_entropy(p.e, p.c, p.targets, p.bias, **p.options, **more)


def compare(p, upstream=None, **more):
    """Loss and gradients: against fp64, with the errors of the plain path beside it."""
    exact = p.to(F64)
    results = []
    for loss, q in ((ours(p, **more), p), (None, exact), (None, p)):
        loss = reference.evaluate(q)["loss"] if loss is None else loss
        factors = None if upstream is None else upstream.to(loss.dtype)
        results.append((loss, *gradients_of(loss, q, factors)))
    for name, value, truth, plain in zip(("loss", "de", "dc", "dbias"), *results):
        assert_close(value, truth, plain, name)


# Wrong numbers, silently ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_reduction_none_has_right_gradients(dtype):
    """Each token's own upstream factor reaches e, c and bias."""
    p = problems.make((40,), V=211, D=24, dtype=dtype, bias=True, reduction="none")
    upstream = torch.linspace(-1, 2, 40, device=problems.device)
    compare(p, upstream)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("schedule", ["rows", "vocabulary"])
def test_bias_gets_its_gradient(schedule, dtype):
    p = problems.make((40,), V=211, D=24, dtype=dtype, bias=True)
    compare(p, schedule=schedule)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_nll_is_never_negative(dtype):
    """The target's logit and the sum it is in come from one product."""
    p = problems.make((300,), V=509, D=64, dtype=dtype, kind="peaked", reduction="none")
    assert (ours(p) >= 0).all()


@pytest.mark.parametrize("V", [1, 2, 127, 129, 257, 1021, 50257])
def test_vocabulary_not_a_multiple_of_any_tile(V):
    """Neither a column beyond the last counts, nor is the last one lost."""
    p = problems.make((9,), V=V, D=16, ignored=0.0)
    p.targets[:4] = V - 1
    p.c.data[V - 1] *= 3
    compare(p)


def test_classes_that_cannot_be():
    """Logits of -inf: no NaN, no inf, no gradient for these classes."""
    p = problems.make((40,), V=257, D=24, bias=True)
    p.targets.clamp_(max=199)
    p.bias.data[200:] = -torch.inf
    loss = ours(p)
    de, dc, dbias = gradients_of(loss, p)
    fewer = problems.Problem(p.e, p.c[:200], p.targets, p.bias[:200], {})
    torch.testing.assert_close(loss, reference.evaluate(fewer)["loss"])
    assert de.isfinite().all() and not dc[200:].any() and not dbias[200:].any()


@pytest.mark.parametrize("option", [dict(softcap=2.0), dict(logit_scale=0.25)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_softcap_and_scale_reach_loss_and_gradients(reduction, option):
    p = problems.make((40,), V=211, D=24, reduction=reduction, **option)
    compare(p, torch.ones(40, device=problems.device) if reduction == "none" else None)
    without = problems.make((40,), V=211, D=24, reduction=reduction)
    assert not torch.allclose(ours(p), ours(without), rtol=1e-2)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_common_offset_keeps_the_losses_digits(dtype, reduction):
    """Exact logits, and 8192 more: as lse less the target's logit, four digits would be left."""
    p = problems.make((40,), V=211, D=24, dtype=dtype, bias=True, reduction=reduction)
    p.e.data.round_(), p.c.data.mul_(4).round_(), p.bias.data.zero_()
    without = ours(p)
    p.bias.data.fill_(8192.0)
    torch.testing.assert_close(ours(p), without, rtol=1e-5, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_label_smoothing_is_passed_on(reduction):
    p = problems.make((40,), V=211, D=24, label_smoothing=0.1, reduction=reduction)
    compare(p)
    assert (ours(p) - linear_cross_entropy(p.e, p.c, p.targets, reduction=reduction)).abs() > 1e-3


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("shift", [0, 1])
def test_gradients_are_not_zero(shift, dtype):
    """Of every row that counts, and of every class; and zero where a row does not count."""
    p = problems.make((4, 10), V=53, D=24, dtype=dtype, ignored=0.3, bias=True, shift=shift)
    grads = gradients_of(ours(p, reduction="sum"), p)
    counts = torch.zeros(4, 10, dtype=torch.bool, device=problems.device)
    counts[:, : 10 - shift] = p.targets[:, shift:] != -100
    assert torch.equal(grads[0].any(-1), counts)
    assert grads[1].any(-1).all() and grads[2].all()


def test_accumulation_steps_do_not_scale_the_loss():
    """Micro-batches with unequal numbers of tokens: a sum over one common number is the mean."""
    p = problems.make((6, 16), V=211, D=24, bias=True)
    p.targets[0, 3:] = -100
    whole = ours(p)
    items = (p.targets != -100).sum()
    parts = [
        linear_cross_entropy(p.e[i : i + 2], p.c, p.targets[i : i + 2], p.bias, reduction="sum")
        for i in (0, 2, 4)
    ]
    total = sum(part / items for part in parts)
    torch.testing.assert_close(total, whole)
    for a, b in zip(gradients_of(total, p), gradients_of(whole, p)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ignored_tokens_are_left_out_of_distillation(reduction):
    """Of the sum, and of the number that the mean divides by."""
    p = problems.make((40,), V=211, D=24, ignored=0.4)
    e, c = p.e.detach().roll(1, 0), p.c.detach()
    counts = p.targets != -100
    loss = losses.linear_distillation(p.e, p.c, e, c, p.targets, divergence="jsd",
                                      reduction=reduction).loss  # fmt: skip
    few = losses.linear_distillation(p.e[counts], p.c, e[counts], c, divergence="jsd",
                                     reduction=reduction).loss  # fmt: skip
    torch.testing.assert_close(loss, few)
    for a, b in zip(gradients_of(loss, p), gradients_of(few, p)):
        torch.testing.assert_close(a, b)


def test_shift_does_not_cross_sequences():
    p = problems.make((3, 8), V=53, D=16, shift=1, reduction="none")
    by_sequence = [
        linear_cross_entropy(e, p.c, t, shift=1, reduction="none") for e, t in zip(p.e, p.targets)
    ]
    torch.testing.assert_close(ours(p), torch.stack(by_sequence))


# Precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["rows", "vocabulary"])
def test_many_tokens_add_up_in_fp32(schedule):
    """4096 tokens of four classes in bf16: each row of dC is a sum of a thousand terms and more."""
    p = problems.make((4096,), V=67, D=16, dtype=BF16, ignored=0.0)
    p.targets.remainder_(4)
    compare(p, schedule=schedule)
    # Sums kept in bf16 over 8 chunks, or 64, are off by 2 or 5 times what the last rounding costs.
    exact = p.to(F64)
    (truth,) = torch.autograd.grad(reference.evaluate(exact)["loss"], exact.c)
    (dc,) = torch.autograd.grad(ours(p, schedule=schedule), p.c)
    assert (dc.double() - truth).norm() < 1.4 * (truth.to(BF16).double() - truth).norm()


def test_a_large_vocabulary_keeps_its_digits():
    compare(problems.make((8,), V=262147, D=16, dtype=BF16))


# Labels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [53, -1, -101, 2**31, 2**62])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_label_beyond_the_vocabulary_is_named(reduction, label, monkeypatch):
    monkeypatch.setenv("CUTLOSS_CHECK", "1")  # on CUDA it would be NaN else, without waiting
    p = problems.make((2, 10), V=53, D=16, reduction=reduction)
    p.targets[1, 7] = label
    with pytest.raises(ValueError, match=rf"position \(1, 7\) is {label}, outside \[0, V = 53\)"):
        ours(p)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_all_rows_ignored_has_finite_gradients(dtype):
    """A mean of nothing is NaN, as in PyTorch, a sum 0; the gradients are zero."""
    p = problems.make((12,), V=53, D=16, dtype=dtype, bias=True)
    p.targets.fill_(-100)
    for reduction in ("mean", "sum", "none"):
        loss = ours(p, reduction=reduction)
        assert loss.isnan() if reduction == "mean" else not loss.any()
        grads = gradients_of(loss, p, torch.ones_like(loss))
        assert all(g.isfinite().all() and not g.any() for g in grads)


def test_a_part_without_a_token_that_counts():
    """Labels shifted beforehand and split: a part of padding adds nothing, and is no error."""
    p = problems.make((4, 8), V=53, D=16)
    p.targets[2] = -100
    items = int((p.targets != -100).sum())
    total = sum(
        linear_cross_entropy(e, p.c, t, reduction="sum") / items for e, t in zip(p.e, p.targets)
    )
    torch.testing.assert_close(total, ours(p))
    for a, b in zip(gradients_of(total, p), gradients_of(ours(p), p)):
        torch.testing.assert_close(a, b)


def test_what_ignored_rows_hold_goes_nowhere():
    """Padding that holds NaN."""
    p = problems.make((24,), V=53, D=16, bias=True)
    want = [ours(p), *gradients_of(ours(p), p)]
    p.e.data[p.targets == -100] = torch.nan
    for a, b in zip([ours(p), *gradients_of(ours(p), p)], want):
        torch.testing.assert_close(a, b)


# Integration ----------------------------------------------------------------------------------


def test_a_weight_that_is_elsewhere_is_refused():
    """Sharded parameters leave an empty tensor behind."""
    p = problems.make()
    for empty in (p.c.detach()[:0], p.c.detach()[:0, 0]):
        with pytest.raises(ValueError, match=r"c must (be \(V, D\)|have at least one row)"):
            linear_cross_entropy(p.e, empty, p.targets)


def test_a_classifier_that_is_more_than_its_weight_is_refused():
    """An adapter, a quantised layer: read as a plain weight, its effect would be lost."""

    class Adapted(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for head in (CausalLMHead, LinearCrossEntropyLoss):
        with pytest.raises(TypeError, match="got Adapted.*Merge the adapter or dequantise"):
            head(Adapted(16, 53))


@pytest.mark.parametrize("dtypes", [(BF16, F32), (F32, BF16), (F32, F32), (F16, F32)], ids=str)
def test_autocast_mixes_dtypes(dtypes):
    """Whatever e and c are: a loss in fp32, and gradients in each tensor's dtype."""
    p = problems.make((40,), V=211, D=24, bias=True)
    e, c = (t.detach().to(d).requires_grad_() for t, d in zip((p.e, p.c), dtypes))
    with torch.autocast(problems.device, BF16):
        loss = linear_cross_entropy(e, c, p.targets, p.bias)
    loss.backward()
    assert loss.dtype == F32 and (e.grad.dtype, c.grad.dtype) == dtypes
    plain = reference.evaluate(p)["loss"]
    torch.testing.assert_close(loss, plain, rtol=1e-2, atol=0)
    wanted = torch.autograd.grad(plain, (p.e, p.c))
    for got, want in zip((e.grad, c.grad), wanted):
        assert (got.float() - want).norm() < 2e-2 * want.norm()


class _Outputs(TorchDispatchMode):
    """Sizes of what cutloss's operators return."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "cutloss":
            returned = result if isinstance(result, (tuple, list)) else (result,)
            self.sizes += [tuple(t.shape) for t in returned if isinstance(t, torch.Tensor)]
        return result


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_classifier_makes_no_dc(frozen, options):
    """Neither its memory nor its product; and the same dE."""
    p = problems.make((40,), V=211, D=24)
    want = torch.autograd.grad(ours(p, **options).sum(), p.e)[0]
    p.c.requires_grad_(not frozen)
    with _Outputs() as outputs:
        ours(p, **options).sum().backward()
    assert ((211, 24) in outputs.sizes) == (not frozen)
    assert (p.c.grad is None) == frozen
    torch.testing.assert_close(p.e.grad, want)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_non_contiguous_e(dtype):
    """A transposed e, one that is part of a wider tensor, and one of a longer sequence."""
    p = problems.make((6, 8), V=211, D=24, dtype=dtype)
    want = [ours(p), *gradients_of(ours(p), p)]
    wide = torch.cat([p.e, p.e + 1], dim=-1)
    long = torch.cat([p.e, p.e + 1], dim=1)
    for e in (p.e.transpose(0, 1).contiguous().transpose(0, 1), wide[..., :24], long[:, :8]):
        assert not e.is_contiguous()
        loss = linear_cross_entropy(e, p.c, p.targets)
        for a, b in zip([loss, *gradients_of(loss, p)], want):
            torch.testing.assert_close(a, b)


def test_upstream_gradient_that_is_expanded():
    """What .sum() and .mean() of per-token losses hand back has a stride of 0."""
    p = problems.make((40,), V=211, D=24, reduction="none")
    summed = gradients_of(ours(p).sum(), p)
    for a, b in zip(summed, gradients_of(ours(p), p, torch.ones(40, device=problems.device))):
        assert torch.equal(a, b)


def test_one_tensor_is_embedding_and_classifier():
    """Both gradients arrive at a tied weight."""
    p = problems.make((40,), V=211, D=24, ignored=0.0)
    ids = p.targets.roll(1)
    loss = linear_cross_entropy(F.embedding(ids, p.c), p.c, p.targets)
    plain = F.cross_entropy(F.embedding(ids, p.c) @ p.c.T, p.targets)
    got, want = (torch.autograd.grad(t, p.c)[0] for t in (loss, plain))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_graph_break(reduction):
    torch._dynamo.reset()
    p = problems.make((2, 12), V=53, D=16, shift=1, reduction=reduction)
    compiled = torch.compile(lambda: ours(p).sum(), fullgraph=True)
    torch.testing.assert_close(compiled(), ours(p).sum())


def test_training_and_evaluation_have_one_loss():
    """With gradients wanted and without them: the same number."""
    p = problems.make((40,), V=211, D=24)
    trained = ours(p)
    with torch.no_grad():
        torch.testing.assert_close(ours(p), trained.detach(), rtol=1e-6, atol=0)


# Wanted, and had by few -----------------------------------------------------------------------


def test_per_token_weights_and_temperatures():
    p = problems.make(
        (40,), V=211, D=24,
        token_weight=torch.linspace(0, 2, 40), temperature=torch.linspace(0.5, 2, 40),
    )  # fmt: skip
    compare(p)


def test_log_probabilities_and_entropy_carry_gradients():
    """All that preference losses need, without logits."""
    p = problems.make((40,), V=211, D=24, reduction="none", return_entropy=True)
    got, wanted = ours(p), reference.chosen(reference.evaluate(p), p.options)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b)
    got, wanted = (reference.gradients(t, p.parameters) for t in (got, wanted))
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b)


def test_accuracy_without_logits():
    p = problems.make((40,), V=211, D=24, return_predictions=True)
    assert torch.equal(ours(p)[1], reference.evaluate(p)["predictions"])

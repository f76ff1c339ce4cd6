"""Memory layouts: views are read in place or copied, with the same result."""

import pytest
import torch
from helpers import problems
from helpers.layouts import every_other, padded
from helpers.problems import F32

from cutloss import linear_cross_entropy

pytestmark = pytest.mark.usefixtures("device")

V, D = 101, 16


def assert_same(a, b):
    """The same bits. On CUDA the library's product may follow the alignment of its operands."""
    if a.device.type == "cpu":
        assert torch.equal(a, b)
    else:
        torch.testing.assert_close(a, b)


LAYOUTS_OF_E = {
    "row_stride": padded,
    "sequence_stride": every_other,
    "both": lambda t: every_other(padded(t)),
    "columns": lambda t: t.mT.contiguous().mT,
    "time_first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "offset": lambda t: torch.cat([t.new_full((1, *t.shape[1:]), float("nan")), t])[1:],
    "unaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "reversed_rows": lambda t: t.flip(1).contiguous().flip(1),
}
LAYOUTS_OF_C = {
    "row_stride": padded,
    "transposed": lambda t: t.T.contiguous().T,
    "every_other_row": every_other,
}


def value_and_gradients(e, c, targets, **options):
    result = linear_cross_entropy(e, c, targets, **options)
    loss = result[0] + result[1].sum() if isinstance(result, tuple) else result
    return loss, *torch.autograd.grad(loss, (e, c))


@pytest.mark.parametrize("options", [{}, {"shift": 2}, {"schedule": "vocabulary"}], ids=str)
@pytest.mark.parametrize("of_e", LAYOUTS_OF_E.values(), ids=LAYOUTS_OF_E.keys())
def test_layouts_of_e(of_e, options):
    p = problems.make((4, 9), V, D)
    expected = value_and_gradients(p.e, p.c, p.targets, **options)
    e = of_e(p.e.detach())
    assert torch.equal(e, p.e)
    got = value_and_gradients(e.requires_grad_(), p.c, p.targets, **options)
    for a, b in zip(got, expected):
        assert_same(a, b)


@pytest.mark.parametrize("options", [{}, {"return_lse": True}], ids=str)
@pytest.mark.parametrize("of_c", LAYOUTS_OF_C.values(), ids=LAYOUTS_OF_C.keys())
def test_layouts_of_c(of_c, options):
    p = problems.make((4, 9), V, D)
    expected = value_and_gradients(p.e, p.c, p.targets, **options)
    c = of_c(p.c.detach())
    got = value_and_gradients(p.e, c.requires_grad_(), p.targets, **options)
    for a, b in zip(got, expected):
        assert_same(a, b)


def test_expanded_rows():
    e = torch.randn(1, D, device=problems.device).expand(6, D)
    c = torch.randn(V, D, device=problems.device)
    targets = torch.arange(6, device=problems.device)
    expected = linear_cross_entropy(e.contiguous(), c, targets, reduction="none")
    assert_same(linear_cross_entropy(e, c, targets, reduction="none"), expected)


@pytest.mark.parametrize("k", [0, 1, 8, True, False])
def test_shift_written_out(k):
    p = problems.make((4, 9), V, D, dtype=problems.widest())
    n = 9 - int(k)
    got = value_and_gradients(p.e, p.c, p.targets, shift=k)
    loss = linear_cross_entropy(p.e[:, :n].contiguous(), p.c, p.targets[:, int(k) :].contiguous())
    for a, b in zip(got, (loss, *torch.autograd.grad(loss, (p.e, p.c)))):
        torch.testing.assert_close(a, b)


def test_batch_dimensions_do_not_matter():
    p = problems.make((2, 3, 4), V, D)
    expected = value_and_gradients(p.e, p.c, p.targets)
    flat = p.e.detach().reshape(-1, D).requires_grad_()
    loss, de, dc = value_and_gradients(flat, p.c, p.targets.reshape(-1))
    for a, b in zip((loss, de.reshape(p.e.shape), dc), expected):
        assert_same(a, b)


def test_targets_of_any_layout():
    p = problems.make((4, 9), V, D)
    expected = linear_cross_entropy(p.e, p.c, p.targets)
    assert torch.equal(linear_cross_entropy(p.e, p.c, p.targets.T.contiguous().T), expected)
    weight = torch.rand(V + 3, dtype=F32, device=problems.device)[3:]
    strided = torch.stack([weight, weight], 1)[:, 0]
    assert torch.equal(
        linear_cross_entropy(p.e, p.c, p.targets, weight=strided),
        linear_cross_entropy(p.e, p.c, p.targets, weight=weight),
    )


def test_inputs_are_left_alone():
    p = problems.make((4, 9), V, D, bias=True, weight=problems._class_weight)
    before = [t.detach().clone() for t in (*p.parameters, p.targets, p.options["weight"])]
    loss = linear_cross_entropy(p.e, p.c, p.targets, p.bias, label_smoothing=0.1, **p.options)
    loss.backward()
    for a, b in zip((*p.parameters, p.targets, p.options["weight"]), before):
        assert torch.equal(a, b)

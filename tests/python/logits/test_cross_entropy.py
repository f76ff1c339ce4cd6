"""cross_entropy against fp64 and against the plain path: options, dtypes, layouts, the logits'
memory."""

import pytest
import torch
import torch.nn.functional as F
from helpers import problems, reference
from helpers.layouts import every_other, padded
from helpers.problems import BF16, F16, F32, F64, KINDS, OPTION_SETS, SIZES, Problem
from helpers.tolerance import assert_close

from cutloss import cross_entropy

pytestmark = pytest.mark.usefixtures("device")

DTYPES = [F64, F32, BF16, F16]
KINDS_AND_DTYPES = [
    (kind, dtype) for kind in KINDS for dtype in DTYPES if (kind, dtype) != ("offset", F16)
]
V = 101


def make(batch=(24,), V=V, D=16, dtype=F32, kind="random", **options) -> Problem:
    """A problem whose E are logits: its classifier is the identity."""
    p = problems.make(batch, V, D, F64, kind, **options)
    z = p.e @ p.c.T
    if p.bias is not None:
        z = z + p.bias
    eye = torch.eye(V, dtype=dtype, device=z.device)
    return Problem(z.detach().to(dtype).requires_grad_(), eye, p.targets, None, p.options)


def run(p: Problem, consume=False, **options):
    z = p.e * 1 if consume else p.e  # a leaf is not to be consumed
    result = cross_entropy(z, p.targets, **p.options, **options, consume_logits=consume)
    assert z.shape == ((0,) if consume else p.e.shape)
    outputs = list(result) if isinstance(result, tuple) else [result]
    return outputs, reference.gradients(outputs, (p.e,))[0]


def compare(p: Problem) -> None:
    truth_p = p.to(F64)
    truth = reference.chosen(reference.evaluate(truth_p), p.options)
    true_g = reference.gradients(truth, (truth_p.e,))[0]
    plain = reference.chosen(reference.evaluate(p), p.options)
    plain_g = reference.gradients(plain, (p.e,))[0]
    outputs, g = run(p)

    assert len(outputs) == len(truth)
    for i, (value, true, simple) in enumerate(zip(outputs, truth, plain)):
        if value.dtype == torch.int64:
            assert ((simple == value) | (true == value)).all(), "predictions"
            continue
        assert value.dtype == (F64 if p.e.dtype == F64 else F32)
        assert_close(value, true, simple, f"output {i}")
    assert g.dtype == p.e.dtype and g.is_contiguous()
    assert_close(g, true_g, plain_g, "gradient")
    again, consumed = run(p, consume=True)
    assert torch.equal(g, consumed), "the gradient over the logits"
    for a, b in zip(outputs, again):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTION_SETS.values(), ids=OPTION_SETS.keys())
def test_options(options, dtype):
    compare(make((3, 29), V=211, D=24, dtype=dtype, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch, V, D", [*SIZES[:-1], ((5,), 2049, 7)], ids=str)
def test_sizes(batch, V, D, dtype):
    compare(make(batch, V, D, dtype, ignored=0.1))


@pytest.mark.parametrize("kind, dtype", KINDS_AND_DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_kinds_of_data(kind, dtype, reduction):
    compare(make((40,), 307, 32, dtype, kind, reduction=reduction))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_is_torchs_cross_entropy(reduction):
    p = make((2, 9), dtype=problems.widest())
    weight = torch.rand(V, dtype=p.e.dtype, device=p.e.device)
    how = dict(weight=weight, label_smoothing=0.1, reduction=reduction)
    got = cross_entropy(p.e, p.targets, **how)
    want = F.cross_entropy(p.e.flatten(0, 1), p.targets.flatten(), **how)
    torch.testing.assert_close(got, want.view(got.shape))


# Memory ------------------------------------------------------------------------------------------

LAYOUTS = {
    "row_stride": padded,
    "sequence_stride": every_other,
    "both": lambda t: every_other(padded(t)),
    "columns": lambda t: t.mT.contiguous().mT,
    "time_first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "offset": lambda t: torch.cat([t.new_full((1, *t.shape[1:]), float("nan")), t])[1:],
    "unaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("options", [{}, {"shift": 2}, {"reduction": "none"}], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(layout, options, dtype):
    p = make((4, 9), dtype=dtype)
    laid_out = layout(p.e.detach())
    packed = laid_out.contiguous().requires_grad_()
    got = run(Problem(laid_out.requires_grad_(), p.c, p.targets, None, options))
    want = run(Problem(packed, p.c, p.targets, None, options))
    # On CUDA the alignment of a row decides which of its columns a thread adds up.
    bits = {} if p.e.device.type == "cuda" else dict(rtol=0, atol=0)
    torch.testing.assert_close(got, want, **bits)


@pytest.mark.parametrize("k", [1, 8, True])
def test_shift_written_out(k):
    p = make((4, 9), dtype=problems.widest())
    n = 9 - int(k)
    got, g = run(p, shift=k)
    z = p.e.detach()[:, :n].contiguous().requires_grad_()
    want, rest = run(Problem(z, p.c, p.targets[:, int(k) :].contiguous(), None, {}))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(g[:, :n], rest)
    assert (g[:, n:] == 0).all()


def test_ignored_logits_are_not_read():
    p = make((4, 9))
    z = p.e.detach().clone()
    z[p.targets == -100] = float("nan")
    want, g = run(p)
    got, h = run(Problem(z.requires_grad_(), p.c, p.targets, None, {}))
    assert torch.equal(got[0], want[0]) and torch.equal(g, h)


def hidden_and_head(dtype=F32):
    g = torch.Generator().manual_seed(1)
    h = torch.randn(2, 9, 16, generator=g).to(problems.device, dtype).requires_grad_()
    w = torch.randn(V, 16, generator=g).to(problems.device, dtype).requires_grad_()
    targets = torch.randint(0, V, (2, 9), generator=g).to(problems.device)
    return h, w, targets


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("options", [{}, {"return_lse": True}], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_consumed_logits(dtype, options, flat):
    """Through a head, as a view of all of it too: the same gradients, and nothing left to read."""
    gradients = []
    for consume in (False, True):
        h, w, targets = hidden_and_head(dtype)
        z = h @ w.T
        seen, labels = (z.view(-1, V), targets.view(-1)) if flat else (z, targets)
        loss = cross_entropy(seen, labels, **options, consume_logits=consume)
        loss = (loss[0] + loss[1].sum()) if options else loss
        assert (z.numel() == 0) == consume and (seen.numel() == 0) == consume
        if consume:
            with pytest.raises((IndexError, RuntimeError)):
                z.argmax(-1)
        (3 * loss).backward()
        gradients.append((h.grad, w.grad))
    for a, b in zip(*gradients):
        assert torch.equal(a, b)


def test_consuming_is_noticed_by_who_needs_the_logits():
    h, w, targets = hidden_and_head()
    loss = cross_entropy(torch.tanh(h @ w.T), targets, consume_logits=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    z = h @ w.T
    square = z.square().sum()
    loss = cross_entropy(z, targets, consume_logits=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + square).backward()


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"return_lse": True}], ids=str)
def test_consumed_logits_go_through_backward_once(options):
    h, w, targets = hidden_and_head()
    loss = cross_entropy(h @ w.T, targets, **options, consume_logits=True)
    loss = (loss[0] if isinstance(loss, tuple) else loss).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time.*consume_logits"):
        loss.backward()


def test_logits_changed_before_backward_are_noticed():
    h, w, targets = hidden_and_head()
    for consume in (False, True):
        z = h @ w.T
        alias = z.detach()
        loss = cross_entropy(z, targets, reduction="none", consume_logits=consume).sum()
        alias.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_nothing_is_consumed_without_a_gradient():
    h, w, targets = hidden_and_head()
    z = h @ w.T
    with torch.no_grad():
        before = z.clone()
        cross_entropy(z, targets, consume_logits=True)
    cross_entropy(z.detach(), targets, consume_logits=True)
    assert torch.equal(z, before)


def test_what_is_not_to_be_consumed():
    h, w, targets = hidden_and_head()
    z = h @ w.T
    before = z.detach().clone()
    refused = [
        (z.detach().requires_grad_(), targets, ValueError, "leaf that requires a gradient"),
        (z[:, :-1], targets[:, :-1], ValueError, r"view \(2, 8, 101\) of a tensor \(2, 9, 101\)"),
        (z.transpose(0, 1), targets.T, ValueError, "contiguous logits, got strides"),
    ]
    if problems.device == "cpu":  # the target is not looked at on CUDA
        refused.append((z, targets + V, ValueError, "position"))
    for logits, labels, error, message in refused:
        shape = logits.shape
        with pytest.raises(error, match=message):
            cross_entropy(logits, labels, consume_logits=True)
        assert logits.shape == shape and torch.equal(z, before)


# Backward ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_backward_again_makes_the_same(dtype):
    p = make(dtype=dtype)
    loss = cross_entropy(p.e, p.targets)
    first, second = (torch.autograd.grad(loss, p.e, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_no_second_derivatives():
    p = make()
    for options in ({}, {"reduction": "none"}):
        loss = cross_entropy(p.e, p.targets, **options).sum()
        (g,) = torch.autograd.grad(loss, p.e, create_graph=True)
        with pytest.raises(NotImplementedError, match="first derivatives"):
            g.sum().backward()


def test_fp16_survives_a_loss_scale():
    """1/N alone would underflow: the gradient waits for the scale."""
    p = make((4096,), V=32, dtype=F16, ignored=0.0)
    (g,) = torch.autograd.grad(2.0**16 * cross_entropy(p.e, p.targets), p.e)
    truth = p.to(F64)
    (want,) = torch.autograd.grad(2.0**16 * cross_entropy(truth.e, p.targets), truth.e)
    assert ((g - want).norm() / want.norm()).item() < 1e-3


def test_weights_with_a_gradient():
    p = make(dtype=problems.widest(), ignored=0.0)
    weight = torch.rand(24, dtype=p.e.dtype, device=p.e.device).requires_grad_()
    loss = cross_entropy(p.e, p.targets, token_weight=weight)
    nll = F.cross_entropy(p.e, p.targets, reduction="none")
    want = (weight * nll).sum() / weight.sum()
    got = torch.autograd.grad(loss, (p.e, weight))
    torch.testing.assert_close(got, torch.autograd.grad(want, (p.e, weight)))


def test_bits_do_not_depend_on_threads():
    p = make((37,), V=5000, D=8, dtype=BF16)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(run(p))
    finally:
        torch.set_num_threads(threads)
    for outputs, g in results[1:]:
        assert torch.equal(outputs[0], results[0][0][0]) and torch.equal(g, results[0][1])


# Compiled ----------------------------------------------------------------------------------------

NAMES = ["default", "none", "shift", "weight_smoothing", "row_temperature", "everything"]


@pytest.mark.parametrize("name", NAMES)
def test_one_graph(name):
    torch._dynamo.reset()
    p = make((2, 12), **OPTION_SETS[name])

    def loss_of(z):
        result = cross_entropy(z, p.targets, **p.options)
        outputs = result if isinstance(result, tuple) else (result,)
        return sum(out.sum() for out in outputs if out.is_floating_point())

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    got, want = compiled(p.e), loss_of(p.e)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, p.e), torch.autograd.grad(want, p.e))


def test_consuming_is_left_out_of_graphs():
    torch._dynamo.reset()
    h, w, targets = hidden_and_head()

    def loss_of(h, w):
        return 2 * cross_entropy(h @ w.T, targets, consume_logits=True)

    compiled = torch.compile(loss_of, backend="aot_eager")
    got, want = (torch.autograd.grad(f(h, w), (h, w)) for f in (compiled, loss_of))
    torch.testing.assert_close(got, want)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="consume_logits cannot be part of a graph"):
        torch.compile(loss_of, fullgraph=True)(h, w)


CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")


@pytest.mark.parametrize("name", ["default", "everything"])
def test_operators(name):
    """torch.library's own checks: schemas, aliasing and mutation, fakes."""
    p = make((2, 5), V=17, D=4, **OPTION_SETS[name])
    z, targets = p.e.detach(), p.targets
    stats = dict(dtype=F32, device=z.device)
    options = dict(shift=1, ignore_index=-100, softcap=2.0, logit_scale=1.0, temperature=1.0)
    wanted = name == "everything"
    options |= dict(wants_entropy=wanted, wants_zbar=wanted, wants_argmax=wanted)
    rows = 2 * 4
    operands = (targets, None, torch.rand(17, **stats) if wanted else None)
    terms = torch.rand(3 if wanted else 1, rows, **stats)
    undefined = torch.zeros((), dtype=torch.bool, device=z.device)
    saved = [torch.rand(rows, **stats) for _ in range(4)]
    upstream = [torch.rand(rows, **stats), None, None, None, None]
    ops = torch.ops.cutloss
    for op, more in (
        (ops.logits_statistics, (terms, undefined)),
        (ops.logits_loss_and_gradient, (terms, undefined)),
        (ops.logits_loss_and_gradient_, (terms, undefined)),
        (ops.logits_gradient, (*saved, *upstream)),
        (ops.logits_gradient_, (*saved, *upstream)),
    ):
        torch.library.opcheck(op, (z.clone(), *operands, *more), options, test_utils=CHECKS)


# Data that is out of the ordinary ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}], ids=str)
def test_infinities_as_in_torch(options, dtype):
    z = torch.randn(8, 37, dtype=dtype)
    inf = float("inf")
    z[0, 3:] = -inf  # masked tokens
    z[1, 5] = -inf  # the target
    z[2] = -inf
    z[3, 7] = inf
    z[4, 7] = float("nan")
    z[5, 6:] = -inf
    z[5, :5] = -inf  # only the target is left
    targets = torch.tensor([1, 5, 0, 2, 2, 5, 36, 0])
    z, targets = z.to(problems.device), targets.to(problems.device)
    ours = z.clone().requires_grad_()
    capped = z.double().requires_grad_()
    cap = options.get("softcap")
    theirs = capped if cap is None else cap * torch.tanh(capped / cap)
    got = cross_entropy(ours, targets, reduction="none", **options)
    want = F.cross_entropy(theirs, targets, reduction="none")
    torch.testing.assert_close(got.double(), want, equal_nan=True, rtol=1e-4, atol=1e-5)
    rows = [0, 1, 5, 6, 7] if cap is None else [0, 1, 2, 3, 5, 6, 7]
    ours, theirs = z[rows].clone().requires_grad_(), capped.detach()[rows].requires_grad_()
    (g,) = torch.autograd.grad(cross_entropy(ours, targets[rows], reduction="sum", **options), ours)
    z64 = theirs if cap is None else cap * torch.tanh(theirs / cap)
    (w,) = torch.autograd.grad(F.cross_entropy(z64, targets[rows], reduction="sum"), theirs)
    torch.testing.assert_close(g.double(), w, rtol=2e-2 if dtype == BF16 else 1e-4, atol=1e-5)


def test_nothing_counts():
    p = make(ignored=1.1)
    for options, want in (({}, float("nan")), ({"reduction": "sum"}, 0.0)):
        outputs, g = run(p, **options)
        torch.testing.assert_close(outputs[0].item(), want, equal_nan=True)
        assert (g == 0).all()


def test_no_rows():
    z = torch.empty(0, V, device=problems.device, requires_grad=True)
    targets = torch.empty(0, dtype=torch.int64, device=problems.device)
    assert cross_entropy(z, targets).isnan()
    loss = cross_entropy(z, targets, reduction="sum")
    assert loss == 0
    assert torch.autograd.grad(loss, z)[0].shape == (0, V)
    assert cross_entropy(z, targets, reduction="none").shape == (0,)


def test_bad_targets(monkeypatch):
    p = make((4, 9), ignored=0.0)
    targets = p.targets.clone()
    targets[2, 3] = V
    message = rf"position \(2, 3\) is {V}, outside \[0, V = {V}\)"
    if problems.device == "cpu":
        with pytest.raises(ValueError, match=message):
            cross_entropy(p.e, targets)
        return
    nll = cross_entropy(p.e, targets, reduction="none")
    want = cross_entropy(p.e, p.targets, reduction="none")
    assert nll[2, 3].isnan() and nll.isnan().sum() == 1
    nll.sum().backward()
    assert p.e.grad[2, 3].isnan().all() and p.e.grad.isnan().sum() == V
    targets[2, 3] = p.targets[2, 3]
    assert torch.equal(cross_entropy(p.e, targets, reduction="none"), want)
    targets[2, 3] = V
    monkeypatch.setenv("CUTLOSS_CHECK", "1")
    with pytest.raises(ValueError, match=message):
        cross_entropy(p.e, targets)


# (arguments that differ, error, what it says)
REFUSALS = [
    (lambda p: dict(logits=p.e[0]), ValueError, r"logits \(9, 101\) and targets \(4, 9\)"),
    (lambda p: dict(logits=p.e.movedim(-1, 1)), ValueError, r"V comes last: .*movedim\(1, -1\)"),
    (lambda p: dict(logits=p.e[..., :0]), ValueError, "at least one class"),
    (lambda p: dict(logits=p.e.detach().int()), TypeError, "logits must be float32.*int32"),
    (lambda p: dict(logits=None), TypeError, "logits must be a torch.Tensor, got NoneType"),
    (lambda p: dict(targets=p.targets.float()), TypeError, "class probabilities"),
    (lambda p: dict(reduction="avg"), ValueError, "reduction must be one of"),
    (lambda p: dict(shift=-9), ValueError, "shift must be >= 0, got -9"),
    (lambda p: dict(softcap=0.0), ValueError, "softcap must be finite and > 0"),
    (lambda p: dict(logit_scale=0.0), ValueError, "logit_scale must be finite and not 0"),
    (lambda p: dict(temperature=-1.0), ValueError, "temperature must be finite and > 0"),
    (lambda p: dict(label_smoothing=1.5), ValueError, r"label_smoothing must be in \[0, 1\]"),
    (lambda p: dict(weight=torch.ones(7).to(p.e)), ValueError, r"weight \(7,\) and logits"),
    (lambda p: dict(z_loss=-1.0), ValueError, "z_loss must be finite and >= 0"),
    (lambda p: dict(token_weight=p.e[:, 0, 0]), ValueError, "token_weight must have the shape"),
    (lambda p: dict(consume_logits="yes"), TypeError, "consume_logits must be a bool"),
    (lambda p: dict(logit_scale=1e30, temperature=1e-30), ValueError, "logit_scale / temperature"),
    (lambda p: dict(logits=p.e.to("meta"), targets=p.targets), ValueError, "on one device: logits"),
]


@pytest.mark.parametrize("change, error, message", REFUSALS, ids=lambda x: getattr(x, "name", None))
def test_refusals(change, error, message):
    p = make((4, 9))
    with pytest.raises(error, match=message):
        cross_entropy(**{"logits": p.e, "targets": p.targets, **change(p)})


def test_consumed_logits_of_a_parameter_are_refused():
    """Nothing is emptied."""
    weight = torch.nn.Parameter(torch.randn(6, 11))
    for view in (weight.view(2, 3, 11), weight[:]):
        with pytest.raises(ValueError, match="would overwrite a leaf"):
            cross_entropy(view, torch.zeros(view.shape[:-1]).long(), consume_logits=True)
    assert weight.shape == (6, 11)


def test_consumed_logits_in_a_checkpoint_are_refused():
    """There PyTorch does not see that what tanh has saved was overwritten."""
    x, w = torch.randn(4, 5), torch.randn(11, 5, requires_grad=True)

    def region(x, w):
        return cross_entropy(torch.tanh(x @ w.T), torch.arange(4), consume_logits=True)

    with pytest.raises(ValueError, match="under torch.utils.checkpoint"):
        torch.utils.checkpoint.checkpoint(region, x, w, use_reentrant=False)

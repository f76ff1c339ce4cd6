"""What only CUDA has: streams, graphs, nothing that waits for the device, its memory. What the
loss and its gradients are, the other files test on every device."""

import copy

import pytest
import torch
from helpers import problems, reference, small_model
from helpers.inside import SCHEDULES, Options, decide, library
from helpers.problems import BF16, F16, F32, F64, OPTION_SETS
from helpers.tolerance import assert_close, assert_near

from cutloss import linear_cross_entropy

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and library.HAS_CUDA),
    reason="no CUDA device, or a build without CUDA",
)

# The two families of operators, and both schedules of the second.
WAYS = {
    "immediate": {},
    "kept_logits": {"return_lse": True},
    "vocabulary": {"schedule": "vocabulary"},
    "everything": OPTION_SETS["everything"],
}
ways = pytest.mark.parametrize("options", WAYS.values(), ids=WAYS.keys())
dtypes = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)


@pytest.fixture(autouse=True)
def _on_cuda(monkeypatch):
    monkeypatch.setattr(problems, "device", "cuda")
    monkeypatch.delenv("CUTLOSS_CHECK", raising=False)


def everything(p, **more):
    """The results of a call and the gradients of their sum."""
    result = linear_cross_entropy(p.e, p.c, p.targets, p.bias, **p.options, **more)
    outputs = result if isinstance(result, tuple) else (result,)
    total = sum(out.sum() for out in outputs if out.is_floating_point())
    return *outputs, *torch.autograd.grad(total, p.parameters)


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


# Order on the device ------------------------------------------------------------------------------


@ways
@dtypes
def test_nothing_waits_for_the_device(dtype, options):
    p = problems.make((3, 40), V=1021, D=64, dtype=dtype, **options)
    expected = everything(p)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = everything(p)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(got, expected)


@ways
@dtypes
def test_a_graph(dtype, options):
    """Captured once, replayed with other data, and another number of ignored tokens. A capture also
    fails where anything, in whatever library, waits for the device."""
    p = problems.make((3, 40), V=1021, D=64, dtype=dtype, **options)
    q = problems.make((3, 40), V=1021, D=64, dtype=dtype, seed=1, ignored=0.6, **options)
    q.options = p.options
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            everything(p)
    torch.cuda.current_stream().wait_stream(side)
    graph = problems.graph()
    with torch.cuda.graph(graph):
        captured = everything(p)
    for data in (p, q):  # p's own, then q's in p's place
        with torch.no_grad():
            for mine, other in zip((*p.parameters, p.targets), (*data.parameters, data.targets)):
                mine.copy_(other)
        graph.replay()
        assert_same(captured, everything(data))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("schedule", ["rows", "vocabulary"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_graph_of_a_training_step(tied, schedule, autocast):
    """Forward, backward and optimizer, captured once; then other data, with other tokens ignored,
    and the weights that the steps before have left."""
    batches = [small_model.batch(i, ignored=0.2 * i, device="cuda") for i in range(4)]
    eager = small_model.make(tied, "cuda", schedule=schedule)
    captured = copy.deepcopy(eager)
    products = BF16 if autocast else F32

    def stepper(model):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, eps=1e-3, capturable=True)

        def step(x, labels):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", BF16, enabled=autocast, cache_enabled=False):
                loss = model(x, labels)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    step, x, labels = stepper(captured), *(t.clone() for t in batches[0])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # which train as well
            step(x, labels)
    torch.cuda.current_stream().wait_stream(side)
    graph = problems.graph()
    with torch.cuda.graph(graph):
        loss = step(x, labels)
    step = stepper(eager)
    for _ in range(3):
        step(*batches[0])
    for batch in batches:
        x.copy_(batch[0])
        labels.copy_(batch[1])
        graph.replay()
        assert_near(loss, step(*batch), "loss", products)
    for (name, p), q in zip(captured.named_parameters(), eager.parameters(), strict=True):
        assert_near(p, q, name, products)


@ways
def test_another_stream(options):
    """The inputs come into being late, on the stream that is current in the call."""
    p = problems.make((3, 40), V=1021, D=64, dtype=BF16, **options)
    expected = everything(p)
    late = problems.make((3, 40), V=1021, D=64, dtype=BF16, **options)
    with torch.no_grad():
        late.e.zero_()
        late.c.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)
        with torch.no_grad():
            late.e.copy_(p.e)
            late.c.copy_(p.c)
        got = everything(late)
        torch.cuda.current_stream().synchronize()
    assert_same(got, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@ways
def test_a_device_that_is_not_current(options):
    p = problems.make((3, 40), V=1021, D=64, dtype=BF16, **options)
    expected = everything(p)
    problems.device = "cuda:1"
    q = problems.make((3, 40), V=1021, D=64, dtype=BF16, **options)
    got = everything(q)
    assert all(t.device.index == 1 for t in got) and torch.cuda.current_device() == 0
    assert_same([t.to("cuda:0") for t in got], expected)


def test_tensors_on_two_devices():
    p = problems.make()
    with pytest.raises(ValueError, match="e is on cuda:0, c on cpu"):
        linear_cross_entropy(p.e, p.c.cpu(), p.targets)


# What is in the tensors ---------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["rows", "vocabulary"])
@pytest.mark.parametrize("value", [101, -1, 2**40])
@dtypes
def test_a_target_out_of_range(dtype, value, schedule):
    """NaN for this token, nothing else of the process is harmed."""
    p = problems.make((64,), dtype=dtype, ignored=0.0)
    expected = linear_cross_entropy(p.e, p.c, p.targets, reduction="none")
    p.targets[7] = value
    others = torch.arange(64, device="cuda") != 7
    nll = linear_cross_entropy(p.e, p.c, p.targets, reduction="none", schedule=schedule)
    assert nll[7].isnan()
    torch.testing.assert_close(nll[others], expected[others], rtol=1e-4, atol=1e-5)
    for reduction in ("mean", "sum"):
        loss = linear_cross_entropy(p.e, p.c, p.targets, reduction=reduction, schedule=schedule)
        assert loss.isnan()
        de, dc = torch.autograd.grad(loss, (p.e, p.c))
        assert de[7].isnan().all() and de[others].isfinite().all() and dc.isnan().any()


def test_checked_mode(monkeypatch):
    """The CPU's error, with position and value."""
    monkeypatch.setenv("CUTLOSS_CHECK", "1")
    p = problems.make((4, 9))
    p.targets[2, 5] = 101
    assert linear_cross_entropy(p.e[:2], p.c, p.targets[:2]).isfinite()
    with pytest.raises(ValueError, match=r"target at position \(2, 5\) is 101, outside \[0, V = 1"):
        linear_cross_entropy(p.e, p.c, p.targets, shift=1)
    p.targets[2, 5] = 100
    temperature = torch.ones(4, 9, device="cuda")
    temperature[1, 3] = -2.0
    p.targets[1, 3] = 0
    with pytest.raises(ValueError, match=r"temperature at position \(1, 3\) is -2"):
        linear_cross_entropy(p.e, p.c, p.targets, temperature=temperature, shift=1)


@ways
@dtypes
def test_num_valid(dtype, options):
    p = problems.make((3, 40), V=1021, D=64, dtype=dtype, ignored=0.5, **options)
    shift = int(p.options.get("shift", 0))
    right = (p.targets[:, shift:] != -100).sum().item()
    for a, b in zip(everything(p, num_valid=right), everything(p), strict=True):
        torch.testing.assert_close(a, b)
    for wrong in (right - 1, right + 1):
        loss = everything(p, num_valid=wrong)[0]
        assert loss.isnan().all()


# Precision ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"schedule": "vocabulary"}, {"softcap": 20.0}], ids=str)
def test_loss_scale_of_fp16(options):
    """As torch.amp.GradScaler begins: gradients that fp16 alone cannot hold survive."""
    p = problems.make((2048,), V=5003, D=64, dtype=F16, ignored=0.1)
    scale = 65536.0
    loss = linear_cross_entropy(p.e, p.c, p.targets, **options)
    scaled = torch.autograd.grad(loss * scale, p.parameters)
    p.options = options
    q = p.to(F64)
    truth = torch.autograd.grad(reference.evaluate(q)["loss"], q.parameters)
    plain = torch.autograd.grad(reference.evaluate(p)["loss"] * scale, p.parameters)
    for got, want, simple in zip(scaled, truth, plain):
        assert got.isfinite().all()
        assert_close(got, want * scale, simple, "gradient")


def test_tf32_is_what_pytorch_allows():
    p = problems.make((64,), V=1021, D=256, ignored=0.0)
    before = torch.backends.cuda.matmul.fp32_precision
    losses = []
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            assert library.allow_tf32("cuda", F32) == (precision == "tf32")
            losses.append(linear_cross_entropy(p.e, p.c, p.targets, reduction="none"))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    torch.testing.assert_close(*losses, rtol=1e-2, atol=1e-2)
    assert not library.allow_tf32("cuda", BF16) and not library.allow_tf32("cpu", F32)


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled(autocast):
    torch._dynamo.reset()
    p = problems.make((3, 40), V=1021, D=64, dtype=F32 if autocast else BF16, bias=True)

    def loss_of(e, c, targets, bias):
        with torch.autocast("cuda", BF16, enabled=autocast):
            return linear_cross_entropy(e, c, targets, bias, shift=1, label_smoothing=0.1)

    results = []
    for f in (loss_of, torch.compile(loss_of, fullgraph=True)):
        loss = f(p.e, p.c, p.targets, p.bias)
        results.append((loss, *torch.autograd.grad(loss, p.parameters)))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-5)


# Memory -------------------------------------------------------------------------------------------


def bytes_of(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("e_dtype, c_dtype", [(BF16, BF16), (BF16, F32), (F32, F32)], ids=str)
@pytest.mark.parametrize("schedule", ["auto", "rows", "vocabulary"])
def test_peak_memory_is_what_the_plan_says(schedule, e_dtype, c_dtype):
    N, V, D = 4096, 32003, 512
    e = torch.randn(N, D, device="cuda", dtype=e_dtype, requires_grad=True)
    c = torch.randn(V, D, device="cuda", dtype=c_dtype).mul_(D**-0.5).requires_grad_()
    targets = torch.randint(V, (N,), device="cuda")

    def step():
        with torch.autocast("cuda", BF16, enabled=e_dtype != c_dtype):
            loss = linear_cross_entropy(e, c, targets, schedule=schedule)
        return torch.autograd.grad(loss, (e, c))

    options = Options(e_dtype, needs_de=True, needs_dc=True, schedule=SCHEDULES[schedule])
    sizes = decide.Sizes(1, N, V, D, e_dtype, c_dtype, None, torch.int64, on_cuda=True)
    plan = library.plan(sizes.arguments(known_at_forward=True), options)
    step()  # what libraries hold on to from their first call
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients = step()
    peak = torch.cuda.max_memory_allocated() - before
    rows = 100 * N + (1 << 20)  # per-row results and weights; an allocator's granularity
    assert peak <= bytes_of(*gradients) + plan.peak_bytes + rows


def test_memory_that_cannot_be_had():
    """PyTorch's error, with the bytes; the next call works."""
    N, V, D = 8192, 100_000, 64
    e = torch.randn(N, D, device="cuda", dtype=BF16, requires_grad=True)
    c = torch.randn(V, D, device="cuda", dtype=BF16, requires_grad=True)
    targets = torch.randint(V, (N,), device="cuda")
    small = dict(max_workspace=128 << 20)
    expected = linear_cross_entropy(e, c, targets, **small)
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + (512 << 20)
    torch.cuda.set_per_process_memory_fraction(
        room / torch.cuda.get_device_properties(0).total_memory
    )
    try:
        for _ in range(2):
            with pytest.raises(torch.cuda.OutOfMemoryError, match=r"CUDA out of memory.*\d{8,}"):
                linear_cross_entropy(
                    e, c, targets, reduction="none", schedule="rows", max_workspace=1 << 40
                )
            assert torch.equal(linear_cross_entropy(e, c, targets, **small), expected)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


# Engines ------------------------------------------------------------------------------------------


def test_fp32_has_an_engine():
    sizes = decide.Sizes(8, 512, 32768, 2048, F32, F32, None, torch.int64, on_cuda=True)
    options = Options(F32, needs_de=True, needs_dc=True)
    assert library.plan(sizes.arguments(known_at_forward=True), options).engine == "cuda/library"

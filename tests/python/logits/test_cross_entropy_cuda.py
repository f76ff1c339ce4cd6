"""What only CUDA has for losses over logits: graphs, nothing that waits, memory, rows that several
blocks share, more than 2^31 logits."""

import pytest
import torch
import torch.nn.functional as F
from helpers import problems
from helpers.inside import library
from helpers.problems import BF16, F16, F32, F64

from cutloss import CausalLMLoss, cross_entropy

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and library.HAS_CUDA),
    reason="no CUDA device, or a build without CUDA",
)


@pytest.fixture(autouse=True)
def _on_cuda(monkeypatch):
    monkeypatch.setattr(problems, "device", "cuda")
    monkeypatch.delenv("CUTLOSS_CHECK", raising=False)


def make(N, V, dtype=BF16, seed=0, ignored=0.2):
    g = torch.Generator("cuda").manual_seed(seed)
    z = torch.randn(N, V, device="cuda", generator=g).to(dtype)
    targets = torch.randint(0, V, (N,), device="cuda", generator=g)
    targets[torch.rand(N, device="cuda", generator=g) < ignored] = -100
    return z, targets


def loss_and_gradient(z, targets, consume=False, **options):
    leaf = z.clone().requires_grad_()
    logits = leaf * 1 if consume else leaf
    loss = cross_entropy(logits, targets, consume_logits=consume, **options)
    loss = loss[0] if isinstance(loss, tuple) else loss
    return loss, torch.autograd.grad(loss.sum(), leaf)[0]


def expected(z, targets, **options):
    leaf = z.double().requires_grad_()
    loss = F.cross_entropy(leaf, targets, **options)
    return loss, torch.autograd.grad(loss.sum(), leaf)[0]


def assert_near(got, want, dtype):
    loss, g = got
    torch.testing.assert_close(loss.double(), want[0], rtol=1e-5, atol=1e-5)
    error = (g.double() - want[1]).norm() / want[1].norm().clamp(min=1e-30)  # 0: one class
    assert error < {F64: 1e-12, F32: 1e-5, BF16: 3e-3, F16: 1e-3}[dtype]


OPTIONS = {
    "mean": {},
    "smoothing": {"label_smoothing": 0.1},
    "none": {"reduction": "none"},
}
# Around what a block, two, four and eight hold, and beyond; none a multiple of a vector but one.
SIZES = [1, 7, 100, 1021, 8191, 27649, 50257, 65536, 110593, 151937, 262145, 524287]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64], ids=str)
@pytest.mark.parametrize("V", SIZES)
def test_rows_of_any_length(V, dtype, options):
    z, targets = make(5, V, dtype, ignored=0.0)
    targets[3] = -100
    got = loss_and_gradient(z, targets, **options)
    assert_near(got, expected(z, targets, **options), dtype)
    for consume in (False, True):  # in place as well, and the same bits
        again = loss_and_gradient(z, targets, consume, **options)
        assert torch.equal(got[0], again[0]) and torch.equal(got[1], again[1])


@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
@pytest.mark.parametrize("V", [101, 50257, 200003])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_blocks_that_share_a_row(blocks, V, dtype, monkeypatch):
    if blocks > 1 and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU has no clusters")
    monkeypatch.setenv("CUTLOSS_BLOCKS_PER_ROW", str(blocks))
    z, targets = make(301, V, dtype)
    got = loss_and_gradient(z, targets)
    assert_near(got, expected(z, targets), dtype)
    loss, g = loss_and_gradient(z, targets, logit_scale=-0.5)
    scaled = expected(-0.5 * z.double(), targets)
    assert_near((loss, g), (scaled[0], -0.5 * scaled[1]), dtype)
    best = cross_entropy(z, targets.clamp(min=0), return_predictions=True)[1]
    assert (z.gather(1, best[:, None])[:, 0] == z.max(1).values).all()


def test_a_whole_batch_is_shared_alike():
    """Enough rows for every multiprocessor, several times over."""
    z, targets = make(3000, 128256, BF16)
    got = loss_and_gradient(z, targets, consume=True)
    for rows in (slice(0, 200), slice(1500, 1700), slice(2800, 3000)):
        leaf = z[rows].double().requires_grad_()
        total = F.cross_entropy(leaf, targets[rows], reduction="sum") / (targets >= 0).sum()
        (want,) = torch.autograd.grad(total, leaf)
        error = (got[1][rows].double() - want).norm() / want.norm()
        assert error < 3e-3
    again = loss_and_gradient(z, targets, consume=True)
    assert torch.equal(got[0], again[0]) and torch.equal(got[1], again[1])


@pytest.mark.parametrize("options", [{}, {"return_lse": True}, {"shift": 1}], ids=str)
@pytest.mark.parametrize("consume", [False, True])
def test_nothing_waits_for_the_device(options, consume):
    z, targets = make(40, 1021)
    z, targets = z.view(2, 20, 1021), targets.view(2, 20)
    want = loss_and_gradient(z, targets, consume, **options)
    items = torch.tensor(30, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = loss_and_gradient(z, targets, consume, **options)
        CausalLMLoss(1021)(z, targets, num_items_in_batch=items)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"softcap": 5.0}], ids=str)
@pytest.mark.parametrize("consume", [False, True])
def test_a_graph(options, consume):
    """Captured once, replayed with other data."""
    z, targets = make(70, 50257)
    other, other_targets = make(70, 50257, seed=1, ignored=0.6)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            loss_and_gradient(z, targets, consume, **options)
    torch.cuda.current_stream().wait_stream(side)
    graph = problems.graph()
    with torch.cuda.graph(graph):
        got = loss_and_gradient(z, targets, consume, **options)
    for data in ((z.clone(), targets.clone()), (other, other_targets)):
        z.copy_(data[0])
        targets.copy_(data[1])
        graph.replay()
        want = loss_and_gradient(*data, consume, **options)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_the_same_bits_beside_other_work():
    z, targets = make(500, 50257)
    want = loss_and_gradient(z, targets)
    busy, stream = torch.randn(4096, 4096, device="cuda"), torch.cuda.Stream()
    for _ in range(5):
        with torch.cuda.stream(stream):
            busy @ busy
        got = loss_and_gradient(z, targets)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_memory(dtype):
    """Consumed logits: per-row numbers, and nothing of the logits' size."""
    N, V, D = 2048, 32000, 64
    h = torch.randn(N, D, device="cuda", dtype=dtype, requires_grad=True)
    w = torch.randn(V, D, device="cuda", dtype=dtype, requires_grad=True)
    targets = torch.randint(0, V, (N,), device="cuda")

    def step(consume):
        z = h @ w.T
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss = cross_entropy(z, targets, consume_logits=consume)
        del z
        loss.backward()
        return torch.cuda.max_memory_allocated() - held

    step(True), step(False)  # libraries load, gradients are made
    size = N * V * 2
    small = V * D * 2 * 4 + (1 << 20)
    assert step(True) < small < size
    assert size <= step(False) < size + small


def test_more_than_2_to_the_31():
    N, V = 20000, 131072
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of GPU memory")
    g = torch.Generator("cuda").manual_seed(0)
    z = torch.empty(N, V, device="cuda", dtype=BF16)
    z.normal_(generator=g)
    targets = torch.randint(0, V, (N,), device="cuda", generator=g)
    last = z[-8:].clone()
    leaf = z.requires_grad_()
    nll = cross_entropy(leaf, targets, reduction="none")
    want = F.cross_entropy(last.double(), targets[-8:], reduction="none")
    torch.testing.assert_close(nll[-8:].double(), want, rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(cross_entropy(leaf, targets, reduction="sum"), leaf)
    p = last.double().softmax(-1)
    p[torch.arange(8), targets[-8:]] -= 1
    assert ((grad[-8:].double() - p).norm() / p.norm()).item() < 3e-3

"""Distillation on CUDA: its memory, that nothing waits, graphs. What it computes, the other files
test there too."""

import time

import pytest
import torch
from helpers import problems
from helpers.distillation import distil, stored, teacher_of
from helpers.problems import BF16, F16, F32

from cutloss import losses

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(autouse=True)
def _on_cuda(monkeypatch):
    monkeypatch.setattr(problems, "device", "cuda")
    monkeypatch.delenv("CUTLOSS_CHECK", raising=False)


def operands(n, V, D, D_teacher, dtype=BF16):
    g = torch.Generator("cuda").manual_seed(0)

    def made(*shape):
        return (torch.randn(*shape, generator=g, device="cuda") / shape[-1] ** 0.5).to(dtype)

    e, c = (4 * made(n, D)).requires_grad_(), made(V, D).requires_grad_()
    teacher_e, teacher_c = 4 * made(n, D_teacher), made(V, D_teacher)
    targets = torch.randint(0, V, (n,), generator=g, device="cuda")
    targets[::7] = -100
    return e, c, teacher_e, teacher_c, targets


def peak_of(call):
    """Bytes at most beside what was there before; what stays of libraries is there before."""
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = call()
    torch.cuda.synchronize()
    made = sum(t.numel() * t.element_size() for t in results)
    return torch.cuda.max_memory_allocated() - before - made


WAYS = {
    "forward_kl": dict(divergence="forward_kl"),
    "jsd": dict(divergence="jsd"),
    "none": dict(divergence="tvd", reduction="none"),
    "options": dict(divergence="reverse_kl", hard_weight=0.5, temperature=2.0, softcap=30.0),
    "rows": dict(schedule="rows", max_workspace=1 << 30),
    "vocabulary": dict(schedule="vocabulary"),
    "small": dict(max_workspace=96 << 20),
}


def gradients_of(e, c, teacher_e, teacher_c, targets, **options):
    loss = losses.linear_distillation(e, c, teacher_e, teacher_c, targets, **options).loss
    return torch.autograd.grad(loss.sum(), (e, c))


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_no_more_memory_than_granted(dtype, name):
    given = operands(4096, 32000, 1024, 1536, dtype)
    limit = WAYS[name].get("max_workspace", 256 << 20)
    assert peak_of(lambda: gradients_of(*given, **WAYS[name])) <= limit


def test_top_k_gathers_nothing_large():
    """N K D bf16 numbers of classes would be 2.7 GB."""
    e, c, _, _, targets = operands(4096, 32000, 1024, 8)
    ids = torch.randint(0, 320, (4096, 100), device="cuda") + 320 * torch.arange(100, device="cuda")
    log_t = torch.log_softmax(torch.randn(4096, 100, device="cuda"), -1) - 0.1

    def call():
        loss = losses.linear_distillation_top_k(e, c, ids, log_t, targets).loss
        return torch.autograd.grad(loss, (e, c))

    assert peak_of(call) <= 256 << 20


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_a_large_model(kind):
    """N 8192, D 4096, V 128256 in bf16, with gradients, in 256 MiB; about 4 GB of inputs and
    gradients. It takes 18 products' time, 28 for jsd (H200): tiles that 256 MiB hold are small, and
    their passes are PyTorch's."""
    if torch.cuda.get_device_properties(0).total_memory < 12 << 30:
        pytest.skip("needs 12 GB")
    given = operands(8192, 128256, 4096, 4096)
    assert peak_of(lambda: gradients_of(*given, divergence=kind)) <= 256 << 20
    product = torch.empty(8192, 16032, dtype=BF16, device="cuda")
    torch.mm(given[0].detach(), given[1].detach()[:16032].T, out=product)

    def seconds(call):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    def products():  # one of N V D
        for part in given[1].detach().split(16032):
            torch.mm(given[0].detach(), part.T, out=product)

    unit = min(seconds(products) for _ in range(3))
    ours = min(seconds(lambda: gradients_of(*given, divergence=kind)) for _ in range(3))
    assert ours < 40 * unit, f"{ours * 1e3:.0f} ms, {ours / unit:.1f} products"


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_nothing_waits_for_the_device(dtype, name):
    p = problems.make((3, 40), 1021, 16, dtype, bias=True)
    teacher, (ids, log_t) = teacher_of(p), stored(p, 9)

    def call():
        made = distil(p, teacher, num_items_in_batch=items, **options).loss
        other = losses.linear_distillation_top_k(
            p.e, p.c, ids, log_t, p.targets, p.bias, num_valid=count, **options
        ).loss
        return made, *torch.autograd.grad(made.sum() + other.sum(), p.parameters)

    options = {k: v for k, v in WAYS[name].items() if k != "max_workspace"}
    items = None if options.get("reduction") else torch.tensor(70.0, device="cuda")
    count = (p.targets != -100).sum().item()
    expected = call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "none", "vocabulary"])
def test_a_graph(name):
    """Captured once, replayed with other data and another number of ignored tokens."""
    p = problems.make((3, 40), 1021, 16, BF16, bias=True)
    q = problems.make((3, 40), 1021, 16, BF16, bias=True, seed=1, ignored=0.6)
    teacher = teacher_of(p)

    def call(p):
        loss = distil(p, teacher, **WAYS[name]).loss
        return loss, *torch.autograd.grad(loss.sum(), p.parameters)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call(p)
    torch.cuda.current_stream().wait_stream(side)
    graph = problems.graph()
    with torch.cuda.graph(graph):
        captured = call(p)
    for data in (p, q):
        with torch.no_grad():
            for mine, other in zip((*p.parameters, p.targets), (*data.parameters, data.targets)):
                mine.copy_(other)
        graph.replay()
        for a, b in zip(captured, call(data)):
            torch.testing.assert_close(a, b)


def test_faults_are_nan():
    p = problems.make((24,), 53, 16, ignored=0.0)
    ids, log_t = stored(p, 5)
    ids[3, 0], ids[7, 1] = 53, ids[7, 0]
    loss = losses.linear_distillation_top_k(p.e, p.c, ids, log_t, reduction="none").loss
    assert loss.isnan().nonzero()[:, 0].tolist() == [3, 7]
    p.targets[5] = 53
    loss = distil(p, teacher_of(p), hard_weight=1.0, reduction="none").loss
    assert loss.isnan().nonzero()[:, 0].tolist() == [5]
    assert distil(p, teacher_of(p), num_valid=23).loss.isnan()

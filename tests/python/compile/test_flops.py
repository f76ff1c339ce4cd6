"""FlopCounterMode counts the products of a loss, as it counts them for the same loss in PyTorch."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from helpers import problems
from torch.utils.flop_counter import FlopCounterMode

import cutloss
from cutloss import losses

pytestmark = pytest.mark.usefixtures("device")

N, D, V, T = 24, 16, 40, 12
PRODUCT = 2 * N * V * D  # of one product


def inputs(batch=(N,)):
    g = torch.Generator().manual_seed(0)
    e, c, bias = (torch.randn(*s, generator=g) for s in ((*batch, D), (V, D), (V,)))
    targets = torch.randint(0, V, batch, generator=g)
    return tuple(t.to(problems.device) for t in (e, c, targets, bias))


def flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def backward(result):
    loss = result[0] if isinstance(result, tuple) else result
    if loss.requires_grad:
        loss.sum().backward()


OPTIONS = {
    "mean": {},
    "vocabulary": dict(schedule="vocabulary"),
    "rows": dict(schedule="rows"),
    "none": dict(reduction="none"),
    "none_rows": dict(reduction="none", schedule="rows"),
    "extras": dict(return_lse=True, return_entropy=True, return_predictions=True),
    "terms": dict(label_smoothing=0.1, z_loss=1e-3, softcap=5.0, logit_scale=0.5),
    "shift": dict(shift=2),
    "shift_of_all": dict(shift=9),
}
WANTED = ["e c bias", "e", "c", "bias", "e bias", ""]  # what gets a gradient


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("name", OPTIONS)
def test_as_many_as_of_stored_logits(name, wanted):
    """impl="torch" are PyTorch's own operators, with the same gradients."""
    options = dict(OPTIONS[name])
    counts = []
    for impl in ("auto", "torch"):
        e, c, targets, bias = inputs((4, 6))
        targets[1, 2:] = -100  # which are rows, for PyTorch
        for key, t in (("e", e), ("c", c), ("bias", bias)):
            t.requires_grad_(key in wanted.split())
        how = dict(options, impl=impl)
        if impl == "torch":
            how.pop("schedule", None)
        counts.append(flops(lambda: backward(
            cutloss.linear_cross_entropy(e, c, targets, bias, **how))))  # fmt: skip
    assert counts[0] == counts[1]
    rows = 4 * max(6 - options.get("shift", 0), 0)
    products = 1 + ("e" in wanted.split()) + ("c" in wanted.split())
    assert counts[0] == products * 2 * rows * V * D


def test_as_many_as_of_pytorchs_loss():
    e, c, targets, _ = inputs()
    e.requires_grad_(), c.requires_grad_()
    want = flops(lambda: F.cross_entropy(F.linear(e, c), targets).backward())
    assert want == 3 * PRODUCT
    assert flops(lambda: cutloss.linear_cross_entropy(e, c, targets).backward()) == want
    z = F.linear(e, c).detach().requires_grad_()
    for how in ({}, {"reduction": "none"}, {"return_lse": True}):
        assert flops(lambda: backward(cutloss.cross_entropy(z, targets, **how))) == 0
        assert flops(lambda: backward(F.cross_entropy(z, targets))) == 0


@pytest.mark.parametrize("frozen", [(), ("e",), ("c",)], ids=str)
@pytest.mark.parametrize("schedule", ["auto", "rows", "vocabulary"])
def test_losses_of_tokens(schedule, frozen):
    e, c, targets, _ = inputs((4, N // 4))
    e.requires_grad_("e" not in frozen), c.requires_grad_("c" not in frozen)
    calls = [
        lambda: losses.linear_token_loss(
            e, c, targets, lambda nll: nll.exp(), schedule=schedule),
        lambda: losses.token_log_probs(e, c, targets, schedule=schedule).log_probs,
        lambda: losses.linear_loss(
            "policy", e, c, targets, advantages=torch.ones(4, device=e.device),
            schedule=schedule).loss,
    ]  # fmt: skip
    for call in calls:
        assert flops(lambda: backward(call())) == (3 - len(frozen)) * PRODUCT


@pytest.mark.parametrize("frozen", [(), ("e",), ("c",), ("e", "c")], ids=str)
@pytest.mark.parametrize("schedule", ["rows", "vocabulary"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_distillation(frozen, schedule, reduction):
    """The logits of the student and the teacher, and the student's gradients; once each, of all
    that is predicted."""
    e, c, targets, _ = inputs((4, 7))
    targets[:, 3:5] = -100
    e.requires_grad_("e" not in frozen), c.requires_grad_("c" not in frozen)
    teacher = torch.randn(4, 7, T, device=e.device), torch.randn(V, T, device=e.device)
    ids = torch.arange(3, device=e.device).expand(4, 7, 3)
    log_probs = torch.full(ids.shape, -2.0, device=e.device)
    how = dict(schedule=schedule, reduction=reduction, shift=1)
    assert 4 * (7 - 1) == N

    def of_model():
        backward((losses.linear_distillation(e, c, *teacher, targets, **how).loss,))

    def of_top_k():
        made = losses.linear_distillation_top_k(e, c, ids, log_probs, targets, **how)
        backward((made.loss,))

    assert flops(of_model) == (3 - len(frozen)) * PRODUCT + 2 * N * V * T
    assert flops(of_top_k) == (3 - len(frozen)) * PRODUCT


def test_distillation_counts_beside_what_else_is_counted():
    """Also where backward comes twice, as PyTorch counts two."""
    e, c, targets, _ = inputs()
    c.requires_grad_()
    teacher = torch.randn(N, T, device=e.device), torch.randn(V, T, device=e.device)

    def twice():
        hidden = e @ torch.eye(D, device=e.device)
        loss = losses.linear_distillation(hidden, c, *teacher, targets).loss
        loss.backward(retain_graph=True)
        loss.backward()

    assert flops(twice) == 3 * PRODUCT + 2 * N * V * T + 2 * N * D * D


def test_a_second_backward_counts_as_one():
    """Though gradients that were handed over are made again, and the loss with them."""
    e, c, targets, _ = inputs()
    e.requires_grad_(), c.requires_grad_()

    def twice(loss):
        loss.backward(retain_graph=True)
        loss.backward()

    want = flops(lambda: twice(F.cross_entropy(F.linear(e, c), targets)))
    assert want == 5 * PRODUCT
    assert flops(lambda: twice(cutloss.linear_cross_entropy(e, c, targets))) == want
    assert flops(lambda: twice(losses.linear_token_loss(e, c, targets, torch.exp))) == want


def test_in_a_module():
    """Under the name of the module that the loss is made in."""
    head = cutloss.LinearCrossEntropyLoss(in_features=D, out_features=V).to(problems.device)
    e, _, targets, _ = inputs()
    with FlopCounterMode(display=False) as counter:
        head(e.requires_grad_(), targets).backward()
    assert sum(counter.get_flop_counts()["LinearCrossEntropyLoss"].values()) == 3 * PRODUCT


@pytest.mark.parametrize("reduction, in_backward", [("mean", 0), ("none", 2)])
def test_compiled(reduction, in_backward):
    """PyTorch compiles nothing under the counter, but a graph that was may run backward there."""
    torch.compiler.reset()
    e, c, targets, _ = inputs()
    e.requires_grad_(), c.requires_grad_()

    def loss(e, c, targets):
        return cutloss.linear_cross_entropy(e, c, targets, reduction=reduction).sum()

    made = torch.compile(loss, backend="aot_eager", fullgraph=True)(e, c, targets)
    assert flops(lambda: made.backward()) == in_backward * PRODUCT
    compiled = torch.compile(loss, backend="aot_eager")
    assert flops(lambda: compiled(e, c, targets).backward()) == 3 * PRODUCT


@pytest.mark.parametrize("counter_first", [False, True])
def test_in_either_order_of_imports(counter_first):
    """And without importing the counter, which imports Triton where there is one."""
    imports = ["import cutloss", "from torch.utils.flop_counter import FlopCounterMode"]
    checks = ["import sys, torch", "hooks = len(sys.meta_path)", *imports]
    if not counter_first:
        checks.insert(3, "assert 'torch.utils.flop_counter' not in sys.modules")
    if counter_first:
        checks[2:] = imports[::-1]
    script = "\n".join(checks) + textwrap.dedent("""
        assert len(sys.meta_path) == hooks
        e, c, t = torch.randn(5, 4), torch.randn(7, 4), torch.arange(5)
        with FlopCounterMode(display=False) as counter:
            cutloss.linear_cross_entropy(e, c, t)
        print(counter.get_total_flops())
    """)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(2 * 5 * 7 * 4)

"""Token weights that add up to nothing: their mean is NaN, and somebody says why."""

import os
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from helpers import problems

import cutloss

pytestmark = pytest.mark.usefixtures("device")

SAYS = "token_weight adds up to 0 over the tokens that count"


@pytest.fixture(autouse=True)
def checks(monkeypatch):
    """With which CUDA looks as well."""
    monkeypatch.setenv("CUTLOSS_CHECK", "1")


def loss_of(p, call, **options):
    if call == "cross_entropy":
        return cutloss.cross_entropy(p.e @ p.c.T, p.targets, **options)
    return cutloss.linear_cross_entropy(p.e, p.c, p.targets, **call, **options)


CALLS = [{}, {"schedule": "vocabulary"}, {"impl": "torch"}, {"return_lse": True}, "cross_entropy"]
calls = pytest.mark.parametrize("call", CALLS, ids=str)


@calls
@pytest.mark.parametrize("kind", ["zeros", "with_gradient", "cancel"])
def test_said(call, kind):
    p = problems.make((4, 6), ignored=0.0)
    weight = torch.zeros(4, 6, device=p.e.device)
    if kind == "cancel":
        weight[0, 2], weight[1, 3] = 0.5, -0.5
    weight.requires_grad_(kind == "with_gradient")
    with pytest.warns(UserWarning, match=SAYS):
        result = loss_of(p, call, token_weight=weight)
    loss = result[0] if isinstance(result, tuple) else result
    assert loss.isnan()
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (p.e, p.c)))


@calls
def test_not_said(call):
    """Of what is defined, of sums, and of a mean over no token at all, as F.cross_entropy's."""
    p = problems.make((4, 6), ignored=0.5)
    zeros, ones = (make(4, 6, device=p.e.device) for make in (torch.zeros, torch.ones))
    nothing = problems.make((4, 6), ignored=1.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(p, call, token_weight=ones)
        for reduction in ("sum", "none"):
            loss_of(p, call, token_weight=zeros, reduction=reduction)
        for weight in (None, zeros, ones):
            loss_of(nothing, call, token_weight=weight)
        loss_of(p, call, token_weight=zeros, shift=6)


def test_on_cuda_nobody_looks_unasked(monkeypatch):
    if problems.device != "cuda":
        pytest.skip("to look costs nothing on the CPU")
    monkeypatch.delenv("CUTLOSS_CHECK")
    p = problems.make((4, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(p, {}, token_weight=torch.zeros(4, 6, device="cuda"))


def test_said_once():
    script = """
        import torch, cutloss
        e, c, t = torch.randn(3, 4), torch.randn(5, 4), torch.arange(3)
        for _ in range(3):
            cutloss.linear_cross_entropy(e, c, t, token_weight=torch.zeros(3))
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(SAYS) == 1

"""Functions of rows, calls of linear_token_loss with them, and by how many chunks calls went."""

import pytest
import torch
from helpers import problems
from helpers.inside import SCHEDULES, Options, Plan, by_rows, decide, library
from helpers.problems import Problem

from cutloss.losses import linear_token_loss


def dft(nll):
    return nll.neg().exp().detach() * nll


def focal(nll):
    return (1 - nll.neg().exp()) ** 2 * nll


def of_everything(nll, entropy, lse, w):
    return w[:, 0] * nll.exp().clamp(max=3.0) + w[:, 1] * entropy - 1e-2 * lse**2


FUNCTIONS = {
    "dft": (dft, {}),
    "focal": (focal, {}),
    "of_everything": (of_everything, dict(entropy=True, lse=True)),
}
functions = pytest.mark.parametrize("fn, takes", FUNCTIONS.values(), ids=FUNCTIONS.keys())


def slices_of(p: Problem) -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    return torch.rand(*p.targets.shape, 2, generator=g).to(p.targets.device)


def inputs_of(p: Problem, takes) -> dict:
    return dict(takes, per_token={"w": slices_of(p)}) if takes else {}


def call(p: Problem, fn, takes, **how):
    return linear_token_loss(
        p.e, p.c, p.targets, fn, p.bias, **inputs_of(p, takes), **p.options, **how
    )


def smallest(p: Problem, fn, takes) -> int:
    """Bytes of the plan by rows with the smallest chunks."""
    with pytest.raises((ValueError, NotImplementedError)) as error:
        call(p, fn, takes, schedule="rows", max_workspace=0)
    if "no engine goes by schedule rows" in str(error.value):
        pytest.skip(str(error.value))
    least = plan_by_rows(p, wants_entropy="entropy" in takes).least_bytes
    assert f"the smallest plan needs {least} bytes" in str(error.value)
    return least


def plan_by_rows(p: Problem, **options) -> Plan:
    needs = dict(needs_de=True, needs_dc=True, needs_dbias=p.bias is not None)
    options = Options(
        p.e.dtype, **needs, schedule=SCHEDULES["rows"], shift=p.options.get("shift", 0), **options
    )
    e = p.e.reshape(-1, *p.e.shape[-2:])
    targets = p.targets.reshape(e.shape[:-1])
    sizes = decide.sizes_of(e, p.c, p.bias, targets, None, None)
    return library.plan(sizes.arguments(known_at_forward=True), options)


@pytest.fixture
def chunks(monkeypatch):
    """How many chunks each call went by: its length says how many calls went by rows."""
    seen = []
    make = by_rows._make

    def counted(operands, options, start):
        seen.append(0)

        class Counted:
            def __init__(self):
                self.inner = start()

            def coefficients(self, rows, at):
                seen[-1] += 1
                return self.inner.coefficients(rows, at)

            def value(self, at):
                return self.inner.value(at)

        return make(operands, options, Counted)

    monkeypatch.setattr(by_rows, "_make", counted)
    return seen


# On CUDA, in tests of what holds there alone.
cuda = pytest.mark.skipif(
    not (torch.cuda.is_available() and library.HAS_CUDA),
    reason="no CUDA device, or a build without CUDA",
)


@pytest.fixture
def on_cuda(monkeypatch):
    monkeypatch.setattr(problems, "device", "cuda")
    monkeypatch.delenv("CUTLOSS_CHECK", raising=False)

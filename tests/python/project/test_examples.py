"""The examples run, learn, and compute what plain PyTorch computes."""

import runpy

import pytest
import torch
from helpers.checkout import ROOT

EXAMPLES = ROOT / "examples"
# Sizes that two cores can do in a few seconds: the batch, and how many steps show that it learns.
SIZES = {"clip": (256, 8), "classifier": (192, 10), "recommender": (16, 10)}

pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason="no examples beside the tests")


@pytest.fixture(params=SIZES)
def example(request):
    return request.param, runpy.run_path(EXAMPLES / f"{request.param}.py")


def test_every_example_is_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == SIZES.keys()


def test_equals_plain_pytorch(example, device):
    """Loss and the gradients of all parameters, on one batch."""
    name, code = example
    model, data = code["make"](16 if name == "recommender" else 64, device)
    batch = data.draw()
    batch = batch if isinstance(batch, tuple) else (batch,)
    got, expected = model.loss(*batch), model.plain_loss(*batch)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(got, list(parameters.values()))
    plain = torch.autograd.grad(expected, list(parameters.values()))
    for parameter, ours, theirs in zip(parameters, gradients, plain):
        error = (ours - theirs).norm() / theirs.norm()
        assert theirs.norm() > 0 and error < 1e-4, f"{parameter}: off by {error:.1e}"


def test_learns(example, device, capsys):
    name, code = example
    batch, steps = SIZES[name]
    losses = code["main"](["--steps", str(steps), "--batch", str(batch), "--device", device])
    assert len(losses) == steps
    assert sum(losses[-3:]) / 3 < sum(losses[:3]) / 3 - 0.2, losses
    assert "never stored" in capsys.readouterr().out

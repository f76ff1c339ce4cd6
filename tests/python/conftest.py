"""Every device that the package has an engine for here; the same tests run on each."""

import problems
import pytest
import torch

from cutloss import _ops

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() and _ops.HAS_CUDA else ["cpu"]


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    """Where problems.make puts its tensors."""
    monkeypatch.setattr(problems, "device", request.param)
    return request.param

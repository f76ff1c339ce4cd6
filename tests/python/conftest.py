"""Every device that the package has an engine for here, and every engine; the same tests run on
each."""

import pytest
import torch

pytest.register_assert_rewrite("helpers")  # a failed assert there says its values, as in a test

from helpers import problems  # noqa: E402
from helpers.inside import library  # noqa: E402
from helpers.labels import ADDRESS  # noqa: E402

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() and library.HAS_CUDA else ["cpu"]


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    """Where problems.make puts its tensors."""
    monkeypatch.setattr(problems, "device", request.param)
    return request.param


ENGINES = [engine.name for engine in library.engines() if not engine.absent]


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch):
    """The one that calls take; problems.make puts its tensors on its device, and skips the test
    where the engine leaves the dtype to others."""
    monkeypatch.setenv("CUTLOSS_ENGINE", request.param)
    monkeypatch.setattr(problems, "device", request.param.partition("/")[0])
    return request.param


def pytest_collection_modifyitems(items):
    """Processes that share the tests among them (pytest-xdist) must know them by the same names."""
    for item in items:
        if ADDRESS.search(item.nodeid):
            raise pytest.UsageError(
                f"the name of {item.nodeid} holds an address, another in every process: give "
                f"parametrize ids=helpers.labels.without_address"
            )

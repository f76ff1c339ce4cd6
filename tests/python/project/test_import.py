"""Importing is light, and says clearly what is wrong when it fails."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from helpers.inside import library

import cutloss


def python(script):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True, text=True, env=environment, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_adds_little_to_torch():
    seconds = python(
        """
        import time, torch
        start = time.process_time()  # what a busy machine does meanwhile is not counted
        import cutloss
        print(time.process_time() - start)
        """
    )
    assert float(seconds) < 0.3


def test_import_brings_in_nothing_heavy():
    heavy = ["matplotlib", "rich", "tqdm", "torch._dynamo", "torch._inductor", "scipy", "pandas"]
    heavy += ["transformers", "trl", "peft"]
    loaded = python(
        f"""
        import sys, torch
        before = set(sys.modules)
        import cutloss
        cutloss.patch, cutloss.trl
        print(*[m for m in {heavy} if m in sys.modules and m not in before])
        """
    )
    assert loaded == ""


def test_losses_are_imported_where_they_are_used():
    loaded = python(
        """
        import sys, cutloss
        print("cutloss.losses" in sys.modules, cutloss.losses.dpo_loss.__name__)
        """
    )
    assert loaded == "False dpo_loss"
    with pytest.raises(AttributeError, match="no attribute 'loses'"):
        cutloss.loses  # noqa: B018


def test_one_openmp_in_the_process():
    """torch's and ours are the same, or alternating calls fight over the cores."""
    mapped = python(
        """
        import cutloss
        files = {line.split()[-1] for line in open("/proc/self/maps")}
        print(*[f for f in files if "gomp" in f or "omp5" in f or "iomp" in f])
        """
    )
    assert len(mapped.split()) == 1


@pytest.mark.parametrize("key", ["CPU", "CUDA"])
def test_operators_of_every_device(key):
    """In every build: one without CUDA says why it takes nothing, and what to do."""
    for name in ("statistics", "gradients", "loss_and_gradients", "scale_"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"cutloss::{name}", key)


def test_version():
    parts = cutloss.__version__.split(".")
    assert len(parts) == 3 and all(part.isdigit() for part in parts)


def test_a_library_that_was_not_built(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "_LIBRARY", tmp_path / "libcutloss_torch.so")
    with pytest.raises(ImportError, match=f"was not built: {tmp_path}.*make build"):
        library.load()


def test_a_library_that_does_not_load(monkeypatch, tmp_path):
    broken = tmp_path / "libcutloss_torch.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(library, "_LIBRARY", broken)
    with pytest.raises(ImportError, match="could not load .*ldd"):
        library.load()


KINDS = {
    "value": ValueError,
    "type": TypeError,
    "unsupported": NotImplementedError,
    "workspace": ValueError,
    "memory": MemoryError,
    "device_memory": torch.cuda.OutOfMemoryError,
    "internal": RuntimeError,
}


@pytest.mark.parametrize("kind, expected", KINDS.items())
def test_kinds_of_errors(kind, expected):
    error = library.translated(RuntimeError(f"cutloss[{kind}]: a message\nof two lines"))
    assert type(error) is expected and "a message\nof two lines" in str(error)


def test_errors_of_others_stay_as_they_are():
    for message in ("CUDA error", "cutloss[unknown]: x", "see cutloss[value]: x"):
        error = RuntimeError(message)
        assert library.translated(error) is error

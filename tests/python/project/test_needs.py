"""What is said where a machine lacks what cutloss needs: when it is imported, and by cutloss doctor."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from helpers.checkout import ROOT
from helpers.inside import library, needs
from helpers.inside_cli import UserError, check_device, doctor

HERE = pathlib.Path("/somewhere/libcutloss_torch.so")


def run(script, *arguments, **environment):
    path = os.pathsep.join(sys.path)
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


# Importing -------------------------------------------------------------------------------------


def test_an_older_pytorch_is_named_before_what_it_lacks_is_missed():
    """Such as names that private.py takes. The command says it too."""
    done = run(
        """
        import runpy, sys, torch
        torch.__version__ = "2.9.1+cu128"
        del torch._C._functorch.is_legacy_batchedtensor, torch.OutOfMemoryError
        sys.argv = ["cutloss", "doctor"]
        runpy.run_module("cutloss", run_name="__main__")
        """
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: cutloss needs PyTorch 2.10 or later, this is 2.9.1+cu128")
    assert "pip install 'torch>=2.10'" in last


def test_a_newer_pytorch_that_lacks_a_private_name():
    done = run(
        """
        import torch
        torch.__version__ = "2.99.0"
        del torch._C._functorch.is_legacy_batchedtensor
        import cutloss
        """
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: cutloss could not be imported") and "2.99.0" in last
    assert "is_legacy_batchedtensor" in last and "tried up to" in last


@pytest.mark.parametrize("version", ["2.10.0", "2.10.0a0+git12ab", "2.14.1+cu130", "3.0.0.dev1"])
def test_versions_that_are_taken(version):
    assert needs.torch_refusal(version) is None


@pytest.mark.parametrize("version", ["2.9.1", "1.13.1+cu117"])
def test_versions_that_are_not(version):
    assert f"this is {version}" in needs.torch_refusal(version)


def test_the_newest_that_was_tried_is_the_one_that_tests_run_with():
    requirements = ROOT / "scripts" / "requirements.txt"
    if not requirements.exists():
        pytest.skip("no scripts beside the tests")
    pinned = re.search(r"^torch==(\S+)$", requirements.read_text(), re.MULTILINE)[1]
    assert needs.torch_release(pinned) == needs.NEWEST_TRIED_TORCH


def test_the_oldest_is_the_package_index_s_too():
    settings = ROOT / "pyproject.toml"
    if not settings.exists():
        pytest.skip("no pyproject.toml beside the tests")
    oldest = f"torch>={needs.dotted(needs.OLDEST_TORCH)}"
    assert settings.read_text().count(f'"{oldest}"') == 2  # to build with, to run with


# The loader's own words, of a library linked to a libc or libstdc++ that has more than this one's.
GLIBC = f"/lib/x86_64-linux-gnu/libc.so.6: version `GLIBC_2.34' not found (required by {HERE})"
GLIBCXX = f"/opt/conda/lib/libstdc++.so.6: version `GLIBCXX_3.4.29' not found (required by {HERE})"
GOMP = f"/lib/libgomp.so.1: version `GOMP_4.5' not found (required by {HERE})"


@pytest.mark.parametrize(
    "reason, expected",
    [
        (GLIBC, ["GLIBC_2.34", "glibc is 2.31", "manylinux_2_34_x86_64", "Debian 12", "make wheel"]),
        (GLIBCXX, ["C++ library", "GLIBCXX_3.4.29", "conda install -c conda-forge libstdcxx"]),
        (GOMP, ["OpenMP library", "GOMP_4.5", "conda install -c conda-forge libgomp"]),
        (f"{HERE}: undefined symbol: aoti_torch_x", ["aoti_torch_x", "2.10", "this PyTorch (2.99)"]),
        ("libdnnl.so.3: cannot open shared object file: No such file", ["libdnnl.so.3", "ldd"]),
    ],
)
def test_why_the_library_was_not_loaded(monkeypatch, reason, expected):
    monkeypatch.setattr(needs.platform, "libc_ver", lambda: ("glibc", "2.31"))
    monkeypatch.setattr(needs, "wheel_platform", lambda: "manylinux_2_34_x86_64")
    said = needs.loading_refusal(HERE, reason, "2.99")
    assert said.startswith(f"cutloss could not load {HERE}: {reason}; ")
    for words in expected:
        assert words in said


@pytest.fixture
def compiler():
    found = shutil.which("cc")
    if found is None:
        pytest.skip("no C compiler here")
    return found


def built(compiler, source, to, *options):
    command = [compiler, "-shared", "-fPIC", "-w", "-x", "c", "-", "-x", "none", "-o", to, *options]
    subprocess.run(command, input=source, text=True, check=True)
    return to


def test_a_library_for_another_pytorch(monkeypatch, tmp_path, compiler):
    source = "int aoti_torch_of_tomorrow(void); int f(void) { return aoti_torch_of_tomorrow(); }"
    made = built(compiler, source, tmp_path / "libcutloss_torch.so")
    monkeypatch.setattr(library, "_LIBRARY", made)
    with pytest.raises(ImportError, match="aoti_torch_of_tomorrow.*was tried up to"):
        library.load()


def test_a_library_for_another_libc(monkeypatch, tmp_path, compiler):
    """As the loader says it: linked to a libc.so.6 that has a version which this machine's has not."""
    versions = tmp_path / "versions"
    versions.write_text("GLIBC_2.99 { global: of_tomorrow; };")
    other = tmp_path / "other"
    other.mkdir()
    stand_in = built(
        compiler, "int of_tomorrow(void) { return 0; }", other / "libc.so.6",
        "-nostdlib", "-Wl,-soname,libc.so.6", f"-Wl,--version-script={versions}",
    )  # fmt: skip
    source = "int of_tomorrow(void); int f(void) { return of_tomorrow(); }"
    made = built(compiler, source, tmp_path / "libcutloss_torch.so", "-nostdlib", stand_in)
    monkeypatch.setattr(library, "_LIBRARY", made)
    with pytest.raises(ImportError, match="glibc is .* has no GLIBC_2.99.*Debian 12"):
        library.load()


# The driver ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "driver, cuda, expected",
    [
        ("550.54.15", "13.0", "CUDA 13 needs NVIDIA's driver 580 or newer, and 550.54.15 is here"),
        ("470.82", "12.8", "CUDA 12 needs NVIDIA's driver 525 or newer, and 470.82 is here"),
        ("580.65.06", "13.0", None),
        ("550.54.15", "12.8", None),
        ("580.65.06", "14.1", None),  # of a later CUDA nothing is known
    ],
)
def test_drivers(driver, cuda, expected):
    said = needs.driver_refusal(driver, cuda)
    assert (said is None) if expected is None else said.startswith(expected)


def test_doctor_says_that_the_driver_is_too_old_for_pytorch(monkeypatch):
    """And so do the commands that are told to use it."""
    monkeypatch.setattr(needs, "nvidia_driver", lambda: "550.54.15")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = "\n".join(doctor._cuda())
    assert "finds no device" in said
    expected = "driver 580 or newer, and 550.54.15 is here: update the driver"
    assert expected in said
    with pytest.raises(UserError, match=expected):
        check_device("cuda")
    monkeypatch.setattr(needs, "nvidia_driver", lambda: None)
    with pytest.raises(UserError, match="cutloss doctor.*driver: none"):
        check_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UserError, match="install a CUDA build of PyTorch"):
        check_device("cuda")


def test_doctor_says_that_pytorch_is_for_another_cuda(monkeypatch):
    monkeypatch.setattr(library, "cuda_version", lambda: (13, 0))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "built for CUDA 13.0" in " ".join(doctor._mixed_cuda())
    monkeypatch.setattr(torch.version, "cuda", "13.1")
    assert not list(doctor._mixed_cuda())


# What a program finds that opens CUDA 12.4's driver: enough of it to be asked for its version.
OLD_DRIVER = """
#include <string.h>
int any(void) { return 0; }
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int* version) { *version = 12040; return 0; }
int cuGetProcAddress_v2(const char* name, void** found, int version, unsigned long flags, void* how) {
  if (!strcmp(name, "cuGetExportTable")) { *found = 0; return 500; }
  *found = !strcmp(name, "cuDriverGetVersion") ? (void*)cuDriverGetVersion
         : !strcmp(name, "cuInit")             ? (void*)cuInit
         : !strcmp(name, "cuGetProcAddress")   ? (void*)cuGetProcAddress_v2
                                               : (void*)any;
  return 0;
}
int cuGetProcAddress(const char* name, void** found, int version, unsigned long flags) {
  return cuGetProcAddress_v2(name, found, version, flags, 0);
}
"""


@pytest.mark.skipif(not library.HAS_CUDA, reason="this build has no CUDA engines")
def test_a_driver_that_is_too_old_for_this_build(tmp_path, compiler):
    """It is named, and everything on the CPU works."""
    if library.cuda_version() < (13, 0):
        pytest.skip("the stand-in is for builds for CUDA 13")
    built(compiler, OLD_DRIVER, tmp_path / "libcuda.so.1", "-Wl,-soname,libcuda.so.1")
    done = run(
        """
        import torch, cutloss
        from cutloss.cli import doctor
        e, c = torch.randn(9, 8), torch.randn(31, 8)
        assert cutloss.linear_cross_entropy(e, c, torch.randint(31, (9,))).isfinite()
        for line in doctor._engines():
            print(line)
        from cutloss.cli.bench import cases, methods, plan
        try:
            on_gpu = cases.Case(8, 16, 100, "bf16", device="cuda")
            plan.decide(on_gpu, methods.Method("cutloss"), "fwbw")
        except plan.Refusal as error:
            print("refused:", error)
        """,
        LD_LIBRARY_PATH=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert "not here: the CUDA driver is for CUDA 12.4" in done.stdout
    words = "needs one for CUDA 13.0 or later: update the driver, or build"
    found, refused = done.stdout.split("refused:")
    assert words in found and words in refused


# The rest of doctor ----------------------------------------------------------------------------


def test_doctor_says_what_this_build_is_for(monkeypatch):
    monkeypatch.setattr(library, "cuda_version", lambda: (13, 0))
    monkeypatch.setattr(library, "cuda_code", lambda: "80-real 90-real")
    monkeypatch.setattr(needs, "wheel_platform", lambda: "manylinux_2_34_x86_64")
    said = "\n".join(doctor._versions())
    assert "built for CUDA 13.0 (code for 80-real 90-real), manylinux_2_34_x86_64" in said
    assert "newer than" not in said
    monkeypatch.setattr(torch, "__version__", "2.99.1")
    assert "PyTorch 2.99.1 is newer than 2.13" in "\n".join(doctor._versions())


def test_what_this_build_is_for():
    assert library.HAS_CUDA == (library.cuda_version() is not None) == (library.cuda_code() != "")
    platform = needs.wheel_platform()
    assert platform is None or platform.endswith("x86_64")


@pytest.mark.parametrize("features, slow", [({"sse2", "avx2"}, False), ({"sse2"}, True)])
def test_doctor_says_that_a_processor_is_slow(monkeypatch, features, slow):
    monkeypatch.setattr(doctor, "_features", lambda: features)
    assert ("no avx2" in "\n".join(doctor._processor())) == slow

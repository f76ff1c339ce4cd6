"""What a checkout's build compiles CUDA code for: scripts/cuda.sh beside a made-up nvidia-smi and nvcc."""

import os
import re
import shutil
import subprocess

import pytest
from helpers.checkout import ROOT

SCRIPTS = ROOT / "scripts"
pytestmark = pytest.mark.skipif(not SCRIPTS.exists(), reason="no scripts beside the tests")

# No header files are fetched; `unfound` hides this machine's nvcc.
BEFORE = """
set -euo pipefail
say() { printf '== %s\\n' "$*"; }
die() { printf '%s\\n' "$*"; exit 1; }
source "$SCRIPTS/cuda.sh"
install_cuda_headers() { :; }
if [[ -n ${unfound:-} ]]; then find_nvcc() { :; }; fi
"""
AFTER = """
printf '%s\\n' "CUDA=$CUDA" "${cuda_flags[@]}"
"""
NVCC = """#!/bin/sh
if [ "$1" = --list-gpu-code ]; then printf 'sm_%s\\n' 60 75 80 90 100; fi
"""
NO_DEVICES = "echo 'No devices were found'; exit 6"


@pytest.fixture
def checkout(tmp_path):
    """A folder with a PATH of its own, in which there is an nvcc and no nvidia-smi."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "sh", "sed", "sort", "tr", "rm", "mkdir"):
        (programs / name).symlink_to(shutil.which(name))
    write_program(programs / "nvcc", NVCC)
    return tmp_path


def write_program(path, text):
    path.write_text(text)
    path.chmod(0o755)


def calls_of(script):
    """The lines of a script that call what cuda.sh defines."""
    calls = r"^(?:for setting in|recall|build_for_gpus_here|settle_cuda)\b.*$"
    return "\n".join(re.findall(calls, (SCRIPTS / script).read_text(), re.MULTILINE))


def settled(checkout, smi=None, script="setup.sh", **environment):
    """(CUDA, architectures that CMake is given, what was said)"""
    if smi is not None:
        write_program(checkout / "bin" / "nvidia-smi", f"#!/bin/sh\n{smi}\n")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("CUTLOSS_", "CUDACXX"))}
    kept |= {"PATH": str(checkout / "bin"), "SCRIPTS": str(SCRIPTS)} | environment
    done = subprocess.run(
        [checkout / "bin" / "bash", "-c", BEFORE + calls_of(script) + AFTER],
        env=kept, cwd=checkout, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stderr == "", done.stderr
    given = (line for line in done.stdout.splitlines() if line.startswith(("CUDA=", "-D")))
    found = dict(line.split("=", 1) for line in given)
    return found.get("CUDA"), found.get("-DCUTLOSS_CUDA_ARCHITECTURES"), done.stdout


def capabilities(*lines):
    """An nvidia-smi that answers only the question for the GPUs' compute capabilities."""
    question = "--query-gpu=compute_cap --format=csv,noheader"
    return f"""[ "$*" = "{question}" ] && printf '%s\\n' {" ".join(lines)}"""


@pytest.mark.parametrize("smi", [None, NO_DEVICES], ids=["no nvidia-smi", "no devices"])
def test_without_a_gpu_no_cuda_code_is_built_and_one_line_says_so(checkout, smi):
    cuda, architectures, said = settled(checkout, smi)
    assert (cuda, architectures) == ("OFF", None)
    lines = [line for line in said.splitlines() if line.startswith("==")]
    assert len(lines) == 1 and "no GPU" in lines[0] and "CUTLOSS_CUDA=ON" in lines[0]


@pytest.mark.parametrize(
    "found, expected",
    [
        (["9.0"], "90-real"),
        (["9.0"] * 8, "90-real"),
        (["10.0", "9.0", "8.0"], "80-real;90-real;100-real"),
    ],
)
def test_cuda_code_is_built_for_the_gpus_that_are_here(checkout, found, expected):
    assert settled(checkout, capabilities(*found))[:2] == ("ON", expected)


def test_a_gpu_that_cannot_be_compiled_for_is_named(checkout):
    """6.0 is older than what the engines take, 13.0 newer than what this nvcc knows."""
    cuda, architectures, said = settled(checkout, capabilities("6.0", "8.0", "13.0"))
    assert (cuda, architectures) == ("ON", "80-real")
    assert "sm_60" in said and "sm_130" in said
    cuda, _, said = settled(checkout, capabilities("6.0"))
    assert cuda == "OFF" and "none of the GPUs here" in said and "CUTLOSS_CUDA=ON" in said


@pytest.mark.parametrize(
    "asked, expected",
    [
        ({"CUTLOSS_CUDA": "ON"}, ("ON", "")),  # empty: every architecture
        ({"CUTLOSS_CUDA_ARCHITECTURES": "80-real;90-real"}, ("ON", "80-real;90-real")),
        ({"CUTLOSS_CUDA": "OFF", "CUTLOSS_CUDA_ARCHITECTURES": "90"}, ("OFF", None)),
    ],
)
def test_what_is_asked_for_is_built_without_a_gpu_and_remembered(checkout, asked, expected):
    assert settled(checkout, **asked)[:2] == expected
    assert settled(checkout)[:2] == expected
    forgotten = dict.fromkeys(asked, "")
    assert settled(checkout, **forgotten)[:2] == ("OFF", None)


def test_what_is_found_is_not_remembered(checkout):
    assert settled(checkout, capabilities("9.0"))[1] == "90-real"
    assert settled(checkout, capabilities("8.0"))[1] == "80-real"
    assert settled(checkout, NO_DEVICES)[0] == "OFF"


def test_what_is_asked_for_goes_before_the_gpus(checkout):
    smi = capabilities("9.0")
    assert settled(checkout, smi, CUTLOSS_CUDA_ARCHITECTURES="80")[:2] == ("ON", "80")
    cuda, _, said = settled(checkout, smi, CUTLOSS_CUDA="OFF", CUTLOSS_CUDA_ARCHITECTURES="")
    assert cuda == "OFF" and "==" not in said


def test_a_gpu_without_nvcc(checkout):
    smi = capabilities("9.0")
    cuda, _, said = settled(checkout, smi, unfound="yes")
    assert cuda == "OFF" and said.count("==") == 1 and "nvcc was not found" in said
    cuda, _, said = settled(checkout, smi, unfound="yes", CUTLOSS_CUDA="ON")
    assert cuda is None and "CUTLOSS_CUDA=ON, but there is no nvcc" in said


def test_the_toolkit_that_was_fetched_goes_before_others(checkout):
    """It was asked for, and need not be the machine's version. CUDACXX goes before both."""
    fetched = checkout / ".venv/cuda-toolkit/bin/nvcc"
    fetched.parent.mkdir(parents=True)
    write_program(fetched, NVCC)
    assert f"CUDA engines with {fetched}" in settled(checkout, script="wheel.sh")[2]
    own = str(checkout / "bin" / "nvcc")
    assert f"CUDA engines with {own}" in settled(checkout, script="wheel.sh", CUDACXX=own)[2]


def test_another_compiler_is_not_taken_for_the_one_that_cmake_kept(checkout):
    own = str(checkout / "bin" / "nvcc")
    caches = {}
    for folder, line in {
        "same": f"CMAKE_CUDA_COMPILER:FILEPATH={own}",
        "other": "CMAKE_CUDA_COMPILER:STRING=/usr/local/cuda-12.8/bin/nvcc",
        "none": "CUTLOSS_CUDA:BOOL=OFF",
        "unfound": "CMAKE_CUDA_COMPILER:FILEPATH=CMAKE_CUDA_COMPILER-NOTFOUND",
    }.items():
        caches[folder] = checkout / "build" / folder / "CMakeCache.txt"
        caches[folder].parent.mkdir(parents=True)
        caches[folder].write_text(line + "\n")
    said = settled(checkout, script="wheel.sh", CUDACXX=own)[2]
    assert [name for name, cache in caches.items() if not cache.exists()] == ["other"]
    assert "build/other is built anew: it was for /usr/local/cuda-12.8/bin/nvcc" in said


PIP = """#!/bin/sh
for last in "$@"; do :; done
case "$2" in pip) echo "$last" >>fetched ;; esac
mkdir -p .venv/cuda/wheels; : >.venv/cuda/wheels/x.whl
"""


@pytest.mark.parametrize(
    "release, expected",
    [
        ("13.0", ["nvidia-cutlass", "nvidia-cublas"]),
        ("12.8", ["nvidia-cutlass", "nvidia-cublas-cu12"]),
        ("11.8", None),
    ],
)
def test_headers_are_of_the_compilers_own_cuda(checkout, release, expected):
    """Where the toolkit has none of cuBLAS."""
    answer = f"echo 'Cuda compilation tools, release {release}, V{release}.1'"
    nvcc = f"#!/bin/sh\nif [ $1 = --version ]; then {answer}; else exit 1; fi\n"
    write_program(checkout / "bin" / "nvcc", nvcc)
    (checkout / ".venv/bin").mkdir(parents=True)
    write_program(checkout / ".venv/bin/python", PIP)
    (checkout / "scripts").symlink_to(SCRIPTS)
    for name in ("sha256sum", "grep"):
        (checkout / "bin" / name).symlink_to(shutil.which(name))
    before = BEFORE.replace("install_cuda_headers() { :; }", "")
    done = subprocess.run(
        [checkout / "bin" / "bash", "-c", before + "install_cuda_headers nvcc"],
        env={"PATH": str(checkout / "bin"), "SCRIPTS": str(SCRIPTS)}, cwd=checkout,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if expected is None:
        assert done.returncode != 0 and "nvcc is of CUDA 11.8" in done.stdout
        return
    assert done.returncode == 0, done.stderr
    fetched = (checkout / "fetched").read_text().split()
    assert [line.partition("==")[0] for line in fetched] == expected


def test_a_wheel_is_for_every_architecture_whatever_is_here(checkout):
    settled(checkout, CUTLOSS_CUDA="OFF")  # is remembered, but not for wheels
    for smi in (NO_DEVICES, capabilities("9.0")):
        assert settled(checkout, smi, script="wheel.sh")[:2] == ("ON", "")

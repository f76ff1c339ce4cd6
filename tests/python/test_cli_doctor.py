"""cutloss doctor."""

import dataclasses
import sys

import pytest
import torch
from cli_helpers import assert_refused, run_cli

import cutloss
from cutloss.cli import doctor
from cutloss.cli.bench import methods, odd_sizes


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """Without the odd sizes, which take seconds, where they are not what is tested."""
    if "odd_sizes" not in request.node.name:
        monkeypatch.setattr(doctor, "ODD_SIZES", (sys.executable, "-c", ""))


def test_doctor_says_what_it_found(capsys):
    done = run_cli(capsys, "doctor", "--shape", "64,32,1000")
    assert done.code == 0, done.out
    assert f"cutloss {cutloss.__version__}" in done.out
    assert f"PyTorch {torch.__version__}" in done.out
    assert "engine cpu" in done.out
    assert "N 64, D 32, V 1000, fp32" in done.out
    assert "products" in done.out
    assert "fits in 536870912 bytes (512 MiB)" in done.out
    assert "Nothing is broken." in done.out


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--dtype", "bf16"], "compute bf16"),
        (["--schedule", "vocabulary"], "schedule vocabulary"),
        (["--frozen"], "products 2"),
    ],
)
def test_doctor_asks_for_the_given_loss(capsys, options, expected):
    done = run_cli(capsys, "doctor", "--shape", "64,32,1000", *options)
    assert done.code == 0, done.out
    assert expected in done.out


def test_doctor_says_why_nothing_takes_a_loss(capsys):
    shape = "100000,1000,1000000"
    done = run_cli(capsys, "doctor", "--shape", shape, "--schedule", "rows", "--max-workspace", 1)
    assert done.code == 0, done.out
    assert "no engine takes it" in done.out
    assert "max_workspace is 1048576" in done.out


def test_doctor_tries_odd_sizes(capsys):
    done = run_cli(capsys, "doctor", "--device", "cpu")
    assert done.code == 0, done.out
    assert "self-check of odd sizes on the CPU:\n  products and gradients of 6 sizes" in done.out


def test_doctor_tries_odd_sizes_on_the_cpu_whatever_the_device(capsys, monkeypatch):
    for name in ("check_device", "_plan", "_self_check"):  # there may be no GPU here
        monkeypatch.setattr(doctor, name, lambda *_: [])
    child = "print('dE is wrong'); raise SystemExit(1)"
    monkeypatch.setattr(doctor, "ODD_SIZES", (sys.executable, "-c", child))
    done = run_cli(capsys, "doctor", "--device", "cuda")
    assert done.code == 1
    assert "Broken: dE is wrong." in done.out


def test_odd_sizes_finds_wrong_gradients(monkeypatch):
    monkeypatch.setattr(odd_sizes, "SIZES", ((63, 33, 511),))
    assert list(odd_sizes.wrong()) == []
    factor_on_the_loss(monkeypatch, 1.01)
    found = list(odd_sizes.wrong())
    assert len(found) == 12, found  # 3 dtypes, 2 schedules, 2 workspaces
    assert "N 63, D 33, V 511, bf16, cutloss rows" in found[0]


@pytest.mark.parametrize(
    "child, expected",
    [
        ("print('dE is wrong'); raise SystemExit(1)", "Broken: dE is wrong."),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "was ended by SIGILL"),
        ("raise RuntimeError('no library')", "the check failed: RuntimeError: no library"),
    ],
)
def test_doctor_survives_odd_sizes(capsys, monkeypatch, child, expected):
    monkeypatch.setattr(doctor, "ODD_SIZES", (sys.executable, "-c", child))
    done = run_cli(capsys, "doctor", "--device", "cpu")
    assert done.code == 1
    assert expected in done.out


def factor_on_the_loss(monkeypatch, factor):
    right = methods.LOSSES["cutloss"]
    wrong = dataclasses.replace(right, function=lambda *a: factor * right.function(*a))
    monkeypatch.setitem(methods.LOSSES, "cutloss", wrong)


def test_doctor_finds_a_wrong_loss(capsys, monkeypatch):
    factor_on_the_loss(monkeypatch, 1.01)
    done = run_cli(capsys, "doctor")
    assert done.code == 1
    assert "Broken: " in done.out
    assert "dC in fp32, randn" in done.out


def test_doctor_finds_a_nan(capsys, monkeypatch):
    factor_on_the_loss(monkeypatch, float("nan"))
    assert run_cli(capsys, "doctor").code == 1


def test_openmp_runtimes_are_files():
    for path in doctor._openmp_runtimes():
        assert path.startswith("/")


def test_doctor_refuses(capsys):
    assert_refused(run_cli(capsys, "doctor", "--shape", "64,32"), "N,D,V", "'64,32'")
    assert_refused(run_cli(capsys, "doctor", "--shape", "64,0,10"), "at least 1", "'0'")
    assert_refused(run_cli(capsys, "doctor", "--dtype", "int8"), "int8")


def test_no_command(capsys):
    assert_refused(run_cli(capsys), "demo|doctor|bench")
    assert_refused(run_cli(capsys, "sing"), "sing")

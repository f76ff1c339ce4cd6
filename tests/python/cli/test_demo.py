"""cutloss demo: its text, its training, what it shows."""

import os
import re
import struct
import subprocess
import sys
import types

import pytest
import torch
from helpers.command_line import assert_refused, run_cli
from helpers.inside_cli import Method
from helpers.inside_demo import flat, largest_difference, slowness, text, train
from hypothesis import given, settings
from hypothesis import strategies as st

from cutloss import cli

SMALL = text.Vocabulary.of("the cat sat on the mat, and the cat's mat -- it sat.", 300)
TINY = ["--vocab", 600, "--batch", 2, "--length", 16, "--steps", 3, "--max-workspace", 1]


@pytest.fixture
def novel(tmp_path):
    path = tmp_path / "novel.txt"
    path.write_text("It was the best of times, it was the worst of times; café 1859.\n" * 20)
    return path


@settings(deadline=None)  # its time depends on what else runs
@given(st.text())
def test_a_text_comes_back_from_its_ids(written):
    ids = SMALL.encode(written)
    assert all(0 <= i < SMALL.size for i in ids)
    assert SMALL.decode(ids) == written


def test_frequent_words_get_ids_and_rare_ones_bytes():
    vocabulary = text.Vocabulary.of("aa aa aa bb bb cc", 256 + 2)
    assert vocabulary.words == [" aa", " bb"]
    assert vocabulary.encode(" aa cc") == [256, *b" cc"]


def test_the_bundled_text_fills_the_vocabulary():
    words = text.read_text()
    vocabulary = text.Vocabulary.of(words, 32768)
    assert vocabulary.known == 32768
    start = words[:5000]
    assert vocabulary.decode(vocabulary.encode(start)) == start


def setting(**changes):
    values = dict(V=700, D=64, layers=1, length=16, batch=4, learning_rate=2e-3)
    values |= dict(dtype="fp32", device="cpu", seed=3) | changes
    return train.Setting(**values)


def trained(setting, *losses, steps=6):
    """Runs with these losses, after some steps on made-up text that repeats itself."""
    ids = [300 + i * i % 97 for i in range(500)]
    runs = [train.Run(str(i), flat(loss), setting) for i, loss in enumerate(losses)]
    train.train(runs, train.Batches(ids, setting), steps, 60.0, lambda step: None)
    return runs


@pytest.mark.parametrize("dtype, tolerance", [("fp32", 1e-4), ("bf16", 2e-2)])
def test_training_with_cutloss_follows_plain(dtype, tolerance):
    ours = Method("cutloss", max_workspace_mib=1).loss
    runs = trained(setting(dtype=dtype), ours, Method("plain").loss)
    assert len(runs[0].losses) == len(runs[1].losses) == 6
    assert largest_difference(runs) < tolerance
    assert runs[0].losses[-1] < runs[0].losses[0]


def test_a_wrong_loss_is_seen():
    plain = Method("plain").loss
    runs = trained(setting(), lambda e, c, t: plain(e, 1.05 * c, t), plain)
    assert largest_difference(runs) > 1e-3
    batches = train.Batches(list(range(300, 400)), setting())
    seen = train.agreement(runs[1], *(run.loss_function for run in runs), batches)
    assert min(seen.loss, seen.de, seen.dc) > 1e-4


def test_training_stops_when_its_time_is_up():
    run = train.Run("plain", flat(Method("plain").loss), setting())
    train.train([run], train.Batches(list(range(100)), setting()), 1000, 1e-9, lambda step: None)
    assert len(run.losses) == 1


def test_the_cut_graph_gives_the_whole_gradient():
    """Timing the loss apart must not change the training."""
    plain = flat(Method("plain").loss)
    run = train.Run("plain", plain, setting())
    run._optimizer.step = lambda: None
    run._optimizer.zero_grad = lambda **_: None
    inputs, targets = train.Batches(list(range(100)), setting()).next()
    run.step(inputs, targets)
    whole = train.Run("plain", plain, setting()).model
    plain(whole(inputs), whole.classifier, targets).backward()
    for ours, theirs in zip(run.model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_demo_shows_a_table_and_draws(capsys, novel, tmp_path):
    done = run_cli(capsys, "demo", *TINY, "--text", novel, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    for row in ("loss at step 1", "loss at step 3", "largest difference", "gradient of C"):
        assert row in done.out
    assert re.search(r"peak memory of the loss\s*│\s*[\d.]+ MiB │\s*[\d.]+ MiB", done.out)
    assert re.search(r"forward \+ backward \(median\)\s*│\s*\d+ ms │\s*\d+ ms", done.out)
    difference = re.search(r"largest difference of the losses\s*│\s*(\S+)", done.out)
    assert float(difference[1]) < 1e-4
    picture = (tmp_path / "out" / "cutloss-demo.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", picture[16:24])
    assert width > 600 and height > 300


def test_a_slow_demo_says_what_to_do(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    quick, slow = (types.SimpleNamespace(loss_seconds=[s, s, 9.0]) for s in (0.1, 0.2))
    assert slowness([quick, slow], "cpu") is None and slowness([quick], "cpu") is None
    assert "OMP_WAIT_POLICY" in slowness([slow, quick], "cpu")
    assert slowness([slow, quick], "cuda") is None
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    hint = slowness([slow, quick], "cpu")
    assert "a quiet one" in hint and "OMP_WAIT_POLICY" not in hint


def undecided(environment):
    """Without what says how OpenMP's threads wait."""
    waiting = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    return {name: value for name, value in environment.items() if name not in waiting}


def test_the_threads_of_a_demo_sleep_while_they_wait(tmp_path):
    """OpenMP itself says how often a thread looks before it sleeps, each time that it is loaded."""
    missing = tmp_path / "missing.txt"
    done = subprocess.run(
        [sys.executable, "-m", "cutloss", "demo", "--text", missing, "--out", tmp_path],
        env=undecided(os.environ) | {"OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and str(missing) in done.stderr
    spins = re.findall(r"GOMP_SPINCOUNT = '(\w+)'", done.stderr)
    assert len(spins) == 2 and spins[0] != "0" and spins[1] == "0"


def start(monkeypatch, *argv, **environment):
    """The commands with which `cutloss ...` starts itself anew; it does nothing else."""
    started = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", undecided(os.environ) | environment)
        patch.setattr(os, "execv", lambda path, argv: started.append((path, argv, os.environ)))
        patch.setattr("cutloss.cli.demo.command.run", lambda args: 0)
        patch.setattr("cutloss.cli.bench.command.run", lambda args: 0)
        patch.setattr(sys, "argv", ["cutloss", *argv])
        assert cli.main() == 0 and cli.main(argv) == 0
    return started


def test_only_a_demo_on_the_cpu_starts_anew_and_only_where_nothing_is_decided(monkeypatch):
    ((path, argv, environment),) = start(monkeypatch, "demo")
    assert path == argv[0] == sys.executable and argv[1:] == sys.orig_argv[1:]
    assert environment["OMP_WAIT_POLICY"] == "passive"
    assert start(monkeypatch, "bench") == []
    assert start(monkeypatch, "demo", "--device", "cuda") == []
    assert start(monkeypatch, "demo", OMP_WAIT_POLICY="active") == []
    assert start(monkeypatch, "demo", GOMP_SPINCOUNT="1000") == []


def test_demo_alone(capsys, monkeypatch, novel, tmp_path):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    done = run_cli(capsys, "demo", *TINY, "--no-compare", "--text", novel, "--out", tmp_path)
    assert done.code == 0, done.err
    assert "plain PyTorch" not in done.out
    assert "sleep while they wait (OMP_WAIT_POLICY=passive)" in done.out
    assert (tmp_path / "cutloss-demo.png").exists()


def test_demo_refuses(capsys, novel, tmp_path):
    def refused(*argv):
        return run_cli(capsys, "demo", "--out", tmp_path, *argv)

    short = tmp_path / "short.txt"
    short.write_text("too short")
    missing = tmp_path / "missing.txt"
    assert_refused(refused("--text", missing), str(missing), "No such file")
    assert_refused(refused("--text", short, "--vocab", 300), "has 2 tokens", "need 129")
    assert_refused(refused("--text", novel, "--vocab", 256), "more than 256", "got 256")
    assert_refused(refused("--steps", 0), "--steps", "'0'")
    assert_refused(refused("--seconds", "soon"), "--seconds", "'soon'")
    assert_refused(refused("--dtype", "int8"), "--dtype", "int8")
    assert_refused(run_cli(capsys, "demo", "--out", short), str(short))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_demo_without_cuda(capsys, tmp_path):
    outcome = run_cli(capsys, "demo", "--device", "cuda", "--out", tmp_path)
    assert_refused(outcome, "no CUDA device", "--device cpu")

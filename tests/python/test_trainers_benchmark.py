"""benchmarks/trainers.py: TRL's trainers beside ours at small sizes."""

import json
import pathlib
import runpy
import sys

import pytest
import trl

import cutloss.trl
from cutloss.cli.bench import record, train_models

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "benchmarks" / "trainers.py"
SMALL = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
             head_dim=8, max_position_embeddings=64)  # fmt: skip
STEPS = ["--layers", 1, "--vocabulary", 301, "--length", 16, "--batch", 2, "--steps", 4]

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="no benchmarks beside the tests")


@pytest.fixture
def script(monkeypatch):
    """The names of the program, whose models are small."""
    found = train_models.entries()
    for entry in found.values():
        entry["config"] |= SMALL
    monkeypatch.setattr(train_models, "entries", lambda: found)
    return runpy.run_path(str(SCRIPT))


def run(script, *argv):
    return script["main"]([str(a) for a in argv])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_trainer_agrees_with_trls(script, capsys, tmp_path):
    path = tmp_path / "out.json"
    assert run(script, *STEPS, "--json", path) == 0, capsys.readouterr().out
    shown = capsys.readouterr().out
    assert shown.count("losses and norms agree") == 4 and "WRONG" not in shown
    found = lines(path)
    assert [p for line in found for p in record.problems(line)] == []
    names = ["SFTTrainer", "DPOTrainer", "GRPOTrainer", "KTOTrainer"]
    measured = [(line["trainer"], line["method"]) for line in found]
    assert measured == [(name, method) for name in names for method in ("trl", "cutloss")]
    for line in found:
        assert (line["V"], line["layers"], line["sequence"]) == (301, 1, 16)
        assert line["N"] == (64 if line["trainer"] == "DPOTrainer" else 32)
        assert len(line["losses"]) == len(line["grad_norms"]) == len(line["step_ms"]) == 4
        assert min(line["step_ms"][2:]) <= line["ms"] <= max(line["step_ms"][2:])
        assert not line["is_wrong"] and line["peak_mib"] is None
    for of_trl, of_cutloss in zip(found[::2], found[1::2]):
        assert all(norm > 0 for norm in of_trl["grad_norms"])
        assert of_trl["grad_norms"] != of_cutloss["grad_norms"]  # another computation


def test_another_loss_is_wrong(script, capsys, tmp_path, monkeypatch):
    class Tenth(trl.SFTTrainer):
        def compute_loss(self, *args, **kwargs):
            return 1.1 * super().compute_loss(*args, **kwargs)

    monkeypatch.setattr(cutloss.trl, "SFTTrainer", Tenth, raising=False)
    path = tmp_path / "out.json"
    assert run(script, *STEPS, "--trainers", "sft", "--json", path) == 1
    shown = capsys.readouterr().out
    of_trl, of_other = lines(path)
    assert of_other["is_wrong"] and not of_trl["is_wrong"]
    assert f"WRONG: step 1: the loss is {of_other['losses'][0]:.6g} with cutloss" in shown
    assert "WRONG: step 4: the gradients' norm is" in shown


def test_what_differs(script):
    Run, kind = script["Run"], script["KINDS"]["sft"]
    want = Run([5.0, 0.0], [1.0, 2.0], [1.0] * 2, None, 1)

    def found(losses, norms):
        return list(script["differences"](kind, Run(losses, norms, [1.0] * 2, None, 1), want))

    assert not found([5.004, 9e-4], [1.04, 1.92])
    assert found([5.02, 0.0], [1.0, 2.0]) == ["step 1: the loss is 5.02 with cutloss, and 5 with TRL"]
    assert len(found([5.0, -2e-3], [1.0, 2.2])) == 2
    assert len(found([float("nan"), 0.0], [float("nan"), 2.0])) == 2


@pytest.mark.parametrize(
    "option, value, parts",
    [
        ("--trainers", "sft,ppo", ["--trainers ppo", "sft, dpo"]),
        ("--model", "gpt2", ["--model gpt2", "qwen3-0.6b"]),
        ("--steps", 2, ["--steps 2", "at least 3"]),
        ("--batch", 1, ["--batch 1", "at least 2"]),
    ],
)
def test_refusals(script, capsys, option, value, parts):
    assert run(script, *STEPS, option, value) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and all(part in shown.err for part in parts)


def test_trl_is_asked_for_by_name(script, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    assert run(script, *STEPS) == 2
    assert "trl is needed" in (err := capsys.readouterr().err) and "pip install trl" in err

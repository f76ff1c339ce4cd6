"""cutloss bench: its lines, its measurements, its refusals."""

import json
import pathlib
import runpy
import sys

import pytest
import torch
from cli_helpers import assert_refused, run_cli

from cutloss._bench import cases, errors, memory, record, timing
from cutloss._bench.cases import Case
from cutloss._bench.methods import DEFAULT_METHODS, Method
from cutloss._bench.products import products
from cutloss.bench import named_models

BENCHMARKS = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"
SHAPE = ["--shape", "33,16,500", "--rounds", 1]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_in_the_format(capsys, tmp_path):
    path = tmp_path / "out.json"
    picture = tmp_path / "out.png"
    arguments = [*SHAPE, "--dtype", "fp32", "bf16-autocast", "--passes", *cases.PASSES]
    arguments += ["--no-memory", "--json", path, "--plot", picture]
    done = run_cli(capsys, "bench", *arguments)
    assert done.code == 0, done.err
    found = lines(path)
    assert len(found) == 2 * 3 * len(DEFAULT_METHODS["cpu"])
    assert [p for line in found for p in record.problems(line)] == []
    assert picture.read_bytes().startswith(b"\x89PNG")
    for line in found:
        assert line["gemms"] == pytest.approx(line["ms"] / line["gemm_ms"], rel=0.05)
        ours = line["method"] == "cutloss"
        assert line["engine"] == ("cpu" if ours else "torch")
        assert line["workspace_mib"] == (512 if ours else None)
        assert (line["de_err"] is None) == (line["pass"] == "fw")
        assert (line["dc_err"] is None) == (line["pass"] != "fwbw")
        assert line["command"].startswith("cutloss bench --shape 33,16,500")
    schedules = {line["schedule"] for line in found if line["method"] == "cutloss"}
    assert schedules == {"none", "rows"}


def test_lines_are_appended(capsys, tmp_path):
    path = tmp_path / "out.json"
    arguments = [*SHAPE, "--methods", "plain", "--passes", "fw", "--no-memory", "--json", path]
    for expected in (1, 2):
        assert run_cli(capsys, "bench", *arguments).code == 0
        assert len(lines(path)) == expected


def test_schedules_and_workspaces_are_measured_each(capsys, tmp_path):
    path = tmp_path / "out.json"
    arguments = [*SHAPE, "--methods", "cutloss", "--passes", "fwbw", "--no-memory", "--json", path]
    arguments += ["--schedule", "rows", "vocabulary", "--max-workspace", 8, 64]
    assert run_cli(capsys, "bench", *arguments).code == 0
    found = {(line["schedule"], line["workspace_mib"]) for line in lines(path)}
    assert found == {("rows", 8), ("rows", 64), ("vocabulary", 8), ("vocabulary", 64)}


def test_a_refused_method_is_named_and_left_out(capsys, tmp_path):
    path = tmp_path / "out.json"
    arguments = ["--shape", "600,300,4000", "--rounds", 1, "--dtype", "bf16", "--passes", "fwbw"]
    arguments += ["--methods", "cutloss", "plain", "--schedule", "rows", "--max-workspace", 1]
    done = run_cli(capsys, "bench", *arguments, "--no-memory", "--json", path)
    assert done.code == 0, done.err
    assert "cutloss rows 1 MiB is left out" in done.out
    assert [line["method"] for line in lines(path)] == ["plain"]


def test_peak_memory_sees_the_logits():
    case = Case(256, 16, 40000)
    logits = 256 * 40000 * 4
    plain = memory.peak_bytes(case, Method("plain"), "fwbw", 2)
    ours = memory.peak_bytes(case, Method("cutloss", "vocabulary"), "fwbw", 2)
    if plain is None:
        pytest.skip("this system does not let a process reset its peak memory")
    assert 2 * logits <= plain <= 4 * logits
    assert ours < logits / 2


def test_peak_memory_that_fails_says_so():
    with pytest.raises(RuntimeError, match="memory of nothing failed .*KeyError"):
        memory.peak_bytes(Case(4, 4, 4), Method("nothing"), "fw", 1)


@pytest.mark.parametrize("data", cases.DATA)
def test_the_reference_is_autograd(data, monkeypatch):
    case = Case(7, 5, 1011, "fp64", data)
    monkeypatch.setattr(errors, "_LOGITS", 3 * 8 * case.V)  # rows at a time: 3, 3, 1
    e, c, targets = cases.leaves(cases.inputs(case), "fwbw")
    torch.nn.functional.cross_entropy(e @ c.t(), targets).backward()
    de, dc = errors.reference_gradients(case)
    torch.testing.assert_close(de, e.grad, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(dc, c.grad, rtol=1e-9, atol=1e-13)


def test_data_are_what_they_are_called():
    def logits(data):
        e, c, targets = cases.inputs(Case(32, 256, 800, "fp32", data))
        return (e.double() @ c.double().t()), targets

    z, _ = logits("randn")
    assert 0.9 < z.std() < 1.1
    z, targets = logits("peaked")
    assert z.softmax(1).gather(1, targets[:, None]).median() > 0.9
    z, _ = logits("flat")
    assert z.abs().max() < 0.02
    z, _ = logits("offset")
    assert abs(z.mean() - 1e4) < 1


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_unit_is_the_product(dtype):
    case = Case(9, 20, 31, dtype)
    e, c, _ = cases.inputs(case)
    expected = e.double() @ c.double().t()
    found = products(case, e, c)
    assert "torch mm" in found
    for product in found.values():
        product()
        out = product.keywords["out"]
        out = out if out.shape == expected.shape else out.t()
        torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=1e-2)


def test_rounds_are_paired_and_the_first_is_left_out(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    order = []

    def take(key, durations):
        durations = iter(durations)

        def call():
            order.append(key)
            clock[0] += next(durations)

        return call

    calls = {"a": take("a", [100, 1, 2, 3]), "b": take("b", [100, 30, 10, 20])}
    assert timing.time_rounds(calls, 3, "cpu") == {"a": 2000, "b": 20000}
    assert all(set(order[i : i + 2]) == {"a", "b"} for i in range(0, 8, 2))


def test_wrong_lines_are_found(tmp_path):
    good = dict.fromkeys(record.KEYS, "x") | dict(
        versions={}, N=1, D=2, V=3, gradient="exact", schedule="rows", workspace_mib=None,
        ms=1.0, gemm_ms=1, gemms=1.0, peak_mib=0, de_err=None, dc_err=1e-3, commit=None,
    ) | {"pass": "fw"}  # fmt: skip
    assert record.problems(good) == []
    for key, wrong in (
        ("N", 1.5), ("N", 0), ("N", True), ("ms", "1"), ("ms", float("nan")), ("pass", "up"),
        ("schedule", "none at all"), ("de_err", -1), ("device", None), ("peak_mib", "5"),
    ):  # fmt: skip
        assert len(record.problems(good | {key: wrong})) == 1, (key, wrong)
    assert record.problems({k: v for k, v in good.items() if k != "ms"}) == ["ms is missing"]
    assert record.problems(good | {"speed": 1}) == ["speed is not a key of the format"]


def check_results(*paths):
    return runpy.run_path(str(BENCHMARKS / "check_results.py"))["main"]([str(p) for p in paths])


def test_stored_results_are_in_the_format(capsys):
    assert check_results() == 0, capsys.readouterr().out


def test_check_results_names_the_line(capsys, tmp_path):
    path = tmp_path / "results.json"
    path.write_text('{"N": 1}\nnot json\n[]\n')
    assert check_results(path) == 1
    out = capsys.readouterr().out
    assert f"{path}:1: device is missing" in out
    assert f"{path}:2: not JSON" in out
    assert f"{path}:3: not an object" in out


def test_named_models(capsys):
    assert named_models()["gpt2"][1:] == (768, 50257)
    assert json.loads((BENCHMARKS / "models.json").read_text()).keys() == named_models().keys()
    done = run_cli(capsys, "bench", "--list-models")
    assert done.code == 0
    assert all(name in done.out for name in named_models())


def test_bench_refuses(capsys, tmp_path):
    def refused(*argv):
        return run_cli(capsys, "bench", *argv)

    assert_refused(refused("--model", "gpt9"), "gpt9", "gpt2")
    assert_refused(refused("--rows", 5), "--rows", "--model")
    assert_refused(refused("--shape", "1,2,x"), "'x'")
    assert_refused(refused("--methods", "magic"), "magic")
    assert_refused(refused("--max-workspace", "-5"), "--max-workspace")
    if not torch.cuda.is_available():
        assert_refused(refused("--device", "cuda"), "no CUDA device")
    nowhere = tmp_path / "missing" / "out"
    assert_refused(refused(*SHAPE, "--json", nowhere), "--json", str(nowhere), "No such file")
    assert_refused(refused(*SHAPE, "--plot", f"{nowhere}.png"), "--plot", "is not a folder")
    assert_refused(refused(*SHAPE, "--plot", tmp_path / "out.bmp"), ".png", "out.bmp")


def test_the_command_line_is_light():
    """import cutloss must not load what only the commands need."""
    import subprocess

    code = (
        "import sys, cutloss; "
        "print([m for m in ('rich', 'matplotlib', 'cutloss.cli') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

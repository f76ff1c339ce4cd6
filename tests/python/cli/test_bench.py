"""cutloss bench: its lines, its measurements, its refusals."""

import dataclasses
import json
import os
import runpy
import sys
import time

import pytest
import torch
from helpers.checkout import ROOT
from helpers.command_line import assert_refused, run_cli
from helpers.inside import library
from helpers.inside_cli import (
    DEFAULT_METHODS,
    Case,
    Method,
    _chunked,
    cases,
    device_memory,
    errors,
    kernels,
    logits,
    memory,
    methods,
    named_models,
    plan,
    products,
    record,
    report,
    rivals,
    softmax,
    timing,
)

BENCHMARKS = ROOT / "benchmarks"
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


def test_lists_are_read_with_commas_spaces_and_semicolons(capsys, tmp_path):
    path = tmp_path / "out.json"
    arguments = ["--shapes", "9,8,50;7,8,40", "--shape", "5,8,30", "--dtype", "fp32,bf16", "fp64"]
    arguments += ["--methods", "plain,torch_lce", "--passes", "fw", "--rounds", 1, "--no-memory"]
    assert run_cli(capsys, "bench", *arguments, "--json", path).code == 0
    found = [(line["N"], line["dtype"], line["method"]) for line in lines(path)]
    assert len(set(found)) == len(found) == 3 * 3 * 2
    assert {N for N, *_ in found} == {9, 7, 5}


def test_workspaces_by_name_and_unit(capsys, tmp_path):
    path = tmp_path / "out.json"
    arguments = ["--shape", "600,32,4000", "--rounds", 1, "--methods", "cutloss", "--no-memory"]
    arguments += ["--passes", "fwbw", "--memory", "smallest,1GiB,64MiB", "logits", "--json", path]
    assert run_cli(capsys, "bench", *arguments).code == 0
    smallest, gib, mib, logits = (line["workspace_mib"] for line in lines(path))
    assert 0 < smallest < 8 and gib == 1024 and mib == 64
    assert 600 * 4000 * 4 / 2**20 < logits < 80


def test_the_smallest_workspace_is_the_smallest():
    case = Case(600, 32, 4000)
    method = plan.with_workspace(case, Method("cutloss", max_workspace_mib="smallest"), "fwbw")
    plan.decide(case, method, "fwbw")
    less = dataclasses.replace(method, max_workspace_mib=(method.max_workspace - 1) / 2**20)
    with pytest.raises(ValueError, match="smallest plan needs"):
        plan.decide(case, less, "fwbw")


def test_engines_are_restricted(capsys, tmp_path):
    path = tmp_path / "out.json"
    arguments = [*SHAPE, "--methods", "cutloss", "--passes", "fw", "--no-memory", "--json", path]
    done = run_cli(capsys, "bench", *arguments, "--engines", "auto,cpu", "steam")
    assert done.code == 0, done.err
    assert "cutloss steam is left out, fw: " in done.out
    assert [line["variant"] for line in lines(path)] == ["cutloss", "cutloss cpu"]
    assert methods.ENGINE_VARIABLE not in os.environ


def test_ignored_rows_and_options(capsys, tmp_path):
    path = tmp_path / "out.json"
    arguments = [*SHAPE, "--methods", "cutloss,plain,torch_lce", "--no-memory", "--json", path]
    arguments += ["--ignored", "0.5", "--options", "softcap+temperature+bias,none"]
    done = run_cli(capsys, "bench", *arguments)
    assert done.code == 0, done.err
    assert "torch_lce is left out, fw, fwbw: it has no softcap and no temperature" in done.out
    found = lines(path)
    assert [p for line in found for p in record.problems(line)] == []
    ours = {"cutloss", "cutloss num_valid"}
    for options, names in (
        ("softcap+temperature+bias", {"plain", *ours}),
        ("", {"plain", "torch_lce", *ours}),
    ):
        of_case = [line for line in found if line["options"] == options]
        assert {line["variant"] for line in of_case} == names
    for line in found:
        assert line["num_valid"] == (line["variant"] == "cutloss num_valid")
        assert line["ignored"] == 0.5
        errors = [line[key] for key in ("loss_err", "nll_err", "de_err", "dc_err") if line[key]]
        assert errors and max(errors) < 1e-5, line


def test_rivals_that_are_asked_for_and_missing_are_named(capsys, tmp_path):
    arguments = [*SHAPE, "--methods", "plain", *rivals.LOSSES, "--passes", "fw", "--no-memory"]
    done = run_cli(capsys, "bench", *arguments)
    assert done.code == 0, done.err
    for name in rivals.LOSSES:
        assert f"{name} is left out: {rivals.LOSSES[name].package}" in done.out


def failing(monkeypatch, name, function):
    loss = dataclasses.replace(methods.LOSSES["plain"], function=function)
    monkeypatch.setitem(methods.LOSSES, name, loss)


def test_a_method_that_fails_is_named_and_the_run_goes_on(capsys, monkeypatch, tmp_path):
    path = tmp_path / "out.json"
    calls = []

    def always(e, c, targets, asked):
        raise RuntimeError("no such kernel\nand a long trace")

    def later(e, c, targets, asked):
        calls.append(1)
        if len(calls) > 3:
            raise MemoryError("now it is full")
        return (e @ c.t()).mean()

    failing(monkeypatch, "torch_lce", always)
    failing(monkeypatch, "torch_lce_chunked", later)
    arguments = [*SHAPE, "--methods", "torch_lce,torch_lce_chunked,plain", "--passes", "fw"]
    done = run_cli(capsys, "bench", *arguments, "--rounds", 3, "--no-memory", "--json", path)
    assert done.code == 0, done.err
    assert "torch_lce failed, fw: RuntimeError: no such kernel\n" in done.out
    assert "torch_lce_chunked failed, fw: MemoryError: now it is full\n" in done.out
    assert [line["method"] for line in lines(path)] == ["plain"]
    done = run_cli(capsys, "bench", *SHAPE, "--methods", "torch_lce", "--passes", "fw")
    assert_refused(done, "no method was left")


def test_a_first_call_has_a_limit(capsys, monkeypatch):
    failing(monkeypatch, "torch_lce", lambda *_: time.sleep(60))
    arguments = [*SHAPE, "--methods", "torch_lce,plain", "--passes", "fw", "--no-memory"]
    start = time.monotonic()
    done = run_cli(capsys, "bench", *arguments, "--first-call-limit", 0.2)
    assert time.monotonic() - start < 30
    assert "torch_lce failed, fw: TimeoutError: its first call took more than 0.2 s" in done.out


def test_a_refused_method_is_named_and_left_out(capsys, tmp_path):
    path = tmp_path / "out.json"
    arguments = ["--shape", "600,300,4000", "--rounds", 1, "--dtype", "bf16", "--passes", "fwbw"]
    arguments += ["--methods", "cutloss", "plain", "--schedule", "rows", "--max-workspace", 1]
    done = run_cli(capsys, "bench", *arguments, "--no-memory", "--json", path)
    assert done.code == 0, done.err
    assert "cutloss rows 1 MiB is left out, fwbw: max_workspace is 1048576" in done.out
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
    monkeypatch.setitem(errors._LOGITS, "cpu", 3 * 8 * case.V)  # rows at a time: 3, 3, 1
    e, c, targets = cases.leaves(cases.inputs(case), "fwbw")
    torch.nn.functional.cross_entropy(e @ c.t(), targets).backward()
    de, dc = errors.reference_gradients(case)
    torch.testing.assert_close(de, e.grad, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(dc, c.grad, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("options", ["", "softcap+temperature+bias"])
def test_the_reference_knows_options_and_ignored_rows(options):
    case = Case(11, 5, 40, "fp64", ignored=0.4, options=options)
    tensors = (*cases.inputs(case), cases.bias_of(case))
    e, c, targets, bias = cases.leaves(tensors, "fwbw")
    assert (targets == -100).sum() == 4
    loss = methods.run_pass(Method("plain"), case, "fwbw", e, c, targets, bias)
    expected = errors.reference(case, tensors)
    assert expected.loss == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(expected.de, e.grad, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(expected.dc, c.grad, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("D", [64, 192])
def test_the_generated_softmax_has_its_curve(D):
    e, c, targets = softmax.generate(384, D, 131072, seed=D)
    nll, found = softmax.look(e, c, targets)
    assert found.keys() == softmax.CURVE.keys()
    for rank, p in softmax.CURVE.items():
        assert p / 1.6 < found[rank] < p * 1.6, (rank, found[rank], p)
    assert abs(nll - softmax.NLL) < 0.8
    nll_of_bf16, _ = softmax.look(e.bfloat16(), c.bfloat16(), targets)
    assert abs(nll - nll_of_bf16) < 0.05


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


def test_the_product_by_chunks_is_the_product():
    e, c, _ = cases.inputs(Case(7, 20, 31))
    expected = e @ c.t()
    out = torch.empty(3, 31)
    _chunked(e, c, out=out)
    torch.testing.assert_close(out[:1], expected[6:])
    torch.testing.assert_close(out[1:], expected[4:6])


def test_memory_outside_of_pytorch_is_seen(monkeypatch):
    """A device of 1000 bytes, without one."""
    state = {"allocated": 100, "reserved": 200, "free": 700, "peak": 0}
    pool = {"peak": 0}
    cuda = {
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: state.update(peak=state["allocated"]),
        "memory_allocated": lambda: state["allocated"],
        "max_memory_allocated": lambda: state["peak"],
        "memory_reserved": lambda: state["reserved"],
        "mem_get_info": lambda: (state["free"], 1000),
    }
    for name, function in cuda.items():
        monkeypatch.setattr(torch.cuda, name, function)

    class Pool:
        def reset_peak(self):
            pool["peak"] = 0

        def peak(self):
            return pool["peak"]

        def now(self):
            return 0

    monkeypatch.setattr(device_memory._Pool, "of_current_device", Pool)
    meter = device_memory.Meter()
    meter.start()
    # PyTorch takes 150 more and frees 100; a library takes 30 and a pool had 40 for a while.
    state.update(allocated=150, peak=250, reserved=360, free=1000 - 360 - 100 - 30)
    pool["peak"] = 40
    added = meter.added()
    assert (added.torch_peak, added.torch_kept, added.outside) == (150, 50, 70)
    assert (added.peak, added.kept) == (220, 120)


@pytest.mark.skipif(not (torch.cuda.is_available() and library.HAS_CUDA), reason="no CUDA here")
def test_cuda_lines(capsys, tmp_path):
    path = tmp_path / "out.json"
    arguments = ["--device", "cuda", "--shape", "512,256,8192", "--dtype", "bf16", "--json", path]
    arguments += ["--methods", "cutloss,plain", "--passes", *cases.PASSES, "--data", "softmax"]
    arguments += ["--rounds", 2, "--kernels", "--plot", tmp_path / "out.png"]
    done = run_cli(capsys, "bench", *arguments)
    assert done.code == 0, done.err
    found = {(line["method"], line["pass"]): line for line in lines(path)}
    assert len(found) == 6
    logits = 512 * 8192 * 2 / 2**20
    assert found["plain", "fwbw"]["peak_mib"] > 2 * logits
    for line in found.values():
        assert record.problems(line) == []
        assert line["loss_err"] < 1e-3
        assert 0 < sum(kernel["ms"] for kernel in line["kernels"]) < 10 * line["ms"]
        assert (line["de_err"] or 0) < 1e-2 and (line["dc_err"] or 0) < 1e-2


def test_kernels_have_names_to_read():
    ours = (
        "void cutloss::sm90::product_kernel<cutloss::sm90::Config<cutlass::bfloat16_t, (cute::SM90"
        "::GMMA::Major)0>, cutloss::sm90::StatisticsEpilogue<false> >(CUtensorMap_st, int)"
    )
    assert kernels.short(ours) == "product_kernel (statistics)"
    merge = "cutloss::sm90::(anonymous namespace)::merge_rows(cutloss::sm90::Merge)"
    assert kernels.short(merge) == "merge_rows"
    assert kernels.short("nvjet_sm90_tss_256x128_64x4") == "nvjet_sm90_tss_256x128_64x4"
    assert kernels.short("Memset (Device)") == "Memset"


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
    assert_refused(refused("--max-workspace", "-5"), "--max-workspace", "-5")
    assert_refused(refused("--memory", "5 apples"), "--memory", "5 apples")
    assert_refused(refused("--ignored", "1.5"), "--ignored", "1.5")
    assert_refused(refused("--options", "softcap+magic"), "softcap+magic")
    if not torch.cuda.is_available():
        assert_refused(refused("--device", "cuda"), "no CUDA device")
    assert_refused(refused("--kernels"), "--kernels", "--device cuda")
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


def test_logits_are_measured_against_a_copy(capsys, tmp_path, monkeypatch):
    for name in ("compile", "compile_fp32"):  # compile/test_compile.py has those
        monkeypatch.delitem(logits.METHODS, name)
    path = tmp_path / "out.json"
    arguments = ["--logits", "--shape", "33,1,500", "--rounds", 1, "--dtype", "bf16", "fp32"]
    done = run_cli(capsys, "bench", *arguments, "--json", path)
    assert done.code == 0, done.err
    assert "copies: ms in units of a copy of the logits" in " ".join(done.out.split())
    if rivals.lacks("liger-kernel", "liger_kernel", "cpu"):
        assert "liger is left out: liger-kernel" in done.out
    found = lines(path)
    assert [p for line in found for p in record.problems(line)] == []
    measured = [(line["dtype"], line["pass"], line["method"]) for line in found]
    names = {"fw": ["cutloss", "torch", "torch_fp32"]}
    names["fwbw"] = ["cutloss", "cutloss_consumed", "torch", "torch_fp32"]
    assert measured == [(d, p, n) for d in ("bf16", "fp32") for p in names for n in names[p]]
    for line in found:
        assert line["copies"] == pytest.approx(line["ms"] / line["copy_ms"], rel=0.05)
        assert (line["gradient_err"] is None) == (line["pass"] == "fw")
        if line["pass"] == "fwbw":
            assert line["gradient_err"] < (1e-2 if line["dtype"] == "bf16" else 1e-6)


def test_what_the_tables_show_is_explained_below_them(capsys):
    def legend(*options):
        done = run_cli(capsys, "bench", *SHAPE, "--methods", "plain", *options)
        assert done.code == 0, done.err
        return " ".join(done.out.split("┘")[-1].split())

    found = legend("--passes", "fw", "fwbw_frozen")
    for name in ("fw: ", "fwbw_frozen: ", "ms: ", "GEMMs: ", "peak MiB: ", "errors: "):
        assert name in found
    assert "fwbw: " not in found and "copies" not in found and "kept" not in found
    found = legend("--passes", "fw", "--no-memory", "--no-errors")
    assert "GEMMs: " in found and "peak" not in found and "error" not in found


def test_columns_and_their_explanations_have_the_same_names():
    for key, sentence in {**report.LEGEND, **report.PASSES}.items():
        heading = next((name for name, k, _ in report.COLUMNS if k == key), key)
        assert sentence.startswith((f"{heading}: ", "errors: ", "copies: "))
    unexplained = {key for _, key, _ in report.COLUMNS} - {*report.LEGEND}
    assert unexplained == {"de_err", "dc_err", "nll_err"}  # as that of the loss
    assert report.PASSES.keys() == set(cases.PASSES)


def test_options_without_a_meaning_for_logits_are_refused(capsys):
    for option, value in (("--dtype", "fp64"), ("--passes", "fwbw_frozen"), ("--ignored", "0.5")):
        done = run_cli(capsys, "bench", "--logits", "--shape", "5,1,50", option, value)
        assert_refused(done, option, "--logits")


def test_tables_are_whole_in_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert report.console().width == 180
    monkeypatch.setenv("COLUMNS", "200")
    assert report.console().width == 200

"""cutloss bench --train: whole models at small sizes, what it compares, what it refuses."""

import dataclasses
import json
import sys
import types

import pytest
import torch
from helpers.command_line import assert_refused, fake_module, run_cli
from helpers.inside import library
from helpers.inside_cli import (
    Shape,
    device_memory,
    named_models,
    record,
    train_measure,
    train_models,
    variants,
)

import cutloss

SMALL = dict(vocab_size=301, hidden_size=32, intermediate_size=48, num_hidden_layers=3)
SMALL |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64)
# The numbers of parameters of the published models.
PARAMETERS = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "llama-3.2-1b": 1_235_814_400,
    "gemma-2-2b": 2_614_341_888,
}
STEP = ["--train", "--tokens", 64, "--sequence", 16, "--rounds", 1]


@pytest.fixture
def small(monkeypatch):
    """The models of the command with the same classes and small sizes."""
    found = train_models.entries()
    for entry in found.values():
        entry["config"] |= SMALL
    for module in ("train_models", "train"):
        monkeypatch.setattr(f"cutloss.cli.bench.{module}.entries", lambda: found)
    return found


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", PARAMETERS)
def test_models_have_the_published_sizes(name):
    entry = train_models.entries()[name]
    model = train_models.build(
        entry, entry["config"]["num_hidden_layers"], torch.bfloat16, "meta"
    )
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.dtype == torch.bfloat16 and model.training
    config = model.config
    assert (config.hidden_size, config.vocab_size) == named_models()[name][1:]
    assert getattr(config, "final_logit_softcapping", None) == (30.0 if "gemma" in name else None)


def test_all_models_are_known():
    assert train_models.entries().keys() == PARAMETERS.keys()


def test_every_model_is_trained_and_the_losses_agree(capsys, tmp_path, small):
    path, picture = tmp_path / "out.json", tmp_path / "out.png"
    arguments = ["--variants", "stock,cutloss", "--dtype", "fp32", "bf16", "bf16-autocast"]
    done = run_cli(capsys, "bench", *STEP, *arguments, "--json", path, "--plot", picture)
    assert done.code == 0, done.out + done.err
    found = lines(path)
    assert [p for line in found for p in record.problems(line)] == []
    assert picture.read_bytes().startswith(b"\x89PNG")
    dtypes = ("fp32", "bf16", "bf16-autocast")
    assert [(line["model"], line["dtype"], line["method"]) for line in found] == [
        (m, d, v) for m in PARAMETERS for d in dtypes for v in ("stock", "cutloss")
    ]
    for line in found:
        assert (line["N"], line["sequence"], line["V"]) == (64, 16, 301)
        assert (line["layers"], line["all_layers"]) == (3, 3)
        assert line["tokens_per_s"] == pytest.approx(1e3 * 64 / line["ms"], rel=1e-2)
        assert line["attention"] == ("eager" if "gemma" in line["model"] else "sdpa")
        state = "bfloat16" if line["dtype"] == "bf16" else "float32"
        assert line["optimizer"] == f"AdamW, fused, its state in {state}"
        assert not line["is_wrong"]
        if line["method"] == "cutloss":
            assert line["loss_err"] < (1e-5 if line["dtype"] == "fp32" else 2e-3)
            assert line["grad_err"] < (1e-4 if line["dtype"] == "fp32" else 5e-2)
            assert line["loss"] != line["reference_loss"] or line["dtype"] == "fp32"
    assert "qwen3-0.6b: all 3 layers" in done.out
    assert "WRONG" not in done.out


def test_fewer_layers_are_said(capsys, tmp_path, small):
    path = tmp_path / "out.json"
    arguments = ["--model", "llama-3.2-1b", "--layers", 1, "--variants", "cutloss"]
    done = run_cli(capsys, "bench", *STEP, *arguments, "--json", path)
    assert done.code == 0, done.err
    assert "llama-3.2-1b: 1 of 3 layers" in done.out
    of_stock, of_cutloss = lines(path)  # without which there is nothing to compare with
    assert (of_stock["method"], of_cutloss["method"]) == ("stock", "cutloss")
    assert (of_stock["layers"], of_stock["all_layers"]) == (1, 3)


def variant(prepare):
    return dataclasses.replace(variants.VARIANTS["cutloss"], prepare=prepare)


def without_softcap(model):
    model.config.final_logit_softcapping = None
    return model


def of_the_token_itself(model):
    def call(input_ids, labels):
        logits = model(input_ids=input_ids).logits.float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return types.SimpleNamespace(loss=loss)

    return call


def of_nan(model):
    return lambda **inputs: types.SimpleNamespace(loss=model(**inputs).loss * float("nan"))


@pytest.mark.parametrize("prepare", [without_softcap, of_the_token_itself, of_nan])
def test_another_loss_is_marked_wrong(capsys, tmp_path, small, monkeypatch, prepare):
    monkeypatch.setitem(variants.VARIANTS, "cutloss", variant(prepare))
    path = tmp_path / "out.json"
    arguments = ["--model", "gemma-2-2b", "--variants", "cutloss", "--json", path]
    done = run_cli(capsys, "bench", *STEP, *arguments)
    assert done.code == 1
    of_stock, of_other = lines(path)
    assert not of_stock["is_wrong"] and of_other["is_wrong"]
    assert "cutloss WRONG" in done.out
    assert f"WRONG: gemma-2-2b, cutloss: the first loss is {of_other['loss']:.6g}" in done.out
    assert f"stock's {of_stock['loss']:.6g}" in done.out


def test_compiled_models_are_compiled(capsys, tmp_path, small, monkeypatch):
    compiled = []

    def compile(model, **options):
        compiled.append(model)
        return torch._dynamo.optimize("eager")(model)

    monkeypatch.setattr(torch, "compile", compile)
    path = tmp_path / "out.json"
    arguments = ["--model", "qwen3-0.6b", "--layers", 1, "--variants", "compiled,cutloss_compiled"]
    done = run_cli(capsys, "bench", *STEP, *arguments, "--json", path)
    assert done.code == 0, done.out
    assert [line["method"] for line in lines(path)] == ["stock", "compiled", "cutloss_compiled"]
    forwards = [vars(model).get("forward") for model in compiled]
    assert forwards[0] is None and forwards[1] is not None  # the second one is patched


def test_copies_share_parameters_and_nothing_else(small):
    setup = train_models.set_up(Shape("llama-3.2-1b", 32, 16, "fp32", "cpu"), 2)
    copy = train_models.sharing_parameters(setup.model)
    for a, b in zip(setup.model.parameters(), copy.parameters(), strict=True):
        assert a is b
    cutloss.patch(copy)
    assert copy(input_ids=setup.tokens, labels=setup.tokens).logits is None
    assert setup.model(input_ids=setup.tokens, labels=setup.tokens).logits is not None


def test_a_step_is_one_of_adamw(small):
    shape = Shape("qwen3-0.6b", 32, 16, "fp32", "cpu")
    setup = train_models.set_up(shape, 1)
    expected = train_models.set_up(shape, 1)
    train_measure.run_step(shape, setup, setup.model)
    expected.model(input_ids=expected.tokens, labels=expected.tokens).loss.backward()
    torch.optim.AdamW(expected.model.parameters(), lr=train_models.LEARNING_RATE).step()
    for got, want in zip(setup.model.parameters(), expected.model.parameters()):
        torch.testing.assert_close(got, want)
        assert got.grad is None


def test_as_many_layers_as_fit():
    for fits in range(29):
        tried = []

        def attempt(layers):
            tried.append(layers)
            return f"{layers} layers" if layers <= fits else None

        expected = f"{fits} layers" if fits else None
        assert train_models.most_layers(28, attempt) == (fits, expected)
        assert len(tried) <= 7


def test_out_of_memory_is_one_layer_less(small, monkeypatch):
    """On a device where two layers are too many."""
    shape = Shape("qwen3-0.6b", 32, 16, "fp32", "cpu")
    notes = []

    def step(shape, setup, call):
        if setup.layers > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train_measure, "run_step", step)
    monkeypatch.setattr(train_measure, "SPARE_BYTES", 1)
    assert train_measure._attempt(shape, 2) is None
    assert train_measure._attempt(shape, 1).layers == 1
    fake = types.SimpleNamespace(note=notes.append)
    assert train_measure._fitting(shape, None, fake).layers == 1
    assert notes == ["qwen3-0.6b: 1 of 3 layers fit, as stock is"]
    assert train_measure._fitting(shape, 3, fake).layers == 3  # as somebody asked for


def test_a_variant_that_fails_is_named_and_the_run_goes_on(capsys, tmp_path, small, monkeypatch):
    def fails(model):
        raise ImportError("cannot import name '_CONFIG_FOR_DOC'\nand a long trace")

    calls = []

    def fails_later(model):
        def call(**inputs):
            calls.append(1)
            if len(calls) > 1:
                raise torch.OutOfMemoryError("now it is full")
            return model(**inputs)

        return call

    monkeypatch.setitem(variants.VARIANTS, "cutloss", variant(fails))
    monkeypatch.setitem(variants.VARIANTS, "compiled", variant(fails_later))
    path = tmp_path / "out.json"
    arguments = ["--model", "qwen3-0.6b", "--variants", "compiled,cutloss", "--json", path]
    done = run_cli(capsys, "bench", *STEP, *arguments)
    assert done.code == 0, done.err
    assert "cutloss failed: ImportError: cannot import name '_CONFIG_FOR_DOC'\n" in done.out
    assert "compiled failed: OutOfMemoryError: now it is full\n" in done.out
    assert [line["method"] for line in lines(path)] == ["stock"]


def test_memory_is_everything_at_the_peak(monkeypatch):
    """On a device that holds 100 bytes, whose steps add 50."""

    class Meter:
        def start(self):
            pass

        def added(self):
            return device_memory.Added(torch_peak=50, torch_kept=0, outside=7)

    monkeypatch.setattr(device_memory, "Meter", Meter)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    assert train_measure._peak_on_device(None, None, lambda: None) == (150, 7)


def test_a_step_that_is_too_much(small):
    shape = Shape("qwen3-0.6b", 32, 16, "fp32", "cpu")
    setup = train_models.set_up(shape, 1)

    def fails():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to")

    results = {name: train_measure.Result(1.0, 2.0, 2.0) for name in ("stock", "cutloss")}
    steps, notes = {"stock": lambda: None, "cutloss": fails}, []
    report = types.SimpleNamespace(note=notes.append)
    train_measure._memory(shape, setup, results, steps, report)
    assert results.keys() == steps.keys() == {"stock"}
    assert notes == ["cutloss failed: OutOfMemoryError: CUDA out of memory. Tried to"]


def test_memory_on_a_cpu(small):
    """Parameters, the optimizer's state, and what a step holds at its peak."""
    shape = Shape("qwen3-0.6b", 32, 16, "fp32", "cpu")
    setup = train_models.set_up(shape, 1)
    train_measure.run_step(shape, setup, setup.model)
    parameters = sum(p.nbytes for p in setup.model.parameters())
    model = train_measure._model_bytes(shape, setup)
    assert 3 * parameters <= model < 3 * parameters + 1024  # AdamW has two more, and its steps
    held, freed = [], 64 << 20

    def step():
        held.append(torch.ones(48 << 20, dtype=torch.uint8))
        torch.ones(freed, dtype=torch.uint8)

    peak, outside = train_measure._peak_on_host(shape, setup, step)
    assert peak - model == pytest.approx(112 << 20, abs=4 << 20) and outside is None
    peak, _ = train_measure._peak_on_host(shape, setup, lambda: None)
    assert peak - model < 4 << 20  # what is held before is not counted


def test_memory_that_is_not_counted(small, monkeypatch):
    """As where /proc/self/clear_refs is not to be written: nothing instead of another number."""

    def start(self):
        raise PermissionError("clear_refs")

    monkeypatch.setattr(train_measure.HostPeak, "start", start)
    assert train_measure._peak_on_host(Shape("x", 1, 1, "fp32", "cpu"), None, None) == (None, None)


def test_a_loss_without_logits_takes_less_memory(capsys, tmp_path, small):
    path = tmp_path / "out.json"
    small["qwen3-0.6b"]["config"] |= dict(vocab_size=8192, hidden_size=64)
    options = ["--tokens", 1024, "--rounds", 1, "--dtype", "fp32", "--variants", "cutloss"]
    done = run_cli(
        capsys, "bench", "--train", "--model", "qwen3-0.6b", *options, "--json", path
    )
    assert done.code == 0, done.out + done.err
    of_stock, of_ours = lines(path)
    assert record.problems(of_stock) == record.problems(of_ours) == []
    logits = 1024 * 8192 * 4 / 2**20
    assert of_stock["peak_mib"] - of_stock["model_mib"] > 2 * logits
    assert of_ours["peak_mib"] - of_ours["model_mib"] < 2 * logits
    assert "peak MiB" in done.out and "MiB of each peak" in done.out


# Rivals -------------------------------------------------------------------------------------------


def test_what_liger_replaces_in_a_module_is_there_for_its_own_model_only(small, monkeypatch):
    """Of a fake one with the real one's signature."""
    from transformers.models.llama import modeling_llama

    asked, rotations = [], []
    stock = modeling_llama.apply_rotary_pos_emb

    def rotation(*args, **kwargs):
        rotations.append(1)
        return stock(*args, **kwargs)

    def apply(rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True,
              swiglu=True, model=None):  # fmt: skip
        asked.append(dict(rope=rope, cross_entropy=cross_entropy, rms_norm=rms_norm,
                          fused_linear_cross_entropy=fused_linear_cross_entropy))  # fmt: skip
        if rope:
            modeling_llama.apply_rotary_pos_emb = rotation

    fake_module(monkeypatch, "liger_kernel.transformers", apply_liger_kernel_to_llama=apply)
    setup = train_models.set_up(Shape("llama-3.2-1b", 32, 16, "fp32", "cpu"), 1)
    inputs = dict(input_ids=setup.tokens, labels=setup.tokens)
    calls = {
        name: variants.VARIANTS[name].prepare(train_models.sharing_parameters(setup.model))
        for name in ("liger_loss", "liger", "liger_cutloss")
    }
    assert modeling_llama.apply_rotary_pos_emb is stock
    of_loss, of_all, of_others = asked
    assert of_loss == dict(rope=False, cross_entropy=False, rms_norm=False,
                           fused_linear_cross_entropy=True)  # fmt: skip
    assert of_all == of_loss | dict(rope=True, rms_norm=True)
    assert of_others == of_all | dict(fused_linear_cross_entropy=False)
    for name, count in (("liger_loss", 0), ("liger", 1), ("liger_cutloss", 1)):
        rotations.clear()
        output = calls[name](**inputs)
        assert len(rotations) == count
        assert modeling_llama.apply_rotary_pos_emb is stock
        assert (output.logits is None) == (name == "liger_cutloss")


def test_cut_cross_entropy_gets_what_its_patch_gives_it(small, monkeypatch):
    def loss(e, c, targets, softcap=None, shift=False):
        z = (e @ c.t()).float()
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        return torch.nn.functional.cross_entropy(
            z[:, : -int(shift)].flatten(0, 1), targets[:, int(shift) :].flatten()
        )

    fake_module(monkeypatch, "cut_cross_entropy", linear_cross_entropy=loss)
    patched = []
    fake_module(monkeypatch, "cut_cross_entropy.transformers", cce_patch=patched.append)
    for name in PARAMETERS:
        shape = Shape(name, 32, 16, "fp32", "cpu")
        setup = train_models.set_up(shape, 1)
        want = train_measure.loss_of(shape, setup, setup.model)
        call = variants.VARIANTS["cce"].prepare(setup.model)
        torch.testing.assert_close(train_measure.loss_of(shape, setup, call), want)
    variants.VARIANTS["cce_patch"].prepare(setup.model)
    assert patched == [setup.model]


def test_rivals_that_are_missing_are_named(capsys, small):
    done = run_cli(capsys, "bench", *STEP, "--model", "qwen3-0.6b", "--variants",
                   *[n for n in variants.VARIANTS if "compiled" not in n])  # fmt: skip
    assert done.code == 0, done.err
    for name in ("liger_loss", "liger", "liger_cutloss", "cce", "cce_patch"):
        assert f"{name} is left out: " in done.out


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--tokens", 60, "--sequence", 16], ["--tokens 60", "--sequence 16"]),
        (["--tokens", 4, "--sequence", 1], ["--sequence 1"]),
        (["--model", "gpt2"], ["--model gpt2", "qwen3-0.6b"]),
        (["--model", "qwen3-0.6b", "--layers", 29], ["--layers 29", "28 layers"]),
        (["--dtype", "fp16"], ["--dtype fp16", "--train", "bf16"]),
        (["--methods", "cutloss"], ["--methods", "--train"]),
        (["--rows", 5], ["--rows", "--train"]),
        (["--no-errors"], ["--no-errors", "--train"]),
        (["--logits"], ["--logits", "--train"]),
    ],
    ids=lambda value: "_".join(map(str, value)).replace("--", ""),
)
def test_refusals(capsys, arguments, parts):
    assert_refused(run_cli(capsys, "bench", "--train", *arguments), *parts)


@pytest.mark.parametrize("option", ["--tokens", "--layers", "--sequence", "--variants"])
def test_options_of_training_are_refused_without_it(capsys, option):
    value = "stock" if option == "--variants" else 8
    done = run_cli(capsys, "bench", "--shape", "5,4,50", option, value)
    assert_refused(done, option, "without --train")


def test_transformers_is_asked_for_by_name(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    done = run_cli(capsys, "bench", "--train")
    assert_refused(done, "transformers is needed", "pip install transformers")


@pytest.mark.skipif(not (torch.cuda.is_available() and library.HAS_CUDA), reason="no CUDA here")
def test_cuda_lines(capsys, tmp_path, small):
    path = tmp_path / "out.json"
    for entry in small.values():
        entry["config"] |= dict(vocab_size=8192, hidden_size=256)
    arguments = ["--variants", "stock", "cutloss", "--device", "cuda", "--json", path]
    done = run_cli(capsys, "bench", "--train", "--tokens", 1024, "--rounds", 2, *arguments)
    assert done.code == 0, done.out + done.err
    found = lines(path)
    assert len(found) == 2 * len(PARAMETERS)
    for of_stock, of_ours in zip(found[::2], found[1::2]):
        assert record.problems(of_stock) == record.problems(of_ours) == []
        logits = 1024 * 8192 * 2 / 2**20
        assert of_stock["peak_mib"] - of_stock["model_mib"] > 2 * logits
        assert of_ours["peak_mib"] < of_stock["peak_mib"]

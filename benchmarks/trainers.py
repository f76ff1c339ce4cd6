#!/usr/bin/env python3
"""TRL's trainers beside those of cutloss.trl: losses, gradients' norms, times and memory of a few steps.

    benchmarks/trainers.py --device cuda --json OUT
    benchmarks/trainers.py --layers 1 --length 16 --batch 2 --steps 3 --vocabulary 301      on a CPU

Both train the same random model, of a published model's sizes with fewer layers, on the same random
words with the same seed, under TRL's own settings: parameters in fp32, forward under autocast in bf16,
gradient checkpointing. It needs TRL (pip install trl) and downloads nothing: the model and the tokenizer
are made here. Its exit code is 1 where losses or norms differ by more than rounding.
"""

import argparse
import dataclasses
import gc
import os
import shlex
import statistics
import sys
import tempfile
import time

import torch

from cutloss.cli.bench import record
from cutloss.cli.bench.train_models import build, entries
from cutloss.cli.usage import UserError, check_device, count, needed

# Two ways to the same loss round the logits differently in bf16. Relative to the norm of the gradients;
# that of the loss is the trainer's, and this beside it, since the loss of GRPO is near 0.
NORM_TOLERANCE = 5e-2
LOSS_FLOOR = 1e-3
WARM_UP = 2  # steps that are not timed; GRPO generates in the first one
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
LEARNING_RATE = 1e-5
METHODS = ("trl", "cutloss")


# What is trained ----------------------------------------------------------------------------------


def make_tokenizer(V):
    """One token for each of the words w4, w5, ..., and four special ones."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *(f"w{i}" for i in range(4, V))])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>",
    )  # fmt: skip


class Words:
    """Random text, the same in every run."""

    def __init__(self, V):
        self._V, self._random = V, torch.Generator().manual_seed(0)

    def text(self, length):
        ids = torch.randint(len(SPECIAL), self._V, (length,), generator=self._random)
        return " ".join(f"w{i}" for i in ids.tolist())


def make_model(o):
    torch.manual_seed(0)
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return build(
        o.entry, o.layers, torch.float32, o.device, vocab_size=o.vocabulary, **tokens
    )


def reward(completion_ids, **_):
    return [float(sum(ids) % 7) for ids in completion_ids]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A trainer of TRL, and what it is given."""

    name: str  # of the class
    config: str
    rows: object  # (words, prompt length, completion length, row's number) -> a row
    # Relative, of the loss. Where it is a function of the sum over a sequence, roundings add up: 4
    # sequences of 192 tokens differed by 5e-3 under DPO, and by 2e-5 in the mean over tokens of SFT.
    tolerance: float = 2e-2
    sequences: int = 1  # that each row of a batch makes
    more: object = lambda o: {}  # arguments of the trainer
    settings: object = lambda o: {}


def _with_reference(o):
    return {"ref_model": make_model(o)}


def _grpo_settings(o):
    """All completions of the run are generated in the first step."""
    length = o.length - o.length // 4
    return dict(num_generations=o.batch, steps_per_generation=o.steps, max_completion_length=length)


KINDS = {
    "sft": Kind(
        "SFTTrainer", "SFTConfig",
        lambda w, p, c, i: dict(text=w.text(p + c - 1)),  # and the token at the end
        settings=lambda o: dict(max_length=o.length), tolerance=1e-3,
    ),
    "dpo": Kind(
        "DPOTrainer", "DPOConfig",
        lambda w, p, c, i: dict(prompt=w.text(p), chosen=" " + w.text(c - 1),
                                rejected=" " + w.text(c - 1)),
        sequences=2, more=_with_reference, settings=lambda o: dict(max_length=o.length),
    ),
    "grpo": Kind(
        "GRPOTrainer", "GRPOConfig", lambda w, p, c, i: dict(prompt=w.text(p)),
        more=lambda o: dict(reward_funcs=reward), settings=_grpo_settings,
    ),
    "kto": Kind(
        "KTOTrainer", "KTOConfig",
        lambda w, p, c, i: dict(prompt=w.text(p), completion=" " + w.text(c - 1), label=i % 2 == 0),
        more=_with_reference, settings=lambda o: dict(max_length=o.length),
    ),
}  # fmt: skip


def make_trainer(o, kind, method, folder):
    import datasets
    import transformers
    import trl

    import cutloss.trl

    words, prompt = Words(o.vocabulary), o.length // 4
    rows = [kind.rows(words, prompt, o.length - prompt, i) for i in range(o.steps * o.batch)]
    settings = dict(
        output_dir=folder, max_steps=o.steps, per_device_train_batch_size=o.batch,
        learning_rate=LEARNING_RATE, lr_scheduler_type="constant", logging_steps=1, report_to=[],
        save_strategy="no", disable_tqdm=True, use_cpu=o.device == "cpu", bf16=True, seed=1,
    )  # fmt: skip
    args = getattr(trl, kind.config)(**settings, **kind.settings(o))
    transformers.set_seed(2)
    trainer = getattr(trl if method == "trl" else cutloss.trl, kind.name)(
        model=make_model(o), args=args, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=o.tokenizer, **kind.more(o),
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


# One run ------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    losses: list[float]
    norms: list[float]
    step_ms: list[float]
    peak: int | None  # bytes, of the steps after the warm-up
    parameters: int

    @property
    def ms(self):
        return statistics.median(self.step_ms[WARM_UP:])


def train(o, kind, method):
    import transformers

    on_gpu = o.device == "cuda"
    synchronise = torch.cuda.synchronize if on_gpu else lambda: None
    step_ms = []

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            if on_gpu and len(step_ms) == WARM_UP:
                torch.cuda.reset_peak_memory_stats()
            synchronise()
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            synchronise()
            step_ms.append(1e3 * (time.perf_counter() - self.start))

    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(o, kind, method, folder)
        trainer.add_callback(Watch())
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    parameters = sum(p.numel() for p in trainer.model.parameters())
    del trainer
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    losses, norms = ([float(entry[key]) for entry in logged] for key in ("loss", "grad_norm"))
    if not len(losses) == len(step_ms) == o.steps:
        raise AssertionError(
            f"{kind.name} made {len(step_ms)} steps and logged {len(losses)} losses, not {o.steps}"
        )
    return Run(losses, norms, step_ms, peak, parameters)


def differences(kind, got, want):
    """Sentences about the steps whose loss or norm is another one; NaN is."""
    for step, (g, w, gn, wn) in enumerate(zip(got.losses, want.losses, got.norms, want.norms), 1):
        if not abs(g - w) <= kind.tolerance * abs(w) + LOSS_FLOOR:
            yield f"step {step}: the loss is {g:.6g} with cutloss, and {w:.6g} with TRL"
        if not abs(gn - wn) <= NORM_TOLERANCE * abs(wn):
            yield f"step {step}: the gradients' norm is {gn:.6g} with cutloss, and {wn:.6g} with TRL"


def line(o, name, method, run, wrong):
    """A record of record.py."""
    kind = KINDS[name]
    return {
        **o.shared,
        "trainer": kind.name,
        "method": method,
        "model": o.model,
        "layers": o.layers,
        "all_layers": o.entry["config"]["num_hidden_layers"],
        "parameters": run.parameters,
        "N": kind.sequences * o.batch * o.length,
        "sequence": o.length,
        "D": o.entry["config"]["hidden_size"],
        "V": o.vocabulary,
        "dtype": "bf16-autocast",
        "pass": "step",
        "ms": round(run.ms, 2),
        "step_ms": [round(ms, 2) for ms in run.step_ms],
        "peak_mib": None if run.peak is None else round(run.peak / 2**20, 1),
        "losses": run.losses,
        "grad_norms": run.norms,
        "is_wrong": wrong,
        "command": "benchmarks/trainers.py " + shlex.join(o.command),
    }


def show(kind, runs, found):
    print(f"{kind.name}")
    for method, run in runs.items():
        peak = "" if run.peak is None else f"  peak {run.peak / 2**20:9,.0f} MiB"
        print(f"  {method:8} {run.ms:9.1f} ms a step (the first {run.step_ms[0]:.0f}){peak}")
        print(f"           losses {'  '.join(f'{x:.5f}' for x in run.losses)}")
        print(f"           norms  {'  '.join(f'{x:.4f}' for x in run.norms)}")
    for sentence in found:
        print(f"  WRONG: {sentence}")
    if not found:
        print("  losses and norms agree", flush=True)


# All of them --------------------------------------------------------------------------------------


def parsed(argv):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--trainers", type=lambda text: text.split(","), default=list(KINDS))
    p.add_argument("--model", default="qwen3-0.6b", help=", ".join(entries()))
    p.add_argument("--layers", type=count, default=8)
    p.add_argument("--vocabulary", type=count, help="tokens (default: the model's)")
    p.add_argument("--length", type=count, default=1024, help="tokens of a sequence")
    p.add_argument("--batch", type=count, default=8, help="rows of a step; DPO makes two sequences of each")
    p.add_argument("--steps", type=count, default=8)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--json", metavar="FILE", help="append a line for each trainer and method")
    o = p.parse_args(argv)
    o.command = argv
    return o


def checked(o):
    needed("transformers", "datasets", "trl", install="trl")
    check_device(o.device)
    unknown = [name for name in o.trainers if name not in KINDS]
    if unknown:
        raise UserError(f"--trainers {unknown[0]} is not one of {', '.join(KINDS)}")
    if o.model not in entries():
        raise UserError(f"--model {o.model} is not one of {', '.join(entries())}")
    least = dict(steps=WARM_UP + 1, length=8, batch=2, vocabulary=len(SPECIAL) + 1)
    o.entry = entries()[o.model]
    o.vocabulary = o.vocabulary or o.entry["config"]["vocab_size"]
    for name, number in least.items():
        if getattr(o, name) < number:
            raise UserError(f"--{name} {getattr(o, name)} is too small: it must be at least {number}")
    if o.json:
        record.append(o.json, [])
    import datasets

    datasets.disable_progress_bars()
    o.tokenizer = make_tokenizer(o.vocabulary)
    packages = ["transformers", "trl", "accelerate", "datasets"]
    o.shared = record.surroundings(o.device, torch.get_num_threads(), packages)


def main(argv):
    o = parsed(argv)
    try:
        checked(o)
    except UserError as error:
        print(f"benchmarks/trainers.py: error: {error}", file=sys.stderr)
        return 2
    versions = ", ".join(f"{name} {number}" for name, number in o.shared["versions"].items())
    print(f"{o.shared['device']}; {versions}; commit {o.shared['commit']}")
    wrong = 0
    for name in o.trainers:
        runs = {method: train(o, KINDS[name], method) for method in METHODS}
        found = list(differences(KINDS[name], runs["cutloss"], runs["trl"]))
        show(KINDS[name], runs, found)
        lines = [line(o, name, m, run, m == "cutloss" and bool(found)) for m, run in runs.items()]
        if o.json:
            record.append(o.json, lines)
        wrong += bool(found)
    return 1 if wrong else 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # so that nothing waits for a network
    sys.exit(main(sys.argv[1:]))

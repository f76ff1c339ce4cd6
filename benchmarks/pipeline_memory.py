#!/usr/bin/env python3
"""Peak memory of a training step of a language model in a pipeline, with and without cutloss.

    benchmarks/pipeline_memory.py --json OUT              on one GPU: the last of two stages
    benchmarks/pipeline_memory.py --stages 2 --json OUT   on two: both, by nccl

The model has the shape of Qwen3 1.7B (28 layers, V 151936, D 2048), random weights, and a head of
its own; a step has eight microbatches of 4096 tokens, AdamW and all. The schedules are those of
torch.distributed.pipelining. On one GPU the last stage runs alone, in the order of its pipeline, on
hidden states made up in place of those that it would receive, and returns their gradients: what
passes in its memory is the same. It writes JSON lines; benchmarks/README.md says what is in them.
"""

import argparse
import dataclasses
import gc
import json
import shlex
import sys
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.utils.checkpoint import checkpoint

from cutloss.cli.bench import device_memory, record
from cutloss.cli.bench.cases import DTYPES, Case, inputs
from cutloss.cli.bench.methods import Method, missing
from cutloss.cli.bench.plan import decide
from cutloss.cli.bench.products import products
from cutloss.cli.bench.timing import time_rounds

PIPELINES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
METHODS = {
    "plain": Method("plain"),
    "compile": Method("compile"),
    "cutloss": Method("cutloss"),
    "cutloss-rows": Method("cutloss", schedule="rows"),
    "cutloss-vocabulary": Method("cutloss", schedule="vocabulary"),
}
HEAD_DIM = 128


# The model ----------------------------------------------------------------------------------------


def rotated(x, positions):
    """x (B,heads,L,d) with rotary positions."""
    half = x.shape[-1] // 2
    rates = 1e6 ** (-torch.arange(half, device=x.device) / half)
    angle = positions[:, None] * rates  # (L,d/2)
    sin, cos = angle.sin().to(x.dtype), angle.cos().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Norm(nn.RMSNorm):
    """In the dtype of what is normed, as the weight need not be under autocast."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype)).to(x.dtype)


class Layer(nn.Module):
    def __init__(self, o):
        super().__init__()
        self.d = min(HEAD_DIM, o.dim // o.heads)
        self.norm1, self.norm2 = Norm(o.dim), Norm(o.dim)
        self.q_norm, self.k_norm = Norm(self.d), Norm(self.d)
        self.q = nn.Linear(o.dim, o.heads * self.d, bias=False)
        self.k = nn.Linear(o.dim, o.kv_heads * self.d, bias=False)
        self.v = nn.Linear(o.dim, o.kv_heads * self.d, bias=False)
        self.out = nn.Linear(o.heads * self.d, o.dim, bias=False)
        self.gate = nn.Linear(o.dim, o.ffn, bias=False)
        self.up = nn.Linear(o.dim, o.ffn, bias=False)
        self.down = nn.Linear(o.ffn, o.dim, bias=False)

    def forward(self, x):  # (B,L,D)
        h = self.norm1(x)
        projected = (p(h).unflatten(-1, (-1, self.d)) for p in (self.q, self.k, self.v))
        q, k, v = (t.transpose(1, 2) for t in projected)  # (B,heads,L,d)
        positions = torch.arange(x.shape[1], device=x.device)
        q, k = rotated(self.q_norm(q), positions), rotated(self.k_norm(k), positions)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(h.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Stage(nn.Module):
    """From tokens, or hidden states; to hidden states, those before the head in the last stage."""

    def __init__(self, o, dtype, is_first, is_last):
        super().__init__()
        self.embedding = nn.Embedding(o.vocabulary, o.dim) if is_first else None
        self.layers = nn.ModuleList(Layer(o) for _ in range(o.layers // 2))
        self.norm = Norm(o.dim) if is_last else None
        self.head = nn.Linear(o.dim, o.vocabulary, bias=False) if is_last else None
        self.autocast_to, self.checkpoints = DTYPES[dtype][2], o.checkpoint
        self.e_dtype = DTYPES[dtype][0]

    def forward(self, x):
        to = self.autocast_to
        if x.is_floating_point() and not x.requires_grad:  # made up, in place of what is received
            x = x.detach().requires_grad_()
        with torch.autocast(x.device.type, to, enabled=to is not None):
            if self.embedding is not None:
                x = self.embedding(x).to(self.e_dtype)
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False) if self.checkpoints else layer(x)
            return x.to(self.e_dtype) if self.norm is None else self.norm(x).to(self.e_dtype)

    def loss_by(self, method):
        def loss(hidden, labels):
            """hidden (B,L,D), labels (B,L), of the next token already."""
            to = self.autocast_to
            with torch.autocast(hidden.device.type, to, enabled=to is not None):
                rows = hidden.flatten(0, 1), self.head.weight, labels.flatten()
                return method.loss(*rows, softcap=None, temperature=None, num_valid=None)

        return loss


# One measurement ----------------------------------------------------------------------------------


@dataclasses.dataclass
class Measured:
    ms: float  # a step
    loss: float | None  # in the first step, where there is one
    model: int | None = None  # bytes: parameters, gradients, what AdamW keeps, microbatches
    peak: int | None = None  # bytes beside these


def measure(o, dtype, pipeline, method):
    rank, device = dist.get_rank() if o.stages > 1 else 1, torch.device(o.device)
    torch.manual_seed(rank)
    with device:
        module = Stage(o, dtype, is_first=rank == 0, is_last=rank == 1).to(DTYPES[dtype][1])
        shape = o.microbatches, o.sequence
        x = torch.randint(o.vocabulary, shape)
        labels = torch.randint(o.vocabulary, shape)
        if o.stages == 1:
            x = torch.randn(*shape, o.dim, dtype=DTYPES[dtype][0])
    stage = PipelineStage(module, rank if o.stages > 1 else 0, o.stages, device)
    loss_fn = module.loss_by(method)
    schedule = PIPELINES[pipeline](stage, o.microbatches, loss_fn=loss_fn)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    losses = []

    def step():
        optimizer.zero_grad(set_to_none=False)  # so that gradients are there when a step begins
        first = (x,) if stage.is_first else ()
        more = {"target": labels, "losses": losses} if stage.is_last else {}
        schedule.step(*first, return_outputs=False, **more)
        optimizer.step()

    step()  # compiles, loads, and makes what AdamW keeps
    first = sum(loss.item() for loss in losses) / len(losses) if losses else None
    losses.clear()
    settle(o)
    meter = device_memory.Meter() if o.device == "cuda" else None
    if meter:
        meter.start()
        model = torch.cuda.memory_allocated()
    start = time.perf_counter()
    for _ in range(o.steps):
        step()
    settle(o)
    ms = 1e3 * (time.perf_counter() - start) / o.steps
    return Measured(ms, first, model, meter.added().peak) if meter else Measured(ms, first)


def settle(o):
    if o.device == "cuda":
        torch.cuda.synchronize()
    if o.stages > 1:
        dist.barrier()


def free(o):
    gc.collect()
    if o.device == "cuda":
        torch.cuda.empty_cache()


def line(o, case, method, pipeline, measured, gemm_ms, loss_err):
    """A record of record.py."""
    decision = decide(case, method, "fwbw") if method.name == "cutloss" else None

    def mib(number):
        return None if number is None else round(number / 2**20, 1)

    total = None if measured.peak is None else measured.model + measured.peak
    layers = f"{o.layers // 2} of {o.layers} layers" + (", checkpointed" if o.checkpoint else "")
    threads = torch.get_num_threads()
    return {
        **record.surroundings(o.device, threads),
        "N": case.N,
        "D": case.D,
        "V": case.V,
        "dtype": case.dtype,
        "data": case.data,
        "method": method.name,
        "engine": decision.engine if decision else "torch",
        "gradient": "exact",
        "schedule": decision.schedule if decision else "none",
        "workspace_mib": None,
        "pass": "step",
        "ms": round(measured.ms, 2),
        "gemm_ms": round(gemm_ms, 4),
        "gemms": round(measured.ms / gemm_ms, 2),
        "peak_mib": mib(measured.peak),
        "de_err": None,
        "dc_err": None,
        "command": "benchmarks/pipeline_memory.py " + shlex.join(o.command),
        "total_mib": mib(total),
        "loss_err": loss_err,
        "variant": method.label,
        "pipeline": pipeline,
        "microbatches": o.microbatches,
        "stage": f"{dist.get_rank() + 1 if o.stages > 1 else 2} of 2, {layers}",
    }


def gemm_time(o, case):
    e, c, _ = inputs(case)
    times = time_rounds(products(case, e, c), 3, o.device)
    return min(times.values())


# All of them --------------------------------------------------------------------------------------


def measure_all(o):
    """Lines of this process; what fails is said on stderr and left out."""
    lines = []
    for dtype in o.dtype:
        case = Case(o.sequence, o.dim, o.vocabulary, dtype, device=o.device)
        gemm_ms = gemm_time(o, case)
        for pipeline in o.pipelines:
            losses = {}
            for name in distinct(o.methods, case):
                method = METHODS[name]
                free(o)
                try:
                    measured = measure(o, dtype, pipeline, method)
                except RuntimeError as error:
                    if o.stages > 1 or not out_of_memory(error):
                        raise  # of two processes the other waits
                    note(f"{dtype} {pipeline} {name}: {out_of_memory(error)}")
                    continue
                losses[name] = measured.loss
                error = agreement(losses, name)
                lines.append(line(o, case, method, pipeline, measured, gemm_ms, error))
                note(summary(lines[-1]))
    return lines


def out_of_memory(error):
    """What it says, if it is that; pipelining wraps what it catches."""
    cause = error.__cause__ or error
    return str(cause).splitlines()[0] if isinstance(cause, torch.OutOfMemoryError) else None


def distinct(methods, case):
    """Without a schedule asked for by name that cutloss takes anyway."""
    if "cutloss" not in methods:
        return methods
    taken = decide(case, METHODS["cutloss"], "fwbw").schedule
    return [name for name in methods if METHODS[name].schedule != taken]


def agreement(losses, name):
    """The relative difference to the first method's loss; None of that, and in a first stage."""
    reference = next(iter(losses.values()))
    if reference is None or len(losses) == 1:
        return None
    error = abs(losses[name] - reference) / abs(reference)
    if not error < 1e-2:
        raise AssertionError(f"the loss of {name} is {losses[name]}, that of others {reference}")
    return error


def summary(r):
    memory = "" if r["total_mib"] is None else f"{r['total_mib']:9.0f} MiB, "
    memory += "" if r["peak_mib"] is None else f"{r['peak_mib']:9.0f} beside the model, "
    where = f"{r['pipeline']:5}  {r['dtype']:13}  stage {r['stage'][:6]}  {r['variant']:18}"
    return f"{where} ({r['schedule']})  {memory}{r['ms']:.0f} ms"


def note(text):
    print(text, file=sys.stderr, flush=True)


def process(rank, o, folder):
    if o.device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if o.device == "cuda" else "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=o.stages,
    )
    lines = measure_all(o)
    if o.stages > 1:
        everybodys = [None] * o.stages
        dist.all_gather_object(everybodys, lines)
        lines = [r for rs in zip(*everybodys) for r in rs]
    if rank == 0:
        text = "".join(json.dumps(r) + "\n" for r in lines)
        if o.json:
            with open(o.json, "a", encoding="utf-8") as file:
                file.write(text)
        else:
            print(text, end="")
    dist.destroy_process_group()


def names(known):
    def parse(text):
        found = text.split(",")
        wrong = [name for name in found if name not in known]
        if wrong:
            raise argparse.ArgumentTypeError(f"{wrong[0]!r} is not one of {', '.join(known)}")
        return found

    return parse


def parsed(argv):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    p.add_argument("--stages", type=int, default=1, choices=[1, 2], help="processes, and devices")
    p.add_argument("--pipelines", type=names(PIPELINES), default=list(PIPELINES))
    p.add_argument("--methods", type=names(METHODS), default=list(METHODS))
    p.add_argument("--dtype", type=names(DTYPES), default=["bf16", "bf16-autocast"])
    p.add_argument("--checkpoint", action="store_true", help="layers recompute their activations")
    p.add_argument("--steps", type=int, default=1, help="that are timed")
    p.add_argument("--json", metavar="FILE", help="append there; else the lines go to stdout")
    sizes = dict(layers=28, dim=2048, heads=16, kv_heads=8, ffn=6144, vocabulary=151936)
    sizes |= dict(sequence=4096, microbatches=8)
    for name, size in sizes.items():
        p.add_argument(f"--{name.replace('_', '-')}", type=int, default=size)
    o = p.parse_args(argv)
    o.command = argv
    found = torch.cuda.device_count() if o.device == "cuda" else o.stages
    if found < o.stages:
        p.error(f"--stages {o.stages} on {o.device} needs as many devices, {found} found")
    for name in list(o.methods):
        reason = missing(METHODS[name].name, o.device)
        if reason:
            note(f"{name} is left out: {reason}")
            o.methods.remove(name)
    return o


def main(argv):
    o = parsed(argv)
    with tempfile.TemporaryDirectory() as folder:
        if o.stages == 1:
            process(0, o, folder)
        else:
            mp.spawn(process, (o, folder), nprocs=o.stages)


if __name__ == "__main__":
    main(sys.argv[1:])

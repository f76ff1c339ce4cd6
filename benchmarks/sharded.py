"""A classifier in shards against the whole one: time, memory, efficiency.

    torchrun --nproc-per-node 2 benchmarks/sharded.py --json results.json

Every rank runs the unsharded call on its own GPU, all ranks at once, and the sharded call, in turns;
calls of a turn are queued back to back. Efficiency is the mean time of the unsharded call over all
ranks, divided by (ranks x the sharded call's). Random data; embeddings and classifier are such that
the logits have a standard deviation of about 2. torch's loss_parallel, and cut_cross_entropy where
it is installed, are measured beside.
"""

import argparse
import math
import os
import statistics
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import loss_parallel

import cutloss
from cutloss.cli.bench import record

SHAPES = "8192,4096,131072;8192,4096,262144;8192,2048,131072;2048,4096,131072"
METHODS = {  # and whose they are
    "vocabulary": "cutloss",
    "rows": "cutloss",
    "forward": "cutloss",
    "loss_parallel": "loss_parallel",
    "cut_cross_entropy": "cut_cross_entropy",
}


def make(shape, device):
    N, D, V = shape
    g = torch.Generator(device=device).manual_seed(1)
    e = torch.randn(N, D, generator=g, device=device).bfloat16()
    c = (torch.randn(V, D, generator=g, device=device) * (2 / D**0.5)).bfloat16()
    return e, c, torch.randint(V, (N,), generator=g, device=device)


def of_cutloss(e, c, y, own, schedule):
    """Memory is granted for logits that are kept where the schedule is by rows."""
    V = c.shape[0]
    more = {"schedule": schedule}
    if schedule == "rows":
        more["max_workspace"] = 8 * e.shape[0] * V + (2 << 30)
    return cutloss.linear_cross_entropy(e, c, y, vocab_parallel_options=own, **more)


def of_torch(e, c, y, mesh):
    """The logits of the shard, kept whole. To be called, and gone back through, in loss_parallel."""
    logits = DTensor.from_local(e @ c.T, mesh, [Shard(1)], run_check=False)
    return F.cross_entropy(logits, DTensor.from_local(y, mesh, [Replicate()], run_check=False))


def of_apple(e, c, y, own):
    from cut_cross_entropy import VocabParallelOptions, linear_cross_entropy

    theirs = None if own is None else VocabParallelOptions(own.start, own.stop, own.group)
    return linear_cross_entropy(e, c, y, vocab_parallel_options=theirs)


def is_there(method):
    if method != "cut_cross_entropy":
        return True
    try:
        import cut_cross_entropy  # noqa: F401
    except ImportError:
        return False
    return True


def step(method, e, c, y, own, mesh):
    if method == "forward":
        with torch.no_grad():
            return cutloss.linear_cross_entropy(e, c, y, vocab_parallel_options=own)
    e.grad = c.grad = None
    if method == "loss_parallel":
        if own is None:
            loss = F.cross_entropy(e @ c.T, y)
        else:
            with loss_parallel():
                loss = of_torch(e, c, y, mesh)
                loss.backward()
            dist.all_reduce(e.grad)
            return loss
    elif method == "cut_cross_entropy":
        loss = of_apple(e, c, y, own)
    else:
        loss = of_cutloss(e, c, y, own, method)
    loss.backward()
    return loss


def milliseconds(run, calls):
    """Of a call among others: the GPU is at work on the first when the clock starts."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    dist.barrier()
    torch.cuda.synchronize()
    run()
    start.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / calls


def peak_mib(run):
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def over_ranks(value):
    told = [None] * dist.get_world_size()
    dist.all_gather_object(told, value)
    return told


def measure(method, shape, args, mesh):
    rank, size = dist.get_rank(), dist.get_world_size()
    e, c, y = make(shape, "cuda")
    own = cutloss.VocabParallelOptions.from_vocab(shape[2])
    part = c[own.start : own.stop].clone()
    for t in (e, c, part):
        t.requires_grad_(method != "forward")

    def whole():
        return step(method, e, c, y, None, mesh)

    def sharded():
        return step(method, e, part, y, own, mesh)

    loss, other = whole().item(), sharded()
    other = (other.full_tensor() if isinstance(other, DTensor) else other).item()
    calls = max(over_ranks(math.ceil(args.round_ms / milliseconds(sharded, 3))))
    whole_ms, sharded_ms = [], []
    for _ in range(args.rounds):
        whole_ms.append(milliseconds(whole, calls))
        sharded_ms.append(milliseconds(sharded, calls))
    e.grad = c.grad = part.grad = None
    peaks = peak_mib(whole), peak_mib(sharded)
    whole_ms = over_ranks(statistics.median(whole_ms))
    sharded_ms = max(over_ranks(statistics.median(sharded_ms)))
    mean_ms = statistics.mean(whole_ms)
    N, D, V = shape
    line = {
        "N": N, "D": D, "V": V, "dtype": "bf16", "data": "randn", "method": METHODS[method],
        "schedule": method if method in ("rows", "vocabulary") else "none",
        "pass": "fw" if method == "forward" else "fwbw", "ranks": size,
        "ms": round(sharded_ms, 4), "unsharded_ms": [round(ms, 4) for ms in whole_ms],
        "efficiency": round(mean_ms / (size * sharded_ms), 4),
        "peak_mib": round(peaks[1], 1), "unsharded_mib": round(peaks[0], 1),
        "loss": other, "unsharded_loss": loss,
    }  # fmt: skip
    if rank == 0:
        print(" ".join(f"{key}={value}" for key, value in line.items()), flush=True)
    around = record.surroundings("cuda", 1)
    around["versions"]["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return {**around, **line, "command": " ".join(["torchrun", "benchmarks/sharded.py", *sys.argv[1:]])}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default=SHAPES, help="N,D,V; more of them after a semicolon")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--round-ms", type=float, default=200, help="of calls queued back to back")
    parser.add_argument("--json", help="append a line for each result")
    args = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    for text in args.shape.split(";"):
        shape = tuple(map(int, text.split(",")))
        for method in filter(is_there, args.methods.split(",")):
            line = measure(method, shape, args, mesh)
            torch.cuda.empty_cache()
            if dist.get_rank() == 0 and args.json:
                record.append(args.json, [line])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

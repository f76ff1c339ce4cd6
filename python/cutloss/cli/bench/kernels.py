"""The kernels of a call on CUDA, and the time each takes: what of a loss goes where."""

import re

import torch
from torch.profiler import ProfilerActivity, profile


def of_call(call):
    """[{"name", "launches", "ms"}] of a call, by their time; what copies and clears is among them.
    The profiler's own cost lies beside the kernels, not in their times."""
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
        call()
        torch.cuda.synchronize()
    found = {}
    for event in seen.key_averages():
        if event.device_time_total <= 0:
            continue
        line = found.setdefault(short(event.key), [0, 0.0])
        line[0] += event.count
        line[1] += 1e-3 * event.device_time_total
    by_time = sorted(found.items(), key=lambda item: -item[1][1])
    return [{"name": n, "launches": count, "ms": round(ms, 4)} for n, (count, ms) in by_time]


def short(name):
    """A kernel's own name, without namespaces and arguments; of ours also what it ends in."""
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    own = re.split(r"[<(]", name)[0].split("::")[-1].strip()
    epilogue = re.search(r"(\w+)Epilogue", name)
    return f"{own} ({epilogue[1].lower()})" if epilogue else own

"""Peak memory of one loss, measured in a process of its own.

On the CPU it is resident memory as the kernel counts it (VmHWM of /proc/self/status, set back to
the current value through /proc/self/clear_refs), so whatever any library holds is in it, whoever
allocated it. On CUDA it is what device_memory.py says. Reported is what the call adds to the
inputs, less the gradients that it returns.

The process first runs the method at a tiny size: libraries, thread pools and code are then in
memory, and do not count. The measured call is the first one of its size on the CPU.
"""

import ctypes
import dataclasses
import json
import subprocess
import sys

from cutloss.cli import proc
from cutloss.cli.bench import device_memory
from cutloss.cli.bench.cases import Case, bias_of, inputs, leaves
from cutloss.cli.bench.methods import Method, run_pass


def peak_bytes(case, method, pass_name, threads):
    """Starts the process and returns its answer, or None where the system has no such counter."""
    job = {
        "case": dataclasses.asdict(case),
        "method": dataclasses.asdict(method),
        "pass_name": pass_name,
        "threads": threads,
    }
    command = [sys.executable, "-m", "cutloss.cli.bench.memory", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(
            f"measuring the memory of {method.label} failed (exit code {done.returncode}): {last}"
        )
    return json.loads(done.stdout)


def _resident(key):
    kib = proc.value("/proc/self/status", key)
    if kib is None:
        raise OSError(f"/proc/self/status has no {key}")
    return int(kib.split()[0]) * 1024


def _return_free_memory():
    """What malloc keeps for later would hide as much of the call's own memory."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:  # another C library than glibc
        pass


class HostPeak:
    """start() before a call, added() after it: bytes of resident memory at the peak over those
    before. start() raises OSError where the system has no such counter."""

    def start(self):
        _return_free_memory()
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # VmHWM = VmRSS; proc(5)
        self._before = _resident("VmRSS")

    def added(self):
        return _resident("VmHWM") - self._before


def _measure(case, method, pass_name):
    # On CUDA code is compiled and loaded for each size, and counted as long as it is new.
    warm = dataclasses.replace(case, N=64, V=1024) if case.device == "cpu" else case
    run_pass(method, warm, pass_name, *leaves((*inputs(warm), bias_of(warm)), pass_name))
    tensors = leaves((*inputs(case), bias_of(case)), pass_name)
    peak = HostPeak() if case.device == "cpu" else device_memory.Meter()
    try:
        peak.start()
    except OSError:
        return None
    run_pass(method, case, pass_name, *tensors)
    return max(0, _bytes(peak.added()) - case.gradient_bytes(pass_name))


def _bytes(added):
    return added if isinstance(added, int) else added.peak


def main():
    import torch

    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    answer = _measure(Case(**job["case"]), Method(**job["method"]), job["pass_name"])
    print(json.dumps(answer))


if __name__ == "__main__":
    main()

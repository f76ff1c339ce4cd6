"""Times of several ways to do the same thing, paired.

A machine has slow phases. Every round therefore runs every method once, in random order, and a
method's time is the median over the rounds; the first round only warms up.

On CUDA a time is that between two events, and the L2 cache is cleared before each call by writing
a buffer that is larger.
"""

import random
import statistics
import time

import torch

from cutloss.cli.bench.methods import synchronise

FLUSH_BYTES = 256 << 20


def time_rounds(calls, rounds, device, seed=0, progress=lambda: None, pause=0.0, twice=()):
    """Median milliseconds by key of calls, which maps keys to functions without arguments; the
    keys in twice are called twice a round."""
    times = {key: [] for key in calls}
    order = [*calls, *twice]
    shuffle = random.Random(seed).shuffle
    stopwatch = _events() if device == "cuda" else _clock
    for round_ in range(rounds + 1):
        shuffle(order)
        for key in order:
            if pause:
                time.sleep(pause)
            seconds = stopwatch(calls[key])
            if round_ > 0:
                times[key].append(seconds)
            progress()
    return {key: 1e3 * statistics.median(seen) for key, seen in times.items()}


def _clock(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _events():
    """A stopwatch for the device. The buffer is written while the host prepares the call."""
    buffer = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(call):
        torch.cuda.synchronize()
        buffer.zero_()
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return 1e-3 * start.elapsed_time(stop)

    return seconds


def wall_seconds(call, device):
    """Of a first call: whatever it compiles and loads is in it."""
    synchronise(device)
    start = time.perf_counter()
    result = call()
    synchronise(device)
    return time.perf_counter() - start, result

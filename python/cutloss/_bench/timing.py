"""Times of several ways to do the same thing, paired.

A machine has slow phases. Every round therefore runs every method once, in random order, and a
method's time is the median over the rounds; the first round only warms up.
"""

import functools
import random
import statistics
import time

from cutloss._bench.cases import inputs, leaves
from cutloss._bench.methods import products, run_pass, synchronise


def time_rounds(calls, rounds, device, seed=0, progress=lambda: None):
    """Median milliseconds by key of calls, which maps keys to functions without arguments."""
    times = {key: [] for key in calls}
    order = list(calls)
    shuffle = random.Random(seed).shuffle
    for round_ in range(rounds + 1):
        shuffle(order)
        for key in order:
            synchronise(device)
            start = time.perf_counter()
            calls[key]()
            synchronise(device)
            if round_ > 0:
                times[key].append(time.perf_counter() - start)
            progress()
    return {key: 1e3 * statistics.median(seen) for key, seen in times.items()}


def time_case(case, methods, passes, rounds, progress=lambda: None):
    """Returns ({(method, pass): ms}, {product: ms}), all from the same rounds."""
    tensors = inputs(case)
    calls = {
        (method, which): functools.partial(run_pass, method, case, which, *leaves(tensors, which))
        for which in passes
        for method in methods
    }
    units = products(case, *tensors[:2])
    ms = time_rounds({**calls, **units}, rounds, case.device, case.seed, progress)
    return {key: ms[key] for key in calls}, {name: ms[name] for name in units}

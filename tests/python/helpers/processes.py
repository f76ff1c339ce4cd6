"""Checks that run in several processes at once, which form a group (gloo on the CPU, nccl on CUDA).

Starting processes costs seconds, so a test file starts them once for all of its checks, and has a
test for each result: `test_cpu = processes.on_cpu({2: CHECKS})` makes these tests.
"""

import contextlib
import dataclasses
import datetime
import functools
import itertools
import json
import os
import pathlib
import time
import traceback
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers.inside import library

_COLLECTIVE_SECONDS = 60  # how long one process waits for another that has failed


@dataclasses.dataclass
class World:
    """What a check is given, in each process."""

    rank: int
    size: int
    device: torch.device

    @functools.cached_property
    def mesh(self) -> dist.device_mesh.DeviceMesh:
        return dist.device_mesh.init_device_mesh(self.device.type, (self.size,))


@dataclasses.dataclass(frozen=True)
class Check:
    """A function of a module, which other processes can import, and what it is called with."""

    function: Callable[..., None]
    arguments: tuple

    def __str__(self) -> str:
        name = self.function.__name__.removeprefix("check_")
        return "-".join([name, *(getattr(a, "__name__", str(a)) for a in self.arguments)])


def checks(function: Callable[..., None], *values: tuple) -> list[Check]:
    """One with each combination of values for the arguments after the world."""
    return [Check(function, arguments) for arguments in itertools.product(*values)]


@contextlib.contextmanager
def looking():
    """On CUDA too, every call looks at what the ranks tell each other, and waits for it."""
    os.environ["CUTLOSS_CHECK"] = "1"
    try:
        yield
    finally:
        os.environ.pop("CUTLOSS_CHECK")


def _child(rank: int, size: int, device: str, checks: list[Check], folder: str) -> None:
    results = pathlib.Path(folder, f"{rank}.jsonl").open("w")

    def report(name: str, error: str | None) -> None:
        print(json.dumps([name, error]), file=results, flush=True)

    name = "the start of the group"
    try:
        torch.set_num_threads(1)
        if device == "cuda":
            torch.cuda.set_device(rank)
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1"
        )
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=_COLLECTIVE_SECONDS),
        )
        place = torch.device(device, rank) if device == "cuda" else torch.device(device)
        world = World(rank, size, place)
        for check in checks:
            name = str(check)
            check.function(world, *check.arguments)
            report(name, None)
        dist.barrier()
    except BaseException:
        # The others wait for this one in some collective: what follows could only go wrong too.
        report(name, f"in process {rank} of {size}:\n{traceback.format_exc()}")
    finally:
        results.close()
        os._exit(0)  # threads of the libraries (DeepSpeed's for one) may abort an ordinary end


def run(
    checks: list[Check],
    folder: pathlib.Path,
    size: int = 2,
    device: str = "cpu",
    seconds: int = 120,
) -> dict[str, str | None]:
    """The name of each check and what went wrong, if anything did. Nothing is left running."""
    context = mp.get_context("spawn")
    processes = [
        context.Process(target=_child, args=(rank, size, device, checks, str(folder)), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + seconds
    failed_at = None
    while any(p.is_alive() for p in processes) and time.monotonic() < end:
        failed = any(error for rank in range(size) for _, error in _reports(folder, rank))
        failed_at = failed_at or (time.monotonic() if failed else None)
        if failed_at and time.monotonic() > failed_at + 3:  # in which another may fail by itself
            break
        time.sleep(0.05)
    late = [rank for rank, p in enumerate(processes) if p.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    return _collected(checks, folder, size, late, [p.exitcode for p in processes])


def _reports(folder: pathlib.Path, rank: int) -> list:
    path = folder / f"{rank}.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _collected(
    checks: list[Check], folder: pathlib.Path, size: int, late: list[int], codes: list[int | None]
) -> dict[str, str | None]:
    reports = [dict(_reports(folder, rank)) for rank in range(size)]
    results: dict[str, str | None] = {}
    missing = f"not reached; processes still at work: {late}, exit codes {codes}"
    first = [e for r in reports for e in r.values() if e]
    if first:
        missing = f"not reached, after an error {first[0]}"
    for check in map(str, checks):
        errors = [r[check] for r in reports if r.get(check)]
        if not errors and not all(check in r for r in reports):
            errors = [missing]
        results[check] = "\n".join(errors) or None
    return results


class Results:
    """What checks gave, of each number of processes. They are run when a test first asks."""

    def __init__(self, checks_of_size: dict[int, list[Check]], device="cpu", seconds=120):
        self._checks, self._device, self._seconds = checks_of_size, device, seconds
        self._found: dict[int, dict[str, str | None]] = {}

    def passed(self, tmp_path_factory, size: int, check: Check) -> None:
        """Fails the test with the traceback of the process in which the check failed."""
        if size not in self._found:
            folder = tmp_path_factory.mktemp(f"{self._device}{size}")
            checks = self._checks[size]
            self._found[size] = run(checks, folder, size, self._device, self._seconds)
        if error := self._found[size][str(check)]:
            pytest.fail(error, pytrace=False)


needs_two_devices = pytest.mark.skipif(
    not library.HAS_CUDA or torch.cuda.device_count() < 2,
    reason="fewer than two CUDA devices, or a build without CUDA",
)


def each(checks_of_size: dict[int, list[Check]]):
    """Parametrizes a test by size and check."""
    pairs = [(size, check) for size, checks in checks_of_size.items() for check in checks]
    return pytest.mark.parametrize("size, check", pairs, ids=str)


def on_cpu(checks_of_size: dict[int, list[Check]]):
    """A test of each check in each number of processes. A file calls it test_cpu."""
    results = Results(checks_of_size)

    @each(checks_of_size)
    def test(tmp_path_factory, size, check):
        results.passed(tmp_path_factory, size, check)

    return test


def on_two_devices(checks: list[Check]):
    """A test of each check in two processes with a CUDA device each. A file calls it test_cuda."""
    results = Results({2: checks}, "cuda", seconds=240)

    @needs_two_devices
    @pytest.mark.parametrize("check", checks, ids=str)
    def test(tmp_path_factory, check):
        results.passed(tmp_path_factory, 2, check)

    return test


def refused(error, match, function):
    with pytest.raises(error, match=match):
        function()

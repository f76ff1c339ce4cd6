"""A line of a result file."""

import datetime
import json
import pathlib
import platform
import subprocess

import torch

import cutloss
from cutloss.cli import proc
from cutloss.cli.bench import rivals

NUMBER = (int, float)
MEASURED = (*NUMBER, type(None))
# key: the types it may have; None means that it was not measured or does not apply.
KEYS = {
    "device": (str,),
    "date": (str,),
    "commit": (str, type(None)),
    "versions": (dict,),
    "N": (int,),
    "D": (int,),
    "V": (int,),
    "dtype": (str,),
    "data": (str,),
    "method": (str,),
    "engine": (str,),
    "gradient": (str,),
    "schedule": (str,),
    "workspace_mib": MEASURED,
    "pass": (str,),
    "ms": NUMBER,
    "gemm_ms": NUMBER,
    "gemms": NUMBER,
    "peak_mib": MEASURED,
    "de_err": MEASURED,
    "dc_err": MEASURED,
    "command": (str,),
}
# May be left out: older results have none of these.
OPTIONAL = {
    "first_ms": MEASURED,  # the first call, with all that it compiles and loads
    "total_mib": MEASURED,  # peak memory with the gradients
    "outside_mib": MEASURED,  # the part of it outside of PyTorch's allocator
    "kept_mib": MEASURED,  # what the first call leaves behind: caches, code
    "loss_err": MEASURED,
    "nll_err": MEASURED,  # the losses of the rows
    "reference": (str, type(None)),  # the dtype that the errors are against
    "ignored": NUMBER,  # the part of the targets that is ignored
    "num_valid": (bool,),  # whether the method was told how many are not
    "options": (str,),
    "kernels": (list, type(None)),  # of one call: name, launches, ms
    "variant": (str,),  # the method and its settings, as the tables call it
}
# Of a training step in a pipeline, benchmarks/pipeline_memory.py.
OF_A_PIPELINE = {
    "pipeline": (str,),  # the order of forward and backward
    "microbatches": (int,),
    "stage": (str,),  # which, and what is in it
}
# Of losses over logits that exist; a line that has copy_ms is one.
LOGITS_KEYS = {
    **{key: KEYS[key] for key in ("device", "date", "commit", "versions", "N", "V", "dtype")},
    **{key: KEYS[key] for key in ("method", "pass", "ms", "peak_mib", "command")},
    "first_ms": MEASURED,
    "copy_ms": NUMBER,  # one read and one write of the logits
    "copies": NUMBER,
    "gradient_err": MEASURED,  # over a few rows
}
# Of a classifier in shards, benchmarks/sharded.py; a line that has ranks is one. `ms` is of the call
# in which each rank has a shard.
SHARDED_KEYS = {
    **{key: KEYS[key] for key in ("device", "date", "commit", "versions", "N", "D", "V", "dtype")},
    **{key: KEYS[key] for key in ("data", "method", "schedule", "pass", "ms", "command")},
    "ranks": (int,),
    "unsharded_ms": (list,),  # of each rank, all at once
    "efficiency": NUMBER,  # their mean over ranks * ms
    "peak_mib": NUMBER,
    "unsharded_mib": NUMBER,
    "loss": NUMBER,
    "unsharded_loss": NUMBER,
}
# Of a training step of a whole model, cutloss bench --train; a line that has tokens_per_s is one.
# N tokens in sequences of equal length. Memory is all that is held, parameters and all.
TRAIN_KEYS = {
    **{key: KEYS[key] for key in ("device", "date", "commit", "versions", "N", "D", "V", "dtype")},
    **{key: KEYS[key] for key in ("method", "pass", "ms", "peak_mib", "command")},
    "model": (str,),
    "layers": (int,),
    "all_layers": (int,),  # that the published model has
    "parameters": (int,),  # how many, with so many layers
    "sequence": (int,),
    "optimizer": (str,),
    "attention": (str,),
    "tokens_per_s": NUMBER,
    "model_mib": MEASURED,  # of the peak, what parameters and the optimizer's state take
    "outside_mib": MEASURED,
    "first_ms": MEASURED,
    "loss": NUMBER,  # the first one
    "reference_loss": NUMBER,  # of the model as Transformers has it, with the same weights
    "loss_err": MEASURED,
    "grad_err": MEASURED,
    "is_wrong": (bool,),  # whether loss_err is more than rounding
}
# Of a few steps of a trainer of TRL, benchmarks/trainers.py; a line that has trainer is one. `ms` is
# the median of the steps after the first two, and the peak is theirs.
TRAINER_KEYS = {
    **{key: KEYS[key] for key in ("device", "date", "commit", "versions", "N", "D", "V", "dtype")},
    **{key: KEYS[key] for key in ("method", "pass", "ms", "peak_mib", "command")},
    **{key: TRAIN_KEYS[key] for key in ("model", "layers", "all_layers", "parameters")},
    **{key: TRAIN_KEYS[key] for key in ("sequence", "is_wrong")},
    "trainer": (str,),
    "step_ms": (list,),  # of every step
    "losses": (list,),
    "grad_norms": (list,),
}
# Of the host's time, benchmarks/host_time.py; a line that has plain_ms is one.
HOST_KEYS = {
    **{key: KEYS[key] for key in ("device", "date", "commit", "versions", "N", "D", "V", "dtype")},
    **{key: KEYS[key] for key in ("method", "pass", "ms", "command")},
    "plain_ms": NUMBER,  # of plain PyTorch
    "least_ms": NUMBER,  # call after call, the least
    "plain_least_ms": NUMBER,
}
CHOICES = {
    "gradient": ("exact", "sampled", "filtered"),
    "schedule": ("rows", "vocabulary", "none"),
    "pass": ("fw", "bw", "fwbw", "fwbw_frozen", "step", "host_fw", "host_fwbw"),
}
# Keys that tell lines of another form, and the keys of that.
KEYS_BY_MARK = {
    "copy_ms": LOGITS_KEYS,
    "ranks": SHARDED_KEYS,
    "tokens_per_s": TRAIN_KEYS,
    "trainer": TRAINER_KEYS,
    "plain_ms": HOST_KEYS,
}
OPTIONAL_OF_HOST = {"product_ms": NUMBER}  # E·Cᵀ alone; with no gradients
POSITIVE = ("N", "D", "V", "ms", "gemm_ms", "gemms", "copy_ms", "copies", "ranks", "tokens_per_s")
NOT_NEGATIVE = (
    *("workspace_mib", "peak_mib", "de_err", "dc_err", "first_ms", "total_mib", "outside_mib"),
    *("kept_mib", "loss_err", "nll_err", "ignored", "gradient_err"),
)


def problems(record):
    """What is wrong with a line, as a list of sentences; empty where nothing is."""
    needed, known = KEYS, {**KEYS, **OPTIONAL, **OF_A_PIPELINE}
    for key, keys in KEYS_BY_MARK.items():
        if key in record:
            needed = known = keys
            if keys is HOST_KEYS:
                known = {**keys, **OPTIONAL_OF_HOST}
    found = [f"{key} is missing" for key in needed if key not in record]
    found += [f"{key} is not a key of the format" for key in record if key not in known]
    for key, types in known.items():
        value = record.get(key)
        if key not in record:
            continue
        if isinstance(value, bool) != (types == (bool,)) or not isinstance(value, types):
            found.append(f"{key} is {value!r}, not {' or '.join(t.__name__ for t in types)}")
        elif key in CHOICES and value not in CHOICES[key]:
            found.append(f"{key} is {value!r}, not one of {', '.join(CHOICES[key])}")
        elif key in POSITIVE and not value > 0:
            found.append(f"{key} is {value}, not above 0")
        elif key in NOT_NEGATIVE and value is not None and not value >= 0:
            found.append(f"{key} is {value}, not 0 or more")
    return found


def surroundings(device, threads, packages=()):
    """The keys that all lines of a run share: device, date, commit, versions."""
    return {
        "device": device_name(device, threads),
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "versions": {**versions(), **{name: rivals.version(name) for name in packages}},
    }


def versions():
    found = {
        "cutloss": cutloss.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    triton = rivals.version("triton")
    if triton:
        found["triton"] = triton
    return found


def device_name(device, threads):
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{processor()}, {threads} threads, {torch.backends.cpu.get_cpu_capability()}"


def processor():
    name = proc.value("/proc/cpuinfo", "model name")
    return name or platform.processor() or platform.machine()


def _commit():
    """The commit of the checkout that cutloss is imported from; None outside of one."""
    folder = cutloss.__path__[0]
    top = _git(folder, "rev-parse", "--show-toplevel")
    if top is None or not (pathlib.Path(top) / "include/cutloss/cutloss.h").exists():
        return None  # not cutloss's repository: it was installed into another project
    return _git(folder, "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12")


def _git(folder, *arguments):
    try:
        done = subprocess.run(
            ["git", "-C", folder, *arguments], capture_output=True, text=True, check=False
        )
    except OSError:  # no git
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def mib(number):
    """Of a number of bytes, or None."""
    return None if number is None else round(number / 2**20, 2)


def append(path, records):
    with open(path, "a", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")

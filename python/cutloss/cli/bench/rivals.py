"""Other projects' losses behind one signature. Each is left out, with the reason, where it is not
installed; benchmarks/rivals.txt pins the versions that this file was written for.

A loss takes E (N,D), C (V,D), targets (N) and what is Asked, and returns the mean over the rows
that count, or with reduction "none" one number per row.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable

import torch

from cutloss.cli.bench.cases import IGNORED_TARGET, OPTIONS

ALL_OPTIONS = frozenset(OPTIONS)
PINNED = {
    "cut-cross-entropy": "25.6.4",
    "liger-kernel": "0.8.5",
    "quack-kernels": "0.6.5",
    "nvidia-cutlass-dsl": "4.7.1",
}


@dataclasses.dataclass
class Asked:
    method: object  # methods.Method
    bias: torch.Tensor | None = None  # (V)
    softcap: float | None = None
    temperature: float | None = None
    reduction: str = "mean"  # or "none"
    num_valid: int | None = None  # targets that count; None: all


@dataclasses.dataclass(frozen=True)
class Loss:
    function: Callable
    about: str
    missing: Callable = lambda device: None  # device -> why it cannot be run, or None
    options: frozenset = frozenset()  # those of cases.OPTIONS that it has
    per_row: bool = True  # whether it knows reduction "none"
    gradient: str = "exact"  # or "filtered": small probabilities are left out
    package: str = "torch"


def lacks(package, module, device):
    """Why a package that needs a GPU cannot be used, or None."""
    if importlib.util.find_spec(module) is None:
        return f"{package} is not installed (benchmarks/rivals.txt)"
    if device != "cuda":
        return f"{package} needs --device cuda"
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever a package does when it is imported
        return f"{package} cannot be imported: {first_line(error)}"
    return None


def _lacks_dsl(package, module, device):
    """The same of a package whose kernels are compiled by nvidia-cutlass-dsl."""
    return lacks(package, module, device) or lacks("nvidia-cutlass-dsl", "cutlass", device)


def _lacks_hopper(package, module, device):
    reason = _lacks_dsl(package, module, device)
    if reason is None and torch.cuda.get_device_capability() != (9, 0):
        major, minor = torch.cuda.get_device_capability()
        return f"its kernels are for sm_90, this is sm_{major}{minor}"
    return reason


def version(package):
    """The installed version, also of a package that is only on PYTHONPATH; None if unknown."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def another_version(package):
    """A sentence where the installed version is not the pinned one, else None."""
    found, pinned = version(package), PINNED.get(package)
    if pinned is None or found == pinned:
        return None
    return f"{package} is {found or 'of unknown version'}; benchmarks/rivals.txt names {pinned}"


def first_line(error):
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# cut-cross-entropy ------------------------------------------------------------------------------


def _cce(e, c, targets, asked, impl):
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(
        e,
        c,
        targets,
        asked.bias,
        ignore_index=IGNORED_TARGET,
        softcap=asked.softcap,
        reduction=asked.reduction,
        impl=impl,
    )


def _cce_loss(impl, about, gradient="exact"):
    return Loss(
        functools.partial(_cce, impl=impl),
        about,
        functools.partial(lacks, "cut-cross-entropy", "cut_cross_entropy"),
        frozenset({"bias", "softcap"}),
        gradient=gradient,
        package="cut-cross-entropy",
    )


# liger-kernel -----------------------------------------------------------------------------------


def _liger(e, c, targets, asked, accum_dtype=None):
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    class_weight, z_loss, smoothing, return_z_loss = None, 0.0, 0.0, False
    loss = LigerFusedLinearCrossEntropyFunction.apply(
        e,
        c,
        targets,
        asked.bias,
        class_weight,
        IGNORED_TARGET,
        z_loss,
        smoothing,
        asked.reduction,
        asked.softcap,
        return_z_loss,
        accum_dtype,
    )
    return loss[0] if isinstance(loss, tuple) else loss


def _liger_sm90(e, c, targets, asked):
    from liger_kernel.ops.cutedsl.ops import fused_scaled_cross_entropy_sm90 as module

    temperature = 1.0 if asked.temperature is None else asked.temperature
    function = module.LigerFusedScaledCrossEntropySM90Function
    nll = function.apply(e, c, targets, temperature, IGNORED_TARGET)  # (N)
    nll = nll[0] if isinstance(nll, tuple) else nll
    return nll if asked.reduction == "none" else nll.sum() / (asked.num_valid or len(nll))


def _liger_sm90_stored(e, c, targets, asked):
    from liger_kernel.ops.cutedsl.ops import fused_linear_cross_entropy_sm90 as module

    return module.liger_fused_linear_cross_entropy_sm90(
        e, c, targets, ignore_index=IGNORED_TARGET, reduction=asked.reduction
    )


_liger_missing = functools.partial(lacks, "liger-kernel", "liger_kernel")
_liger_sm90_missing = functools.partial(_lacks_hopper, "liger-kernel", "liger_kernel")


# quack-kernels ----------------------------------------------------------------------------------


def _quack(e, c, targets, asked, chunk, scaled):
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(
        e,
        c,
        targets,
        chunk_size=chunk,
        ignore_index=IGNORED_TARGET,
        reduction=asked.reduction,
        use_scaled_exp=scaled,
    )


def _quack_loss(about, chunk, scaled):
    return Loss(
        functools.partial(_quack, chunk=chunk, scaled=scaled),
        about,
        functools.partial(_lacks_hopper if scaled else _lacks_dsl, "quack-kernels", "quack"),
        per_row=False,
        package="quack-kernels",
    )


_CAPPED = frozenset({"bias", "softcap"})
LOSSES = {
    "cce": _cce_loss("cce", "cut-cross-entropy as it comes", "filtered"),
    "cce_kahan": _cce_loss(
        "cce_kahan_full_c", "its cce_kahan_full_c: all of dC, in fp32; dE filtered", "filtered"
    ),
    "cce_exact": _cce_loss("cce_exact", "its cce_exact: no filter"),
    "cce_compile": _cce_loss("torch_compile", "its torch_compile, which stores the logits"),
    "liger": Loss(
        _liger, "liger-kernel in Triton", _liger_missing, _CAPPED, package="liger-kernel"
    ),
    "liger_fp32": Loss(
        functools.partial(_liger, accum_dtype=torch.float32),
        "the same, dC added up in fp32",
        _liger_missing,
        _CAPPED,
        package="liger-kernel",
    ),
    "liger_sm90": Loss(
        _liger_sm90,
        "liger-kernel's fused scaled cross-entropy for Hopper, which recomputes the logits",
        _liger_sm90_missing,
        frozenset({"temperature"}),
        package="liger-kernel",
    ),
    "liger_sm90_stored": Loss(
        _liger_sm90_stored,
        "liger-kernel's fused linear cross-entropy for Hopper, which stores the logits",
        _liger_sm90_missing,
        per_row=False,
        package="liger-kernel",
    ),
    "quack": _quack_loss("quack-kernels by chunks of 4096 rows; tunes for minutes", 4096, False),
    "quack_scaled": _quack_loss("its scaled-exp path, 4096 rows", 4096, True),
    "quack_scaled_1024": _quack_loss("the same, 1024 rows", 1024, True),
}

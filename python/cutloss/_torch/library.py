"""The operators of torch.ops.cutloss: loading the shared library, calls, errors in Python's terms.

One library is for every supported version of PyTorch and Python.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from .._core.options import Options
from .._core.plan import Plan
from .._core.weighting import Weighting
from . import needs, private

_LIBRARY = Path(__file__).parent.parent / "lib" / "libcutloss_torch.so"


def load() -> None:
    if not _LIBRARY.exists():
        raise ImportError(
            f"cutloss was not built: {_LIBRARY} does not exist; run `make build` in a checkout, "
            f"or install the package with pip"
        )
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        reason = str(error.__cause__ or error)
        words = needs.loading_refusal(_LIBRARY, reason, torch.__version__)
        raise ImportError(words) from error


load()
_ops = torch.ops.cutloss

# Whether this build has CUDA engines; says nothing of a device.
HAS_CUDA: bool = _ops.cuda_version() > 0


# Whether gradients of a dtype are made in backward alone, where the loss scale comes before their
# rounding. Plans keep to it; this is for losses that have no plan of the library.
WAITS_FOR_LOSS_SCALE: dict[torch.dtype, bool] = {
    dtype: _ops.waits_for_loss_scale(dtype)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
}


def version() -> str:
    return _ops.version()


def cuda_version() -> tuple[int, int] | None:
    """The CUDA that this build's engines were compiled for, (13, 0); None without CUDA engines."""
    number = _ops.cuda_version()
    return (number // 1000, number % 1000 // 10) if number else None


def cuda_code() -> str:
    """What the CUDA kernels were compiled for, "80-real 90-real" (-real: for no later GPU)."""
    return _ops.cuda_code()


def allow_tf32(device_type: str, compute_dtype: torch.dtype) -> bool:
    """Whether products of fp32 may round their operands to tf32: where PyTorch's own may."""
    return device_type == "cuda" and compute_dtype == torch.float32 and _tf32_is_on()


@private.while_traced  # PyTorch compiles again where the setting changes
def _tf32_is_on() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


class Engine(NamedTuple):
    name: str
    absent: str  # why it is not here; empty where it is
    description: str  # the libraries behind it with their versions, what hardware it found


def engines() -> list[Engine]:
    """The engines of this build."""
    return [Engine(**fields) for fields in json.loads(_ops.engines())]


def call(operator: Any, *args: Any, **options: Any) -> Any:
    """Calls an operator; its errors become Python's. A traced call is left as it is.

    The operator's own autograd, which is for traced code, is passed over: it costs more than the
    smallest loss, and whoever calls from here has the gradient in hand, or wants none. Transforms
    of torch.func work by autograd's dispatch, so under them nothing is passed over.
    """
    if torch.compiler.is_compiling():
        return operator(*args, **options)
    try:
        if private.are_transforms_active():
            return operator(*args, **options)
        with private.below_autograd():
            return operator.default(*args, **options)  # to choose an overload takes its time
    except RuntimeError as error:
        _raise_translated(error)


@private.untraced
def _ask(operator: Any, *args: Any, **options: Any) -> Any:
    """As call, for operators without tensors, which no graph has: what is asked while a compiler
    traces is asked then and there, and its errors become Python's in any case."""
    try:
        return operator.default(*args, **options)
    except RuntimeError as error:
        _raise_translated(error)


def _raise_translated(error: RuntimeError) -> NoReturn:
    known = translated(error)
    if known is error:
        raise error
    raise known from None


# The operators can only raise RuntimeError, so an error's kind is written in front of its message,
# ``cutloss[kind]: ...``. An operator in compiled code that fails as it runs says that as it is.
_KINDS: dict[str, type[Exception]] = {
    "value": ValueError,
    "type": TypeError,
    "unsupported": NotImplementedError,
    "workspace": ValueError,
    "memory": MemoryError,
    "device_memory": torch.OutOfMemoryError,
    "internal": RuntimeError,
    "pytorch": RuntimeError,
}
_MESSAGE = re.compile(r"cutloss\[(\w+)\]: (.*)", re.DOTALL)


def translated(error: RuntimeError) -> Exception:
    """The error that the user should see; errors of others are returned as they are."""
    match = _MESSAGE.match(str(error))
    if match is None or match[1] not in _KINDS:
        return error
    kind, message = match[1], match[2]
    if kind == "internal":
        message = f"internal error of cutloss, please report it: {message}"
    return _KINDS[kind](message)


def plan(sizes: tuple, options: Options) -> Plan:
    """What is decided for a problem: its sizes (decide.Sizes.arguments) and options."""
    return Plan.of_fields(_ask(_ops.plan, *sizes, **options.of_linear()))


def choice(sizes: tuple, options: Options) -> tuple[bool, int, int]:
    """What a call must know of the plan: whether gradients are made in forward, the schedule's
    number, kept_bytes."""
    return _ask(_ops.choice, *sizes, **options.of_linear())


def plan_for_rows(sizes: tuple, options: Options) -> list[tuple[int, bool, str]]:
    """What is decided for each number of rows (those of `sizes` do not count): up to how many,
    whether gradients are made in forward, the schedule. The last is for all others."""
    read = json.loads(_ask(_ops.plan_for_rows, *sizes, **options.of_linear()))
    return [(entry["most"], entry["in_forward"], entry["schedule"]) for entry in read]


def loss_terms(
    targets: Tensor, V: int, how: Weighting, options: Options
) -> tuple[Tensor, Tensor]:
    """What weighting.terms makes, without a gradient: the coefficients in one tensor, and whether
    they are those of a mean of nothing. `targets`: (sequences, length)."""
    return call(
        _ops.loss_terms,
        targets,
        *how.tensors(options.stats),
        options.compute_dtype,
        V,
        options.shift,
        options.ignore_index,
        how.reduction == "mean",
        how.label_smoothing,
        how.z_loss,
    )

"""Checks of arguments: what is wrong, both values, and what to do instead.

Whatever Python can see is checked here, so that the errors are the same in eager code, while
tracing and for impl="torch" (that operators refuse the same, tests/python/loss/
test_refusals_agree.py sees to); what only the data shows (targets out of range) is checked in C++
on the CPU. On CUDA that would wait for the device, so there it is checked where the user asks for
it, CUTLOSS_CHECK=1.
"""

import math
import numbers
import os

import torch
from torch import Tensor

from .._torch import partitioned
from .._torch import private

REDUCTIONS = ("mean", "sum", "none")
_MOST_BYTES = 2**63 - 1
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def shape(t: Tensor) -> str:
    return str(tuple(t.shape))


def number(name: str, value: object) -> float:
    if type(value) is float:  # which the check below takes a while to find
        return value
    if isinstance(value, (bool, Tensor)) or not isinstance(value, numbers.Real):
        given = "a tensor" if isinstance(value, Tensor) else repr(value)
        raise TypeError(f"{name} must be a number, got {given} ({type(value).__name__})")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is too large for a float: got {value!r}") from None


def usable_range(stats: torch.dtype) -> tuple[float, float]:
    """Of numbers that have a reciprocal in the dtype of per-row numbers, as src/core/validate.h has
    it: an option outside of it would silently become 0 or infinity."""
    least = torch.finfo(stats).tiny
    return least, 1.0 / least


def usable(stats: torch.dtype, **named: float | None) -> None:
    """What of an option's range the dtype decides: operators say so in eager code, this wherever
    none is called, or only later."""
    least, most = usable_range(stats)
    for name, value in named.items():
        if value is not None and not least <= abs(value) <= most:
            name = {"quotient": "logit_scale / temperature"}.get(name, name)
            raise ValueError(
                f"{name} must be between {least:g} and {most:g} in size, of which per-row numbers "
                f"in {str(stats).removeprefix('torch.')} have the reciprocal, got {value}"
            )


def tensors(**named: Tensor | None) -> None:
    """Each a plain tensor, or None where it is optional (e, c, logits and targets are not)."""
    for name, t in named.items():
        if t is None and name not in ("e", "c", "logits", "targets"):
            continue
        if partitioned.is_dtensor(t):
            raise ValueError(partitioned.refusal(name, t))
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}{_hint(t)}")
        layout(name, t)


def dense(**named: Tensor) -> None:
    """Each a dense tensor; it may be a DTensor, which the call itself takes or refuses."""
    for name, t in named.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
        layout(name, t)


def layout(name: str, t: Tensor) -> None:
    """One whose elements lie at strides, as the library reads them: not nested, not sparse."""
    if t.is_nested:
        raise TypeError(
            f"{name} is a nested tensor (of layout {t.layout}), and cutloss takes plain ones: pass "
            f"torch.cat({name}.unbind()), the tokens of all sequences one after the other, and the "
            f"same of whatever has a number for each token; with a shift, which must not reach "
            f"from one sequence into the next, torch.nested.to_padded_tensor({name}, 0.0), and "
            f"targets padded with ignore_index"
        )
    if t.layout != torch.strided:
        raise TypeError(
            f"{name} has the layout {t.layout}, and cutloss takes dense tensors, of layout "
            f"torch.strided: pass {name}.to_dense()"
        )


def _hint(given: object) -> str:
    """What to pass instead of something that is no tensor."""
    if isinstance(given, torch.nn.Module) and hasattr(given, "weight"):
        return ": pass its weight (and its bias as bias)"
    if type(given).__name__ == "UnmadeLogits":
        return (
            ": this model is patched and makes no logits; leave the loss function to "
            "cutloss.patch (it takes z_loss and label_smoothing), or call cutloss.unpatch(model)"
        )
    return ": pass torch.as_tensor(...)" if hasattr(given, "__len__") else ""


def device(
    t: Tensor, has_cuda: bool, name: str = "e", instead: str = "impl='torch'"
) -> None:
    """One that an engine of this build may know (meta: shapes only)."""
    if t.device.type == "cuda" and not has_cuda:
        raise NotImplementedError(
            f"this cutloss was built without CUDA, and {name} is on a CUDA device: install a build "
            f"with CUDA (`cutloss doctor` says what is missing, the README how to build), or use "
            f"{instead}"
        )
    if t.device.type not in ("cpu", "cuda", "meta"):
        raise NotImplementedError(
            f"cutloss has no engine for tensors on {t.device}: use {instead} there"
        )


def same_device(first: Tensor, /, *, of: str = "e", **others: Tensor | None) -> None:
    for name, t in others.items():
        if t is not None and t.device != first.device:
            raise ValueError(
                f"all tensors must be on one device: {of} is on {first.device}, {name} on "
                f"{t.device}"
            )


def shapes(
    e: Tensor, c: Tensor, targets: Tensor, bias: Tensor | None, least_classes: int = 1
) -> None:
    if e.dim() < 1 or e.shape[:-1] != targets.shape:
        raise ValueError(
            f"e must have the shape of targets and one dimension more, (..., D) and (...): got e "
            f"{shape(e)} and targets {shape(targets)}"
        )
    if c.dim() != 2 or c.shape[1] != e.shape[-1]:
        is_transposed = c.dim() == 2 and c.shape[0] == e.shape[-1]
        raise ValueError(
            f"c must be (V, D) with the D of e: got c {shape(c)} and e {shape(e)}"
            + ("; transpose c" if is_transposed else partitioned.of_shape(c))
        )
    if c.shape[0] < least_classes or c.shape[1] < 1:
        raise ValueError(f"c must have at least one row and one column (V, D), got {shape(c)}")
    if bias is not None and bias.shape != c.shape[:1]:
        raise ValueError(f"bias must be (V): got bias {shape(bias)} and c {shape(c)}")


def class_indices(targets: Tensor) -> None:
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"targets must be class indices in int64 or int32, got {targets.dtype}"
            + ("; class probabilities are not supported" if targets.is_floating_point() else "")
        )


def logits(z: Tensor, targets: Tensor) -> None:
    """Shapes and dtypes."""
    if z.dim() < 1 or z.shape[:-1] != targets.shape:
        classes_second = z.dim() > 2 and (z.shape[0], *z.shape[2:]) == targets.shape
        raise ValueError(
            f"logits must have the shape of targets and one dimension more, (..., V) and (...): got "
            f"logits {shape(z)} and targets {shape(targets)}"
            + ("; V comes last: pass logits.movedim(1, -1)" if classes_second else "")
        )
    if z.shape[-1] < 1:
        raise ValueError(f"logits must have at least one class (..., V), got {shape(z)}")
    if z.dtype not in DTYPES:
        raise TypeError(f"logits must be float32, float64, bfloat16 or float16, got {z.dtype}")
    class_indices(targets)


def dtypes(
    e: Tensor, c: Tensor, bias: Tensor | None, targets: Tensor, device: str | None = None
) -> torch.dtype:
    """The dtype of the products' operands: that of the tensors, or autocast's for a device of this
    type (that of e where it is left out)."""
    class_indices(targets)
    named = {"e": e, "c": c}
    if bias is not None:
        named["bias"] = bias
    return operand_dtype(device, **named)


def operand_dtype(device: str | None = None, /, **named: Tensor) -> torch.dtype:
    """Of the products of these tensors: theirs, or autocast's."""
    (first, e), *_ = named.items()
    for name, t in named.items():
        if t.dtype not in DTYPES:
            raise TypeError(
                f"{name} must be float32, float64, bfloat16 or float16, got {t.dtype}"
            )
    device = device or e.device.type
    autocast = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
    if autocast and all(t.dtype != torch.float64 for t in named.values()):  # which it leaves alone
        return torch.get_autocast_dtype(device)
    for name, t in named.items():
        if t.dtype != e.dtype:
            raise TypeError(
                f"{first} and {name} must have one dtype: {first} is {e.dtype}, {name} {t.dtype}; "
                f"convert one of them, or run under torch.autocast (which leaves float64 as it is)"
            )
    return e.dtype


def shift(value: bool | int, targets: Tensor | None = None) -> int:
    """Without targets what can be said of any, as in what follows. With them, what of it tells: a
    sequence that is no longer than the shift predicts nothing, however long the shift is."""
    if not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"shift must be a bool or an int, got {value!r}")
    value = int(value)
    if value == 0:
        return 0
    if value < 0:
        raise ValueError(f"shift must be >= 0, got {value}")
    if targets is None:
        return value
    if targets.dim() == 0:
        raise ValueError(
            f"shift must be 0 for targets of shape (), which are no sequence, got {value}: pass "
            f"targets of shape (..., length)"
        )
    length = targets.shape[-1]
    return value if value <= length else int(length)


def softcap(value: float | None) -> float | None:
    if value is None:
        return None
    value = number("softcap", value)
    if not 0 < value < math.inf:
        raise ValueError(f"softcap must be finite and > 0, or None, got {value}")
    return value


def logit_scale(value: float) -> float:
    if isinstance(value, Tensor):
        raise TypeError(
            "logit_scale must be a number, got a tensor; multiply e by the tensor instead, which "
            "also gives it a gradient"
        )
    value = number("logit_scale", value)
    if value == 0 or not -math.inf < value < math.inf:
        raise ValueError(f"logit_scale must be finite and not 0, got {value}")
    return value


def temperature(value: float | Tensor, targets: Tensor | None = None) -> None:
    if not isinstance(value, Tensor):
        value = number("temperature", value)
        if not 0 < value < math.inf:
            raise ValueError(f"temperature must be finite and > 0, got {value}")
        return
    constant("temperature", value)
    if targets is None:
        return
    target_shape = targets.shape
    fits = value.dim() <= len(target_shape) and all(
        mine == 1 or mine == theirs
        for mine, theirs in zip(value.shape[::-1], target_shape[::-1])
    )
    if not fits:
        raise ValueError(
            f"temperature must broadcast to the shape of targets: got temperature "
            f"{shape(value)} and targets {shape(targets)}"
        )


def constant(name: str, t: Tensor) -> None:
    """A floating-point tensor that takes no gradient."""
    layout(name, t)
    if not t.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {t.dtype}")
    if private.requires_grad(t):
        raise ValueError(f"cutloss makes no gradient for {name}: pass {name}.detach()")


def weight(value: Tensor, c: Tensor | None = None, V: int | None = None) -> None:
    """`V`: of the whole vocabulary, of which c may be a shard."""
    if not isinstance(value, Tensor):
        raise TypeError(f"weight must be a tensor (V) or None, got {value!r}")
    constant("weight", value)
    if c is None:
        if value.dim() != 1:
            raise ValueError(f"weight must be (V), got {shape(value)}")
        return
    if value.shape != (V,):
        whole = "" if V == c.shape[0] else f" of the whole vocabulary, V = {V}"
        raise ValueError(f"weight must be (V){whole}: got weight {shape(value)} and c {shape(c)}")


def token_weight(value: Tensor, targets: Tensor) -> None:
    layout("token_weight", value)
    if not value.is_floating_point():
        raise TypeError(f"token_weight must be a floating-point tensor, got {value.dtype}")
    if value.shape != targets.shape:
        raise ValueError(
            f"token_weight must have the shape of targets: got token_weight {shape(value)} and "
            f"targets {shape(targets)}"
        )


def label_smoothing(value: float) -> float:
    value = number("label_smoothing", value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {value}")
    return value


def z_loss(value: float) -> float:
    value = number("z_loss", value)
    if not 0 <= value < math.inf:
        raise ValueError(f"z_loss must be finite and >= 0, got {value}")
    return value


def choice(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")


def flags(**named: bool) -> None:
    for name, value in named.items():
        if not isinstance(value, (bool, int)):
            raise TypeError(f"{name} must be a bool, got {value!r}")


def max_workspace(value: int | None) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"max_workspace must be a number of bytes (int) or None, got {value!r}")
    if value < 0 or value > _MOST_BYTES:
        raise ValueError(f"max_workspace must be in [0, {_MOST_BYTES}] bytes, got {value}")


def plain_options(plain: bool, schedule: str, max_workspace: int | None) -> None:
    if plain and (schedule != "auto" or max_workspace is not None):
        raise ValueError(
            f"impl='torch' stores all logits: it takes no schedule and no max_workspace, got "
            f"schedule={schedule!r} and max_workspace={max_workspace}"
        )


def filter_eps(value: float | str | None) -> None:
    if value is None or value == "auto":
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"filter_eps must be a number, 'auto' or None, got {value!r}")


def ignore_index(value: int, targets: Tensor | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"ignore_index must be an int, got {value!r}")
    if targets is None:
        return
    held = torch.iinfo(targets.dtype)
    if value < held.min or value > held.max:
        raise ValueError(
            f"ignore_index must be a value that targets can hold: it is {value}, targets are "
            f"{targets.dtype}, from {held.min} to {held.max}"
        )


def num_valid(value: int | None, rows: int, ignore_index: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"num_valid must be a number of tokens (int) or None, got {value!r}")
    if value < 0 or value > rows:
        raise ValueError(
            f"num_valid must be the number of targets that are not ignore_index = {ignore_index}, "
            f"of those that are predicted: in [0, {rows}], got {value}"
        )


def num_items(value: float | Tensor) -> float | Tensor:
    """What a sum is divided by: at least 1, and of a tensor without its shape or gradient."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"num_items_in_batch must be one number, got a tensor of shape {shape(value)}: "
                f"pass its sum"
            )
        if value.device.type == "cpu" and not torch.compiler.is_compiling():
            num_items(value.item())
        return value.detach().reshape(()).clamp(min=1)
    if isinstance(value, bool) or not isinstance(value, (torch.SymInt, numbers.Real)):
        raise TypeError(f"num_items_in_batch must be a number or a tensor, got {value!r}")
    if not 0 <= value < math.inf:
        raise ValueError(f"num_items_in_batch must be finite and >= 0, got {value}")
    return max(value, 1)


# Looking at the data --------------------------------------------------------------------------


def looks_always() -> bool:
    """Whether the user asks for looks that wait, or that are taken once otherwise."""
    return os.environ.get("CUTLOSS_CHECK", "0") not in ("", "0")


def may_look(device: torch.device) -> bool:
    """Whether checks may read what is on this device."""
    if torch.compiler.is_compiling():
        return False
    if device.type == "cuda":
        return looks_always()
    return device.type == "cpu"


def values(
    targets: Tensor,
    row_temperature: Tensor | None,
    shift: int,
    V: int,
    ignore_index: int,
    num_valid: int | None,
) -> None:
    """What C++ checks on the CPU. `targets`: (sequences, length); `row_temperature`: (rows)."""
    counted = targets != ignore_index
    counted[:, :shift] = False
    wrong = counted & ((targets < 0) | (targets >= V))
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"the target at position {at} is {targets[at].item()}, outside [0, V = {V}) and not "
            f"ignore_index = {ignore_index}"
        )
    if num_valid is not None and num_valid != (count := counted.sum().item()):
        raise ValueError(
            f"num_valid is {num_valid}, but {count} of the {counted[:, shift:].numel()} targets "
            f"that are predicted are not ignore_index = {ignore_index}"
        )
    if row_temperature is not None:
        _row_temperatures(row_temperature.view(counted[:, shift:].shape), shift)


def _row_temperatures(t: Tensor, shift: int) -> None:
    """(sequences, length - shift)"""
    least, most = usable_range(t.dtype)
    wrong = ~((t >= least) & (t <= most))
    if wrong.any():
        sequence, row = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"the temperature at position {(sequence, row + shift)} is {t[sequence, row].item()}, "
            f"but every temperature must be a finite number > 0, between {least:g} and {most:g}"
        )

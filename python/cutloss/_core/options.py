"""The options of a loss: as a caller says them (LossOptions), and as the operators take them
(Options)."""

import contextlib
import dataclasses
import functools
from typing import Any

import torch

from . import checks

SCHEDULES = {"auto": 0, "none": 1, "rows": 2, "vocabulary": 3}


@dataclasses.dataclass(frozen=True)
class Options:
    """By the names, and with the defaults, of the operators' keyword arguments, which are those of
    the table in bindings/spec/options.inc."""

    compute_dtype: torch.dtype
    shift: int = 0
    ignore_index: int = -100
    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0
    wants_entropy: bool = False
    wants_zbar: bool = False
    wants_argmax: bool = False
    needs_de: bool = False
    needs_dc: bool = False
    needs_dbias: bool = False
    schedule: int = SCHEDULES["auto"]
    max_workspace: int | None = None
    kept_bytes: int = 0
    num_valid: int | None = None
    allow_tf32: bool = False
    first_class: int = 0  # of a shard: where its classes begin
    total_classes: int = 0  # of a shard: how many the vocabulary has; 0: the vocabulary is whole
    de_in_sums: bool = False  # dE in the dtype of its sums
    dc_adds: bool = False  # dC is added to a tensor in the dtype of its sums (integrations)

    def but(self, **changes: Any) -> "Options":
        """The same with other values: dataclasses.replace, in a fifth of its time, which counts in
        a small loss."""
        if torch.compiler.is_compiling():  # PyTorch 2.11 cannot trace the rest
            return dataclasses.replace(self, **changes)
        if not changes.keys() <= _NAMES:  # unknown names: TypeError
            return dataclasses.replace(self, **changes)
        made = object.__new__(Options)
        values = vars(self) | changes
        values.pop("_linear", None)
        object.__setattr__(made, "__dict__", values)
        return made

    @property
    def stats(self) -> torch.dtype:
        """The dtype of per-row numbers."""
        return stat_dtype(self.compute_dtype)

    def vocabulary(self, c: torch.Tensor) -> int:
        """V, of which `c` may be a shard."""
        return self.total_classes or c.shape[0]

    @property
    def needs(self) -> tuple[bool, bool, bool]:
        """Of which of e, c and bias there is to be a gradient."""
        return self.needs_de, self.needs_dc, self.needs_dbias

    def values(self) -> tuple:
        """Of all fields, in their order: Options(*options.values()) is the same again."""
        return tuple([getattr(self, name) for name in _OF_LINEAR])

    def of_linear(self) -> dict[str, Any]:
        """What the operators that multiply E and C take: what is not the operators' default, which
        PyTorch fills in sooner than it reads it."""
        if torch.compiler.is_compiling():
            return self._said(_OF_LINEAR)
        said = vars(self).get("_linear")
        if said is None:
            said = vars(self)["_linear"] = self._said(_OF_LINEAR)
        return said

    def of_logits(self) -> dict[str, Any]:
        """What the operators over logits that exist take."""
        return self._said(_OF_LOGITS)

    def _said(self, names: tuple[str, ...]) -> dict[str, Any]:
        return {
            name: getattr(self, name) for name in names if getattr(self, name) != _DEFAULTS[name]
        }


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Options)}
_OF_LINEAR = tuple(_DEFAULTS)
_NAMES = _DEFAULTS.keys()
_OF_LOGITS = (
    "shift", "ignore_index", "softcap", "logit_scale", "temperature", "wants_entropy",
    "wants_zbar", "wants_argmax",
)  # fmt: skip


def stat_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if compute_dtype == torch.float64 else torch.float32


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """What a caller says of a loss beside its tensors, by the names and with the defaults of
    linear_cross_entropy. One object for the function, the module, what holds a module, and the
    losses that are made of rows: `checked` makes it, and what is wrong is found there."""

    ignore_index: int = -100
    softcap: float | None = None
    reduction: str = "mean"
    shift: int = 0
    return_lse: bool = False
    filter_eps: float | str | None = "auto"
    logit_scale: float = 1.0
    temperature: float = 1.0  # 1.0 where each row has its own
    label_smoothing: float = 0.0
    return_entropy: bool = False
    return_predictions: bool = False
    z_loss: float = 0.0
    max_workspace: int | None = None
    schedule: str = "auto"
    plain: bool = False  # impl="torch"

    @classmethod
    def checked(cls, **said: Any) -> "LossOptions":
        """Raises ValueError or TypeError. `temperature` may be a tensor, whose check takes the
        targets."""
        if isinstance(said.get("temperature"), torch.Tensor):
            said["temperature"] = 1.0
        if torch.compiler.is_compiling():
            return _checked(tuple(said), *said.values())
        with contextlib.suppress(TypeError):  # of a value that has no hash, or of one that is wrong
            return _checked_before(tuple(said), *said.values())
        return _checked(tuple(said), *said.values())

    def operators(
        self, compute_dtype: torch.dtype, shift: int, allow_tf32: bool = False
    ) -> Options:
        """As the operators take them, of a whole vocabulary. `shift`: what of it tells, where the
        sequences are short."""
        said = {name: getattr(self, name) for name in _SAID_ALIKE}
        return Options(
            compute_dtype,
            **said,
            shift=shift,
            schedule=SCHEDULES[self.schedule],
            allow_tf32=allow_tf32,
            wants_entropy=self.return_entropy,
            # Of a symbol `> 0` alone would be another: a branch makes it a number, with a guard.
            wants_zbar=True if self.label_smoothing > 0 else False,
            wants_argmax=self.return_predictions,
        )


_NAMES_OF_LOSS = tuple([field.name for field in dataclasses.fields(LossOptions)])
# What callers and operators call by one name, and give one value.
_SAID_ALIKE = tuple([n for n in _NAMES_OF_LOSS if n in _NAMES and n not in ("shift", "schedule")])


def _checked(names: tuple[str, ...], *values: Any) -> LossOptions:
    o = LossOptions(**dict(zip(names, values, strict=True)))
    checks.choice("reduction", o.reduction, checks.REDUCTIONS)
    checks.filter_eps(o.filter_eps)
    checks.choice("schedule", o.schedule, ("auto", "rows", "vocabulary"))
    checks.flags(
        return_lse=o.return_lse,
        return_entropy=o.return_entropy,
        return_predictions=o.return_predictions,
    )
    checks.ignore_index(o.ignore_index)
    checks.max_workspace(o.max_workspace)
    checks.temperature(o.temperature)
    checks.plain_options(o.plain, o.schedule, o.max_workspace)
    return dataclasses.replace(
        o,
        shift=checks.shift(o.shift),
        softcap=checks.softcap(o.softcap),
        logit_scale=checks.logit_scale(o.logit_scale),
        temperature=float(o.temperature),
        label_smoothing=checks.label_smoothing(o.label_smoothing),
        z_loss=checks.z_loss(o.z_loss),
        return_lse=bool(o.return_lse),
        return_entropy=bool(o.return_entropy),
        return_predictions=bool(o.return_predictions),
    )


# Training says the same in each step, and to check it takes as long as a small loss. By type too:
# True is no softcap, though it equals 1.0.
_checked_before = functools.lru_cache(maxsize=256, typed=True)(_checked)

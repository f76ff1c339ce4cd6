"""``get_loss``: losses by name, for trainers that are configured by strings."""

import dataclasses
import inspect

import torch
from torch import nn

from .module import LinearCrossEntropy

# liger-kernel's names of options, and ours; None is not needed.
_LIGER = {
    "ce_weight": "weight",
    "ignore_index": "ignore_index",
    "lse_square_scale": "z_loss",
    "label_smoothing": "label_smoothing",
    "reduction": "reduction",
    "softcap": "softcap",
    "accum_dtype": None,
}


@dataclasses.dataclass(frozen=True)
class _Entry:
    description: str
    fixed: dict = dataclasses.field(default_factory=dict)
    renamed: dict | None = None  # their option -> ours; None: options are ours

    def options(self) -> list[str]:
        if self.renamed is not None:
            return sorted(self.renamed)
        known = inspect.signature(LinearCrossEntropy).parameters
        return sorted(name for name in known if name not in self.fixed)


_EXACT = _Entry("exact gradients, without the logits", {"impl": "exact"})
_CCE = _Entry("the same, by cut_cross_entropy's name and with its options, impl among them")
_TORCH = _Entry("plain PyTorch, which stores the logits", {"impl": "torch"})
_AS_LIGER = _Entry("the same, with the options' names of liger-kernel", renamed=_LIGER)

_LOSSES = {
    "exact": _EXACT,
    "linear_cross_entropy": _EXACT,
    "cutloss": _EXACT,
    "cce": _CCE,
    "cut_cross_entropy": _CCE,
    "torch": _TORCH,
    "liger": _AS_LIGER,
    "liger_fused_linear_cross_entropy": _AS_LIGER,
}


def losses_available() -> dict[str, str]:
    """The names that :func:`get_loss` takes, each with what it is."""
    return {name: entry.description for name, entry in _LOSSES.items()}


def get_loss(name: str, **options) -> nn.Module:
    """A loss by its name, to be called as ``loss(e, c, targets, bias=None)``, whichever it is::

        loss = cutloss.get_loss("cut_cross_entropy", softcap=30.0, shift=1)
        loss = cutloss.get_loss(**config["loss"])    # {"name": "exact", "z_loss": 1e-4}

    :param name: One of :func:`losses_available`. Case does not matter, "-" is "_".
    :param options: Those of :class:`LinearCrossEntropy`; under a name of liger-kernel's its own
        (ce_weight, lse_square_scale, ...). The mean over no token is NaN under each name, that of
        :mod:`cutloss.compat.liger` 0.
    :return: A :class:`LinearCrossEntropy`.
    """
    if not isinstance(name, str):
        raise TypeError(f"the name of a loss must be a str, got {type(name).__name__}")
    entry = _LOSSES.get(name.lower().replace("-", "_"))
    if entry is None:
        if name.lower() == "sampled":
            raise NotImplementedError(
                "the loss 'sampled', with a gradient of samples, is not built yet: use 'exact'"
            )
        raise ValueError(f"there is no loss {name!r}; there are {', '.join(_LOSSES)}")
    known = entry.options()
    unknown = [option for option in options if option not in known]
    if unknown:
        raise TypeError(
            f"the loss {name!r} has no option {', '.join(map(repr, unknown))}; it has "
            f"{', '.join(known)}" + _advice(unknown, entry)
        )
    if entry.renamed is not None:
        _accumulator(options.get("accum_dtype"))
        ours = ((entry.renamed[option], value) for option, value in options.items())
        options = {option: value for option, value in ours if option is not None}
    return LinearCrossEntropy(**options, **entry.fixed)


def _accumulator(given: object) -> None:
    """A dtype or, as configurations have it, its name, with "torch." or without."""
    named = given.removeprefix("torch.") if isinstance(given, str) else None
    dtype = given if named is None else getattr(torch, named, None)
    if given is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(
            f"accum_dtype must be a floating-point torch.dtype, the name of one or None, got "
            f"{given!r}: it is not needed, leave it out"
        )
    if dtype == torch.float64:
        raise NotImplementedError(
            f"accum_dtype is {given}: cutloss accumulates in float32, and in float64 where its "
            f"inputs are float64; leave accum_dtype out"
        )


def _advice(unknown: list[str], entry: _Entry) -> str:
    fixed = [option for option in unknown if option in entry.fixed]
    if fixed:
        return f"; {fixed[0]} is what its name says: choose another name instead"
    if entry.renamed is not None:
        return (
            "; cutloss.compat.liger.LigerFusedLinearCrossEntropyLoss has all of liger-kernel's, "
            "and its order of arguments, and the loss 'exact' all of cutloss's"
        )
    return ""

"""The names that ``impl`` takes. It stays in this place: modules that cutloss 0.1 pickled whole
name the enum by its path."""

import enum


class LinearCrossEntropyImpl(enum.IntEnum):
    """The implementations that ``cut_cross_entropy`` names, and ours."""

    CCE = enum.auto()
    TORCH_COMPILE = enum.auto()
    CCE_KAHAN_FULL_C = enum.auto()
    CCE_KAHAN_FULL_E = enum.auto()
    CCE_EXACT = enum.auto()
    CCE_KAHAN_FULL_C_FULL_E = enum.auto()
    CCE_KAHAN_FULL = enum.auto()
    CCE_KAHAN = enum.auto()
    AUTO = enum.auto()
    EXACT = enum.auto()
    TORCH = enum.auto()


# Every name and whether it means the plain path in PyTorch, which stores the logits. All other
# names mean the same: exact gradients, accumulated in fp32 (fp64 for fp64), with no filter. That
# is at least what each of them promises.
IS_PLAIN: dict[str, bool] = {
    "auto": False,
    "exact": False,
    "cce": False,
    "cce_exact": False,
    "cce_kahan": False,
    "cce_kahan_full": False,
    "cce_kahan_full_c": False,
    "cce_kahan_full_e": False,
    "cce_kahan_full_c_full_e": False,
    "torch_compile": False,
    "torch": True,
}


def is_plain(impl: str | enum.Enum) -> bool:
    """Whether ``impl`` (a name, or a member of an enum of such names) is the plain path."""
    name = impl.name.lower() if isinstance(impl, enum.Enum) else impl
    if not isinstance(name, str):
        raise TypeError(f"impl must be a name or a LinearCrossEntropyImpl, got {impl!r}")
    if name == "sampled":
        raise NotImplementedError(
            "impl='sampled', a gradient of samples, is not built yet: use impl='exact' (or 'auto', "
            "which is the same), and max_workspace for three matrix products instead of four"
        )
    if name not in IS_PLAIN:
        raise NotImplementedError(
            f"impl {name!r} is not known; use one of {', '.join(sorted(IS_PLAIN))}"
        )
    return IS_PLAIN[name]

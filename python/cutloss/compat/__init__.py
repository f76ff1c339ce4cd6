"""Other packages' calls, argument for argument, with cutloss doing the work.

Nothing here for cut_cross_entropy: ``from cutloss import linear_cross_entropy`` takes its call.
torch's own function is :mod:`cutloss.torch_compat`.
"""

import importlib

_LAZY_MODULES = ("liger",)


def __getattr__(name: str):
    if name in _LAZY_MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

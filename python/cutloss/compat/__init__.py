"""Other packages' calls, argument for argument, with cutloss doing the work.

Calls of cut_cross_entropy need nothing but ``from cutloss import linear_cross_entropy``; here are
all of its names, ``cce_patch`` among them. torch's own function is :mod:`cutloss.torch_compat`.
"""

import importlib

_LAZY_MODULES = ("cut_cross_entropy", "liger")


def __getattr__(name: str):
    if name in _LAZY_MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

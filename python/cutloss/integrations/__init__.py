"""Frameworks whose models the rest of cutloss does not know by itself."""

import importlib

_LAZY_MODULES = ("megatron",)


def __getattr__(name: str):
    if name in _LAZY_MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

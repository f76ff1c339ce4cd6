"""What a function does that can be compared: its code, and what steers the code that is cheap to
look at. Two functions of one key do the same with the same tensors, as far as this tells."""

import enum
import functools
import itertools
import types
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

_MOST = 500  # values that are looked at, for one function
_SWITCHES = (bool, int, float, complex, str, bytes, type(None), enum.Enum)
_NAMES = (type, torch.dtype, torch.device)


class FunctionKey(NamedTuple):
    code: types.CodeType | None  # None: not to be known, as of builtins
    value: Hashable
    is_complete: bool  # False: there is more that steers the function


def key_of(fn: Callable) -> FunctionKey:
    """Of a function: closure, defaults, attributes, and the globals that the code names, other
    functions among them. Of functools.partial the arguments, of a bound method or an object that
    can be called the attributes. Tensors count by their kind, for their values are data."""
    reader = _Reader()
    value = reader.value(fn)
    if not isinstance(fn, (types.FunctionType, types.MethodType, functools.partial)):
        value = value, *(reader.value(getattr(type(fn), n, None)) for n in ("__call__", "forward"))
    try:
        hash(value)
    except TypeError:  # of somebody's own number, or class
        value, reader.is_complete = None, False
    code = _code(fn)
    return FunctionKey(code, value, reader.is_complete and code is not None)


class _Reader:
    def __init__(self):
        self.is_complete = True
        self.left = _MOST
        # By their id their number, and they themselves, so that the id stays theirs.
        self.seen: dict[int, tuple[int, Any]] = {}

    def value(self, x: Any) -> Hashable:
        self.left -= 1
        if self.left < 0:
            self.is_complete = False
            return None
        kind = type(x)
        if isinstance(x, (*_SWITCHES, *_NAMES)):
            return kind, x
        if isinstance(x, Tensor):
            return kind, x.dtype, x.dim()
        if id(x) in self.seen:
            return "seen", self.seen[id(x)][0]
        self.seen[id(x)] = len(self.seen), x
        return kind, *self._parts(x)

    def _parts(self, x: Any) -> Iterator[Hashable]:
        if isinstance(x, (tuple, list, set, frozenset)):
            yield from map(self.value, itertools.islice(x, _MOST + 1))
        elif isinstance(x, dict):
            entries = itertools.islice(x.items(), _MOST + 1)
            yield from (self.value(part) for entry in entries for part in entry)
        elif isinstance(x, functools.partial):
            yield from (self.value(part) for part in (x.func, x.args, x.keywords))
        elif isinstance(x, types.BuiltinFunctionType):  # a tensor's methods among them
            yield x.__name__
            own = x.__self__
            yield own.__name__ if isinstance(own, types.ModuleType) else self.value(own)
        elif isinstance(x, types.MethodType):
            yield from (self.value(part) for part in (x.__func__, x.__self__))
        elif _is_torchs_own(x):
            yield x
        elif isinstance(x, types.FunctionType):
            yield from self._parts_of_function(x)
        elif hasattr(x, "__dict__"):
            yield self.value(vars(x))
        else:
            self.is_complete = False

    def _parts_of_function(self, fn: types.FunctionType) -> Iterator[Hashable]:
        yield fn.__code__
        for part in (fn.__defaults__, fn.__kwdefaults__, fn.__dict__):
            yield self.value(part)
        for cell in fn.__closure__ or ():
            try:
                yield self.value(cell.cell_contents)
            except ValueError:  # not yet filled
                yield None
        names = sorted(set(_names(fn.__code__)))
        for name in names:
            there = fn.__globals__.get(name)
            if not isinstance(there, types.ModuleType):
                yield self.value(there)
                continue
            yield there.__name__
            within = ((n, vars(there).get(n)) for n in names)
            steers = (*_SWITCHES, types.FunctionType)
            yield tuple((n, self.value(v)) for n, v in within if isinstance(v, steers))


def _names(code: types.CodeType) -> Iterator[str]:
    """Of globals and attributes, in functions that the code makes too."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _names(inner)


def _is_torchs_own(x: Any) -> bool:
    """A function that torch defines, or an operator: what they do nobody changes."""
    if isinstance(x, types.FunctionType):
        return x.__closure__ is None and str(x.__module__).split(".")[0] == "torch"
    return type(x).__module__ == "torch._ops"


def _code(fn: Callable) -> types.CodeType | None:
    """What functions of one definition share."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    if not hasattr(fn, "__code__"):
        fn = getattr(fn, "__call__", fn)
    return getattr(fn, "__code__", None)

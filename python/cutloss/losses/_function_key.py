"""What a function does that can be compared: its code, and what steers the code that is cheap to
look at. Two functions of one key do the same with the same tensors, as far as tensors are data."""

import dis
import enum
import functools
import types
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

_MOST = 500  # values that are looked at, for one function
_SWITCHES = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_SWITCHES += (type(None), type(...), type(NotImplemented))
_ENTRIES = (tuple, list, set, frozenset, dict)
# Modules whose functions and classes nobody steers: they count by themselves, not by their parts.
_FIXED = frozenset(
    "abc builtins cmath collections contextlib dataclasses enum functools itertools math operator "
    "torch types typing".split()
)
# Classes of those, beside torch's in Python, whose objects show all that they hold.
_OPEN = {object, type, *_ENTRIES, OrderedDict, types.SimpleNamespace}
_OPEN |= {torch.Size, *Tensor.__mro__}
# What Python itself writes into a class, about the class.
_ABOUT = frozenset(
    "__module__ __doc__ __dict__ __weakref__ __annotations__ __annotations_cache__ "
    "__annotate_func__ __static_attributes__ __firstlineno__ __dataclass_fields__ "
    "__dataclass_params__ __abstractmethods__ _abc_impl".split()
)
# Names in code that reach what the code does not name.
_REACHING = frozenset(
    "getattr hasattr vars dir globals locals eval exec attrgetter methodcaller __dict__ "
    "__globals__ __builtins__ __getattribute__ __import__".split()
)


class FunctionKey(NamedTuple):
    code: types.CodeType | None  # None: not to be known, as of builtins
    value: Hashable
    is_complete: bool  # False: there is, or may be, more that steers the function


class _NotFollowed(Exception):
    """Something may steer the function that is not compared."""


def key_of(fn: Callable) -> FunctionKey:
    """Of a function: closure, defaults, attributes, and the globals that the code names; functions,
    classes and objects among them likewise, and of modules what any of that code names. What is
    not followed makes the key incomplete. Tensors count by their kind: their values are data."""
    code, reader = _code(fn), _Reader()
    try:
        value = reader.value(fn), *reader.of_modules()
        hash(value)
    except (_NotFollowed, TypeError, RuntimeError):
        # A class may refuse hash(); what is nested deeply, or changed by another thread meanwhile.
        return FunctionKey(code, None, False)
    return FunctionKey(code, value, code is not None)


class _Reader:
    def __init__(self):
        self.left = _MOST
        # By their id their number, and they themselves, so that the id stays theirs.
        self.seen: dict[int, tuple[int, Any]] = {}
        self.modules: list[types.ModuleType] = []
        self.names: set[str] = set()  # in code that was read

    def value(self, x: Any) -> Hashable:
        self.left -= 1
        if self.left < 0:
            raise _NotFollowed
        kind = type(x)
        if kind in _SWITCHES:
            return kind, x
        if id(x) in self.seen:
            return "seen", self.seen[id(x)][0]
        self.seen[id(x)] = len(self.seen), x
        return kind, *self._parts(x, kind)

    def values(self, *parts: Any) -> Iterator[Hashable]:
        return map(self.value, parts)

    def of_modules(self) -> Iterator[Hashable]:
        """A module may be handed to code elsewhere: any name in any code that was read counts."""
        done = set()
        while todo := {(m, n) for m in self.modules for n in self.names & vars(m).keys()} - done:
            done |= todo
            for m, n in sorted(todo, key=lambda pair: (pair[0].__name__, pair[1])):
                yield m.__name__, n, self.value(vars(m)[n])

    def _parts(self, x: Any, kind: type) -> Iterator[Hashable]:
        if kind is functools.partial:
            yield from self.values(x.func, x.args, x.keywords, vars(x))
        elif kind is types.BuiltinFunctionType:  # a tensor's methods among them
            yield x.__name__
            is_of_module = isinstance(x.__self__, types.ModuleType)
            if x.__name__ in _REACHING or is_of_module and not _is_fixed(x.__self__.__name__):
                raise _NotFollowed
            yield self.value(x.__self__)
        elif kind is types.MethodType:
            yield from self.values(x.__func__, x.__self__)
        elif kind in (staticmethod, classmethod):
            yield self.value(x.__func__)
        elif kind is property:
            yield from self.values(x.fget, x.fset)
        elif kind is types.FunctionType:
            yield from self._parts_of_function(x)
        elif kind is types.ModuleType:
            yield x.__name__
            if not _is_fixed(x.__name__):
                if "__getattr__" in vars(x):
                    raise _NotFollowed
                self.modules.append(x)
        elif issubclass(kind, type):
            yield from self._parts_of_class(x, kind)
        elif kind.__module__ == "torch._ops":
            yield x
        else:
            yield from self._parts_of_object(x, kind)

    def _parts_of_function(self, fn: types.FunctionType) -> Iterator[Hashable]:
        yield fn.__code__
        yield from self.values(fn.__defaults__, fn.__kwdefaults__, fn.__dict__)
        for cell in fn.__closure__ or ():
            try:
                there = cell.cell_contents
            except ValueError:  # not yet filled
                yield None
            else:
                yield self.value(there)
        if _is_fixed(fn.__globals__.get("__name__")):
            return
        names = _names(fn.__code__)
        if names is None:
            raise _NotFollowed
        self.names.update(names)
        for name in names:
            for scope in (fn.__globals__, fn.__builtins__):
                if name in scope:
                    yield name, self.value(scope[name])
                    break

    def _parts_of_class(self, cls: type, kind: type) -> Iterator[Hashable]:
        yield cls
        if not _is_fixed(cls.__module__):
            for name, x in vars(cls).items():
                if name not in _ABOUT:
                    yield name, self.value(x)
            yield from self.values(kind, *cls.__bases__)

    def _parts_of_object(self, x: Any, kind: type) -> Iterator[Hashable]:
        shows_all = issubclass(kind, enum.Enum) or all(map(_is_open, kind.__mro__))
        if not (shows_all and (hasattr(x, "__dict__") or issubclass(kind, _ENTRIES))):
            raise _NotFollowed
        if issubclass(kind, Tensor):
            yield from (x.dtype, x.dim())
        if issubclass(kind, dict):
            yield from (self.value(part) for entry in dict.items(x) for part in entry)
        for base in _ENTRIES[:-1]:
            if issubclass(kind, base):
                yield from map(self.value, base.__iter__(x))
        if kind not in _ENTRIES:
            yield from self.values(kind, getattr(x, "__dict__", None))


@functools.lru_cache(maxsize=1024)
def _names(code: types.CodeType) -> tuple[str, ...] | None:
    """Of globals and attributes, in functions that the code makes too. None: they do not tell what
    the code reads."""
    names = set(code.co_names)
    if names & _REACHING or dis.opmap["IMPORT_NAME"] in code.co_code[::2]:
        return None
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            more = _names(inner)
            if more is None:
                return None
            names.update(more)
    return tuple(sorted(names))


def _is_fixed(module: str | None) -> bool:
    return str(module).partition(".")[0] in _FIXED


def _is_open(cls: type) -> bool:
    """Whether what its objects hold is to be seen. A class made in C that is not fixed is found out
    by its members, which are not followed."""
    is_torchs = cls.__module__.startswith("torch.") and not cls.__module__.startswith("torch._C")
    return cls in _OPEN or is_torchs or not _is_fixed(cls.__module__)


def _code(fn: Callable) -> types.CodeType | None:
    """What functions of one definition share."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    if not hasattr(fn, "__code__"):
        fn = getattr(fn, "__call__", fn)
    return getattr(fn, "__code__", None)

"""Errors of the C++ library, in Python's terms.

The operators can only raise RuntimeError, so an error's kind is written in front of its message,
``cutloss[kind]: ...``. Code under torch.compile sees that RuntimeError as it is.
"""

import re

import torch

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

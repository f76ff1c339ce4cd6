"""Loads the operators: one shared library for every supported version of PyTorch and Python."""

from pathlib import Path

import torch

_OLDEST_TORCH = (2, 10)
_LIBRARY = Path(__file__).parent / "lib" / "libcutloss_torch.so"


def load() -> None:
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < _OLDEST_TORCH:
        raise ImportError(
            f"cutloss needs PyTorch {'.'.join(map(str, _OLDEST_TORCH))} or later, this is "
            f"{torch.__version__}; upgrade torch"
        )
    if not _LIBRARY.exists():
        raise ImportError(
            f"cutloss was not built: {_LIBRARY} does not exist; run `make build` in a checkout, "
            f"or install the package with pip"
        )
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        raise ImportError(
            f"cutloss could not load {_LIBRARY}: {error.__cause__ or error}; "
            f"`ldd {_LIBRARY}` names the library that is missing"
        ) from error

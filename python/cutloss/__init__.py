"""cutloss: the loss of a large-vocabulary model, and its gradients, without the logits."""

from . import _ops
from ._implementations import LinearCrossEntropyImpl
from .functional import VocabParallelOptions, linear_cross_entropy
from .module import LinearCrossEntropy

__all__ = [
    "LinearCrossEntropy",
    "LinearCrossEntropyImpl",
    "VocabParallelOptions",
    "linear_cross_entropy",
]

__version__ = _ops.version()


def __getattr__(name: str):
    """``cutloss.losses`` is imported where it is first used."""
    if name == "losses":
        import importlib

        return importlib.import_module(".losses", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""cutloss: the loss of a large-vocabulary model, and its gradients, without the logits."""

import importlib

from ._core.plan import Plan, PlannedBuffer
from ._implementations import LinearCrossEntropyImpl
from ._torch import library
from .functional import linear_cross_entropy, plan
from .heads import CausalLMHead, CausalLMHeadOutput, LinearCrossEntropyLoss
from .module import LinearCrossEntropy
from .registry import get_loss, losses_available
from .sharded import VocabParallelOptions

__all__ = [
    "CausalLMHead",
    "CausalLMHeadOutput",
    "CausalLMLoss",
    "LinearCrossEntropy",
    "LinearCrossEntropyImpl",
    "LinearCrossEntropyLoss",
    "Plan",
    "PlannedBuffer",
    "VocabParallelOptions",
    "cross_entropy",
    "get_loss",
    "linear_cross_entropy",
    "losses_available",
    "patch",
    "plan",
    "unpatch",
]

__version__ = library.version()

# What most programs do not use is imported where it is: cutloss.torch_compat.linear_cross_entropy.
_LAZY_MODULES = ("compat", "integrations", "losses", "torch_compat", "transformers", "trl")
_LAZY_NAMES = {
    "CausalLMLoss": ".logits",
    "cross_entropy": ".logits",
    "patch": ".transformers",
    "unpatch": ".transformers",
}


def __getattr__(name: str):
    if name in _LAZY_MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in _LAZY_NAMES:
        return getattr(importlib.import_module(_LAZY_NAMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_LAZY_MODULES})

"""The names of cut_cross_entropy 25.6: what is in :mod:`cutloss` anyway, and ``cce_patch``::

    from cutloss.compat.cut_cross_entropy import LinearCrossEntropy, linear_cross_entropy
    from cutloss.compat.cut_cross_entropy.transformers import cce_patch

Arguments, their order and their defaults are theirs, and cutloss's own come after them.
"""

from ... import (
    LinearCrossEntropy,
    LinearCrossEntropyImpl,
    VocabParallelOptions,
    linear_cross_entropy,
)
from .transformers import cce_patch

__all__ = [
    "LinearCrossEntropy",
    "LinearCrossEntropyImpl",
    "VocabParallelOptions",
    "cce_patch",
    "linear_cross_entropy",
]

"""Causal language models of Transformers whose training loss needs no logits: ``patch(model)``.

Nothing here imports Transformers: a model is taken as it is.
"""

from ._patch import patch, unpatch
from ._unmade import LogitsNotMadeError

__all__ = ["LogitsNotMadeError", "patch", "unpatch"]

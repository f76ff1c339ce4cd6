"""Causal language models of Transformers whose training loss needs no logits: ``patch(model)``.

Nothing here imports Transformers: a model is taken as it is.
"""

from ._errors import LogitsNotMadeError
from ._patch import patch, unpatch

__all__ = ["LogitsNotMadeError", "patch", "unpatch"]

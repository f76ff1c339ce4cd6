"""Preference and policy losses, distillation, evaluation: without the logits; docs/losses.md.

Preference and policy losses are :func:`token_log_probs`, which never stores the logits, and a
formula over numbers of the size of the targets. Distillation takes whole distributions, a chunk of
rows at a time.
"""

from ._arguments import Loss
from ._divergences import DIVERGENCES
from ._dpo_table import DPO
from ._policy_table import POLICY
from .cpo import CPO, cpo_loss, orpo_loss, simpo_loss
from .distillation import linear_distillation, linear_distillation_top_k
from .dpo import dpo_loss
from .evaluation import Evaluation, evaluate, perplexity, token_accuracy, z_loss
from .kto import KTO, kto_kl, kto_loss
from .linear import LOSSES, linear_loss
from .log_probs import TokenLogProbs, token_log_probs
from .policy import policy_loss
from .token import linear_token_loss

__all__ = [
    "CPO",
    "DIVERGENCES",
    "DPO",
    "Evaluation",
    "KTO",
    "LOSSES",
    "POLICY",
    "Loss",
    "TokenLogProbs",
    "cpo_loss",
    "dpo_loss",
    "evaluate",
    "kto_kl",
    "kto_loss",
    "linear_distillation",
    "linear_distillation_top_k",
    "linear_loss",
    "linear_token_loss",
    "orpo_loss",
    "perplexity",
    "policy_loss",
    "simpo_loss",
    "token_accuracy",
    "token_log_probs",
    "z_loss",
]

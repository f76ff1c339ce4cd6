"""Preference and policy losses over per-token log-probabilities, without the logits.

Everything here is :func:`token_log_probs`, which never stores the logits, and a formula over
numbers of the size of the targets; docs/losses.md lists them.
"""

from ._arguments import Loss
from ._dpo_table import DPO
from ._policy_table import POLICY
from .cpo import CPO, cpo_loss, orpo_loss, simpo_loss
from .distillation import linear_distillation, linear_distillation_top_k
from .dpo import dpo_loss
from .kto import KTO, kto_kl, kto_loss
from .linear import LOSSES, linear_loss
from .log_probs import TokenLogProbs, token_log_probs
from .policy import policy_loss

__all__ = [
    "CPO",
    "DPO",
    "KTO",
    "LOSSES",
    "POLICY",
    "Loss",
    "TokenLogProbs",
    "cpo_loss",
    "dpo_loss",
    "kto_kl",
    "kto_loss",
    "linear_distillation",
    "linear_distillation_top_k",
    "linear_loss",
    "orpo_loss",
    "policy_loss",
    "simpo_loss",
    "token_log_probs",
]

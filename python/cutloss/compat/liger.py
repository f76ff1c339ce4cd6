"""Losses of liger-kernel 0.8: their names, order of arguments, defaults and return values::

    from cutloss.compat.liger import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(softcap=30.0)(lm_head.weight, hidden, labels)

Of cross-entropy, DPO, CPO, SimPO and ORPO the module takes (weight, input, target), of KTO and GRPO
(input, weight, target), as the function liger_fused_linear_cross_entropy does, all as theirs.
Other than with theirs:

- targets outside the vocabulary are errors (on CUDA NaN), and V may be anything;
- sums of gradients are fp32 whatever accum_dtype says; fp64 is refused;
- outputs beside the loss carry no gradient, as theirs, and return_z_loss and use_token_scaling
  cost what a per-token result costs (see return_lse of :func:`cutloss.linear_cross_entropy`);
- preference losses are finite where a sequence has no token that counts, where theirs are NaN;
- an option that would change nothing raises; compiled, chunk_size and the like are accepted, as
  nothing needs them.

As theirs, and not as cutloss and PyTorch: the mean over no token at all is 0.
"""

import dis
import inspect

from ._liger_cross_entropy import (
    LigerForCausalLMLoss,
    LigerFusedLinearCrossEntropyLoss,
    liger_fused_linear_cross_entropy,
)
from ._liger_grpo import LigerFusedLinearGRPOLoss
from ._liger_jsd import LigerFusedLinearJSD, LigerFusedLinearJSDLoss
from ._liger_kto import LigerFusedLinearKTOLoss
from ._liger_logits import LigerCrossEntropyLoss, liger_cross_entropy
from ._liger_outputs import CrossEntropyOutput
from ._liger_pairs import (
    LigerFusedLinearCPOLoss,
    LigerFusedLinearDPOLoss,
    LigerFusedLinearORPOLoss,
    LigerFusedLinearSimPOLoss,
)

__all__ = [
    "CrossEntropyOutput",
    "LigerCrossEntropyLoss",
    "LigerForCausalLMLoss",
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearCrossEntropyLoss",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearGRPOLoss",
    "LigerFusedLinearJSD",
    "LigerFusedLinearJSDLoss",
    "LigerFusedLinearKTOLoss",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearSimPOLoss",
    "liger_cross_entropy",
    "liger_fused_linear_cross_entropy",
]


def __getattr__(name: str):
    # Of an AttributeError `from ... import` makes an ImportError that says nothing of its words.
    caller = inspect.currentframe().f_back
    is_import = caller.f_code.co_code[caller.f_lasti] == dis.opmap["IMPORT_FROM"]
    raise (ImportError if is_import else AttributeError)(_refusal(name))


def _refusal(name: str) -> str:
    words = f"module {__name__!r} has no attribute {name!r}"
    if "apply_liger_kernel" in name:
        return (
            f"{words}: it has liger-kernel's losses, and changes no model. Make the model, then "
            f"call cutloss.patch(model), whose loss makes no logits from then on. For liger-kernel's "
            f"other kernels call its own {name} before that, with "
            f"fused_linear_cross_entropy=False. docs/coming-from.md of cutloss says more"
        )
    if name.startswith("AutoLigerKernel"):
        return (
            f"{words}: it has liger-kernel's losses, and makes no model. Write model = "
            f"transformers.{name.replace('LigerKernel', 'Model')}.from_pretrained(...), then "
            f"cutloss.patch(model). docs/coming-from.md of cutloss says more"
        )
    if name.lower().startswith("liger"):
        return f"{words}: of liger-kernel it has {', '.join(__all__)}"
    return words

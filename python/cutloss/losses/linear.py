"""From hidden states to a loss: token_log_probs and one of the losses in a call."""

import enum
import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from .._core import checks
from .._implementations import LinearCrossEntropyImpl, is_plain
from ..sharded import VocabParallelOptions
from . import _policy_rows, _policy_terms
from ._arguments import Loss
from ._dpo_table import DPO
from ._policy_table import POLICY
from .cpo import CPO, cpo_loss, orpo_loss, simpo_loss
from .dpo import dpo_loss
from .kto import KTO, kto_loss
from .log_probs import TokenLogProbs, token_log_probs
from .policy import policy_loss

LOSSES: dict[str, Callable[..., Loss]] = {
    "dpo": dpo_loss,
    "kto": kto_loss,
    "cpo": cpo_loss,
    "simpo": simpo_loss,
    "orpo": orpo_loss,
    "policy": policy_loss,
}
_WITH_REFERENCE = ("dpo", "kto", "policy")
_TYPES: dict[str, Collection[str]] = {"dpo": DPO, "kto": KTO, "cpo": CPO, "policy": POLICY}
# What is passed by name. Read here, once: torch.compile does not trace inspect.
_PARAMETERS = {
    name: {
        option: parameter.default
        for option, parameter in inspect.signature(loss).parameters.items()
        if option not in ("policy", "reference")
    }
    for name, loss in LOSSES.items()
}
_NEEDED = {
    name: [o for o, default in known.items() if default is inspect.Parameter.empty]
    for name, known in _PARAMETERS.items()
}


def linear_loss(
    name: str,
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    reference: tuple[Tensor, ...] | list[Tensor] | TokenLogProbs | Tensor | None = None,
    ignore_index: int = -100,
    shift: bool | int = 0,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    max_workspace: int | None = None,
    num_valid: int | None = None,
    impl: str | enum.Enum = LinearCrossEntropyImpl.CCE,
    schedule: str = "auto",
    vocab_parallel_options: VocabParallelOptions | None = None,
    **options: Any,
) -> Loss:
    """A loss of the table LOSSES from hidden states, without logits; differentiable in e, c, bias.

    :param name: "dpo", "kto", "cpo", "simpo", "orpo" or "policy".
    :param e: Hidden states, (B, L, D); for "dpo", "cpo", "simpo" and "orpo" (2 B, L, D), chosen
        sequences first.
    :param c: Classifier, (V, D).
    :param targets: (B, L), ignore_index at prompt and padding.
    :param reference: The reference model's (e, c) or (e, c, bias), of which log-probabilities are
        made with the same targets and the same options of the logits, without a gradient; or what
        the loss itself takes as reference. With vocab_parallel_options its c and bias are shards of
        the same classes.
    :param options: Those of the loss, such as loss_type, beta, advantages; those above, from
        ignore_index to vocab_parallel_options, are token_log_probs'. Entropy is made where an
        option needs it.
    :return: What the loss returns.

    "policy" costs three matrix products, two with a frozen c, where each token's term is a function
    of its own log-probability: ratios of tokens, and none of "vespo", off_policy_mask_threshold,
    top_entropy_quantile, or a "sequence_..." sampling_correction without old_log_probs. Those, and
    the other losses, need every token's before the first gradient: four, or memory for the logits;
    so does a classifier in shards. Of one every rank gets the same loss, and must be given the same
    reference, advantages and masks, of all tokens.
    """
    for other, types in _TYPES.items():
        if name in types and name not in LOSSES:
            raise ValueError(
                f"{name!r} is a loss_type, not the name of a loss: call "
                f"linear_loss({other!r}, ..., loss_type={name!r})"
            )
    checks.choice("the name of a loss", name, tuple(LOSSES))
    logits = dict(
        ignore_index=ignore_index,
        shift=shift,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        max_workspace=max_workspace,
        num_valid=num_valid,
        impl=impl,
        schedule=schedule,
    )
    if reference is not None and name not in _WITH_REFERENCE:
        raise ValueError(
            f"{name!r} has no reference model: leave reference out, or take one of "
            f"{', '.join(map(repr, _WITH_REFERENCE))}"
        )
    _check_options(name, reference is not None, options)
    if isinstance(reference, (tuple, list)):
        if len(reference) not in (2, 3):
            raise ValueError(
                f"reference must be (e, c) or (e, c, bias), got {len(reference)} entries"
            )
        with torch.no_grad():
            of_e, of_c, *of_bias = reference
            reference = token_log_probs(
                of_e, of_c, targets, *of_bias, **logits,
                vocab_parallel_options=vocab_parallel_options,
            )  # fmt: skip
    if name in _WITH_REFERENCE:
        options["reference"] = reference
    needs_entropy = _asks(options, entropy_coef=0.0, top_entropy_quantile=1.0)
    if name == "policy" and not is_plain(impl):
        complete = _PARAMETERS["policy"] | options
        if _policy_terms.keeps_tokens_apart(complete):
            del logits["impl"]
            return _policy_rows.loss(
                e, c, targets, bias, logits, complete, needs_entropy, vocab_parallel_options
            )
    policy = token_log_probs(
        e, c, targets, bias, **logits,
        vocab_parallel_options=vocab_parallel_options,
        return_entropy=needs_entropy,
        return_log_sum_sq_probs=_asks(options, use_weighting=False),
    )  # fmt: skip
    return LOSSES[name](policy, **options)


def _check_options(name: str, with_reference: bool, options: dict[str, Any]) -> None:
    """What needs no log-probabilities to be wrong, before they are made."""
    for option in options:
        if option not in _PARAMETERS[name]:
            raise TypeError(
                f"{name!r} has no option {option!r}: its options are "
                f"{', '.join(_PARAMETERS[name])}, and those of token_log_probs"
            )
    missing = [option for option in _NEEDED[name] if option not in options]
    if missing:
        given = ", ".join(options) or "none"
        raise TypeError(f"{name!r} needs {', '.join(missing)}, got {given}: pass {missing[0]}=")
    if "loss_type" in options:
        kinds = options["loss_type"]
        several = name == "dpo" and isinstance(kinds, (list, tuple))
        for kind in kinds if several else (kinds,):
            checks.choice("loss_type", kind, tuple(_TYPES[name]))
    if name == "policy" and with_reference and options.get("beta", 0.0) == 0:
        raise ValueError(
            "'policy' uses a reference in its KL term alone, and beta is 0: leave reference out, "
            "or pass beta"
        )


def _asks(options: dict[str, Any], **unused: Any) -> bool:
    """Whether one of these options has another value than that which needs nothing."""
    return any(options.get(name, value) != value for name, value in unused.items())

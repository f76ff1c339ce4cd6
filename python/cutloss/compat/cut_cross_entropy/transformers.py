"""``cut_cross_entropy.transformers.cce_patch``, by :func:`cutloss.patch`."""

import enum

from torch import nn

from ..._core import checks
from ..._implementations import LinearCrossEntropyImpl, is_plain
from ...transformers import patch

__all__ = ["cce_patch"]


def cce_patch(
    model_type_or_model: nn.Module,
    impl: str | enum.Enum = LinearCrossEntropyImpl.CCE,
    reduction: str = "mean",
    filter_eps: float | str | None = "auto",
    accum_e_fp32: bool = False,
    accum_c_fp32: bool = False,
    filter_e_grad: bool = True,
    filter_c_grad: bool = True,
    train_only: bool = False,
) -> nn.Module:
    """Let a model of Transformers compute its loss without logits, of any architecture that
    :func:`cutloss.patch` takes; outputs.logits is None in calls with labels.

    Theirs takes the type of a model too, and changes its class, so that models of the type that are
    made later are patched; here that raises, and says what to write instead.

    :param model_type_or_model: A model.
    :param impl: Each of theirs is exact here. "torch" makes the logits: for comparisons.
    :param reduction: "mean", or the sum over num_items_in_batch where the model is called with it.
        "sum" and "none" raise.
    :param filter_eps: Accepted and not needed: gradients are exact, nothing is filtered.
    :param accum_e_fp32: Accepted and not needed: always so.
    :param accum_c_fp32: Accepted and not needed: always so.
    :param filter_e_grad: Accepted and not needed, as filter_eps.
    :param filter_c_grad: Accepted and not needed, as filter_eps.
    :param train_only: True: calls with labels in evaluation make logits, as without the patch.
    :return: The model.
    :raises NotImplementedError: For the type of a model, or its configuration; for another
        reduction; where cutloss.patch does.
    """
    checks.choice("reduction", reduction, checks.REDUCTIONS)
    checks.filter_eps(filter_eps)
    checks.flags(
        accum_e_fp32=accum_e_fp32, accum_c_fp32=accum_c_fp32, filter_e_grad=filter_e_grad,
        filter_c_grad=filter_c_grad, train_only=train_only,
    )  # fmt: skip
    is_plain(impl)
    if not isinstance(model_type_or_model, nn.Module):
        raise _no_model(model_type_or_model)
    if reduction != "mean":
        instead = {
            "sum": "call the model with num_items_in_batch=1, which makes the loss the sum",
            "none": "call cutloss.linear_cross_entropy(hidden_states, model.lm_head.weight, "
            "labels, shift=1, reduction='none') with the model's hidden states",
        }[reduction]
        raise NotImplementedError(
            f"a patched model computes the loss that it computed before, of reduction 'mean', got "
            f"reduction {reduction!r}: {instead}"
        )
    return patch(model_type_or_model, impl=impl, return_logits=None if train_only else False)


def _no_model(given: object) -> Exception:
    model_type = given if isinstance(given, str) else getattr(given, "model_type", None)
    if not isinstance(model_type, str):
        return TypeError(f"cce_patch takes a model of Transformers, got {type(given).__name__}")
    return NotImplementedError(
        f"cutloss patches models, not all models of a type, got {model_type!r}: make the model "
        f"first, model = AutoModelForCausalLM.from_pretrained(...), and then cce_patch(model)"
    )

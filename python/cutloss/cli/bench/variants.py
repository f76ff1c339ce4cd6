"""The ways to train a model that cutloss bench --train compares.

Each makes, of a copy of the model, something that is called with input_ids and labels and returns an
output with a loss. The copies share their parameters, so that one optimizer serves all of them and a
step of each takes the memory of one model.
"""

import dataclasses
import functools
import inspect
import sys
import types
from collections.abc import Callable

import torch

import cutloss
from cutloss.cli.bench import rivals


@dataclasses.dataclass(frozen=True)
class Variant:
    prepare: Callable  # model -> what is called
    about: str
    missing: Callable = lambda device: None  # device -> why it cannot be run, or None
    package: str = "torch"


def _stock(model):
    return model


def _compiled(model):
    return torch.compile(model)


def _cutloss(model):
    return cutloss.patch(model)


def _cutloss_compiled(model):
    return torch.compile(cutloss.patch(model))


# liger-kernel -------------------------------------------------------------------------------------


def _liger(model, **choice):
    """liger-kernel's patch of this model; `choice`: all that is not named is as it comes.

    It also replaces functions of the module that defines the model's class, which all variants share:
    they are there only while this one runs forward."""
    import liger_kernel.transformers as liger

    name = f"apply_liger_kernel_to_{model.config.model_type}"
    module = sys.modules[type(model).__module__]
    before = dict(vars(module))
    try:
        getattr(liger, name)(**choice, model=model)
        changed = {k: v for k, v in vars(module).items() if before.get(k) is not v}
    finally:
        vars(module).update(before)
    if not changed:
        return model

    @functools.wraps(model.forward)
    def call(**inputs):
        vars(module).update(changed)
        try:
            return model(**inputs)
        finally:
            vars(module).update(before)

    return call


def _liger_loss(model):
    """Its loss alone; every other kernel that it could replace stays the model's own."""
    import liger_kernel.transformers as liger

    function = getattr(liger, f"apply_liger_kernel_to_{model.config.model_type}")
    kernels = set(inspect.signature(function).parameters) - {"model"}
    return _liger(model, **{name: name == "fused_linear_cross_entropy" for name in kernels})


def _liger_with_cutloss(model):
    """Patched by liger-kernel but for its loss, and then by cutloss."""
    call = _liger(model, fused_linear_cross_entropy=False)
    cutloss.patch(model)
    return call


# cut-cross-entropy --------------------------------------------------------------------------------


def _cce(model):
    """Its loss of the hidden states, which is what its cce_patch makes of a model."""
    from cut_cross_entropy import linear_cross_entropy

    body = getattr(model, model.base_model_prefix)
    softcap = getattr(model.config, "final_logit_softcapping", None)

    def call(input_ids, labels, **more):
        hidden = body(input_ids=input_ids, **more)[0]  # (sequences, length, D)
        weight = model.get_output_embeddings().weight
        loss = linear_cross_entropy(hidden, weight, labels, softcap=softcap, shift=True)
        return types.SimpleNamespace(loss=loss)

    return call


def _cce_patch(model):
    from cut_cross_entropy.transformers import cce_patch

    return cce_patch(model)


_of_liger = dict(
    missing=functools.partial(rivals.lacks, "liger-kernel", "liger_kernel"), package="liger-kernel"
)
_of_cce = dict(
    missing=functools.partial(rivals.lacks, "cut-cross-entropy", "cut_cross_entropy"),
    package="cut-cross-entropy",
)
REFERENCE = "stock"  # whose loss the others must have
VARIANTS = {
    REFERENCE: Variant(_stock, "the model as Transformers has it"),
    "compiled": Variant(_compiled, "torch.compile of the same"),
    "liger_loss": Variant(_liger_loss, "liger-kernel's fused linear cross-entropy alone", **_of_liger),
    "liger": Variant(_liger, "all kernels of liger-kernel's patch, its loss among them", **_of_liger),
    "cce": Variant(_cce, "cut-cross-entropy's loss of the model's hidden states", **_of_cce),
    "cce_patch": Variant(_cce_patch, "its own patch, for older Transformers", **_of_cce),
    "cutloss": Variant(_cutloss, "cutloss.patch of the model", package="cutloss"),
    "cutloss_compiled": Variant(_cutloss_compiled, "torch.compile of the same", package="cutloss"),
    "liger_cutloss": Variant(
        _liger_with_cutloss, "liger-kernel's other kernels, and cutloss's loss",
        missing=_of_liger["missing"], package="cutloss",
    ),
}  # fmt: skip

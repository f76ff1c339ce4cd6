"""TRL's trainers, whose per-token log-probabilities cutloss makes.

Since 1.16 TRL's trainers all take these (and entropies, accuracies) from one place: a forward that
``trl.trainer.utils.add_fused_lm_head`` puts on the model while a trainer is made. The trainers
here are TRL's own with another forward put there, of the same arguments and results. Everything
else, the losses among it, is TRL's; GKDTrainer, which takes its loss from logits, has one of
cutloss instead, of the same values.
"""

import contextlib
import functools
import importlib
import inspect
import sys

from ..transformers._patch import unwrapped
from . import _losses
from ._head import Use, add_fused_lm_head, loss_of, training_step, version

_TRAINERS = {
    "DPOTrainer": "trl",
    "GKDTrainer": "trl.experimental.gkd",
    "GRPOTrainer": "trl",
    "KTOTrainer": "trl",
    "RLOOTrainer": "trl",
    "SFTTrainer": "trl",
}
_ARGUMENTS = ["model", "temperature", "cast_lm_head_to_fp32", "outputs"]

__all__ = [*_TRAINERS, "with_cutloss"]


def __getattr__(name: str):
    if name not in _TRAINERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return with_cutloss(getattr(importlib.import_module(_TRAINERS[name]), name))


@functools.cache
def with_cutloss(trainer: type) -> type:
    """A trainer of TRL, or a class derived from one, that makes no logits in its loss::

        from cutloss.trl import SFTTrainer                       # instead of from trl
        trainer = cutloss.trl.with_cutloss(MyTrainer)(model=..., args=..., ...)

    Losses and metrics are TRL's; log-probabilities, entropies and accuracies of tokens come from
    the model's own forward (its scale, softcap, adapters) without its logits. So does the smoothed
    loss of ``label_smoothing_factor``, and GKD's divergence from a teacher, without the logits of
    either model. In evaluation ``compute_metrics`` and ``preprocess_logits_for_metrics`` get
    logits, from another forward, as without cutloss.

    :param trainer: trl.SFTTrainer, DPOTrainer, GRPOTrainer, KTOTrainer, RLOOTrainer,
        trl.experimental.gkd.GKDTrainer, or a subclass. A subclass with a ``compute_loss`` of its
        own takes its loss from ``super().compute_loss(...)``, or from
        ``model(**inputs, fused_lm_head=True).log_probs``.
    :raises NotImplementedError: where this version of TRL has no such place; when a trainer is
        made, for models that :func:`cutloss.patch` refuses, and for losses that are functions of
        logits (``compute_loss_func``); and in the first training step whose gradients do not come
        from cutloss. Each model is compared with itself on a tiny batch, as there.
    """
    _modules(trainer)
    bases = (_WithCutloss, *_losses.bases(trainer))
    return type(trainer.__name__, bases, {"__doc__": trainer.__doc__})


class _WithCutloss:
    def __init__(self, *args, **kwargs):
        models: dict = {}

        def add(model, temperature=1.0, cast_lm_head_to_fp32=False, outputs=("log_probs",)):
            models[model] = add_fused_lm_head(model, temperature, cast_lm_head_to_fp32, outputs)

        with _replaced(type(self), add):
            super().__init__(*args, **kwargs)
        model = unwrapped(self.accelerator.unwrap_model(self.model))
        if model not in models:
            raise NotImplementedError(
                f"this {type(self).__name__} was made without a call of add_fused_lm_head for its "
                f"model: {version()} computes its log-probabilities in a way that cutloss does "
                f"not know; use trl's own trainer"
            )
        self._cutloss_use: Use = models[model]
        self._cutloss_use.refusal = _loss_of_its_own(type(self))

    def training_step(self, *args, **kwargs):
        with training_step(self._cutloss_use):
            return super().training_step(*args, **kwargs)

    def compute_loss(self, model, *args, **kwargs):
        with loss_of(self._cutloss_use), self._cutloss_use.watch_calls(model):
            return super().compute_loss(model, *args, **kwargs)


def _loss_of_its_own(trainer: type) -> str:
    kinds = [k for k in trainer.__mro__ if "compute_loss" in vars(k)]
    owner = next(k for k in kinds if not k.__module__.startswith("cutloss."))
    name = owner.__name__
    return (
        f"the gradients of this training step do not come from cutloss: {name}.compute_loss (of "
        f"{owner.__module__}) takes its loss from elsewhere, most often from the logits of "
        f"model(...), which would be made in every step. Take the loss from "
        f"super().compute_loss(...), or make it of model(**inputs, fused_lm_head=True).log_probs, "
        f"where inputs have labels (logits for a second term may come after that, or under "
        f"torch.no_grad()). If it calls the model with labels and takes its loss, use {name} as it "
        f"is, without with_cutloss, on a model that cutloss.patch(model) prepared; for other "
        f"losses cutloss.losses has functions of hidden states and the classifier"
    )


def _modules(trainer: type) -> list:
    """Those that define the trainer and call add_fused_lm_head by its name there."""
    names = [k.__module__ for k in trainer.__mro__ if not k.__module__.startswith("cutloss.")]
    found = [sys.modules[name] for name in names if name in sys.modules]
    found = [m for m in dict.fromkeys(found) if hasattr(m, "add_fused_lm_head")]
    if not found:
        raise NotImplementedError(
            f"{trainer.__name__} does not take its log-probabilities from add_fused_lm_head, which "
            f"cutloss replaces ({version()} is installed, 1.16.0 is known to work): use it as it "
            f"is, with a model that cutloss.patch(model) prepared where it calls the model with "
            f"labels"
        )
    for module in found:
        given = list(inspect.signature(module.add_fused_lm_head).parameters)
        if given != _ARGUMENTS:
            raise NotImplementedError(
                f"add_fused_lm_head of {version()} takes {given}, and {_ARGUMENTS} in 1.16.0, "
                f"which is known to work: use trl's own trainer, or trl==1.16.0"
            )
    return found


@contextlib.contextmanager
def _replaced(trainer: type, add):
    modules = _modules(trainer)
    before = [m.add_fused_lm_head for m in modules]
    try:
        for module in modules:
            module.add_fused_lm_head = functools.wraps(module.add_fused_lm_head)(add)
        yield
    finally:
        for module, function in zip(modules, before):
            module.add_fused_lm_head = function

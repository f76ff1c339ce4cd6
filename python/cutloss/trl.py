"""TRL's trainers, whose per-token log-probabilities cutloss makes.

Since 1.16 TRL's trainers all take these (and entropies, accuracies) from one place: a forward that
``trl.trainer.utils.add_fused_lm_head`` puts on the model while a trainer is made. The trainers
here are TRL's own with another forward put there, of the same arguments and results. Everything
else, the losses among it, is TRL's.
"""

import contextlib
import functools
import inspect
import sys
from types import MethodType

import torch
from torch import Tensor, nn

from .functional import linear_cross_entropy
from .losses import token_log_probs
from .transformers import _operands, _switch, _verify
from .transformers._patch import unwrapped
from .transformers._switch import Switch
from .transformers._unmade import UnmadeLogits

_TRAINERS = ("DPOTrainer", "GRPOTrainer", "KTOTrainer", "RLOOTrainer", "SFTTrainer")
_ARGUMENTS = ["model", "temperature", "cast_lm_head_to_fp32", "outputs"]
_OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

__all__ = [*_TRAINERS, "with_cutloss"]


def __getattr__(name: str):
    if name not in _TRAINERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import trl

    return with_cutloss(getattr(trl, name))


@functools.cache
def with_cutloss(trainer: type) -> type:
    """A trainer of TRL, or a class derived from one, that makes no logits in its loss::

        from cutloss.trl import SFTTrainer                       # instead of from trl
        trainer = cutloss.trl.with_cutloss(MyTrainer)(model=..., args=..., ...)

    Losses and metrics are TRL's; log-probabilities, entropies and accuracies of tokens come from
    the model's own forward (its scale, softcap, adapters) without its logits. What needs logits
    in TRL itself (``compute_metrics``, ``compute_loss_func``, ``label_smoothing_factor``) gets
    them from another forward, as without cutloss.

    :param trainer: trl.SFTTrainer, DPOTrainer, GRPOTrainer, KTOTrainer, RLOOTrainer, or a subclass.
    :raises NotImplementedError: where this version of TRL has no such place, and, when a trainer is
        made, for models that :func:`cutloss.patch` refuses. Each model is compared with itself on a
        tiny batch, as there.
    """
    _modules(trainer)
    return type(trainer.__name__, (_WithCutloss, trainer), {"__doc__": trainer.__doc__})


class _WithCutloss:
    def __init__(self, *args, **kwargs):
        models: list[nn.Module] = []

        def add(model, temperature=1.0, cast_lm_head_to_fp32=False, outputs=("log_probs",)):
            add_fused_lm_head(model, temperature, cast_lm_head_to_fp32, outputs)
            models.append(model)

        with _replaced(type(self), add):
            super().__init__(*args, **kwargs)
        model = unwrapped(self.accelerator.unwrap_model(self.model))
        if not any(m is model for m in models):
            raise NotImplementedError(
                f"this {type(self).__name__} was made without a call of add_fused_lm_head for its "
                f"model: {_version()} computes its log-probabilities in a way that cutloss does "
                f"not know; use trl's own trainer"
            )


def _modules(trainer: type) -> list:
    """Those that define the trainer and call add_fused_lm_head by its name there."""
    names = [k.__module__ for k in trainer.__mro__ if k.__module__ != __name__]
    found = [sys.modules[name] for name in names if name in sys.modules]
    found = [m for m in dict.fromkeys(found) if hasattr(m, "add_fused_lm_head")]
    if not found:
        raise NotImplementedError(
            f"{trainer.__name__} does not take its log-probabilities from add_fused_lm_head, which "
            f"cutloss replaces ({_version()} is installed, 1.16.0 is known to work): use it as it "
            f"is, with a model that cutloss.patch(model) prepared where it calls the model with "
            f"labels"
        )
    for module in found:
        given = list(inspect.signature(module.add_fused_lm_head).parameters)
        if given != _ARGUMENTS:
            raise NotImplementedError(
                f"add_fused_lm_head of {_version()} takes {given}, and {_ARGUMENTS} in 1.16.0, "
                f"which is known to work: use trl's own trainer, or trl==1.16.0"
            )
    return found


def _version() -> str:
    import trl

    return f"trl {trl.__version__}"


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


def add_fused_lm_head(
    model: nn.Module,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
) -> None:
    """What trl.trainer.utils.add_fused_lm_head does: ``model(..., labels=labels,
    fused_lm_head=True)`` returns trl's FusedCausalLMOutput; without, the forward is unchanged.

    :param outputs: Per-token results; the others are None. log_probs are always there.
    """
    from trl.trainer.utils import FusedCausalLMOutput

    unknown = [name for name in outputs if name not in _OUTPUTS]
    if unknown:
        raise NotImplementedError(
            f"{_version()} asks for {unknown}, of which cutloss knows nothing: it makes {_OUTPUTS}"
        )
    target = unwrapped(model)
    switch = Switch({}, {})
    stock = target.forward
    _switch.prepare(target, switch)
    _verify.verify(target, switch, stock)
    text_config = target.config.get_text_config()

    @functools.wraps(type(target).forward)  # generate reads its signature
    def forward(
        self,
        *args,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs,
    ):
        if not fused_lm_head:
            given = dict(
                labels=labels, shift_labels=shift_labels, num_items_in_batch=num_items_in_batch
            )
            kwargs.update({k: v for k, v in given.items() if v is not None})
            return stock(*args, **kwargs)
        kwargs.update(use_cache=False, return_dict=True)
        _switch.prepare(self, switch)
        switch.on = True
        try:
            output = stock(*args, **kwargs)
        finally:
            switch.on = False
        if not isinstance(output.logits, UnmadeLogits):
            raise NotImplementedError(
                f"the forward of {type(self).__name__} returned logits that are not its "
                f"classifier's: use trl's own trainer"
            )
        shift = 1 if shift_labels is None else 0
        targets = labels if shift_labels is None else shift_labels
        per_token = _per_token(
            output.logits, targets, shift, temperature, cast_lm_head_to_fp32, outputs
        )
        mask = targets[:, shift:].to(per_token["log_probs"].device) != -100
        items = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss = -per_token["log_probs"].sum() / items
        aux_loss = output.get("aux_loss")
        if aux_loss is not None:
            coefficient = getattr(text_config, "router_aux_loss_coef", 0.0)
            loss = loss + coefficient * aux_loss.to(loss.device)
        return FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=aux_loss, **per_token)

    target.forward = MethodType(forward, target)


def _per_token(
    logits: UnmadeLogits,
    targets: Tensor,
    shift: int,
    temperature: float,
    in_fp32: bool,
    outputs: tuple[str, ...],
) -> dict[str, Tensor]:
    """Each (sequences, length - shift), 0 where the label is -100."""

    def of(e: Tensor, c: Tensor, bias: Tensor | None, **options) -> dict[str, Tensor]:
        labels = targets.to(c.device)
        options.update(shift=shift, temperature=temperature)
        autocast = contextlib.nullcontext()
        if in_fp32:
            e = e.float()
            autocast = torch.autocast(e.device.type, enabled=False)
        with autocast:
            return _results(e, c, labels, bias, options, outputs)

    return _operands.evaluate(logits, of)


def _results(
    e: Tensor, c: Tensor, labels: Tensor, bias: Tensor | None, options: dict, outputs: tuple
) -> dict[str, Tensor]:
    results = linear_cross_entropy(
        e, c, labels, bias, reduction="none", return_entropy="entropy" in outputs,
        return_predictions="is_top1" in outputs, **options,
    )  # fmt: skip
    results = list(results) if isinstance(results, tuple) else [results]
    found = {"log_probs": -results.pop(0)}
    if "entropy" in outputs:
        found["entropy"] = results.pop(0)
    scored = labels[:, options["shift"] :]
    if "is_top1" in outputs:
        found["is_top1"] = (results.pop(0) == scored) & (scored != -100)
    with torch.no_grad():
        if "log_sum_sq_probs" in outputs:
            of_squares = token_log_probs(
                e, c, labels, bias, return_log_sum_sq_probs=True, **options
            )
            found["log_sum_sq_probs"] = of_squares.log_sum_sq_probs
        if "mean_logits" in outputs:
            found["mean_logits"] = _mean_logits(e, c, labels, bias, options)
    return found


def _mean_logits(
    e: Tensor, c: Tensor, labels: Tensor, bias: Tensor | None, options: dict
) -> Tensor:
    """The mean over the vocabulary of each token's logits."""
    shift = options["shift"]
    counts = labels[:, shift:] != -100
    if options["softcap"] is None:
        # The mean of products with every row of c is the product with their mean.
        of_c = c.mean(0, dtype=torch.promote_types(c.dtype, torch.float32))
        means = e[:, : e.shape[1] - shift].to(of_c.dtype) @ of_c * options["logit_scale"]
        if bias is not None:
            means = means + bias.mean(dtype=of_c.dtype)
        return torch.where(counts, means / options["temperature"], 0.0)
    # A smoothed loss with nothing of the target left is lse - mean(z).
    smoothed, lse = linear_cross_entropy(
        e, c, labels, bias, reduction="none", label_smoothing=1.0, return_lse=True, **options
    )
    return torch.where(counts, lse - smoothed, 0.0)

"""patch and unpatch: a model of Transformers whose training loss is computed without logits."""

import functools
import inspect
from types import MethodType

from torch import nn

from .. import _checks
from .._implementations import is_plain
from . import _switch, _verify
from ._switch import Switch
from ._unmade import UnmadeLogits

_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")


class _Patch:
    """What a patched model holds beside its switch."""

    def __init__(self, model: nn.Module, switch: Switch, return_logits: bool | None):
        self.switch = switch
        self.return_logits = return_logits
        self.before = model.__dict__.get("forward")  # the instance's own, where it has one
        names = list(inspect.signature(model.forward).parameters)
        self.place_of_labels = names.index("labels") if "labels" in names else None

    def stock(self, model: nn.Module):
        return self.before or type(model).forward.__get__(model)


def patch(
    model: nn.Module,
    *,
    return_logits: bool | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    max_workspace: int | None = None,
    impl: str = "auto",
    verify: bool = True,
) -> nn.Module:
    """Let a causal language model of Transformers compute its training loss without logits::

        model = AutoModelForCausalLM.from_pretrained(...)
        cutloss.patch(model)
        loss = model(input_ids, labels=labels).loss       # outputs.logits is None

    The model's own forward runs as it is, with its own loss function; only its classifier returns
    a promise of logits, which keeps what happens to it (a scale, a vector that is added, a softcap,
    another shape) and computes the cross-entropy without making them. What a forward does to
    logits beyond that is an error. Loss and gradients are those of the model to rounding, logits in
    fp32; num_items_in_batch, shift_labels, auxiliary losses and extra outputs are the model's own
    business.

    Without labels nothing changes: generation, caches, logits. With labels, logits are left out in
    training; in evaluation they are made, as compute_metrics needs them, by the model's own
    forward. A call with ``return_logits=True`` or ``False`` decides for itself.

    Patch before the model is wrapped or compiled (DDP, FSDP, ``accelerator.prepare``,
    ``torch.compile``); an adapter may come before or after. Under DataParallel a
    patched model does not work: start one process for each GPU.

    :param model: A model of Transformers that has ``get_output_embeddings()``, an nn.Linear (with
        or without bias, tied or not, under PEFT's LoRA or modules_to_save), or a PeftModel of one.
    :param return_logits: For calls with labels: True, False, or None: in evaluation.
    :param z_loss: Adds ``z_loss * lse**2`` of each token, in training.
    :param label_smoothing: As F.cross_entropy's, in training.
    :param max_workspace: As :func:`cutloss.linear_cross_entropy`'s.
    :param impl: "torch" makes the logits, with PyTorch's own operators: for comparisons.
    :param verify: Compare loss and gradient with the model's own on 2 sequences of 4 tokens, and
        raise where they differ. It runs the model twice in evaluation mode, on its own device, and
        leaves random state, modes, buffers and gradients as they were. False for a model that can
        not run yet (on the meta device).
    :return: The model.
    :raises NotImplementedError: where the model's classifier or forward can not be done; the model
        is as it was.
    """
    _checks.flags(verify=verify)
    if return_logits is not None:
        _checks.flags(return_logits=return_logits)
    _checks.max_workspace(max_workspace)
    _checks.plain_options(is_plain(impl), "auto", max_workspace)
    training = dict(
        z_loss=_checks.z_loss(z_loss), label_smoothing=_checks.label_smoothing(label_smoothing)
    )
    target = unwrapped(model)
    if isinstance(getattr(target, "_cutloss_patch", None), _Patch):
        raise ValueError(
            f"this {type(target).__name__} is patched already: call cutloss.unpatch(model) first"
        )
    switch = Switch(dict(impl=impl, max_workspace=max_workspace), training)
    held = _Patch(target, switch, return_logits)
    _switch.prepare(target, switch)
    target.__dict__["_cutloss_patch"] = held
    target.__dict__["forward"] = MethodType(_wrapped(type(target).forward), target)
    if verify:
        try:
            _verify.verify(target, switch, held.stock(target))
        except BaseException:
            unpatch(target)
            raise
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Undo :func:`patch`."""
    target = unwrapped(model)
    held = getattr(target, "_cutloss_patch", None)
    if held is None:
        raise ValueError(f"this {type(target).__name__} is not patched")
    now = target.__dict__.get("forward")
    if getattr(now, "__func__", None) is None or not hasattr(now.__func__, "_of_cutloss"):
        raise ValueError(
            f"the forward of this {type(target).__name__} was wrapped after cutloss.patch (as "
            f"accelerator.prepare does): undo that first (accelerator.unwrap_model)"
        )
    _switch.remove(held.switch)
    del target.__dict__["_cutloss_patch"], target.__dict__["forward"]
    if held.before is not None:
        target.__dict__["forward"] = held.before
    return model


def unwrapped(model: nn.Module) -> nn.Module:
    """The model of Transformers itself, under PEFT's wrapper."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"cutloss.patch takes a model, got {type(model).__name__}")
    if type(model).__name__ in _WRAPPERS or hasattr(model, "_orig_mod"):
        raise ValueError(
            f"this model is inside {type(model).__name__}: patch it before it is wrapped or "
            f"compiled"
        )
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        model = model.get_base_model()
    ask = getattr(model, "get_output_embeddings", None)
    if ask is None or ask() is None:
        raise NotImplementedError(
            f"{type(model).__name__} has no output embeddings (get_output_embeddings()): "
            f"cutloss.patch is for causal language models of Transformers; for a model of your "
            f"own call cutloss.linear_cross_entropy with its hidden states"
        )
    return model


def _wrapped(of_class):
    @functools.wraps(of_class)  # its signature is read by generate and by Trainer
    def forward(self, *args, return_logits: bool | None = None, **kwargs):
        held: _Patch = self._cutloss_patch
        stock = held.stock(self)
        place = held.place_of_labels
        has_labels = kwargs.get("labels") is not None or (
            place is not None and len(args) > place and args[place] is not None
        )
        if return_logits is None:
            return_logits = held.return_logits
        if return_logits is None:
            return_logits = not self.training
        if return_logits or not has_labels:
            return stock(*args, **kwargs)
        _switch.prepare(self, held.switch)
        return _without_logits(_switch.without_logits(held.switch, self, stock, args, kwargs))

    forward._of_cutloss = True
    return forward


def _without_logits(output):
    """None in their place; outputs keep their class, tuples their length."""
    if isinstance(output, tuple):
        return tuple(None if isinstance(v, UnmadeLogits) else v for v in output)
    return type(output)(
        **{k: None if isinstance(v, UnmadeLogits) else v for k, v in output.items()}
    )

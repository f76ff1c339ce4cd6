"""patch and unpatch: a model of Transformers whose training loss is computed without logits."""

import copy
import functools
import inspect
import itertools
import operator
from collections.abc import Mapping
from types import MethodType
from typing import Any

from torch import nn

from .._core import checks
from .._implementations import is_plain
from .._torch import private
from . import _guard, _switch, _verify
from ._switch import Switch, place_of_forward
from ._unmade_logits import UnmadeLogits

_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")

_NUMBERS = itertools.count()


class _Patch:
    """One patch of a model. Who wrapped its forward may call it after it was undone."""

    def __init__(self, model: nn.Module, switch: Switch, return_logits: bool | None):
        self.switch: Switch | None = switch  # None: undone
        self.return_logits = return_logits
        before = model.__dict__.get(place_of_forward(model))
        is_of_class = getattr(before, "__func__", None) is type(model).forward
        self.before = None if is_of_class else before  # the instance's own, where it has one
        self.place_of_labels = _guard.place_of_labels(model)
        self.forward = None  # the function that was put there, as no wrapper of it is
        self.guards: list = []  # what removes the hooks
        self.number = next(_NUMBERS)  # by which it is told from others

    def __deepcopy__(self, memo: dict) -> "_Patch":
        """Of a copy of the model, with a number of its own."""
        copied = memo[id(self)] = object.__new__(type(self))
        copied.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items()})
        copied.number = next(_NUMBERS)
        return copied

    def stock(self, model: nn.Module):
        return self.before or MethodType(type(model).forward, model)

    def regularisers(self) -> dict:
        """What it adds to the loss in training."""
        return {k: v for k, v in self.switch.training_options.items() if v}


def patch(
    model: nn.Module,
    *,
    return_logits: bool | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    max_workspace: int | None = None,
    impl: str = "auto",
    verify: bool | Mapping[str, Any] = True,
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

    A training call without labels whose logits have gradients is warned of, once for each model:
    the patch has no part in a loss that somebody else makes of them. Where z_loss or
    label_smoothing was given, which such a loss would lack, it raises ValueError. With
    ``return_logits=True`` it does neither. One with labels and return_logits gives the model's own
    loss, without z_loss and label_smoothing: where these were given, that is warned of.

    Patch before the model is wrapped or compiled (DDP, FSDP, ``accelerator.prepare``,
    ``torch.compile``); an adapter may come before or after. Under DataParallel a
    patched model does not work: start one process for each GPU. What other libraries put over the
    model's forward later they may take off again. Where their forward takes the place of the patch,
    the next training call with labels raises RuntimeError.

    :param model: A model of Transformers that has ``get_output_embeddings()``, an nn.Linear (with
        or without bias, tied or not, under PEFT's LoRA or modules_to_save), or a PeftModel of one.
    :param return_logits: For calls with labels: True, False, or None: in evaluation.
    :param z_loss: Adds ``z_loss * lse**2`` of each token, in training.
    :param label_smoothing: As F.cross_entropy's, in training.
    :param max_workspace: As :func:`cutloss.linear_cross_entropy`'s.
    :param impl: "torch" makes the logits, with PyTorch's own operators: for comparisons.
    :param verify: Compare the loss, and its gradient for the hidden states, with the model's own on
        2 sequences of 4 tokens, and raise where they differ. Or a batch to compare on, for a model
        that needs more than text: a mapping of the arguments of its forward, tensors on its
        device, labels among them, as a processor or collator makes it. It runs the model twice in
        evaluation mode, on its own device, the first time with its logits, and leaves the batch,
        random state, modes, buffers and gradients as they were. False for a model that can not run
        yet (on the meta device).
    :return: The model.
    :raises NotImplementedError: where the model's classifier or forward can not be done, or its
        loss or gradient differ; the model is as it was, as it is after every error.
    :raises RuntimeError: where the model itself can not take the batch.
    :raises ValueError: where the batch has no labels or is on another device than the model, or the
        model makes no finite loss of it, or one whose gradient is zeros.
    """
    batch = _verify.check(verify)
    if return_logits is not None:
        checks.flags(return_logits=return_logits)
    checks.max_workspace(max_workspace)
    checks.plain_options(is_plain(impl), "auto", max_workspace)
    training = dict(
        z_loss=checks.z_loss(z_loss), label_smoothing=checks.label_smoothing(label_smoothing)
    )
    target = unwrapped(model)
    if _active(target) is not None:
        raise ValueError(
            f"this {type(target).__name__} is patched already: call cutloss.unpatch(model) first"
        )
    switch = Switch(dict(impl=impl, max_workspace=max_workspace), training)
    held = _Patch(target, switch, return_logits)
    _switch.prepare(target, switch)
    patches = target.__dict__.setdefault(_guard.NAME, [])
    patches.append(held)
    held.forward = _forward_of(len(patches) - 1, type(target).forward)
    target.__dict__[place_of_forward(target)] = MethodType(held.forward, target)
    for module in [target] if model is target else [target, model]:
        held.guards += _guard.install(module)
    if verify or batch is not None:
        try:
            # Of a batch of its own, which says nothing of the memory that a step needs.
            limit = max_workspace if batch is not None else None
            with switch.with_options(max_workspace=limit):
                _verify.verify(target, switch, held.stock(target), batch)
        except BaseException:
            unpatch(target)
            raise
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Undo :func:`patch`, whatever was put over the model's forward, or taken off, since."""
    target = unwrapped(model)
    held = _active(target)
    if held is None:
        raise ValueError(f"this {type(target).__name__} is not patched")
    _switch.remove(held.switch)
    for handle in held.guards:
        handle.remove()
    held.switch, held.guards = None, []
    _take_off(target)
    return model


def _active(target: nn.Module) -> _Patch | None:
    patches = target.__dict__.get(_guard.NAME, ())
    return patches[-1] if patches and patches[-1].switch is not None else None


def regularisers(target: nn.Module) -> dict:
    """Those of the patch of a model, if it has one."""
    held = _active(target)
    return {} if held is None else held.regularisers()


def _take_off(target: nn.Module) -> None:
    """Removes from the model each forward that a patch put there, once the patch has been undone. A
    forward that somebody else has wrapped since stays, as the wrapper still calls it."""
    patches: list[_Patch] = target.__dict__.get(_guard.NAME, [])
    place = place_of_forward(target)
    while True:
        function = getattr(target.__dict__.get(place), "__func__", None)
        found = [p for p in patches if p.forward is function and p.switch is None]
        if not found:
            break
        if found[0].before is not None or place != "forward":
            target.__dict__[place] = found[0].stock(target)
        else:
            del target.__dict__[place]
        if found[0] is patches[-1]:
            patches.pop()
    if not patches:
        target.__dict__.pop(_guard.NAME, None)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model of Transformers itself, under PEFT's wrapper."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"cutloss.patch takes a model, got {type(model).__name__}: make the model first, by "
            f"from_pretrained or of its configuration, and patch that"
        )
    if type(model).__name__ in _WRAPPERS or private.is_compiled(model):
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


def _forward_of(level: int, of_class):
    """The forward of the patch that is at this place among the model's."""

    def forward(self, *args, **kwargs):
        held: _Patch = getattr(self, _guard.NAME)[level]
        # The class's function is not bound to the model: where torch.compile breaks a graph it
        # makes a bound method anew by its name on the model, which is this function.
        function = type(self).forward if held.before is None else held.before
        given = (self, *args) if held.before is None else args
        switch = held.switch
        if switch is None:
            return function(*given, **kwargs)
        without = _guard.leaves_out_logits(
            held.return_logits, held.place_of_labels, self.training, args, kwargs
        )
        labels = _guard.has_labels(held.place_of_labels, args, kwargs)
        asked = bool(kwargs.pop("return_logits", None))
        inside = switch.now.on  # of another call, whose loss function may want logits
        if without:
            _switch.prepare(self, switch)
            output, took_loss = _switch.without_logits(
                switch, self.training, function, given, kwargs
            )
            _switch.check_loss(took_loss, self)
            output = _without_logits(output)
        else:
            output = _switch.with_logits(switch, function, given, kwargs)
            if not inside:
                _guard.check_made_logits(held, self, labels, asked, output)
        switch.now.reached = True
        return output

    # As functools.wraps, but without __wrapped__: libraries that unwind wrappers follow it
    # (accelerate's unwrap_model), and would go through the patch to the model's own forward.
    functools.update_wrapper(forward, of_class)
    del forward.__wrapped__
    forward.__signature__ = inspect.signature(of_class)  # generate and Trainer read it
    return forward


def _without_logits(output):
    """None in their place, in the outputs of inner models too; outputs keep their class, tuples
    their length."""
    if isinstance(output, UnmadeLogits):
        return None
    if isinstance(output, tuple):
        values = [_without_logits(v) for v in output]
        is_same = all(map(operator.is_, values, output))
        return output if is_same else tuple(values)
    if isinstance(output, dict):
        values = {k: _without_logits(v) for k, v in output.items()}
        is_same = all(values[k] is output[k] for k in values)
        return output if is_same else type(output)(**values)
    return output

"""What a patched model and the classifier in it share: whether logits are made just now."""

import contextlib
import copy
import dataclasses
import operator
import threading
from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._torch import partitioned, private
from .._torch.partitioned import whole_shape
from . import _casts, _operands, _parametrized
from ._casts import Cast
from ._operands import Term
from ._unmade_logits import UnmadeLogits

NAME = "_cutloss_switch"  # the attribute of both


@dataclasses.dataclass(eq=False)
class Now:
    """What holds for the innermost call of the model that is running in this thread."""

    on: bool = False  # the classifier's layers return UnmadeLogits
    training: bool = False
    took_loss: bool = False
    probes: list[Tensor] | None = None  # gets the inputs of the classifier's layers
    reached: bool = False  # the patch took part in the call that ended last


class _OfThread(threading.local):
    """A thread's Now, made once and then changed in place: torch.compile follows changes of a plain
    object, loses assignments to a threading.local where the graph breaks, and can not read a
    ContextVar."""

    def __init__(self):
        self.now = Now()


@dataclasses.dataclass(eq=False)
class Switch:
    options: dict  # of linear_cross_entropy, always
    training_options: dict  # of linear_cross_entropy, in training
    of_thread: _OfThread = dataclasses.field(default_factory=_OfThread)
    seen: list[nn.Module] = dataclasses.field(default_factory=list)  # all of the classifier
    layers: list[nn.Linear] = dataclasses.field(default_factory=list)  # those that are changed

    @property
    def now(self) -> Now:
        return self.of_thread.now

    @contextlib.contextmanager
    def with_options(self, **changes: Any) -> Iterator[None]:
        before = self.options
        self.options = before | changes
        try:
            yield
        finally:
            self.options = before

    def __deepcopy__(self, memo: dict) -> "Switch":
        layers = copy.deepcopy(self.layers, memo)
        return Switch(dict(self.options), dict(self.training_options), layers=layers)

    def __getstate__(self):
        raise TypeError(
            "a model that cutloss patched can not be pickled whole: save_pretrained and state_dict "
            "work as ever; for torch.save(model) call cutloss.unpatch(model) before"
        )

    def loss(self, logits: UnmadeLogits, target: Tensor, given: dict) -> Tensor:
        options = {**given, **self.options}
        for name, value in (self.training_options if self.now.training else {}).items():
            if value and options.get(name):
                raise ValueError(
                    f"{name} is given twice, as {value} to cutloss.patch and as {options[name]} "
                    f"by the model's own loss: leave one out"
                )
            options[name] = value or options.get(name, 0.0)
        self.now.took_loss = True
        return _operands.loss(logits, target, options)


def _forward(self: nn.Linear, hidden: Tensor, *, cutloss_inside=None):
    """Of an nn.Linear that makes logits, in place of its own."""
    cast: Cast | None = self.__dict__.get(_casts.NAME)
    if cutloss_inside is not None:
        with cast.autocast(hidden.device) if cast else contextlib.nullcontext():
            return _casts.result(self, cutloss_inside(partitioned.whole(hidden)[0], self))
    switch = self.__dict__.get(NAME)
    if switch is None:  # what wraps this forward kept it after it was removed
        return cast.logits(self, hidden) if cast else F.linear(hidden, self.weight, self.bias)
    now = switch.now
    if now.probes is not None:
        hidden = hidden.detach().requires_grad_()
        now.probes.append(hidden)
    if not now.on:
        return cast.logits(self, hidden) if cast else F.linear(hidden, self.weight, self.bias)
    hidden, mesh = partitioned.whole(hidden)
    hidden = cast.operand(self, hidden) if cast else hidden
    return UnmadeLogits((Term(hidden, self, 1.0, mesh),), switch.loss)


def prepare(model: nn.Module, switch: Switch) -> None:
    """Puts the switch into the classifier that the model has now: adapters come and go."""
    head = model.get_output_embeddings()
    modules = list(head.modules())
    same = len(modules) == len(switch.seen) and all(map(operator.is_, modules, switch.seen))
    if same and all(_is_installed(m, switch) for m in switch.layers):
        _check_hooks(switch.layers, type(model).__name__)
        return
    casts = _layers(head, type(model).__name__)
    found = list(casts)
    _check_hooks(found, type(model).__name__)
    for module in switch.layers:
        if not any(module is m for m in found):
            _remove(module)
    for module, cast in casts.items():
        _install(module, switch, cast)
    switch.layers, switch.seen = found, modules


def _is_installed(module: nn.Linear, switch: Switch) -> bool:
    known = _casts.has_forward_of(module, module.__dict__.get(_casts.NAME))
    return known and module.__dict__.get(NAME) is switch


def _check_hooks(layers: list[nn.Linear], owner: str) -> None:
    """The layers are called once for their promise and once for the loss, whose inputs and outputs
    are not logits: hooks would run twice, or not see what they are for. Casts do no harm. Those
    that gather weights are for both calls, and must see no other; and those that place what goes
    in and comes out leave what is placed already."""
    for module in layers:
        hooks = [(hook, True) for hook in private.forward_pre_hooks(module)]
        hooks += [(hook, False) for hook in private.forward_hooks(module)]
        hooks += [(hook, None) for hook in private.backward_hooks(module)]
        for hook, of_input in hooks:
            if partitioned.only_gathers(hook) or partitioned.only_places(hook):
                continue
            if of_input is not None and _casts.is_cast(module, hook, of_input):
                continue
            raise NotImplementedError(
                f"the classifier of {owner}, of type {type(module).__name__}, has a hook "
                f"({getattr(hook, '__qualname__', type(hook).__name__)}), which a loss without "
                f"logits can not call as it is meant (one that only casts its input or output "
                f"is known): remove it, put it on another module, or leave this model as it is"
            )


def remove(switch: Switch) -> None:
    for module in switch.layers:
        _remove(module)


def without_logits(switch: Switch, training: bool, function, args: tuple, kwargs: dict):
    """The outputs of ``function(*args, **kwargs)``, a model's forward, in which the classifier
    makes no logits; and whether a loss was taken of them. Another call of the model inside of it,
    as a loss function may make, has a state of its own."""
    return _with(switch, True, training, function, args, kwargs)


def with_logits(switch: Switch, function, args: tuple, kwargs: dict):
    """The outputs of a forward in which the classifier makes logits, whatever it does outside."""
    if not switch.now.on:
        return function(*args, **kwargs)
    return _with(switch, False, False, function, args, kwargs)[0]


def _with(switch: Switch, on: bool, training: bool, function, args: tuple, kwargs: dict):
    now = switch.now
    before = now.on, now.training, now.took_loss
    now.on, now.training, now.took_loss = on, training, False
    try:
        output = function(*args, **kwargs)
        took_loss = now.took_loss
    finally:
        now.on, now.training, now.took_loss = before
    return output, took_loss


def check_loss(took_loss: bool, model: nn.Module) -> None:
    if not took_loss:
        raise NotImplementedError(
            f"the forward of {type(model).__name__} returned without taking a cross-entropy of "
            f"what its classifier makes (another library may have replaced it, or it reads the "
            f"classifier's weight itself): cutloss.patch can not compute its loss"
        )


def _layers(head: nn.Module, owner: str) -> dict[nn.Linear, Cast | None]:
    """Those layers of a classifier that make logits, or a part of them: itself; of an adapter the
    wrapped one and each lora_B; of a wrapper the wrapped one. And how they cast."""
    _parametrized.check(head, owner)
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or len(whole_shape(weight)) != 2:
        wrapped = _casts.of_wrapper(head)
        if wrapped is None:
            raise NotImplementedError(
                f"the classifier of {owner} is a {type(head).__name__} without a weight (V, D): "
                f"cutloss.patch knows an nn.Linear, alone, under PEFT's LoRA or modules_to_save, "
                f"or in a module without parameters and buffers that does nothing with what goes "
                f"in and comes out, or casts it"
            )
        layer, cast = wrapped
        if _check(layer, owner) is not None:
            raise NotImplementedError(
                f"the classifier of {owner} has a forward of its own in its "
                f"{type(head).__name__} and in the {type(layer).__name__} inside of it: leave one "
                f"of them out"
            )
        return {layer: cast}
    leaves = [m for m in head.modules() if "weight" in dict(m.named_parameters(recurse=False))]
    found = [m for m in leaves if whole_shape(m.weight)[:1] == whole_shape(weight)[:1]]
    casts = {module: _check(module, owner) for module in found or [head]}
    if len(casts) > 1 and any(cast and cast.outside_autocast for cast in casts.values()):
        raise NotImplementedError(
            f"the classifier of {owner} is under an adapter and has a forward of its own that "
            f"leaves autocast, which cutloss can not do for the sum of both: leave the classifier "
            f"out of the adapter (target_modules), or out of autocast the model"
        )
    return casts


def place_of_forward(module: nn.Module) -> str:
    """The attribute of an instance whose function runs innermost: under a hook of accelerate, which
    keeps there what it found, and puts it back when it is removed."""
    return "_old_forward" if "_old_forward" in module.__dict__ else "forward"


def _install(module: nn.Linear, switch: Switch, cast: Cast | None) -> None:
    if _is_installed(module, switch):
        return
    place = place_of_forward(module)
    if NAME not in module.__dict__ or place not in module.__dict__:
        module.__dict__[place] = MethodType(_forward, module)
    module.__dict__[NAME] = switch
    module.__dict__.pop(_casts.NAME, None)
    if cast is not None:
        module.__dict__[_casts.NAME] = cast


def _remove(module: nn.Linear) -> None:
    module.__dict__.pop(NAME, None)  # a model with the same classifier may have been first
    place = place_of_forward(module)
    if getattr(module.__dict__.get(place), "__func__", None) is not _forward:
        return  # of somebody else, who may call ours
    cast = _casts.forget(module)
    own = cast.own if cast else None
    if own is not None:
        module.__dict__[place] = own
    elif place == "_old_forward":
        module._old_forward = MethodType(type(module).forward, module)
    else:
        del module.__dict__["forward"]


def _own_forward(module: nn.Linear):
    """That of the instance before it was patched; None where it was the class's."""
    own = module.__dict__.get(place_of_forward(module))
    known = NAME in vars(module) or own is None
    known = known or getattr(own, "__func__", None) in (type(module).forward, _forward)
    return None if known else own


def _check(module: nn.Module, owner: str) -> Cast | None:
    kind = type(module)
    if kind.__module__.startswith("peft."):
        raise NotImplementedError(
            f"the classifier of {owner} is under PEFT's {kind.__name__}, of which cutloss does not "
            f"know what it makes of the weight: plain LoRA and modules_to_save are known; leave "
            f"the classifier out of this adapter (target_modules), or use one of those for it"
        )
    if isinstance(module, nn.Embedding):
        raise NotImplementedError(
            f"get_output_embeddings() of {owner} gives an nn.Embedding, which has the weight of "
            f"the classifier and is not what makes logits: if an nn.Linear with this weight does, "
            f"let it give that (model.get_output_embeddings = lambda: ...), and patch again"
        )
    own, cast = _own_forward(module), None
    plain = kind.forward is _casts.LINEAR_FORWARD
    is_linear = isinstance(module, nn.Linear)
    if is_linear and (not plain or own is not None or _casts.NAME in vars(module)):
        cast = _casts.of_layer(module, own)
    if is_linear and not plain and cast is None and kind.forward is nn.Linear.forward:
        by = f"{kind.forward.__module__}.{kind.forward.__qualname__}"
        raise NotImplementedError(
            f"the classifier of {owner} is an nn.Linear, and the forward of that class was "
            f"replaced, by {by}, which does more than the product with the weight: put the "
            f"forward of PyTorch back before cutloss.patch is called"
        )
    if not is_linear or (not plain and cast is None):
        own_forward = "an nn.Linear with a forward of its own, which does more than the product"
        it_is = own_forward if is_linear else "no nn.Linear"
        raise NotImplementedError(
            f"the classifier of {owner} is, or holds, a {kind.__module__}.{kind.__name__}, of "
            f"which cutloss does not know what it makes of its weight: it is {it_is}. Put an "
            f"nn.Linear there; if this layer is quantised, load the model with it in bf16 or fp32 "
            f"(BitsAndBytesConfig(llm_int8_skip_modules=['lm_head']) for one; quantised layers "
            f"elsewhere do no harm)"
        )
    if not module.weight.is_floating_point():
        raise NotImplementedError(
            f"the classifier of {owner} has a weight of {module.weight.dtype}: load the model with "
            f"this layer in bf16, fp16 or fp32"
        )
    if own is not None and cast is None and partitioned.is_dtensor(module.weight):
        raise NotImplementedError(
            f"the classifier of {owner} is a DTensor, placed {module.weight.placements}, and has a "
            f"forward of its own on the instance, as Transformers' tp_plan puts there, which makes "
            f"the logits of what it is given: leave the classifier out of the tp_plan, and shard "
            f"it by torch.distributed.tensor.parallel.parallelize_module(model, mesh, "
            f"{{'lm_head': ColwiseParallel(output_layouts=Replicate())}})"
        )
    if own is not None and cast is None:
        raise NotImplementedError(
            f"the classifier of {owner} has a forward of its own on the instance, which would not "
            f"be called, and does more than the product with the weight: remove it, or patch the "
            f"model before it is put there"
        )
    return cast


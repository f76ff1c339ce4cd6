"""What a patched model and the classifier in it share: whether logits are made just now."""

import copy
import dataclasses
import operator
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _sharded
from . import _operands
from ._operands import Term
from ._unmade import UnmadeLogits

NAME = "_cutloss_switch"  # the attribute of both


@dataclasses.dataclass(eq=False)
class Switch:
    options: dict  # of linear_cross_entropy, always
    training_options: dict  # of linear_cross_entropy, in training
    on: bool = False  # the classifier's layers return UnmadeLogits
    training: bool = False
    losses: int = 0  # how many were computed
    probes: list[Tensor] | None = None  # gets the inputs of the classifier's layers
    seen: list[nn.Module] = dataclasses.field(default_factory=list)  # all of the classifier
    layers: list[nn.Linear] = dataclasses.field(default_factory=list)  # those that are changed

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
        for name, value in (self.training_options if self.training else {}).items():
            if value and options.get(name):
                raise ValueError(
                    f"{name} is given twice, as {value} to cutloss.patch and as {options[name]} "
                    f"by the model's own loss: leave one out"
                )
            options[name] = value or options.get(name, 0.0)
        self.losses += 1
        return _operands.loss(logits, target, options)


def _forward(self: nn.Linear, hidden: Tensor, *, cutloss_inside=None):
    """Of an nn.Linear that makes logits, in place of its own."""
    if cutloss_inside is not None:
        return {"cutloss": cutloss_inside(hidden, self)}
    switch = getattr(self, NAME)
    if switch.probes is not None:
        hidden = hidden.detach().requires_grad_()
        switch.probes.append(hidden)
    if not switch.on:
        return F.linear(hidden, self.weight, self.bias)
    return UnmadeLogits((Term(hidden, self, 1.0),), switch.loss)


def prepare(model: nn.Module, switch: Switch) -> None:
    """Puts the switch into the classifier that the model has now: adapters come and go."""
    head = model.get_output_embeddings()
    modules = list(head.modules())
    same = len(modules) == len(switch.seen) and all(map(operator.is_, modules, switch.seen))
    if same and all(m.__dict__.get(NAME) is switch for m in switch.layers):
        _check_hooks(switch.layers, type(model).__name__)
        return
    found = _layers(head, type(model).__name__)
    _check_hooks(found, type(model).__name__)
    for module in switch.layers:
        if not any(module is m for m in found):
            _remove(module)
    for module in found:
        _install(module, switch)
    switch.layers, switch.seen = found, modules


def _check_hooks(layers: list[nn.Linear], owner: str) -> None:
    """The layers are called once for their promise and once for the loss, whose inputs and outputs
    are not logits: hooks would run twice, or not see what they are for."""
    for module in layers:
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        hooks += [*module._backward_pre_hooks.values(), *module._backward_hooks.values()]
        for hook in hooks:
            if not _sharded.only_gathers(hook):
                raise NotImplementedError(
                    f"the classifier of {owner}, of type {type(module).__name__}, has a hook "
                    f"({getattr(hook, '__qualname__', type(hook).__name__)}), which a loss without "
                    f"logits can not call as it is meant: remove it, put it on another module, or "
                    f"leave this model as it is"
                )


def remove(switch: Switch) -> None:
    for module in switch.layers:
        _remove(module)


def without_logits(switch: Switch, model: nn.Module, stock, args: tuple, kwargs: dict):
    """The outputs of a forward that computes its loss on UnmadeLogits."""
    before = switch.losses
    switch.on, switch.training = True, model.training
    try:
        output = stock(*args, **kwargs)
    finally:
        switch.on = False
    if switch.losses == before:
        raise NotImplementedError(
            f"the forward of {type(model).__name__} returned without taking a cross-entropy of "
            f"what its classifier makes (another library may have replaced it, or it reads the "
            f"classifier's weight itself): cutloss.patch can not compute its loss"
        )
    return output


def shape(weight: Tensor) -> torch.Size:
    """Also of one that DeepSpeed's ZeRO-3 has taken apart."""
    return getattr(weight, "ds_shape", weight.shape)


def _layers(head: nn.Module, owner: str) -> list[nn.Linear]:
    """Those layers of a classifier that make logits, or a part of them: itself; of an adapter the
    wrapped one and each lora_B."""
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or len(shape(weight)) != 2:
        raise NotImplementedError(
            f"the classifier of {owner} is a {type(head).__name__} without a weight (V, D): "
            f"cutloss.patch knows an nn.Linear, alone or under PEFT's LoRA or modules_to_save"
        )
    leaves = [m for m in head.modules() if "weight" in dict(m.named_parameters(recurse=False))]
    found = [m for m in leaves if shape(m.weight)[:1] == shape(weight)[:1]]
    for module in found or [head]:
        _check(module, owner)
    return found or [head]


def _install(module: nn.Linear, switch: Switch) -> None:
    if module.__dict__.get(NAME) is switch:
        return
    module.__dict__[NAME] = switch
    of_hook = "_old_forward" if hasattr(module, "_hf_hook") else "forward"  # accelerate's
    module.__dict__[of_hook] = MethodType(_forward, module)


def _remove(module: nn.Linear) -> None:
    module.__dict__.pop(NAME, None)  # a model with the same classifier may have been first
    if hasattr(module, "_hf_hook"):
        module._old_forward = MethodType(type(module).forward, module)
    else:
        module.__dict__.pop("forward", None)


def _check(module: nn.Module, owner: str) -> None:
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
    if not isinstance(module, nn.Linear) or kind.forward is not nn.Linear.forward:
        is_linear = isinstance(module, nn.Linear)
        it_is = "an nn.Linear with a forward of its own" if is_linear else "no nn.Linear"
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
    has_own = "forward" in module.__dict__ and not hasattr(module, "_hf_hook")
    if has_own and NAME not in module.__dict__:
        raise NotImplementedError(
            f"the classifier of {owner} has a forward of its own on the instance, which would not "
            f"be called: remove it, or patch the model before it is put there"
        )

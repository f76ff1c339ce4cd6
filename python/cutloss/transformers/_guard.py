"""Hooks on a patched model that notice a training call in which the patch had no part.

The patch is a forward on the instance. Other libraries put theirs over it, which calls it, or in
its place, which does not: then the loss would be made from logits again, and nobody told.
"""

import functools
import inspect

from torch import nn

NAME = "_cutloss_patches"  # the attribute of a model: its patches, the last one in force


def place_of_labels(module: nn.Module) -> int | None:
    """Among the positional arguments of its forward."""
    names = list(inspect.signature(module.forward).parameters)
    return names.index("labels") if "labels" in names else None


def leaves_out_logits(
    return_logits: bool | None, place: int | None, training: bool, args: tuple, kwargs: dict
) -> bool:
    """Whether a call has labels, and no need of logits.

    :param return_logits: What was said when the model was patched.
    :param place: Of the labels in args.
    """
    has_labels = kwargs.get("labels") is not None or (
        place is not None and len(args) > place and args[place] is not None
    )
    said = kwargs.get("return_logits")
    if said is None:
        said = return_logits
    if said is None:
        said = not training
    return has_labels and not said


def install(module: nn.Module) -> list:
    """On a patched model, or PEFT's wrapper of one (its AdaLora calls the forward of the model past
    the model's hooks). Returns handles that remove the hooks.

    The hooks hold nothing of the model, so that a copy of it has hooks of its own."""
    after = functools.partial(_after, place_of_labels(module))
    return [
        module.register_forward_pre_hook(_before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    ]


def _before(module: nn.Module, args: tuple, kwargs: dict) -> None:
    getattr(module, NAME)[-1].switch.now.reached = False


def _after(place: int | None, module: nn.Module, args: tuple, kwargs: dict, output) -> None:
    patch = getattr(module, NAME)[-1]
    if patch.switch.now.reached:
        return
    if leaves_out_logits(patch.return_logits, place, module.training, args, kwargs):
        raise RuntimeError(
            f"cutloss.patch had no part in this call of {type(module).__name__} with labels: "
            f"after it was patched its forward was replaced, or put back to what it was "
            f"before, and is now {_described(module)}. Call cutloss.unpatch(model) if that forward "
            f"is the one you want, and cutloss.patch(model) after it for a loss by cutloss; with "
            f"TRL take the trainers of cutloss.trl"
        )


def _described(module: nn.Module) -> str:
    """Its forward. A wrapper may have the name of what it wraps; where its code is tells more."""
    if hasattr(module, "get_base_model"):
        module = module.get_base_model()
    forward = getattr(module.forward, "func", module.forward)  # of a functools.partial
    name = getattr(forward, "__qualname__", type(forward).__qualname__)
    code = getattr(forward, "__code__", None)
    return f"{name} of {code.co_filename}, line {code.co_firstlineno}" if code else name

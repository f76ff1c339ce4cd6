"""What notices a training call in which the patch had no part, where nobody asked for that.

The patch is a forward on the instance. Other libraries put theirs over it, which calls it, or in
its place, which does not: then the loss would be made from logits again, and nobody told. Or they
call it without labels, and make the loss of logits themselves.
"""

import functools
import inspect
import warnings

import torch
from torch import Tensor, nn

from .._torch.private import while_traced
from ._unmade_logits import UnmadeLogits

NAME = "_cutloss_patches"  # the attribute of a model: its patches, the last one in force


def place_of_labels(module: nn.Module) -> int | None:
    """The position of `labels` among the arguments of the module's forward. None: it takes none."""
    names = list(inspect.signature(module.forward).parameters)
    return names.index("labels") if "labels" in names else None


def leaves_out_logits(
    return_logits: bool | None, place: int | None, training: bool, args: tuple, kwargs: dict
) -> bool:
    """Whether a call has labels, and no need of logits.

    :param return_logits: What was said when the model was patched.
    :param place: Of the labels in args.
    """
    said = kwargs.get("return_logits")
    if said is None:
        said = return_logits
    if said is None:
        said = not training
    return has_labels(place, args, kwargs) and not said


def has_labels(place: int | None, args: tuple, kwargs: dict) -> bool:
    by_position = place is not None and len(args) > place and args[place] is not None
    return kwargs.get("labels") is not None or by_position


def check_made_logits(patch, model: nn.Module, labels: bool, asked: bool, output) -> None:
    """Of a call that made logits: that nothing is trained with them of which the patch was meant to
    have a part.

    :param patch: What patch made of the model.
    :param labels: Whether the call had labels.
    :param asked: Whether it had return_logits=True.
    """
    if not torch.is_grad_enabled() or (asked and not labels):
        return
    values = output.values() if isinstance(output, dict) else output
    values = [output] if isinstance(output, Tensor) else list(values)
    if any(isinstance(v, UnmadeLogits) for v in values):  # of cutloss.trl's forward
        return
    if not any(isinstance(v, Tensor) and v.requires_grad for v in values):
        return
    name = type(model).__name__
    if not model.training:
        if labels and not asked and patch.return_logits is None:
            _say_once(
                patch.number,
                f"a call of {name} with labels and gradients, but in evaluation mode (in which "
                f"from_pretrained gives a model): there cutloss.patch leaves the logits to the model. "
                f"Call model.train() before training, or patch(model, return_logits=False) to leave "
                f"them out in evaluation too; without gradients torch.no_grad() is right",
            )
        return
    given = patch.regularisers()
    written = ", ".join(f"{k}={v}" for k, v in given.items())
    if labels and given:
        _say_once(
            patch.number,
            f"the loss of a training call of {name} with return_logits=True is the model's own, "
            f"without the {written} that cutloss.patch was given: take the loss from a call "
            f"without return_logits, and logits from a second one",
        )
    elif given:
        raise ValueError(
            f"cutloss.patch was given {written}, and this training call of {name} has no labels: "
            f"its loss is made elsewhere, of logits, and would be without that, as under Trainer "
            f"with label_smoothing_factor or compute_loss_func. Pass the labels to the model and "
            f"take its loss (leave label_smoothing_factor and compute_loss_func out), or patch the "
            f"model without {' and '.join(given)}. A call whose logits are for something else may "
            f"say return_logits=True, or be under torch.no_grad()"
        )
    elif not labels:
        _say_once(
            patch.number,
            f"a training call of {name} without labels: its logits are made, and cutloss.patch has "
            f"no part in a loss that is computed from them (Trainer does so with "
            f"label_smoothing_factor or compute_loss_func). For a loss without logits pass labels "
            f"to the model and take its loss; cutloss.patch(model, label_smoothing=...) has the "
            f"smoothing. Where the logits are what you want, call the model with "
            f"return_logits=True",
        )


_said: set[tuple[int, str]] = set()  # of which patch, by its number, what


@while_traced  # the compiler takes constants alone: a number, and not the patch
def _say_once(patch: int, message: str) -> None:
    if (patch, message) not in _said:
        _said.add((patch, message))
        warnings.warn(message, stacklevel=2)


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

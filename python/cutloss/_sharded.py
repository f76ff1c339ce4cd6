"""Tensors that are not whole here: DTensors, and what FSDP and ZeRO-3 leave of a weight between
the calls of its module. What to do instead; docs/training-stacks.md says why."""

import sys

import torch
from torch import Tensor

from ._torch import private

IN_FORWARD = (
    "compute the loss in the forward of the module (or the model) that was wrapped, where the "
    "weight is whole"
)
_OF_A_WEIGHT = (
    IN_FORWARD + "; or pass {0}.full_tensor(grad_placements=[Partial('avg')]) if each process has "
    "a batch of its own, {0}.full_tensor() if all have the same"
)
_OF_ROWS = (
    "pass {0}.full_tensor() with all targets, or {0}.to_local() with the targets of its own rows, "
    "if every row is whole (then each process has a part of the loss)"
)
_ADVICE = {"c": _OF_A_WEIGHT, "bias": _OF_A_WEIGHT, "e": _OF_ROWS}


def is_dtensor(t: object) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def refusal(name: str, t: Tensor) -> str:
    """Of the ways to make a DTensor plain only the caller knows the right one: what comes back as
    its gradient depends on whether all processes have the same e, or each its own."""
    advice = _ADVICE.get(name, "pass {0}.full_tensor()").format(name)
    return f"{name} is a DTensor, placed {t.placements}, and cutloss takes plain tensors: {advice}"


def refusal_of_head(name: str, weight: Tensor) -> str:
    """Of a head whose own forward runs, and does not call output_embeddings, which was wrapped."""
    return (
        f"the weight of output_embeddings is a DTensor, placed {weight.placements}, in the forward "
        f"of {name}: fully_shard gathers it for the module that it was given, so give it the whole "
        f"{name} or the model, not output_embeddings alone; one that is tied to the model's "
        f"embedding leave to the fully_shard of the model"
    )


@private.while_traced
def only_gathers(hook: object) -> bool:
    """Whether a hook of a module is one with which FSDP or DeepSpeed gather and free its weight,
    and not one that changes it. What they left is checked where it is used."""
    return getattr(hook, "__module__", "").startswith(("torch.distributed.fsdp.", "deepspeed."))


def of_shape(c: Tensor) -> str:
    """What else to say of a c that is not (V, D)."""
    if hasattr(c, "ds_shape"):
        whole = f"DeepSpeed's ZeRO-3 has partitioned it, and it is {tuple(c.ds_shape)} when whole"
        return f"; {whole}: {IN_FORWARD}"
    return f"; if ZeRO-3 or FSDP left it so, {IN_FORWARD}" if c.dim() == 1 else ""


def check_memory(e: Tensor, c: Tensor) -> None:
    """That it was not freed, which leaves a shape, and an offset in place of an address. Of tensors
    with memory of their own."""
    if e.device.type == "meta":
        return
    for name, t in (("e", e), ("c", c)):
        if t.data_ptr() == t.storage_offset() * t.itemsize and t.numel() > 0:
            raise RuntimeError(
                f"the memory of {name}, {t.numel()} elements of {t.dtype}, has been freed, as FSDP "
                f"does with a weight outside of the forward and backward of its module: "
                f"{IN_FORWARD}"
            )


def check_shape(e: Tensor, c: Tensor) -> None:
    """That in backward it still is, or is again, what it was in forward."""
    if c.dim() != 2 or c.shape[1] != e.shape[-1]:
        raise RuntimeError(
            f"c is {tuple(c.shape)} in backward, and was (V, {e.shape[-1]}) in forward: ZeRO-3 "
            f"gathers it again only for modules whose forward used it; {IN_FORWARD}"
        )

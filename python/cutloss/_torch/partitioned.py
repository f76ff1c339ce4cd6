"""Tensors that are not whole here: DTensors, and what FSDP and ZeRO-3 leave of a weight between
the calls of its module. What to do instead; docs/training-stacks.md says why."""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from . import private

IN_FORWARD = (
    "compute the loss in the forward of the module (or the model) that was wrapped, where the "
    "weight is whole"
)
_OF_A_WEIGHT = (
    "where tensor parallelism has placed it, take ColwiseParallel for the layer, or pass "
    "{0}.redistribute(placements=[Shard(0)]); where fully_shard has, " + IN_FORWARD + "; or pass "
    "{0}.full_tensor(grad_placements=[Partial('avg')]) if each process has a batch of its own, "
    "{0}.full_tensor() if all have the same"
)
_OF_ROWS = (
    "pass {0}.full_tensor() with all targets, or {0}.to_local() with the targets of its own rows, "
    "if every row is whole (then each process has a part of the loss)"
)
_BUT_SHARDS = {"c": " (and in losses that are functions of each token's nll, Shard(0))"}
_ADVICE = {"c": _OF_A_WEIGHT, "bias": _OF_A_WEIGHT, "e": _OF_ROWS}


def is_dtensor(t: object) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def has_classes(c: object) -> bool:
    """Whether c is a DTensor of which each rank of one group has some of the rows, as tensor
    parallelism has it (and FSDP alone, see is_fully_sharded)."""
    return is_dtensor(c) and c.device_mesh.ndim == 1 and is_shard(c, 0)


def is_shard(t: Tensor, dim: int) -> bool:
    """Shard itself, not the strided kind, which FSDP makes of a shard of a shard."""
    from torch.distributed.tensor import Shard

    return len(t.placements) == 1 and type(t.placements[0]) is Shard and t.placements[0].dim == dim


def replicated(t: Tensor, mesh: Any) -> Tensor:
    """A DTensor that is whole on every rank, of one that is plain, or of a DTensor."""
    from torch.distributed.tensor import DTensor, Replicate

    if is_dtensor(t):
        return t.redistribute(placements=[Replicate()])
    return DTensor.from_local(t, mesh, [Replicate()], run_check=False)


def whole(t: Tensor) -> tuple[Tensor, Any]:
    """A plain tensor, of one or of a DTensor that is whole on every rank, whose gradient is then
    the whole one; and the DTensor's mesh."""
    if not (is_dtensor(t) and all(p.is_replicate() for p in t.placements)):
        return t, None
    return t.to_local(grad_placements=t.placements), t.device_mesh


def gathered(t: Tensor) -> Tensor:
    """The whole of a DTensor, on every rank; another tensor as it is."""
    return t.full_tensor() if is_dtensor(t) else t


def whole_shape(weight: Tensor) -> torch.Size:
    """Also of one that DeepSpeed's ZeRO-3 has partitioned."""
    return getattr(weight, "ds_shape", weight.shape)


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether fully_shard was given this very module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, getattr(fsdp, "FSDPModule", ()))


def refusal(name: str, t: Tensor) -> str:
    """Of the ways to make a DTensor plain only the caller knows the right one: what comes back as
    its gradient depends on whether all processes have the same e, or each its own."""
    said = f"{name} is a DTensor, placed {t.placements}"
    if name in ("c", "bias") and t.device_mesh.ndim > 1:
        return (
            f"{said} on a mesh of {t.device_mesh.ndim} dimensions, and cutloss takes a classifier "
            f"that is whole, or Shard(0) on a mesh of one dimension: where fully_shard came on top "
            f"of tensor parallelism, {IN_FORWARD} but for the dimension of tensor parallelism; "
            f"else pass {name}.full_tensor(grad_placements=[...]), with a placement for each "
            f"dimension of the mesh"
        )
    advice = _ADVICE.get(name, "pass {0}.full_tensor()").format(name)
    return f"{said}, and cutloss takes plain tensors{_BUT_SHARDS.get(name, '')}: {advice}"


def refusal_of_head(name: str, weight: Tensor) -> str:
    """Of a head whose own forward runs, and does not call output_embeddings, which was wrapped."""
    return (
        f"the weight of output_embeddings is a DTensor, placed {weight.placements}, in the forward "
        f"of {name}, which takes one that is whole, or that tensor parallelism has sharded, "
        f"Shard(0) on a mesh of one dimension: fully_shard gathers it for the module that it was "
        f"given, so give it the whole {name} or the model, not output_embeddings alone; one that "
        f"is tied to the model's embedding leave to the fully_shard of the model"
    )


@private.while_traced
def only_gathers(hook: object) -> bool:
    """Whether a hook of a module is one with which FSDP or DeepSpeed gather and free its weight,
    and not one that changes it. What they left is checked where it is used."""
    return getattr(hook, "__module__", "").startswith(("torch.distributed.fsdp.", "deepspeed."))


@private.while_traced
def only_places(hook: object) -> bool:
    """Whether a hook of a module is one of parallelize_module's, which make DTensors of what goes
    in, placed as the module's layout says, and plain tensors of what comes out."""
    return getattr(hook, "__module__", "").startswith("torch.distributed.tensor.")


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

"""Where the vocabulary is among the dimensions of logits that are not made.

What renames logits (transposes, groups, picks positions) changes the hidden states in the same
way, as long as the vocabulary stays one whole dimension: there, hidden states have their features.
The functions here say how to, and where the vocabulary is afterwards. Everything is computed from
sizes, since a tensor of logits, even of no memory, is what nobody wants to see made.
"""

import math
import operator

import torch
from torch import Tensor

from ._errors import LogitsNotMadeError

_INDEX_DTYPES = (torch.int64, torch.int32, torch.bool)


def dimension(dim: int, ndim: int) -> int:
    """The dimension that `dim` means, counted from the first one also where `dim` is negative."""
    dim = operator.index(dim)
    if not -ndim <= dim < ndim:
        raise IndexError(
            f"Dimension out of range: logits have {ndim} dimensions, and dimension {dim} is meant"
        )
    return dim % ndim


# Orders of dimensions: the i-th of the result is the order[i]-th of what is permuted. -------------


def swapped(ndim: int, first: int, second: int) -> list[int]:
    order = list(range(ndim))
    first, second = dimension(first, ndim), dimension(second, ndim)
    order[first], order[second] = second, first
    return order


def moved(ndim: int, source: int | tuple[int, ...], destination: int | tuple[int, ...]):
    """As torch.movedim does."""
    sources, destinations = (
        [dimension(d, ndim) for d in ((dims,) if isinstance(dims, int) else dims)]
        for dims in (source, destination)
    )
    if not len(set(sources)) == len(sources) == len(destinations) == len(set(destinations)):
        raise ValueError(
            f"movedim takes as many dimensions from as to, each once: got {source} and "
            f"{destination}"
        )
    order = [d for d in range(ndim) if d not in sources]
    for to, d in sorted(zip(destinations, sources)):
        order.insert(to, d)
    return order


# Sizes of the result, for what groups dimensions --------------------------------------------------


def viewed(shape: torch.Size, sizes: tuple[int, ...]) -> tuple[int, ...] | None:
    """With a number in place of -1. None where a tensor of logits could not be viewed so."""
    known = math.prod([size for size in sizes if size != -1])
    if sizes.count(-1) == 1 and known != 0:
        missing = math.prod(shape) // known
        sizes, known = tuple(missing if s == -1 else s for s in sizes), known * missing
    return sizes if known == math.prod(shape) and all(size >= 0 for size in sizes) else None


def flattened(shape: torch.Size, start_dim: int, end_dim: int) -> tuple[int, ...]:
    start, end = dimension(start_dim, len(shape)), dimension(end_dim, len(shape))
    if start > end:
        raise ValueError(f"flatten has start_dim {start_dim}, which is after end_dim {end_dim}")
    return (*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :])


def unflattened(shape: torch.Size, dim: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    dim = dimension(dim, len(shape))
    parts = viewed(shape[dim : dim + 1], sizes)
    if parts is None:
        raise ValueError(f"a dimension of {shape[dim]} can not be unflattened to {tuple(sizes)}")
    return (*shape[:dim], *parts, *shape[dim + 1 :])


def squeezed(shape: torch.Size, dims: int | tuple[int, ...] | None) -> tuple[int, ...]:
    dims = range(len(shape)) if dims is None else (dims,) if isinstance(dims, int) else dims
    chosen = {dimension(d, len(shape)) for d in dims}
    return tuple(size for d, size in enumerate(shape) if d not in chosen or size != 1)


def regrouped(shape: torch.Size, class_dim: int, sizes: tuple[int, ...]) -> int | None:
    """Where the vocabulary is when logits of this shape are viewed as these sizes; None where it is
    not one whole dimension any more.

    Entries keep their order. So it is there where the dimensions before it, and those after it,
    hold as many entries as they did."""
    before, after = math.prod(shape[:class_dim]), math.prod(shape[class_dim + 1 :])
    for dim, size in enumerate(sizes):
        same = size == shape[class_dim] and math.prod(sizes[:dim]) == before
        if same and math.prod(sizes[dim + 1 :]) == after:
            return dim
    return None


# Picking positions --------------------------------------------------------------------------------


def indexed(shape: torch.Size, class_dim: int, index) -> tuple[tuple, int]:
    """The index for hidden states, and where the vocabulary is in what it picks."""
    items = _with_each_dimension(shape, index if isinstance(index, tuple) else (index,))
    tensors = [k for k, item in enumerate(items) if isinstance(item, Tensor)]
    # Several tensors are broadcast together; they stay in their place if nothing that gives a
    # dimension is between them, else PyTorch puts what they give first.
    between = items[tensors[0] : tensors[-1] + 1] if tensors else []
    if any(item is None or isinstance(item, slice) for item in between):
        raise LogitsNotMadeError("entries by tensors with a slice between them")
    of_tensors = max([0, *[1 if _is_mask(items[k]) else items[k].dim() for k in tensors]])
    taken = given = found = 0
    picks = []
    for k, item in enumerate(items):
        takes = _takes(item)
        if taken <= class_dim < taken + takes:
            if not _is_whole(item, shape[class_dim]):
                raise LogitsNotMadeError(f"some of the columns ({index!r})")
            item, found = slice(None), given
        picks.append(item)
        taken += takes
        if isinstance(item, Tensor):
            given += of_tensors if k == tensors[0] else 0
        elif item is None or isinstance(item, slice):
            given += 1
    return tuple(picks), found


def _with_each_dimension(shape: torch.Size, items: tuple) -> list:
    """Slices in place of an Ellipsis, and of dimensions that the index does not speak of."""
    for item in items:
        known = item is None or item is Ellipsis or isinstance(item, (slice, int, Tensor))
        if not known or isinstance(item, bool):
            raise LogitsNotMadeError(f"entries by an index of type {type(item).__name__}")
        if isinstance(item, Tensor) and item.dtype not in _INDEX_DTYPES:
            raise LogitsNotMadeError(f"entries by an index of {item.dtype}")
    ellipses = [k for k, item in enumerate(items) if item is Ellipsis]
    rest = len(shape) - sum(_takes(item) for item in items)
    if rest < 0 or len(ellipses) > 1:
        raise IndexError(f"too many indices for logits of shape {tuple(shape)}: {items!r}")
    place = ellipses[0] if ellipses else len(items)
    return [*items[:place], *[slice(None)] * rest, *items[place + 1 :]]


def _takes(item: object) -> int:
    """How many dimensions an entry of an index speaks of."""
    if item is None or item is Ellipsis:
        return 0
    return item.dim() if _is_mask(item) else 1


def _is_mask(item: object) -> bool:
    return isinstance(item, Tensor) and item.dtype == torch.bool


def _is_whole(item: object, size: int) -> bool:
    if not isinstance(item, slice):
        return False
    return item == slice(None) or item.indices(size) == (0, size, 1)

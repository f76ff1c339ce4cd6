"""How many rows, and how many columns, are worked on at a time: memory, written down."""

import dataclasses
import math

import torch

DEFAULT_WORKSPACE = 256 << 20
CONVERTED = 16 << 20  # classes that are converted to the products' dtype at a time, in bytes
_LIBRARY = 34 << 20  # what cuBLAS takes at its first call, on Hopper
_BLOCK = 2048  # rows of a slab at a time: products of this size run at full speed
_UNIT = 64  # of rows and columns: on a GPU other numbers of 16-bit columns have slow products only
_FEW = 64  # fewer rows at a time leave a GPU waiting for the classifier to be read,
_FEW_SUMS = 512  # and fewer than these for dC's sums to be read and written


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What memory depends on. Bytes are of one number."""

    n: int  # rows
    V: int
    width: int  # bytes of one row of all hidden states, as operands
    D: int  # of the student
    stats: int  # bytes
    operand: int
    e: int
    c: int
    buffers: int  # tensors of (R,V) alive at most
    per_row: int  # other bytes of a row
    converted: int  # of classes in the products' dtype at a time
    on_cuda: bool

    @property
    def entry(self) -> int:
        return self.buffers * self.stats

    @property
    def fixed(self) -> int:
        """Beside chunks: by row of all rows, by class, and once."""
        classes = self.V * (8 + 3 * self.stats)  # dbias, both biases, a copy
        library = _LIBRARY if self.on_cuda else 0
        return self.n * self.per_row + classes + self.converted + library + 4096

    @property
    def of_row(self) -> int:
        """A row of a chunk."""
        return self.V * self.entry + self.width + self.D * (self.stats + self.e)


@dataclasses.dataclass(frozen=True)
class Plan:
    """
    :param rows: Rows of a chunk, by rows.
    :param accumulates: Whether dC is made by rows: its sums stay in memory, in stats.
    :param block: Rows of a tile, by vocabulary.
    :param columns: Its columns.
    :param sums_de: Whether dE comes with dC, by vocabulary, its sums in memory.
    """

    rows: int
    accumulates: bool = True
    block: int = 0
    columns: int = 0
    sums_de: bool = False


def make_plan(
    s: Sizes, schedule: str, max_workspace: int | None, de: bool, dc: bool, known: bool
) -> Plan:
    """The fewest products that fit. `known`: whether gradients are made along with the loss."""
    limit = DEFAULT_WORKSPACE if max_workspace is None else max_workspace
    sums = s.V * s.D * s.stats if dc and s.c < s.stats else 0
    least = min(s.n, _FEW_SUMS if s.on_cuda else _FEW)
    if not dc or schedule == "rows" or (schedule == "auto" and _rows(s, limit - sums) >= least):
        return Plan(_chunk(s, limit, sums, max_workspace))
    rows = _chunk(s, limit, 0, max_workspace)
    sums_de = 0 if known or not de else s.n * s.D * s.stats
    if _tile(s, limit - sums_de)[1] < min(s.V, 256):
        sums_de = 0  # dE by rows again: two products more
    block, columns = _tile(s, limit - sums_de)
    need = s.fixed + sums_de + _of_block(s) + _of_column(s, 1)
    columns = _least_one(columns, s, need, max_workspace)
    return Plan(rows, False, block, columns, sums_de > 0)


def _rows(s: Sizes, limit: int) -> int:
    rows = min(s.n, (limit - s.fixed) // s.of_row)
    return rows - rows % _UNIT if _UNIT < rows < s.n else rows


def _chunk(s: Sizes, limit: int, sums: int, given: int | None) -> int:
    """Rows, beside `sums` bytes."""
    rows = _rows(s, limit - sums)
    return max(s.n, 1) if s.n <= rows else _least_one(rows, s, s.fixed + sums + s.of_row, given)


def _least_one(count: int, s: Sizes, need: int, given: int | None) -> int:
    if count < 1 and given is not None:
        raise ValueError(
            f"max_workspace is {given} bytes, but the smallest plan for {s.n} rows and {s.V} "
            f"classes needs {need}: give at least that, or leave max_workspace out"
        )
    return max(count, 1)


def _of_block(s: Sizes) -> int:
    """What one row of a tile needs beside its columns."""
    return s.width + s.D * s.stats


def _of_column(s: Sizes, block: int) -> int:
    return block * s.entry + s.D * (2 * s.stats + s.operand)


def _tile(s: Sizes, limit: int) -> tuple[int, int]:
    """Rows and columns: half of what there is for the rows at most."""
    left = limit - s.fixed
    block = max(1, min(s.n, _BLOCK, left // 2 // _of_block(s)))
    columns = min(s.V, (left - block * _of_block(s)) // _of_column(s, block))
    while columns < min(s.V, 64) and block > 1:
        block = math.ceil(block / 2)
        columns = min(s.V, (left - block * _of_block(s)) // _of_column(s, block))
    return block, columns - columns % _UNIT if _UNIT < columns < s.V else columns


def converted(c: torch.Tensor, operands: torch.dtype) -> int:
    """Bytes of classes that are converted at a time."""
    if c.dtype == operands:
        return 0
    row = c.shape[1] * bytes_of(operands)
    return max(row, min(CONVERTED, c.shape[0] * row))


def bytes_of(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits // 8

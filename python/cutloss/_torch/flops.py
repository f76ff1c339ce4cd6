"""What torch.utils.flop_counter.FlopCounterMode counts for the operators, as trainers report it.

The products of the loss's mathematics, whatever the schedule: of all rows that are predicted,
whether they are ignored or not, 2 N V D for the logits, as much for each of the gradients of e and
c that is wanted, and nothing for logits that a schedule makes a second time. So it is what the same
loss counts in PyTorch. Operators that make gradients along with the loss count both.

Losses over logits that exist have no products, as F.cross_entropy has none. Distillation, which is
made of PyTorch's own operators, says what is to be counted in place of them (counted_as).
"""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from .._core.options import Options
from .private import FLOP_COUNTER, flop_counters

Product = tuple[int, int, int]  # of (m, k) and (k, n)


def _product(e: Sequence[int], c: Sequence[int], shift: int) -> int:
    """Of the shapes (sequences, length, D) and (V, D)."""
    sequences, length, D = e
    return 2 * sequences * max(length - shift, 0) * c[0] * D


def _of_forward(e: Sequence[int], c: Sequence[int], *_: Any, shift: int = 0, **__: Any) -> int:
    return _product(e, c, shift)


def _of_gradients(
    e: Sequence[int],
    c: Sequence[int],
    *_: Any,
    shift: int = 0,
    needs_de: bool = False,
    needs_dc: bool = False,
    **__: Any,
) -> int:
    return (int(needs_de) + int(needs_dc)) * _product(e, c, shift)


def products_of_gradients(e: torch.Tensor, c: torch.Tensor, options: Options) -> list[Product]:
    """The products that count where a second backward makes the gradients again. Forward has
    counted those of the logits, so there is one for each gradient of e and c that is wanted."""
    sequences, length, D = e.shape
    product = (sequences * max(length - options.shift, 0), D, c.shape[0])
    return [product] * (options.needs_de + options.needs_dc)


def _of_both(*args: Any, **options: Any) -> int:
    return _of_forward(*args, **options) + _of_gradients(*args, **options)


def _register() -> None:
    register = sys.modules[FLOP_COUNTER].register_flop_formula
    ops = torch.ops.cutloss
    register(ops.statistics)(_of_forward)
    register(ops.gradients)(_of_gradients)
    # The whole of a loss by chunks of rows: the operators that do the chunks count nothing.
    register([ops.loss_and_gradients, ops.chunks_begin])(_of_both)


@contextlib.contextmanager
def counted_as(products: Sequence[Product]) -> Iterator[None]:
    """What is multiplied in here counts as these products do."""
    counters = flop_counters()
    before = [{module: dict(counts) for module, counts in c.flop_counts.items()} for c in counters]
    yield
    if not counters:
        return
    for counter, counted in zip(counters, before):
        for module, counts in counter.flop_counts.items():
            counts.clear()
            counts.update(counted.get(module, {}))
    for m, k, n in products:  # on a device where a product is counted and nothing is done
        torch.mm(torch.empty(m, k, device="meta"), torch.empty(k, n, device="meta"))


class _WhenImported(MetaPathFinder):
    """Registers once somebody imports PyTorch's counter. To import it here would take longer than
    all of cutloss where Triton is installed, which it imports."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != FLOP_COUNTER or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        exec_module = spec.loader.exec_module

        def exec_and_register(module: ModuleType) -> None:
            exec_module(module)
            _register()

        spec.loader.exec_module = exec_and_register
        return spec


def register_when_imported() -> None:
    if FLOP_COUNTER in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _WhenImported())

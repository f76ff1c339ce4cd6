"""Logits that are not made: what a classifier returns while a patched model computes its loss.

A model's forward does a handful of things to logits before it takes their cross-entropy: it
scales them, caps them, cuts off positions, flattens. UnmadeLogits remembers these, and refuses
everything else by name; so whatever a forward does is either done, or an error.
"""

import math
import numbers
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks
from ..functional import linear_cross_entropy


class LogitsNotMadeError(NotImplementedError, AttributeError):
    """Something asked for logits that cutloss did not make. (An AttributeError, since hasattr may
    be what asks.)"""

    def __init__(self, what: str):
        super().__init__(
            f"{what} of logits that were not made: cutloss.patch computes the loss of this model "
            f"without them, and knows scaling by a number, one tanh, slices of positions, view, "
            f"dtypes and F.cross_entropy. Where the logits are wanted call the model with "
            f"return_logits=True, or cutloss.unpatch it"
        )


class Term(NamedTuple):
    """scale · hidden · linear.weightᵀ + scale · linear.bias"""

    hidden: Tensor  # (..., D)
    linear: nn.Linear  # weight (V,D), bias (V) or None
    scale: float


class Operands(NamedTuple):
    """What linear_cross_entropy takes."""

    e: Tensor  # (..., D)
    c: Tensor  # (V,D)
    bias: Tensor | None  # (V)


class UnmadeLogits:
    """The sum of its terms, in ``softcap * tanh(sum / softcap)`` where there is a softcap.

    :param terms: A classifier's; and an adapter's, whose ``hidden`` has the size of its rank.
    :param compute: What computes the loss; called with the operands and options of
        linear_cross_entropy.
    """

    def __init__(
        self,
        terms: tuple[Term, ...],
        compute: Callable[..., Tensor],
        softcap: float | None = None,
        device: torch.device | None = None,
    ):
        self.terms = terms
        self.compute = compute
        self.softcap = softcap
        self.device = terms[0].linear.weight.device if device is None else device

    # What a tensor of logits would say of itself ------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        first = self.terms[0]
        return torch.Size((*first.hidden.shape[:-1], first.linear.weight.shape[0]))

    @property
    def dtype(self) -> torch.dtype:
        kind = self.terms[0].linear.weight.device.type
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return self.terms[0].linear.weight.dtype

    @property
    def ndim(self) -> int:
        return self.terms[0].hidden.dim()

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def __repr__(self) -> str:
        return f"UnmadeLogits(shape={tuple(self.shape)}, softcap={self.softcap})"

    def __bool__(self) -> bool:
        raise LogitsNotMadeError("their truth value")

    # What changes no number: logits are in fp32 wherever they exist ------------------------------

    def float(self) -> "UnmadeLogits":
        return self

    def contiguous(self, **memory_format) -> "UnmadeLogits":
        return self

    def to(self, *args, **kwargs) -> "UnmadeLogits":
        """A dtype changes nothing; on another device the loss arrives."""
        device = None
        for value in (*args, kwargs.get("device"), kwargs.get("dtype")):
            if isinstance(value, torch.dtype) and not value.is_floating_point:
                raise LogitsNotMadeError(f"the conversion to {value}")
            if isinstance(value, (str, torch.device)):
                device = torch.device(value)
            elif isinstance(value, Tensor):
                device = value.device
        if device is None or device == self.device:
            return self
        return UnmadeLogits(self.terms, self.compute, self.softcap, device)

    # Positions ------------------------------------------------------------------------------------

    def _of_hidden(self, change: Callable[[Tensor], Tensor]) -> "UnmadeLogits":
        terms = tuple(Term(change(t.hidden), t.linear, t.scale) for t in self.terms)
        return UnmadeLogits(terms, self.compute, self.softcap, self.device)

    def __getitem__(self, index) -> "UnmadeLogits":
        items = index if isinstance(index, tuple) else (index,)
        if not all(i is Ellipsis or isinstance(i, (slice, int, Tensor)) for i in items):
            raise LogitsNotMadeError(f"the entries {index!r}")
        # How many dimensions the index speaks of: the last one must be left whole.
        takes = sum(0 if i is Ellipsis else i.dim() if _is_mask(i) else 1 for i in items)
        last = items[-1]
        whole = last is Ellipsis or (isinstance(last, slice) and last == slice(None))
        speaks_of_last = any(i is Ellipsis for i in items) or takes >= self.ndim
        if takes > self.ndim or (speaks_of_last and not whole):
            raise LogitsNotMadeError(f"some of the columns ({index!r})")
        return self._of_hidden(lambda hidden: hidden[index])

    def view(self, *shape) -> "UnmadeLogits":
        shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        V = self.shape[-1]
        if shape[-1] not in (V, -1) or (shape[-1] == -1 and self._columns(shape) != V):
            raise ValueError(
                f"logits of shape {tuple(self.shape)} are viewed as {shape}: a patched model's "
                f"last dimension stays the vocabulary, of {V}; config.vocab_size should be that"
            )
        return self._of_hidden(lambda h: h.reshape(*shape[:-1], h.shape[-1]))

    reshape = view

    def _columns(self, shape: tuple[int, ...]) -> int:
        return math.prod(self.shape) // max(math.prod(shape[:-1]), 1)

    # Numbers --------------------------------------------------------------------------------------

    def __mul__(self, factor: float) -> "UnmadeLogits":
        if isinstance(factor, bool) or not isinstance(factor, numbers.Real):
            raise LogitsNotMadeError(f"the product with {_name(factor)}")
        if factor == 0 or not math.isfinite(factor):
            raise LogitsNotMadeError(f"the product with {factor}")
        if self.softcap is None:
            terms = tuple(Term(t.hidden, t.linear, t.scale * factor) for t in self.terms)
            return UnmadeLogits(terms, self.compute, None, self.device)
        if factor < 0:
            raise LogitsNotMadeError(f"the product of tanh with {factor}")
        # factor · cap · tanh(z / cap) = new · tanh(factor · z / new) for new = factor · cap
        terms = tuple(Term(t.hidden, t.linear, t.scale * factor) for t in self.terms)
        return UnmadeLogits(terms, self.compute, self.softcap * factor, self.device)

    __rmul__ = __imul__ = mul = __mul__

    def __truediv__(self, divisor: float) -> "UnmadeLogits":
        if isinstance(divisor, bool) or not isinstance(divisor, numbers.Real) or divisor == 0:
            raise LogitsNotMadeError(f"the quotient by {_name(divisor)}")
        return self * (1.0 / divisor)

    __itruediv__ = div = __truediv__

    def tanh(self) -> "UnmadeLogits":
        if self.softcap is not None:
            raise LogitsNotMadeError("a second tanh")
        return UnmadeLogits(self.terms, self.compute, 1.0, self.device)

    def __add__(self, other: "UnmadeLogits") -> "UnmadeLogits":
        """Of an adapter's product to the classifier's."""
        if not isinstance(other, UnmadeLogits):
            raise LogitsNotMadeError(f"the sum with {_name(other)}")
        if self.softcap is not None or other.softcap is not None or self.shape != other.shape:
            raise LogitsNotMadeError(f"the sum with {other}")
        return UnmadeLogits(self.terms + other.terms, self.compute, None, self.device)

    # Everything else ------------------------------------------------------------------------------

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.cross_entropy and isinstance(_first(args, kwargs), cls):
            return _cross_entropy(*args, **(kwargs or {}))
        if function is torch.tanh and isinstance(_first(args, kwargs), cls):
            return _first(args, kwargs).tanh()
        raise LogitsNotMadeError(getattr(function, "__name__", str(function)))

    def __getattr__(self, name: str):
        raise LogitsNotMadeError(f"the attribute {name!r}")

    def __setitem__(self, index, value):
        raise LogitsNotMadeError("an assignment to entries")

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self):
        raise LogitsNotMadeError("a loop over rows")

    # The loss -------------------------------------------------------------------------------------

    def operands(self) -> tuple[Operands, float]:
        """e, c and bias, and what their product is to be multiplied by.

        Of several terms e and c are those of all side by side: the sum of products is the product
        of what is concatenated. (Adding an adapter's B·A to a 16-bit weight would round it away.)
        """
        first = self.terms[0]
        if len(self.terms) == 1:
            weight, bias = first.linear.weight, first.linear.bias
            return Operands(first.hidden, weight, _scaled(bias, first.scale)), first.scale
        dtype = first.linear.weight.dtype
        e = torch.cat([_scaled(t.hidden, t.scale).to(first.hidden.dtype) for t in self.terms], -1)
        c = torch.cat([t.linear.weight.to(dtype) for t in self.terms], 1)
        biases = [_scaled(t.linear.bias, t.scale) for t in self.terms if t.linear.bias is not None]
        bias = sum(biases[1:], biases[0]).to(dtype) if biases else None
        return Operands(e, c, bias), 1.0


def _cross_entropy(
    logits: UnmadeLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """F.cross_entropy's arguments."""
    if size_average is not None or reduce is not None:
        raise LogitsNotMadeError("a cross-entropy with size_average or reduce, not reduction,")
    if logits.ndim > 2:
        raise LogitsNotMadeError(f"a cross-entropy over dimension 1 of {logits.ndim}")
    if target.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels {_checks.shape(target)} for logits {tuple(logits.shape)}: there must be one "
            f"label for each row (logits_to_keep leaves rows out, of the logits alone)"
        )
    options = dict(
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    return logits.compute(logits, target, options)


def evaluate(logits: UnmadeLogits, function: Callable[..., object]) -> object:
    """``function(e, c, bias, logit_scale, softcap)``, called where the classifier's weight is.

    A classifier of one term is called, as a module: what gathers or moves its weight does so in
    hooks around that call (FSDP, ZeRO-3, accelerate)."""
    if len(logits.terms) == 1:
        term = logits.terms[0]

        def inside(hidden: Tensor, linear: nn.Linear) -> object:
            moved = UnmadeLogits((Term(hidden, linear, term.scale),), logits.compute)
            operands, scale = moved.operands()
            _check(operands)
            return function(*operands, logit_scale=scale, softcap=logits.softcap)

        # In a dict, so that a hook that changes an output cannot take this for logits.
        return term.linear(term.hidden, cutloss_inside=inside)["cutloss"]
    operands, scale = logits.operands()
    _check(operands)
    return function(*operands, logit_scale=scale, softcap=logits.softcap)


def loss(logits: UnmadeLogits, target: Tensor, options: dict) -> Tensor:
    """linear_cross_entropy of logits that are not made."""

    def of(e: Tensor, c: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None):
        on_device = target.to(c.device)
        return linear_cross_entropy(
            e, c, on_device, bias, logit_scale=logit_scale, softcap=softcap, **options
        )

    return evaluate(logits, of).to(logits.device)


def _check(operands: Operands) -> None:
    c = operands.c
    if type(c) not in (Tensor, nn.Parameter):
        raise NotImplementedError(
            f"the weight of the classifier is a {type(c).__name__}, not a tensor of its own: "
            f"cutloss computes the loss of a classifier that this process holds whole (leave the "
            f"head out of the tensor-parallel or sharding plan, or out of quantisation)"
        )
    if c.dim() != 2 or c.shape[0] == 0:
        raise NotImplementedError(
            f"the weight of the classifier has shape {tuple(c.shape)} where the loss is computed: "
            f"it is sharded or offloaded, and was not gathered for the call of the head"
        )


def _scaled(t: Tensor | None, scale: float) -> Tensor | None:
    return t if t is None or scale == 1.0 else t * scale


def _is_mask(index: object) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool


def _name(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return repr(value)


def _first(args: tuple, kwargs: dict | None) -> object:
    return args[0] if args else (kwargs or {}).get("input")

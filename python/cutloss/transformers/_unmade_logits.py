"""Logits that are not made: what a classifier returns while a patched model computes its loss.

A model's forward does a handful of things to logits before it takes their cross-entropy: it
scales them, adds a bias, caps them, cuts off positions, transposes, flattens. UnmadeLogits
remembers these, and refuses everything else by name; so whatever a forward does is either done,
or an error.
"""

import math
import numbers
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core import checks
from . import _layout, _operands
from ._errors import LogitsNotMadeError
from ._operands import Term

Factor = float | Tensor  # float itself is the name of a method below


class UnmadeLogits:
    """The sum of its terms and vector, in ``softcap * tanh(sum / softcap)`` where there is a
    softcap.

    :param terms: A classifier's; and an adapter's, whose ``hidden`` has the size of its rank. All
        ``hidden`` have the dimensions of the logits, with their features where the vocabulary is.
    :param compute: What computes the loss; called with these logits, the targets and options of
        linear_cross_entropy.
    :param class_dim: Which dimension is the vocabulary; None: the last.
    :param vector: (V), what was added to the logits.
    :param normalised: Whether their log_softmax was taken, which changes no cross-entropy.
    """

    def __init__(
        self,
        terms: tuple[Term, ...],
        compute: Callable[..., Tensor],
        softcap: float | None = None,
        device: torch.device | None = None,
        class_dim: int | None = None,
        vector: Tensor | None = None,
        normalised: bool = False,
    ):
        self.terms = terms
        self.compute = compute
        self.softcap = softcap
        self.device = terms[0].linear.weight.device if device is None else device
        self.class_dim = terms[0].hidden.dim() - 1 if class_dim is None else class_dim
        self.vector = vector
        self.normalised = normalised

    def _with(self, **changes) -> "UnmadeLogits":
        same = dict(
            terms=self.terms,
            compute=self.compute,
            softcap=self.softcap,
            device=self.device,
            class_dim=self.class_dim,
            vector=self.vector,
            normalised=self.normalised,
        )
        return UnmadeLogits(**{**same, **changes})

    # What a tensor of logits would say of itself ------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        first = self.terms[0]
        sizes = list(first.hidden.shape)
        sizes[self.class_dim] = first.linear.weight.shape[0]
        return torch.Size(sizes)

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

    def numel(self) -> int:
        return math.prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"UnmadeLogits(shape={tuple(self.shape)}, softcap={self.softcap})"

    __hash__ = object.__hash__  # a class with an __eq__ has none otherwise

    def __eq__(self, other) -> bool:
        if other is None:  # of a tensor that is False too
            return False
        raise LogitsNotMadeError("a comparison (==)")

    def __ne__(self, other) -> bool:
        if other is None:
            return True
        raise LogitsNotMadeError("a comparison (!=)")

    # What a hook of parallelize_module asks of what comes out of a layer ---------------------------

    placements = None  # none is the right one, so that it redistributes

    def redistribute(self, *args, **kwargs) -> "UnmadeLogits":
        """They stand for the logits of all classes, wherever these lie."""
        return self

    def to_local(self, **kwargs) -> "UnmadeLogits":
        return self

    # What changes no number: logits are in fp32 wherever they exist ------------------------------

    def contiguous(self, **memory_format) -> "UnmadeLogits":
        return self

    float = half = bfloat16 = clone = contiguous

    def to(self, *args, **kwargs) -> "UnmadeLogits":
        """A dtype changes nothing; on another device the loss arrives."""
        device = None
        for value in (*args, *map(kwargs.get, ("device", "dtype", "other"))):
            if isinstance(value, torch.dtype) and not value.is_floating_point:
                raise LogitsNotMadeError(f"the conversion to {value}")
            if isinstance(value, (str, torch.device)):
                device = torch.device(value)
            elif isinstance(value, Tensor):
                device = value.device
        if device is None or device == self.device:
            return self
        return self._with(device=device)

    def type(self, dtype=None, **non_blocking) -> "UnmadeLogits":
        if not isinstance(dtype, torch.dtype):  # a name of a class of tensors, or a question
            raise LogitsNotMadeError(f"the type {dtype!r}")
        return self.to(dtype)

    def type_as(self, other: Tensor) -> "UnmadeLogits":
        return self.to(other.device, other.dtype)

    # What transposes or groups dimensions: hidden states are changed alike ------------------------

    def permute(self, *order, dims=None) -> "UnmadeLogits":
        order = [_layout.dimension(d, self.ndim) for d in _one_or_many(order, dims)]
        if sorted(order) != list(range(self.ndim)):
            raise ValueError(f"logits of shape {tuple(self.shape)} are permuted by {order}")
        return self._of_hidden(lambda h: h.permute(order), order.index(self.class_dim))

    def transpose(self, dim0: int, dim1: int) -> "UnmadeLogits":
        return self.permute(_layout.swapped(self.ndim, dim0, dim1))

    swapdims = transpose

    def swapaxes(self, axis0: int, axis1: int) -> "UnmadeLogits":
        return self.transpose(axis0, axis1)

    def movedim(self, source, destination) -> "UnmadeLogits":
        return self.permute(_layout.moved(self.ndim, source, destination))

    moveaxis = movedim

    @property
    def mT(self) -> "UnmadeLogits":
        return self.transpose(-2, -1)

    @property
    def T(self) -> "UnmadeLogits":
        return self.permute(list(range(self.ndim))[::-1])

    def t(self) -> "UnmadeLogits":
        if self.ndim > 2:
            raise ValueError(f"t() is for matrices, and logits have shape {tuple(self.shape)}")
        return self.T

    def view(self, *sizes, shape=None) -> "UnmadeLogits":
        sizes = tuple(_one_or_many(sizes, shape))
        if sizes and isinstance(sizes[0], torch.dtype):
            raise LogitsNotMadeError(f"a view as {sizes[0]}")
        whole = _layout.viewed(self.shape, sizes)
        if whole is None or _layout.regrouped(self.shape, self.class_dim, whole) is None:
            V = self.shape[self.class_dim]
            raise ValueError(
                f"logits of shape {tuple(self.shape)} are viewed as {sizes}: a patched model's "
                f"logits keep one whole dimension for the vocabulary, of {V}; config.vocab_size "
                f"should be that"
            )
        return self._regrouped(whole)

    reshape = view

    def view_as(self, other: Tensor) -> "UnmadeLogits":
        return self.view(other.shape)

    reshape_as = view_as

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> "UnmadeLogits":
        return self._regrouped(_layout.flattened(self.shape, start_dim, end_dim))

    def unflatten(self, dim: int, sizes) -> "UnmadeLogits":
        return self._regrouped(_layout.unflattened(self.shape, dim, tuple(sizes)))

    def squeeze(self, dim=None) -> "UnmadeLogits":
        return self._regrouped(_layout.squeezed(self.shape, dim))

    def unsqueeze(self, dim: int) -> "UnmadeLogits":
        dim = _layout.dimension(dim, self.ndim + 1)
        return self._regrouped((*self.shape[:dim], 1, *self.shape[dim:]))

    def _regrouped(self, sizes: tuple[int, ...]) -> "UnmadeLogits":
        class_dim = _layout.regrouped(self.shape, self.class_dim, sizes)
        if class_dim is None:
            raise LogitsNotMadeError(f"the shape {tuple(sizes)}, without the vocabulary whole,")
        before, after, features = sizes[:class_dim], sizes[class_dim + 1 :], self.class_dim
        return self._of_hidden(lambda h: h.reshape(*before, h.shape[features], *after), class_dim)

    def _of_hidden(self, change: Callable[[Tensor], Tensor], class_dim: int) -> "UnmadeLogits":
        terms = tuple(t._replace(hidden=change(t.hidden)) for t in self.terms)
        return self._with(terms=terms, class_dim=class_dim)

    # Positions ------------------------------------------------------------------------------------

    def __getitem__(self, index) -> "UnmadeLogits":
        picks, class_dim = _layout.indexed(self.shape, self.class_dim, index)
        return self._of_hidden(lambda h: h[picks], class_dim)

    def narrow(self, dim: int, start: int | Tensor, length: int) -> "UnmadeLogits":
        return self._pieces(dim, lambda h, d: (h.narrow(d, start, length),))[0]

    def select(self, dim: int, index: int) -> "UnmadeLogits":
        return self._pieces(dim, lambda h, d: (h.select(d, index),), drops=True)[0]

    def index_select(self, dim: int, index: Tensor) -> "UnmadeLogits":
        return self._pieces(dim, lambda h, d: (h.index_select(d, index),))[0]

    def split(self, split_size, dim: int = 0) -> tuple["UnmadeLogits", ...]:
        return self._pieces(dim, lambda h, d: h.split(split_size, d))

    def tensor_split(self, indices_or_sections, dim: int = 0) -> tuple["UnmadeLogits", ...]:
        return self._pieces(dim, lambda h, d: h.tensor_split(indices_or_sections, d))

    def chunk(self, chunks: int, dim: int = 0) -> tuple["UnmadeLogits", ...]:
        return self._pieces(dim, lambda h, d: h.chunk(chunks, d))

    def unbind(self, dim: int = 0) -> tuple["UnmadeLogits", ...]:
        return self._pieces(dim, lambda h, d: h.unbind(d), drops=True)

    def __iter__(self) -> Iterator["UnmadeLogits"]:
        return iter(self.unbind())

    def _pieces(
        self, dim: int, cut: Callable[[Tensor, int], tuple[Tensor, ...]], drops: bool = False
    ) -> tuple["UnmadeLogits", ...]:
        """Along a dimension of rows, which each piece keeps or drops."""
        dim = _layout.dimension(dim, self.ndim)
        if dim == self.class_dim:
            raise LogitsNotMadeError(f"some of the columns (of dimension {dim})")
        class_dim = self.class_dim - 1 if drops and dim < self.class_dim else self.class_dim
        of_terms = [cut(t.hidden, dim) for t in self.terms]
        pieces = []
        for hidden in zip(*of_terms):
            terms = tuple(t._replace(hidden=h) for h, t in zip(hidden, self.terms))
            pieces.append(self._with(terms=terms, class_dim=class_dim))
        return tuple(pieces)

    # Numbers --------------------------------------------------------------------------------------

    def _check_not_normalised(self, operation: str) -> None:
        if self.normalised:
            raise LogitsNotMadeError(f"{operation}, after log_softmax,")

    def mul(self, other: Factor) -> "UnmadeLogits":
        operation = f"the product with {_name(other)}"
        self._check_not_normalised(operation)
        if isinstance(other, Tensor):
            factor = self._scale(other, operation)
            if self.softcap is not None:
                raise LogitsNotMadeError(f"after a tanh, {operation}, and not with a number,")
        elif isinstance(other, bool) or not isinstance(other, numbers.Real):
            raise LogitsNotMadeError(operation)
        elif other == 0 or not math.isfinite(other):
            raise LogitsNotMadeError(operation)
        elif self.softcap is not None and other < 0:
            raise LogitsNotMadeError(f"the product of tanh with {other}")
        else:
            factor = other
        terms = tuple(t._replace(scale=t.scale * factor) for t in self.terms)
        vector = None if self.vector is None else _operands.scaled(self.vector, factor)
        # factor · cap · tanh(z / cap) = new · tanh(factor · z / new) for new = factor · cap
        softcap = None if self.softcap is None else self.softcap * factor
        return self._with(terms=terms, vector=vector, softcap=softcap)

    __mul__ = __rmul__ = multiply = mul

    def neg(self) -> "UnmadeLogits":
        return self.mul(-1)

    __neg__ = negative = neg

    def div(self, other: Factor, *, rounding_mode: str | None = None) -> "UnmadeLogits":
        operation = f"the quotient by {_name(other)}"
        if rounding_mode is not None:
            raise LogitsNotMadeError(f"a rounding ({rounding_mode!r})")
        if isinstance(other, Tensor):
            return self.mul(self._scale(other, operation).reciprocal())
        if isinstance(other, bool) or not isinstance(other, numbers.Real) or other == 0:
            raise LogitsNotMadeError(operation)
        return self.mul(1.0 / other)

    __truediv__ = divide = true_divide = div

    def _scale(self, factor: Tensor, operation: str) -> Tensor:
        """Without dimensions, and in fp32 at least, where reciprocals and products of such lose
        nothing. Nobody looks at its value, which may be on a device."""
        if factor.numel() != 1 or factor.dim() > self.ndim or factor.is_complex():
            raise LogitsNotMadeError(operation)
        return factor.reshape(()).to(torch.promote_types(factor.dtype, torch.float32))

    def tanh(self) -> "UnmadeLogits":
        self._check_not_normalised("a tanh")
        if self.softcap is not None:
            raise LogitsNotMadeError("a second tanh")
        return self._with(softcap=1.0)

    def add(self, other: "Tensor | UnmadeLogits", *, alpha=1) -> "UnmadeLogits":
        """Of an adapter's product to the classifier's; of a vector to each row."""
        operation = f"the sum with {_name(other)}"
        self._check_not_normalised(operation)
        if self.softcap is not None:
            raise LogitsNotMadeError(f"after a tanh, {operation}")
        if isinstance(other, UnmadeLogits):
            return self._sum(other if alpha == 1 else other.mul(alpha))
        if not isinstance(other, Tensor) or other.is_complex():
            raise LogitsNotMadeError(operation)
        logits = self[(None,) * (other.dim() - self.ndim)] if other.dim() > self.ndim else self
        sizes = [1] * (logits.ndim - other.dim()) + list(other.shape)
        V = logits.shape[logits.class_dim]
        if sizes.pop(logits.class_dim) not in (1, V) or any(size != 1 for size in sizes):
            raise LogitsNotMadeError(operation)
        vector = other.reshape(-1).expand(V) * alpha
        vector = vector if logits.vector is None else logits.vector + vector
        return logits._with(vector=vector)

    __add__ = __radd__ = add

    def sub(self, other: "Tensor | UnmadeLogits", *, alpha=1) -> "UnmadeLogits":
        if not isinstance(other, (Tensor, UnmadeLogits)):
            raise LogitsNotMadeError(f"the difference from {_name(other)}")
        return self.add(other, alpha=-alpha)

    __sub__ = subtract = sub

    def _sum(self, other: "UnmadeLogits") -> "UnmadeLogits":
        same = self.shape == other.shape and self.class_dim == other.class_dim
        if not same or other.softcap is not None or other.normalised:
            raise LogitsNotMadeError(f"the sum with {other}")
        vectors = [v for v in (self.vector, other.vector) if v is not None]
        vector = sum(vectors[1:], vectors[0]) if vectors else None
        return self._with(terms=self.terms + other.terms, vector=vector)

    def log_softmax(self, dim: int, dtype=None, **_stacklevel) -> "UnmadeLogits":
        if not isinstance(dim, int) or _layout.dimension(dim, self.ndim) != self.class_dim:
            raise LogitsNotMadeError(f"log_softmax over dimension {dim}, not {self.class_dim},")
        return self._with(normalised=True)

    # Everything else ------------------------------------------------------------------------------

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        given = dict(kwargs or {})
        first, *rest = args if args else (given.pop("input", None),)
        if isinstance(first, cls) and function is F.cross_entropy:
            return _cross_entropy(first, *rest, **given)
        if isinstance(first, cls) and function is F.nll_loss:
            return _nll_loss(first, *rest, **given)
        method = _METHODS.get(function)
        if not isinstance(first, cls) and len(rest) == 1 and not given:
            first, rest = rest[0], [first]
            method = method if method in ("add", "mul", "multiply") else None
            if function is Tensor.__rtruediv__:  # as torch.compile calls logits / tensor
                method = "div"
            elif function is Tensor.__rsub__:
                method = "sub"
        if method is None or not isinstance(first, cls):
            raise LogitsNotMadeError(getattr(function, "__name__", str(function)))
        return getattr(first, method)(*rest, **given)

    def __getattr__(self, name: str):
        raise LogitsNotMadeError(f"the attribute {name!r}")

    def __setitem__(self, index, value):
        raise LogitsNotMadeError("an assignment to entries")


def _refusing(operation: str) -> Callable:
    def refuse(self, *args):
        raise LogitsNotMadeError(operation)

    return refuse


# Python looks for these at the class, past its __getattr__, and has answers of its own where there
# are none: a TypeError without a reason, or for logits *= 2 another object, which leaves views of
# the logits that were taken before as they are.
_OPERATORS = {
    "bool": "their truth value",
    "float": "float()", "int": "int()", "abs": "abs()", "round": "round()", "pos": "+logits",
    "invert": "~", "contains": "a search (in)",
    "lt": "a comparison (<)", "le": "a comparison (<=)", "gt": "a comparison (>)",
    "ge": "a comparison (>=)",
    "rsub": "the difference of something and logits", "rtruediv": "a quotient by logits",
    **{f"{r}{name}": f"the operator {sign}" for r in ("", "r") for name, sign in (
        ("floordiv", "//"), ("mod", "%"), ("pow", "**"), ("matmul", "@"), ("and", "&"),
        ("or", "|"), ("xor", "^"), ("lshift", "<<"), ("rshift", ">>"),
    )},
    **{f"i{name}": f"a change in place ({sign}=; logits = logits {sign} ... makes new ones)"
       for name, sign in (
        ("add", "+"), ("sub", "-"), ("mul", "*"), ("truediv", "/"), ("floordiv", "//"),
        ("mod", "%"), ("pow", "**"), ("matmul", "@"), ("and", "&"), ("or", "|"), ("xor", "^"),
        ("lshift", "<<"), ("rshift", ">>"),
    )},
}  # fmt: skip
for _operator, _described in _OPERATORS.items():
    setattr(UnmadeLogits, f"__{_operator}__", _refusing(_described))


# PyTorch's functions, and the methods of tensors, that are methods here with the same arguments.
_METHODS = {
    getattr(owner, name): name
    for owner in (torch, Tensor, F)
    for name in (
        "add", "chunk", "clone", "div", "divide", "flatten", "index_select", "log_softmax",
        "moveaxis", "movedim", "mul", "multiply", "narrow", "neg", "negative", "numel", "permute",
        "reshape", "select", "split", "squeeze", "sub", "subtract", "swapaxes", "swapdims", "t", "tanh",
        "tensor_split", "transpose", "true_divide", "unbind", "unflatten", "unsqueeze",
    )
    if hasattr(owner, name)
}  # fmt: skip


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
    if isinstance(target, Tensor) and target.is_floating_point():
        raise LogitsNotMadeError(
            f"a cross-entropy with probabilities as targets (of {target.dtype}; labels are class "
            f"indices in int64: labels.long())"
        )
    classes_are_in = 1 if logits.ndim > 1 else 0
    if logits.class_dim != classes_are_in:
        raise LogitsNotMadeError(
            f"a cross-entropy over dimension {classes_are_in} of {tuple(logits.shape)}, whose "
            f"vocabulary is dimension {logits.class_dim},"
        )
    rows = (*logits.shape[:classes_are_in], *logits.shape[classes_are_in + 1 :])
    if target.shape != rows:
        raise ValueError(
            f"labels {checks.shape(target)} for logits {tuple(logits.shape)}: there must be one "
            f"label for each row (logits_to_keep leaves rows out, of the logits alone)"
        )
    options = dict(
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    return logits.compute(logits, target, options)


def _nll_loss(
    logits: UnmadeLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """F.nll_loss's arguments."""
    if not logits.normalised:
        raise LogitsNotMadeError("nll_loss without log_softmax")
    return _cross_entropy(logits, target, weight, size_average, ignore_index, reduce, reduction)


def _one_or_many(given: tuple, by_name) -> tuple:
    """What f(1, 2), f((1, 2)) and f(dims=(1, 2)) are given."""
    if by_name is not None:
        return by_name
    return given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given


def _name(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return repr(value)

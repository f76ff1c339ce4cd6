"""A user's function of a row's statistics: calling it, its derivatives, and whether its rows are
independent of each other."""

import collections
import dataclasses
import inspect
import weakref
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from .._core import checks
from ._function_key import FunctionKey

RowFunction = Callable[..., Tensor]


@dataclasses.dataclass
class _Seen:
    """A function that was seen to keep rows apart, with inputs of certain kinds."""

    evaluations: int = 1
    coupled: Tensor | None = None  # on CUDA, whether a later look saw otherwise: not waited for


_known: collections.OrderedDict[Hashable, _Seen] = collections.OrderedDict()  # the latest last
_MOST_KNOWN = 256
_ENOUGH_ROWS = 16  # with fewer a function may keep rows apart by chance
# How often the device was waited for, to look at a function of this code. With a number in its
# closure that changes in every step every step would wait.
_looks: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_MOST_LOOKS = 8


def evaluate(
    fn: RowFunction,
    key: FunctionKey | None,
    statistics: dict[str, Tensor],
    slices: dict[str, Tensor],
) -> Tensor:
    """fn of some rows, (R). `key`: of fn; None where it is traced. Where a row's result depends on
    other rows that is an error; under torch.compile, in a CUDA graph, and where fn's code was
    waited for on CUDA often enough, NaN. A function that was seen to keep rows apart is called
    once, and looked at again at its evaluations 2, 4, 8, ...: it may couple rows for some data
    only. Such a later look does not wait for CUDA: where it sees that, this result and all later
    ones are NaN."""
    out = _call(fn, statistics | slices)
    _check(out, statistics)
    if out.shape[0] < 2:
        return out
    if key is None:
        return torch.where(_couples(fn, statistics, slices, out), torch.nan, out)
    on_cuda = out.device.type == "cuda"
    is_captured = on_cuda and torch.cuda.is_current_stream_capturing()
    inputs = tuple((k, t.dtype, t.dim(), t.requires_grad) for k, t in (statistics | slices).items())
    known = key.value, inputs, out.device, out.requires_grad
    seen = _known.get(known) if key.is_complete and not is_captured else None
    if seen is not None:
        seen.evaluations += 1
        is_power_of_two = seen.evaluations & (seen.evaluations - 1) == 0
        if not is_power_of_two and not checks.looks_always():
            return out if seen.coupled is None else torch.where(seen.coupled, torch.nan, out)
    coupled = _couples(fn, statistics, slices, out)
    if seen is not None and not checks.may_look(out.device):
        seen.coupled = coupled if seen.coupled is None else coupled | seen.coupled
        return torch.where(seen.coupled, torch.nan, out)
    if is_captured or not (checks.may_look(out.device) or _may_wait(key)):
        return torch.where(coupled, torch.nan, out)
    coupled, tells = torch.stack((coupled, _tells(statistics | slices, out))).tolist()
    if coupled:
        _known.pop(known, None)
        raise ValueError(
            f"fn's result for a row depends on other rows of the chunk (seen with {out.shape[0]} "
            f"rows), or differs from call to call: rows come in chunks, so it may use the row's "
            f"own numbers only. Make means and normalisers of all tokens beforehand and pass them "
            f"by per_token or normalizer; losses that couple tokens of a sequence take "
            f"cutloss.losses.token_log_probs"
        )
    if tells and key.is_complete and seen is None:
        _known[known] = _Seen()
        if len(_known) > _MOST_KNOWN:
            _known.popitem(last=False)
    return out


def _may_wait(key: FunctionKey) -> bool:
    if key.code is None or _looks.get(key.code, 0) >= _MOST_LOOKS:
        return False
    _looks[key.code] = _looks.get(key.code, 0) + 1
    return True


def _tells(inputs: dict[str, Tensor], out: Tensor) -> Tensor:
    """Whether _couples could see something: there are rows enough, and what it changed in other
    rows was something else before, in each column of each input. Where all rows are alike, as with
    a classifier of zeros, a mean over them is each row's own."""
    varies = ~_same(out, out[:1]).all() & (out.shape[0] >= _ENOUGH_ROWS)
    for t in inputs.values():
        varies = varies & (t[1::2] != t[:1]).any(0).all()
    return varies


def _call(fn: RowFunction, rows: dict[str, Tensor]) -> Tensor:
    named = dict(rows)
    nll = named.pop("nll")
    with torch.autocast(nll.device.type, enabled=False):  # a second backward may be outside of it
        return fn(nll, **named)


def check_parameters(fn: RowFunction, names: tuple[str, ...]) -> None:
    """That fn can be called with nll and these."""
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # not to be known of some builtins
        return
    try:
        signature.bind(None, **dict.fromkeys(names))
    except TypeError as error:
        given = ", ".join(("nll", *names))
        raise TypeError(
            f"fn takes {signature}, and is called with {given} ({error}): entropy=True and lse=True "
            f"give it these statistics, per_token its entries by their names"
        ) from None


def check_gradient(out: Tensor, statistics: dict[str, Tensor]) -> None:
    """That what `out` depends on are the statistics, and nothing beside them."""
    if not out.requires_grad:
        raise ValueError(
            "fn's result has no gradient: it uses none of nll, lse and entropy, or detaches all of "
            "them; call linear_token_loss under torch.no_grad() where only the loss is wanted"
        )
    for leaf in _leaves(out, statistics):
        raise NotImplementedError(
            f"fn uses a tensor of shape {checks.shape(leaf)} that requires a gradient, and "
            f"linear_token_loss makes those of e, c and bias alone: detach it, or make the loss "
            f"of cutloss.losses.token_log_probs"
        )


def _check(out: Tensor, statistics: dict[str, Tensor]) -> None:
    rows = next(iter(statistics.values()))
    if not isinstance(out, Tensor):
        raise TypeError(f"fn must return a tensor, got {type(out).__name__}")
    if out.shape != rows.shape:
        raise ValueError(
            f"fn must return one loss of each row, of shape {checks.shape(rows)}, got "
            f"{checks.shape(out)}: leave sums and means over rows to normalizer"
        )
    if not out.is_floating_point():
        raise TypeError(f"fn must return floating point numbers, got {out.dtype}")


def _couples(
    fn: RowFunction, statistics: dict[str, Tensor], slices: dict[str, Tensor], out: Tensor
) -> Tensor:
    """Whether even rows change, in a single bit, with what odd rows hold; or odd rows by more than
    rounding where they come alone and in reverse; or derivatives of even rows reach odd rows."""
    odd = torch.arange(out.shape[0], device=out.device) % 2 == 1
    rows = {k: t.detach() for k, t in (statistics | slices).items()}

    def changed(t: Tensor) -> Tensor:
        return torch.where(odd.view(-1, *[1] * (t.dim() - 1)), t[:1], t)

    def fewer(t: Tensor) -> Tensor:
        return t[1::2].flip(0)

    with torch.no_grad():
        again = _call(fn, {k: changed(t) for k, t in rows.items()})
        coupled = ~(_same(again, out) | odd).all()
        some, of_some = _call(fn, {k: fewer(t) for k, t in rows.items()}), fewer(out.detach())
        _check(some, {k: fewer(t) for k, t in statistics.items()})
        # Vectors end elsewhere now, which may round otherwise.
        size = of_some.abs()
        near = (some - of_some).abs() <= 1e-3 * size + 1e-5 * size.nan_to_num(0, 0, 0).amax()
        coupled = coupled | ~(near | _same(some, of_some)).all()
    if out.requires_grad and not torch.compiler.is_compiling():
        leaves = [t for t in statistics.values() if t.requires_grad]
        even = (~odd).to(out.dtype)
        grads = torch.autograd.grad(out, leaves, even, retain_graph=True, allow_unused=True)
        for g in grads:
            if g is not None:
                coupled = coupled | (odd & (g != 0) & ~g.isnan()).any()
    return coupled


def _same(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan())


def _leaves(out: Tensor, statistics: dict[str, Tensor]):
    """The tensors that autograd would give gradients to, but for the statistics and what those are
    made of."""
    seen = {t.grad_fn for t in statistics.values()}  # where the search ends
    own = {id(t) for t in statistics.values()}
    todo = [out.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable") and id(node.variable) not in own:
            yield node.variable
        todo.extend(following for following, _ in node.next_functions)

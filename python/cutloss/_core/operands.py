"""From the arguments that users give to the operands and options of the operators."""

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from .._torch import partitioned
from .._torch import library, private
from . import checks, weighting
from .options import LossOptions, Options


def checked_options(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    *,
    temperature: float | Tensor,
    num_valid: int | None,
    classes: tuple[int, int] | None = None,
    weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    normalizer: Tensor | None = None,
    device: str | None = None,
    **said: Any,
) -> tuple[LossOptions, Options]:
    """Checks what describes the loss: in the caller's words, and in the operators'. `said`: what
    LossOptions has besides. `classes`: of a shard, its first one and how many the vocabulary has.
    The tensors must all be where e is. `device`: the type of the one that the loss is for, if
    that is another."""
    checks.tensors(
        e=e, c=c, targets=targets, bias=bias, weight=weight, token_weight=token_weight,
        normalizer=normalizer,
    )  # fmt: skip
    checks.shapes(e, c, targets, bias, least_classes=1 if classes is None else 0)
    compute_dtype = checks.dtypes(e, c, bias, targets, device)
    own_temperature = temperature if isinstance(temperature, Tensor) else None
    if not said.get("plain"):
        checks.device(e, library.HAS_CUDA)
    checks.same_device(
        e, c=c, targets=targets, bias=bias, temperature=own_temperature, weight=weight,
        token_weight=token_weight, normalizer=normalizer,
    )  # fmt: skip
    loss = LossOptions.checked(temperature=temperature, **said)
    checks.ignore_index(loss.ignore_index, targets)
    if own_temperature is not None:
        checks.temperature(own_temperature, targets)
    shift = checks.shift(loss.shift, targets)
    allow_tf32 = library.allow_tf32(e.device.type, compute_dtype)
    options = loss.operators(compute_dtype, shift, allow_tf32)
    checks.usable(
        options.stats, softcap=loss.softcap, logit_scale=loss.logit_scale,
        temperature=loss.temperature, quotient=loss.logit_scale / loss.temperature,
    )  # fmt: skip
    if num_valid is not None:
        checks.num_valid(num_valid, math.prod(shape_of_rows(targets, shift)), loss.ignore_index)
        options = options.but(num_valid=num_valid)
    if classes is not None:
        first, total = classes
        options = options.but(first_class=first, total_classes=total)
    return loss, options


def make_operands(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    class_weight: Tensor | None,
    options: Options,
    plain: bool = False,
) -> tuple:
    """The operators' tensors: e (sequences, length, D), targets (sequences, length), the
    temperature of each row."""
    shift, ignore_index = options.shift, options.ignore_index
    traced = torch.compiler.is_compiling()
    if not (plain or traced) and private.is_ordinary(e) and private.is_ordinary(c):
        partitioned.check_memory(e, c)
    labels = in_sequences(targets)
    row_temperature = None
    if isinstance(temperature, Tensor):
        # Ignored rows may hold anything there, a padding of 0 for one.
        stats = options.stats
        t = temperature.expand(targets.shape).reshape(labels.shape)
        counts = weighting.of_rows(labels, shift) != ignore_index
        row_temperature = torch.where(counts, weighting.of_rows(t, shift).to(stats), 1.0)
    e = e.reshape(*labels.shape, e.shape[-1]) if e.dim() != 3 else e
    if not plain:
        check_values(c, labels, row_temperature, options)
    return e, c, bias, labels, row_temperature, class_weight


def check_values(
    c: Tensor, labels: Tensor, row_temperature: Tensor | None, options: Options
) -> None:
    """On CUDA, and where it is asked for: on the CPU the operators look."""
    if c.is_cuda and checks.may_look(c.device):
        V = options.vocabulary(c)
        checks.values(
            labels, row_temperature, options.shift, V, options.ignore_index, options.num_valid
        )


def warn_of_no_weight(
    undefined: Tensor | None, how: weighting.Weighting, labels: Tensor, options: Options
) -> None:
    """Says that token weights of nothing make a mean of nothing, of which nothing is learned, where
    tokens do count; where none does everybody knows. `labels`: (sequences, length)."""
    if undefined is None or how.token_weight is None or how.reduction != "mean":
        return
    if not (checks.may_look(undefined.device) and private.is_ordinary(undefined)):
        return
    if undefined and (weighting.of_rows(labels, options.shift) != options.ignore_index).any():
        # The same words from the same line, so that Python says them once.
        warnings.warn(
            "token_weight adds up to 0 over the tokens that count (where weight is given, times "
            "the weight of their class), so their mean is NaN and its gradients are zero: nothing "
            "is learned. Leave such batches out, or take reduction='sum' and divide by a number of "
            "your own"
        )


def shape_of_rows(targets: Tensor, shift: int) -> tuple[int, ...]:
    """The shape of per-token results."""
    if targets.dim() == 0:
        return ()
    return (*targets.shape[:-1], targets.shape[-1] - shift)


def in_sequences(t: Tensor) -> Tensor:
    """(sequences, length): what has the shape of targets."""
    return t if t.dim() == 2 else t.reshape(math.prod(t.shape[:-1]), t.shape[-1] if t.dim() else 1)

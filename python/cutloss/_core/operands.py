"""From the arguments that users give to the operands and options of the operators."""

import math
import warnings

import torch
from torch import Tensor

from .. import _sharded
from .._torch import library, private
from . import checks, weighting
from .options import SCHEDULES, Options


def checked_options(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    *,
    ignore_index: int,
    softcap: float | None,
    shift: bool | int,
    logit_scale: float,
    temperature: float | Tensor,
    max_workspace: int | None,
    schedule: str,
    num_valid: int | None,
    plain: bool = False,
    return_lse: bool = False,
    return_entropy: bool = False,
    return_predictions: bool = False,
    classes: tuple[int, int] | None = None,
    **others: Tensor | None,
) -> Options:
    """Checks what describes the loss, and puts it into the operators' words. `others`: tensors that
    must be where e is. `classes`: of a shard, its first one and how many the vocabulary has."""
    checks.tensors(e=e, c=c, targets=targets, bias=bias, **others)
    checks.shapes(e, c, targets, bias, least_classes=1 if classes is None else 0)
    compute_dtype = checks.dtypes(e, c, bias, targets)
    if not plain:
        checks.device(e, library.HAS_CUDA)
    checks.same_device(
        e,
        c=c,
        targets=targets,
        bias=bias,
        temperature=temperature if isinstance(temperature, Tensor) else None,
        **others,
    )
    checks.choice("schedule", schedule, ("auto", "rows", "vocabulary"))
    checks.flags(
        return_lse=return_lse, return_entropy=return_entropy, return_predictions=return_predictions
    )
    checks.ignore_index(ignore_index, targets)
    checks.max_workspace(max_workspace)
    checks.temperature(temperature, targets)
    checks.plain_options(plain, schedule, max_workspace)
    shift = checks.shift(shift, targets)
    checks.num_valid(num_valid, math.prod(shape_of_rows(targets, shift)), ignore_index)
    first_class, total_classes = classes or (0, 0)
    return Options(
        compute_dtype,
        first_class=first_class,
        total_classes=total_classes,
        shift=shift,
        ignore_index=ignore_index,
        softcap=checks.softcap(softcap),
        logit_scale=checks.logit_scale(logit_scale),
        temperature=1.0 if isinstance(temperature, Tensor) else float(temperature),
        wants_entropy=return_entropy,
        wants_argmax=return_predictions,
        schedule=SCHEDULES[schedule],
        max_workspace=max_workspace,
        num_valid=num_valid,
        allow_tf32=library.allow_tf32(e.device.type, compute_dtype),
    )


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
        _sharded.check_memory(e, c)
    labels = in_sequences(targets)
    row_temperature = None
    if isinstance(temperature, Tensor):
        # Ignored rows may hold anything there, a padding of 0 for one.
        stats = options.stats
        t = temperature.expand(targets.shape).reshape(labels.shape)
        counts = weighting.of_rows(labels, shift) != ignore_index
        row_temperature = torch.where(counts, weighting.of_rows(t, shift).to(stats), 1.0)
    e = e.reshape(*labels.shape, e.shape[-1]) if e.dim() != 3 else e
    if not plain and e.device.type == "cuda" and checks.may_look(e.device):
        num_valid = options.num_valid
        V = options.vocabulary(c)
        checks.values(labels, row_temperature, shift, V, ignore_index, num_valid)
    return e, c, bias, labels, row_temperature, class_weight


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

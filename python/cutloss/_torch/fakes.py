"""Shapes of what the operators return, for tracing. Of the options PyTorch passes those that are not
their defaults."""

import torch
from torch import Tensor

from .._core.options import Options, stat_dtype
from . import library  # noqa: F401  the operators must be there


def _per_row(of: Tensor, options: Options, terms: Tensor | None) -> tuple:
    """loss, nll, lse, row_max, log_sum, entropy, zbar_centred, argmax.
    `of`: (sequences, length, ...)"""
    stats = options.stats
    rows = of.shape[0] * (of.shape[1] - options.shift)

    def per_row(wanted: bool = True, dtype: torch.dtype = stats) -> Tensor:
        return of.new_empty((rows if wanted else 0,), dtype=dtype)

    return (
        of.new_empty(() if terms is not None else (0,), dtype=stats),
        per_row(),
        per_row(),
        per_row(),
        per_row(),
        per_row(options.wants_entropy),
        per_row(options.wants_zbar),
        per_row(options.wants_argmax, torch.int64),
    )


def _loss_and_argmax(of: Tensor, options: Options) -> tuple:
    rows = of.shape[0] * (of.shape[1] - options.shift) if options.wants_argmax else 0
    loss = of.new_empty((), dtype=options.stats)
    return loss, of.new_empty((rows,), dtype=torch.int64)


def _gradients(e: Tensor, c: Tensor, bias: Tensor | None, options: Options) -> tuple:
    de_dtype = options.stats if options.de_in_sums else e.dtype
    de = e.new_empty(e.shape if options.needs_de else (0,), dtype=de_dtype)
    dc = c.new_empty(c.shape if options.needs_dc else (0,))
    if options.needs_dbias:
        return de, dc, bias.new_empty(bias.shape)
    return de, dc, e.new_empty((0,), dtype=torch.float32 if bias is None else bias.dtype)


@torch.library.register_fake("cutloss::statistics")
def _(e, c, bias, targets, row_temperature, class_weight, terms=None, undefined=None, **options):
    options = Options(**options)
    kept = e.new_empty((options.kept_bytes,), dtype=torch.uint8)
    return *_per_row(e, options, terms), kept


@torch.library.register_fake("cutloss::gradients")
def _(e, c, bias, *_, **options):
    return _gradients(e, c, bias, Options(**options))


@torch.library.register_fake("cutloss::loss_and_gradients")
def _(e, c, bias, *_, **options):
    options = Options(**options)
    made = _loss_and_argmax(e, options)
    return *made, *_gradients(e, c, bias, options)


@torch.library.register_fake("cutloss::logits_statistics")
def _(logits, targets, row_temperature, class_weight, terms=None, undefined=None, **options):
    return _per_row(logits, Options(logits.dtype, **options), terms)


@torch.library.register_fake("cutloss::logits_gradient")
def _(logits, *_, **options):
    return logits.new_empty(logits.shape)


@torch.library.register_fake("cutloss::logits_loss_and_gradient")
def _(logits, *_, **options):
    return *_loss_and_argmax(logits, Options(logits.dtype, **options)), logits.new_empty(logits.shape)


@torch.library.register_fake("cutloss::logits_gradient_")
def _(logits, *_, **options):
    return None


@torch.library.register_fake("cutloss::logits_loss_and_gradient_")
def _(logits, *_, **options):
    return _loss_and_argmax(logits, Options(logits.dtype, **options))


@torch.library.register_fake("cutloss::loss_terms")
def _(
    targets,
    token_weight,
    class_weight,
    compute_dtype,
    V,
    shift,
    ignore_index,
    mean,
    label_smoothing,
    z_loss,
):
    count = 1 + (2 if label_smoothing > 0 else 0) + (1 if z_loss > 0 else 0)
    rows = targets.shape[0] * (targets.shape[1] - shift)
    terms = targets.new_empty((count, rows), dtype=stat_dtype(compute_dtype))
    return terms, targets.new_empty((), dtype=torch.bool)


@torch.library.register_fake("cutloss::scale_")
def _(t, factor):
    return None

"""The passes of a sharded classifier as operators, for traced code: one opaque operator a pass. What
is no tensor comes in words, the group by its name."""

import ast
import dataclasses
import functools

import torch
from torch import Tensor

from .._core.options import Options
from ..sharded import Shard
from . import private
from .autograd import Saved
from .operators import Outputs
from .shards import ShardedLinear, Tokens

_FIELDS = tuple(f.name for f in dataclasses.fields(Options) if f.name != "compute_dtype")


def in_words(computation: ShardedLinear) -> str:
    options, shard, tokens = computation.options, computation.shard, computation.tokens
    dtype = str(options.compute_dtype).split(".")[1]
    values = ", ".join([f"{getattr(options, name)!r}" for name in _FIELDS])
    ranges = ", ".join([f"({start}, {stop})" for start, stop in shard.ranges])
    flags = f"{shard.reduce_e_grad}, {shard.sequence_parallel}"
    lies = "None"
    if tokens is not None:
        own = ", ".join([f"{n}" for n in tokens.own])
        whole = ", ".join([f"{n}" for n in tokens.whole])
        lies = f"({tokens.dim}, {tokens.ranks}, ({own},), ({whole},))"
    return (
        f"('{dtype}', ({values},), ({ranges},), {shard.rank}, '{shard.group_name}', {flags}, {lies}, "
        f"'{computation.weighting}')"
    )


# A group of that name is looked for in each call: one that was destroyed may have had it before.
_parsed = functools.lru_cache(maxsize=64)(ast.literal_eval)


def _of_words(words: str) -> ShardedLinear:
    dtype, values, ranges, rank, name, reduces, shares_tokens, lies, weighting = _parsed(words)
    options = Options(getattr(torch, dtype), **dict(zip(_FIELDS, values, strict=True)))
    group = private.group_named(name)
    shard = Shard(ranges, rank, group, name, reduces, shares_tokens)
    tokens = None
    if lies is not None:
        dim, ranks, own, whole = lies
        tokens = Tokens(dim, ranks, torch.Size(own), torch.Size(whole))
    return ShardedLinear(options, shard, tokens, weighting)


@torch.library.custom_op("cutloss::sharded_tokens", mutates_args=())
def sharded_tokens(e: Tensor, words: str) -> Tensor:
    """The e of all tokens."""
    computation = _of_words(words)
    assert computation.tokens is not None
    return computation.tokens.gathered(e, computation.shard)


@sharded_tokens.register_fake
def _(e, words):
    return e.new_empty(_of_words(words).tokens.whole)


# e: the caller's; whole_e: where it has a share of the tokens, (sequences, length, D).
@torch.library.custom_op("cutloss::sharded_statistics", mutates_args=())
def sharded_statistics(
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_temperature: Tensor | None,
    class_weight: Tensor | None,
    whole_e: Tensor | None,
    words: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    gathered = () if whole_e is None else (whole_e,)
    given = Saved((e, c, bias), (targets, row_temperature, class_weight, None), gathered)
    return tuple(_of_words(words).outputs(given)[1:])


@sharded_statistics.register_fake
def _(e, c, bias, targets, row_temperature, class_weight, whole_e, words):
    options = _of_words(words).options
    rows = targets.shape[0] * (targets.shape[1] - options.shift)

    def per_row(wanted=True, dtype=options.stats):
        return e.new_empty((rows if wanted else 0,), dtype=dtype)

    return (
        per_row(), per_row(), per_row(), per_row(), per_row(options.wants_entropy),
        per_row(options.wants_zbar), per_row(options.wants_argmax, torch.int64),
        e.new_empty((options.kept_bytes,), dtype=torch.uint8),
    )  # fmt: skip


@torch.library.custom_op("cutloss::sharded_gradients", mutates_args=())
def sharded_gradients(
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_temperature: Tensor | None,
    class_weight: Tensor | None,
    nll: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    kept: Tensor,
    d_nll: Tensor | None,
    d_lse: Tensor | None,
    d_log_sum: Tensor | None,
    d_entropy: Tensor | None,
    d_zbar: Tensor | None,
    words: str,
) -> tuple[Tensor, Tensor, Tensor]:
    computation = _of_words(words)
    constants = targets, row_temperature, class_weight, None
    saved = Saved((e, c, bias), constants, (nll, row_max, log_sum, entropy, kept))
    upstream = None, d_nll, d_lse, d_log_sum, d_entropy, d_zbar
    gradients = computation.gradients(saved, computation.options.needs, upstream)
    return tuple(e.new_empty((0,)) if g is None else g for g in gradients)


@sharded_gradients.register_fake
def _(e, c, bias, *rest):
    de, dc, dbias = _of_words(rest[-1]).options.needs
    none = e.new_empty((0,))
    return (
        e.new_empty(e.shape) if de else none,
        c.new_empty(c.shape) if dc else none,
        bias.new_empty(bias.shape) if dbias else none,
    )


def _keep(ctx, inputs, output):
    *tensors, whole_e, words = inputs
    ctx.computation = _of_words(words)
    ctx.words = words
    outputs = Outputs(None, *output)
    ctx.save_for_backward(*tensors, *outputs.saved())
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*outputs.constant())


def _backward(ctx, *upstream):
    d = Outputs(None, *upstream)
    wanted = (d.nll, d.lse, d.log_sum, d.entropy, d.zbar_centred)
    gradients = torch.ops.cutloss.sharded_gradients(*ctx.saved_tensors, *wanted, ctx.words)
    de, dc, dbias = ctx.computation.wanted(gradients)
    return de, dc, dbias, None, None, None, None, None


torch.library.register_autograd("cutloss::sharded_statistics", _backward, setup_context=_keep)

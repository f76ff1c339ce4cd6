"""``linear_cross_entropy``: the loss of a large-vocabulary model without its logits."""

import enum
import difflib
import inspect
from typing import Any

import torch
from torch import Tensor

from . import sharded
from ._core import checks, decide, weighting
from ._core.operands import (
    checked_options,
    in_sequences,
    make_operands,
    shape_of_rows,
    warn_of_no_weight,
)
from ._core.options import Options
from ._core.plan import Plan
from ._implementations import LinearCrossEntropyImpl, is_plain
from ._torch import autograd, library, operators, private, repeated, shards
from ._torch.partitioned import is_dtensor
from ._torch.plain import statistics as plain_statistics
from ._torch.repeated import Settled
from .sharded import VocabParallelOptions

# The attribute of a c that names a tensor to which its gradient is to be added, in the dtype of the
# sums, instead of being made (integrations/megatron.py).
ADDS_TO = "_cutloss_adds_to"


def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool | int = 0,
    return_lse: bool = False,
    filter_eps: float | str | None = "auto",
    accum_e_fp32: bool = False,
    accum_c_fp32: bool = False,
    filter_e_grad: bool = True,
    filter_c_grad: bool = True,
    impl: str | enum.Enum = LinearCrossEntropyImpl.CCE,
    vocab_parallel_options: VocabParallelOptions | None = None,
    *,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    return_entropy: bool = False,
    return_predictions: bool = False,
    z_loss: float = 0.0,
    max_workspace: int | None = None,
    schedule: str = "auto",
    num_valid: int | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Cross-entropy of the logits ``e @ c.T`` against ``targets``, without storing the logits.

    Equal to, with exact gradients for ``e``, ``c`` and ``bias``::

        z = logit_scale * (e @ c.T) + bias
        z = softcap * tanh(z / softcap)          # where a softcap is given
        z = z / temperature
        loss = F.cross_entropy(z.float(), targets, weight, ignore_index=ignore_index,
                               reduction=reduction, label_smoothing=label_smoothing)

    :param e: Embeddings, shape (..., D). Read in place where each row is contiguous and rows lie
        one after the other (slices do); other layouts are copied for the call.
    :param c: Classifier, shape (V, D), in the dtype of ``e``. Under ``torch.autocast`` the dtypes
        may differ: products are made in autocast's dtype, gradients come back in each tensor's
        own, accumulated in fp32. A transposed ``c`` is copied for the call.
    :param targets: Class indices, int64 or int32, shape (...): each in [0, V), or ignore_index. On
        the CPU anything else is an error. On CUDA, where looking would wait for the device, it
        makes the token's loss NaN, and with it the token's row of e's gradient, and c's gradient;
        with CUTLOSS_CHECK=1 in the environment calls do wait, and raise the CPU's error.
    :param bias: Added to the logits, shape (V).
    :param ignore_index: Tokens with this target are left out: they cost nothing (on CUDA, where
        the host knows their number: see num_valid), their gradient is zero and their entry in
        every per-token result is 0 (in predictions -1). The mean over no token at all is NaN,
        with gradients of zero.
    :param softcap: Caps the logits smoothly: ``softcap * tanh(logits / softcap)``.
    :param reduction: "mean" (over tokens that count; with weights the weighted mean), "sum", or
        "none" for the loss of each token, in the shape of targets less ``shift``.
    :param shift: Predict the target ``shift`` positions later, without copying ``e``: position t
        of ``e`` is scored against target t + shift and the last ``shift`` positions of each
        sequence predict nothing. True is 1. The last dimension of targets is the sequence; it
        is ``shift`` shorter in per-token results. Sequences of ``shift`` tokens or fewer predict
        nothing at all, which is no error: see ignore_index for the mean of nothing.
    :param return_lse: Also return the log-sum-exp of each token's logits; it carries a gradient.
        Asked for while gradients are wanted, it (as return_entropy, and reduction="none") rules
        out making the gradients along with the loss, which costs memory or a fourth product; for
        the penalty on its square there is z_loss, which does not.
    :param filter_eps: Accepted and not needed: gradients are exact, nothing is filtered.
    :param accum_e_fp32: Accepted and not needed: always so.
    :param accum_c_fp32: Accepted and not needed: always so.
    :param filter_e_grad: Accepted and not needed, as filter_eps.
    :param filter_c_grad: Accepted and not needed, as filter_eps.
    :param impl: "torch" stores the logits and uses PyTorch's own operators (slow, and with second
        derivatives). Every other name, all those of cut_cross_entropy among them, is the exact
        engine.
    :param vocab_parallel_options: c is this rank's shard of a classifier whose other classes other
        ranks have (VocabParallelOptions, which says what is whose). bias is the shard's too;
        targets, weight and V are those of the whole vocabulary.
    :param logit_scale: A number that multiplies the logits before the bias.
    :param temperature: Divides the logits: a number, or a tensor that broadcasts to targets' shape
        (the entry of the target's position counts). Takes no gradient.
    :param label_smoothing: As in F.cross_entropy, in [0, 1].
    :param weight: Class weights, shape (V), as in F.cross_entropy. Takes no gradient.
    :param token_weight: Weight of each token, in the shape of targets. May carry a gradient.
        The mean divides by the sum of the weights of the tokens that count. Where that is 0 though
        tokens count, the mean is NaN, with gradients of zero: a warning says so, once, on the CPU,
        and on CUDA with CUTLOSS_CHECK=1; under torch.compile there is none.
    :param return_entropy: Also return the entropy of each token's distribution, with a gradient.
    :param return_predictions: Also return the largest logit's index of each token.
    :param z_loss: Adds ``z_loss * lse**2`` of each token to its loss; under "mean" the mean over
        tokens that count, weighted by token_weight (class weights do not enter).
    :param max_workspace: Bytes of memory the call may use beside its inputs and gradients, what is
        kept for backward included. Unset: 512 MiB, or what the smallest schedule needs where that
        is more; on CUDA at least 4 N D bytes and 128 MiB, and a copy of ``c`` where autocast
        converts it. More memory may save one
        of four matrix products.
    :param schedule: "auto" takes the quickest that fits max_workspace. "rows" makes the gradients
        chunk by chunk of rows, with three products; "vocabulary" recomputes the logits, with four
        products and the least memory.
    :param num_valid: How many targets are not ignore_index (with a shift, of those that are
        predicted), where the caller knows, as most collators do. Never needed. On CUDA it lets the
        products shrink to those tokens, since their number is not read back from the device, and a
        wrong number makes every result NaN; on the CPU a wrong one is an error.
    :return: The loss, fp32 (fp64 for fp64 inputs), or a tuple of the loss and, in this order,
        what was asked for: lse, entropy, predictions.
    """
    said = (
        ignore_index, softcap, reduction, shift, return_lse, filter_eps, impl, logit_scale,
        temperature, label_smoothing, return_entropy, return_predictions, z_loss, max_workspace,
        schedule, num_valid,
    )  # fmt: skip
    key = None
    if (
        vocab_parallel_options is None
        and weight is None
        and token_weight is None
        and not isinstance(temperature, Tensor)
        and getattr(c, ADDS_TO, None) is None
    ):
        key = repeated.key(e, c, targets, bias, said)
    settled = repeated.found(key)
    if settled is not None:
        operands = repeated.operands(e, c, targets, bias, settled.options)
        loss, rows = _evaluate(settled, operands)
    else:
        loss, rows, settled = _settle_and_evaluate(
            e, c, targets, bias, key, vocab_parallel_options,
            ignore_index=ignore_index, softcap=softcap, reduction=reduction, shift=shift,
            return_lse=return_lse, filter_eps=filter_eps, plain=is_plain(impl),
            logit_scale=logit_scale, temperature=temperature, label_smoothing=label_smoothing,
            weight=weight, token_weight=token_weight, return_entropy=return_entropy,
            return_predictions=return_predictions, z_loss=z_loss, max_workspace=max_workspace,
            schedule=schedule, num_valid=num_valid,
        )  # fmt: skip

    if reduction == "none":
        loss = loss.reshape(settled.row_shape)
    if not (return_lse or return_entropy or return_predictions):
        return loss
    extras = ((return_lse, rows.lse), (return_entropy, rows.entropy))
    extras += ((return_predictions, rows.argmax),)
    return (loss, *(t.reshape(settled.row_shape) for wanted, t in extras if wanted))


def _settle_and_evaluate(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    key: tuple | None,
    vocab_parallel_options: VocabParallelOptions | None,
    plain: bool,
    **said: Any,
) -> tuple[Tensor, weighting.Rows, Settled]:
    """A call that is not known from before. `said`: its other options, as checked_options takes
    them."""
    if is_dtensor(c):
        e, c, bias, targets, vocab_parallel_options = sharded.local(
            e, c, bias, targets, vocab_parallel_options
        )
    shard = None if vocab_parallel_options is None else sharded.resolved(vocab_parallel_options)
    with shards.call(shard, e, targets, said["shift"]) as of_shard:
        if of_shard is not None:
            e = of_shard.whole_e(lambda: sharded.check(shard, c, plain))
        classes = None if shard is None else (shard.first, shard.total)
        options, how = _described(e, c, targets, bias, classes, plain=plain, **said)
        dc_into = getattr(c, ADDS_TO, None)
        if dc_into is not None:
            options = options.but(dc_adds=True)
        if shard is not None:
            options = options.but(de_in_sums=shard.reduce_e_grad or shard.sequence_parallel)
        operands = make_operands(
            e, c, targets, bias, said["temperature"], _class_weight(how, options), options, plain
        )
        if how.token_weight is not None:
            how.token_weight = in_sequences(how.token_weight)
        row_shape = shape_of_rows(targets, options.shift)
        if plain:
            settled = Settled(options, how, None, row_shape, is_ordinary=False)
            return *_evaluate_plainly(settled, operands, said["return_lse"]), settled
        known_at_forward = (
            of_shard is None
            and dc_into is None
            and not _weighs_in_torch(how)
            and _known_at_forward(how, options, said["return_lse"])
        )
        own_e = None if of_shard is None else of_shard.own_e
        options, is_at_once = decide.decided(operands, options, known_at_forward, own_e)
        if known_at_forward and not any(options.needs):
            is_at_once = not private.is_in_forward_mode()  # which _evaluate refuses
        is_ordinary, at_once = key is not None, None
        if is_at_once:
            at_once = operators.Linear(
                options, weighs=how.of_operator(), is_ordinary=is_ordinary
            )
        settled = Settled(options, how, at_once, row_shape, is_ordinary)
        repeated.remember(key, settled)
        return *_evaluate(settled, operands, of_shard, dc_into), settled


def _described(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    classes: tuple[int, int] | None,
    *,
    weight: Tensor | None,
    token_weight: Tensor | None,
    **others: Any,
) -> tuple[Options, weighting.Weighting]:
    """A call's options and how its rows count, checked. `classes`, `others`: as checked_options
    takes them."""
    loss, options = checked_options(
        e, c, targets, bias, classes=classes, weight=weight, token_weight=token_weight, **others
    )
    if weight is not None:
        checks.weight(weight, c, options.vocabulary(c))
    if token_weight is not None:
        checks.token_weight(token_weight, targets)
    how = weighting.Weighting(
        reduction=loss.reduction,
        label_smoothing=loss.label_smoothing,
        z_loss=loss.z_loss,
        weight=weight,
        token_weight=token_weight,
    )
    return options, how


def _weighs_in_torch(how: weighting.Weighting) -> bool:
    return (
        autograd.wants_gradient(how.token_weight)
        or private.is_transformed()
        or private.have_tangent(how.token_weight, how.weight)
    )


def _known_at_forward(how: weighting.Weighting, options: Options, wants_lse: bool) -> bool:
    """Whether forward knows what gradient each row's loss will get, up to one factor: the loss is a
    sum of rows, and no per-token result beside it may get a gradient of its own."""
    return how.reduction != "none" and not wants_lse and not options.wants_entropy


def _class_weight(how: weighting.Weighting, options: Options) -> Tensor | None:
    """As the operators take it: where it enters the mean logit of label smoothing."""
    return how.weight.to(options.stats) if options.wants_zbar and how.weight is not None else None


def _evaluate_plainly(
    settled: Settled, operands: tuple, wants_lse: bool
) -> tuple[Tensor, weighting.Rows]:
    """As _evaluate, of PyTorch's own operators."""
    options, how = settled.options, settled.how
    terms = _terms_in_torch(settled, operands)
    rows = plain_statistics(*operands, options, wants_lse or terms.lse_squared is not None)
    return weighting.loss(terms, rows, how.reduction), rows


def _terms_in_torch(settled: Settled, operands: tuple) -> weighting.Terms:
    options, how = settled.options, settled.how
    c, labels = operands[1], operands[3]
    V, stats = options.vocabulary(c), options.stats
    terms = weighting.terms(labels, V, how, options.shift, options.ignore_index, stats)
    warn_of_no_weight(terms.undefined, how, labels, options)
    return terms


def _evaluate(
    settled: Settled,
    operands: tuple,
    of_shard: shards.Call | None = None,
    dc_into: Tensor | None = None,
) -> tuple[Tensor, weighting.Rows]:
    """The loss, per row where nothing is reduced, and the per-row outputs."""
    options, how, at_once, _, is_ordinary = settled
    c, labels = operands[1], operands[3]
    if at_once is not None:
        weights = (None, None)
        if not is_ordinary:
            # Copies: backward keeps them, and those of the caller may change, or be inference's.
            weights = how.tensors(options.stats, copy=any(options.needs))
        loss, rows, undefined = operators.loss_at_once(at_once, operands, weights)
        warn_of_no_weight(undefined, how, labels, options)
        return loss, rows
    computation = operators.Linear(options, dc_into=dc_into, is_ordinary=is_ordinary)

    def statistics() -> weighting.Rows:
        if of_shard is None:
            return operators.statistics(computation, operands)
        of_shard.dc_into = dc_into
        of_shard.weighting = how.in_words()
        return of_shard.statistics(operands, options)

    if not is_ordinary and _weighs_in_torch(how):
        rows = statistics()
        return weighting.loss(_terms_in_torch(settled, operands), rows, how.reduction), rows
    if how.changes_nothing():
        rows = statistics()
        # A copy: backward reads nll again, and the loss is the caller's to change in place.
        return (rows.nll.clone() if any(options.needs) else rows.nll), rows
    terms, undefined = library.loss_terms(labels, options.vocabulary(c), how, options)
    warn_of_no_weight(undefined, how, labels, options)
    if how.reduction == "none" or of_shard is not None:
        rows = statistics()
        unpacked = weighting.unpacked(terms)
        unpacked.undefined = undefined
        return weighting.loss(unpacked, rows, how.reduction), rows
    return operators.loss(computation, operands, terms, undefined, immediate=False)


_SIGNATURE = inspect.signature(linear_cross_entropy)


def plan(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    device: torch.device | str | None = None,
    **options: Any,
) -> Plan:
    """What :func:`linear_cross_entropy` decides for a call, before anything is computed::

        e = torch.empty(8192, 4096, dtype=torch.bfloat16, device="meta", requires_grad=True)
        c = torch.empty(128256, 4096, dtype=torch.bfloat16, device="meta", requires_grad=True)
        targets = torch.empty(8192, dtype=torch.int64, device="meta")
        p = cutloss.plan(e, c, targets, device="cuda")
        print(p.algorithm, p.products, p.peak_bytes, p.least_bytes)

    The data are not read: tensors may be on the meta device. Which gradients are wanted their
    requires_grad says, as in the call.

    :param e: As in the call, and so are c, targets and bias.
    :param device: Where the loss would be, if not where the tensors are: "cpu", "cuda", "cuda:1".
    :param options: Those of the call, but for vocab_parallel_options. ``impl="torch"`` has no plan.
    :return: A :class:`Plan`: its fields, and in words where it is printed.
    :raises ValueError: What the call would raise; max_workspace below ``least_bytes``.
    :raises NotImplementedError: Where no engine takes it, with each engine's reason.
    """
    for name in options:
        if name not in _SIGNATURE.parameters:
            near = difflib.get_close_matches(name, _SIGNATURE.parameters, 1)
            raise TypeError(
                f"cutloss.plan got an unexpected keyword argument '{name}': it takes those of "
                f"linear_cross_entropy" + (f"; did you mean '{near[0]}'?" if near else "")
            )
    given = _SIGNATURE.bind(e, c, targets, bias, **options)
    given.apply_defaults()
    said = given.arguments
    said["plain"] = is_plain(said.pop("impl"))
    if said["plain"]:
        raise ValueError("impl='torch' stores all logits and has no plan: leave impl out")
    if said.pop("vocab_parallel_options") is not None or is_dtensor(c):
        raise NotImplementedError(
            "cutloss.plan takes a classifier that is whole: pass this rank's e and c as plain "
            "tensors, for the plan of a loss of this rank's classes alone"
        )
    for name in ("accum_e_fp32", "accum_c_fp32", "filter_e_grad", "filter_c_grad"):
        said.pop(name)
    there = torch.device(device).type if device is not None else e.device.type
    described, how = _described(classes=None, device="cpu" if there == "meta" else there, **said)
    class_weight = _class_weight(how, described)
    operands = make_operands(
        e, c, targets, bias, said["temperature"], class_weight, described, plain=True
    )
    known_at_forward = not _weighs_in_torch(how) and _known_at_forward(
        how, described, said["return_lse"]
    )
    return decide.planned(operands, described, known_at_forward, device)

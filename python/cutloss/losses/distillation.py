"""Distillation: a student's distribution against a teacher's, without the logits of either."""

import dataclasses
import math

import torch
from torch import Tensor

from .._core import checks
from .._torch import partitioned
from .._torch import autograd, library, private
from .._torch.private import untraced
from . import _arguments as args
from ._arguments import Loss
from ._chunk_plan import Sizes, bytes_of, converted, make_plan
from ._chunks import Logits, Rule, Student, Task, losses_of_rows, weighted_sum
from ._divergences import DIVERGENCES
from ._teachers import MOST_MASS, TAILS, Mixture, OfModel, OfTopK, faults


@untraced
def linear_distillation(
    e: Tensor,
    c: Tensor,
    teacher_e: Tensor,
    teacher_c: Tensor,
    targets: Tensor | None = None,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    *,
    divergence: str = "forward_kl",
    beta: float | None = None,
    temperature: float = 1.0,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    shift: bool | int = 0,
    reduction: str = "mean",
    num_items_in_batch: float | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    num_valid: int | None = None,
    max_workspace: int | None = None,
    schedule: str = "auto",
) -> Loss:
    """The divergence of a student's distributions from a teacher's, both from hidden states.

    Of each token, with p_s the softmax of the student's logits / temperature, and p_t the
    teacher's::

        soft_weight * divergence(p_s, p_t) + hard_weight * cross_entropy(student, target)

    "forward_kl" is KL(p_t || p_s), "reverse_kl" KL(p_s || p_t), "jsd" is
    beta KL(p_t || m) + (1 - beta) KL(p_s || m) with m = beta p_t + (1 - beta) p_s, and "tvd" half
    the sum of |p_s - p_t|. The sources stand with the formulas, in `_divergences`. beta is that of
    GKD, TRL and Liger, and, as in both, "jsd" with beta=0 is "forward_kl" and with beta=1
    "reverse_kl" (the limit itself would be 0).

    Gradients go to e, c and bias (and token_weight); the teacher gets none. They are exact, summed
    in fp32 and the same bits every time. They are made with the loss, where that is one number, and
    cost a product for each of e and c, beside the two that make the logits. Where c is in 16 bits
    and max_workspace has no room for 4 V D bytes, the logits are made twice, for c's gradient: two
    products more, and memory that does not grow with c.

    :param e: The student's hidden states, (..., D).
    :param c: Its classifier, (V, D). Under ``torch.autocast`` dtypes may differ, as in
        :func:`cutloss.linear_cross_entropy`.
    :param teacher_e: The teacher's hidden states of the same tokens, (..., D'). Of any dtype. Make
        them under ``torch.no_grad()``: one that requires a gradient is an error.
    :param teacher_c: Its classifier, (V, D'). May be a parameter; gets no gradient.
    :param targets: (...), int64 or int32. Where ignore_index stands nothing counts; otherwise only
        hard_weight reads them. None: every token counts.
    :param bias: (V). A class of -inf has a probability of exactly 0.
    :param divergence: "forward_kl", "reverse_kl", "jsd" or "tvd".
    :param beta: For "jsd", in [0, 1]; 0.5 where it is not given.
    :param temperature: Divides both models' logits, after the softcap. The loss is not multiplied
        by its square (neither TRL nor Liger do): soft_weight=temperature**2 keeps the gradients'
        size (Hinton et al. 2015, section 2).
    :param soft_weight: Of the divergence, > 0.
    :param hard_weight: Of the cross-entropy with the targets, at temperature 1.
    :param mask: (...), bool, where the targets lie: False where nothing counts.
    :param token_weight: (...), where the targets lie. The mean divides by their sum, or
        by 1 where it is 0: weights that are all 0 give a loss of 0, with gradients of zero.
    :param shift: As in :func:`cutloss.linear_cross_entropy`: position t of e and teacher_e belongs
        to target, mask and weight t + shift.
    :param reduction: "mean" over tokens that count (0 for none, as TRL and Liger have it), "sum",
        or "none" for each token, 0 where it does not count.
    :param num_items_in_batch: With "mean", what the sum is divided by instead, at least 1.
    :param softcap: The student's, and teacher_softcap the teacher's.
    :param logit_scale: The student's, and teacher_logit_scale the teacher's.
    :param num_valid: How many tokens count, where the caller knows. On CUDA the others then cost
        nothing; a wrong number makes NaN there, on the CPU an error.
    :param max_workspace: Bytes of memory beside inputs and gradients. Unset: 256 MiB, or what the
        smallest plan needs where that is more.
    :param schedule: "rows" makes c's gradient chunk by chunk of rows, "vocabulary" slab by slab of
        columns from logits that are made again, "auto" takes the first that fits.
    :return: The loss (fp32; fp64 where the student is), and the means over tokens that count of the
        "divergence" and, with hard_weight, the "cross_entropy".
    """
    mixture = _mixture(divergence, beta, temperature, soft_weight, hard_weight)
    _tensors(e=e, c=c, teacher_e=teacher_e, teacher_c=teacher_c)
    _tensors(bias=bias, teacher_bias=teacher_bias)
    _head(e, c, bias, "")
    _head(teacher_e, teacher_c, teacher_bias, "teacher_")
    if teacher_e.shape[:-1] != e.shape[:-1]:
        raise ValueError(
            f"teacher_e must have the rows of e, (..., D') and (..., D): got teacher_e "
            f"{args.shape(teacher_e)} and e {args.shape(e)}"
        )
    if teacher_c.shape[0] != c.shape[0]:
        raise ValueError(
            f"both classifiers must have the same classes: c has {c.shape[0]}, teacher_c "
            f"{teacher_c.shape[0]}; where one is padded, cut it, [:{_least(c, teacher_c)}]"
        )
    _no_gradient(teacher_e=teacher_e)
    checks.same_device(e, c=c, bias=bias, teacher_e=teacher_e, teacher_c=teacher_c,
                        teacher_bias=teacher_bias)  # fmt: skip
    logits = _logits(e, c, bias, "", softcap, logit_scale)
    of_teacher = _logits(
        teacher_e, teacher_c, teacher_bias, "teacher_", teacher_softcap, teacher_logit_scale,
        logits.stats,
    )  # fmt: skip
    kind = DIVERGENCES[mixture.divergence].infinite
    zeros = (logits.cannot_be(bias), of_teacher.cannot_be(teacher_bias))
    infinite = _without(*(zeros if kind == "student" else zeros[::-1])) if kind else None

    def rule(tokens: "_Tokens") -> OfModel:
        flat = teacher_e.detach().reshape(-1, teacher_e.shape[-1])
        bias_of_teacher = None if teacher_bias is None else teacher_bias.detach()
        return OfModel(
            mixture, of_teacher, flat, teacher_c.detach(), bias_of_teacher, tokens.targets,
            tokens.invalid, infinite,
        )  # fmt: skip

    width = teacher_e.shape[-1] * (bytes_of(of_teacher.operands) + teacher_e.element_size())
    return _loss(
        (e, c, bias), logits, mixture, rule, width, converted(teacher_c, of_teacher.operands),
        _Counting(targets, ignore_index, mask, token_weight, shift, reduction, num_items_in_batch,
                  num_valid),
        max_workspace, schedule,
    )  # fmt: skip


@untraced
def linear_distillation_top_k(
    e: Tensor,
    c: Tensor,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    targets: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    tail: str = "bucket",
    divergence: str = "forward_kl",
    beta: float | None = None,
    temperature: float = 1.0,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    shift: bool | int = 0,
    reduction: str = "mean",
    num_items_in_batch: float | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    num_valid: int | None = None,
    max_workspace: int | None = None,
    schedule: str = "auto",
) -> Loss:
    """:func:`linear_distillation` from a teacher of which K log-probabilities a token are stored.

    The student's logits are made a chunk of rows at a time, and nothing of N K D is gathered.

    :param teacher_ids: Classes, (..., K), int64 or int32: of position t what the teacher expects
        after position t of e (what vLLM calls prompt_logprobs stands one position later). On the
        CPU a class outside of the vocabulary, or one that is there twice, is an error; on CUDA NaN.
    :param teacher_log_probs: Their log-probabilities, (..., K). -inf: there is no such entry,
        whatever its id. Taken as they are, so make them at the temperature that the student's
        logits are divided by; with tail="renormalise" dividing them by it does that. Takes no
        gradient.
    :param tail: What the probability of all other classes is.
        "bucket": one event more, all other classes together, in student and teacher (TRL's
        loss_add_tail=True). At least 1e-7 in the teacher.
        "renormalise": both distributions are of the K classes alone (TRL's loss_add_tail=False,
        NeMo-RL's zero_outside_topk=False, axolotl's normalize_topk); any multiple of the
        probabilities will do.
        "ignore": not in the divergence, which is a sum over the K classes, of the teacher's
        probabilities as they are and the student's of the whole vocabulary. It may be negative.
    :return: As :func:`linear_distillation`, whose arguments are the others.
    """
    mixture = _mixture(divergence, beta, temperature, soft_weight, hard_weight)
    args.choice("tail", tail, TAILS)
    _tensors(e=e, c=c, teacher_ids=teacher_ids, teacher_log_probs=teacher_log_probs)
    _tensors(bias=bias)
    _head(e, c, bias, "")
    if teacher_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"teacher_ids must be int64 or int32, got {teacher_ids.dtype}")
    if not teacher_log_probs.is_floating_point():
        raise TypeError(f"teacher_log_probs must be floating point, got {teacher_log_probs.dtype}")
    if (
        teacher_ids.shape != teacher_log_probs.shape
        or teacher_ids.shape[:-1] != e.shape[:-1]
        or teacher_ids.shape[-1:] == (0,)
    ):
        raise ValueError(
            f"teacher_ids and teacher_log_probs must be (..., K) with the rows of e (..., D) and "
            f"K > 0: got {args.shape(teacher_ids)}, {args.shape(teacher_log_probs)} and e "
            f"{args.shape(e)}"
        )
    _no_gradient(teacher_log_probs=teacher_log_probs)
    checks.same_device(e, c=c, bias=bias, teacher_ids=teacher_ids,
                        teacher_log_probs=teacher_log_probs)  # fmt: skip
    K, V = teacher_ids.shape[-1], c.shape[0]
    ids = teacher_ids.reshape(-1, K)
    log_probs = teacher_log_probs.detach().reshape(-1, K)

    def rule(tokens: "_Tokens") -> OfTopK:
        if args.may_look(e.device):
            _check_stored(ids, log_probs, tokens, V, tail, teacher_ids.shape)
        return OfTopK(mixture, tail, ids, log_probs, tokens.targets, tokens.invalid)

    counting = _Counting(targets, ignore_index, mask, token_weight, shift, reduction,
                         num_items_in_batch, num_valid)  # fmt: skip
    return _loss(
        (e, c, bias), _logits(e, c, bias, "", softcap, logit_scale), mixture, rule, K * 160, 0,
        counting, max_workspace, schedule,
    )  # fmt: skip


# What counts, and how much ----------------------------------------------------------------------


@dataclasses.dataclass
class _Counting:
    targets: Tensor | None
    ignore_index: int
    mask: Tensor | None
    token_weight: Tensor | None
    shift: bool | int
    reduction: str
    num_items: float | Tensor | None
    num_valid: int | None


@dataclasses.dataclass
class _Tokens:
    """The rows that are worked on: n of those that are predicted, where their number is known only
    those that count."""

    index: Tensor  # (n), in e
    counts: Tensor | None  # (n), bool; None: all
    chosen: Tensor  # (n), among those that are predicted
    predicted: tuple[int, ...]  # their shape
    targets: Tensor | None  # (n), in [0,V), where they are needed
    invalid: Tensor | None  # (n), bool
    weight: Tensor  # (n), 0 where a row does not count


def _tokens(how: _Counting, e: Tensor, V: int, reads_targets: bool, stats: torch.dtype) -> _Tokens:
    shape = e.shape[:-1]
    given = {"targets": how.targets, "mask": how.mask, "token_weight": how.token_weight}
    given = {name: t for name, t in given.items() if t is not None}
    _tensors(**given)
    for name, t in given.items():
        if t.shape != shape:
            raise ValueError(
                f"{name} must have the shape of e but for its last dimension: got {name} "
                f"{args.shape(t)} and e {args.shape(e)}"
            )
    checks.same_device(e, **given)
    if how.mask is not None and how.mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, got {how.mask.dtype}: pass mask.bool()")
    if how.targets is not None and how.targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"targets must be int64 or int32, got {how.targets.dtype}")
    if how.token_weight is not None:
        args.floating("token_weight", how.token_weight)
    if reads_targets and how.targets is None:
        raise ValueError("hard_weight is not 0 and there are no targets, got None: pass targets")
    places = torch.arange(math.prod(shape), device=e.device).reshape(shape)
    shift = checks.shift(how.shift, places)
    length = shape[-1] if shape else 1

    def late(t: Tensor) -> Tensor:
        return (t[..., shift:] if shift else t).reshape(-1)

    index = (places[..., : length - shift] if shift else places).reshape(-1)
    counts = None
    if how.targets is not None:
        checks.ignore_index(how.ignore_index, how.targets)
        counts = late(how.targets) != how.ignore_index
    if how.mask is not None:
        counts = late(how.mask) if counts is None else counts & late(how.mask)
    n = index.numel()
    checks.num_valid(how.num_valid, n, how.ignore_index)
    chosen, right = torch.arange(n, device=e.device), None
    look = args.may_look(e.device)
    if counts is not None and (look or how.num_valid is not None):
        if how.num_valid is not None:
            right = counts.sum() == how.num_valid
            if look and not right:
                raise ValueError(
                    f"num_valid is {how.num_valid}, but {counts.sum().item()} tokens count"
                )
        if look:
            chosen = counts.nonzero()[:, 0]
        else:  # those that count come first; to ask for their number would wait for the device
            chosen = counts.logical_not().byte().argsort(stable=True)[: how.num_valid]
        index, counts = index[chosen], None
    elif how.num_valid is not None and how.num_valid != n:
        raise ValueError(f"num_valid is {how.num_valid}, but without targets and mask {n} count")

    weight = e.new_ones(n, dtype=stats)
    if how.token_weight is not None:
        weight = late(how.token_weight).to(stats)
    weight = weight[chosen]
    if counts is not None:
        weight = torch.where(counts, weight, 0.0)
    targets = invalid = None
    if reads_targets:
        targets = late(how.targets)[chosen].long()
        if counts is not None:
            targets = torch.where(counts, targets, 0)
        invalid = (targets < 0) | (targets >= V)
        if look and invalid.any():
            at = chosen[invalid.nonzero()[0, 0]]
            raise ValueError(
                f"the target of row {at.item()} is {late(how.targets)[at].item()}, outside "
                f"[0, V = {V}) and not ignore_index = {how.ignore_index}"
            )
        targets = torch.where(invalid, 0, targets)
    if right is not None and not look:
        wrong = ~right
        invalid = wrong.expand(chosen.shape) if invalid is None else invalid | wrong
    predicted = (*shape[:-1], length - shift) if shape else ()
    return _Tokens(index, counts, chosen, predicted, targets, invalid, weight)


def _loss(
    student: Student, logits: Logits, mixture: Mixture, make_rule, width: int, of_teacher: int,
    counting: _Counting, max_workspace: int | None, schedule: str,
) -> Loss:  # fmt: skip
    """`width`, `of_teacher`: what the teacher adds to `width` and `converted` of Sizes."""
    e, c, bias = student
    args.choice("reduction", counting.reduction, checks.REDUCTIONS)
    args.choice("schedule", schedule, ("auto", "rows", "vocabulary"))
    checks.max_workspace(max_workspace)
    if counting.num_items is not None and counting.reduction != "mean":
        raise ValueError(
            f"num_items_in_batch is what the mean divides by, got it with reduction="
            f"{counting.reduction!r}: leave one of them out"
        )
    tokens = _tokens(counting, e, c.shape[0], mixture.hard_weight != 0, logits.stats)
    rule = make_rule(tokens)
    e = e.reshape(-1, e.shape[-1])
    weight = tokens.weight
    needs = [autograd.wants_gradient(t) for t in (e, c, bias)]
    grads = [t.dtype for t, needed in zip((e, c, bias), needs) if needed]
    # Gradients in fp16 wait for the loss scale, which comes with the upstream gradient.
    immediate = (
        counting.reduction != "none"
        and not any(library.WAITS_FOR_LOSS_SCALE[dtype] for dtype in grads)
        and not autograd.wants_gradient(weight)
    )
    plan = make_plan(
        _sizes(e, c, logits, rule, width, of_teacher), schedule, max_workspace,
        needs[0], needs[1], immediate,
    )  # fmt: skip
    predicted = math.prod(tokens.predicted)
    task = Task(logits, rule, tokens.index, tokens.counts, plan, predicted)
    total = weight.sum(dtype=torch.float64)
    mean = torch.where(total == 0, 1.0, total).to(weight.dtype)
    over = 1.0
    if counting.reduction == "mean":
        over = mean if counting.num_items is None else checks.num_items(counting.num_items)
    factors = weight / over
    if immediate:
        loss, parts = weighted_sum((e, c, bias), task, factors)
    else:
        losses, parts = losses_of_rows((e, c, bias), task)
        losses = torch.where(factors == 0, 0.0, losses * factors)
        if counting.reduction == "none":
            loss = losses.new_zeros(predicted)
            loss = loss.index_copy(0, tokens.chosen, losses).reshape(tokens.predicted)
        else:
            loss = losses.sum(dtype=torch.float64).to(losses.dtype)
    share = (weight / mean).detach()[:, None]
    means = torch.where(share == 0, 0.0, parts * share).sum(0, dtype=torch.float64).to(parts.dtype)
    return Loss(loss, dict(zip(("divergence", "cross_entropy"), means.unbind())))


def _sizes(
    e: Tensor, c: Tensor, logits: Logits, rule: Rule, width: int, of_teacher: int
) -> Sizes:
    operand, stats = bytes_of(logits.operands), bytes_of(logits.stats)
    V, D = c.shape
    mine = converted(c, logits.operands)
    if logits.operands == torch.float16:  # products beside their sums (_add_product)
        mine += 1024 * D * stats
    return Sizes(
        n=e.shape[0], V=V, D=D, stats=stats, operand=operand,
        width=width + D * (operand + e.element_size()), e=e.element_size(), c=c.element_size(),
        buffers=rule.buffers + (logits.softcap is not None),
        per_row=96 + stats * (rule.kept + 2 * rule.parts),
        converted=max(of_teacher, mine),
        on_cuda=e.device.type == "cuda",
    )  # fmt: skip


# Checks -----------------------------------------------------------------------------------------


def _mixture(
    divergence: str, beta: float | None, temperature: float, soft_weight: float, hard_weight: float
) -> Mixture:
    args.choice("divergence", divergence, tuple(DIVERGENCES))
    if beta is not None and divergence != "jsd":
        raise ValueError(f"beta is for divergence 'jsd' alone, got {beta} with {divergence!r}")
    beta = 0.5 if beta is None else args.within("beta", beta, 0.0, 1.0)
    if divergence == "jsd" and beta in (0.0, 1.0):
        divergence = "reverse_kl" if beta else "forward_kl"
    temperature = args.positive("temperature", temperature)
    soft_weight = args.positive("soft_weight", soft_weight)
    return Mixture(
        divergence, beta, temperature, soft_weight, args.not_negative("hard_weight", hard_weight)
    )


def _tensors(**named: Tensor | None) -> None:
    checks.tensors(**named)
    for name, t in named.items():
        if t is None and name not in ("bias", "teacher_bias"):
            raise TypeError(f"{name} must be a torch.Tensor, got None")


def _head(e: Tensor, c: Tensor, bias: Tensor | None, prefix: str) -> None:
    """(..., D), (V, D), (V)"""
    if e.dim() < 1 or c.dim() != 2 or c.shape[1] != e.shape[-1] or 0 in c.shape:
        raise ValueError(
            f"{prefix}e must be (..., D) and {prefix}c (V, D), V and D at least 1: got {prefix}e "
            f"{args.shape(e)} and {prefix}c {args.shape(c)}"
        )
    if bias is not None and bias.shape != c.shape[:1]:
        raise ValueError(
            f"{prefix}bias must be (V): got {prefix}bias {args.shape(bias)} and {prefix}c "
            f"{args.shape(c)}"
        )
    if autograd.is_differentiated_by_others(e, c, bias):
        raise NotImplementedError(
            "distillation has gradients of reverse mode by PyTorch's autograd alone: no transforms "
            "of torch.func and no forward mode; take stored logits and PyTorch's own functions there"
        )
    if private.is_ordinary(e) and private.is_ordinary(c):
        partitioned.check_memory(e, c)


def _no_gradient(**named: Tensor) -> None:
    for name, t in named.items():
        if autograd.wants_gradient(t):
            raise ValueError(
                f"the teacher gets no gradient, and {name} requires one: make it under "
                f"torch.no_grad(), or pass {name}.detach()"
            )


def _least(a: Tensor, b: Tensor) -> int:
    return min(a.shape[0], b.shape[0])


def _logits(
    e: Tensor, c: Tensor, bias: Tensor | None, prefix: str, softcap: float | None,
    logit_scale: float, stats: torch.dtype | None = None,
) -> Logits:  # fmt: skip
    named = {f"{prefix}e": e, f"{prefix}c": c}
    if bias is not None:
        named[f"{prefix}bias"] = bias
    operands = checks.operand_dtype(**named)
    if stats is None:
        stats = torch.float64 if operands == torch.float64 else torch.float32
    in_16_bits = operands in (torch.bfloat16, torch.float16)
    if not (in_16_bits and e.device.type == "cuda" and stats == torch.float32):
        operands = stats
    return Logits(operands, stats, checks.logit_scale(logit_scale), checks.softcap(softcap))


def _without(zero: Tensor | None, other: Tensor | None) -> Tensor | None:
    """(), bool: whether a class cannot be in one, and can be in the other."""
    if zero is None:
        return None
    return (zero if other is None else zero & ~other).any()


def _check_stored(
    ids: Tensor, log_probs: Tensor, tokens: _Tokens, V: int, tail: str, shape: torch.Size
) -> None:
    index = tokens.index if tokens.counts is None else tokens.index[tokens.counts]
    ids, log_probs = ids[index].long(), log_probs[index].float()
    wrong = faults(ids, log_probs, log_probs != -torch.inf, V, tail)
    if not wrong.any():
        return
    kind, row = wrong.nonzero()[0].tolist()
    at = tuple(i.item() for i in torch.unravel_index(index[row], shape[:-1]))
    what = (
        f"teacher_ids at {at} must be in [0, V = {V}), got {ids[row].tolist()}; an entry that is "
        f"not there has the log-probability -inf",
        f"teacher_ids at {at} must all be different, got {ids[row].tolist()}; an entry that is not "
        f"there has the log-probability -inf",
        f"the probabilities at {at} must have a sum of at most 1, but that of "
        f"exp(teacher_log_probs) is {log_probs[row].exp().sum().item():.6g} (more than {MOST_MASS} "
        f"is not rounding): pass log-probabilities, or tail='renormalise'",
    )[kind]
    raise ValueError(what)

"""``cross_entropy`` and ``CausalLMLoss``: losses over logits that already exist."""

import torch
from torch import Tensor

from ._core import checks, weighting
from ._core.operands import in_sequences, shape_of_rows, warn_of_no_weight
from ._core.options import LossOptions, Options
from ._torch import autograd, consumed, library, operators, private
from .module import _class_weights


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool | int = 0,
    return_lse: bool = False,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    return_entropy: bool = False,
    return_predictions: bool = False,
    z_loss: float = 0.0,
    consume_logits: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Cross-entropy of ``logits`` against ``targets``: one read of the logits, one write of their
    gradient, no copy of either.

    Equal to, with an exact gradient::

        z = logit_scale * logits
        z = softcap * tanh(z / softcap)          # where a softcap is given
        z = z / temperature
        loss = F.cross_entropy(z.float(), targets, weight, ignore_index=ignore_index,
                               reduction=reduction, label_smoothing=label_smoothing)

    Where the logits do not exist yet, :func:`cutloss.linear_cross_entropy` does without them. The
    options that both have mean the same in both.

    Under "mean" and "sum", with no per-token result but predictions asked for, the gradient is made
    together with the loss: the logits are read once, the gradient is written once, and backward
    hands it over (times the loss's own gradient, where that is not 1: another read and write). In
    all other cases, and for float16, whose loss scale has to come before the rounding, backward
    makes it from the logits in a second read. The same call makes the same bits. Nothing waits for
    the device, and calls can be captured in a CUDA graph.

    :param logits: float32, bfloat16, float16 or float64, shape (..., V). Read in place where each
        row is contiguous and rows lie one after the other, any number of elements apart (slices
        are); other layouts are copied for the call.
    :param targets: Class indices, int64 or int32, shape (...): each in [0, V), or ignore_index. On
        the CPU anything else is an error. On CUDA, where looking would wait for the device, it
        makes the token's loss NaN, and with it the token's gradient; with CUTLOSS_CHECK=1 in the
        environment calls do wait, and raise the CPU's error.
    :param ignore_index: Tokens with this target are left out: their logits are not read, their
        gradient is zero and their entry in every per-token result is 0 (in predictions -1). The
        mean over no token at all is NaN, with gradients of zero.
    :param softcap: Caps the logits smoothly: ``softcap * tanh(logits / softcap)``. For logits that
        the model has capped already (Gemma 2's): None.
    :param reduction: "mean" (over tokens that count; with weights the weighted mean), "sum", or
        "none" for the loss of each token, in the shape of targets less ``shift``.
    :param shift: Predict the target ``shift`` positions later, without copying or slicing the
        logits: position t is scored against target t + shift, and the last ``shift`` positions of
        each sequence predict nothing. True is 1. The last dimension of targets is the sequence; it
        is ``shift`` shorter in per-token results. Sequences of ``shift`` tokens or fewer predict
        nothing at all, which is no error: see ignore_index for the mean of nothing.
    :param return_lse: Also return the log-sum-exp of each token's logits, with a gradient.
    :param logit_scale: A number that multiplies the logits.
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
    :param consume_logits: The gradient takes the memory of the logits, so that no second tensor of
        their size is made. Where a gradient is wanted, this call takes that memory for good: the
        tensor ``logits`` (and, of a view of all of a tensor, that tensor) has no elements
        afterwards, shape (0,), so that reading it again fails instead of finding a gradient
        there. Other views of the same memory are yours to leave alone. An operation that has saved
        the logits for its own backward (``tanh``, whose result they may be) makes backward
        raise PyTorch's error about a change in place. Backward works once: a second one
        (retain_graph=True) is an error. Refused for a leaf that requires a gradient, for a view of
        part of a tensor, and for logits that are not contiguous. torch.compile leaves the call out
        of its graphs (with fullgraph=True an error). Where no gradient is wanted nothing happens to
        the logits.
    :return: The loss, fp32 (fp64 for fp64 logits), or a tuple of the loss and, in this order,
        what was asked for: lse, entropy, predictions.
    """
    return _cross_entropy(
        logits,
        targets,
        ignore_index=ignore_index,
        softcap=softcap,
        reduction=reduction,
        shift=shift,
        return_lse=return_lse,
        logit_scale=logit_scale,
        temperature=temperature,
        label_smoothing=label_smoothing,
        weight=weight,
        token_weight=token_weight,
        return_entropy=return_entropy,
        return_predictions=return_predictions,
        z_loss=z_loss,
        consume_logits=consume_logits,
    )


def _cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int,
    softcap: float | None,
    reduction: str,
    shift: bool | int,
    return_lse: bool,
    logit_scale: float,
    temperature: float | Tensor,
    label_smoothing: float,
    weight: Tensor | None,
    token_weight: Tensor | None,
    return_entropy: bool,
    return_predictions: bool,
    z_loss: float,
    consume_logits: bool,
    over: float | Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """`over`: what a sum is divided by. It goes into the gradient while that is made; dividing the
    loss would multiply the gradient in another read and write."""
    checks.tensors(logits=logits, targets=targets, weight=weight, token_weight=token_weight)
    checks.logits(logits, targets)
    checks.device(logits, library.HAS_CUDA, "logits", "torch.nn.functional.cross_entropy")
    checks.same_device(
        logits,
        of="logits",
        targets=targets,
        weight=weight,
        token_weight=token_weight,
        temperature=temperature if isinstance(temperature, Tensor) else None,
    )
    loss = LossOptions.checked(
        ignore_index=ignore_index,
        softcap=softcap,
        reduction=reduction,
        shift=shift,
        return_lse=return_lse,
        logit_scale=logit_scale,
        temperature=temperature,
        label_smoothing=label_smoothing,
        return_entropy=return_entropy,
        return_predictions=return_predictions,
        z_loss=z_loss,
    )
    checks.flags(consume_logits=consume_logits)
    checks.ignore_index(loss.ignore_index, targets)
    if isinstance(temperature, Tensor):
        checks.temperature(temperature, targets)
    V = logits.shape[-1]
    if weight is not None:
        checks.weight(weight)
        if weight.shape[0] != V:
            raise ValueError(
                f"weight must be (V): got weight {checks.shape(weight)} and logits "
                f"{checks.shape(logits)}"
            )
    if token_weight is not None:
        checks.token_weight(token_weight, targets)
    how = weighting.Weighting(
        reduction=loss.reduction,
        label_smoothing=loss.label_smoothing,
        z_loss=loss.z_loss,
        weight=weight,
        token_weight=None if token_weight is None else in_sequences(token_weight),
    )
    shift = checks.shift(loss.shift, targets)
    options = loss.operators(logits.dtype, shift)
    if private.is_transformed():
        raise NotImplementedError(
            "cutloss.cross_entropy does not work under the transforms of torch.func (grad, vmap, "
            "...): use torch.nn.functional.cross_entropy there"
        )
    arguments = logits, targets, temperature, how, options, return_lse, over
    if consume_logits and autograd.wants_gradient(logits):
        value, rows = consumed.evaluated(_evaluate, *arguments)
    else:
        value, rows = _evaluate(*arguments)

    row_shape = shape_of_rows(targets, shift)
    if reduction == "none":
        value = value.reshape(row_shape)
    extras = ((return_lse, rows.lse), (return_entropy, rows.entropy))
    extras += ((return_predictions, rows.argmax),)
    results = tuple(t.reshape(row_shape) for wanted, t in extras if wanted)
    return (value, *results) if results else value


def _evaluate(
    logits: Tensor,
    targets: Tensor,
    temperature: float | Tensor,
    how: weighting.Weighting,
    options: Options,
    wants_lse: bool,
    over: float | Tensor | None,
    kind: type[operators.Logits] = operators.Logits,
) -> tuple[Tensor, weighting.Rows]:
    """The loss, per row where nothing is reduced, and the per-row outputs."""
    stats = options.stats
    shift, ignore_index = options.shift, options.ignore_index
    V = logits.shape[-1]
    by_sequence = in_sequences(targets)
    row_temperature = None
    if isinstance(temperature, Tensor):
        # Ignored rows may hold anything there, a padding of 0 for one.
        t = temperature.expand(targets.shape).reshape(by_sequence.shape)
        counts = weighting.of_rows(by_sequence, shift) != ignore_index
        row_temperature = torch.where(counts, weighting.of_rows(t, shift).to(stats), 1.0)
    class_weight = how.weight if options.wants_zbar else None
    if class_weight is not None:
        class_weight = class_weight.to(stats)
    if by_sequence.device.type == "cuda" and checks.may_look(by_sequence.device):
        checks.values(by_sequence, row_temperature, shift, V, ignore_index, None)
    z = logits if logits.dim() == 3 else logits.reshape(*by_sequence.shape, V)
    operands = (z, by_sequence, row_temperature, class_weight)
    computation = kind(options)

    weights_have_gradient = autograd.wants_gradient(how.token_weight)
    if weights_have_gradient or private.have_tangent(how.token_weight, how.weight):
        rows = operators.statistics(computation, operands)
        terms = weighting.terms(by_sequence, V, how, shift, ignore_index, stats)
        warn_of_no_weight(terms.undefined, how, by_sequence, options)
        loss = weighting.loss(terms, rows, how.reduction)
        return (loss if over is None else loss / over), rows
    if how.changes_nothing():
        rows = operators.statistics(computation, operands)
        # A copy: backward reads nll again, and the loss is the caller's to change in place.
        return (rows.nll.clone() if autograd.wants_gradient(logits) else rows.nll), rows
    terms, undefined = library.loss_terms(by_sequence, V, how, options)
    warn_of_no_weight(undefined, how, by_sequence, options)
    if over is not None:
        terms = terms / over
    if how.reduction == "none":
        rows = operators.statistics(computation, operands)
        return weighting.loss(weighting.unpacked(terms), rows, "none"), rows
    # A per-token result that may get a gradient of its own rules out the gradient in forward. In
    # fp16 that waits for the loss scale, without which 1/N underflows.
    immediate = (
        autograd.wants_gradient(logits)
        and not wants_lse
        and not options.wants_entropy
        and not library.WAITS_FOR_LOSS_SCALE[logits.dtype]
    )
    return operators.loss(computation, operands, terms, undefined, immediate)


class CausalLMLoss:
    """The loss of a causal language model from its logits, by the call of transformers'
    ``ForCausalLMLoss``::

        model.loss_function = CausalLMLoss(model.config.vocab_size)

    Labels are those of the inputs: position t of the logits is scored against label t + 1, without
    a copy of the logits in fp32 or shifted. What it is called with beyond its own arguments is
    accepted and not used, as by transformers', whose models pass on what they are called with.

    Not an ``nn.Module``: assigned to a model, a module would become one of its parts, and the model
    would go on calling the loss that it had.

    :param vocab_size: V, the last size of the logits. Logits of another are an error.
    :param ignore_index: Labels that do not count; ``ignore_index`` in a call takes its place.
    :param consume_logits: As in :func:`cross_entropy`: the gradient takes the memory of the logits,
        and ``outputs.logits`` of a training step is empty. Not for trainers that look at them.
    :param options: ``softcap``, ``logit_scale``, ``temperature`` (a number), ``label_smoothing``,
        ``weight``, ``z_loss`` of :func:`cross_entropy`. Most models that cap or scale their logits
        have done so before they call their loss.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        ignore_index: int = -100,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        temperature: float = 1.0,
        label_smoothing: float = 0.0,
        weight: Tensor | list[float] | None = None,
        z_loss: float = 0.0,
        consume_logits: bool = False,
    ):
        if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < 1:
            raise ValueError(f"vocab_size must be an int >= 1, got {vocab_size!r}")
        if isinstance(weight, (list, tuple)):  # of a configuration
            weight = _class_weights(weight)
        if weight is not None:
            checks.weight(weight)
            if weight.shape[0] != vocab_size:
                raise ValueError(
                    f"weight must be (V): got weight {checks.shape(weight)} and vocab_size "
                    f"{vocab_size}"
                )
        if isinstance(temperature, Tensor):
            raise TypeError("temperature must be a number here, got a tensor: use cross_entropy")
        checks.temperature(temperature)
        checks.ignore_index(ignore_index)
        checks.flags(consume_logits=consume_logits)
        self.vocab_size = vocab_size
        self.ignore_index = ignore_index
        self.options = dict(
            softcap=checks.softcap(softcap),
            logit_scale=checks.logit_scale(logit_scale),
            temperature=float(temperature),
            label_smoothing=checks.label_smoothing(label_smoothing),
            z_loss=checks.z_loss(z_loss),
            consume_logits=consume_logits,
        )
        self.weight = weight

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int | None = None,
        num_items_in_batch: int | Tensor | None = None,
        ignore_index: int | None = None,
        shift_labels: Tensor | None = None,
        **unused: object,
    ) -> Tensor:
        """
        :param logits: (..., length, V).
        :param labels: (..., length). Moved to the logits' device where they are elsewhere.
        :param vocab_size: None, or that of the logits.
        :param num_items_in_batch: The loss is the sum over this number, at least 1; without it the
            mean over the tokens that count.
        :param shift_labels: Labels that are shifted already, in place of ``labels``.
        """
        wanted = self.vocab_size if vocab_size is None else vocab_size
        checks.tensors(logits=logits)
        if logits.dim() < 1 or logits.shape[-1] != wanted or wanted != self.vocab_size:
            raise ValueError(
                f"logits must be (..., V) with V = vocab_size: got logits {checks.shape(logits)}, "
                f"vocab_size {wanted} in this call and {self.vocab_size} when the loss was made"
            )
        given, name = (labels, "labels") if shift_labels is None else (shift_labels, "shift_labels")
        if not isinstance(given, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(given).__name__}")
        checks.layout(name, given)
        rows = logits.shape[:-1]
        if given.numel() != rows.numel() or (shift_labels is None and given.shape != rows):
            raise ValueError(
                f"{name} must be {tuple(rows)}, the shape of the logits less V, got "
                f"{checks.shape(given)}"
            )
        over = None if num_items_in_batch is None else checks.num_items(num_items_in_batch)
        if isinstance(over, Tensor) and over.device.type != "cpu":  # from there without a wait
            over = over.to(logits.device)
        if ignore_index is None:
            ignore_index = self.ignore_index
        given = given.to(logits.device).reshape(rows)
        shift = 1 if shift_labels is None else 0
        if shift and not rows:  # one position is a sequence of one
            logits, given = logits[None], given[None]
        return _cross_entropy(
            logits,
            given,
            ignore_index=ignore_index,
            reduction="mean" if over is None else "sum",
            shift=shift,
            return_lse=False,
            weight=None if self.weight is None else self.weight.to(logits.device),
            token_weight=None,
            return_entropy=False,
            return_predictions=False,
            over=over,
            **self.options,
        )

    def __repr__(self) -> str:
        given = {k: v for k, v in self.options.items() if v not in (None, 0.0, 1.0, False)}
        options = "".join(f", {k}={v!r}" for k, v in given.items())
        return f"CausalLMLoss({self.vocab_size}, ignore_index={self.ignore_index}{options})"

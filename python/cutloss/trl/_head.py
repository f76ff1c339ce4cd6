"""The forward that cutloss puts on a model in place of that of TRL's ``add_fused_lm_head``."""

import contextlib
import itertools
import functools
import threading
from collections.abc import Callable, Iterator
from types import MethodType

import torch
from torch import Tensor, nn

from .._torch import partitioned
from ..functional import linear_cross_entropy
from ..losses import token_log_probs
from ..transformers import _operands, _switch, _verify
from ..transformers._patch import regularisers, unwrapped
from ..transformers._switch import Switch
from ..transformers._unmade_logits import UnmadeLogits

_OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def version() -> str:
    import trl

    return f"trl {trl.__version__}"


_NUMBERS = itertools.count(1)


class Use:
    """What a training step makes of the forward that cutloss gave to its model."""

    def __init__(self):
        self.number = next(_NUMBERS)
        self.refusal = ""  # of a step whose loss comes from elsewhere
        self.called = False  # for this loss
        self.in_backward = False  # of this step

    def watch(self, *results: Tensor) -> None:
        """Each of which may be what the loss is made of."""
        self.called = True
        if torch.compiler.is_compiling():  # which does not take a hook of an intermediate tensor
            return  # watch_calls of the compiled model sees what comes out of it
        for result in results:
            if result.requires_grad:
                result.register_hook(self._note)

    @contextlib.contextmanager
    def watch_calls(self, model: nn.Module) -> Iterator[None]:
        """Within, the results of a model that wraps ours, or has compiled it, are watched where
        they come out: a hook of the wrapper runs outside of the graph."""
        handle = model.register_forward_hook(self._watch_output, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _watch_output(self, model: nn.Module, args: tuple, kwargs: dict, output) -> None:
        if kwargs.get("of_unmade_logits"):
            if isinstance(output, Tensor):
                self.watch(output)
        elif kwargs.get("fused_lm_head"):
            self.watch(output.loss, output.log_probs)

    def _note(self, grad: Tensor) -> None:
        self.in_backward = True

    def check_logits(self) -> None:
        """Before they are made, with gradients, and perhaps find no memory."""
        if _CALL.now.loss_of == self.number and not self.called and torch.is_grad_enabled():
            raise NotImplementedError(self.refusal)


class _Now:
    """Of one thread. A plain object, and numbers in it: what the compiler can guard."""

    def __init__(self):
        self.label_smoothing = 0.0
        self.loss_of = 0  # the number of a Use


class _Call(threading.local):
    def __init__(self):
        self.now = _Now()


_CALL = _Call()


@contextlib.contextmanager
def label_smoothing(value: float) -> Iterator[None]:
    """Within, and in this thread, log_probs are those of smoothed labels:
    (1 - value) · log p of the label + value · the mean of log p over the vocabulary."""
    now = _CALL.now
    before, now.label_smoothing = now.label_smoothing, value
    try:
        yield
    finally:
        now.label_smoothing = before


@contextlib.contextmanager
def training_step(use: Use) -> Iterator[None]:
    """Within, some gradient has to come from the forward of cutloss."""
    use.in_backward = False
    yield
    if not use.in_backward:
        raise NotImplementedError(use.refusal)


@contextlib.contextmanager
def loss_of(use: Use) -> Iterator[None]:
    """Within, in this thread, a loss is made: a first call of the model that makes logits, with
    gradients, is not for something else."""
    now = _CALL.now
    before, now.loss_of = now.loss_of, use.number
    use.called = False
    try:
        yield
    finally:
        now.loss_of = before


def add_fused_lm_head(
    model: nn.Module,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
) -> Use:
    """What trl.trainer.utils.add_fused_lm_head does: ``model(..., labels=labels,
    fused_lm_head=True)`` returns trl's FusedCausalLMOutput; without, the forward is unchanged.

    Beside that ``model(..., of_unmade_logits=function)`` returns what the function makes of the
    UnmadeLogits of this call: a loss, inside of the wrappers of the model.

    :param outputs: Per-token results; the others are None. log_probs are always there.
    """
    from trl.trainer.utils import FusedCausalLMOutput

    unknown = [name for name in outputs if name not in _OUTPUTS]
    if unknown:
        raise NotImplementedError(
            f"{version()} asks for {unknown}, of which cutloss knows nothing: it makes {_OUTPUTS}"
        )
    target = unwrapped(model)
    lost = regularisers(target)
    if lost:
        raise ValueError(
            f"cutloss.patch was given {', '.join(f'{k}={v}' for k, v in lost.items())}, which a "
            f"loss of TRL would be without: call cutloss.unpatch(model), or patch the model "
            f"without; SFTConfig(label_smoothing_factor=...) has TRL's smoothing"
        )
    switch, use = Switch({}, {}), Use()
    stock = target.forward
    _switch.prepare(target, switch)
    _verify.verify(target, switch, stock)
    text_config = target.config.get_text_config()

    @functools.wraps(type(target).forward)  # generate reads its signature
    def forward(
        self,
        *args,
        fused_lm_head: bool = False,
        of_unmade_logits: Callable[[UnmadeLogits], object] | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs,
    ):
        if not (fused_lm_head or of_unmade_logits):
            use.check_logits()
            given = dict(
                labels=labels, shift_labels=shift_labels, num_items_in_batch=num_items_in_batch
            )
            kwargs.update({k: v for k, v in given.items() if v is not None})
            return _switch.with_logits(switch, stock, args, kwargs)
        kwargs.update(use_cache=False, return_dict=True)
        _switch.prepare(self, switch)
        training = self.training
        output, _ = _switch.without_logits(switch, training, stock, args, kwargs)
        if not isinstance(output.logits, UnmadeLogits):
            raise NotImplementedError(
                f"the forward of {type(self).__name__} returned logits that are not its "
                f"classifier's: use trl's own trainer"
            )
        if of_unmade_logits:
            result = of_unmade_logits(output.logits)
            if isinstance(result, Tensor):
                use.watch(result)
            return result
        shift = 1 if shift_labels is None else 0
        targets = labels if shift_labels is None else shift_labels
        per_token = _per_token(
            output.logits, targets, shift, temperature, cast_lm_head_to_fp32, outputs
        )
        use.watch(per_token["log_probs"])
        mask = targets[:, shift:].to(per_token["log_probs"].device) != -100
        items = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss = -per_token["log_probs"].sum() / items
        aux_loss = output.get("aux_loss")
        if aux_loss is not None:
            coefficient = getattr(text_config, "router_aux_loss_coef", 0.0)
            loss = loss + coefficient * aux_loss.to(loss.device)
        return FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=aux_loss, **per_token)

    target.forward = MethodType(forward, target)
    return use


def _per_token(
    logits: UnmadeLogits,
    targets: Tensor,
    shift: int,
    temperature: float,
    in_fp32: bool,
    outputs: tuple[str, ...],
) -> dict[str, Tensor]:
    """Each (sequences, length - shift), 0 where the label is -100."""

    def results_of(e: Tensor, c: Tensor, bias: Tensor | None, **options) -> dict[str, Tensor]:
        labels = targets.to(c.device)
        options.update(shift=shift, temperature=temperature)
        autocast = contextlib.nullcontext()
        if in_fp32:
            e = e.float()
            autocast = torch.autocast(e.device.type, enabled=False)
        with autocast:
            return _results(e, c, labels, bias, options, outputs)

    return _operands.evaluate(logits, results_of)


def _results(
    e: Tensor, c: Tensor, labels: Tensor, bias: Tensor | None, options: dict, outputs: tuple
) -> dict[str, Tensor]:
    results = linear_cross_entropy(
        e, c, labels, bias, reduction="none", return_entropy="entropy" in outputs,
        return_predictions="is_top1" in outputs, label_smoothing=_CALL.now.label_smoothing, **options,
    )  # fmt: skip
    results = list(results) if isinstance(results, tuple) else [results]
    found = {"log_probs": -results.pop(0)}
    if "entropy" in outputs:
        found["entropy"] = results.pop(0)
    scored = labels[:, options["shift"] :]
    if "is_top1" in outputs:
        found["is_top1"] = (results.pop(0) == scored) & (scored != -100)
    with torch.no_grad():
        if "log_sum_sq_probs" in outputs:
            of_squares = token_log_probs(
                e, c, labels, bias, return_log_sum_sq_probs=True, **options
            )
            found["log_sum_sq_probs"] = of_squares.log_sum_sq_probs
        if "mean_logits" in outputs:
            found["mean_logits"] = _mean_logits(e, c, labels, bias, options)
    return found


def _mean_logits(
    e: Tensor, c: Tensor, labels: Tensor, bias: Tensor | None, options: dict
) -> Tensor:
    """The mean over the vocabulary of each token's logits."""
    shift = options["shift"]
    counts = labels[:, shift:] != -100
    if options["softcap"] is None:
        # The mean of products with every row of c is the product with their mean.
        of_c = partitioned.gathered(c.mean(0, dtype=torch.promote_types(c.dtype, torch.float32)))
        means = e[:, : e.shape[1] - shift].to(of_c.dtype) @ of_c * options["logit_scale"]
        if bias is not None:
            means = means + partitioned.gathered(bias.mean(dtype=of_c.dtype))
        return torch.where(counts, means / options["temperature"], 0.0)
    # A smoothed loss with nothing of the target left is lse - mean(z).
    smoothed, lse = linear_cross_entropy(
        e, c, labels, bias, reduction="none", label_smoothing=1.0, return_lse=True, **options
    )
    return torch.where(counts, lse - smoothed, 0.0)

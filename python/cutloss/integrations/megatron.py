"""Megatron-LM: the loss of a GPTModel whose output layer lies in shards, without the logits.

Three ways, for hidden states (s, b, h) or, under sequence parallelism, (s / tp, b, h)::

    # 1. The hook of GPTModel.forward (Megatron-Core 0.18): the model returns the loss, (b, s).
    loss = model(tokens, position_ids, mask, labels=labels, output_processor=output_processor())

    # 2. An output layer that returns the loss where it is given labels.
    Head = column_parallel_head(ColumnParallelLinear, softcap=30.0)
    loss = head(hidden, labels=labels)

    # 3. The function.
    loss = linear_cross_entropy(hidden, head.weight, labels, tp_group, sequence_parallel=True)

Labels are shifted already, as Megatron's are. The module imports nothing of Megatron: it was tested
with stand-ins that have the names of its output layer, config and parameters, not with Megatron.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import functional, sharded
from .._torch import private

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["column_parallel_head", "linear_cross_entropy", "output_processor"]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    tp_group: "ProcessGroup",
    *,
    bias: Tensor | None = None,
    sequence_parallel: bool = False,
    reduction: str = "none",
    softcap: float | None = None,
    gradient_accumulation_fusion: bool = False,
    reduce_hidden_grad: bool = True,
    **options: Any,
) -> Tensor | tuple[Tensor, ...]:
    """The cross-entropy of an output layer whose classes lie in equal shards, in Megatron's layout.

    :param hidden: (s, b, h), the same on all ranks of the group; with sequence_parallel this rank's
        (s / tp, b, h), as the last layer leaves it. Its gradient is the whole sum, in one
        collective: neither gather hidden before, nor copy it to the tensor-parallel region.
    :param weight: This rank's (V / tp, h). Rows that pad the vocabulary are classes like others, as
        they are for Megatron's own loss.
    :param labels: (b, s), whole on every rank, of the whole vocabulary. Those that are ignore_index
        have a loss of 0; others that the loss mask leaves out must be classes too.
    :param tp_group: The tensor-parallel group, ``output_layer.tp_group``.
    :param bias: This rank's (V / tp).
    :param sequence_parallel: Whether hidden has the tokens of this rank alone.
    :param reduction: "none": (b, s). "sum" and "mean" are over all tokens of labels.
    :param gradient_accumulation_fusion: Adds the weight's gradient to ``weight.main_grad`` in
        backward (an fp32 one gets the fp32 sums as they are; under torch.compile, and for another
        dtype, they are rounded to the weight's dtype first), and sets
        ``weight.grad_added_to_main_grad`` where the weight has that; what autograd leaves in
        ``weight.grad`` is then zero.
    :param reduce_hidden_grad: False leaves hidden's gradient as this rank's part of the sum.
    :param options: Those of :func:`cutloss.linear_cross_entropy`: ignore_index, logit_scale,
        temperature, label_smoothing, z_loss, max_workspace, return_lse, return_entropy, ...;
        token_weight, and a temperature for each token, are (b, s). There is no shift.
    :return: As :func:`cutloss.linear_cross_entropy` has it, fp32, per token as (b, s), the same
        bits on all ranks of the group.
    """
    if tp_group is None:
        raise TypeError(
            "tp_group must be the tensor-parallel group, got None: pass output_layer.tp_group, or "
            "megatron.core.parallel_state.get_tensor_model_parallel_group()"
        )
    _check_shapes(hidden, labels)
    if options.get("shift"):
        raise ValueError(
            f"shift is {options['shift']}, and Megatron's labels are shifted already, with the "
            f"sequence as their last dimension: leave shift out"
        )
    for name in ("token_weight", "temperature"):
        if isinstance(options.get(name), Tensor):
            options[name] = _sequence_first(name, options[name], labels)
    size = dist.get_world_size(tp_group)
    own = None
    if size > 1:
        own = sharded.equal(
            weight.shape[0], tp_group, reduce_hidden_grad, sequence_parallel=sequence_parallel
        )
    if gradient_accumulation_fusion and weight.requires_grad and torch.is_grad_enabled():
        main_grad = _main_grad(weight)
        is_direct = _adds_directly(weight, main_grad, hidden)
        weight = _IntoMainGrad.apply(weight, main_grad)
        if is_direct:
            setattr(weight, functional.ADDS_TO, main_grad)
    results = functional.linear_cross_entropy(
        hidden, weight, labels.transpose(0, 1).contiguous(), bias, reduction=reduction,
        softcap=softcap, vocab_parallel_options=own, **options,
    )  # fmt: skip
    if isinstance(results, tuple):
        return tuple(map(_batch_first, results))
    return _batch_first(results)


def _check_shapes(hidden: Tensor, labels: Tensor) -> None:
    if hidden.dim() != 3 or labels.dim() != 2 or hidden.shape[1] != labels.shape[0]:
        raise ValueError(
            f"hidden must be (s, b, h), and labels (b, s), as Megatron has them: got hidden "
            f"{tuple(hidden.shape)} and labels {tuple(labels.shape)}"
        )


def _sequence_first(name: str, t: Tensor, labels: Tensor) -> Tensor:
    """What has a number for each token, in the order of hidden."""
    if t.dim() == 0:
        return t
    if t.shape != labels.shape:
        raise ValueError(
            f"{name} must be (b, s), as labels are: got {tuple(t.shape)} and labels "
            f"{tuple(labels.shape)}"
        )
    return t.transpose(0, 1)


def _batch_first(t: Tensor) -> Tensor:
    return t.transpose(0, 1).contiguous() if t.dim() == 2 else t


# The gradient of the weight -----------------------------------------------------------------------


def _main_grad(weight: Tensor) -> Tensor:
    if hasattr(weight, "__fsdp_param__"):
        raise NotImplementedError(
            "gradient_accumulation_fusion is not supported for a weight of Megatron-FSDP, which "
            "makes its main_grad in backward: pass gradient_accumulation_fusion=False"
        )
    main_grad = getattr(weight, "main_grad", None)
    if not isinstance(main_grad, Tensor) or main_grad.shape != weight.shape:
        given = tuple(main_grad.shape) if isinstance(main_grad, Tensor) else main_grad
        raise ValueError(
            f"gradient_accumulation_fusion needs weight.main_grad, a tensor in the weight's shape "
            f"{tuple(weight.shape)}, as Megatron's DistributedDataParallel puts it there: got "
            f"{given}; wrap the model first, or pass gradient_accumulation_fusion=False"
        )
    return main_grad


def _adds_directly(weight: Tensor, main_grad: Tensor, hidden: Tensor) -> bool:
    """Whether the sums of the weight's gradient can be added to main_grad as they are, unrounded."""
    sums = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    is_plain = main_grad.is_contiguous() and main_grad.device == weight.device
    return main_grad.dtype == sums and is_plain and not torch.compiler.is_compiling()


class _IntoMainGrad(torch.autograd.Function):
    """The weight as it is, whose gradient is added to main_grad, or was (ADDS_TO)."""

    @staticmethod
    def forward(ctx, weight, main_grad):
        ctx.weight, ctx.main_grad = weight, main_grad  # which others add to: it is not saved
        ctx.set_materialize_grads(False)
        return weight.view_as(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        if gradient is not None:
            ctx.main_grad.add_(gradient)
        if not hasattr(ctx.weight, "grad_added_to_main_grad"):
            return None, None
        ctx.weight.grad_added_to_main_grad = True
        # Megatron's hooks wait for a gradient, and what else uses the weight (a tied embedding)
        # adds its own to this one.
        return torch.zeros_like(ctx.weight) if gradient is None else gradient.zero_(), None


# The output layer ---------------------------------------------------------------------------------


def _of_layer(
    layer: nn.Module,
    hidden: Tensor,
    weight: Tensor | None,
    labels: Tensor,
    config: Any,
    options: dict[str, Any],
) -> Tensor | tuple[Tensor, ...]:
    """The loss of an output layer with ColumnParallelLinear's attributes. `weight`: a tied one."""
    _check_config(config, options)
    weight = layer.weight if weight is None else weight
    if weight is None:
        raise ValueError(
            "the output layer has no weight of its own (skip_weight_param_allocation), and was "
            "given none: pass the shared embedding's"
        )
    bias = getattr(layer, "bias", None)
    if bias is not None and getattr(layer, "skip_bias_add", False):
        raise NotImplementedError(
            "the output layer leaves its bias to who called it (skip_bias_add), which nobody adds "
            "to logits that are not made: make the layer without a bias, or without skip_bias_add"
        )
    group = options.get("tp_group", getattr(layer, "tp_group", None))
    given = dict(
        bias=bias,
        sequence_parallel=getattr(layer, "sequence_parallel", False),
        gradient_accumulation_fusion=getattr(layer, "gradient_accumulation_fusion", False),
        reduce_hidden_grad=not getattr(layer, "disable_grad_reduce", False),
    )
    given.update((k, v) for k, v in options.items() if k != "tp_group")
    return linear_cross_entropy(hidden, weight, labels, group, **given)


def _check_config(config: Any, options: dict[str, Any]) -> None:
    """What a config does to logits, or to the weight's gradient, beside the product."""
    if getattr(config, "defer_embedding_wgrad_compute", False):
        raise NotImplementedError(
            "config.defer_embedding_wgrad_compute keeps the gradients of the logits for later, and "
            "there are none: switch it off"
        )
    if getattr(config, "use_mup", False) and "logit_scale" not in options:
        raise ValueError(
            "config.use_mup scales the logits, which are not made: pass logit_scale, what the "
            "model multiplies them with"
        )
    cap = getattr(config, "final_logit_softcapping", None)
    if cap and cap != options.get("softcap"):
        raise ValueError(
            f"config.final_logit_softcapping is {cap}, and softcap is {options.get('softcap')}: "
            f"pass softcap={cap}"
        )


def output_processor(**options: Any) -> Callable[..., Any]:
    """What ``GPTModel.forward(..., output_processor=...)`` takes (Megatron-Core 0.18): the model
    then returns the loss of its labels, (b, s), as it does without, and never makes logits.

    The group, sequence parallelism, bias and gradient accumulation are those of the model's output
    layer. That layer is not called, so its forward pre-hooks are, which wait for parameters that
    the distributed optimizer gathers.

    :param options: Those of :func:`linear_cross_entropy` here: softcap, logit_scale, z_loss, ...
    :raises ValueError: where the call has no labels: a call for logits takes no output_processor.
    """

    def processor(
        *,
        hidden_states: Tensor,
        output_layer: nn.Module,
        output_weight: Tensor | None = None,
        labels: Tensor | None = None,
        config: Any = None,
        **_: Any,
    ) -> Tensor | tuple[Tensor, ...]:
        if labels is None:
            raise ValueError(
                "this output_processor makes the loss of labels, and got none: leave it out of "
                "calls for logits"
            )
        for hook in private.forward_pre_hooks(output_layer):
            if hook(output_layer, (hidden_states,)) is not None:
                raise NotImplementedError(
                    f"a forward pre-hook of the output layer "
                    f"({getattr(hook, '__qualname__', type(hook).__name__)}) changes what goes in, "
                    f"which an output_processor does not know: use column_parallel_head instead"
                )
        config = getattr(output_layer, "config", None) if config is None else config
        return _of_layer(output_layer, hidden_states, output_weight, labels, config, options)

    return processor


def column_parallel_head(base: type[nn.Module], **options: Any) -> type[nn.Module]:
    """A class for output layers, over Megatron's ColumnParallelLinear, whose forward is the loss
    where it is given labels, and what it was where not::

        Head = column_parallel_head(ColumnParallelLinear, softcap=30.0)
        model.output_layer = Head(h, V, config=config, init_method=init, bias=False, ...)
        loss = model.output_layer(hidden, weight=shared, labels=labels)      # (b, s)

    The weight is used in the module's own forward, where all hooks that gather it work.

    :param base: The class of the layer, with its attributes: weight, bias, tp_group, config,
        sequence_parallel, gradient_accumulation_fusion, skip_bias_add. One whose forward does more
        than the product needs the options that do the same.
    :param options: Those of :func:`linear_cross_entropy` here, for every call.
    """

    class LinearCrossEntropyHead(base):
        def forward(
            self,
            input_: Tensor,
            weight: Tensor | None = None,
            runtime_gather_output: bool | None = None,
            *,
            labels: Tensor | None = None,
            **more: Any,
        ):
            if labels is None:
                if more:
                    raise TypeError(f"{', '.join(more)}: options of the loss need labels")
                return super().forward(input_, weight, runtime_gather_output)
            config = getattr(self, "config", None)
            return _of_layer(self, input_, weight, labels, config, {**options, **more})

    return LinearCrossEntropyHead

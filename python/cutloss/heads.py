"""Losses that hold their classifier: ``LinearCrossEntropyLoss`` and ``CausalLMHead``.

``LinearCrossEntropy`` has the options, and is given the classifier with each call. The two here
have one of those, and a classifier: their own, or another module's, which they then share.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._core import checks
from ._torch import checkpoint_names, partitioned, private
from ._torch.softcap import capped
from .module import LinearCrossEntropy


class _Head(nn.Module):
    """A classifier, `output_embeddings`, and the loss with its options."""

    def __init__(
        self,
        output_embeddings: nn.Module | int | None,
        out_features: int | None,
        in_features: int | None,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        options: dict,
    ):
        super().__init__()
        if isinstance(output_embeddings, int):
            if in_features is not None:
                raise TypeError(
                    f"in_features is given twice, as {output_embeddings} and as {in_features}"
                )
            output_embeddings, in_features = None, output_embeddings
        self.loss = LinearCrossEntropy(**options)
        factory = dict(device=device, dtype=dtype)
        if output_embeddings is None:
            if in_features is None or out_features is None:
                raise TypeError(
                    f"give an nn.Linear or nn.Embedding to use, or the sizes of a new one: got "
                    f"in_features={in_features} and out_features={out_features}"
                )
            output_embeddings = nn.Linear(in_features, out_features, bias=bias, **factory)
        else:
            _check_classifier(output_embeddings)
            _check_new(output_embeddings, out_features, in_features, device, dtype)
        # The module is shared, not its weight alone: so it stays shared through to_empty(), and
        # whatever else replaces parameters.
        self.output_embeddings = output_embeddings
        own_bias = None
        if bias and getattr(output_embeddings, "bias", None) is None:
            weight = output_embeddings.weight
            zeros = weight.new_zeros(weight.shape[0]).detach()
            if partitioned.is_dtensor(zeros):  # placed otherwise
                zeros = zeros.redistribute(placements=weight.placements)
            own_bias = nn.Parameter(zeros)
        self.register_parameter("own_bias", own_bias)
        self.register_load_state_dict_pre_hook(checkpoint_names.before_load)

    @property
    def weight(self) -> Tensor:
        """(V, D)"""
        return self.output_embeddings.weight

    @property
    def bias(self) -> Tensor | None:
        """(V)"""
        if self.own_bias is not None:
            return self.own_bias
        return getattr(self.output_embeddings, "bias", None)

    def __setattr__(self, name: str, value: object) -> None:
        """A weight or a bias is set in the module that has it, so that ``lm_head.weight =
        embedding.weight`` ties them. Without a bias, one is added to the head alone, as by
        bias=True."""
        if name == "weight":
            self.output_embeddings.weight = value
        elif name == "bias":
            if self.own_bias is not None or self.bias is None:
                self.own_bias = value
            else:
                self.output_embeddings.bias = value
        else:
            super().__setattr__(name, value)

    def __setstate__(self, state: dict) -> None:
        """A head that cutloss 0.1 pickled whole lacks the hook."""
        super().__setstate__(state)
        if not private.has_hooks_before_load(self):
            self.register_load_state_dict_pre_hook(checkpoint_names.before_load)

    def _check_weight(self) -> None:
        _check_classifier(self.output_embeddings)
        if not partitioned.is_dtensor(self.weight):
            return
        is_of_fsdp = partitioned.is_fully_sharded(self.output_embeddings)
        if is_of_fsdp or not partitioned.has_classes(self.weight):
            raise ValueError(partitioned.refusal_of_head(type(self).__name__, self.weight))

    def _placed(self, e: Tensor) -> Tensor:
        """As the plan that parallelize_module was given for output_embeddings says that e lies
        (whole, or a share of the tokens): its hooks run where the module is called, and it never
        is."""
        module = self.output_embeddings
        if partitioned.is_dtensor(module.weight) and isinstance(module, nn.Linear):
            for hook in filter(partitioned.only_places, private.forward_pre_hooks(module)):
                e = hook(module, (e,))
                e = e[0] if isinstance(e, tuple) else e
        return e

    def reset_parameters(self) -> None:
        """Of what is its own, as modules made on the meta device need: the bias is zero."""
        if self.own_bias is not None:
            nn.init.zeros_(self.own_bias)

    def _loss(
        self, e: Tensor, targets: Tensor, num_items_in_batch: int | Tensor | None, more: dict
    ) -> tuple[Tensor, ...]:
        e = self._placed(e)
        if num_items_in_batch is None:
            result = self.loss(e, self.weight, targets, self.bias, **more)
            return result if isinstance(result, tuple) else (result,)
        if self.loss.reduction == "none":
            raise ValueError(
                "num_items_in_batch divides a sum; reduction is 'none', which has none: leave one "
                "of them out"
            )
        items = checks.num_items(num_items_in_batch)
        result = self.loss(e, self.weight, targets, self.bias, reduction="sum", **more)
        total, *rest = result if isinstance(result, tuple) else (result,)
        if isinstance(items, Tensor):
            items = items.to(total.dtype)
            if items.device.type != "cpu":  # from there it is taken without a copy that waits
                items = items.to(total.device)
        return (total / items, *rest)


def _check_classifier(module: nn.Module) -> None:
    """The weight and bias have to be all that the module does: it is never called."""
    known = (nn.Linear.forward, nn.Embedding.forward)
    if not isinstance(module, nn.Module) or type(module).forward not in known:
        raise TypeError(
            f"output_embeddings must be an nn.Linear or an nn.Embedding, got "
            f"{type(module).__name__}: of another module the weight need not be all that it does "
            f"(an adapter, quantisation). Merge the adapter or dequantise first, or give "
            f"linear_cross_entropy the weight that the module amounts to"
        )
    if "forward" in module.__dict__:
        raise TypeError(
            f"output_embeddings, of type {type(module).__name__}, has a forward of its own (as "
            f"cutloss.patch and accelerate's hooks put there), which would not be called: remove it "
            f"(cutloss.unpatch(model), or accelerate's remove_hook_from_module), or call "
            f"linear_cross_entropy with the weight instead"
        )
    # What comes out of a shared nn.Embedding are rows of its weight, which hooks may change.
    hooks = private.forward_pre_hooks(module)
    if isinstance(module, nn.Linear):
        hooks += private.forward_hooks(module)
    if not all(partitioned.only_gathers(hook) or partitioned.only_places(hook) for hook in hooks):
        raise TypeError(
            f"output_embeddings, of type {type(module).__name__}, has forward hooks or forward "
            f"pre-hooks (as nn.utils.weight_norm has), which would not be called: remove them, use "
            f"nn.utils.parametrizations in place of the old weight_norm and spectral_norm, or "
            f"call linear_cross_entropy with the weight instead"
        )


def _check_new(
    module: nn.Module,
    out_features: int | None,
    in_features: int | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> None:
    for name, given, found in zip(
        ("out_features", "in_features"), (out_features, in_features), module.weight.shape
    ):
        if given is not None and given != found:
            raise ValueError(
                f"{name} is {given}, output_embeddings has {found}: leave {name} out, it is known"
            )
    if device is not None or dtype is not None:
        raise ValueError(
            f"device and dtype are for a new classifier, output_embeddings has its own: got "
            f"device={device} and dtype={dtype}; use .to() instead"
        )


class LinearCrossEntropyLoss(_Head):
    """The loss with its classifier::

        criterion = LinearCrossEntropyLoss(768, 50257)        # a classifier of its own
        criterion = LinearCrossEntropyLoss(model.lm_head)     # another module's, shared
        loss = criterion(hidden, targets)

    :param output_embeddings: An nn.Linear or nn.Embedding, whose weight (V, D) and bias are used
        and trained; or in_features, for a classifier of its own. Its weight may be a DTensor that
        tensor parallelism has sharded by its rows (ColwiseParallel of parallelize_module): then e
        is as its plan says, whole or a share of the tokens, and targets are whole.
    :param out_features: V.
    :param in_features: D.
    :param bias: Whether there is a bias. Where output_embeddings has one it is used anyway; where
        it has none this makes one, of zeros.
    :param device: Of its own classifier.
    :param dtype: Of its own classifier.
    :param impl: "auto" and "exact" are the same: exact gradients. "torch" stores the logits.
        "sampled" does not exist yet.
    :param options: All others of :class:`LinearCrossEntropy`.
    """

    def __init__(
        self,
        output_embeddings: nn.Module | int | None = None,
        out_features: int | None = None,
        *,
        in_features: int | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        impl: str = "auto",
        **options,
    ):
        options["impl"] = impl
        super().__init__(output_embeddings, out_features, in_features, bias, device, dtype, options)

    def forward(
        self,
        e: Tensor,
        targets: Tensor,
        *,
        num_items_in_batch: int | Tensor | None = None,
        token_weight: Tensor | None = None,
        temperature: float | Tensor | None = None,
        num_valid: int | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """As :func:`linear_cross_entropy` returns it; with num_items_in_batch the sum over that
        number, as in :class:`CausalLMHead`."""
        self._check_weight()
        more = dict(token_weight=token_weight, temperature=temperature, num_valid=num_valid)
        result = self._loss(e, targets, num_items_in_batch, more)
        return result if len(result) > 1 else result[0]


class CausalLMHeadOutput(NamedTuple):
    """What a :class:`CausalLMHead` returns; None is what was not asked for, or needs labels."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    lse: Tensor | None = None
    entropy: Tensor | None = None
    predictions: Tensor | None = None


class CausalLMHead(_Head):
    """The last layer of a language model: loss in training, logits in evaluation::

        self.embedding = nn.Embedding(50257, 768)
        self.head = CausalLMHead(self.embedding)              # tied
        self.head = CausalLMHead(768, 50257)                  # its own classifier
        self.head = CausalLMHead(self.embedding, hidden_size=2048)   # 2048 -> 768 -> 50257
        ...
        loss, logits, *_ = self.head(hidden, labels)

    In training no logits are made; in evaluation they are, beside the loss, and so they are where
    there are no labels. ``return_logits``, here or in a call, says otherwise. They are the logits
    whose loss it is, scaled and capped, for every position; but in bf16 and fp16 they are made in
    that dtype, bias, scale and cap included, and the loss is of logits in fp32.

    Hidden states whose label does not count are never used for the loss: they may be NaN.

    Its parameters are called ``output_embeddings.weight``, ``output_embeddings.bias``, and
    ``own_bias`` where it adds a bias to a module without one. load_state_dict also takes
    ``lm_head.weight`` and ``lm_head.bias``, the names of an nn.Linear in the place of this.

    :param output_embeddings: As in :class:`LinearCrossEntropyLoss`: the module to share, or
        in_features. A tied embedding stays one Parameter through state_dict, deepcopy, ``.to()``
        and ``to_empty()`` of a model that holds both.
    :param out_features: V, the size of the vocabulary.
    :param hidden_size: Size of what comes in, where it is not that of the embedding: then there is
        a projection from one to the other, without bias.
    :param in_features: D, the size of the embedding.
    :param bias: As in :class:`LinearCrossEntropyLoss`.
    :param device: Of what is new here, as dtype.
    :param return_logits: True, False, or None: in evaluation.
    :param shift: 1: labels are the tokens themselves. 0 for labels that are shifted already.
    :param impl: As in :class:`LinearCrossEntropyLoss`.
    :param options: All others of :class:`LinearCrossEntropy`: ignore_index, softcap, logit_scale,
        label_smoothing, z_loss, weight, reduction, return_entropy, ...
    """

    def __init__(
        self,
        output_embeddings: nn.Module | int | None = None,
        out_features: int | None = None,
        *,
        hidden_size: int | None = None,
        in_features: int | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        return_logits: bool | None = None,
        shift: bool | int = 1,
        impl: str = "auto",
        **options,
    ):
        options.update(shift=shift, impl=impl)
        is_tied = isinstance(output_embeddings, nn.Module)
        of_classifier = (None, None) if is_tied else (device, dtype)
        super().__init__(
            output_embeddings, out_features, in_features, bias, *of_classifier, options
        )
        checks.number("temperature", self.loss.temperature)  # the logits' too: one for all tokens
        self.return_logits = return_logits
        self.projection = None
        D = self.weight.shape[1]
        if hidden_size is not None and hidden_size != D:
            device = self.weight.device if device is None else device
            dtype = self.weight.dtype if dtype is None else dtype
            self.projection = nn.Linear(hidden_size, D, bias=False, device=device, dtype=dtype)

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        *,
        return_logits: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        token_weight: Tensor | None = None,
        num_valid: int | None = None,
    ) -> CausalLMHeadOutput:
        """
        :param hidden: (..., hidden_size).
        :param labels: (...), as targets of :func:`linear_cross_entropy`.
        :param return_logits: In place of the module's.
        :param num_items_in_batch: The loss is the sum over this number, at least 1, whatever the
            reduction: the number of tokens of all batches that make one step, divided by the
            number of processes whose gradients are averaged. Then it is what one large batch
            gives. A tensor of one number is not waited for, and gets no gradient.
        :param token_weight: (...), of each label.
        :param num_valid: As in :func:`linear_cross_entropy`.
        """
        self._check_weight()
        if return_logits is None:
            return_logits = self.return_logits
        if return_logits is None:
            return_logits = labels is None or not self.training
        if labels is None and not return_logits:
            raise ValueError("neither a loss, without labels, nor logits, by return_logits=False")
        if labels is not None:
            is_placed = partitioned.is_dtensor(self.weight) and self.projection is None
            checks.tensors(labels=labels, **{} if is_placed else {"hidden": hidden})
        logits = self.logits(self._projected(hidden)) if return_logits else None
        if labels is None:
            return CausalLMHeadOutput(logits=logits)
        e = self._projected(hidden, labels)
        more = dict(token_weight=token_weight, num_valid=num_valid)
        loss, *rest = self._loss(e, labels, num_items_in_batch, more)
        wanted = [n for n in ("lse", "entropy", "predictions") if getattr(self.loss, f"return_{n}")]
        return CausalLMHeadOutput(loss, logits, **dict(zip(wanted, rest)))

    def _projected(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """With labels: of zeros where no label is predicted from the hidden state. What is there,
        NaN too, takes no part in the loss; times a gradient of zero it would be NaN in that of the
        projection's weight."""
        if self.projection is None:
            return hidden
        if isinstance(labels, Tensor) and labels.shape == hidden.shape[:-1]:
            shift = checks.shift(self.loss.shift, labels)
            counts = labels != self.loss.ignore_index
            if shift > 0:
                counts = F.pad(counts[..., shift:], (0, shift), value=False)
            hidden = torch.where(counts[..., None], hidden, 0.0)
        return self.projection(hidden)

    def logits(self, e: Tensor) -> Tensor:
        """(..., V), of what comes out of the projection; with gradients, where they are wanted.
        Where the weight is a DTensor the logits of all classes are gathered, on every rank."""
        loss = self.loss
        weight = self.weight
        e = self._placed(e)
        if partitioned.is_dtensor(weight):
            e = partitioned.replicated(e, weight.device_mesh)
        z = F.linear(e, weight)
        if loss.logit_scale != 1.0:
            z = z * loss.logit_scale
        if self.bias is not None:
            z = z + self.bias.to(z.dtype)
        z = capped(partitioned.gathered(z), loss.softcap)
        return z if loss.temperature == 1.0 else z / loss.temperature

    def extra_repr(self) -> str:
        V, D = self.weight.shape
        return f"vocabulary={V}, embedding_size={D}, return_logits={self.return_logits}"

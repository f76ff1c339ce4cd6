"""Whether a patched model's loss is its own: on a tiny batch, or one of the user's, when it is
patched."""

import contextlib
import copy
import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import partitioned, private
from .._torch.partitioned import whole_shape
from . import _switch
from ._errors import LogitsNotMadeError
from ._switch import Switch

# Between two ways to compute the same: of the loss relative to 1 + |loss|, of gradients relative to
# their norm. In 16 bits the model rounds its logits, which cutloss does not.
_TOLERANCE = {torch.float64: (1e-4, 1e-3), torch.float32: (1e-4, 1e-3)}
_OF_16_BITS = (3e-2, 1e-1)


def verify(
    model: nn.Module, switch: Switch, stock, batch: Mapping[str, Any] | None = None
) -> None:
    """Raises where loss, or the gradient for what enters the classifier, differ from stock's.

    :param batch: Of the user. None: a tiny one is made."""
    name = type(model).__name__
    if batch is None:
        inputs, on = _inputs(model, switch, stock), "a tiny batch"
    else:
        inputs, on = _checked(model, batch), "the batch that verify was given"
    with _as_it_was(model, switch):
        want, want_grads = _of_stock(model, switch, stock, _copied(inputs), on, batch is None)
        switch.now.probes = []
        try:
            output, took_loss = _switch.without_logits(
                switch, model.training, stock, (), _copied(inputs)
            )
            _switch.check_loss(took_loss, model)
            got = _loss(output, name, on)
        except LogitsNotMadeError as error:
            raise NotImplementedError(
                f"cutloss.patch can not do the forward of {name}, and leaves the model as it was: "
                f"{error}"
            ) from error
        got_grads = _gradients(got, switch.now.probes)

    # A classifier that casts its input may be in fewer bits than that.
    dtypes = {want_grads[0].dtype, switch.layers[0].weight.dtype}
    of_loss, of_grads = max(_TOLERANCE.get(dtype, _OF_16_BITS) for dtype in dtypes)
    want, got = want.item(), got.item()
    if not abs(got - want) <= of_loss * (1 + abs(want)):
        raise NotImplementedError(
            f"on {on} the loss of {name} is {want:.7g}, and {got:.7g} with cutloss: its "
            f"forward does something to the logits or the loss that cutloss.patch does not do. The "
            f"model is unpatched; please report its class"
        )
    shapes = [[tuple(g.shape) for g in grads] for grads in (want_grads, got_grads)]
    if shapes[0] != shapes[1]:
        raise NotImplementedError(
            f"on {on} the forward of {name} calls its classifier with hidden states of shape "
            f"{shapes[0]}, and with cutloss of {shapes[1]}: it looks at the logits. The model is "
            f"unpatched; please report its class"
        )
    for w, g in zip(want_grads, got_grads):
        difference = _norm(g.to(w.dtype) - w)
        if not difference <= of_grads * _norm(w) + torch.finfo(w.dtype).tiny:
            raise NotImplementedError(
                f"on {on} the gradient for the hidden states of {name} has norm {_norm(w):.7g}, "
                f"and {_norm(g):.7g} with cutloss, and their difference has {difference:.7g}: its "
                f"forward does something to the logits that cutloss.patch does not do. The model "
                f"is unpatched; please report its class"
            )


def _of_stock(
    model: nn.Module, switch: Switch, stock, inputs: dict, on: str, is_tiny: bool
) -> tuple[Tensor, list[Tensor]]:
    """The model's own loss, and its gradients for what enters the classifier."""
    name = type(model).__name__
    switch.now.probes = []
    try:
        with torch.random.fork_rng(_cuda_devices(model)):  # both draw the same numbers, if any
            output = stock(**inputs)
    except Exception as error:
        advice = (
            "pass verify=batch, one of yours: a mapping of the forward's arguments, with labels; "
            "or verify=False, and nothing is compared"
            if is_tiny
            else f"verify takes what {name}(**batch) takes"
        )
        raise RuntimeError(
            f"cutloss.patch compares its loss with that of {name} on {on}, which the model "
            f"itself can not take ({type(error).__name__}: {error}): {advice}"
        ) from error
    if not switch.now.probes:
        raise NotImplementedError(
            f"the forward of {name} computes its loss without a call of its classifier "
            f"(another library may have replaced it): cutloss.patch can not take part in it"
        )
    loss = _loss(output, name, on)
    if not math.isfinite(loss.item()):
        raise ValueError(
            f"on {on} the loss of {name} itself is {loss.item()}, with which nothing can be "
            f"compared: take a batch in which some label counts (is not -100), and a model whose "
            f"weights are finite"
        )
    grads = _gradients(loss, switch.now.probes)
    # The tiny batch has labels that count: there it is the weights that are zero.
    if not is_tiny and not any(map(_norm, grads)):
        raise ValueError(
            f"on {on} the loss of {name} itself is {loss.item():.7g} with a gradient of zeros for "
            f"the hidden states, with which nothing can be compared: take a batch in which some "
            f"label counts (is not -100), and a classifier whose weights are not all zeros"
        )
    return loss.detach(), grads


def _loss(output, name: str, on: str) -> Tensor:
    has_names = isinstance(output, Mapping)
    loss = output.get("loss") if has_names else output[0] if isinstance(output, tuple) else output
    if isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad:
        return loss
    if isinstance(loss, Tensor):
        found = f"a tensor of shape {tuple(loss.shape)} in place of one number with a gradient"
    else:
        found = f"{type(loss).__name__} in its place"
    names = f", among {', '.join(map(str, output))}" if has_names else ""
    raise ValueError(
        f"on {on} the forward of {name} returns no loss ({found}{names}), and so there is none to "
        f"compare: give it labels of which it makes one, or pass verify=False"
    )


def _gradients(loss: Tensor, probes: list[Tensor]) -> list[Tensor]:
    """Whole ones; zeros where the loss makes no use of what went into the classifier."""
    grads = torch.autograd.grad(loss, probes, allow_unused=True)
    grads = [torch.zeros_like(p) if g is None else g for p, g in zip(probes, grads)]
    return list(map(partitioned.gathered, grads))


def _norm(t: Tensor) -> float:
    return float(torch.linalg.vector_norm(t, dtype=torch.float64))


def _refusal_of_meta(model: nn.Module) -> str:
    return (
        f"this {type(model).__name__} is on the meta device, where it can not run for "
        f"cutloss.patch to compare losses: pass verify=False, or patch it when it has weights"
    )


# A batch of the user ------------------------------------------------------------------------------


def check(value: object) -> Mapping[str, Any] | None:
    """The batch in patch's verify, if that is one."""
    if isinstance(value, (bool, int)):
        return None
    if isinstance(value, Mapping):
        return value
    raise TypeError(
        f"verify must be True, False or a batch, a mapping of the arguments of the model's forward "
        f"(dict(input_ids=..., labels=...)), got {type(value).__name__}"
    )


def _checked(model: nn.Module, batch: Mapping[str, Any]) -> dict:
    name = type(model).__name__
    if all(p.is_meta for p in model.parameters()):
        raise ValueError(_refusal_of_meta(model))
    labels = batch.get("labels")
    if labels is None:
        raise ValueError(
            f"the batch that verify was given has no labels, of which {name} could make a loss: it "
            f"has {', '.join(map(str, batch)) or 'nothing'}; add them, as in training"
        )
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"labels in the batch that verify was given must be a tensor, got "
            f"{type(labels).__name__}: a tokenizer, processor or collator makes tensors with "
            f"return_tensors='pt'"
        )
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    is_spread = len(devices) > 1 or hasattr(model, "hf_device_map")  # hooks move what comes in
    for key, value in batch.items():
        if not is_spread and isinstance(value, Tensor) and value.device not in devices:
            raise ValueError(
                f"{key} in the batch that verify was given is on {value.device}, and {name} on "
                f"{devices.pop()}: move one of them to the other"
            )
    return dict(batch)


def _copied(value: Any) -> Any:
    """What a forward may change in place: what it is given stays as it is."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if type(value) is dict:
        return {k: _copied(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    return copy.deepcopy(value)


# The tiny batch -----------------------------------------------------------------------------------


def _inputs(model: nn.Module, switch: Switch, stock) -> dict:
    """2 sequences of 4 ordinary tokens, one label ignored."""
    weight = model.get_input_embeddings().weight
    if weight.is_meta:
        raise ValueError(_refusal_of_meta(model))
    V = min(whole_shape(weight)[0], whole_shape(switch.layers[0].weight)[0])
    special = _special_tokens(model.config)
    ordinary = [i for i in range(min(V, 64 + len(special))) if i not in special] or [0]
    ids = torch.tensor([ordinary[(5 * i + 3) % len(ordinary)] for i in range(8)]).view(2, 4)
    ids = ids.to(weight.device)
    labels = ids.clone()
    labels[1, 2] = -100
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
    inputs["use_cache"] = False
    parameters = inspect.signature(stock).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return inputs
    return {k: v for k, v in inputs.items() if k in parameters}


def _special_tokens(config) -> set[int]:
    """Padding, images' placeholders and the like, which a model may treat in its own way."""
    found = set()
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for values in (vars(config), vars(text)):
        for key, value in values.items():
            if key.endswith(("token_id", "token_index")):
                found.update(value if isinstance(value, (list, tuple)) else [value])
    return found


def _cuda_devices(model: nn.Module) -> list[int]:
    return list({p.device.index for p in model.parameters() if p.device.type == "cuda"})


@contextlib.contextmanager
def _as_it_was(model: nn.Module, switch: Switch):
    """In evaluation mode, without a gradient for the classifier; everything restored after."""
    modes = [(m, m.training) for m in model.modules()]
    # Large buffers are masks or quantised weights, which no forward changes.
    buffers = [
        (module, name, b, b.clone() if b.numel() <= 2**20 else None)
        for module in model.modules()
        for name, b in private.buffers_of(module).items()
        if b is not None and not b.is_meta
    ]
    wanted = [p for p in model.get_output_embeddings().parameters() if p.requires_grad]
    try:
        with torch.random.fork_rng(_cuda_devices(model)), torch.enable_grad():
            model.eval()
            for p in wanted:
                p.requires_grad_(False)
            yield
    finally:
        switch.now.probes = None
        for p in wanted:
            p.requires_grad_(True)
        for module, training in modes:
            module.training = training
        for module, name, b, values in buffers:
            if values is not None:
                b.data.copy_(values)
            private.buffers_of(module)[name] = b

"""Whether a patched model's loss is its own: on a tiny batch, when it is patched."""

import contextlib
import inspect

import torch
from torch import Tensor, nn

from .. import _sharded
from .._torch import private
from . import _switch
from ._switch import Switch, shape
from ._unmade import LogitsNotMadeError

# Between two ways to compute the same: of the loss relative to 1 + |loss|, of gradients relative to
# their norm. In 16 bits the model rounds its logits, which cutloss does not.
_TOLERANCE = {torch.float64: (1e-4, 1e-3), torch.float32: (1e-4, 1e-3)}
_OF_16_BITS = (3e-2, 1e-1)


def verify(model: nn.Module, switch: Switch, stock) -> None:
    """Raises where loss, or the gradient for what enters the classifier, differ from stock's."""
    inputs = _inputs(model, switch, stock)
    name = type(model).__name__
    with _as_it_was(model, switch):
        try:
            switch.now.probes = []
            output = stock(**inputs)
            want = _loss(output)
            want_grads = torch.autograd.grad(want, switch.now.probes) if switch.now.probes else ()
        except Exception as error:
            raise RuntimeError(
                f"cutloss.patch compares its loss with that of {name} on a tiny batch, which the "
                f"model itself can not take (see above): pass verify=False and compare on a batch "
                f"of yours"
            ) from error
        if not switch.now.probes:
            raise NotImplementedError(
                f"the forward of {name} computes its loss without a call of its classifier "
                f"(another library may have replaced it): cutloss.patch can not take part in it"
            )
        switch.now.probes = []
        try:
            output, took_loss = _switch.without_logits(switch, model.training, stock, (), inputs)
            _switch.check_loss(took_loss, model)
            got = _loss(output)
        except LogitsNotMadeError as error:
            raise NotImplementedError(
                f"cutloss.patch can not do the forward of {name}, and leaves the model as it was: "
                f"{error}"
            ) from error
        got_grads = torch.autograd.grad(got, switch.now.probes)

    want_grads, got_grads = (list(map(_sharded.gathered, grads)) for grads in (want_grads, got_grads))
    # A classifier that casts its input may be in fewer bits than that.
    dtypes = {want_grads[0].dtype, switch.layers[0].weight.dtype}
    of_loss, of_grads = max(_TOLERANCE.get(dtype, _OF_16_BITS) for dtype in dtypes)
    want, got = want.item(), got.item()
    if not abs(got - want) <= of_loss * (1 + abs(want)):
        raise NotImplementedError(
            f"on a tiny batch the loss of {name} is {want:.7g}, and {got:.7g} with cutloss: its "
            f"forward does something to the logits or the loss that cutloss.patch does not do. The "
            f"model is unpatched; please report its class"
        )
    for w, g in zip(want_grads, got_grads):
        difference = _norm(g.to(w.dtype) - w)
        if not difference <= of_grads * _norm(w) + torch.finfo(w.dtype).tiny:
            raise NotImplementedError(
                f"on a tiny batch the gradient for the hidden states of {name} has norm "
                f"{_norm(w):.7g}, and with cutloss differs from it by {difference:.7g}: its "
                f"forward does something to the logits that cutloss.patch does not do. The model "
                f"is unpatched; please report its class"
            )


def _loss(output) -> Tensor:
    return output[0] if isinstance(output, tuple) else output["loss"]


def _norm(t: Tensor) -> float:
    return float(torch.linalg.vector_norm(t, dtype=torch.float64))


def _inputs(model: nn.Module, switch: Switch, stock) -> dict:
    """2 sequences of 4 ordinary tokens, one label ignored."""
    weight = model.get_input_embeddings().weight
    if weight.is_meta:
        raise ValueError(
            f"this {type(model).__name__} is on the meta device, where it can not run for "
            f"cutloss.patch to compare losses: pass verify=False, or patch it when it has weights"
        )
    V = min(shape(weight)[0], shape(switch.layers[0].weight)[0])
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
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng([d.index for d in devices]), torch.enable_grad():
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

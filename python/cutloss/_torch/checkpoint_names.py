"""The names under which a head takes its weight and bias from a checkpoint: its own, and those of
the layer whose place it took (decision 19)."""

from torch import nn

from . import private


def before_load(
    head: nn.Module,
    state_dict: dict,
    prefix: str,
    local_metadata: dict,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """A hook before load_state_dict: ``lm_head.weight`` and ``lm_head.bias`` get the names that the
    head has for them. One that it does not have keeps its name, and is unexpected."""
    for name in ("weight", "bias"):
        own = _own_name(head, name)
        key = prefix + name
        if own is None or key not in state_dict:
            continue
        if prefix + own in state_dict:
            error_msgs.append(
                f"{key} is there a second time, as {prefix}{own}: leave one of them out."
            )
        state_dict[prefix + own] = state_dict.pop(key)


def _own_name(head: nn.Module, name: str) -> str | None:
    if name == "bias" and head.own_bias is not None:
        return "own_bias"
    parameters = private.parameters_of(head.output_embeddings)
    # A weight that is computed (torch.nn.utils.parametrize) is no parameter.
    return None if parameters.get(name) is None else f"output_embeddings.{name}"

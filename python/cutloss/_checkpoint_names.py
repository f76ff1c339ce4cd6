"""The names of a head's parameters: those of the layer whose place it took, so that a checkpoint
with ``lm_head.weight`` loads where ``lm_head`` is a head, and is saved under that name.

A head holds its classifier as a submodule, which it may share (decision 7), and PyTorch puts the
names of submodules into those of parameters. Here it is left out: in the state_dict, by hooks of
the head, and in named_parameters, since optimizers, FSDP and distributed checkpoints take the names
of one for those of the other (decision 19).
"""

from collections.abc import Iterator

from torch import nn

from ._torch import private

CLASSIFIER = "output_embeddings"  # the submodule with the weight
OWN_BIAS = "_own"  # the submodule with the bias, where the classifier has none
_FORMERLY = "own_bias"  # the bias's name in checkpoints that cutloss 0.1 saved
_LOADING = "_checkpoint_loading"  # the attribute of a head while it is loaded


def named_modules(
    head: nn.Module, memo: set[nn.Module] | None, prefix: str, remove_duplicate: bool
) -> Iterator[tuple[str, nn.Module]]:
    """nn.Module.named_modules, in which the classifier has the head's own name."""
    memo = set() if memo is None else memo
    if head in memo:
        return
    if remove_duplicate:
        memo.add(head)
    yield prefix, head
    for name, module in head.named_children():
        path = ".".join(filter(None, (prefix, name)))
        path = prefix if name in (CLASSIFIER, OWN_BIAS) else path
        yield from module.named_modules(memo, path, remove_duplicate)


def install(head: nn.Module) -> None:
    """The hooks hold nothing of the head, so that a copy of it has hooks of its own."""
    head.register_state_dict_post_hook(_after_save)
    head.register_load_state_dict_pre_hook(_before_load)
    head.register_load_state_dict_post_hook(_after_load)


def of_distributed(head: nn.Module) -> dict[str, str]:
    """For torch.distributed.checkpoint: what has a name without the submodule's, and in which."""
    children = dict(head.named_children())
    return {
        name: child
        for child in (CLASSIFIER, OWN_BIAS)
        if child in children
        for module in (children[child],)
        for name in (*private.parameters_of(module), *dict(module.named_children()))
        if getattr(module, name) is not None and name not in children
    }


def _belongs_to_head(head: nn.Module, name: str) -> bool:
    """Whether a name, without the head's prefix, is that of something beside the classifier."""
    return name.split(".")[0] in dict(head.named_children())


def _after_save(head: nn.Module, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    classifier, bias, rest = {}, {}, {}
    for key in [key for key in state_dict if key.startswith(prefix)]:
        value, name = state_dict.pop(key), key[len(prefix) :]
        child, _, short = name.partition(".")
        if child == CLASSIFIER and not _belongs_to_head(head, short):
            classifier[prefix + short] = value
        elif child == OWN_BIAS:
            bias[prefix + short] = value
        else:
            rest[key] = value
    # In the order of an nn.Linear, then what is ours.
    state_dict.update({**classifier, **bias, **rest})


def _before_load(
    head: nn.Module,
    state_dict: dict,
    prefix: str,
    local_metadata: dict,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Back to paths, which a checkpoint of an earlier cutloss has already, and one that DeepSpeed
    gathers from ZeRO-3 by walking through the modules."""
    head.__dict__[_LOADING] = prefix, error_msgs
    children = dict(head.named_children())
    for key in [key for key in state_dict if key.startswith(prefix)]:
        name = key[len(prefix) :]
        if _belongs_to_head(head, name):
            continue
        short = "bias" if name == _FORMERLY else name
        child = OWN_BIAS if short == "bias" and OWN_BIAS in children else CLASSIFIER
        path = f"{prefix}{child}.{short}"
        if path in state_dict:
            error_msgs.append(f"{key} is there a second time, as {path}: leave one of them out.")
        state_dict[path] = state_dict.pop(key)


def _after_load(head: nn.Module, incompatible_keys) -> None:
    """What is said of names is said of those in the checkpoint."""
    found = head.__dict__.pop(_LOADING, None)
    if found is None:  # a shallow copy of a head, whose hooks are those of the head
        return
    prefix, error_msgs = found
    for child in (CLASSIFIER, OWN_BIAS):
        path = f"{prefix}{child}."
        for keys in incompatible_keys:
            keys[:] = [prefix + k.removeprefix(path) if k.startswith(path) else k for k in keys]
        for before in ("for ", 'named "'):  # as PyTorch puts a name
            error_msgs[:] = [m.replace(before + path, before + prefix) for m in error_msgs]

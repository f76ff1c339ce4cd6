"""The ways to compute the loss that are measured side by side."""

import contextlib
import dataclasses
import functools
import os

import torch
import torch.nn.functional as F

from cutloss.cli.bench import rivals
from cutloss.cli.bench.cases import IGNORED_TARGET
from cutloss.cli.bench.rivals import ALL_OPTIONS, Asked, Loss

ENGINE_VARIABLE = "CUTLOSS_ENGINE"  # which engine a plan is restricted to


@dataclasses.dataclass(frozen=True)
class Method:
    """A loss, by name; the rest is for cutloss only."""

    name: str
    schedule: str = "auto"
    max_workspace_mib: float | str | None = None  # a name: see plan.workspace
    engine: str | None = None
    num_valid: bool = False  # whether the number of targets that count is passed on

    @property
    def max_workspace(self):
        """Bytes, as linear_cross_entropy takes them; None is its default."""
        mib = self.max_workspace_mib
        return None if mib is None else round(mib * 2**20)

    @property
    def label(self):
        parts = [self.name]
        if self.engine:
            parts.append(self.engine)
        if self.schedule != "auto":
            parts.append(self.schedule)
        if isinstance(self.max_workspace_mib, str):
            parts.append(f"{self.max_workspace_mib} workspace")
        elif self.max_workspace_mib is not None:
            parts.append(f"{self.max_workspace_mib:g} MiB")
        if self.num_valid:
            parts.append("num_valid")
        return " ".join(parts)

    @property
    def kind(self):
        return LOSSES[self.name]

    def loss(self, e, c, targets, bias=None, **asked):
        """The mean loss of E (N,D), C (V,D), targets (N); asked as Asked says."""
        return self.kind.function(e, c, targets, Asked(method=self, bias=bias, **asked))


def _cutloss(e, c, targets, asked):
    from cutloss import linear_cross_entropy

    method = asked.method
    options = {"num_valid": asked.num_valid} if method.num_valid else {}
    if asked.softcap is not None:
        options["softcap"] = asked.softcap
    if asked.temperature is not None:
        options["temperature"] = asked.temperature
    return linear_cross_entropy(
        e,
        c,
        targets,
        asked.bias,
        ignore_index=IGNORED_TARGET,
        reduction=asked.reduction,
        schedule=method.schedule,
        max_workspace=method.max_workspace,
        **options,
    )


def _plain(e, c, targets, asked):
    return _plain_loss(
        e, c, targets, asked.bias, asked.softcap, asked.temperature, asked.reduction
    )


def _plain_loss(e, c, targets, bias, softcap, temperature, reduction):
    logits = F.linear(e, c, bias)
    if logits.dtype != torch.float64:
        logits = logits.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if temperature is not None:
        logits = logits / temperature
    return F.cross_entropy(logits, targets, ignore_index=IGNORED_TARGET, reduction=reduction)


@functools.cache
def _compiled():
    return torch.compile(_plain_loss, dynamic=False)


def _compile(e, c, targets, asked):
    return _compiled()(
        e, c, targets, asked.bias, asked.softcap, asked.temperature, asked.reduction
    )


def _torch_lce(e, c, targets, asked, **more):
    return F.linear_cross_entropy(
        e,
        c,
        targets,
        linear_bias=asked.bias,
        ignore_index=IGNORED_TARGET,
        reduction=asked.reduction,
        **more,
    )


def _torch_lce_chunked(e, c, targets, asked):
    return _torch_lce(e, c, targets, asked, options=torch.nn.LinearCrossEntropyOptions())


def _no_lce(device):
    if not hasattr(F, "linear_cross_entropy"):
        return f"PyTorch {torch.__version__} has no F.linear_cross_entropy"
    return None


def _no_lce_options(device):
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"PyTorch {torch.__version__} has no torch.nn.LinearCrossEntropyOptions"
    return None


_LOCAL = {
    "cutloss": Loss(_cutloss, "this package", options=ALL_OPTIONS),
    "plain": Loss(_plain, "matmul, float(), F.cross_entropy", options=ALL_OPTIONS),
    "compile": Loss(_compile, "plain under torch.compile", options=ALL_OPTIONS),
    "torch_lce": Loss(
        _torch_lce, "F.linear_cross_entropy without options", _no_lce, options={"bias"}
    ),
    "torch_lce_chunked": Loss(
        _torch_lce_chunked,
        "F.linear_cross_entropy with LinearCrossEntropyOptions()",
        _no_lce_options,
        options={"bias"},
    ),
}
LOSSES = {**_LOCAL, **rivals.LOSSES}
METHODS = tuple(LOSSES)
DEFAULT_METHODS = {"cpu": ("cutloss", "plain", "torch_lce", "torch_lce_chunked"), "cuda": METHODS}


def missing(name, device="cpu"):
    """Why a method cannot be run here, or None."""
    return LOSSES[name].missing(device)


def cannot(method, case):
    """Why a method does not do what the case asks for, or None."""
    lacks = [name for name in case.option_names if name not in method.kind.options]
    if lacks:
        return f"it has no {' and no '.join(lacks)}"
    return None


def run_pass(method, case, pass_name, e, c, targets, bias=None):
    """One forward, or forward and backward. Returns the loss; gradients are left in .grad."""
    forget_gradients(e, c, bias)
    asked = _asked(case)
    with only_engine(method.engine):
        if pass_name == "fw":
            with torch.no_grad(), case.autocast():
                return method.loss(e, c, targets, bias, **asked)
        with case.autocast():
            loss = method.loss(e, c, targets, bias, **asked)
        loss.backward()
    return loss.detach()


def row_losses(method, case, e, c, targets, bias=None):
    """The loss of each row (N), without gradients."""
    with only_engine(method.engine), torch.no_grad(), case.autocast():
        return method.loss(e, c, targets, bias, **_asked(case), reduction="none").reshape(-1)


def _asked(case):
    return {
        "softcap": case.option("softcap"),
        "temperature": case.option("temperature"),
        "num_valid": case.num_valid,
    }


def forget_gradients(*tensors):
    for tensor in tensors:
        if tensor is not None:
            tensor.grad = None


@contextlib.contextmanager
def only_engine(name):
    """Plans made inside take this engine, where the library reads the variable."""
    if name is None:
        yield
        return
    before = os.environ.get(ENGINE_VARIABLE)
    os.environ[ENGINE_VARIABLE] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[ENGINE_VARIABLE]
        else:
            os.environ[ENGINE_VARIABLE] = before


def synchronise(device):
    if device == "cuda":
        torch.cuda.synchronize()

"""The ways to compute the loss, and the bare matrix product they are measured in."""

import ctypes
import dataclasses
import functools

import torch
import torch.nn.functional as F


@dataclasses.dataclass(frozen=True)
class Method:
    """A loss, by name; the last two are for cutloss only."""

    name: str
    schedule: str = "auto"
    max_workspace_mib: float | None = None

    @property
    def max_workspace(self):
        """Bytes, as linear_cross_entropy takes them; None is its default."""
        mib = self.max_workspace_mib
        return None if mib is None else round(mib * 2**20)

    @property
    def label(self):
        parts = [self.name]
        if self.schedule != "auto":
            parts.append(self.schedule)
        if self.max_workspace_mib is not None:
            parts.append(f"{self.max_workspace_mib:g} MiB")
        return " ".join(parts)

    def loss(self, e, c, targets):
        """The mean loss of E (N,D), C (V,D), targets (N)."""
        return _LOSSES[self.name](self, e, c, targets)


def _cutloss(method, e, c, targets):
    from cutloss import linear_cross_entropy

    return linear_cross_entropy(
        e, c, targets, schedule=method.schedule, max_workspace=method.max_workspace
    )


def _plain(method, e, c, targets):
    logits = F.linear(e, c)
    if logits.dtype != torch.float64:
        logits = logits.float()
    return F.cross_entropy(logits, targets)


def _torch_lce(method, e, c, targets):
    return F.linear_cross_entropy(e, c, targets)


def _torch_lce_chunked(method, e, c, targets):
    return F.linear_cross_entropy(e, c, targets, options=torch.nn.LinearCrossEntropyOptions())


_LOSSES = {
    "cutloss": _cutloss,
    "plain": _plain,
    "torch_lce": _torch_lce,
    "torch_lce_chunked": _torch_lce_chunked,
}
METHODS = tuple(_LOSSES)


def missing(name):
    """Why a method cannot be run with the PyTorch at hand, or None."""
    if name == "torch_lce" and not hasattr(F, "linear_cross_entropy"):
        return f"PyTorch {torch.__version__} has no F.linear_cross_entropy"
    if name == "torch_lce_chunked" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"PyTorch {torch.__version__} has no torch.nn.LinearCrossEntropyOptions"
    return None


def run_pass(method, case, which, e, c, targets):
    """One forward, or forward and backward. Returns the loss; gradients are left in .grad."""
    e.grad = c.grad = None
    if which == "fw":
        with torch.no_grad(), case.autocast():
            return method.loss(e, c, targets)
    with case.autocast():
        loss = method.loss(e, c, targets)
    loss.backward()
    return loss.detach()


def synchronise(device):
    if device == "cuda":
        torch.cuda.synchronize()


def products(case, e, c):
    """Library products E·Cᵀ by name, each into memory that is there: its argument out."""
    e = e.detach().to(case.product_dtype)  # (N,D)
    c = c.detach().to(case.product_dtype)  # (V,D)
    by_row = torch.empty(case.N, case.V, dtype=e.dtype, device=e.device)
    by_column = torch.empty(case.V, case.N, dtype=e.dtype, device=e.device)
    found = {
        "torch mm": functools.partial(torch.mm, e, c.t(), out=by_row),
        "torch mm, transposed": functools.partial(torch.mm, c, e.t(), out=by_column),
    }
    onednn = _onednn_product(case, e, c) if case.device == "cpu" else None
    if onednn:
        found["oneDNN gemm"] = onednn
    return found


_ONEDNN = {torch.float32: "dnnl_sgemm", torch.bfloat16: "dnnl_gemm_bf16bf16f32"}


def _onednn_product(case, e, c):
    """oneDNN's own product, where its library is installed: it can be ahead of PyTorch's."""
    if e.dtype not in _ONEDNN:
        return None
    for library in ("libdnnl.so.3", "libdnnl.so.2"):
        try:
            gemm = getattr(ctypes.CDLL(library), _ONEDNN[e.dtype])
        except (OSError, AttributeError):
            continue
        break
    else:
        return None
    size, char, real = ctypes.c_int64, ctypes.c_char, ctypes.c_float

    def matrix(tensor):  # row-major, followed by its row stride
        return ctypes.c_void_p(tensor.data_ptr()), size(tensor.stride(0))

    def product(out):
        shape = size(case.N), size(case.V), size(case.D)
        operands = *matrix(e), *matrix(c), real(0.0), *matrix(out)
        status = gemm(char(b"N"), char(b"T"), *shape, real(1.0), *operands)
        if status != 0:
            raise RuntimeError(f"oneDNN's {_ONEDNN[e.dtype]} failed with status {status}")

    product = functools.partial(product, out=torch.empty(case.N, case.V))
    if e.dtype == torch.bfloat16:  # refused where the processor has no AVX-512
        try:
            product()
        except RuntimeError:
            return None
    return product

"""The bare matrix product that times are measured in."""

import ctypes
import functools

import torch

from cutloss.cli import proc

CHUNK = 2048  # rows at a time on CUDA


def products(case, e, c):
    """Library products E·Cᵀ by name, each into memory that is there: its argument out."""
    e = e.detach().to(case.product_dtype)  # (N,D)
    c = c.detach().to(case.product_dtype)  # (V,D)
    if case.device == "cuda":
        out = torch.empty(min(CHUNK, case.N), case.V, dtype=e.dtype, device=e.device)
        return {f"torch mm, {len(out)} rows at a time": functools.partial(_chunked, e, c, out=out)}
    by_row = torch.empty(case.N, case.V, dtype=e.dtype)
    by_column = torch.empty(case.V, case.N, dtype=e.dtype)
    found = {
        "torch mm": functools.partial(torch.mm, e, c.t(), out=by_row),
        "torch mm, transposed": functools.partial(torch.mm, c, e.t(), out=by_column),
    }
    onednn = _onednn_product(case, e, c)
    if onednn:
        found["oneDNN gemm"] = onednn
    return found


def _chunked(e, c, out):
    """All rows of the product, one chunk after the other into the same memory: what any method
    that does not store the logits would have to do at least."""
    rows = len(out)
    for n in range(0, len(e), rows):
        chunk = e[n : n + rows]
        torch.mm(chunk, c.t(), out=out[: len(chunk)])


_ONEDNN = {torch.float32: "dnnl_sgemm", torch.bfloat16: "dnnl_gemm_bf16bf16f32"}


def _onednn_product(case, e, c):
    """oneDNN's own product, of the library that cutloss has loaded: it can be ahead of PyTorch's."""
    libraries = proc.loaded(r"\S*/libdnnl[-.\w]*")  # a wheel's has a name of its own
    if e.dtype not in _ONEDNN or not libraries:
        return None
    gemm = getattr(ctypes.CDLL(libraries[0]), _ONEDNN[e.dtype])
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

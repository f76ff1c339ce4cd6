"""The same bits, again: from run to run, and whatever the number of threads."""

import concurrent.futures

import pytest
import torch
from helpers import problems
from helpers.problems import BF16, F32, F64

from cutloss import linear_cross_entropy

WAYS = {
    "immediate": {},
    "chunks": {"max_workspace": 4 << 20},
    "kept_logits": {"return_lse": True},
    "vocabulary": {"schedule": "vocabulary"},
}
ways = pytest.mark.parametrize("options", WAYS.values(), ids=WAYS.keys())
dtypes = pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)


def everything(p, **options):
    result = linear_cross_entropy(
        p.e, p.c, p.targets, p.bias, softcap=8.0, z_loss=1e-3, **options
    )
    outputs = result if isinstance(result, tuple) else (result,)
    return *outputs, *torch.autograd.grad(sum(out.sum() for out in outputs), p.parameters)


@pytest.mark.usefixtures("device")
@ways
@dtypes
def test_runs(options, dtype):
    p = problems.make((330,), V=3001, D=40, dtype=dtype, bias=True)
    first = everything(p, **options)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(everything(p, **options), first))


@ways
@dtypes
def test_threads(options, dtype):
    """Sums are in an order that the number of threads does not change. The libraries' products
    may be cut differently: then results agree to rounding, and that they do is seen here."""
    p = problems.make((330,), V=3001, D=40, dtype=dtype, bias=True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = everything(p, **options)
        again = everything(p, **options)
        torch.set_num_threads(2)
        together = everything(p, **options)
    finally:
        torch.set_num_threads(threads)
    for a, b, c in zip(alone, again, together):
        assert torch.equal(a, b)
        torch.testing.assert_close(c, a, rtol=2e-2 if a.dtype == BF16 else 1e-5, atol=1e-6)


@pytest.mark.usefixtures("device")
def test_calls_from_many_threads():
    """No state is shared between calls."""
    ps = [problems.make((100,), V=501 + 10 * i, D=24, seed=i) for i in range(4)]
    expected = [everything(p) for p in ps]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for got, want in zip(pool.map(everything, ps), expected):
                for a, b in zip(got, want):
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

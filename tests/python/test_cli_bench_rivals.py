"""cutloss bench: how it calls the libraries that it compares with."""

import pathlib
import sys
import types

import pytest
import torch

from cutloss.cli.bench import cases, errors, methods, rivals
from cutloss.cli.bench.cases import Case
from cutloss.cli.bench.methods import Method

BENCHMARKS = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"


def fake_module(monkeypatch, name, **contents):
    module = types.ModuleType(name)
    module.__dict__.update(contents)
    monkeypatch.setitem(sys.modules, name, module)
    parent, _, last = name.rpartition(".")
    if parent:
        if parent not in sys.modules:
            fake_module(monkeypatch, parent)
        setattr(sys.modules[parent], last, module)


class _Function:
    """Something with a function apply, as an autograd function has."""

    def __init__(self, apply):
        self.apply = apply


def _fake_rivals(monkeypatch):
    """The signatures of the pinned versions; plain PyTorch inside."""

    def loss(e, c, t, bias=None, ignore_index=-100, softcap=None, reduction="mean", T=1.0):
        z = torch.nn.functional.linear(e, c, bias)
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        return torch.nn.functional.cross_entropy(
            z / T, t, ignore_index=ignore_index, reduction=reduction
        )

    def linear_cross_entropy(
        e, c, targets, bias=None, ignore_index=-100, softcap=None, reduction="mean", shift=0,
        return_lse=False, filter_eps="auto", accum_e_fp32=False, accum_c_fp32=False,
        filter_e_grad=True, filter_c_grad=True, impl="cce", vocab_parallel_options=None,
    ):  # fmt: skip
        assert impl in ("cce", "cce_exact", "cce_kahan_full_c", "torch_compile")
        return loss(e, c, targets, bias, ignore_index, softcap, reduction)

    def triton(
        _input, weight, target, bias=None, ce_weight=None, ignore_index=-100, lse_square_scale=0.0,
        label_smoothing=0.0, reduction="mean", softcap=None, return_z_loss=False, accum_dtype=None,
        use_token_scaling=False, return_token_accuracy=False, return_predicted_tokens=False,
        ce_impl=None, ce_mode=None, chunk_mem_const=1,
    ):  # fmt: skip
        assert not (lse_square_scale or label_smoothing or return_z_loss) and ce_weight is None
        assert accum_dtype in (None, torch.float32)
        result = loss(_input, weight, target, bias, ignore_index, softcap, reduction)
        return result, None, None, None

    def scaled(
        _input, weight, target, temperature=1.0, ignore_index=-100, m_tiles_per_cluster=1,
        return_entropy=False, selected_token_ids=None,
    ):  # fmt: skip
        return loss(_input, weight, target, None, ignore_index, None, "none", temperature)

    def stored(_input, weight, target, ignore_index=-100, reduction="mean"):
        return loss(_input, weight, target, None, ignore_index, None, reduction)

    def chunked(
        x, weight, target, chunk_size=4096, ignore_index=-100, reduction="mean", tuned=True,
        use_scaled_exp=None,
    ):  # fmt: skip
        assert chunk_size in (1024, 4096) and use_scaled_exp in (True, False)
        return loss(x, weight, target, None, ignore_index, None, reduction)

    ops, sm90 = "liger_kernel.ops", "liger_kernel.ops.cutedsl.ops"
    fake_module(monkeypatch, "cut_cross_entropy", linear_cross_entropy=linear_cross_entropy)
    fake_module(
        monkeypatch,
        f"{ops}.fused_linear_cross_entropy",
        LigerFusedLinearCrossEntropyFunction=_Function(triton),
    )
    fake_module(
        monkeypatch,
        f"{sm90}.fused_scaled_cross_entropy_sm90",
        LigerFusedScaledCrossEntropySM90Function=_Function(scaled),
    )
    fake_module(
        monkeypatch,
        f"{sm90}.fused_linear_cross_entropy_sm90",
        liger_fused_linear_cross_entropy_sm90=stored,
    )
    fake_module(monkeypatch, "quack.linear_cross_entropy", chunked_linear_cross_entropy=chunked)


@pytest.mark.parametrize("name", rivals.LOSSES)
def test_rivals_are_called_as_they_want(name, monkeypatch):
    _fake_rivals(monkeypatch)
    options = "+".join(o for o in cases.OPTIONS if o in rivals.LOSSES[name].options)
    case = Case(12, 8, 60, "fp32", ignored=0.25, options=options)
    tensors = (*cases.inputs(case), cases.bias_of(case))
    expected = errors.reference(case, tensors)
    method = Method(name)
    e, c, targets, bias = cases.leaves(tensors, "fwbw")
    loss = methods.run_pass(method, case, "fwbw", e, c, targets, bias)
    assert errors.loss_error(loss.item(), expected) < 1e-5
    assert max(errors.errors_of((e.grad, c.grad), (expected.de, expected.dc))) < 1e-5
    row_error = errors.row_error(method, case, tensors, expected)
    assert row_error is None or row_error < 1e-5
    assert (row_error is None) == (not rivals.LOSSES[name].per_row)


def test_rivals_are_pinned_as_the_adapters_expect():
    text = (BENCHMARKS / "rivals.txt").read_text()
    for package, pinned in rivals.PINNED.items():
        line = next(line for line in text.splitlines() if line.startswith(package))
        assert pinned in line, (package, line)

"""Losses by name."""

import pytest
import torch
from helpers import problems

import cutloss
from cutloss import LinearCrossEntropy, get_loss, losses_available

pytestmark = pytest.mark.usefixtures("device")


def test_every_name_is_a_loss_that_is_called_in_one_way():
    p = problems.make((40,), V=211, D=24, bias=True)
    want = LinearCrossEntropy()(p.e, p.c, p.targets, p.bias)
    assert {"cce", "cut_cross_entropy", "exact", "torch", "liger"} <= set(losses_available())
    for name, what in losses_available().items():
        loss = get_loss(name)
        assert isinstance(loss, LinearCrossEntropy) and what
        torch.testing.assert_close(loss(p.e, p.c, p.targets, p.bias), want)


@pytest.mark.parametrize("name", ["Cut-Cross-Entropy", "CCE", "liger-fused-linear-cross-entropy"])
def test_spelling(name):
    assert isinstance(get_loss(name), LinearCrossEntropy)


def test_from_a_configuration():
    loss = get_loss(**{"name": "exact", "softcap": 30.0, "shift": 1, "z_loss": 1e-4})
    assert (loss.impl, loss.softcap, loss.shift, loss.z_loss) == ("exact", 30.0, 1, 1e-4)
    assert get_loss("torch", reduction="sum").impl == "torch"
    assert get_loss("cce", impl="cce_exact", filter_eps=None).impl == "cce_exact"


def test_ligers_options():
    weight = torch.ones(7)
    loss = get_loss(
        "liger", ce_weight=weight, lse_square_scale=1e-3, softcap=5.0, accum_dtype=torch.float32
    )
    assert loss.weight is weight and loss.z_loss == 1e-3 and loss.softcap == 5.0


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"name": "focal"}, ValueError, "no loss 'focal'; there are exact, .*cut_cross_entropy"),
        ({"name": "sampled"}, NotImplementedError, "not built yet: use 'exact'"),
        ({"name": None}, TypeError, "must be a str, got NoneType"),
        ({"name": "exact", "soft_cap": 1}, TypeError, "no option 'soft_cap'; it has .*softcap"),
        ({"name": "exact", "impl": "torch"}, TypeError, "impl is what its name says: choose"),
        ({"name": "torch", "impl": "exact"}, TypeError, "no option 'impl'"),
        ({"name": "liger", "z_loss": 1e-4}, TypeError, "it has .*lse_square_scale.*compat.liger"),
        ({"name": "liger", "return_z_loss": True}, TypeError, "LigerFusedLinearCrossEntropyLoss"),
        ({"name": "liger", "accum_dtype": "float64"}, NotImplementedError, "leave accum_dtype out"),
        ({"name": "cce", "z_loss": "1e-4"}, TypeError, "z_loss must be a number, got '1e-4'"),
        ({"name": "liger", "accum_dtype": "nonsense"}, TypeError, "got 'nonsense'.*leave it out"),
        ({"name": "liger", "accum_dtype": torch.int32}, TypeError, "got torch.int32"),
        ({"name": "exact", "temperature": -1.0}, ValueError, "finite and > 0, got -1.0"),
        ({"name": "exact", "temperature": "1"}, TypeError, "temperature must be a number, got '1'"),
        ({"name": "exact", "shift": -3}, ValueError, "shift must be >= 0, got -3"),
        ({"name": "exact", "shift": "1"}, TypeError, "a bool or an int, got '1'"),
        ({"name": "exact", "max_workspace": "x"}, TypeError, "number of bytes .*got 'x'"),
        ({"name": "exact", "max_workspace": -1}, ValueError, "got -1"),
        ({"name": "torch", "max_workspace": 1}, ValueError, "no max_workspace, got .*=1"),
        ({"name": "exact", "ignore_index": "a"}, TypeError, "must be an int, got 'a'"),
        ({"name": "exact", "filter_eps": "zz"}, TypeError, "filter_eps must be .*got 'zz'"),
        ({"name": "exact", "return_lse": "no"}, TypeError, "must be a bool, got 'no'"),
        ({"name": "exact", "weight": "1, 2"}, TypeError, "a tensor .*got '1, 2'"),
        ({"name": "exact", "weight": [1.0, "2"]}, TypeError, r"weight\[1\] must be a number"),
        ({"name": "exact", "weight": torch.ones(2, 3)}, ValueError, r"\(V\), got \(2, 3\)"),
        ({"name": "exact", "weight": torch.ones(3).long()}, TypeError, "got torch.int64"),
        ({"name": "cce", "reduction": "avg"}, ValueError, "'mean', 'sum', 'none', got 'avg'"),
    ],
    ids=str,
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        get_loss(**arguments)


@pytest.mark.parametrize("name, option", [("exact", "weight"), ("liger", "ce_weight")])
def test_class_weights_of_a_configuration(name, option):
    p = problems.make((40,), V=7, D=24)
    values = [1, 2, 0.5, 1, 0, 3, 1]
    loss = get_loss(name, **{option: values}).to(problems.device)
    want = LinearCrossEntropy(weight=torch.tensor(values, device=problems.device))
    torch.testing.assert_close(loss(p.e, p.c, p.targets), want(p.e, p.c, p.targets))


@pytest.mark.parametrize("given", [None, "float32", "torch.bfloat16", torch.float32])
def test_accum_dtype_of_liger_is_not_needed(given):
    assert isinstance(get_loss("liger", accum_dtype=given), LinearCrossEntropy)


def test_the_mean_over_no_token_under_ligers_name():
    """NaN as of all names here; cutloss.compat.liger has Liger's 0."""
    p = problems.make((4,), V=7, D=24)
    assert get_loss("liger")(p.e, p.c, torch.full_like(p.targets, -100)).isnan()


def test_names():
    assert {"get_loss", "losses_available"} <= set(cutloss.__all__)

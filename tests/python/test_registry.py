"""Losses by name."""

import problems
import pytest
import torch

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
        ({"name": "cce", "reduction": "avg"}, ValueError, "'mean', 'sum', 'none', got 'avg'"),
    ],
    ids=str,
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        get_loss(**arguments)


def test_names():
    assert {"get_loss", "losses_available"} <= set(cutloss.__all__)

"""The names and argument order of liger-kernel 0.8.5, against plain PyTorch with stored logits."""

import inspect

import pytest
import torch
from helpers import problems
from helpers.liger_cross_entropy import OPTIONS, REQUIRED, options_of, plain
from helpers.problems import BF16, F32, F64
from helpers.tolerance import assert_close

import cutloss
from cutloss.compat import liger
from cutloss.compat.liger import (
    CrossEntropyOutput,
    LigerFusedLinearCrossEntropyLoss,
    liger_fused_linear_cross_entropy,
)

pytestmark = pytest.mark.usefixtures("device")

OF_MODULE = [
    ("ce_weight", None),
    ("ignore_index", -100),
    ("lse_square_scale", 0.0),
    ("label_smoothing", 0.0),
    ("reduction", "mean"),
    ("softcap", None),
    ("return_z_loss", False),
    ("accum_dtype", None),
    ("use_token_scaling", False),
    ("return_token_accuracy", False),
    ("return_predicted_tokens", False),
]
OF_FUNCTION = [("input", REQUIRED), ("weight", REQUIRED), ("target", REQUIRED), ("bias", None)]


def test_signatures_are_theirs():
    def described(f):
        return [(p.name, p.default) for p in inspect.signature(f).parameters.values()]

    assert described(LigerFusedLinearCrossEntropyLoss) == OF_MODULE
    wanted = [*OF_FUNCTION, *OF_MODULE, ("chunk_mem_const", 1)]
    assert described(liger_fused_linear_cross_entropy) == wanted
    forward = list(inspect.signature(LigerFusedLinearCrossEntropyLoss.forward).parameters)
    assert forward == ["self", "lin_weight", "_input", "target", "bias"]
    assert cutloss.compat.liger is liger
    with pytest.raises(AttributeError, match="no attribute 'ligger'"):
        cutloss.compat.ligger


def problem():
    return problems.make((60,), V=211, D=24, bias=True)


@pytest.mark.parametrize("outputs", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", OPTIONS)
def test_as_the_formula(name, reduction, outputs):
    p = problem()
    options = options_of(name, reduction)
    if "ignore_index" in options:
        p.targets[p.targets == -100] = options["ignore_index"]
    more = dict.fromkeys(
        ["return_z_loss", "return_token_accuracy", "return_predicted_tokens"], outputs
    )
    module = LigerFusedLinearCrossEntropyLoss(**options, **more).to(problems.device)
    result = module(p.c, p.e, p.targets, p.bias)
    assert isinstance(result, CrossEntropyOutput) == outputs
    loss = result.loss if outputs else result
    exact = p.to(F64)
    truth = plain(exact.e, exact.c, p.targets, exact.bias, **options)
    simple = plain(p.e, p.c, p.targets, p.bias, **options)
    assert_close(loss, truth[0], simple[0], "loss")
    upstream = torch.linspace(0.5, 1.5, loss.numel(), device=loss.device).reshape(loss.shape)
    grads = [
        torch.autograd.grad(x, q.parameters, upstream.to(x.dtype))
        for x, q in ((loss, p), (truth[0], exact), (simple[0], p))
    ]
    for what, got, want, other in zip(("input", "weight", "bias"), *grads):
        assert_close(got, want, other, what)
    if outputs:
        torch.testing.assert_close(result.z_loss, simple[1])
        torch.testing.assert_close(result.token_accuracy, simple[2])
        assert torch.equal(result.predicted_tokens, simple[3])
        assert not result.z_loss.requires_grad


def test_function_and_module_are_one():
    p = problem()
    module = LigerFusedLinearCrossEntropyLoss(None, -100, 1e-3, 0.1, "sum", 5.0)
    got = liger_fused_linear_cross_entropy(
        p.e, p.c, p.targets, p.bias, None, -100, 1e-3, 0.1, "sum", 5.0, False, BF16,
        chunk_mem_const=4,
    )  # fmt: skip
    assert torch.equal(got, module(p.c, p.e, p.targets, p.bias))


@pytest.mark.parametrize("which", ["z_loss", "token_accuracy", "predicted_tokens"])
def test_one_output_alone(which):
    p = problem()
    out = LigerFusedLinearCrossEntropyLoss(**{f"return_{which}": True})(p.c, p.e, p.targets)
    assert [n for n, value in vars(out).items() if value is not None] == ["loss", which]


@pytest.mark.parametrize("scaling", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_ignored_is_zero(reduction, scaling):
    p = problem()
    p.targets.fill_(-100)
    module = LigerFusedLinearCrossEntropyLoss(reduction=reduction, use_token_scaling=scaling)
    loss = module(p.c, p.e, p.targets, p.bias)
    assert not loss.any() and loss.isfinite().all()
    for g in torch.autograd.grad(loss.sum(), p.parameters):
        assert not g.any()


def test_bf16_and_autocast():
    p = problem()
    want = plain(p.e, p.c, p.targets, p.bias)[0]
    module = LigerFusedLinearCrossEntropyLoss()
    with torch.autocast(problems.device, BF16):
        loss = module(p.c, p.e, p.targets, p.bias)
    assert loss.dtype == F32
    torch.testing.assert_close(loss, want, rtol=1e-2, atol=0)


@pytest.mark.parametrize("scaling", [False, True])
def test_one_graph(scaling):
    torch._dynamo.reset()
    p = problem()
    module = LigerFusedLinearCrossEntropyLoss(
        use_token_scaling=scaling, return_z_loss=True, lse_square_scale=1e-3
    )
    compiled = torch.compile(lambda: module(p.c, p.e, p.targets, p.bias).loss, fullgraph=True)
    torch.testing.assert_close(compiled(), module(p.c, p.e, p.targets, p.bias).loss)


def test_class_weights_follow_the_module_and_stay_out_of_its_state():
    module = LigerFusedLinearCrossEntropyLoss(torch.ones(211))
    assert not module.state_dict() and module.to("meta").ce_weight.device.type == "meta"


REFUSALS = {
    "swapped": (
        lambda p: LigerFusedLinearCrossEntropyLoss()(p.e, p.c, p.targets),
        ValueError,
        r"input \(211, 24\), weight \(60, 24\) and target \(60,\); input and weight are swapped",
    ),
    "shapes": (
        lambda p: LigerFusedLinearCrossEntropyLoss()(p.c, p.e, p.targets[:7]),
        ValueError,
        r"and target \(7,\)$",
    ),
    "not_a_tensor": (
        lambda p: LigerFusedLinearCrossEntropyLoss()(p.c, p.e, [1]),
        TypeError,
        "target must be a torch.Tensor, got list",
    ),
    "accum_dtype": (
        lambda p: LigerFusedLinearCrossEntropyLoss(accum_dtype=F64)(p.c, p.e, p.targets),
        NotImplementedError,
        "accum_dtype is torch.float64 and input torch.float32: cutloss accumulates in float32",
    ),
    "accum_dtype_name": (
        lambda p: LigerFusedLinearCrossEntropyLoss(accum_dtype="fp32")(p.c, p.e, p.targets),
        TypeError,
        "accum_dtype must be a torch.dtype or None, got 'fp32'",
    ),
    "reduction": (
        lambda p: LigerFusedLinearCrossEntropyLoss(reduction="batchmean"),
        ValueError,
        "'mean', 'sum', 'none', got 'batchmean'",
    ),
    "softcap": (
        lambda p: LigerFusedLinearCrossEntropyLoss(softcap=0.0),
        ValueError,
        "softcap must be finite and > 0",
    ),
    "lse_square_scale": (
        lambda p: LigerFusedLinearCrossEntropyLoss(lse_square_scale=-1.0),
        ValueError,
        "got -1.0",
    ),
    "ce_weight": (
        lambda p: LigerFusedLinearCrossEntropyLoss(torch.ones(7).to(p.e.device))(
            p.c, p.e, p.targets
        ),
        ValueError,
        r"weight must be \(V\): got weight \(7,\)",
    ),
}


# What the module is given is refused where it is given.
for _option, _value, _message in (
    ("accum_dtype", "float32", "accum_dtype must be a torch.dtype or None, got 'float32'"),
    ("ignore_index", "a", "ignore_index must be an int, got 'a'"),
):
    REFUSALS[f"module_{_option}"] = (
        lambda p, given={_option: _value}: LigerFusedLinearCrossEntropyLoss(**given),
        TypeError,
        _message,
    )


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    call, error, message = REFUSALS[name]
    with pytest.raises(error, match=message):
        call(problem())


@pytest.mark.parametrize("name", ["default", "everything", "everything_scaled"])
def test_nothing_waits_for_the_device(name):
    if problems.device != "cuda":
        pytest.skip("needs CUDA")
    p = problem()
    more = dict(return_z_loss=True, return_token_accuracy=True, return_predicted_tokens=True)
    module = LigerFusedLinearCrossEntropyLoss(**options_of(name, "mean"), **more)
    module.to(problems.device)

    def step():
        out = module(p.c, p.e, p.targets, p.bias)
        others = (out.z_loss, out.token_accuracy, out.predicted_tokens)
        return out.loss, *others, *torch.autograd.grad(out.loss, [p.e, p.c, p.bias])

    want = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)

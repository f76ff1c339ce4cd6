"""Classifiers that make the product, cast or not, are taken for what they are; those that do more
are refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
import trl
from accelerate.hooks import ModelHook, add_hook_to_module
from helpers.architectures import V, batch, make
from helpers.patched import NoLogits, run
from helpers.trainers import assert_same, grpo, history, tokenizer, without_logits_in_the_loss
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import cutloss
import cutloss.trl

__all__ = ["tokenizer"]  # the fixture
LLAMA = "LlamaForCausalLM"


class OutputInFp32(nn.Sequential):
    def forward(self, x):
        return super().forward(x).to(torch.float32)


class InputCast(nn.Linear):
    def forward(self, x):
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class InFp32(nn.Module):
    def forward(self, x):
        return x.float()


def forward_of_instance(model):
    head = model.lm_head.float()
    head.forward = lambda x: F.linear(x.float(), head.weight.float(), None)


def forward_outside_autocast(model):
    head = model.lm_head.float()

    def forward(x):
        with torch.autocast("cpu", enabled=False):
            return F.linear(x.float(), head.weight)

    head.forward = forward


def subclass(model):
    model.lm_head.float().__class__ = InputCast


def sequential(model):
    model.lm_head = nn.Sequential(InFp32(), model.lm_head.float())


def pre_hook(model):
    head = model.lm_head.float()
    head.register_forward_pre_hook(lambda module, args: (args[0].to(module.weight.dtype),))


def output_cast(model):
    model.lm_head = OutputInFp32(model.lm_head)


def hook(model):
    model.lm_head.register_forward_hook(lambda module, args, output: output.float())


def forward_of_instance_as_it_was(model):
    model.lm_head.forward = lambda x: x @ model.lm_head.weight.T


def subclass_as_it_was(model):
    forward = lambda m, x: F.linear(x, m.weight)  # noqa: E731
    model.lm_head.__class__ = type("Mine", (nn.Linear,), {"forward": forward})


def wrapped(model):
    model.lm_head = nn.Sequential(model.lm_head, nn.Identity())


def with_bias(model):
    """In fp32, and cast there."""
    model.lm_head = nn.Linear(32, V)
    model.lm_head.bias.data.normal_(generator=torch.Generator().manual_seed(0))
    model.lm_head.__class__ = InputCast


IN_FP32 = [forward_of_instance, forward_outside_autocast, subclass, sequential, pre_hook, with_bias]
NOT_CAST = [forward_of_instance_as_it_was, subclass_as_it_was, wrapped]
HEADS = [*IN_FP32, output_cast, hook, *NOT_CAST]


def cast_model(head, dtype=torch.bfloat16):
    """A body in that dtype."""
    model = make(LLAMA).to(dtype)
    head(model)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head", HEADS)
def test_casts(head, dtype):
    """An fp32 head's numbers are those of fp32, not of bf16. In an fp32 model nothing is cast."""
    model = cast_model(head, dtype)
    want, want_grads = run(model, **batch())
    logits = model(batch()["input_ids"]).logits
    cutloss.patch(model)
    with NoLogits():
        got, got_grads = run(model, **batch())
    limit = 1e-5 if head in IN_FP32 or dtype == torch.float32 else 3e-2
    torch.testing.assert_close(got.loss, want.loss, rtol=limit / 10, atol=0)
    assert got_grads.keys() == want_grads.keys()
    for name, want_grad in want_grads.items():
        limits = dict(rtol=limit, atol=limit * want_grad.abs().max().item())
        torch.testing.assert_close(got_grads[name], want_grad, **limits)
    torch.testing.assert_close(model(batch()["input_ids"]).logits, logits, rtol=0, atol=0)


@pytest.mark.parametrize("head", HEADS)
def test_casts_are_as_they_were(head):
    model = cast_model(head)
    forward = [m.__dict__.get("forward") for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    want = model(**batch()).loss
    cutloss.patch(model)
    cutloss.unpatch(model)
    assert [m.__dict__.get("forward") for m in model.modules()] == forward
    assert [set(vars(m)) for m in model.modules()] == attributes
    torch.testing.assert_close(model(**batch()).loss, want, rtol=0, atol=0)


@pytest.mark.parametrize("head", [forward_of_instance, forward_outside_autocast, subclass])
def test_casts_under_autocast(head):
    """A forward that leaves autocast gets fp32 there too; another gets what autocast makes."""
    model = make(LLAMA)
    head(model)
    patched = copy.deepcopy(model)
    head(patched)  # a closure's copy would read the other model's weight
    cutloss.patch(patched)
    with torch.autocast("cpu", torch.bfloat16):
        want, got = model(**batch()).loss, patched(**batch()).loss
    want.backward()
    got.backward()
    limit = 1e-5 if head is forward_outside_autocast else 3e-2
    torch.testing.assert_close(got, want, rtol=limit, atol=0)
    want_grad, got_grad = model.lm_head.weight.grad, patched.lm_head.weight.grad
    assert (got_grad - want_grad).norm() <= 10 * limit * want_grad.norm()


def test_a_wider_input():
    """fp32 into a bf16 classifier: rounded where the head rounds it."""
    model = make(LLAMA)
    model.lm_head.bfloat16().__class__ = InputCast
    want = model(**batch()).loss
    cutloss.patch(model)
    torch.testing.assert_close(model(**batch()).loss, want, rtol=2e-3, atol=0)


def test_under_a_hook_of_accelerate():
    """Which keeps the forward that it finds."""
    model = cast_model(forward_of_instance)
    want = model(**batch()).loss
    add_hook_to_module(model.lm_head, ModelHook())
    cutloss.patch(model)
    with NoLogits():
        got = model(**batch()).loss
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    cutloss.unpatch(model)
    torch.testing.assert_close(model(**batch()).loss, want, rtol=0, atol=0)

    model = make(LLAMA)
    model.lm_head.forward = lambda x: F.linear(x, model.lm_head.weight) * 2
    add_hook_to_module(model.lm_head, ModelHook())
    with pytest.raises(NotImplementedError, match="a forward of its own on the instance"):
        cutloss.patch(model)


# What does more -----------------------------------------------------------------------------------


def instance(change):
    def head(model):
        layer = model.lm_head.float()
        layer.forward = lambda x: change(layer, x.float())

    return head


def of_class(forward):
    def head(model):
        model.lm_head.float().__class__ = type("Mine", (nn.Linear,), {"forward": forward})

    return head


def frozen_copy(model):
    weight = model.lm_head.float().weight.detach().clone()
    model.lm_head.forward = lambda x: F.linear(x.float(), weight)


def captured(model):
    """The same numbers, and gradients for another parameter."""
    layer, weight = model.lm_head.float(), nn.Parameter(model.lm_head.weight.detach().float())
    layer.forward = lambda x: F.linear(x.float(), weight)


def adapter(model):
    """Of zeros as yet."""
    layer = model.lm_head.float()
    b = torch.zeros(1, 4, requires_grad=True)
    layer.forward = lambda x: F.linear(x.float(), layer.weight) + (x.float()[..., :4] * b).sum(
        -1, keepdim=True
    )


def own_adapter(model):
    def forward(self, x):
        return F.linear(x.float(), self.weight) + self.extra(x.float())[..., :1]

    of_class(forward)(model)
    model.lm_head.extra = nn.Linear(32, 1, bias=False)
    nn.init.zeros_(model.lm_head.extra.weight)


def in_bf16(change):
    """In a model of bf16, whose numbers need not be exact."""

    def head(model):
        layer = model.bfloat16().lm_head
        layer.forward = lambda x: change(layer, x)

    return head


def of_last_classes(change):
    """Which a classifier of few classes would not have."""

    def forward(self, x):
        y = F.linear(x.float(), self.weight.float())
        return torch.cat([y[..., : V - 2], change(y[..., V - 2 :])], -1)

    return of_class(forward)


def masked(self, x):
    y = F.linear(x.float(), self.weight.float())
    y[..., V - 1 :] = -torch.inf
    return y


def best_fifty(self, x):
    y = F.linear(x.float(), self.weight.float())
    least = y.topk(min(50, y.shape[-1])).values[..., -1:]
    return y.masked_fill(y < least, -1e9)


def without_a_feature(self, x):
    return F.linear(x.float() * (torch.arange(x.shape[-1]) != 7), self.weight.float())


DOES_MORE = {
    "padding": of_class(masked),
    "padding in bf16": lambda model: (of_class(masked)(model), model.bfloat16()),
    "mask": of_last_classes(lambda y: y - 1e9),
    "vector": of_last_classes(lambda y: y + 1e-3),
    "scale of a class": of_last_classes(lambda y: y * 0.999),
    "classes permuted": of_last_classes(lambda y: y.flip(-1)),
    "top k": of_class(best_fifty),
    "scale of fp32 logits": in_bf16(lambda m, x: F.linear(x.float(), m.weight.float()) / 0.99),
    "scale of fp32 rows": in_bf16(lambda m, x: F.linear(x.float() * 1.001, m.weight.float())),
    "scale in bf16": in_bf16(lambda m, x: F.linear(x, m.weight) * 1.01),
    "vector in bf16": in_bf16(lambda m, x: F.linear(x, m.weight) + 1e-3),
    "without a feature": lambda model: (of_class(without_a_feature)(model), model.bfloat16()),
    "eight bits of bf16": in_bf16(
        lambda m, x: F.linear(x.float(), m.weight.to(torch.float8_e4m3fn).float())
    ),
    "rows in eight bits": in_bf16(
        lambda m, x: F.linear(x.to(torch.float8_e4m3fn).float(), m.weight.float())
    ),
    "scale": instance(lambda layer, x: F.linear(x, layer.weight) * 0.5),
    "cap": instance(lambda layer, x: F.linear(x, layer.weight).clamp(-100, 100)),
    "zeros": instance(lambda layer, x: x.new_zeros(*x.shape[:-1], V)),
    "nan_to_num": instance(lambda layer, x: F.linear(x.nan_to_num(), layer.weight)),
    "dropout": of_class(lambda m, x: F.linear(F.dropout(x.float(), 0.5, m.training), m.weight)),
    "detached": of_class(lambda m, x: F.linear(x.float().detach(), m.weight)),
    "eight bits": of_class(
        lambda m, x: F.linear(x.float(), m.weight.to(torch.float8_e4m3fn).float())
    ),
    "bf16 inside": of_class(lambda m, x: F.linear(x.bfloat16(), m.weight.bfloat16()).float()),
    "frozen copy": frozen_copy,
    "captured": captured,
    "adapter": adapter,
    "own adapter": own_adapter,
}


@pytest.mark.parametrize("head", DOES_MORE.values(), ids=DOES_MORE)
def test_a_head_that_does_more_is_refused(head):
    model = make(LLAMA)
    head(model)
    own = model.lm_head.__dict__.get("forward")
    with pytest.raises(NotImplementedError, match="forward of its own|of which cutloss does not"):
        cutloss.patch(model)
    assert model.lm_head.__dict__.get("forward") is own
    assert not [k for k in vars(model.lm_head) if "cutloss" in k]


@pytest.mark.parametrize("head", ["masked", "product"])
def test_a_head_without_its_weight_yet(head):
    """Of the layer's size nothing goes unseen on the meta device either."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(make(LLAMA).config)
    if head == "masked":
        of_class(masked)(model)
        with pytest.raises(NotImplementedError, match="forward of its own, which does more"):
            cutloss.patch(model, verify=False)
        return
    subclass(model)
    cutloss.patch(model, verify=False)
    model.to_empty(device="cpu").load_state_dict(make(LLAMA).state_dict())
    assert model(**batch()).logits is None


@pytest.mark.parametrize(
    "more",
    [nn.Softplus(), nn.Dropout(0.5), nn.LayerNorm(V)],
    ids=lambda m: type(m).__name__,
)
def test_a_sequential_that_does_more_is_refused(more):
    model = make(LLAMA)
    model.lm_head = OutputInFp32(model.lm_head.bfloat16(), more)
    with pytest.raises(NotImplementedError, match="without a weight .V, D."):
        cutloss.patch(model)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.float() * 2,
        lambda t: t.float().clamp(-50, 50),
        lambda t: t.float().detach(),
        lambda t: t.float().nan_to_num(),
        lambda t: t.bfloat16().to(t.dtype),
        lambda t: t,
    ],
    ids=["scale", "cap", "detached", "nan_to_num", "rounded", "nothing"],
)
def test_a_hook_that_does_more_is_refused(change):
    for register in ("register_forward_pre_hook", "register_forward_hook"):
        model = make(LLAMA)
        of_input = register == "register_forward_pre_hook"
        getattr(model.lm_head, register)(
            (lambda m, args: (change(args[0]),)) if of_input else (lambda m, a, out: change(out))
        )
        with pytest.raises(NotImplementedError, match="has a hook .*only casts"):
            cutloss.patch(model)


# Classes and weights that are not what they seem --------------------------------------------------


def test_a_forward_of_the_class_replaced_for_all(monkeypatch):
    """As a library may do to nn.Linear itself, before the patch or after it."""
    stock, patched = make(LLAMA), cutloss.patch(make(LLAMA))
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x @ self.weight.T)
    want = run(stock, **batch())
    model = cutloss.patch(copy.deepcopy(stock))
    for each in (model, patched):
        got, got_grads = run(each, **batch())
        assert got.logits is None
        torch.testing.assert_close(got.loss, want[0].loss)
        for name, grad in want[1].items():
            torch.testing.assert_close(got_grads[name], grad, rtol=1e-4, atol=1e-6)
    scaled = lambda self, x: F.linear(x, self.weight) * 0.999  # noqa: E731
    monkeypatch.setattr(nn.Linear, "forward", scaled)
    match = "forward of that class was replaced, by .*lambda.*more than the product"
    with pytest.raises(NotImplementedError, match=match):
        cutloss.patch(make(LLAMA))
    for each in (model, patched):
        with pytest.raises(NotImplementedError, match=match):
            each(**batch())


@pytest.mark.parametrize("parametrized", [weight_norm, orthogonal], ids=lambda f: f.__name__)
def test_a_weight_that_is_computed(parametrized):
    stock = make(LLAMA)
    parametrized(stock.lm_head)
    want, want_grads = run(stock, **batch())
    model = copy.deepcopy(stock)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    cutloss.patch(model)
    got, got_grads = run(model, **batch())
    assert got.logits is None
    torch.testing.assert_close(got.loss, want.loss)
    assert got_grads.keys() == want_grads.keys()
    for name, grad in want_grads.items():
        torch.testing.assert_close(got_grads[name], grad, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


class Dropped(nn.Module):
    def forward(self, weight):
        return F.dropout(weight, 0.1, self.training)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("first", ["parametrization", "patch"])
@pytest.mark.parametrize("kind", ["spectral_norm", "dropout"])
def test_a_weight_that_changes_when_it_is_read_is_refused(kind, first, training):
    model = make(LLAMA).train(training)
    if first == "patch":
        cutloss.patch(model)
    if kind == "dropout":
        parametrize.register_parametrization(model.lm_head, "weight", Dropped())
    else:
        spectral_norm(model.lm_head)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    inputs = batch()
    drawn, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    with pytest.raises(NotImplementedError, match="weight by .*(_SpectralNorm|Dropped).*each time"):
        cutloss.patch(model) if first != "patch" else model(**inputs, return_logits=False)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert [m.training for m in model.modules()] == modes


# TRL ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_grpo_with_a_head_in_fp32(tokenizer, tmp_path, dtype, tied):
    """TRL makes the classifier fp32, and gives it a forward of its own."""
    more = dict(cast_lm_head_to_fp32=True)
    model = make(LLAMA, tie_word_embeddings=tied).to(dtype)
    stock = grpo(trl.GRPOTrainer, copy.deepcopy(model), tokenizer, tmp_path, **more)
    trainer = grpo(cutloss.trl.GRPOTrainer, model, tokenizer, tmp_path, **more)
    assert trainer.model.lm_head.weight.dtype == torch.float32
    with torch.no_grad():
        inputs = batch()
        want = stock.model(**inputs, fused_lm_head=True).log_probs
        got = trainer.model(**inputs, fused_lm_head=True).log_probs
        with torch.autocast("cpu", torch.bfloat16):
            got_in_autocast = trainer.model(**inputs, fused_lm_head=True).log_probs
            want_in_autocast = stock.model(**inputs, fused_lm_head=True).log_probs
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got_in_autocast, want_in_autocast, rtol=1e-5, atol=1e-5)
    transformers.set_seed(2)
    want = history(stock)
    transformers.set_seed(2)
    assert_same(history(without_logits_in_the_loss(trainer)), want)

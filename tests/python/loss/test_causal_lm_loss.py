"""CausalLMLoss against the definition of transformers' ForCausalLMLoss, and in its models."""

import pytest
import torch
import torch.nn.functional as F
from helpers import problems
from helpers.problems import BF16, F32

from cutloss import CausalLMLoss, cross_entropy

pytestmark = pytest.mark.usefixtures("device")

V = 101


def by_hand(logits, labels, num_items=None, ignore_index=-100, shift_labels=None):
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    how = dict(ignore_index=ignore_index, reduction="mean" if num_items is None else "sum")
    loss = F.cross_entropy(logits.float().reshape(-1, V), shift_labels.reshape(-1), **how)
    return loss if num_items is None else loss / num_items


def logits_and_labels(dtype=F32, length=9):
    g = torch.Generator().manual_seed(0)
    z = torch.randn(2, length, V, generator=g).to(problems.device, dtype).requires_grad_()
    labels = torch.randint(0, V, (2, length), generator=g).to(problems.device)
    labels[0, length - length // 3 :] = -100
    return z, labels


CALLS = {
    "mean": lambda labels: {},
    "num_items": lambda labels: dict(num_items_in_batch=37),
    "num_items_tensor": lambda labels: dict(num_items_in_batch=torch.tensor(37)),
    "num_items_on_device": lambda labels: dict(
        num_items_in_batch=torch.tensor(37.0, device=labels.device)
    ),
    "shifted": lambda labels: dict(shift_labels=labels.roll(-1, 1)),
    "shifted_and_flat": lambda labels: dict(shift_labels=labels.roll(-1, 1).flatten()),
    "ignore_index": lambda labels: dict(ignore_index=int(labels[1, 2])),
}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("consume", [False, True])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_call(call, consume, dtype):
    z, labels = logits_and_labels(dtype)
    how = call(labels)
    theirs = dict(how)
    items = theirs.pop("num_items_in_batch", None)
    if "ignore_index" in how:
        labels = labels.where(labels >= 0, 3)  # -100 is then no label
    want = by_hand(z, labels, items, **theirs)
    loss = CausalLMLoss(V, consume_logits=consume)
    got = loss(logits=z * 1, labels=labels, vocab_size=V, output_attentions=False, **how)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    (a,), (b,) = (torch.autograd.grad(t, z) for t in (got, want))
    torch.testing.assert_close(a, b, rtol=1e-2 if dtype == BF16 else 1e-4, atol=1e-6)


def test_options():
    z, labels = logits_and_labels()
    weight = torch.rand(V)
    options = dict(softcap=5.0, label_smoothing=0.1, z_loss=1e-3, temperature=0.7)
    got = CausalLMLoss(V, ignore_index=3, weight=weight, **options)(z, labels.clamp(min=3))
    want = cross_entropy(
        z, labels.clamp(min=3), shift=1, ignore_index=3, weight=weight.to(z.device), **options
    )
    assert torch.equal(got, want)
    assert repr(CausalLMLoss(V, softcap=5.0)) == "CausalLMLoss(101, ignore_index=-100, softcap=5.0)"


def test_sequences_of_one_token_predict_nothing():
    z, labels = logits_and_labels(length=1)
    loss = CausalLMLoss(V)(z, labels)
    assert loss.isnan()
    assert (torch.autograd.grad(loss, z)[0] == 0).all()


def test_no_items():
    z, labels = logits_and_labels()
    assert CausalLMLoss(V)(z, torch.full_like(labels, -100), num_items_in_batch=0) == 0


REFUSALS = [
    (lambda z, t: CausalLMLoss(V + 1)(z, t), ValueError, r"\(2, 9, 101\), vocab_size 102"),
    (lambda z, t: CausalLMLoss(V)(z, t, vocab_size=7), ValueError, "vocab_size 7 in this call"),
    (lambda z, t: CausalLMLoss(V)(z, t[:, 1:]), ValueError, r"labels must be \(2, 9\)"),
    (lambda z, t: CausalLMLoss(V)(z[:, -3:], t), ValueError, r"labels must be \(2, 3\)"),
    (lambda z, t: CausalLMLoss(V)(z, t, shift_labels=t[0]), ValueError, "shift_labels must be"),
    (lambda z, t: CausalLMLoss(V)(z, None), TypeError, "labels must be a torch.Tensor"),
    (lambda z, t: CausalLMLoss(V)(z, t, num_items_in_batch=-1), ValueError, ">= 0, got -1"),
    (lambda z, t: CausalLMLoss(0), ValueError, "vocab_size must be an int >= 1, got 0"),
    (lambda z, t: CausalLMLoss(V, weight=torch.ones(3)), ValueError, r"weight \(3,\) and vocab"),
    (lambda z, t: CausalLMLoss(V, softcap=-1.0), ValueError, "softcap"),
    (lambda z, t: CausalLMLoss(V, temperature=torch.ones(2)), TypeError, "must be a number here"),
]


@pytest.mark.parametrize("call, error, message", REFUSALS)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call(*logits_and_labels())


def tiny_llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config).to(problems.device).train()


@pytest.mark.parametrize("consume", [False, True])
def test_in_a_model_of_transformers(consume):
    model = tiny_llama()
    ids = torch.randint(0, V, (2, 9), device=problems.device)
    labels = ids.clone()
    labels[0, 6:] = -100
    results = []
    for loss_function in (None, CausalLMLoss(V, consume_logits=consume)):
        model.zero_grad()
        if loss_function is not None:
            model.loss_function = loss_function
            assert model.loss_function is loss_function
        out = model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(23))
        out.loss.backward()
        results.append((out.loss, [p.grad.clone() for p in model.parameters()]))
    assert out.logits.shape == ((0,) if consume else (2, 9, V))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)
    model.eval()
    with torch.no_grad():
        assert model(input_ids=ids, labels=labels).logits.shape == (2, 9, V)


def test_no_position_is_no_loss():
    assert CausalLMLoss(11)(torch.randn(2, 0, 11), torch.zeros(2, 0).long()).isnan()

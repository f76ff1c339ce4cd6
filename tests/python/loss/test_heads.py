"""Losses that hold their classifier: their own or a shared one, in the states of a training."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from helpers import problems
from helpers.problems import BF16, F32, F64
from torch import nn

import cutloss
from cutloss import CausalLMHead, CausalLMHeadOutput, LinearCrossEntropy, LinearCrossEntropyLoss

pytestmark = pytest.mark.usefixtures("device")

V, D, H = 61, 12, 20


class Model(nn.Module):
    """An embedding, something, a head."""

    def __init__(self, tied=True, hidden_size=None, **options):
        super().__init__()
        hidden_size = hidden_size or D
        self.embedding = nn.Embedding(V, D)
        self.body = nn.Linear(D, hidden_size)
        classifier = self.embedding if tied else D
        sizes = () if tied else (V,)
        self.head = CausalLMHead(classifier, *sizes, hidden_size=hidden_size, **options)

    def forward(self, tokens, **options):
        return self.head(torch.tanh(self.body(self.embedding(tokens))), tokens, **options)


def model(seed=0, **options):
    torch.manual_seed(seed)
    return Model(**options).to(problems.device)


def tokens(ignored=False):
    g = torch.Generator().manual_seed(1)
    t = torch.randint(0, V, (3, 9), generator=g)
    if ignored:
        t[torch.rand(t.shape, generator=g) < 0.3] = -100
    return t.to(problems.device)


def hidden(size=D, dtype=F32):
    g = torch.Generator().manual_seed(2)
    return torch.randn(3, 9, size, generator=g).to(problems.device, dtype).requires_grad_()


def plain(z, labels, shift=1, **options):
    """The loss of logits."""
    z, labels = z[:, : z.shape[1] - shift], labels[:, shift:]
    return F.cross_entropy(z.flatten(0, 1).float(), labels.flatten(), **options)


# The logits' options, and how the loss of these logits is made.
OPTIONS = {
    "default": ({}, {}),
    "shifted_labels": (dict(shift=0), dict(shift=0)),
    "ignore_index": (dict(ignore_index=3), dict(ignore_index=3)),
    "smoothing": (dict(label_smoothing=0.1), dict(label_smoothing=0.1)),
    "softcap": (dict(softcap=2.0), {}),
    "scale": (dict(logit_scale=0.25), {}),
    "temperature": (dict(temperature=0.5), {}),
    "bias": (dict(bias=True), {}),
    "sum": (dict(reduction="sum"), dict(reduction="sum")),
    "everything": (
        dict(bias=True, softcap=2.0, logit_scale=0.5, temperature=0.7, label_smoothing=0.2),
        dict(label_smoothing=0.2),
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("hidden_size", [None, H])
@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_is_that_of_the_logits(tied, hidden_size, name):
    options, of_loss = OPTIONS[name]
    m = model(tied=tied, hidden_size=hidden_size, **options)
    if options.get("bias"):
        nn.init.normal_(m.head.bias)
    t = tokens()
    trained = m(t)
    assert trained.logits is None
    seen = m.eval()(t)
    torch.testing.assert_close(seen.loss, trained.loss)
    expected = plain(seen.logits, t, **of_loss)
    torch.testing.assert_close(trained.loss, expected)
    parameters = list(m.parameters())
    for a, b in zip(*(torch.autograd.grad(x, parameters) for x in (trained.loss, expected))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_z_loss_and_class_weights():
    weight = torch.rand(V, device=problems.device) + 0.1
    head = CausalLMHead(D, V, z_loss=1e-2, weight=weight).to(problems.device)
    e, t = hidden(), tokens()
    out = head(e, t, return_logits=True)
    lse = out.logits[:, :-1].logsumexp(-1)
    expected = plain(out.logits, t, weight=weight) + 1e-2 * lse.square().mean()
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("has_labels", [False, True])
@pytest.mark.parametrize("in_call", [None, False, True])
@pytest.mark.parametrize("of_module", [None, False, True])
def test_one_switch(of_module, in_call, has_labels, training):
    head = CausalLMHead(D, V, return_logits=of_module).to(problems.device).train(training)
    labels = tokens() if has_labels else None
    asked = of_module if in_call is None else in_call
    wanted = (not has_labels or not training) if asked is None else asked
    if not wanted and not has_labels:
        with pytest.raises(ValueError, match="neither a loss, without labels, nor logits"):
            head(hidden(), labels, return_logits=in_call)
        return
    out = head(hidden(), labels, return_logits=in_call)
    assert isinstance(out, CausalLMHeadOutput)
    assert (out.logits is not None) == wanted and (out.loss is not None) == has_labels
    if wanted:
        assert out.logits.shape == (3, 9, V)


def test_per_token_results_have_names():
    head = CausalLMHead(D, V, return_entropy=True, return_predictions=True).to(problems.device)
    out = head(hidden(), tokens(), return_logits=True)
    z = out.logits[:, :-1]
    assert out.lse is None and torch.equal(out.predictions, z.argmax(-1))
    torch.testing.assert_close(out.entropy, torch.distributions.Categorical(logits=z).entropy())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_micro_batches_add_up(as_tensor, reduction):
    """With a number of items the parts' losses sum to that of the whole batch, gradients too."""
    m, t = model(reduction=reduction), tokens()
    labels = tokens(ignored=True)
    items = (labels[:, 1:] != -100).sum()
    items = items if as_tensor else int(items)
    e = m.embedding(t).detach()
    parts = [m.head(a, b, num_items_in_batch=items).loss for a, b in zip(e, labels)]
    parts += [m.head(e[:0], labels[:0], num_items_in_batch=items).loss]
    whole = plain(m.head.logits(e), labels)
    torch.testing.assert_close(sum(parts), whole)
    got, want = (torch.autograd.grad(x, m.embedding.weight)[0] for x in (sum(parts), whole))
    torch.testing.assert_close(got, want)
    criterion = LinearCrossEntropyLoss(m.embedding, shift=1, reduction=reduction)
    torch.testing.assert_close(criterion(e, labels, num_items_in_batch=items), whole)


@pytest.mark.parametrize("build", [CausalLMHead, LinearCrossEntropyLoss])
@pytest.mark.parametrize("items", [0, 0.5, torch.tensor(0), torch.tensor([0])], ids=str)
def test_no_items_make_a_loss_of_zero(items, build):
    """As in losses.policy_loss: what is divided by is at least 1."""
    head, e = build(D, V).to(problems.device), hidden()
    out = head(e, torch.full_like(tokens(), -100), num_items_in_batch=items)
    loss = out if build is LinearCrossEntropyLoss else out.loss
    loss.backward()
    assert loss.shape == () and loss == 0
    assert torch.equal(e.grad, torch.zeros_like(e))
    assert torch.equal(head.weight.grad, torch.zeros_like(head.weight))


ITEMS = {
    "shape": lambda: torch.full((1,), 20, device=problems.device),
    "dtype": lambda: torch.tensor(20.0, dtype=F64, device=problems.device),
    "gradient": lambda: torch.tensor(20.0, device=problems.device, requires_grad=True),
    "cpu": lambda: torch.tensor(20),
    "cpu_fp64": lambda: torch.tensor([20.0], dtype=F64, requires_grad=True),
}


@pytest.mark.parametrize("name", ITEMS)
def test_number_of_items_as_a_tensor(name):
    head, items = CausalLMHead(D, V).to(problems.device), ITEMS[name]()
    want = head(hidden(), tokens(), num_items_in_batch=20).loss
    loss = head(hidden(), tokens(), num_items_in_batch=items).loss
    assert loss.shape == () and loss.dtype == F32 and loss.device == want.device
    loss.backward()
    assert items.grad is None
    torch.testing.assert_close(loss, want)  # a device may divide by a number in another way


@pytest.mark.parametrize("where", ["cpu", "cuda"])
@pytest.mark.parametrize("training", [False, True])
def test_nothing_waits_for_the_device(training, where):
    if problems.device != "cuda":
        pytest.skip("needs CUDA")
    m, t = model(hidden_size=H, bias=True).train(training), tokens(ignored=True)
    e = hidden(H)
    items = torch.tensor([20.0], dtype=F64).to(where)

    def step():
        loss = m.head(e, t, num_items_in_batch=items).loss
        return loss, *torch.autograd.grad(loss, [e, *m.head.parameters()])

    want = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("return_logits", [False, True])
@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize("hidden_size", [None, H])
def test_hidden_states_that_do_not_count_are_not_used(hidden_size, shift, return_logits, bad):
    head = CausalLMHead(D, V, hidden_size=hidden_size, shift=shift).to(problems.device)
    labels, e = tokens(ignored=True), hidden(hidden_size or D)
    unused = F.pad(labels[:, shift:], (0, shift), value=-100) == -100
    results = []
    for value in (0.0, bad):
        h = torch.where(unused[..., None], value, e.detach()).requires_grad_()
        out = head(h, labels, return_logits=return_logits)
        results.append((out.loss, *torch.autograd.grad(out.loss, [h, *head.parameters()])))
    for a, b in zip(*results):
        assert torch.equal(a, b) and a.isfinite().all()


@pytest.mark.parametrize("impl", ["auto", "exact", "torch", "cce"])
def test_implementations(impl):
    e, t = hidden(), tokens()
    shared = nn.Linear(D, V, device=problems.device)
    want = LinearCrossEntropyLoss(shared)(e, t)
    torch.testing.assert_close(LinearCrossEntropyLoss(shared, impl=impl)(e, t), want)


def test_sampled_does_not_exist_yet():
    for build in (LinearCrossEntropyLoss, CausalLMHead):
        with pytest.raises(NotImplementedError, match="'sampled'.*not built yet: use impl='exact'"):
            build(D, V, impl="sampled")
    with pytest.raises(NotImplementedError, match="not built yet"):
        LinearCrossEntropy(impl="sampled")


# The classifier -------------------------------------------------------------------------------


def test_ways_to_give_the_classifier():
    linear, embedding = nn.Linear(D, V), nn.Embedding(V, D)
    for build in (LinearCrossEntropyLoss, CausalLMHead):
        assert build(linear).weight is linear.weight and build(linear).bias is linear.bias
        assert build(embedding).weight is embedding.weight and build(embedding).bias is None
        assert build(embedding, V, in_features=D).weight is embedding.weight
        assert build(D, V).weight.shape == build(in_features=D, out_features=V).weight.shape
        assert build(D, V, bias=True).bias.shape == build(embedding, bias=True).bias.shape == (V,)
        own = build(D, V, device="meta", dtype=BF16)
        assert own.weight.device.type == "meta" and own.weight.dtype == BF16
        assert len(list(build(linear, bias=True).parameters())) == 2  # it has one
    projected = CausalLMHead(embedding, hidden_size=H, device="meta", dtype=BF16).projection.weight
    assert projected.shape == (D, H) and projected.device.type == "meta"
    assert CausalLMHead(embedding.to(F64), hidden_size=H).projection.weight.dtype == F64
    assert CausalLMHead(embedding, hidden_size=D).projection is None


class _Adapter(nn.Linear):
    """A layer whose weight is not all that it does."""

    def forward(self, x):
        return super().forward(x) + 1


class _Renamed(nn.Linear):
    """One whose weight is."""


BAD = {
    "adapter": (
        lambda: LinearCrossEntropyLoss(_Adapter(D, V)),
        TypeError,
        "got _Adapter: .*an adapter, quantisation.*Merge the adapter",
    ),
    "sequence": (lambda: CausalLMHead(nn.Sequential(nn.Linear(D, V))), TypeError, "got Sequential"),
    "tensor": (lambda: CausalLMHead(torch.zeros(V, D)), TypeError, "got Tensor"),
    "one_size": (
        lambda: CausalLMHead(D),
        TypeError,
        "got in_features=12 and out_features=None",
    ),
    "no_size": (lambda: LinearCrossEntropyLoss(), TypeError, "give an nn.Linear or nn.Embedding"),
    "twice": (
        lambda: CausalLMHead(D, V, in_features=H),
        TypeError,
        "given twice, as 12 and as 20",
    ),
    "other_size": (
        lambda: CausalLMHead(nn.Linear(D, V), V + 1),
        ValueError,
        "out_features is 62, output_embeddings has 61",
    ),
    "dtype": (
        lambda: LinearCrossEntropyLoss(nn.Linear(D, V), dtype=BF16),
        ValueError,
        "device=None and dtype=torch.bfloat16; use .to",
    ),
    "unknown_option": (lambda: CausalLMHead(D, V, soft_cap=1.0), TypeError, "'soft_cap'"),
    "softcap": (lambda: CausalLMHead(D, V, softcap=-1.0), ValueError, "got -1.0"),
    "z_loss": (lambda: LinearCrossEntropyLoss(D, V, z_loss="1e-4"), TypeError, "'1e-4'"),
    "scale": (lambda: LinearCrossEntropyLoss(D, V, logit_scale=0), ValueError, "not 0"),
    "smoothing": (lambda: CausalLMHead(D, V, label_smoothing=2), ValueError, r"\[0, 1\]"),
    "impl": (lambda: CausalLMHead(D, V, impl="triton"), NotImplementedError, "'triton' is not"),
    "temperature": (
        lambda: CausalLMHead(D, V, temperature=torch.ones(3)),
        TypeError,
        "temperature must be a number",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_construction(name):
    build, error, message = BAD[name]
    with pytest.raises(error, match=message):
        build()


def _forward_of_its_own(linear):
    linear.forward = lambda x: x


LATER = {
    "adapter": (lambda linear: _Adapter(D, V), "got _Adapter: .*Merge the adapter"),
    "forward": (_forward_of_its_own, "has a forward of its own.*remove_hook_from_module"),
    "weight_norm": (torch.nn.utils.weight_norm, "pre-hooks.*use nn.utils.parametrizations"),
    "pre_hook": (lambda m: m.register_forward_pre_hook(print) and None, "remove them"),
    "hook": (lambda m: m.register_forward_hook(print) and None, "remove them"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("build", [LinearCrossEntropyLoss, CausalLMHead])
@pytest.mark.parametrize("name", LATER)
def test_what_becomes_of_the_classifier_later(name, build):
    """Whatever is called with the classifier's forward alone is refused, not left out."""
    change, message = LATER[name]
    head = build(D, V)
    changed = change(head.output_embeddings)
    if changed is not None:
        head.output_embeddings = changed
    head.to(problems.device)
    with pytest.raises(TypeError, match=message):
        head(hidden(), tokens())
    with pytest.raises(TypeError, match=message):
        build(head.output_embeddings)


def test_what_changes_the_weight_alone_is_used():
    head = CausalLMHead(D, V).to(problems.device)
    torch.nn.utils.parametrizations.weight_norm(head.output_embeddings)
    e = hidden()
    out = head(e, tokens(), return_logits=True)
    torch.testing.assert_close(out.logits, head.output_embeddings(e))
    torch.testing.assert_close(out.loss, plain(out.logits, tokens()))


def test_hooks_of_a_lookup_stay_out_of_the_head():
    """transformers' enable_input_require_grads puts one on an embedding."""
    m = model()
    want = m(tokens()).loss
    m.embedding.register_forward_hook(lambda module, args, out: out + 0)
    torch.testing.assert_close(m(tokens()).loss, want)


def test_a_subclass_that_computes_the_same_is_taken():
    assert LinearCrossEntropyLoss(_Renamed(D, V)).weight.shape == (V, D)


@pytest.mark.parametrize(
    "items, error, message",
    [
        (-3, ValueError, "must be finite and >= 0, got -3"),
        (float("nan"), ValueError, "must be finite and >= 0, got nan"),
        ("7", TypeError, "a number or a tensor, got '7'"),
        (torch.ones(2), ValueError, r"one number, got a tensor of shape \(2,\)"),
    ],
)
def test_bad_number_of_items(items, error, message):
    head = CausalLMHead(D, V).to(problems.device)
    with pytest.raises(error, match=message):
        head(hidden(), tokens(), num_items_in_batch=items)
    head = CausalLMHead(D, V, reduction="none").to(problems.device)
    with pytest.raises(ValueError, match="reduction is 'none'"):
        head(hidden(), tokens(), num_items_in_batch=7)


# The states of a module -----------------------------------------------------------------------


def assert_tied(m):
    assert m.head.weight is m.embedding.weight
    assert isinstance(m.head.weight, nn.Parameter)
    assert sum(p is m.embedding.weight for p in m.parameters()) == 1


def test_a_tied_embedding_stays_one_parameter():
    m = model(hidden_size=H, bias=True)
    assert_tied(m)
    loss = m(tokens()).loss
    copied = copy.deepcopy(m)
    assert_tied(copied)
    assert copied.head.weight is not m.head.weight
    torch.testing.assert_close(copied(tokens()).loss, loss)

    file = io.BytesIO()
    torch.save(m.state_dict(), file)
    file.seek(0)
    other = model(seed=1, hidden_size=H, bias=True)
    other.load_state_dict(torch.load(file))
    assert_tied(other)
    torch.testing.assert_close(other(tokens()).loss, loss)

    with torch.device("meta"):
        empty = Model(hidden_size=H, bias=True)
    empty.to_empty(device=problems.device)
    assert_tied(empty)
    empty.load_state_dict(m.state_dict())
    torch.testing.assert_close(empty(tokens()).loss, loss)
    nn.init.ones_(empty.head.own_bias)
    empty.head.reset_parameters()
    assert not empty.head.bias.any()
    with torch.device("meta"):
        assigned = Model(hidden_size=H, bias=True)
    assigned.load_state_dict(m.state_dict(), assign=True)
    torch.testing.assert_close(assigned(tokens()).loss, loss)

    assert_tied(m.to(BF16))
    assert m(tokens()).loss.dtype == F32


def test_a_tied_embedding_gets_both_gradients():
    m = model()
    m(tokens()).loss.backward()
    z = m.head.logits(torch.tanh(m.body(m.embedding(tokens()))))
    want = torch.autograd.grad(plain(z, tokens()), m.embedding.weight)[0]
    torch.testing.assert_close(m.embedding.weight.grad, want)


def test_frozen():
    m = model()
    m.embedding.requires_grad_(False)
    m(tokens()).loss.backward()
    assert m.embedding.weight.grad is None and m.body.weight.grad.any()


def test_bf16_and_autocast():
    m = model(hidden_size=H, bias=True)
    want = m(tokens()).loss
    with torch.autocast(problems.device, BF16):
        out = m(tokens(), return_logits=True)
    assert out.loss.dtype == F32 and out.logits.dtype == BF16
    torch.testing.assert_close(out.loss, want, rtol=2e-2, atol=0)
    out.loss.backward()
    assert all(p.grad.dtype == F32 for p in m.parameters())
    out = m.to(BF16)(tokens(), return_logits=True)
    assert out.loss.dtype == F32 and out.logits.dtype == BF16
    torch.testing.assert_close(out.loss, want, rtol=2e-2, atol=0)


@pytest.mark.parametrize("items, training", [(None, False), (20, True)])
def test_one_graph(items, training):
    torch._dynamo.reset()
    m = model(hidden_size=H, bias=True, softcap=3.0, z_loss=1e-3).train(training)
    compiled = torch.compile(m, fullgraph=True)
    got, want = (f(tokens(), num_items_in_batch=items) for f in (compiled, m))
    torch.testing.assert_close(got.loss, want.loss)
    assert (got.logits is None) == training
    got, want = (torch.autograd.grad(x.loss, list(m.parameters())) for x in (got, want))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [int, float, torch.tensor])
def test_one_graph_for_every_number_of_items(kind):
    torch._dynamo.reset()
    m = model()
    compiled = torch.compile(m, fullgraph=True, backend="eager")
    for items in (20, 21, 22):
        got, want = (f(tokens(), num_items_in_batch=kind(items)).loss for f in (compiled, m))
        torch.testing.assert_close(got, want)


def test_the_classifier_is_checked_while_tracing():
    torch._dynamo.reset()
    m = model(tied=False)
    compiled = torch.compile(m, fullgraph=True, backend="eager")
    compiled(tokens())
    m.head.output_embeddings = _Adapter(D, V).to(problems.device)
    with pytest.raises(Exception, match="got _Adapter"):
        compiled(tokens())
    m.head.output_embeddings = nn.Linear(D, V).to(problems.device)
    m.head.output_embeddings.register_forward_hook(print)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="has forward hooks"):
        compiled(tokens())


def test_on_meta():
    with torch.device("meta"):
        m = Model(hidden_size=H)
        out = m(torch.zeros(3, 9, dtype=torch.int64), return_logits=True)
    assert out.loss.shape == () and out.logits.shape == (3, 9, V)


def test_repr():
    shown = repr(CausalLMHead(D, V, hidden_size=H, softcap=30.0))
    for part in ("vocabulary=61", "shift=1", "softcap=30.0", "projection", "in_features=20"):
        assert part in shown


def test_a_few_steps_of_training():
    """The loss falls, and is that of plain PyTorch at each step."""
    losses = []
    for with_logits in (False, True):
        m = model(hidden_size=H)
        optimiser = torch.optim.SGD(m.parameters(), lr=0.5)
        losses.append([])
        for _ in range(5):
            out = m(tokens(), return_logits=with_logits)
            loss = plain(out.logits, tokens()) if with_logits else out.loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][-1] < losses[0][0]


def test_names():
    assert {"CausalLMHead", "CausalLMHeadOutput", "LinearCrossEntropyLoss"} <= set(cutloss.__all__)

"""torch.compile, torch.export, fake tensors, and what torch.library can check of an operator."""

import copy
import re

import pytest
import torch
from helpers import problems, small_model
from helpers.inside import SCHEDULES, Options, decide, library
from helpers.problems import BF16, F16, F32, OPTION_SETS
from helpers.tolerance import assert_near
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils.checkpoint import checkpoint

import cutloss
from cutloss import LinearCrossEntropy, linear_cross_entropy

pytestmark = pytest.mark.usefixtures("device")

operators = torch.ops.cutloss


@pytest.fixture(autouse=True)
def _from_nothing():
    torch._dynamo.reset()


def loss_of(p, **more):
    result = linear_cross_entropy(p.e, p.c, p.targets, p.bias, **p.options, **more)
    outputs = result if isinstance(result, tuple) else (result,)
    return sum(out.sum() for out in outputs if out.is_floating_point())


def assert_same(compiled, eager, p):
    got, want = compiled(p), eager(p)
    torch.testing.assert_close(got, want)
    got, want = (torch.autograd.grad(t, p.parameters) for t in (got, want))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


NAMES = ["default", "none", "shift", "weight_smoothing", "row_temperature", "everything"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("schedule", ["auto", "vocabulary"])
def test_one_graph(name, schedule):
    p = problems.make((2, 12), **OPTION_SETS[name])

    def eager(p):
        return loss_of(p, schedule=schedule)

    assert_same(torch.compile(eager, fullgraph=True), eager, p)


@pytest.mark.parametrize("name", ["default", "shift", "everything"])
def test_one_graph_for_all_sizes(name):
    """Dynamic shapes: after the first sizes, no more compiling, for one classifier."""
    graphs = CompileCounter()
    compiled = torch.compile(loss_of, fullgraph=True, dynamic=True, backend=graphs)
    for classifiers, (V, D) in enumerate([(101, 16), (211, 24)], start=1):
        for n in (12, 13, 30):
            p = problems.make((3, n), V=V, D=D, **OPTION_SETS[name])
            torch.testing.assert_close(compiled(p), loss_of(p))
        assert graphs.frame_count == classifiers


def test_options_that_change():
    compiled = torch.compile(linear_cross_entropy, fullgraph=True)
    for softcap, shift, ignore_index in [(3.0, 0, -100), (4.0, 1, -100), (5.5, 2, -1)]:
        p = problems.make((3, 12), ignore_index=ignore_index, softcap=softcap, shift=shift)
        got, want = (f(p.e, p.c, p.targets, **p.options) for f in (compiled, linear_cross_entropy))
        torch.testing.assert_close(got, want)


def test_dynamic_gradients():
    compiled = torch.compile(loss_of, fullgraph=True, dynamic=True)
    for n in (12, 13, 30):
        assert_same(compiled, loss_of, problems.make((n,), bias=True))


# What is decided ---------------------------------------------------------------------------------


def schedule_names(graphs):
    """The operators of the losses in some graphs, with their schedule and how much they keep."""
    names = {number: name for name, number in SCHEDULES.items()}
    found = []
    for node in (n for graph in graphs for n in graph.graph.nodes):
        name = str(node.target).removeprefix("cutloss.").removesuffix(".default")
        if name in ("statistics", "loss_and_gradients"):
            keeps = node.kwargs.get("kept_bytes", 0) > 0
            found.append((name, names[node.kwargs["schedule"]], keeps))
    return found


def bits_of(f, p):
    loss = f(p)
    return [loss.detach(), *torch.autograd.grad(loss, p.parameters)]


def little(p, **how):
    """Bytes that do not suffice to go by rows, but by vocabulary."""

    def least(schedule):
        return cutloss.plan(p.e, p.c, p.targets, p.bias, schedule=schedule, **how).least_bytes

    by_rows = least("rows")
    if least("vocabulary") >= by_rows:
        pytest.skip("by rows takes the least memory here")
    return by_rows - 1


WAYS = {
    "in_forward": {},
    "recomputed": {"schedule": "vocabulary"},
    "kept": {"reduction": "none"},
    "kept_on_demand": {"reduction": "none", "schedule": "rows"},
    "small": {"max_workspace": "little"},
    "small_and_per_token": {"reduction": "none", "max_workspace": "little"},
    "entropy": {"return_entropy": True},
}


@pytest.mark.parametrize(
    "dtype, autocast", [(F32, None), (BF16, None), (F16, None), (F32, F16)], ids=str
)
@pytest.mark.parametrize("way", WAYS)
def test_known_sizes_are_decided_as_in_eager_code(way, dtype, autocast):
    """The same operators by the same schedule, and the same bits."""
    if not problems.has_engine(dtype):
        pytest.skip(f"no engine takes {dtype}")
    p = problems.make((40,), V=211, D=24, dtype=dtype, bias=True, ignored=0.2)
    options = dict(WAYS[way])
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    with torch.autocast(problems.device, autocast, enabled=autocast is not None):
        if "max_workspace" in options:
            options["max_workspace"] = little(p, reduction=options.get("reduction", "mean"))
        plan = cutloss.plan(p.e, p.c, p.targets, p.bias, **options)

        def loss(p):
            return loss_of(p, **options)

        want = bits_of(loss, p)
        got = bits_of(torch.compile(loss, fullgraph=True, backend=keep), p)
    name = "loss_and_gradients" if plan.in_forward else "statistics"
    assert schedule_names(graphs) == [(name, plan.schedule, plan.keeps_logits)]
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def border_of_rows():
    """A budget with which so many rows go by rows, and those from there to twice as many do not."""
    p = problems.make((1,), V=211, D=24)
    sizes = decide.sizes_of(*operands(p))
    for step in range(120):
        budget = int(20_000 * 1.1**step)
        o = Options(F32, needs_de=True, needs_dc=True, max_workspace=budget)
        first, *second = library.plan_for_rows(sizes.arguments(known_at_forward=True), o)[:2]
        most = first[0]
        if not (second and first[1:] == (True, "rows") and second[0][1:] == (False, "vocabulary")):
            continue
        if 32 <= most <= 2000 and second[0][0] >= 2 * most and has_plan(2 * most, budget):
            return budget, most
    if problems.device == "cuda":
        pytest.skip("so few classes go by rows with every budget here")
    raise AssertionError("no budget has a border")


def has_plan(n, budget):
    p = problems.make((n,), V=211, D=24)
    try:
        return bool(cutloss.plan(p.e, p.c, p.targets, max_workspace=budget))
    except ValueError:
        return False


@pytest.mark.parametrize("how", ["dynamic", "automatic", "export"])
def test_symbolic_rows_are_decided_as_in_eager_code(how):
    """Some rows are few enough to go by rows, and more are not: one graph for each, with the bits of
    eager code, whatever comes first."""
    budget, most = border_of_rows()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    def loss(p):
        return loss_of(p, max_workspace=budget)

    if how == "export":
        return check_export(budget, most)
    dynamic = True if how == "dynamic" else None
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend=keep)
    for n in (most, 2 * most, 17, most + 1, most - 5, 2 * most - 1):
        q = problems.make((n,), V=211, D=24, seed=n)
        for a, b in zip(bits_of(compiled, q), bits_of(loss, q), strict=True):
            assert torch.equal(a, b), n
    rows, vocabulary = ("loss_and_gradients", "rows", False), ("statistics", "vocabulary", False)
    # The first size is a number where nobody has said that it is not.
    expected = [rows, vocabulary] if dynamic else [rows, vocabulary, rows]
    assert schedule_names(graphs) == expected


def check_export(budget, most):
    class Model(torch.nn.Module):
        def forward(self, e, c, targets):
            return linear_cross_entropy(e, c, targets, max_workspace=budget)

    p = problems.make((30,), V=211, D=24)
    args = (p.e, p.c, p.targets)
    n = torch.export.Dim("n", min=2, max=most)
    program = torch.export.export(Model(), args, dynamic_shapes=({0: n}, None, {0: n}))
    assert schedule_names([program]) == [("loss_and_gradients", "rows", False)]
    static = torch.export.export(Model(), args)
    assert schedule_names([static]) == [("loss_and_gradients", "rows", False)]
    q = problems.make((most,), V=211, D=24, seed=1)
    got = bits_of(lambda q: program.module()(q.e, q.c, q.targets), q)
    want = bits_of(lambda q: loss_of(q, max_workspace=budget), q)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    # What holds for fewer rows alone is not exported for all.
    n = torch.export.Dim("n", min=2, max=2 * most)
    with pytest.raises(Exception, match=f"max={most}"):
        torch.export.export(Model(), args, dynamic_shapes=({0: n}, None, {0: n}))


def test_logits_cannot_be_kept_of_symbolic_rows():
    """Their size would be a symbol too."""
    p = problems.make()

    def loss(p, **more):
        return loss_of(p, reduction="none", **more)

    with pytest.raises(Exception, match="not available under torch.compile where the number"):
        torch.compile(loss, fullgraph=True, dynamic=True)(p, schedule="rows")
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compile(loss, fullgraph=True, dynamic=True, backend=keep)(p)
    assert schedule_names(graphs) == [("statistics", "vocabulary", False)]


@pytest.mark.parametrize("inside", [True, False])
def test_autocast(inside):
    p = problems.make(bias=True)

    def eager(p):
        with torch.autocast(problems.device, BF16):
            return loss_of(p)

    if inside:
        return assert_same(torch.compile(eager, fullgraph=True), eager, p)
    compiled = torch.compile(loss_of, fullgraph=True)
    with torch.autocast(problems.device, BF16):
        torch.testing.assert_close(compiled(p), loss_of(p))


def test_num_valid_that_changes():
    """The number of tokens of each batch: after the second, no more compiling."""
    graphs = CompileCounter()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend=graphs)
    for ignored in range(5):
        p = problems.make(ignored=0.0)
        p.targets[:ignored] = -100
        got = compiled(p.e, p.c, p.targets, num_valid=24 - ignored)
        torch.testing.assert_close(got, linear_cross_entropy(p.e, p.c, p.targets))
    assert graphs.frame_count <= 2
    compiled = torch.compile(linear_cross_entropy, fullgraph=True)
    for ignored in (3, 4, 5):
        p = problems.make(ignored=0.0)
        p.targets[:ignored] = -100
        want = torch.autograd.grad(linear_cross_entropy(p.e, p.c, p.targets), p.parameters)
        loss = compiled(p.e, p.c, p.targets, num_valid=24 - ignored)
        for a, b in zip(torch.autograd.grad(loss, p.parameters), want):
            torch.testing.assert_close(a, b)


def test_module_and_retain_graph():
    p = problems.make((2, 12))
    module = LinearCrossEntropy(shift=1, label_smoothing=0.1)
    loss = torch.compile(module, fullgraph=True)(p.e, p.c, p.targets)
    first = torch.autograd.grad(loss, p.parameters, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, p.parameters)):
        assert torch.equal(a, b)


class Checkpointed(small_model.Model):
    """All but the head runs again in backward."""

    def forward(self, x, labels):
        hidden = checkpoint(self.body, x, use_reentrant=False)
        return self.head(hidden, labels).loss


@pytest.mark.parametrize(
    "kind, tied, schedule, backend",
    [
        (small_model.Model, True, "auto", "inductor"),
        (small_model.Model, False, "vocabulary", "aot_eager"),
        (Checkpointed, True, "auto", "aot_eager"),
    ],
)
def test_a_whole_model(kind, tied, schedule, backend):
    """With the loss inside, in one graph: as eager, through two steps of training."""
    torch.manual_seed(1)
    eager = kind(tied, schedule=schedule).to(problems.device)
    traced = copy.deepcopy(eager)
    both = eager, torch.compile(traced, fullgraph=True, backend=backend)
    x, labels = small_model.batch(0, ignored=0.3, device=problems.device)
    for _ in range(2):
        losses = [model(x, labels) for model in both]
        torch.testing.assert_close(*losses)
        for model, loss in zip((eager, traced), losses):
            model.zero_grad()
            loss.backward()
            torch.optim.SGD(model.parameters(), lr=0.5).step()
        for (name, p), q in zip(traced.named_parameters(), eager.parameters(), strict=True):
            assert_near(p.grad, q.grad, name)


def test_nothing_counts():
    p = problems.make()
    p.targets.fill_(-100)
    compiled = torch.compile(loss_of, fullgraph=True)
    loss = compiled(p)
    assert loss.isnan()
    for g in torch.autograd.grad(loss, p.parameters):
        assert torch.equal(g, torch.zeros_like(g))


def test_errors():
    p = problems.make()
    compiled = torch.compile(linear_cross_entropy)
    with pytest.raises(ValueError, match="reduction must be one of"):
        compiled(p.e, p.c, p.targets, reduction="avg")
    p.targets[3] = 101
    if problems.device == "cpu":
        with pytest.raises(RuntimeError, match=r"target .* is 101"):  # the operator's, as it is
            compiled(p.e, p.c, p.targets)
    else:
        assert compiled(p.e, p.c, p.targets).isnan()


def test_export():
    class Model(torch.nn.Module):
        def forward(self, e, c, targets):
            return linear_cross_entropy(e, c, targets, return_predictions=True)

    p = problems.make((24,), ignored=0.0)
    args = (p.e.detach(), p.c.detach(), p.targets)
    n = torch.export.Dim("n", min=2)
    program = torch.export.export(Model(), args, dynamic_shapes=({0: n}, None, {0: n}))
    q = problems.make((31,), seed=1)
    for got, want in zip(
        program.module()(q.e.detach(), p.c.detach(), q.targets),
        linear_cross_entropy(q.e, p.c, q.targets, return_predictions=True),
    ):
        torch.testing.assert_close(got, want.detach())


@pytest.mark.parametrize("name", ["default", "everything"])
def test_fake_tensors(name):
    """Shapes and dtypes without data, as with it; sizes may be symbols."""
    p = problems.make((3, 8), dtype=BF16, **OPTION_SETS[name])
    real = linear_cross_entropy(p.e, p.c, p.targets, p.bias, **p.options)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:

        def fake(t):
            return mode.from_tensor(t) if isinstance(t, torch.Tensor) else t

        options = {k: fake(v) for k, v in p.options.items()}
        traced = linear_cross_entropy(
            fake(p.e), fake(p.c), fake(p.targets), fake(p.bias), **options
        )
    for a, b in zip(torch.utils._pytree.tree_leaves(real), torch.utils._pytree.tree_leaves(traced)):
        assert a.shape == b.shape and a.dtype == b.dtype and a.requires_grad == b.requires_grad


def test_symbolic_sizes():
    p = problems.make((3, 8))

    def f(e, c, targets):
        return torch.autograd.grad(linear_cross_entropy(e, c, targets, shift=1), (e, c))

    graph = make_fx(f, tracing_mode="symbolic")(p.e, p.c, p.targets)
    q = problems.make((5, 13), V=57, D=8)
    for got, want in zip(graph(q.e, q.c, q.targets), f(q.e, q.c, q.targets)):
        torch.testing.assert_close(got, want)


def test_meta_tensors():
    p = problems.make()
    loss = linear_cross_entropy(p.e.to("meta"), p.c.to("meta"), p.targets.to("meta"))
    assert loss.device.type == "meta" and loss.shape == () and loss.dtype == F32


# Operators --------------------------------------------------------------------------------------


def operands(p):
    e = p.e.detach().reshape(-1, p.e.shape[-2], p.e.shape[-1]).requires_grad_()
    return e, p.c, p.bias, p.targets.reshape(e.shape[:-1]), None, None


def options(p, **changes):
    needs = dict(needs_de=True, needs_dc=True, needs_dbias=p.bias is not None)
    return Options(p.e.dtype, **{**needs, **changes})


def random_terms(p, o):
    """Coefficients, with those of zbar where it is wanted, and that the loss is defined."""
    count = 4 if o["wants_zbar"] else 2
    terms = torch.rand(count, 3 * (8 - o["shift"]), device=problems.device)
    return terms, torch.tensor(False, device=problems.device)


CHANGES = {
    "plain": {},
    "options": dict(shift=2, softcap=3.0, logit_scale=0.5, temperature=2.0, ignore_index=3),
    "outputs": dict(wants_entropy=True, wants_zbar=True, wants_argmax=True),
    "frozen": dict(needs_dc=False, needs_dbias=False),
}
changes = pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES.keys())


@changes
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_opcheck_deferred(changes, dtype):
    p = problems.make((3, 8), dtype=dtype, bias=True, ignored=0.0)
    o = vars(options(p, schedule=SCHEDULES["vocabulary"], **changes))
    terms = random_terms(p, o)
    torch.library.opcheck(operators.statistics, operands(p), o)
    torch.library.opcheck(operators.statistics, (*operands(p), *terms), o)
    inputs = [t.detach() if isinstance(t, torch.Tensor) else t for t in operands(p)]
    outputs = operators.statistics(*inputs, **o)
    _, nll, lse, row_max, log_sum, entropy, zbar, argmax, kept = outputs
    d_entropy = torch.rand_like(nll) if o["wants_entropy"] else None
    d_zbar = torch.rand_like(nll) if o["wants_zbar"] else None
    saved = (nll, row_max, log_sum, entropy, kept)
    d_nll, d_lse, d_lse_squared = torch.rand(3, len(nll)).to(nll).unbind()
    upstream = (d_nll, d_lse, d_lse_squared, d_entropy, d_zbar)
    torch.library.opcheck(operators.gradients, (*inputs, *saved, *upstream), o)


@changes
def test_opcheck_kept_logits(changes):
    p = problems.make((3, 8), bias=True, ignored=0.0)
    inputs = operands(p)
    choice = decide.choose(decide.sizes_of(*inputs), options(p, **changes), known_at_forward=False)
    assert choice.kept_bytes > 0
    o = vars(options(p, schedule=choice.schedule, kept_bytes=choice.kept_bytes, **changes))
    # Not test_aot_dispatch_dynamic: it compares kept, whose padding is not written.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operators.statistics, inputs, o, test_utils=tests)


@changes
def test_opcheck_immediate(changes):
    p = problems.make((3, 8), bias=True, ignored=0.0)
    o = vars(options(p, schedule=SCHEDULES["rows"], **changes))
    weights = torch.rand(3, 8).to(problems.device), torch.rand(p.c.shape[0]).to(problems.device)
    how = {"mean": False, "z_loss": 0.1}
    torch.library.opcheck(operators.loss_and_gradients, (*operands(p), *weights), how | o)
    torch.library.opcheck(operators.loss_and_gradients, operands(p), o)


@changes
def test_opcheck_loss_alone(changes):
    p = problems.make((3, 8), bias=True, ignored=0.0)
    nothing = dict(needs_de=False, needs_dc=False, needs_dbias=False)
    o = vars(options(p, **{**changes, **nothing}, schedule=SCHEDULES["none"]))
    inputs = [t.detach() if isinstance(t, torch.Tensor) else t for t in operands(p)]
    torch.library.opcheck(operators.loss_and_gradients, inputs, o)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing, z_loss", [(0.0, 0.0), (0.1, 0.0), (0.0, 0.1), (0.1, 0.1)])
def test_opcheck_terms(smoothing, z_loss, weighted):
    p = problems.make((3, 8), V=13)
    weights = (None, None)
    if weighted:
        weights = (torch.rand(3, 8).to(problems.device), torch.rand(13).to(problems.device))
    arguments = (p.targets, *weights, F32, 13, 1, -100, True, smoothing, z_loss)
    torch.library.opcheck(operators.loss_terms, arguments)


def test_opcheck_scale():
    t, factor = torch.randn(3, 4).to(problems.device), torch.tensor(2.0).to(problems.device)
    torch.library.opcheck(operators.scale_, (t, factor))


def test_no_number_of_rows_has_a_plan():
    p = problems.make((64,), V=1000, D=64)
    compiled = torch.compile(
        lambda p: loss_of(p, max_workspace=100), backend="aot_eager", dynamic=True
    )
    with pytest.raises(Exception, match="max_workspace is 100 bytes"):
        compiled(p)


@pytest.mark.parametrize("gradients", [True, False])
def test_a_plan_that_there_is_not_is_said_as_in_eager_code(gradients):
    p = problems.make((64,), V=1000, D=64)

    def loss(p):
        with torch.set_grad_enabled(gradients):
            return loss_of(p, max_workspace=100)

    with pytest.raises(ValueError, match="max_workspace is 100 bytes") as eager:
        loss(p)
    with pytest.raises(ValueError) as compiled:
        torch.compile(loss, backend="aot_eager")(p)
    assert str(compiled.value) == str(eager.value)
    # Of a graph that must be whole the compiler says it, in words of its own around these.
    torch._dynamo.reset()
    first = re.escape(str(eager.value).splitlines()[0])
    with pytest.raises(Exception, match=f"exception ValueError.*{first}") as whole:
        torch.compile(loss, backend="aot_eager", fullgraph=True)(p)
    assert "cutloss[" not in str(whole.value)


@pytest.mark.parametrize("error", [ValueError, NotImplementedError])
def test_whatever_a_plan_refuses_is_raised_by_the_code_that_is_compiled(error, monkeypatch):
    """Here made up: the engine of processors refuses nothing, those of GPUs some dtypes."""

    def choice(*_):
        raise error("no engine supports this problem")

    p = problems.make((64,), V=1000, D=64)
    monkeypatch.setattr(library, "choice", choice)
    with pytest.raises(error, match="^no engine supports this problem$"):
        torch.compile(loss_of, backend="aot_eager")(p)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=f"exception {error.__name__}.*no engine supports"):
        torch.compile(loss_of, backend="aot_eager", fullgraph=True)(p)


def test_tokens_that_a_mask_chooses():
    """How many is in the data: the graph takes a way that serves every number."""
    budget, _ = border_of_rows()
    p = problems.make((64,), V=211, D=24)
    chosen = torch.arange(64, device=p.e.device) % 3 != 0

    def loss(e, c, targets):
        return cutloss.linear_cross_entropy(e[chosen], c, targets[chosen], max_workspace=budget)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        got = compiled(p.e, p.c, p.targets)
        grads = torch.autograd.grad(got, (p.e, p.c))
    want = loss(p.e, p.c, p.targets)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grads, torch.autograd.grad(want, (p.e, p.c)))

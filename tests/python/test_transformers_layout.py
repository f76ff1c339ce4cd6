"""What a forward may do to logits before their loss: random chains of it, done to a tensor of
logits and to logits that are not made, give the same shapes, losses and gradients; and what takes
the vocabulary apart is refused, and nothing else."""

import math
import operator

import problems
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from cutloss.transformers import _operands
from cutloss.transformers._errors import LogitsNotMadeError
from cutloss.transformers._operands import Term
from cutloss.transformers._switch import Switch, _install
from cutloss.transformers._unmade_logits import UnmadeLogits

F64 = problems.widest()
SETTINGS = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


class Logits:
    """A tensor of logits, the same not made, and for each entry which class it is of which row."""

    def __init__(self, rows=(2, 4), V=5, D=3, adapted=False, dtype=F64):
        torch.manual_seed(0)
        self.V = V
        self.parameters, terms, made = [], [], 0.0
        for size in [D, 1] if adapted else [D]:
            linear = nn.Linear(size, V, dtype=dtype)
            hidden = torch.randn(*rows, size, dtype=dtype, requires_grad=True)
            _install(linear, Switch({}, {}), None)
            terms.append(Term(hidden, linear, 1.0))
            made = made + F.linear(hidden, linear.weight, linear.bias)
            self.parameters += [hidden, *linear.parameters()]
        self.made, self.unmade = made, UnmadeLogits(tuple(terms), _operands.loss)
        self.classes = torch.arange(V).expand(made.shape)
        self.rows = torch.arange(math.prod(rows)).view(*rows, 1).expand(made.shape)

    def do(self, change, renames=True, may_refuse=False):
        """Whether it was done; else it must be one that takes the vocabulary apart, or may be
        refused for another reason."""
        self.made = change(self.made)
        if renames:
            self.classes, self.rows = change(self.classes), change(self.rows)
        try:
            self.unmade = change(self.unmade)
        except (LogitsNotMadeError, ValueError) as error:
            nothing = self.made.numel() == 0
            assert may_refuse or nothing or self.class_dim() is None, f"refused: {error}"
            return False
        assert self.unmade.shape == self.made.shape and len(self.unmade.shape) == self.unmade.ndim
        return True

    def class_dim(self):
        """Which dimension of what was made is the whole vocabulary, by looking at the entries."""
        for dim, size in enumerate(self.made.shape):
            classes, rows = self.classes.movedim(dim, -1), self.rows.movedim(dim, -1)
            whole = size == self.V and (classes == torch.arange(self.V)).all()
            if whole and (rows == rows[..., :1]).all():
                return dim
        return None

    def assert_same_loss(self, loss=F.cross_entropy, **options):
        assert self.unmade.class_dim == self.class_dim()
        dims = (self.class_dim(), min(1, self.made.dim() - 1))
        # PyTorch's own gradient of a loss over two dimensions and more wants them contiguous.
        made, unmade = self.made.movedim(*dims).contiguous(), self.unmade.movedim(*dims)
        rows = made.movedim(dims[1], -1).shape[:-1]
        labels = (3 * torch.arange(math.prod(rows)) % self.V).view(rows)
        wanted = [p for p in self.parameters if p.requires_grad]
        want, got = loss(made, labels, **options), loss(unmade, labels, **options)
        assert got.shape == want.shape
        torch.testing.assert_close(got.to(want.dtype), want)
        upstream = torch.linspace(0.5, 1.5, want.numel(), dtype=want.dtype).view(want.shape)
        want_grads = torch.autograd.grad((want * upstream).sum(), wanted)
        got_grads = torch.autograd.grad((got * upstream).sum(), wanted)
        for g, w in zip(got_grads, want_grads):
            torch.testing.assert_close(g, w)


# Random chains ------------------------------------------------------------------------------------


def called(name, *args, **kwargs):
    """The same by PyTorch's function and by a tensor's method."""
    of_torch = getattr(torch, name, None)
    return [lambda z: getattr(z, name)(*args, **kwargs)] + (
        [lambda z: of_torch(z, *args, **kwargs)] if of_torch else []
    )


@st.composite
def renamings(draw, shape, class_dim):
    """Something that may be done to a tensor of this shape, which changes no number; and whether it
    may be refused although it leaves the vocabulary whole: if it picks all of it one by one, or by
    tensors as indices."""
    n = len(shape)
    dims = st.integers(-n, n - 1)
    any_dim = draw(dims)
    size = shape[any_dim]
    kinds = ["unsqueeze", "squeeze", "squeeze all", "reshape", "unflatten", "flatten", "permute",
             "movedim", "swap", "narrow", "select",
             "index_select", "pieces", "first", "index", "index of tensors", "same"]  # fmt: skip
    kind = draw(st.sampled_from(kinds))
    picks = kind in ("narrow", "select", "index_select", "pieces")
    may_refuse = (picks and any_dim % n == class_dim) or kind == "index of tensors"

    def pick(forms):
        return draw(st.sampled_from(forms)), may_refuse

    if kind == "unsqueeze":
        return pick(called("unsqueeze", draw(st.integers(-n - 1, n))))
    if kind == "squeeze":
        return pick(called("squeeze", any_dim))
    if kind == "squeeze all":
        return pick(called("squeeze"))
    if kind == "permute":
        order = draw(st.permutations(range(n)))
        return pick([*called("permute", order), lambda z: z.permute(*order)])
    if kind == "movedim":
        k = draw(st.integers(1, n))
        source = tuple(draw(st.permutations(range(n)))[:k])
        destination = tuple(d - n for d in draw(st.permutations(range(n)))[:k])
        name = draw(st.sampled_from(["movedim", "moveaxis"]))
        one = called(name, source[0], destination[0])
        return pick([*one, *called(name, source, destination)])
    if kind == "swap":
        other = draw(dims)
        forms = [f for name in ("transpose", "swapaxes", "swapdims")
                 for f in called(name, any_dim, other)]  # fmt: skip
        forms += [lambda z: z.mT] if n >= 2 else []
        forms += [lambda z: z.T] if n == 2 else []
        forms += called("t") if n <= 2 else []
        return pick(forms)
    if kind == "flatten":
        first, last = sorted([any_dim % n, draw(dims) % n])
        return pick([*called("flatten", first, last), *called("flatten", first - n, last - n),
                     *called("flatten", start_dim=first, end_dim=last)])  # fmt: skip
    if kind == "unflatten":
        parts = draw(st.sampled_from([p for p in range(1, size + 1) if size % p == 0]))
        sizes = draw(st.sampled_from([(parts, size // parts), (-1, parts), (parts, -1)]))
        return pick(called("unflatten", any_dim, sizes))
    if kind == "reshape":
        sizes = list(shape)
        for _ in range(draw(st.integers(1, 3))):  # merge neighbours, or put a 1 between
            at = draw(st.integers(0, len(sizes) - 1))
            if draw(st.booleans()) and at + 1 < len(sizes):
                sizes[at : at + 2] = [sizes[at] * sizes[at + 1]]
            else:
                sizes.insert(at, 1)
        if draw(st.booleans()):
            sizes[draw(st.integers(0, len(sizes) - 1))] = -1
        viewed = [lambda z: z.view(*sizes) if isinstance(z, UnmadeLogits) else z.reshape(sizes)]
        return pick([*called("reshape", sizes), lambda z: z.reshape(*sizes), *viewed])
    if kind == "narrow":
        start = draw(st.integers(0, size - 1))
        return pick(called("narrow", any_dim, start, draw(st.integers(1, size - start))))
    if kind == "select":
        return pick(called("select", any_dim, draw(st.integers(-size, size - 1))))
    if kind == "index_select":
        index = torch.tensor(draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=4)))
        return pick(called("index_select", any_dim, index))
    if kind == "pieces":
        k = draw(st.integers(1, size))
        forms = called("split", k, dim=any_dim) + called("chunk", k, any_dim)
        forms += called("split", [k, size - k], any_dim) + called("unbind", any_dim)
        forms += called("tensor_split", k, any_dim)
        form, which = draw(st.sampled_from(forms)), draw(st.integers(0, 3))
        return pick([lambda z: (lambda pieces: pieces[which % len(pieces)])(form(z))])
    if kind == "first":
        return (lambda z: [piece for piece in z][-1]), class_dim == 0
    if kind in ("index", "index of tensors"):
        index = draw(indices(shape, kind == "index of tensors"))
        return pick([lambda z: z[index]])
    return pick([lambda z: z.contiguous(), *called("clone"), lambda z: z.view_as(z)])


@st.composite
def indices(draw, shape, tensors):
    items, d = [], 0
    kinds = ["slice", "whole", "int", "none"] + ["tensor", "mask"] * tensors
    for _ in range(draw(st.integers(1, len(shape) + 1))):
        if d >= len(shape):
            break
        size = shape[d]
        kind = draw(st.sampled_from(kinds))
        if kind == "none":
            items.append(None)
            continue
        if kind == "slice":
            bound = st.none() | st.integers(-size - 1, size + 1)
            items.append(slice(draw(bound), draw(bound), draw(st.sampled_from([None, 1, 2]))))
        elif kind == "whole":
            whole = [slice(None), slice(0, size), slice(None, size + 3)]
            items.append(draw(st.sampled_from(whole)))
        elif kind == "int":
            items.append(draw(st.integers(-size, size - 1)))
        elif kind == "tensor":
            ids = draw(st.lists(st.integers(-size, size - 1), min_size=1, max_size=3))
            ids = torch.tensor(ids)
            items.append(draw(st.sampled_from([ids, ids[0], ids[:1], ids[:, None]])))
        else:
            k = draw(st.integers(1, len(shape) - d))
            mask = torch.arange(math.prod(shape[d : d + k])) % draw(st.integers(2, 3)) == 0
            items.append(mask.view(shape[d : d + k]))
            d += k - 1
        d += 1
    if draw(st.booleans()):
        items.append(Ellipsis)
        items += draw(st.sampled_from([[], [slice(None)]])) if d < len(shape) else []
    return tuple(items) if len(items) != 1 or draw(st.booleans()) else items[0]


@given(st.data())
@settings(SETTINGS, max_examples=400)
def test_renamings(data):
    rows = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    V, D = data.draw(st.sampled_from([2, 5])), data.draw(st.sampled_from([1, 3]))
    logits = Logits(rows, V, D, adapted=data.draw(st.booleans()))
    for _ in range(data.draw(st.integers(1, 5))):
        change, may_refuse = data.draw(renamings(logits.made.shape, logits.class_dim()))
        try:
            change(logits.made)
        except (RuntimeError, IndexError, TypeError):  # PyTorch has no such thing
            continue
        if not logits.do(change, may_refuse=may_refuse):
            return
        if logits.made.numel() == 0 or logits.made.dim() == 0:
            return
    logits.assert_same_loss()


# Numbers ------------------------------------------------------------------------------------------


def parameter(*shape, dtype=F64):
    numbers = torch.linspace(-1.2, 1.6, math.prod(shape), dtype=dtype).view(shape)
    return (numbers if shape else torch.tensor(0.7, dtype=dtype)).requires_grad_()


def column(logits, extra=0):
    """One number for each class, in a shape that is added to what was made."""
    shape = [1] * logits.made.dim()
    shape[logits.class_dim()] = logits.V
    while extra == 0 and len(shape) > 1 and shape[0] == 1:
        shape.pop(0)
    return parameter(*[1] * extra, *shape)


@given(st.data())
@settings(SETTINGS, max_examples=100)
def test_numbers_and_renamings(data):
    logits = Logits((2, 3), adapted=data.draw(st.booleans()))
    capped = False
    for _ in range(data.draw(st.integers(1, 6))):
        kinds = ["number", "movedim", "unsqueeze"] + ["tensor", "vector", "tanh"] * (not capped)
        kind = data.draw(st.sampled_from(kinds))
        if kind == "movedim":
            source, to = (data.draw(st.integers(0, logits.made.dim() - 1)) for _ in "ab")
            assert logits.do(lambda z: z.movedim(source, to))
        elif kind == "unsqueeze":
            assert logits.do(lambda z: z.unsqueeze(0))
        elif kind == "tanh":
            capped = True
            assert logits.do(data.draw(st.sampled_from(called("tanh"))), renames=False)
        elif kind == "number":
            x = data.draw(st.sampled_from([0.5, 3, 1.25] + [-2.0] * (not capped)))
            forms = [lambda z: z * x, lambda z: x * z, lambda z: z / x, lambda z: torch.mul(z, x),
                     lambda z: torch.div(z, x)]  # fmt: skip
            assert logits.do(data.draw(st.sampled_from(forms)), renames=False)
        elif kind == "tensor":
            x = parameter(*data.draw(st.sampled_from([(), (1,), (1, 1)])))
            forms = [lambda z: z * x, lambda z: x * z, lambda z: z / x, lambda z: torch.mul(x, z),
                     lambda z: torch.true_divide(z, x), lambda z: torch.multiply(z, x),
                     lambda z: torch.Tensor.__rtruediv__(x, z)]  # fmt: skip
            logits.parameters.append(x)
            if x.dim() <= logits.made.dim():
                assert logits.do(data.draw(st.sampled_from(forms)), renames=False)
        else:
            b = column(logits, data.draw(st.integers(0, 1)))
            a = data.draw(st.sampled_from([1, 0.5]))
            more = (1,) * (b.dim() - logits.made.dim())
            forms = [lambda z: z + b, lambda z: b + z, lambda z: z - b, lambda z: torch.add(b, z),
                     lambda z: torch.sub(z, b, alpha=a), lambda z: z.add(b, alpha=a),
                     lambda z: torch.Tensor.__rsub__(b, z)]  # fmt: skip
            logits.parameters.append(b)
            logits.classes, logits.rows = (
                t.view(*more, *t.shape) for t in (logits.classes, logits.rows)
            )
            assert logits.do(data.draw(st.sampled_from(forms)), renames=False)
    logits.parameters = [p for p in logits.parameters if used(logits.made, p)]
    logits.assert_same_loss()


def used(made, p):
    return torch.autograd.grad(made.sum(), p, retain_graph=True, allow_unused=True)[0] is not None


@pytest.mark.parametrize("rows", [(), (6,), (2, 3), (2, 3, 2)])
@pytest.mark.parametrize(
    "options",
    [
        dict(reduction="none"),
        dict(reduction="sum", ignore_index=3),
        dict(weight=torch.linspace(0.5, 1.5, 5, dtype=F64)),
        dict(label_smoothing=0.1),
    ],
)
def test_losses_over_dimension_1(rows, options):
    """One row without a dimension, rows, and rows of one and more dimensions behind the classes."""
    logits = Logits(rows or (2,))
    if not rows:
        logits.do(lambda z: z[1])
    logits.assert_same_loss(**options)
    if "label_smoothing" not in options:
        for log_softmax in called("log_softmax", logits.made.dim() - 1):
            other = Logits(rows or (2,))
            other.do(lambda z: log_softmax(z if rows else z[1]), renames=False)
            other.classes, other.rows = logits.classes, logits.rows
            other.assert_same_loss(F.nll_loss, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_scale_that_is_a_tensor_in_sixteen_bits(dtype):
    """No worse than logits in 16 bits, scaled and summed there."""
    exact = Logits((200,), V=40, D=64, dtype=torch.float32)
    given = [p.detach().to(dtype).requires_grad_() for p in exact.parameters]
    hidden, weight, bias = given
    scale, vector = torch.tensor(0.37, dtype=dtype), parameter(40, dtype=dtype)
    labels = torch.arange(200) % 40

    def of(z, scale, vector):
        losses = F.cross_entropy((z / scale + vector).float(), labels, reduction="none")
        return losses, *torch.autograd.grad(losses.sum(), [*given, vector])

    truth = of(F.linear(*(p.double() for p in given)), scale.double(), vector)
    plain = of(F.linear(*given), scale, vector)
    linear = nn.Linear(64, 40, dtype=dtype)
    linear.weight, linear.bias = nn.Parameter(weight), nn.Parameter(bias)
    given[1:] = linear.parameters()
    _install(linear, Switch({}, {}), None)
    got = of(UnmadeLogits((Term(hidden, linear, 1.0),), _operands.loss), scale, vector)
    for g, p, t in zip(got, plain, truth):
        of_plain, of_ours = ((x.double() - t).norm() for x in (p, g))
        assert g.dtype == p.dtype and of_ours <= 2 * of_plain


IDS, MASK = torch.tensor([[1], [0], [1]]), torch.arange(8).view(2, 4) % 3 == 0
INDICES = {
    "of two dimensions": lambda z: z[IDS],
    "of none": lambda z: z[IDS[0, 0]],
    "behind a slice": lambda z: z[1:, IDS],
    "behind a number": lambda z: z[1, IDS],
    "behind None": lambda z: z[None, IDS],
    "behind an ellipsis": lambda z: z[..., IDS, :],
    "behind the vocabulary": lambda z: z.mT[:, :, IDS],
    "in front of the vocabulary": lambda z: z.movedim(2, 1)[IDS, :, 2:],
    "two": lambda z: z[IDS[:, 0], IDS],
    "a number between two": lambda z: z[:, None][IDS, 0, IDS[0]],
    "a mask": lambda z: z[MASK],
    "a mask and another": lambda z: z[MASK[0, :2], IDS],
}


@pytest.mark.parametrize("name", INDICES)
def test_tensors_as_indices(name):
    logits = Logits(BATCH)
    assert logits.do(INDICES[name])
    logits.assert_same_loss(reduction="none")


BATCH = (2, 4)
REFUSED = {
    "a split of the vocabulary": lambda z: z.split(2, -1),
    "a part of the vocabulary": lambda z: z.narrow(2, 0, 3),
    "a loop over classes": lambda z: list(z.mT[0]),
    "merged": lambda z: z.flatten(),
    "merged with positions": lambda z: torch.flatten(z, 1),
    "another sum": lambda z: z + torch.zeros(4, 5),
    "a sum with a number for each row": lambda z: z + torch.zeros(4, 1),
    "a vector along positions": lambda z: z.mT + torch.zeros(4),
    "a sum with a number": lambda z: z + 1.0,
    "a product with a vector": lambda z: z * torch.ones(5),
    "a quotient of": lambda z: torch.ones(()) / z,
    "a difference from": lambda z: torch.ones(5) - z,
    "a vector after a tanh": lambda z: z.tanh() + torch.zeros(5),
    "a tensor after a tanh": lambda z: z.tanh() * torch.tensor(2.0),
    "a floor": lambda z: torch.div(z, 2, rounding_mode="floor"),
    "a scale after log_softmax": lambda z: z.log_softmax(-1) * 2,
    "log_softmax over positions": lambda z: z.log_softmax(1),
    "integers": lambda z: z.type(torch.int64),
    "a type by name": lambda z: z.type("torch.DoubleTensor"),
    "a class of tensors": lambda z: z.type(),
    "a loss over positions": lambda z: F.cross_entropy(z, torch.zeros(2, 5, dtype=torch.long)),
    "probabilities as targets": lambda z: F.cross_entropy(z[0], torch.ones(4, 5)),
    "nll_loss alone": lambda z: F.nll_loss(z[0], torch.zeros(4, dtype=torch.long)),
    "separated tensors": lambda z: z[torch.tensor([0]), :, torch.tensor([0])],
    "a list as index": lambda z: z[[0, 1]],
    "a float as index": lambda z: z[torch.tensor([0.0])],
    "an assignment": lambda z: z.__setitem__(0, 1.0),
    "in place": lambda z: torch.ones(5).add_(z),
    "something unknown": lambda z: torch.topk(z, 2),
    "equal": lambda z: z == z, "unequal": lambda z: z != 0.0, "less": lambda z: 1 < z,
    "no more": lambda z: z <= torch.zeros(5), "among others": lambda z: 0.0 in z,
    "found in a list": lambda z: z in [torch.zeros(5)],
    "times in place": lambda z: operator.imul(z, 2),
    "divided in place": lambda z: operator.itruediv(z, torch.ones(())),
    "added in place": lambda z: operator.iadd(z, torch.zeros(5)),
    "less in place": lambda z: operator.isub(z, z), "by a method in place": lambda z: z.mul_(2),
    "to a power": lambda z: z**2, "the power of": lambda z: 2**z, "by a matrix": lambda z: z @ z.mT,
    "a size": lambda z: abs(z), "a number": lambda z: float(z), "a remainder": lambda z: z % 2,
    "less than a number": lambda z: 1 - z, "a number by": lambda z: 1 / z,
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    with pytest.raises(LogitsNotMadeError, match="of logits that were not made: .* return_logits"):
        REFUSED[name](Logits(BATCH).unmade)


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda z: z.view(-1), "the vocabulary, of 5"),
        (lambda z: z.view(-1, 7), "the vocabulary, of 5"),
        (lambda z: z.permute(0, 0, 1), "are permuted by"),
        (lambda z: z.movedim((0, 1), 2), "as many dimensions from as to"),
        (lambda z: z.flatten(2, 1), "after end_dim"),
        (lambda z: z.unflatten(1, (3, -1)), "can not be unflattened"),
        (lambda z: z.t(), "for matrices"),
        (lambda z: F.cross_entropy(z.mT, torch.zeros(4, 2, dtype=torch.long)), "one label for"),
    ],
)
def test_shapes_that_a_tensor_would_not_take_either(change, match):
    with pytest.raises(ValueError, match=match):
        change(Logits(BATCH).unmade)
    for outside in (lambda z: z.transpose(0, 3), lambda z: z[0, 0, :, 0], lambda z: z.select(0, 2)):
        with pytest.raises(IndexError):
            outside(Logits(BATCH).unmade)


def test_sizes_and_casts():
    z = Logits(BATCH).unmade
    assert (z.numel(), torch.numel(z), z.dim(), len(z), z.size(-1)) == (40, 40, 3, 2, 5)
    label = torch.zeros(2, 4, dtype=torch.long)
    want = F.cross_entropy(z.mT, label)
    as_ones = z.type_as(torch.ones(1))
    for cast in (z.half(), z.bfloat16(), z.float(), z.type(torch.float32), as_ones):
        assert F.cross_entropy(cast.mT, label) == want


def test_negated():
    for neg in (operator.neg, torch.neg, lambda z: z.negative()):
        logits = Logits(BATCH)
        assert logits.do(neg, renames=False)
        logits.assert_same_loss()


def test_identity_is_what_hashes_and_none_is_no_logits():
    z = Logits(BATCH).unmade
    assert hash(z) == hash(z) and {z: 1}[z] == 1 and len({z, z.neg()}) == 2
    assert (z == None) is False and (z != None) is True  # noqa: E711

"""Whether a function of rows keeps them apart: when that is looked at, and when not again."""

import builtins
import collections
import dataclasses
import enum
import functools
import math
import os
import sys
import types

import pytest
import torch
from helpers import problems
from helpers.inside import _row_function
from helpers.problems import F64
from helpers.token_losses import call, chunks, cuda, dft, on_cuda, smallest  # noqa: F401

from cutloss.losses import linear_token_loss


def divided_by_mean(nll):
    return nll / nll.mean().detach()


@pytest.fixture
def calls(monkeypatch):
    """How many rows each call of a caller's function had."""
    seen = []
    inner = _row_function._call

    def counted(fn, rows):
        seen.append(len(rows["nll"]))
        return inner(fn, rows)

    monkeypatch.setattr(_row_function, "_call", counted)
    monkeypatch.setattr(_row_function, "_known", collections.OrderedDict())
    return seen


def looks_until(evaluations):
    """How many of so many evaluations are looked at: numbers 1, 2, 4, 8, ..."""
    return evaluations.bit_length()


def test_a_function_is_looked_at_ever_more_rarely(calls, chunks):
    p = problems.make((3, 270), V=531, D=16)
    most = smallest(p, dft, {})
    del calls[:], chunks[:]
    evaluations = 0
    for _ in range(2):
        call(p, dft, {}, schedule="rows", max_workspace=most)
        evaluations += chunks[-1]
        # A look takes two calls: with other rows changed, and with fewer rows.
        assert chunks[-1] > 4 and len(calls) == evaluations + 2 * looks_until(evaluations)
    again = types.FunctionType(dft.__code__, globals())  # as in a cell that is run again
    for fn in (dft, again):
        call(p, fn, {}, schedule="vocabulary")
        evaluations += 1
        assert len(calls) == evaluations + 2 * looks_until(evaluations)
    del calls[:]
    call(p.to(F64), dft, {})  # of another dtype
    assert len(calls) == 3


def is_known(calls, make, p):
    """Whether evaluation 3 of a function, made anew each time, is one call."""
    for n in (3, 3, 1):
        del calls[:]
        call(p, make(), {})
        if len(calls) != n:
            return False
    return True


WEIGHT = torch.ones(1)


def helper_of_torch(nll):
    return torch.nn.functional.softplus(nll) * WEIGHT * math.pi


def focal(power):
    @torch.no_grad()
    def weight(nll):
        return (1 - nll.neg().exp()) ** power

    return lambda nll: weight(nll) * nll


class Focal(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("power", torch.tensor(2.0))

    def forward(self, nll):
        return focal(self.power)(nll)


PLAIN = {
    "function": lambda: dft,
    "helper_of_torch": lambda: lambda nll: helper_of_torch(nll),
    "tensor": lambda: lambda nll, of=torch.tensor(2.0): nll * of,
    "tensor_in_list": lambda: lambda nll, of=(torch.rand(1), [torch.Size([3])]): nll * of[0],
    "no_grad": lambda: focal(2.0),
    "module_of_torch": Focal,
    "partial": lambda: functools.partial(lambda of, nll: nll * of, torch.tensor(2.0)),
}


@pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN.keys())
def test_what_steers_usual_functions_is_compared(make, calls):
    assert is_known(calls, make, problems.make((77,)))


def drops_outliers(nll):
    """That is, by the mean of the rows that are at hand."""
    return torch.where(nll > 2 * nll.mean(), 0.0, nll)


def rows(has_outliers):
    """With losses far from each other, or close."""
    p = problems.make((77,), ignored=0.0)
    p.e.data.mul_(8.0 if has_outliers else 0.01)
    return p


@pytest.mark.parametrize("schedule", ["rows", "vocabulary"])
def test_coupling_that_shows_in_later_data_is_found(calls, schedule):
    early, late = map(rows, (False, True))
    for _ in range(5):
        call(early, drops_outliers, {}, schedule=schedule)
    for _ in range(2):  # evaluations 6 and 7
        call(late, drops_outliers, {}, schedule=schedule)
    for _ in range(2):  # evaluation 8, and what is no longer known
        with pytest.raises(ValueError, match="depends on other rows"):
            call(late, drops_outliers, {}, schedule=schedule)


def test_coupling_in_later_data_where_it_is_not_waited_for(calls, monkeypatch):
    """As on CUDA: the loss is NaN, and stays so."""
    call(rows(False), drops_outliers, {}, schedule="vocabulary")
    monkeypatch.setattr(_row_function.checks, "may_look", lambda device: False)
    check_later_looks_that_do_not_wait(monkeypatch)


def check_later_looks_that_do_not_wait(monkeypatch):
    """After the first evaluation."""
    monkeypatch.setattr(_row_function, "_may_wait", lambda key: pytest.fail("waits"))
    early, late = map(rows, (False, True))

    def loss(data):
        return call(data, drops_outliers, {}, schedule="vocabulary")

    assert loss(early).isfinite()
    assert loss(late).isfinite()  # evaluation 3
    for data in (late, late, early):
        assert loss(data).isnan()


def test_a_function_is_looked_at_in_every_call_where_that_is_asked_for(calls, monkeypatch):
    monkeypatch.setenv("CUTLOSS_CHECK", "1")
    p = problems.make((64,))
    for _ in range(2):
        call(p, dft, {}, schedule="vocabulary")
    assert len(calls) == 2 * 3


def maybe_coupled(nll, couples):
    return nll / nll.mean().detach() if couples else 2 * nll


class Flag(enum.Enum):
    OFF = 0
    ON = 1


class Switched:
    """A function that lies in an object, whole or as a method."""

    def __init__(self, couples):
        self.options = {"couples": couples}

    def __call__(self, nll):
        return maybe_coupled(nll, self.options["couples"])

    method = __call__


switch = types.ModuleType("switch")


def by_module(couples):
    switch.couples = couples
    return lambda nll: maybe_coupled(nll, switch.couples)


def by_function_of_module(couples):
    switch.helper = by_helper(couples)
    return lambda nll: switch.helper(nll)


def by_global(couples):
    scope = {"maybe_coupled": maybe_coupled, "couples": couples}
    exec("def fn(nll): return maybe_coupled(nll, couples)", scope)
    return scope["fn"]


def by_helper(couples):
    def helper(nll):
        return maybe_coupled(nll, couples)

    return lambda nll: helper(nll)


def by_attribute(couples):
    def fn(nll):
        return maybe_coupled(nll, fn.couples)

    fn.couples = couples
    return fn


class Namespace:
    couples = False

    def __call__(self, nll):
        return maybe_coupled(nll, self.couples)

    method = __call__

    def of_global(self, nll):
        return maybe_coupled(nll, GLOBAL["couples"])

    @staticmethod
    def static(nll):
        return maybe_coupled(nll, GLOBAL["couples"])

    @classmethod
    def of_class(cls, nll):
        return maybe_coupled(nll, cls.couples)

    @property
    def read(self):
        return GLOBAL["couples"]


class Derived(Namespace):
    pass


class OfModule(torch.nn.Module):
    def inner(self, nll):
        return maybe_coupled(nll, GLOBAL["couples"])

    def forward(self, nll):
        return self.inner(nll)


class Replaced:
    pass


class Slots:
    __slots__ = ("couples",)


class Numbers(dict):
    """Entries, and an attribute."""


class Number(float):
    pass


@dataclasses.dataclass
class Options:
    couples: bool


GLOBAL = {"couples": False}
instance, derived, slots = Namespace(), Derived(), Slots()
switch.settings, switch.entries = types.SimpleNamespace(), {}
switch.nested = types.ModuleType("switch.nested")


def of_handed_module(module, nll):
    return maybe_coupled(nll, module.handed)


def replaced(couples):
    Replaced.loss = (lambda self, nll: divided_by_mean(nll)) if couples else lambda self, nll: nll
    it = Replaced()
    return lambda nll: it.loss(nll)


def numbers(couples):
    it = Numbers()
    it.couples = couples
    return it


def steered_by(turn, fn):
    """The function, after the switch was turned."""

    def steered(couples):
        turn(couples)
        return fn

    return steered


def of_class(fn):
    return steered_by(lambda couples: setattr(Namespace, "couples", couples), fn)


def of_global(fn):
    return steered_by(lambda couples: GLOBAL.update(couples=couples), fn)


def imports(nll):
    from switch import imported

    return maybe_coupled(nll, imported)


@pytest.fixture(autouse=True)
def switches_are_put_back(monkeypatch):
    monkeypatch.setitem(sys.modules, "switch", switch)
    monkeypatch.setenv("CUTLOSS_TEST_COUPLES", "0")
    monkeypatch.setattr(builtins, "cutloss_test_couples", False, raising=False)


STEERED = {
    "class": of_class(lambda nll: maybe_coupled(nll, Namespace.couples)),
    "class_of_global_object": of_class(lambda nll: maybe_coupled(nll, instance.couples)),
    "base_of_class": of_class(lambda nll: maybe_coupled(nll, derived.couples)),
    "class_by_method": of_class(derived.method),
    "class_by_object": of_class(derived),
    "class_by_classmethod": of_class(lambda nll: derived.of_class(nll)),
    "bound_classmethod": of_class(Derived.of_class),
    "method_of_global": of_global(instance.of_global),
    "method_of_global_object": of_global(lambda nll: instance.of_global(nll)),
    "staticmethod": of_global(lambda nll: Namespace.static(nll)),
    "property": of_global(lambda nll: maybe_coupled(nll, derived.read)),
    "module_of_torch": of_global(OfModule()),
    "replaced_method": replaced,
    "dataclass": lambda couples: functools.partial(
        lambda nll, of: maybe_coupled(nll, of.couples), of=Options(couples)
    ),
    "attribute_of_dict": lambda couples: lambda nll, of=numbers(couples): maybe_coupled(
        nll, of.couples
    ),
    "object_in_module": steered_by(
        lambda couples: setattr(switch.settings, "couples", couples),
        lambda nll: maybe_coupled(nll, switch.settings.couples),
    ),
    "dict_in_module": steered_by(
        lambda couples: switch.entries.update(couples=couples),
        lambda nll: maybe_coupled(nll, switch.entries["couples"]),
    ),
    "module_in_module": steered_by(
        lambda couples: setattr(switch.nested, "couples", couples),
        lambda nll: maybe_coupled(nll, switch.nested.couples),
    ),
    "module_handed_over": steered_by(
        lambda couples: setattr(switch, "handed", couples),
        lambda nll: of_handed_module(switch, nll),
    ),
    "builtin": steered_by(
        lambda couples: setattr(builtins, "cutloss_test_couples", couples),
        lambda nll: maybe_coupled(nll, cutloss_test_couples),  # noqa: F821
    ),
    "closure": lambda couples: lambda nll: maybe_coupled(nll, couples),
    "tuple": lambda couples: lambda nll, of=(1, couples): maybe_coupled(nll, of[1]),
    "keyword": lambda couples: lambda nll, *, of=couples: maybe_coupled(nll, of),
    "number": lambda couples: lambda nll, power=float(couples): nll / nll.mean().detach() ** power,
    "string": lambda couples: lambda nll, way="ab"[couples]: maybe_coupled(nll, way == "b"),
    "enum": lambda couples: lambda nll, of=Flag(int(couples)): maybe_coupled(nll, of is Flag.ON),
    "none": lambda couples: lambda nll, of=1 if couples else None: maybe_coupled(nll, of),
    "partial": lambda couples: functools.partial(maybe_coupled, couples=couples),
    "partials": lambda couples: functools.partial(functools.partial(maybe_coupled), couples=couples),
    "object": Switched,
    "method": lambda couples: Switched(couples).method,
    "global": by_global,
    "module": by_module,
    "helper": by_helper,
    "helper_of_module": by_function_of_module,
    "attribute": by_attribute,
    "decorated": lambda couples: torch.enable_grad()(by_helper(couples)),
}


# By what is not compared: such a function is looked at in every call.
NOT_FOLLOWED = {
    "environment": steered_by(
        lambda couples: os.environ.update(CUTLOSS_TEST_COUPLES=str(int(couples))),
        lambda nll: maybe_coupled(nll, os.environ.get("CUTLOSS_TEST_COUPLES") == "1"),
    ),
    "slots": steered_by(
        lambda couples: setattr(slots, "couples", couples),
        lambda nll: maybe_coupled(nll, slots.couples),
    ),
    "number_of_a_class": lambda couples: functools.partial(
        lambda nll, of: maybe_coupled(nll, of == 1), of=Number(couples)
    ),
    "import": steered_by(lambda couples: setattr(switch, "imported", couples), imports),
    "getattr": steered_by(
        lambda couples: setattr(switch, "by_name", couples),
        lambda nll: maybe_coupled(nll, getattr(switch, "by_" + "name")),
    ),
    "globals": steered_by(
        lambda couples: globals().update(by_name=couples),
        lambda nll: maybe_coupled(nll, globals()["by_" + "name"]),
    ),
    "many": steered_by(
        lambda couples: MANY[-1].update(couples=couples),
        lambda nll: maybe_coupled(nll, MANY[-1]["couples"]),
    ),
    "cached": lambda couples: functools.lru_cache(by_helper(couples)),
    "default_of_dict": lambda couples: lambda nll, of=collections.defaultdict(
        lambda: couples
    ): maybe_coupled(nll, of.default_factory()),
}
MANY = [{} for _ in range(1000)]
ALL = STEERED | NOT_FOLLOWED


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("schedule", ["rows", "vocabulary"])
@pytest.mark.parametrize("steered", ALL.values(), ids=ALL.keys())
def test_a_function_is_looked_at_again_where_it_is_steered_otherwise(steered, schedule):
    """Of the same code, after it was seen to keep rows apart: evaluation 3 is not looked at."""
    p = problems.make((77,))
    for times in (2, 1):
        for _ in range(times):
            call(p, steered(False), {}, schedule=schedule)
        with pytest.raises(ValueError, match="depends on other rows"):
            call(p, steered(True), {}, schedule=schedule)


@pytest.mark.parametrize("steered", STEERED.values(), ids=STEERED.keys())
def test_a_function_that_is_made_anew_is_known(steered, calls):
    assert is_known(calls, lambda: steered(False), problems.make((77,)))


def test_a_switch_that_is_turned_between_calls(calls):
    p, fn = problems.make((77,)), Switched(False)
    for _ in range(2):
        call(p, fn, {})
    fn.options["couples"] = True
    with pytest.raises(ValueError, match="depends on other rows"):
        call(p, fn, {})


def test_what_shows_nothing_is_not_remembered(calls):
    """A few rows, or rows that are alike: a classifier of zeros makes them so, and the mean of the
    loss over rows is each row's own."""
    mean = divided_by_mean
    alike = problems.make((77,))
    alike.c.data.zero_()
    for p, fn in ((alike, mean), (problems.make((15,)), dft)):
        for _ in range(2):
            del calls[:]
            call(p, fn, {})
            assert len(calls) == 3 and not _row_function._known
    with pytest.raises(ValueError, match="depends on other rows"):
        call(problems.make((77,)), mean, {})


def test_what_is_alike_in_one_column_shows_nothing(calls):
    p = problems.make((77,))

    def loss(w):
        return linear_token_loss(
            p.e, p.c, p.targets, lambda nll, w: nll * w[:, 0] / w[:, 1].mean(), per_token={"w": w}
        )

    loss(torch.stack([torch.rand(77), torch.ones(77)], 1))
    assert not _row_function._known
    with pytest.raises(ValueError, match="depends on other rows"):
        loss(torch.rand(77, 2))


def test_a_single_row_shows_nothing(calls):
    mean = divided_by_mean
    call(problems.make((1,), ignored=0.0), mean, {})
    assert len(calls) == 1 and not _row_function._known
    with pytest.raises(ValueError, match="depends on other rows"):
        call(problems.make((77,)), mean, {})


def test_without_a_gradient_its_derivative_is_not_seen(calls):
    def fn(nll):
        return nll + (nll.sum() - nll.sum().detach())

    p = problems.make((77,))
    with torch.no_grad():
        for _ in range(2):
            call(p, fn, {})
    with pytest.raises(ValueError, match="depends on other rows"):
        call(p, fn, {})


def test_what_is_remembered_is_bounded(calls):
    p = problems.make((77,))
    for i in range(_row_function._MOST_KNOWN + 3):
        call(p, lambda nll, i=i: nll * i + nll, {}, schedule="vocabulary")
    assert len(_row_function._known) == _row_function._MOST_KNOWN


@pytest.mark.parametrize("steered", NOT_FOLLOWED.values(), ids=NOT_FOLLOWED.keys())
def test_what_is_not_compared_is_looked_at_in_every_call(steered, calls):
    p = problems.make((77,))
    for _ in range(4):
        del calls[:]
        call(p, steered(False), {})
        assert len(calls) == 3 and not _row_function._known


# CUDA --------------------------------------------------------------------------------------------


@cuda
@pytest.mark.usefixtures("on_cuda")
def test_a_coupled_function_on_cuda():
    """An error when it is new; never a plausible number."""
    p = problems.make((40,), V=101, D=16)

    def depends(nll, power):
        return nll / nll.mean().detach() ** power

    seen = functools.partial(depends, power=0)  # its rows are apart, as far as can be seen
    call(p, seen, {})
    with pytest.raises(ValueError, match="depends on other rows"):
        call(p, functools.partial(depends, power=1), {})
    for i in range(_row_function._MOST_LOOKS):
        call(p, functools.partial(depends, power=1e-30 * i), {})
    assert call(p, functools.partial(depends, power=2), {}).isnan()

    with pytest.raises(ValueError, match="depends on other rows"):
        call(p, lambda nll: nll - nll.mean(), {})


@cuda
@pytest.mark.usefixtures("on_cuda", "calls")
def test_later_looks_on_cuda_do_not_wait(monkeypatch):
    call(rows(False), drops_outliers, {}, schedule="vocabulary")
    check_later_looks_that_do_not_wait(monkeypatch)

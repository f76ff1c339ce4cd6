"""Which calls are not remembered (test_repeated.py: what tells apart those that are), and what is
not kept of those that are."""

import gc
import threading
import weakref

import pytest
import torch
from helpers.inside import ADDS_TO, repeated
from helpers.repeated_calls import D, V, bias, check, made_by, plain, tensors_of
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

from cutloss import linear_cross_entropy


@pytest.fixture(autouse=True)
def nothing_before(monkeypatch):
    monkeypatch.setattr(repeated, "_settled", {})


# Calls that are not remembered --------------------------------------------------------------------


class Own(Tensor):
    """A tensor that may have a meaning of its own."""


def call_of(p):
    return linear_cross_entropy(p.e, p.c, p.targets)


def compiled(p):
    torch.compile(call_of, backend="eager", fullgraph=True)(p)


def transformed(p):
    torch.vmap(lambda weight: call_of(p) * weight)(torch.ones(2))


def in_forward_mode(p):
    with forward_ad.dual_level():
        call_of(p)


def of_a_subclass(p):
    linear_cross_entropy(p.e, p.c.as_subclass(Own), p.targets)


def fake(p):
    with FakeTensorMode() as mode:
        linear_cross_entropy(*map(mode.from_tensor, (p.e, p.c, p.targets)))


def added_elsewhere(p):
    setattr(p.c.requires_grad_(), ADDS_TO, torch.zeros(V, D))
    call_of(p)


def in_plain_pytorch(p):
    linear_cross_entropy(p.e, p.c, p.targets, impl="torch")


def sparse(p):
    with pytest.raises(TypeError, match="torch.sparse_coo"):
        linear_cross_entropy(p.e, p.c.to_sparse(), p.targets)


OTHERS = [compiled, transformed, in_forward_mode, of_a_subclass, fake, added_elsewhere]
OTHERS += [in_plain_pytorch, sparse]


@pytest.mark.parametrize("way", OTHERS)
def test_is_not_remembered(way):
    way(plain())
    assert not repeated._settled
    call_of(plain())
    assert len(repeated._settled) == 1
    way(plain())
    assert len(repeated._settled) == 1


def test_a_parameter_is_remembered():
    p = plain()
    linear_cross_entropy(p.e, torch.nn.Parameter(p.c), p.targets)
    assert len(repeated._settled) == 1


# What is kept -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_keeps_no_tensor(reduction):
    for _ in range(2):  # made, and found
        p = plain()
        bias(p)
        tensors = p.e, p.c, p.targets, p.bias
        p.e.requires_grad_()
        loss = linear_cross_entropy(*tensors, reduction=reduction)
        loss.sum().backward()
        seen = [weakref.ref(t) for t in (*tensors, loss, p.e.grad)]
        del p, tensors, loss
        gc.collect()
        assert [ref() for ref in seen] == [None] * len(seen)
        assert len(repeated._settled) == 1


def test_forgets_at_the_bound():
    check(made_by())
    for i in range(repeated._MOST + 10):
        linear_cross_entropy(**tensors_of(plain()), logit_scale=2.0 + i)
        assert 1 <= len(repeated._settled) <= repeated._MOST
    assert len(repeated._settled) < 20
    check(made_by())


def test_threads(monkeypatch):
    """Each gets its own results, while all of them make the others' calls be forgotten."""
    monkeypatch.setattr(repeated, "_MOST", 3)
    p = plain()
    said = [{"logit_scale": 1.0 + i, "reduction": r} for i in range(4) for r in ("sum", "none")]
    want = [linear_cross_entropy(**tensors_of(p), **options) for options in said]
    wrong = []

    def work(start):
        for i in range(start, start + 200):
            i %= len(said)
            try:
                same = torch.equal(linear_cross_entropy(**tensors_of(p), **said[i]), want[i])
            except Exception as error:
                same = error
            if same is not True:
                wrong.append((said[i], same))

    threads = [threading.Thread(target=work, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []

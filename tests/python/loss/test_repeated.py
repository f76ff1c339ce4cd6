"""A call that is found among those before it, by its key, gives what it gives when none were made.

Each row of the table makes one call, then another that differs from it in one fact, then the first
again. That their keys differ in that fact alone makes the row fail where a key forgets it.
"""

import inspect
import math
import random

import numpy as np
import pytest
import torch
from helpers.inside import repeated
from helpers.layouts import every_other, padded
from helpers.repeated_calls import (
    COUNT,
    D,
    L,
    S,
    V,
    around,
    bias,
    check,
    constant,
    engine,
    every,
    freed,
    in_columns,
    made_anew,
    made_by,
    nothing,
    of,
    one_further,
    option,
    outcome,
    places,
    precision,
    rows,
    to_bf16,
    to_fp16,
    to_fp32,
)
from torch import Tensor

from cutloss import LinearCrossEntropyImpl, VocabParallelOptions, linear_cross_entropy


@pytest.fixture(autouse=True)
def nothing_before(monkeypatch):
    monkeypatch.setattr(repeated, "_settled", {})


MANY = None
# What the first call has; what the other has besides; in how many places their keys differ.
OF_TENSORS = {
    "one sequence": (nothing, rows(0), MANY),
    "one token": (rows(0), rows(0), MANY),
    "fewer sequences": (nothing, rows(slice(0, 2)), 2),  # of e and targets
    "fewer classes": (option(ignore_index=20), of("c", lambda c: c[:-1].clone()), 1),
    "fewer in bias": (bias, of("bias", lambda b: b[:-1].clone()), 1),
    "no such c": (nothing, of("c", lambda c: c[None].clone()), MANY),
    "stride of e": (nothing, of("e", padded), 1),
    "expanded e": (nothing, of("e", lambda e: e[:, :1].expand(S, L, D)), 1),
    "stride of c": (nothing, of("c", in_columns), 1),
    "stride of targets": (nothing, of("targets", padded), 1),
    "stride of bias": (bias, of("bias", every_other), 1),
    "address of e": (nothing, of("e", one_further), 1),
    "address of c": (nothing, of("c", one_further), 1),
    "address of targets": (nothing, of("targets", one_further), 1),
    "address of bias": (bias, of("bias", one_further), 1),
    "freed e": (nothing, of("e", freed), MANY),
    "freed c": (nothing, of("c", freed), MANY),
    "freed c, not at its start": (of("c", one_further), of("c", freed), MANY),
    "dtype of e": (nothing, of("e", Tensor.bfloat16), 1),
    "dtype of c": (nothing, of("c", Tensor.double), 1),
    "dtype of bias": (bias, of("bias", Tensor.half), 1),
    "dtype of e under autocast": (to_bf16, of("e", Tensor.bfloat16), 1),
    "dtype of targets": (nothing, of("targets", Tensor.int), 1),
    "bias": (nothing, bias, MANY),
    "constant e": (nothing, constant("e"), 1),
    "constant c": (nothing, constant("c"), 1),
    "constant bias": (bias, constant("bias"), 1),
}
OF_WHAT_IS_AROUND = {
    "no gradients": (nothing, around(torch.no_grad), 1),
    "inference": (nothing, around(torch.inference_mode), 1),
    "autocast": (nothing, to_bf16, 1),
    "autocast's dtype": (to_bf16, to_fp16, 1),
    "autocast's dtype": (to_bf16, to_fp16, 1),
    "no such engine": (nothing, around(lambda: engine("cpu/none")), 1),
}
# By name: a value that is taken, another of its type, and one that equals it, of another type.
VALUES = {
    "ignore_index": (0, 1, False),
    "softcap": (1.0, 20.0, True),
    "reduction": ("mean", "none", np.str_("mean")),
    "shift": (1, 2, 1.0),
    "return_lse": (False, True, 0.0),
    "filter_eps": (1.0, 0.5, True),
    "impl": ("cce", "torch", np.str_("cce")),
    "logit_scale": (1.0, -2.0, True),
    "temperature": (1.0, 2.0, True),
    "label_smoothing": (0.0, 0.1, False),
    "return_entropy": (False, True, 0.0),
    "return_predictions": (False, True, 0.0),
    "z_loss": (0.0, 0.01, np.float64(0.0)),
    "max_workspace": (2**20, 2**30, float(2**20)),
    "schedule": ("auto", "vocabulary", np.str_("auto")),
    "num_valid": (COUNT, COUNT - 1, float(COUNT)),
}
OF_OPTIONS = {
    f"{name}={first!r}, {other!r}": (option(**{name: first}), option(**{name: other}), 1)
    for name, (first, *others) in VALUES.items()
    for other in others
}
for _name in ("softcap", "logit_scale", "temperature", "label_smoothing", "z_loss"):
    OF_OPTIONS[f"{_name}=nan"] = option(**{_name: 1.0}), option(**{_name: math.nan}), 1
OF_OPTIONS |= {
    "impl of a number": (option(impl=LinearCrossEntropyImpl.CCE), option(impl=1), 1),
    "impl of no name": (option(impl="cce"), option(impl="best"), 1),
}
ROWS = OF_TENSORS | OF_WHAT_IS_AROUND | OF_OPTIONS


def check_row(first, other, differences, device):
    before, after = made_by(first, device=device), made_by(first, other, device=device)
    key_of_other = made_anew(after)[1]
    key = check(before)
    assert repeated.found(key) is not None
    # Before the call that would be taken for the first one: of freed memory it ends the process.
    assert key_of_other != key
    assert differences is MANY or places(key, key_of_other) == differences
    assert check(after) == key_of_other
    assert check(before) == key


@pytest.mark.parametrize("row", ROWS)
def test_one_fact_makes_another_call(row, device):
    check_row(*ROWS[row], device)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@needs_cuda
@pytest.mark.parametrize("first", [nothing, every(of("e", Tensor.bfloat16), to_fp32)])
def test_tf32(first):
    """Of fp32, and of what autocast makes fp32 of."""
    with precision("ieee"):
        check_row(first, around(lambda: precision("tf32")), 1, "cuda")


@needs_cuda
def test_another_device():
    check_row(nothing, of("c", Tensor.cuda), 1, "cpu")  # is refused
    if torch.cuda.device_count() > 1:
        changes = [of(name, lambda t: t.to("cuda:1")) for name in ("e", "c", "targets")]
        check_row(nothing, every(*changes), 3, "cuda:0")


def test_calls_in_any_order():
    """As the rows, with facts of several of them at once."""
    draw = random.Random(0)
    was_found = 0
    whole = [row for name, row in OF_TENSORS.items() if "freed" not in name]
    for _ in range(300):
        picked = [draw.choice(whole)]
        picked += draw.sample(list(OF_OPTIONS.values()), draw.choice([0, 1, 2]))
        if draw.random() < 0.3:
            picked.append(draw.choice(list(OF_WHAT_IS_AROUND.values())))
        changes = [every(*row[: draw.choice([1, 2])]) for row in picked]
        before = set(repeated._settled)
        was_found += check(made_by(*changes)) in before
    assert was_found > 50


# Options ------------------------------------------------------------------------------------------

TENSORS = {"e", "c", "targets", "bias"}
MEAN_NOTHING = ["accum_e_fp32", "accum_c_fp32", "filter_e_grad", "filter_c_grad"]
WITHOUT_KEY = {  # what is looked at in every call, and how it is said
    "vocab_parallel_options": VocabParallelOptions(0, V),
    "weight": torch.ones(V),
    "token_weight": torch.ones(S, L),
}


def test_every_parameter_is_in_the_key_or_here():
    """A new option goes into `said` of linear_cross_entropy and into VALUES."""
    known = [*TENSORS, *VALUES, *MEAN_NOTHING, *WITHOUT_KEY]
    assert sorted(inspect.signature(linear_cross_entropy).parameters) == sorted(known)


@pytest.mark.parametrize("name", MEAN_NOTHING)
def test_what_means_nothing_is_not_in_the_key(name):
    make = made_by()
    key = check(make)
    for value in (True, False):
        assert check(made_by(option(**{name: value}))) == key


@pytest.mark.parametrize("name", [*WITHOUT_KEY, "temperature"])
def test_options_that_leave_a_call_without_key(name):
    value = WITHOUT_KEY.get(name, torch.ones(S, L))
    assert outcome(made_by(option(**{name: value}))())[1] is None
    assert not repeated._settled


def test_an_option_that_has_no_hash():
    """Is refused in its own words."""
    error, message = outcome(made_by(option(softcap=[1.0]))())[0]
    assert error is TypeError and message.startswith("softcap must be a number")

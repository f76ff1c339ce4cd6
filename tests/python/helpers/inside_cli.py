"""What tests see of the inside of `cutloss bench` and `doctor`, as inside.py has the rest."""

# ruff: noqa: F401
from cutloss import doctor
from cutloss._bench import (
    cases,
    device_memory,
    errors,
    kernels,
    logits,
    memory,
    methods,
    odd_sizes,
    plan,
    record,
    report,
    rivals,
    softmax,
    timing,
    train_measure,
    train_models,
    variants,
)
from cutloss._bench.cases import Case
from cutloss._bench.methods import DEFAULT_METHODS, Method
from cutloss._bench.products import _chunked, products
from cutloss._bench.train_models import Shape
from cutloss._cli import UserError, check_device
from cutloss.bench import named_models

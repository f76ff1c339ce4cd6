"""What tests see of the inside of `cutloss bench` and `doctor`, as inside.py has the rest."""

# ruff: noqa: F401
from cutloss.cli import doctor
from cutloss.cli.bench import (
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
from cutloss.cli.bench.cases import Case
from cutloss.cli.bench.command import named_models
from cutloss.cli.bench.methods import DEFAULT_METHODS, Method
from cutloss.cli.bench.products import _chunked, products
from cutloss.cli.bench.train_models import Shape
from cutloss.cli.usage import UserError, check_device

"""Functions that torch.compile leaves alone."""

import functools
from collections.abc import Callable

import torch


def untraced(fn: Callable) -> Callable:
    """What torch.compiler.disable makes, without importing the compiler before somebody uses it."""
    left_alone = torch._disable_dynamo(fn)

    @functools.wraps(fn)
    def call(*args, **options):
        if torch.compiler.is_compiling():
            return left_alone(*args, **options)
        return fn(*args, **options)

    return call


def while_traced(fn: Callable) -> Callable:
    """torch.compile calls it once, while it traces, and takes what it returns for a constant: for
    what is said once, in a graph that stays whole.

    What torch.compiler.assume_constant_result makes, without importing the compiler."""
    fn._dynamo_marked_constant = True
    return fn

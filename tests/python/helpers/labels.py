"""Names of parametrized tests."""

import re

ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def without_address(value) -> str:
    """str(value), the same in every process: of a function without its place in memory."""
    return ADDRESS.sub("", str(value))

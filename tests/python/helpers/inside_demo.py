"""What tests see of the inside of `cutloss demo`, as inside.py has the rest."""

# ruff: noqa: F401
from cutloss.cli.demo import text, train
from cutloss.cli.demo.command import flat
from cutloss.cli.demo.report import largest_difference, slowness

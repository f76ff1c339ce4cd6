"""What tests see of the inside of `cutloss demo`, as inside.py has the rest."""

# ruff: noqa: F401
from cutloss._demo import text, train
from cutloss._demo.report import largest_difference, slowness
from cutloss.demo import flat

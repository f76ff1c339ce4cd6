"""What tests see of the inside of cutloss: its private names come from here, and from nowhere else.

A private module that moves or is renamed changes a line of this file, and no test. What is inside
of the commands is in inside_cli.py, and in inside_demo.py what cannot be imported without rich.
"""

# ruff: noqa: F401
from cutloss._core import checks, decide, weighting
from cutloss._core.options import SCHEDULES, LossOptions, Options
from cutloss._core.plan import Plan
from cutloss._implementations import IS_PLAIN
from cutloss._torch import by_rows, library, needs, private, repeated, shards
from cutloss._torch.softcap import capped
from cutloss.functional import ADDS_TO
from cutloss.losses import _chunks, _policy_terms, _row_function
from cutloss.transformers import _operands
from cutloss.transformers._errors import LogitsNotMadeError
from cutloss.transformers._operands import Term
from cutloss.transformers._switch import Switch, _install
from cutloss.transformers._unmade_logits import UnmadeLogits
from cutloss.trl import _head as _trl_head

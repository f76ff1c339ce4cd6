"""What the library decides for a case: the engine, the schedule, and why."""

import dataclasses
import re

import torch

from cutloss import _ops, _plan
from cutloss._bench.cases import Case
from cutloss._bench.methods import Method

# Raised where no engine takes a case, or none with the schedule and workspace asked for.
Refusal = (ValueError, TypeError, NotImplementedError)


@dataclasses.dataclass
class Decision:
    engine: str
    schedule: str
    text: str  # the whole plan in words


def decide(case: Case, method: Method, which: str) -> Decision:
    sizes = _plan.Sizes(
        sequences=1,
        length=case.N,
        V=case.V,
        D=case.D,
        e_dtype=case.e_dtype,
        c_dtype=case.c_dtype,
        bias_dtype=None,
        target_dtype=torch.int64,
        on_cuda=case.device == "cuda",
    )
    options = {
        "compute_dtype": case.product_dtype,
        "shift": 0,
        "ignore_index": -100,
        "softcap": None,
        "logit_scale": 1.0,
        "temperature": 1.0,
        "wants_entropy": False,
        "wants_zbar": False,
        "wants_argmax": False,
        "needs_de": which != "fw",
        "needs_dc": which == "fwbw",
        "needs_dbias": False,
        "schedule": _ops.SCHEDULES[method.schedule],
        "max_workspace": method.max_workspace,
        "kept_bytes": 0,
    }
    choice = _plan.choose(sizes, options, known_at_forward=True)
    text = _ops.describe_plan(sizes.arguments(at_forward=choice.immediate), options)
    engine, schedule = re.search(r"^engine (\S+)\s+schedule (\S+)", text, re.MULTILINE).groups()
    return Decision(engine, schedule, text)

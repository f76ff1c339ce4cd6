"""What the library decides for a case."""

import dataclasses

import torch

from cutloss._core.decide import Sizes
from cutloss._core.options import SCHEDULES, Options
from cutloss._core.plan import Plan
from cutloss._torch import library
from cutloss.cli.bench.cases import Case
from cutloss.cli.bench.methods import ENGINE_VARIABLE, Method, only_engine

# Raised where no engine takes a case, or none with the schedule and workspace asked for.
Refusal = (ValueError, TypeError, NotImplementedError)
WORKSPACES = ("smallest", "logits")
MIB = 2**20


def decide(case: Case, method: Method, pass_name: str) -> Plan:
    sizes = Sizes(
        sequences=1,
        length=case.N,
        V=case.V,
        D=case.D,
        e_dtype=case.e_dtype,
        c_dtype=case.c_dtype,
        bias_dtype=case.c_dtype if "bias" in case.option_names else None,
        target_dtype=torch.int64,
        on_cuda=case.device == "cuda",
    )
    options = Options(
        case.product_dtype,
        softcap=case.option("softcap"),
        temperature=case.option("temperature") or 1.0,
        needs_de=pass_name != "fw",
        needs_dc=pass_name == "fwbw",
        needs_dbias=pass_name == "fwbw" and "bias" in case.option_names,
        schedule=SCHEDULES[method.schedule],
        max_workspace=method.max_workspace,
        num_valid=case.num_valid if method.num_valid else None,
    )
    with only_engine(method.engine):
        plan = library.plan(sizes.arguments(known_at_forward=True), options)
    if method.engine and method.engine not in plan.engine:
        raise NotImplementedError(
            f"the plan takes the engine {plan.engine}: {ENGINE_VARIABLE}={method.engine} has no "
            f"effect"
        )
    return plan


def with_workspace(case: Case, method: Method, pass_name: str) -> Method:
    """The method with its workspace in MiB, where it is given by a name:

    * smallest: the least with which there is a plan;
    * logits: enough for the logits of all rows, and a little more.
    """
    name = method.max_workspace_mib
    if name == "logits":
        logits = case.N * case.V * case.product_dtype.itemsize
        return _granting(method, logits + logits // 8 + 64 * MIB)
    if name == "smallest":
        unlimited = dataclasses.replace(method, max_workspace_mib=None)
        return _granting(method, decide(case, unlimited, pass_name).least_bytes)
    return method


def _granting(method, number):
    return dataclasses.replace(method, max_workspace_mib=number / MIB)  # exact: a power of 2

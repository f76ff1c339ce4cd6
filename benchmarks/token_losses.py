#!/usr/bin/env python3
"""Losses of tokens beside plain cross-entropy: what a function of each token's nll costs by rows,
and what it costs by way of token_log_probs.

    benchmarks/token_losses.py --device cuda --shapes "8192,4096,131072" --dtype bf16 \
        --memory 512MiB,logits --passes fwbw,fwbw_frozen [--json FILE]

Time and unit are those of `cutloss bench`, whose format the lines of results have. N is a multiple
of 8, the number of sequences.
"""

import argparse
import functools
import shlex
import sys

import torch

from cutloss import linear_cross_entropy, losses
from cutloss.cli.bench import arguments, record
from cutloss.cli.bench.cases import Case, inputs, leaves
from cutloss.cli.bench.methods import Method, forget_gradients
from cutloss.cli.bench.plan import decide, with_workspace
from cutloss.cli.bench.products import products
from cutloss.cli.bench.timing import time_rounds

SEQUENCES = 8


def dft(nll):
    return nll.neg().exp().detach() * nll


def policy_options(targets):
    """DAPO with ratios of tokens and a KL term."""
    old = torch.full(targets.shape, -12.0, device=targets.device)
    advantages = torch.linspace(-1, 1, len(targets), device=targets.device)
    return dict(
        loss_type="dapo", advantages=advantages, old_log_probs=old, reference=old, beta=0.04
    )


def dapo(e, c, targets, **how):
    return losses.linear_loss("policy", e, c, targets, **policy_options(targets), **how).loss


def dapo_of_log_probs(e, c, targets, **how):
    policy = losses.token_log_probs(e, c, targets, **how)
    return losses.policy_loss(policy, **policy_options(targets)).loss


LOSSES = {
    "linear_cross_entropy": linear_cross_entropy,
    "linear_token_loss DFT": functools.partial(losses.linear_token_loss, fn=dft),
    "linear_loss DAPO": dapo,
    "token_log_probs DAPO": dapo_of_log_probs,
}


def run(loss, method, case, which, e, c, targets):
    shape = (SEQUENCES, case.N // SEQUENCES)
    with torch.set_grad_enabled(which != "fw"), case.autocast():
        value = loss(
            e.view(*shape, -1), c, targets.view(shape), max_workspace=method.max_workspace
        )
    if which != "fw":
        value.backward()
    forget_gradients(e, c)


def measure(case, args):
    tensors = inputs(case)
    calls, methods = {}, {}
    for which in args.passes:
        of_pass = leaves(tensors, which)
        for memory in args.max_workspace:
            method = with_workspace(case, Method("cutloss", max_workspace_mib=memory), which)
            for name, loss in LOSSES.items():
                key = f"{name}, {which}, {memory or 'default'}"
                calls[key] = functools.partial(run, loss, method, case, which, *of_pass)
                methods[key] = name, method, which
    units = products(case, *tensors[:2])
    ms = time_rounds({**calls, **units}, args.rounds, case.device, case.seed, twice=tuple(units))
    gemm_ms = min(ms[name] for name in units)
    print(f"{case.label}: E·Cᵀ {gemm_ms:.2f} ms")
    for key, (name, method, which) in methods.items():
        print(f"  {key:55} {ms[key]:9.2f} ms {ms[key] / gemm_ms:6.2f} GEMMs", flush=True)
        decision = decide(case, method, which)
        yield dict(
            N=case.N, D=case.D, V=case.V, dtype=case.dtype, data=case.data, method=name,
            engine=decision.engine, gradient="exact", schedule=decision.schedule,
            workspace_mib=method.max_workspace_mib, ms=ms[key], gemm_ms=gemm_ms,
            gemms=ms[key] / gemm_ms, peak_mib=None, de_err=None, dc_err=None,
            **{"pass": which, "command": shlex.join(["benchmarks/token_losses.py", *sys.argv[1:]])},
        )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    arguments.add_arguments(parser)
    args = parser.parse_args()
    surroundings = record.surroundings(args.device, torch.get_num_threads())
    for N, D, V in args.shape:
        for dtype in args.dtype or arguments.DEFAULT_DTYPES[False]:
            lines = list(measure(Case(N, D, V, dtype, device=args.device, seed=args.seed), args))
            if args.json:
                record.append(args.json, [surroundings | line for line in lines])


if __name__ == "__main__":
    main()

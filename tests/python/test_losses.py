"""cutloss.losses against formulas with stored logits: loss and gradients, every name and option."""

import losses_by_hand as by_hand
import problems
import pytest
import torch
from problems import F32, F64, Problem
from tolerance import assert_close

from cutloss import losses

pytestmark = pytest.mark.usefixtures("device")

# How the model makes its logits; one of them with each loss.
HEADS = [
    dict(shift=1),
    dict(bias=True, temperature=0.7),
    dict(bias=True, shift=1, softcap=4.0, logit_scale=1.5),
    dict(temperature=lambda batch, V, g: 0.5 + torch.rand(batch, generator=g)),
]


def problem(dtype, head, sequences=6, seed=0) -> Problem:
    """Sequences of different lengths with gaps; the last has no token that counts."""
    p = problems.make((sequences, 9), 61, 12, dtype, seed=seed, ignored=0.25, **head)
    p.targets[0, :4] = -100
    p.targets[1, 6:] = -100
    p.targets[-1] = -100
    return p


def log_probs(p: Problem, **options) -> losses.TokenLogProbs:
    return losses.token_log_probs(p.e, p.c, p.targets, p.bias, **p.options, **options)


def reference_of(p: Problem, head) -> Problem:
    """Another model's hidden states and classifier, not far from those of p."""
    other = problem(p.e.dtype, head, p.e.shape[0], seed=1)
    for mine, theirs in zip(other.parameters, p.parameters):
        mine.data = theirs.data + 0.2 * mine.data
    other.targets, other.options = p.targets, p.options
    return other


def by_tokens(p: Problem, rows: list[torch.Tensor], at: list[torch.Tensor]) -> torch.Tensor:
    """Rows of tokens that count as a matrix, NaN at the others."""
    wide = rows[0].new_full((len(rows), p.targets.shape[1] - int(p.options.get("shift", 0))), torch.nan)
    for row, values, where in zip(wide, rows, at):
        row[where] = values.detach()
    return wide


def check(p: Problem, loss: losses.Loss, hand) -> None:
    """`hand`: from a problem to its loss."""
    truth_p = p.to(F64)
    truth, plain = hand(truth_p), hand(p)
    grads = torch.autograd.grad(loss.loss, p.parameters)
    truth_g = torch.autograd.grad(truth, truth_p.parameters)
    plain_g = torch.autograd.grad(plain, p.parameters)
    named = zip(["loss", "de", "dc", "dbias"], (loss.loss, *grads), (truth, *truth_g), (plain, *plain_g))
    for name, value, true, simple in named:
        if p.e.dtype == F64:
            torch.testing.assert_close(value, true, rtol=1e-10, atol=1e-10, msg=lambda m: f"{name}: {m}")
        else:
            assert_close(value, true, simple, name, lenience=4)
    for name, metric in loss.metrics.items():
        assert metric.dim() == 0 and not metric.requires_grad and metric.isfinite(), name


def both_dtypes(test):
    return pytest.mark.parametrize("dtype", [F64, F32], ids=str)(test)


def cases(all_options: dict[str, dict]):
    """A head with each: names and options."""
    ids, options = zip(*all_options.items())
    heads = [HEADS[i % len(HEADS)] for i in range(len(ids))]
    return pytest.mark.parametrize("options, head", list(zip(options, heads)), ids=ids)


# Preference, with a reference -----------------------------------------------------------------

SMOOTHED = dict.fromkeys(["exo_pair", "robust", "aot", "aot_unpaired"], dict(label_smoothing=0.1))
DPO = {name: dict(loss_type=name, **SMOOTHED.get(name, {})) for name in losses.DPO}
DPO |= {f"{name}_beta": o | dict(beta=0.7) for name, o in DPO.items()}
DPO |= {
    f"{name}_{kind}": dict(loss_type=name, f_divergence_type=kind, **SMOOTHED.get(name, {}))
    for kind in ("forward_kl", "js_divergence", "alpha_divergence")
    for name in ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft", "sigmoid_norm")
}
DPO |= {
    f"{name}_ld": dict(loss_type=name, ld_alpha=0.3, **SMOOTHED.get(name, {}))
    for name in ("sigmoid", "ipo", "aot", "sft", "sppo_hard")
}
DPO |= {
    "alpha_1": dict(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.0),
    "alpha_2": dict(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=2.0),
    "tau": dict(loss_type="discopop", discopop_tau=0.5),
    "ld_0": dict(ld_alpha=0.0),
    "ld_1": dict(ld_alpha=1.0),
    "mixed": dict(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]),
    "mixed_equally": dict(loss_type=("ipo", "robust"), label_smoothing=0.2),
    "weighted": dict(use_weighting=True),
    "weighted_ipo": dict(loss_type="ipo", use_weighting=True, ld_alpha=0.5),
}


@both_dtypes
@cases(DPO)
def test_dpo(options, head, dtype):
    p = problem(dtype, head)
    r = reference_of(p, head)
    with torch.no_grad():
        reference = log_probs(r)
    policy = log_probs(p, return_log_sum_sq_probs=options.get("use_weighting", False))
    loss = losses.dpo_loss(policy, reference, **options)

    def hand(q):
        rows = by_hand.rows(q)
        ref = by_hand.rows(r.to(q.e.dtype))["log_probs"]
        ref = [t.detach() for t in ref]
        return by_hand.dpo(rows["log_probs"], ref, rows["squares"], **options)

    check(p, loss, hand)


# What they are made of ------------------------------------------------------------------------


@both_dtypes
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_token_log_probs(head, dtype):
    p = problem(dtype, head)
    ours = log_probs(p, return_entropy=True, return_log_sum_sq_probs=True)
    rows = by_hand.rows(p)
    tolerance = dict(rtol=1e-10, atol=1e-10) if dtype == F64 else dict(rtol=1e-4, atol=2e-5)
    values = (ours.log_probs, ours.entropy, ours.log_sum_sq_probs)
    for value, name in zip(values, ("log_probs", "entropy", "squares")):
        wide = by_tokens(p, rows[name], rows["at"])
        assert torch.equal(ours.mask, ~wide.isnan())
        torch.testing.assert_close(value, wide.nan_to_num(0.0), **tolerance)
    lengths = [len(t) for t in rows["log_probs"]]
    assert ours.lengths().tolist() == lengths and lengths[-1] == 0
    torch.testing.assert_close(ours.sum(), ours.log_probs.sum(-1))
    torch.testing.assert_close(ours.mean() * ours.lengths(), ours.sum())
    assert ours.mean()[-1] == 0 and not ours.log_sum_sq_probs.requires_grad

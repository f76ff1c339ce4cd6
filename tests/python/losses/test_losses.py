"""cutloss.losses against formulas with stored logits: loss and gradients, every name and option."""

import pytest
import torch
from helpers import losses_by_hand as by_hand
from helpers.labels import without_address
from helpers.problems import F32, F64, Problem
from helpers.sequence_losses import log_probs, problem
from helpers.tolerance import assert_close

from cutloss import losses

pytestmark = pytest.mark.usefixtures("device")

# How the model makes its logits; one of them with each loss.
HEADS = [
    dict(shift=1),
    dict(bias=True, temperature=0.7),
    dict(bias=True, shift=1, softcap=4.0, logit_scale=1.5),
    dict(temperature=lambda batch, V, g: 0.5 + torch.rand(batch, generator=g)),
]


def reference_of(p: Problem, head) -> Problem:
    """Another model's hidden states and classifier, not far from those of p."""
    other = problem(p.e.dtype, head, p.e.shape[0], seed=1)
    for mine, theirs in zip(other.parameters, p.parameters):
        mine.data = theirs.data + 0.2 * mine.data
    other.targets, other.options = p.targets, p.options
    return other


def by_tokens(p: Problem, rows: list[torch.Tensor], at: list[torch.Tensor]) -> torch.Tensor:
    """Rows of tokens that count as a matrix, NaN at the others."""
    length = p.targets.shape[1] - int(p.options.get("shift", 0))
    wide = rows[0].new_full((len(rows), length), torch.nan)
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
    values, truths, plains = (loss.loss, *grads), (truth, *truth_g), (plain, *plain_g)
    for name, value, true, simple in zip(["loss", "de", "dc", "dbias"], values, truths, plains):
        if p.e.dtype == F64:
            torch.testing.assert_close(value, true, rtol=1e-10, atol=1e-10)
        else:
            # One number is luck of either side's rounding more than many are.
            assert_close(value, true, simple, name, lenience=8 if value.dim() == 0 else 4)
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
    "weighted_hinge": dict(loss_type="hinge", use_weighting=True),
    "weighted_sft": dict(loss_type="sft", use_weighting=True),
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


# Policy ---------------------------------------------------------------------------------------

NEEDED = {"dr_grpo": dict(max_completion_length=16), "cispo": dict(epsilon_high=1.1)}
EVERY = {name: dict(loss_type=name, **NEEDED.get(name, {})) for name in losses.POLICY}
POLICY = dict(EVERY)
POLICY |= {f"{n}_on_policy": o | dict(without_old=True, beta=0.1) for n, o in EVERY.items()}
POLICY |= {f"{n}_sequence": o | dict(importance_sampling_level="sequence", beta=0.1)
           for n, o in EVERY.items() if n != "vespo"}  # fmt: skip
POLICY |= {f"{n}_kl": o | dict(beta=0.3) for n, o in EVERY.items()}
POLICY |= {f"{n}_token_advantages": o | dict(token_advantages=True) for n, o in EVERY.items()}
POLICY |= {f"{n}_corrected": o | dict(sampled=True, sampling_correction="token_truncate",
           sampling_clip_max=1.2) for n, o in EVERY.items()}  # fmt: skip
POLICY |= {f"{n}_entropy": o | dict(top_entropy_quantile=0.4, entropy_coef=0.05, beta=0.2)
           for n, o in EVERY.items()}  # fmt: skip
POLICY |= {
    f"sampler_{mode}": dict(sampled=True, sampling_correction=mode, sampling_clip_min=0.95,
                            sampling_clip_max=1.1)
    for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
}  # fmt: skip
POLICY |= {
    "sampler_default": dict(sampled=True),
    "sampler_without_bounds": dict(sampled=True, sampling_clip_max=None),
    "sampler_off": dict(sampled=True, sampling_correction=None),
    "vespo_masked": dict(loss_type="vespo", sampled=True, sampling_correction="token_mask",
                         sampling_clip_max=1.1),
    "vespo_k": dict(loss_type="vespo", vespo_k_pos=1.0, vespo_lambda_pos=1.5, vespo_k_neg=2.5,
                    vespo_lambda_neg=0.5),
    "sapo_temperatures": dict(loss_type="sapo", sapo_temperature_pos=0.6, sapo_temperature_neg=2.0),
    "plain_kl": dict(loss_type="grpo", beta=0.3, use_bias_correction_kl=False),
    "clip_higher": dict(epsilon=0.05, epsilon_high=0.1),
    "two_sided": dict(epsilon=0.05, epsilon_high=0.1, delta=1.15),
    "gspo": dict(loss_type="grpo", importance_sampling_level="sequence", epsilon=3e-2,
                 epsilon_high=4e-2),
    "off_policy": dict(off_policy_mask_threshold=0.01),
    "off_policy_sampled": dict(off_policy_mask_threshold=0.02, sampled=True),
    "num_items": dict(num_items_in_batch=50),
    "num_items_entropy": dict(num_items_in_batch=50, entropy_coef=0.1),
    "num_items_cispo": dict(loss_type="cispo", epsilon_high=5.0,
                            num_items_in_batch=torch.tensor(50)),
    "entropy_alone": dict(entropy_coef=0.1),
    "quantile_0": dict(top_entropy_quantile=0.0),
    "everything": dict(
        loss_type="grpo", sampled=True, beta=0.1, epsilon=0.1, epsilon_high=0.2, delta=1.3,
        entropy_coef=0.01, top_entropy_quantile=0.7, off_policy_mask_threshold=0.05,
        sampling_correction="token_mask", token_advantages=True,
    ),
}  # fmt: skip


def policy_inputs(p: Problem, r: Problem, sampled=False, without_old=False, token_advantages=False):
    """As lists of what each sequence's tokens have; the advantages of a sequence are 1, -1, ..."""
    g = torch.Generator().manual_seed(5)

    def near(rows, by):
        return [t.detach() + by * torch.randn(t.shape, generator=g).to(t) for t in rows]

    now = by_hand.rows(p)["log_probs"]
    old = near(now, 0.15)
    sampling = near(old, 0.15)
    sampling[0][1] = torch.nan
    advantages = [torch.full_like(t, (-1) ** i * (0.5 + i)) for i, t in enumerate(old)]
    if token_advantages:
        advantages = near([0 * t for t in old], 1.0)
    ref = [t.detach() for t in by_hand.rows(r)["log_probs"]]
    return advantages, None if without_old else old, ref, sampling if sampled else None


@both_dtypes
@cases(POLICY)
def test_policy(options, head, dtype):
    p = problem(dtype, head)
    r = reference_of(p, head)
    options = dict(options)
    kinds = {k: options.pop(k, False) for k in ("sampled", "without_old", "token_advantages")}
    lists = policy_inputs(p, r, **kinds)
    advantages, old, ref, sampling = lists
    at = by_hand.rows(p)["at"]
    needs_entropy = "entropy_coef" in options or "top_entropy_quantile" in options
    wide = advantages_of = by_tokens(p, advantages, at)
    if not kinds["token_advantages"]:
        advantages_of = wide.nan_to_num(0.0).sum(-1) / (~wide.isnan()).sum(-1).clamp(min=1)
    loss = losses.policy_loss(
        log_probs(p, return_entropy=needs_entropy),
        advantages_of,
        old_log_probs=None if old is None else by_tokens(p, old, at),
        reference=by_tokens(p, ref, at) if "beta" in options else None,
        sampling_log_probs=None if sampling is None else by_tokens(p, sampling, at),
        **options,
    )

    def hand(q):
        rows = by_hand.rows(q)
        moved = [None if t is None else [x.to(q.e.dtype) for x in t] for t in lists]
        return by_hand.policy(rows["log_probs"], rows["entropy"], *moved, **options)

    check(p, loss, hand)


# Preference without a reference, and without pairs ---------------------------------------------

CPO = {name: dict(loss_type=name) for name in losses.CPO}
CPO |= {f"{name}_alone": o | dict(cpo_alpha=0.0, beta=1.3) for name, o in CPO.items()}
CPO |= {f"{name}_alpha": o | dict(alpha=0.05, cpo_alpha=0.2) for name, o in CPO.items()}
CPO |= {
    "sigmoid_smoothed": dict(label_smoothing=0.1),
    "simpo_smoothed": dict(loss_type="simpo", label_smoothing=0.2, simpo_gamma=0.3, beta=2.0),
    "simpo_alpha_below_0": dict(loss_type="simpo", alpha=-0.25),
}


@both_dtypes
@cases(CPO)
def test_cpo(options, head, dtype):
    p = problem(dtype, head)
    loss = losses.cpo_loss(log_probs(p), **options)
    check(p, loss, lambda q: by_hand.cpo(by_hand.rows(q)["log_probs"], **options))
    if options.get("loss_type") == "simpo":
        same = {"cpo_alpha": 1.0} | {k: v for k, v in options.items() if k != "loss_type"}
        assert torch.equal(losses.simpo_loss(log_probs(p), **same).loss, loss.loss)


@both_dtypes
@cases({"default": {}, "beta": dict(beta=0.7), "completions": dict(prompt=3)})
def test_orpo(options, head, dtype):
    """Odds over completions alone, the first tokens being the prompt's."""
    p = problem(dtype, head)
    policy = log_probs(p)
    prompt, beta = options.get("prompt", 0), options.get("beta", 0.1)
    completions = torch.ones_like(policy.mask)
    completions[:, :prompt] = False
    loss = losses.orpo_loss(policy, beta=beta, completion_mask=completions if prompt else None)

    def hand(q):
        rows = by_hand.rows(q)
        odds = [t[at >= prompt] for t, at in zip(rows["log_probs"], rows["at"])]
        return by_hand.orpo(rows["log_probs"], odds, beta)

    check(p, loss, hand)


KTO = {
    "default": dict(kl=0.4),
    "kl_tensor": dict(kl=torch.tensor(0.3)),
    "kl_below_0": dict(kl=-0.4),
    "kl_tensor_below_0": dict(kl=torch.tensor([-0.4])),
    "weights": dict(kl=0.1, desirable_weight=1.5, undesirable_weight=0.7, beta=0.5),
    "apo": dict(loss_type="apo_zero_unpaired", undesirable_weight=0.3),
}


@both_dtypes
@cases(KTO)
def test_kto(options, head, dtype):
    p = problem(dtype, head, sequences=5)
    r = reference_of(p, head)
    desirable = [True, False, False, True, True]
    with torch.no_grad():
        reference = log_probs(r)
    policy = log_probs(p)
    loss = losses.kto_loss(policy, reference, torch.tensor(desirable).to(p.e.device), **options)

    def hand(q):
        ref = [t.detach() for t in by_hand.rows(r.to(q.e.dtype))["log_probs"]]
        return by_hand.kto(by_hand.rows(q)["log_probs"], ref, desirable, **options)

    check(p, loss, hand)
    kl = losses.kto_kl(policy, reference.sum())
    ours, theirs = (by_hand.rows(q)["log_probs"] for q in (p, r))
    expected = sum(a.sum() - b.sum() for a, b in zip(ours, theirs)) / 5
    torch.testing.assert_close(kl, expected.detach(), rtol=1e-4, atol=1e-5)


# What they are made of ------------------------------------------------------------------------


@both_dtypes
@pytest.mark.parametrize("head", HEADS, ids=without_address)
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

"""The preference and policy losses of cutloss.compat.liger, against stored logits by their
definitions, and against liger-kernel 0.8.5 where that is installed."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from helpers import losses_by_hand as by_hand
from helpers import problems
from helpers.liger_problems import (
    ALL,
    OF_GRPO,
    OF_KTO,
    OF_PAIRS,
    THEIRS,
    B,
    ids,
    logits,
    make,
    of_grpo,
    of_kto,
    of_pairs,
    pairs,
)

from cutloss.compat import liger

pytestmark = pytest.mark.usefixtures("device")


def described(f):
    parameters = inspect.signature(f).parameters.values()
    return [(p.name, p.default) for p in parameters if p.name != "self"]


@pytest.mark.parametrize("name", THEIRS)
def test_signatures_are_theirs(name):
    options, call = THEIRS[name]
    assert described(getattr(liger, name)) == list(options.items())
    assert described(getattr(liger, name).forward) == call


@pytest.mark.parametrize("name", THEIRS)
def test_these_are_theirs(name):
    theirs = pytest.importorskip("liger_kernel.chunked_loss")
    assert described(getattr(liger, name)) == described(getattr(theirs, name))
    assert described(getattr(liger, name).forward) == described(getattr(theirs, name).forward)


# By their definitions ---------------------------------------------------------------------------


def log_probs(p, given, average):
    """Of each sequence's tokens that count, under the policy and under the reference, each divided
    by their number where sums are to be means."""
    found = []
    for e, c, bias in (
        (p.e, p.c, p.bias),
        tuple(given.get(n) for n in ("ref_input", "ref_weight", "ref_bias")),
    ):
        if e is None:
            found.append([torch.zeros(1, dtype=p.e.dtype, device=p.e.device)] * len(p.targets))
            continue
        rows = by_hand.rows(problems.Problem(e, c, p.targets, bias, {}))["log_probs"]
        found.append([t / len(t) if average else t for t in rows])
    return found


def stacked(rows):
    return torch.stack([t.sum() for t in rows])


def assert_same(p, got, want):
    """Numbers, and gradients for a gradient of the loss that is not 1."""
    (loss, beside), (expected, beside_it) = got, want
    torch.testing.assert_close(loss, expected.to(loss.dtype))
    assert not any(t.requires_grad for t in beside)
    for i, (a, b) in enumerate(zip(beside, beside_it, strict=True)):
        torch.testing.assert_close(a, b.detach().to(a.dtype), msg=lambda m: f"output {i}: {m}")
    for a, b in zip(*(torch.autograd.grad(2.5 * t, p.parameters) for t in (loss, expected))):
        torch.testing.assert_close(a, b)


# Pairs ------------------------------------------------------------------------------------------


def beside_pairs(p, rows, ref, beta, nll):
    now, then = stacked(rows), stacked(ref)
    z, rewards = logits(p), beta * (now - then)
    return [now[:B], now[B:], z[:B].mean(), z[B:].mean(), nll, rewards[:B], rewards[B:]]


def pairs_by_hand(name, p, given, options):
    o = dict(THEIRS[name][0], **options)
    average = o.get("average_log_prob", name.endswith(("SimPOLoss", "ORPOLoss")))
    (rows, ref), (tokens, _) = log_probs(p, given, average), log_probs(p, given, False)
    nll_tokens = tokens[:B]
    if "nll_target" in given:
        chosen = problems.Problem(p.e[:B], p.c, given["nll_target"][:B], p.bias, {})
        nll_tokens = by_hand.rows(chosen)["log_probs"]
    nll = -torch.cat(nll_tokens).mean() if o["compute_nll_loss"] else p.e.new_zeros(())
    more = []
    if name.endswith("DPOLoss"):
        known = ("loss_type", "beta", "label_smoothing", "discopop_tau")
        loss = by_hand.dpo(rows, ref, None, **{k: o[k] for k in known})
    elif name.endswith("ORPOLoss"):
        loss = by_hand.orpo(tokens, tokens, o["beta"]) + torch.cat(tokens[:B]).mean()
        p_ = [t.mean().exp() for t in tokens]
        odds = torch.stack([torch.log(q / (1 - q)) for q in p_])
        more = [F.logsigmoid(odds[:B] - odds[B:]).mean(), (odds[:B] - odds[B:]).mean()]
    else:
        kind = "simpo" if name.endswith("SimPOLoss") else "sigmoid"
        loss = by_hand.cpo(
            tokens if kind == "simpo" else rows, kind, o["beta"], o["label_smoothing"], 0.0,
            o.get("gamma", 0.5),
        )  # fmt: skip
    beside = beside_pairs(p, rows, ref, o["beta"], nll)
    return loss + o.get("alpha", 1.0) * nll, [*beside, *more]


@pytest.mark.parametrize("kind, options", OF_PAIRS, ids=ids(OF_PAIRS))
def test_pairs_by_their_definitions(kind, options):
    p, given, options = of_pairs(kind, options)
    name = f"LigerFusedLinear{kind}Loss"
    got = getattr(liger, name)(**options)(**given)
    assert_same(p, got, pairs_by_hand(name, p, given, options))


def test_pairs_without_tokens_are_finite():
    """Where theirs are NaN."""
    p, given = pairs()
    p.targets[B - 1], p.targets[0] = -100, -100
    for kind in ("CPO", "SimPO", "ORPO"):
        loss, beside = getattr(liger, f"LigerFusedLinear{kind}Loss")()(**given)
        assert loss.isfinite() and all(t.isfinite().all() for t in beside)
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, p.parameters))


def test_autocast_and_bf16():
    """Loss and numbers are fp32, and the mean logits have its digits."""
    p, given = pairs(problems.F32)
    want = liger.LigerFusedLinearCPOLoss()(**given)
    with torch.autocast(problems.device, problems.BF16):
        got = liger.LigerFusedLinearCPOLoss()(**given)
    half = {n: t if t.dtype == torch.int64 else t.to(problems.BF16) for n, t in given.items()}
    for loss, beside in (got, liger.LigerFusedLinearCPOLoss()(**half)):
        assert {t.dtype for t in (loss, *beside)} == {problems.F32}
        torch.testing.assert_close(loss, want[0], rtol=2e-2, atol=0)
    for a, b in zip(got[1][2:4], want[1][2:4]):
        torch.testing.assert_close(a, b)


# KTO --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, options", OF_KTO, ids=ids(OF_KTO))
def test_kto_by_its_definition(kind, options):
    p, given, options = of_kto(options)
    got = liger.LigerFusedLinearKTOLoss(**options)(**given)
    beta, kl = options.get("beta", 0.1), given.get("kl", 0.0)
    rows, ref = log_probs(p, given, options.get("average_log_prob", False))
    u, liked = stacked(rows) - stacked(ref), given["preference_labels"]
    sign = torch.where(liked, 1, -1)
    loss = (1 - torch.sigmoid(beta * (u - kl) * sign)).mean()
    of_all = stacked(rows), logits(p).sum((1, 2)), beta * u
    beside = [t[which].sum() for t in of_all for which in (liked, ~liked)]
    assert_same(p, got, (loss, beside))


# GRPO -------------------------------------------------------------------------------------------


def grpo_by_hand(p, given, options):
    o = dict(THEIRS["LigerFusedLinearGRPOLoss"][0], **options)
    mask, ids = given["attention_mask"] > 0, given["selected_token_ids"]

    def of(e, c, bias):
        z = by_hand.logits(e, c, bias) / o["temperature"]
        return F.log_softmax(z, -1).gather(-1, ids[..., None])[..., 0]

    def rows(t):
        return None if t is None else [t[i, mask[i]] for i in range(2 * B)]

    now = of(p.e, p.c, p.bias)
    old = given.get("old_per_token_logps", now.detach())
    ref = given.get("ref_per_token_logps")
    if "ref_input" in given:
        ref = of(given["ref_input"], given["ref_weight"], given["ref_bias"])
    advantages, ratio = given["advantages"][:, None].expand(mask.shape), given.get("vllm_is_ratio")
    sampling = None if ratio is None else old - ratio.log().expand(mask.shape)
    high = o["epsilon_high"]
    loss = by_hand.policy(
        rows(now), rows(torch.zeros_like(now)), rows(advantages), rows(old), rows(ref),
        rows(sampling), o["loss_type"], o["importance_sampling_level"], o["epsilon_low"], high,
        o["delta"], o["beta"], o["use_bias_correction_kl"], "token_truncate", None, None,
        num_items_in_batch=given.get("num_items_in_batch"),
        max_completion_length=o["max_completion_length"],
    )  # fmt: skip

    difference = now - old
    if o["importance_sampling_level"] == "sequence":
        means = (difference * mask).sum(-1) / mask.sum(-1).clamp(min=1)
        difference = means[:, None].expand(mask.shape)
    r = difference.exp()
    most = high if o["loss_type"] == "cispo" else 1 + high
    clipped = (r > most) & (advantages > 0)
    if o["loss_type"] != "cispo":
        clipped = clipped | ((r < 1 - o["epsilon_low"]) & (advantages < 0))
    if o["loss_type"] in ("sapo", "vespo"):
        clipped = torch.zeros_like(clipped)
    beside = [(clipped & mask).sum() / mask.sum()]
    if o["beta"]:
        kl = (ref - now).exp() - (ref - now) - 1
        kl = kl * r if o["use_bias_correction_kl"] else kl
        beside = [(kl * mask).sum() / mask.sum(), *beside]
    return loss, beside


@pytest.mark.parametrize("kind, options", OF_GRPO, ids=ids(OF_GRPO))
def test_grpo_by_its_definition(kind, options):
    p, given, options = of_grpo(options)
    got = liger.LigerFusedLinearGRPOLoss(**options)(**given)
    assert_same(p, got, grpo_by_hand(p, given, options))


# Against theirs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, options", ALL, ids=ids(ALL))
def test_as_theirs(kind, options):
    """Their sums are fp32 whatever the inputs are."""
    theirs = pytest.importorskip("liger_kernel.chunked_loss")
    name, results = f"LigerFusedLinear{kind}Loss", []
    for module, more in ((liger, {}), (theirs, dict(compiled=False))):
        p, given, chosen = make(kind, options, problems.F32)
        loss, beside = getattr(module, name)(**chosen, **more)(**given)
        results.append((loss, *beside, *torch.autograd.grad(2.5 * loss, p.parameters)))
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        scale = max(1.0, b.abs().max().item())
        torch.testing.assert_close(a, b, rtol=2e-5, atol=5e-6 * scale, msg=f"output {i}: {a} {b}")

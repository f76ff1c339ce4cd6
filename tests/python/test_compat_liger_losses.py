"""The preference and policy losses of cutloss.compat.liger, against stored logits by their
definitions, and against liger-kernel 0.8.5 where that is installed."""

import inspect

import losses_by_hand as by_hand
import problems
import pytest
import torch
import torch.nn.functional as F

from cutloss.compat import liger

pytestmark = pytest.mark.usefixtures("device")

B, L, D, V = 3, 7, 16, 53
REQUIRED = inspect.Parameter.empty
PAIRS = [("lin_weight", REQUIRED), ("_input", REQUIRED), ("target", REQUIRED), ("bias", None)]
SEQUENCES = [("_input", REQUIRED), ("lin_weight", REQUIRED)]
REFERENCE = [("ref_input", None), ("ref_weight", None), ("ref_bias", None)]
SHARED = dict(ignore_index=-100, beta=0.1)
COMPILED = dict(compiled=True)

# Of liger-kernel 0.8.5: options, and what forward takes.
THEIRS = {
    "LigerFusedLinearDPOLoss": (
        dict(
            **SHARED, alpha=1.0, compute_nll_loss=False, **COMPILED, use_ref_model=True,
            average_log_prob=False, chunk_size=1, loss_type="sigmoid", label_smoothing=0.0,
            discopop_tau=0.05,
        ),
        [*PAIRS, *REFERENCE],
    ),
    "LigerFusedLinearCPOLoss": (
        dict(
            **SHARED, alpha=1.0, label_smoothing=0.0, compute_nll_loss=True, **COMPILED,
            average_log_prob=False, chunk_size=1,
        ),
        PAIRS,
    ),
    "LigerFusedLinearSimPOLoss": (
        dict(
            **SHARED, alpha=1.0, label_smoothing=0.0, compute_nll_loss=True, **COMPILED, gamma=0.5,
            chunk_size=1,
        ),
        PAIRS,
    ),
    "LigerFusedLinearORPOLoss": (
        dict(**SHARED, compute_nll_loss=True, **COMPILED, chunk_size=1),
        [*PAIRS, ("nll_target", None)],
    ),
    "LigerFusedLinearKTOLoss": (
        dict(**SHARED, **COMPILED, use_ref_model=False, average_log_prob=False, chunk_size=1),
        [
            *SEQUENCES, ("target", REQUIRED), ("bias", None), ("preference_labels", None),
            *REFERENCE, ("kl", None),
        ],
    ),
    "LigerFusedLinearGRPOLoss": (
        dict(
            beta=0.04, **COMPILED, use_ref_model=True, chunk_size=1, epsilon_low=0.2,
            epsilon_high=0.2, loss_type="dapo", max_completion_length=None,
            importance_sampling_level="token", sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
            temperature=1.0, delta=None, use_bias_correction_kl=False, vespo_k_pos=2.0,
            vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0,
        ),
        [
            *SEQUENCES, ("selected_token_ids", REQUIRED), ("attention_mask", REQUIRED),
            ("advantages", REQUIRED), ("bias", None), ("ref_per_token_logps", None),
            ("old_per_token_logps", None), *REFERENCE, ("vllm_is_ratio", None),
            ("num_items_in_batch", None),
        ],
    ),
}  # fmt: skip


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


# Problems ---------------------------------------------------------------------------------------


def pairs(dtype=None, bias=True):
    """Each of the 2 B sequences has a token that counts, as theirs needs."""
    p = problems.make((2 * B, L), V, D, dtype or problems.widest(), bias=bias, ignored=0.3)
    p.targets[:, 0].clamp_(min=0)
    given = dict(lin_weight=p.c, _input=p.e, target=p.targets)
    return p, given | (dict(bias=p.bias) if bias else {})


def reference(p):
    other = problems.make((2 * B, L), V, 8, p.e.dtype, bias=True, seed=1)
    tensors = (t.detach() for t in other.parameters)
    return dict(zip(("ref_input", "ref_weight", "ref_bias"), tensors))


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


def logits(p):
    return by_hand.logits(p.e, p.c, p.bias)


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


SMOOTHED = {"exo_pair": 0.1, "robust": 0.2}
OF_PAIRS = [
    *(
        ("DPO", dict(loss_type=t, beta=0.3, label_smoothing=SMOOTHED.get(t, 0.0)))
        for t in (
            "sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard",
            "apo_zero", "apo_down", "discopop",
        )
    ),
    ("DPO", dict(compute_nll_loss=True, alpha=0.7, average_log_prob=True)),
    ("DPO", dict(use_ref_model=False)),
    ("CPO", {}),
    ("CPO", dict(label_smoothing=0.1, average_log_prob=True, alpha=2.0, beta=0.5)),
    ("CPO", dict(compute_nll_loss=False)),
    ("SimPO", {}),
    ("SimPO", dict(gamma=1.0, beta=2.0, label_smoothing=0.1, compute_nll_loss=False)),
    ("ORPO", {}),
    ("ORPO", dict(beta=0.4, compute_nll_loss=False)),
    ("ORPO", dict(beta=0.4, nll_target=True)),
]  # fmt: skip


def of_pairs(kind, options, dtype=None):
    p, given = pairs(dtype, bias=kind != "CPO" or bool(options))
    options = dict(options)
    if options.pop("nll_target", False):
        given["nll_target"] = torch.where(p.targets == -100, 3, p.targets)
    if kind == "DPO" and options.get("use_ref_model", True):
        given |= reference(p)
    return p, given, options


def ids(cases):
    return ["-".join([kind, *map(str, options.values())]) for kind, options in cases]


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


# KTO --------------------------------------------------------------------------------------------

OF_KTO = [
    ("KTO", dict(use_ref_model=True)),
    ("KTO", dict(use_ref_model=True, kl=0.5)),
    ("KTO", dict(use_ref_model=True, kl=-0.3)),
    ("KTO", dict(average_log_prob=True, beta=0.5)),
]


def of_kto(options, dtype=None):
    p, given = pairs(dtype)
    options = dict(options)
    liked = torch.tensor([True, False, False, True, True, False], device=p.e.device)
    given["preference_labels"] = liked
    if "kl" in options:
        given["kl"] = torch.tensor(options.pop("kl"), device=p.e.device)
    if options.get("use_ref_model"):
        given |= reference(p)
    return p, given, options


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

NO_KL = dict(beta=0.0, use_ref_model=False)
OF_SEQUENCES = dict(importance_sampling_level="sequence")
OF_GRPO = [
    ("GRPO", {}),
    ("GRPO", dict(loss_type="grpo", temperature=1.3, use_bias_correction_kl=True)),
    ("GRPO", dict(loss_type="grpo", **OF_SEQUENCES, delta=1.5, epsilon_low=0.1)),
    ("GRPO", dict(loss_type="bnpo", epsilon_high=0.3, old=False)),
    ("GRPO", dict(loss_type="dr_grpo", max_completion_length=20, ratio="tokens")),
    ("GRPO", dict(loss_type="dapo", max_completion_length=20, items=57, hidden_reference=True)),
    ("GRPO", dict(loss_type="cispo", epsilon_high=1.1, ratio="sequences")),
    ("GRPO", dict(loss_type="sapo", **NO_KL, ratio="tokens")),
    ("GRPO", dict(loss_type="vespo", ratio="tokens")),
    ("GRPO", dict(loss_type="luspo", **OF_SEQUENCES, **NO_KL, ratio="sequences")),
]


def of_grpo(options, dtype=None):
    """Every ratio is off the policy; one sequence has no token."""
    p, given = pairs(dtype)
    options = dict(options)
    generator = torch.Generator().manual_seed(2)

    def noise(*shape):
        made = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return made.to(p.e.device, p.e.dtype)

    mask = (p.targets != -100).long()
    mask[2] = 0
    ids = torch.where(p.targets == -100, 5, p.targets)
    z = logits(p).detach() / options.get("temperature", 1.0)
    now = F.log_softmax(z, -1).gather(-1, ids[..., None])[..., 0]
    made = dict(
        _input=p.e, lin_weight=p.c, bias=p.bias, selected_token_ids=ids, attention_mask=mask,
        advantages=noise(2 * B),
    )  # fmt: skip
    if options.pop("old", True):
        made["old_per_token_logps"] = now + 0.3 * noise(2 * B, L)
    if options.pop("hidden_reference", False):
        made |= reference(p)
    elif options.get("beta") != 0:
        made["ref_per_token_logps"] = now + 0.3 * noise(2 * B, L)
    how = options.pop("ratio", None)
    if how:
        ratio = (0.3 * noise(2 * B, L if how == "tokens" else 1)).exp()
        ratio = torch.where(mask[:, : ratio.shape[1]] > 0, ratio, 1.0)
        ratio[3] = 1.0 if options["loss_type"] == "vespo" else 0.0  # as a sampler's mask has it
        made["vllm_is_ratio"] = ratio
    if "items" in options:
        made["num_items_in_batch"] = options.pop("items")
    return p, made, options


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


def test_what_is_masked_is_never_read():
    p, given, options = of_grpo({})
    module = liger.LigerFusedLinearGRPOLoss()
    want = module(**given)
    beyond = given["attention_mask"] == 0
    for name, junk in (
        ("selected_token_ids", 10**6), ("old_per_token_logps", torch.nan),
        ("ref_per_token_logps", torch.inf),
    ):  # fmt: skip
        given[name] = given[name].masked_fill(beyond, junk)
    got = module(**given)
    for a, b in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
        assert torch.equal(a, b)


def test_what_is_no_ratio_of_the_sampler_is_nan():
    """As with theirs; cutloss's own sampling_log_probs mean by NaN that there is no correction."""
    for value in (torch.nan, -1.0):
        p, given, options = of_grpo(dict(loss_type="grpo", ratio="tokens", **NO_KL))
        given["attention_mask"][0, 0] = 1
        given["vllm_is_ratio"][0, 0] = value
        assert liger.LigerFusedLinearGRPOLoss(**options)(**given)[0].isnan()


# Against theirs ---------------------------------------------------------------------------------

MAKERS = {"KTO": of_kto, "GRPO": of_grpo}
ALL = [*OF_PAIRS, *OF_KTO, *OF_GRPO]


@pytest.mark.parametrize("kind, options", ALL, ids=ids(ALL))
def test_as_theirs(kind, options):
    """Their sums are fp32 whatever the inputs are."""
    theirs = pytest.importorskip("liger_kernel.chunked_loss")
    name, results = f"LigerFusedLinear{kind}Loss", []
    for module, more in ((liger, {}), (theirs, dict(compiled=False))):
        if kind in MAKERS:
            p, given, chosen = MAKERS[kind](options, problems.F32)
        else:
            p, given, chosen = of_pairs(kind, options, problems.F32)
        loss, beside = getattr(module, name)(**chosen, **more)(**given)
        results.append((loss, *beside, *torch.autograd.grad(2.5 * loss, p.parameters)))
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        scale = max(1.0, b.abs().max().item())
        torch.testing.assert_close(a, b, rtol=2e-5, atol=5e-6 * scale, msg=f"output {i}: {a} {b}")


# What is refused --------------------------------------------------------------------------------


def call(kind, options=None, drop=(), **more):
    def made():
        if kind in MAKERS:
            start = OF_KTO[0][1] if kind == "KTO" else {}
            _, given, chosen = MAKERS[kind]({**start, **(options or {})})
        else:
            _, given, chosen = of_pairs(kind, options or {})
        given = {n: t for n, t in given.items() if n not in drop}
        given |= {n: t(given) if callable(t) else t for n, t in more.items()}
        return getattr(liger, f"LigerFusedLinear{kind}Loss")(**chosen)(**given)

    return made


def swap(given):
    return given["lin_weight"]


REFUSALS = {
    "swapped": (
        call("CPO", lin_weight=lambda g: g["_input"], _input=swap),
        ValueError,
        r"_input and lin_weight are swapped: the order here is \(lin_weight, _input, target\)",
    ),
    "target": (
        call("DPO", target=lambda g: g["target"][:, 1:]),
        ValueError,
        r"and target \(6, 6\)$",
    ),
    "odd": (
        call("CPO", _input=lambda g: g["_input"][1:], target=lambda g: g["target"][1:]),
        ValueError,
        "got 5 sequences, an odd number",
    ),
    "ipo": (call("DPO", dict(loss_type="ipo")), ValueError, r"got 'ipo'; .*linear_loss\('dpo'"),
    "smoothing": (
        call("DPO", dict(label_smoothing=0.1)),
        ValueError,
        "'sigmoid' takes no label_smoothing, got 0.1",
    ),
    "no_reference": (call("DPO", drop=("ref_weight",)), ValueError, "and ref_weight is None"),
    "unused_reference": (
        call("DPO", dict(use_ref_model=False), ref_weight=swap),
        ValueError,
        "use_ref_model is False, so",
    ),
    "beta": (call("SimPO", dict(beta=0.0)), ValueError, "beta must be finite and > 0, got 0.0"),
    "unused_nll_target": (
        call("ORPO", dict(compute_nll_loss=False), nll_target=lambda g: g["target"]),
        ValueError,
        "compute_nll_loss is False, so nll_target",
    ),
    "nll_target": (
        call("ORPO", nll_target=lambda g: g["target"][:B]),
        ValueError,
        r"got nll_target \(3, 7\) and target \(6, 7\)",
    ),
    "labels": (call("KTO", drop=("preference_labels",)), ValueError, "preference_labels is None"),
    "labels_of_ints": (
        call("KTO", preference_labels=lambda g: g["preference_labels"].long()),
        TypeError,
        r"pass preference_labels.bool\(\)",
    ),
    "kl": (
        call("KTO", kl=torch.zeros(6)),
        ValueError,
        r"kl must be one number, got a tensor of shape \(6,\).*pass kl.mean\(\)",
    ),
    "kl_of_itself": (
        call("GRPO", dict(use_ref_model=False)),
        ValueError,
        "beta is 0.04 and use_ref_model False.*pass beta=0.0",
    ),
    "grpo_reference": (
        call("GRPO", drop=("ref_per_token_logps",)),
        ValueError,
        "beta is 0.04, and the KL term needs a reference",
    ),
    "grpo_unused_reference": (
        call("GRPO", NO_KL, ref_input=lambda g: g["_input"]),
        ValueError,
        "beta is 0, so the reference would not be used",
    ),
    "luspo": (
        call("GRPO", dict(loss_type="luspo", **NO_KL)),
        NotImplementedError,
        r"adds up padding .* got 'token' and 0.0.*linear_loss\('policy'",
    ),
    "luspo_ratio": (
        call("GRPO", dict(loss_type="luspo", **OF_SEQUENCES, **NO_KL, ratio="tokens")),
        NotImplementedError,
        r"got vllm_is_ratio of shape \(6, 7\): pass one of each sequence",
    ),
    "vespo_ratio": (
        call("GRPO", dict(loss_type="vespo", ratio="sequences")),
        NotImplementedError,
        r"takes the ratio of each token, .*got vllm_is_ratio of shape \(6, 1\)",
    ),
    "ratio_without_old": (
        call("GRPO", dict(ratio="tokens", loss_type="grpo", old=False)),
        ValueError,
        "vllm_is_ratio needs old_per_token_logps, got None",
    ),
    "mask": (
        call("GRPO", attention_mask=lambda g: 0.5 * g["attention_mask"]),
        ValueError,
        "attention_mask must be zeros and ones, got 0.5",
    ),
    "mask_shape": (
        call("GRPO", attention_mask=lambda g: g["attention_mask"][:, 1:]),
        ValueError,
        r"got attention_mask \(6, 6\) and selected_token_ids \(6, 7\)",
    ),
    "advantages": (
        call("GRPO", advantages=lambda g: g["advantages"][1:]),
        ValueError,
        r"advantages must be \(B\), \(B, 1\) or \(B, L\): got advantages \(5,\)",
    ),
    "items": (
        call("GRPO", dict(loss_type="grpo", items=9)),
        ValueError,
        "'grpo' does not divide by num_items_in_batch, got 9",
    ),
    "epsilon": (
        call("GRPO", dict(loss_type="sapo", epsilon_high=0.3, **NO_KL)),
        ValueError,
        "clips no ratio and takes neither epsilon nor epsilon_high, got 0.2 and 0.3",
    ),
    "ignored_id": (
        call("GRPO", selected_token_ids=lambda g: torch.full_like(g["selected_token_ids"], -100)),
        ValueError,
        r"is 53, outside \[0, V = 53\)",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    made, error, message = REFUSALS[name]
    if problems.device == "cuda" and name in ("mask", "ignored_id"):
        assert made()[0].isnan()  # looking would wait
        return
    with pytest.raises(error, match=message):
        made()


def test_one_of_two_references_is_used_and_it_says_so():
    p, given, _ = of_grpo({})
    want = liger.LigerFusedLinearGRPOLoss()(**given)[0]
    with pytest.warns(UserWarning, match="ref_per_token_logps are used"):
        got = liger.LigerFusedLinearGRPOLoss()(**given, **reference(p))[0]
    assert torch.equal(got, want)


@pytest.mark.parametrize("items", [None, 57])
def test_tokens_are_those_of_all_processes(items, monkeypatch):
    """Two processes, of which the other has ten tokens."""
    _, given, _ = of_grpo({})
    here = given["attention_mask"].sum()
    alone = liger.LigerFusedLinearGRPOLoss()(**given, num_items_in_batch=items)[0]
    dist = torch.distributed
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda t: t.add_(10))
    got = liger.LigerFusedLinearGRPOLoss()(**given, num_items_in_batch=items)[0]
    factor = 2.0 if items else 2 * here / (here + 10)
    torch.testing.assert_close(got, alone * factor)

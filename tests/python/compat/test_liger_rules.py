"""What the preference and policy losses of cutloss.compat.liger refuse, and what they never read."""

import pytest
import torch
from helpers import problems
from helpers.liger_problems import NO_KL, OF_KTO, OF_SEQUENCES, B, make, of_grpo, reference

from cutloss.compat import liger

pytestmark = pytest.mark.usefixtures("device")


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


def call(kind, options=None, drop=(), **more):
    def made():
        start = OF_KTO[0][1] if kind == "KTO" else {}
        _, given, chosen = make(kind, {**start, **(options or {})})
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

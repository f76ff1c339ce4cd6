"""Problems for liger-kernel's preference and policy losses: what their modules are made with, and
called with. `kind` is the name between LigerFusedLinear and Loss."""

import inspect

import torch
import torch.nn.functional as F
from helpers import losses_by_hand as by_hand
from helpers import problems

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


def logits(p):
    return by_hand.logits(p.e, p.c, p.bias)


# Pairs ------------------------------------------------------------------------------------------

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


# All --------------------------------------------------------------------------------------------

MAKERS = {"KTO": of_kto, "GRPO": of_grpo}
ALL = [*OF_PAIRS, *OF_KTO, *OF_GRPO]


def make(kind, options, dtype=None):
    """A Problem, what the module is called with, and its options."""
    if kind in MAKERS:
        return MAKERS[kind](options, dtype)
    return of_pairs(kind, options, dtype)

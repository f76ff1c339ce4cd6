"""What cutloss.losses promises beside its formulas: where gradients go, what nothing makes, what is
refused, and that results repeat."""

import pytest
import torch
from helpers import problems
from helpers.problems import BF16, F32, F64
from helpers.sequence_losses import CALLS, TYPES, log_probs, problem

from cutloss import losses

pytestmark = pytest.mark.usefixtures("device")

NAMES = [(name, kind) for name in CALLS for kind in TYPES.get(name, [None])]


def options_of(name, kind, p, r=None):
    """Of linear_loss, with r as the reference model."""
    options = {k: torch.tensor(v).to(p.e.device) if isinstance(v, list) else v
               for k, v in CALLS[name].items()}  # fmt: skip
    if kind is not None:
        options["loss_type"] = kind
    if kind == "dr_grpo":
        options["max_completion_length"] = 16
    if options.pop("reference", False):
        q = r or problem(p.e.dtype, {}, seed=1)
        options["reference"] = (q.e, q.c) if q.bias is None else (q.e, q.c, q.bias)
    return options


def call(name, kind, p, r=None, **more):
    options = options_of(name, kind, p, r)
    return losses.linear_loss(name, p.e, p.c, p.targets, p.bias, **p.options, **(options | more))


def of_parts(name, kind, p, r):
    """The same, of token_log_probs and the loss by its name."""
    policy = log_probs(p, return_entropy=True)
    with torch.no_grad():
        reference = losses.token_log_probs(r.e, r.c, p.targets, r.bias, **p.options)
    options = {k: v for k, v in CALLS[name].items() if k != "reference"}
    options = {k: torch.tensor(v).to(p.e.device) if isinstance(v, list) else v
               for k, v in options.items()}  # fmt: skip
    if kind is not None:
        options["loss_type"] = kind
    if kind == "dr_grpo":
        options["max_completion_length"] = 16
    if CALLS[name].get("reference"):
        options["reference"] = reference
    return losses.LOSSES[name](policy, **options)


@pytest.mark.parametrize("name, kind", NAMES)
def test_one_call_is_its_parts(name, kind):
    head = dict(bias=True, shift=1, softcap=5.0, temperature=0.8, logit_scale=0.9)
    p, r = problem(F32, head), problem(F32, head, seed=1)
    whole, parts = call(name, kind, p, r), of_parts(name, kind, p, r)
    torch.testing.assert_close(whole.loss, parts.loss)
    assert whole.metrics.keys() <= parts.metrics.keys()
    for a, b in zip(torch.autograd.grad(whole.loss, p.parameters),
                    torch.autograd.grad(parts.loss, p.parameters)):  # fmt: skip
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name, kind", NAMES)
def test_the_reference_gets_no_gradient(name, kind):
    p, r = problem(F32, {}), problem(F32, {}, seed=1)
    call(name, kind, p, r).loss.backward()
    assert p.e.grad is not None and p.e.grad.isfinite().all() and p.c.grad.isfinite().all()
    assert r.e.grad is None and r.c.grad is None


@pytest.mark.parametrize("name, kind", NAMES)
def test_bits_repeat(name, kind):
    def once():
        p = problem(F32, {})
        loss = call(name, kind, p)
        return [loss.loss, *torch.autograd.grad(loss.loss, p.parameters), *loss.metrics.values()]

    for a, b in zip(once(), once()):
        assert torch.equal(a, b)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name, kind", NAMES)
def test_nothing_waits_for_the_device(name, kind, device, monkeypatch):
    if device != "cuda":
        pytest.skip("on the CPU there is nothing to wait for")
    monkeypatch.delenv("CUTLOSS_CHECK", raising=False)
    p = problem(F32, {})
    options = options_of(name, kind, p)
    for mode in ("default", "error"):  # first calls set up what they need
        torch.cuda.set_sync_debug_mode(mode)
        try:
            loss = losses.linear_loss(name, p.e, p.c, p.targets, p.bias, **p.options, **options)
            loss.loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name, kind", NAMES)
def test_no_token_at_all(name, kind):
    p = problem(F32, {})
    p.targets[:] = -100
    loss = call(name, kind, p)
    assert loss.loss.isfinite() and all(m.isfinite() for m in loss.metrics.values())
    for g in torch.autograd.grad(loss.loss, p.parameters):
        assert (g == 0).all()
    if name == "policy":
        assert loss.loss == 0


@pytest.mark.parametrize("name, kind", NAMES)
def test_no_sequence(name, kind):
    p = problems.make((0, 5), 61, 12)
    few = {k: torch.zeros(0, dtype=torch.tensor(v).dtype, device=p.e.device)
           for k, v in CALLS[name].items() if isinstance(v, list)}  # fmt: skip
    loss = call(name, kind, p, p, **few)
    assert loss.loss == 0 and all(m.isfinite() for m in loss.metrics.values())


@pytest.mark.parametrize("name, kind", NAMES)
def test_sequences_without_tokens_change_nothing_of_others(name, kind):
    """Gradients are finite, and zero at tokens that do not count."""
    p = problem(F32, {})
    p.targets[:2] = -100
    (de,) = torch.autograd.grad(call(name, kind, p).loss, (p.e,))
    assert de.isfinite().all() and (de[p.targets == -100] == 0).all()


def test_what_stands_at_masked_tokens_does_not_matter():
    p = problem(F64 if problems.has_engine(F64) else F32, {})
    policy = log_probs(p, return_entropy=True)
    clean = [policy.log_probs.detach() + 0.1 * i for i in range(4)]
    advantages = torch.linspace(-1, 1, policy.mask.numel(), device=p.e.device)
    clean.append(advantages.reshape(policy.mask.shape))

    def loss(old, reference, sampling, _, advantages):
        return losses.policy_loss(policy, advantages, old_log_probs=old, reference=reference,
                                  sampling_log_probs=sampling, beta=0.1,
                                  off_policy_mask_threshold=0.1).loss  # fmt: skip

    expected = loss(*clean)
    for junk in (torch.nan, torch.inf, 1e30):
        filled = [t.masked_fill(~policy.mask, junk) for t in clean]
        assert torch.equal(loss(*filled), expected)
        theirs = losses.TokenLogProbs(filled[0], policy.mask, entropy=filled[1])
        assert torch.equal(theirs.sum(), policy.sum().detach()) and theirs.entropy.isfinite().all()


def test_orpo_of_a_certain_sequence():
    """Odds of p = 1 are infinite; loss and gradient are not."""
    p = problem(F32, {})
    with torch.no_grad():
        p.e[0] = 1e4 * p.c[p.targets[0].clamp(min=0)]
    assert log_probs(p).mean()[0] == 0
    loss = losses.orpo_loss(log_probs(p)).loss
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, p.parameters))


def test_discopop_of_a_hopeless_pair():
    """e^1000 times a gate of e^-20000 is nothing."""
    p = problem(F32, {})
    policy = log_probs(p)
    far = policy.log_probs.detach().clone()
    far[:3] += 1e3
    assert losses.dpo_loss(policy, far, loss_type="discopop", beta=1.0).loss.isfinite()


def test_bf16_gives_fp32():
    p = problem(BF16, {})
    loss = call("dpo", "sigmoid", p)
    assert loss.loss.dtype == F32
    assert torch.autograd.grad(loss.loss, (p.e,))[0].dtype == BF16


def test_metrics():
    mask = torch.ones(4, 2, dtype=torch.bool)
    policy = losses.TokenLogProbs(torch.tensor([[-1.0, -2], [-3, -1], [-2, -2], [-1, -1]]), mask)
    loss = losses.dpo_loss(policy, torch.tensor([-4.0, -5, -3, -1]), beta=0.5)
    expected = {
        "rewards/chosen": (0.5 + 0.5) / 2, "rewards/rejected": (-0.5 - 0.5) / 2,
        "rewards/margins": 1.0, "rewards/accuracies": 1.0,
        "logps/chosen": -3.5, "logps/rejected": -3.0,
    }  # fmt: skip
    assert {k: v.item() for k, v in loss.metrics.items()} == pytest.approx(expected)

    old = policy.log_probs - torch.tensor([[0.5, 0.0], [-0.5, 0.0], [0.5, -0.5], [0.0, 0.0]])
    loss = losses.policy_loss(policy, torch.tensor([1.0, -1.0, 1.0, 1.0]), old_log_probs=old)
    expected = {"low_mean": 1 / 8, "high_mean": 2 / 8, "region_mean": 3 / 8}
    for name, value in expected.items():
        assert loss.metrics[f"clip_ratio/{name}"].item() == pytest.approx(value)


# Refusals ---------------------------------------------------------------------------------------

A = torch.zeros(4)
REFUSED = [
    (dict(name="dop"), ValueError, "must be one of 'dpo'.*got 'dop'"),
    (dict(name="dpo"), ValueError, "needs a reference, got None: pass token_log_probs"),
    (dict(name="orpo", reference=A), ValueError, "'orpo' has no reference model"),
    (dict(name="dpo", reference=(A,)), ValueError, r"\(e, c\) or \(e, c, bias\), got 1"),
    (dict(name="dpo", reference=torch.zeros(3)), ValueError, r"reference must be \(B\).*\(3,\)"),
    (dict(name="dpo", reference=torch.zeros(4, 3)), ValueError, r"\(4, 3\) and .*\(4, 5\)"),
    (dict(name="dpo", reference="ref"), TypeError, "reference must be a tensor.*got str"),
    (dict(name="dpo", reference=A.clone().requires_grad_()), ValueError, "reference.detach()"),
    (dict(name="dpo", reference=A, loss_type="dpo"), ValueError, "loss_type must be one of"),
    (dict(name="dpo", reference=A, loss_type=[]), ValueError, "at least one loss"),
    (dict(name="dpo", reference=A, beta=0), ValueError, "beta must be finite and > 0, got 0"),
    (dict(name="dpo", reference=A, beta="a"), TypeError, "beta must be a number, got 'a'"),
    (dict(name="dpo", reference=A, ld_alpha=1.5), ValueError, r"ld_alpha must be in \[0.0, 1.0\]"),
    (dict(name="dpo", reference=A, label_smoothing=0.1), ValueError, "takes no label_smoothing"),
    (dict(name="dpo", reference=A, loss_type="exo_pair"), ValueError, "needs a label_smoothing"),
    (dict(name="dpo", reference=A, loss_type="robust", label_smoothing=0.5), ValueError, "< 0.5"),
    (dict(name="dpo", reference=A, loss_type="aot", f_divergence_type="forward_kl"), ValueError,
     "'aot' takes no f_divergence_type but 'reverse_kl'"),
    (dict(name="dpo", reference=A, loss_type="aot", use_weighting=True), ValueError, "sorts"),
    (dict(name="dpo", reference=A, loss_type=["sigmoid"], loss_weights=[1.0, 2.0]), ValueError,
     "2 weights and 1 loss types"),
    (dict(name="dpo", reference=A, cpo_alpha=1.0), TypeError, "cpo_alpha"),
    (dict(name="cpo", loss_type="hinge", label_smoothing=0.1), ValueError, "takes no label_smooth"),
    (dict(name="cpo", sequences=3), ValueError, "got 3 sequences, an odd number"),
    (dict(name="orpo", completion_mask=torch.ones(4, 5)), TypeError, "completion_mask.bool()"),
    (dict(name="kto", reference=A, desirable=A, kl=0.1), TypeError, "desirable.bool()"),
    (dict(name="kto", reference=A, desirable=A > 0), ValueError, "'kto' needs kl, got None"),
    (dict(name="kto", reference=A, desirable=A > 0, kl=A), ValueError, "kl must be one number"),
    (dict(name="kto", reference=A, desirable=A > 0, kl=0.1, loss_type="apo_zero_unpaired"),
     ValueError, "pass kl=None, got 0.1"),
    (dict(name="policy", advantages=torch.zeros(3)), ValueError, r"advantages must be \(B\)"),
    (dict(name="policy", advantages=1.0), TypeError, "advantages must be a tensor"),
    (dict(name="policy", advantages=A, loss_type="ppo"), ValueError, "must be one of 'grpo'"),
    (dict(name="policy", advantages=A, beta=0.1), ValueError, "needs a reference, got None"),
    (dict(name="policy", advantages=A, loss_type="dr_grpo"), ValueError, "max_completion_length"),
    (dict(name="policy", advantages=A, loss_type="cispo"), ValueError, "needs epsilon_high"),
    (dict(name="policy", advantages=A, loss_type="sapo", delta=1.5), ValueError, "takes no delta"),
    (dict(name="policy", advantages=A, epsilon=-0.1), ValueError, "epsilon must be finite and >="),
    (dict(name="policy", advantages=A, top_entropy_quantile=2.0), ValueError, "top_entropy"),
    (dict(name="policy", advantages=A, sampling_correction="mask"), ValueError, "token_truncate"),
    (dict(name="policy", advantages=A, sampling_clip_min=4.0), ValueError, "got 4.0 and 3.0"),
    (dict(name="policy", advantages=A, loss_type="vespo", sampling_log_probs=torch.zeros(4, 5)),
     ValueError, "'vespo' makes the sequence's weight.*got 'sequence_mask'"),
    (dict(name="policy", advantages=A, num_items_in_batch=A), ValueError, "must be one number"),
]  # fmt: skip


@pytest.mark.parametrize("options, error, message", REFUSED)
def test_refusals(options, error, message):
    options = dict(options)
    p = problems.make((options.pop("sequences", 4), 5), 11, 4)
    moved = {k: v.to(p.e.device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    with pytest.raises(error, match=message):
        losses.linear_loss(moved.pop("name"), p.e, p.c, p.targets, **moved)


def test_refusals_of_log_probs():
    p = problems.make((12,), 11, 4)
    with pytest.raises(ValueError, match=r"log_probs of shape \(B, L\): got \(12,\)"):
        losses.cpo_loss(log_probs(p))
    with pytest.raises(TypeError, match="must be what .*token_log_probs returns.*got Tensor"):
        losses.cpo_loss(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="mask must be bool .* got torch.float32"):
        losses.TokenLogProbs(torch.zeros(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"in the shape of entropy.*\(2, 3\), and entropy \(3,\)"):
        losses.TokenLogProbs(torch.zeros(2, 3), torch.ones(2, 3).bool(), torch.zeros(3))
    policy = losses.TokenLogProbs(torch.zeros(2, 3), torch.ones(2, 3).bool())
    for option in (dict(entropy_coef=0.1), dict(top_entropy_quantile=0.5)):
        with pytest.raises(ValueError, match="needs the policy's entropy, got None"):
            losses.policy_loss(policy, torch.zeros(2), **option)
    with pytest.raises(ValueError, match="return_log_sum_sq_probs=True"):
        losses.dpo_loss(policy, torch.zeros(2), use_weighting=True)


@pytest.mark.parametrize("name", ["dpo", "policy"])
def test_compiles_without_a_break(name):
    p, r = problem(F32, {}), problem(F32, {}, seed=1)

    def run(e, c):
        p.e, p.c = e, c
        return call(name, None, p, r).loss

    e, c = p.e, p.c
    eager = torch.autograd.grad(run(e, c), (e, c))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for a, b in zip(eager, torch.autograd.grad(compiled(e, c), (e, c))):
        torch.testing.assert_close(a, b)

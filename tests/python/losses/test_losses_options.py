"""Options and inputs of cutloss.losses: batches in parts, dtypes, masks, what is refused."""

import pytest
import torch

from cutloss import losses

B, L = 6, 5


def made(seed=0, dtype=torch.float64):
    """TokenLogProbs with entropies, some tokens masked, and one more tensor like them."""
    g = torch.Generator().manual_seed(seed)
    values = [-torch.rand(B, L, generator=g, dtype=torch.float64) for _ in range(3)]
    mask = torch.rand(B, L, generator=g) < 0.7
    return losses.TokenLogProbs(values[0].to(dtype), mask, -values[1].to(dtype)), values[2]


def part(t, rows):
    if isinstance(t, losses.TokenLogProbs):
        return losses.TokenLogProbs(t.log_probs[rows], t.mask[rows], t.entropy[rows])
    return t[rows]


@pytest.mark.parametrize("kind", ["dapo", "cispo", "vespo"])
def test_a_batch_is_the_sum_of_its_parts(kind):
    """With num_items_in_batch, entropy and KL too."""
    policy, other = made()
    policy.log_probs.requires_grad_()
    policy.entropy.requires_grad_()
    options = dict(loss_type=kind, num_items_in_batch=policy.mask.sum(), beta=0.2,
                   entropy_coef=0.3, epsilon_high=5.0 if kind == "cispo" else None)  # fmt: skip
    whole = (policy, torch.linspace(-1, 2, B, dtype=torch.float64))

    def loss(rows):
        now, a = (part(t, rows) for t in whole)
        ref = part(other, rows)
        return losses.policy_loss(now, a, reference=ref, old_log_probs=ref + 0.1, **options).loss

    leaves = (policy.log_probs, policy.entropy)
    together, apart = loss(slice(None)), loss(slice(0, 2)) + loss(slice(2, 3)) + loss(slice(3, 6))
    torch.testing.assert_close(together, apart)
    for x, y in zip(torch.autograd.grad(together, leaves), torch.autograd.grad(apart, leaves)):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_summed_in_fp32(dtype):
    ones = torch.full((2, 400), -1.0, dtype=dtype)
    ones[:, 1:] = -0.01171875  # exact in bf16, and lost next to -4 there
    mask = torch.ones(2, 400, dtype=torch.bool)
    policy = losses.TokenLogProbs(ones, mask, entropy=-ones, log_sum_sq_probs=ones)
    for t in (policy.log_probs, policy.entropy, policy.log_sum_sq_probs, policy.mean()):
        assert t.dtype == torch.float32
    assert policy.sum()[0].item() == pytest.approx(-1 - 399 * 0.01171875)
    assert policy.lengths()[0] == 400
    assert losses.cpo_loss(policy).loss.dtype == torch.float32


def test_a_reference_keeps_its_digits():
    policy = losses.TokenLogProbs(torch.full((2, 1), -1.0), torch.ones(2, 1, dtype=torch.bool))
    reference = torch.tensor([-1.0 - 1e-9, -1.0], dtype=torch.float64)
    margin = losses.dpo_loss(policy, reference).metrics["rewards/margins"].item()
    assert margin == pytest.approx(1e-10, rel=1e-3)


@pytest.mark.parametrize("kind", losses.POLICY)
@pytest.mark.parametrize("name", ["reference", "old_log_probs"])
def test_a_token_that_the_others_do_not_know(kind, name, monkeypatch):
    """An error where one may look, NaN where not; never a probability of 1."""
    policy, other = made()
    mask = policy.mask.clone()
    mask[2, policy.mask[2].nonzero()[0]] = False
    needed = {"cispo": dict(epsilon_high=5.0), "dr_grpo": dict(max_completion_length=9)}
    options = dict(loss_type=kind, beta=0.1, reference=other, off_policy_mask_threshold=1e-3,
                   **needed.get(kind, {})) | {name: losses.TokenLogProbs(other, mask)}  # fmt: skip
    advantages = -torch.ones(B, dtype=torch.float64)
    count = policy.mask.sum().item()
    with pytest.raises(ValueError, match=f"{name} must know every token.* 1 of the .* {count} are"):
        losses.policy_loss(policy, advantages, **options)
    monkeypatch.setattr("cutloss.losses._arguments.may_look", lambda device: False)
    assert losses.policy_loss(policy, advantages, **options).loss.isnan()
    sampled = dict(loss_type="dapo", sampling_log_probs=losses.TokenLogProbs(other, mask))
    assert losses.policy_loss(policy, advantages, **sampled).loss.isfinite()


def test_preference_losses_see_it_too(monkeypatch):
    policy, other = made()
    few = losses.TokenLogProbs(other, torch.zeros_like(policy.mask))
    desirable = torch.ones(B, dtype=torch.bool)
    calls = [lambda: losses.dpo_loss(policy, few).loss,
             lambda: losses.kto_loss(policy, few, desirable, 0.0).loss]  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError, match="must know every token"):
            call()
    monkeypatch.setattr("cutloss.losses._arguments.may_look", lambda device: False)
    assert all(call().isnan() for call in calls)


def test_made_by_hand():
    policy, other = made()
    with pytest.raises(TypeError, match="in the shape of log_probs, got NoneType: pass"):
        losses.TokenLogProbs(other, None)
    with pytest.raises(TypeError, match="log_probs must be floating point, got torch.int64"):
        losses.TokenLogProbs(torch.zeros(2, 3).long(), torch.ones(2, 3, dtype=torch.bool))
    policy.log_probs.requires_grad_()
    with pytest.raises(ValueError, match=r"pass old_log_probs.detach\(\)"):
        losses.policy_loss(policy, torch.ones(B), old_log_probs=policy)
    loss = losses.policy_loss(policy, torch.ones(B), old_log_probs=policy.detach()).loss
    assert loss.requires_grad and torch.equal(policy.detach().entropy, policy.entropy)


def test_the_implementation_is_passed_on():
    e, c = torch.randn(2, 4, 8, dtype=torch.float64), torch.randn(7, 8, dtype=torch.float64)
    targets = torch.randint(0, 7, (2, 4))
    expected = losses.linear_loss("dpo", e, c, targets, reference=(e + 1, c)).loss
    for more in (dict(impl="torch"), dict(schedule="vocabulary"), dict(schedule="rows")):
        mine = losses.linear_loss("dpo", e, c, targets, reference=[e + 1, c], **more).loss
        torch.testing.assert_close(mine, expected)
    with pytest.raises(ValueError, match="schedule must be one of"):
        losses.token_log_probs(e, c, targets, schedule="columns")


# Before any forward ---------------------------------------------------------------------------

A = torch.zeros(4)
EARLY = [
    (dict(name="policy", advantages=A, reference=(A, A)), ValueError, "beta is 0: leave reference"),
    (dict(name="policy", advantages=A, reference=A, beta=0.0), ValueError, "beta is 0"),
    (dict(name="policy"), TypeError, "'policy' needs advantages, got none: pass advantages="),
    (dict(name="kto", reference=A, beta=0.1), TypeError, "'kto' needs desirable, got beta"),
    (dict(name="policy", advantage=A), TypeError, "no option 'advantage': its .* are advantages, "),
    (dict(name="policy", advantages=A, policy=A), TypeError, "has no option 'policy'"),
    (dict(name="simpo", loss_type="simpo"), TypeError, "'simpo' has no option 'loss_type'"),
    (dict(name="dpo", reference=(A, A), loss_type="dpo"), ValueError, "loss_type must be one of"),
    (dict(name="dpo", reference=(A, A), loss_type=["sft", "x"]), ValueError, "'sigmoid'.*got 'x'"),
    (dict(name="cpo", loss_type="orpo"), ValueError, "loss_type must be one of.*got 'orpo'"),
]


@pytest.mark.parametrize("options, error, message", EARLY)
def test_refused_before_any_forward(options, error, message, monkeypatch):
    monkeypatch.setattr("cutloss.losses.linear.token_log_probs", None)
    options = dict(options)
    with pytest.raises(error, match=message):
        losses.linear_loss(options.pop("name"), A, A, A, **options)


UNUSED = [
    (dict(loss_type="vespo", importance_sampling_level="sequence"), "but 'token', got 'sequence'"),
    (dict(loss_type="grpo", num_items_in_batch=7), "got 7; .* are dapo, cispo, vespo"),
    (dict(loss_type="luspo", num_items_in_batch=torch.tensor(7)), "got a tensor"),
    (dict(loss_type="dapo", max_completion_length=7), "only loss_type 'dr_grpo' .* got 7 with 'da"),
    (dict(loss_type="sapo", epsilon=0.3), "'sapo' clips no ratio .* got 0.3 and None"),
    (dict(loss_type="vespo", epsilon_high=0.3), "'vespo' clips no ratio .* got 0.2 and 0.3"),
]


@pytest.mark.parametrize("options, message", UNUSED)
def test_options_that_nothing_would_use(options, message):
    with pytest.raises(ValueError, match=message):
        losses.policy_loss(made()[0], torch.ones(B), **options)


def test_advantages_do_not_widen_the_loss():
    policy = made(dtype=torch.float32)[0]
    assert losses.policy_loss(policy, torch.ones(B).double()).loss.dtype == torch.float32

"""Policy losses by rows against those of stored log-probabilities, in one chunk and in many."""

import pytest
import torch
from helpers import problems
from helpers.inside import by_rows
from helpers.problems import BF16, F32, Problem
from helpers.token_losses import chunks, cuda, focal, on_cuda, plan_by_rows  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

from cutloss import losses
from cutloss.losses import linear_token_loss

TOKENS = (6, 23)
POLICY = {name: dict(loss_type=name) for name in ("grpo", "bnpo", "dapo", "luspo", "sapo")}
POLICY |= {
    "cispo": dict(loss_type="cispo", epsilon_high=1.1),
    "dr_grpo": dict(loss_type="dr_grpo", max_completion_length=30),
    "delta": dict(loss_type="bnpo", delta=1.5, old=True),
    "kl": dict(loss_type="grpo", beta=0.1, old=True),
    "plain_kl": dict(loss_type="dapo", beta=0.1, use_bias_correction_kl=False),
    "entropy": dict(loss_type="bnpo", entropy_coef=0.02, old=True),
    "items": dict(loss_type="dapo", num_items_in_batch=200),
    "sampler": dict(loss_type="dapo", old=True, sampled=True),
    "sampler_of_tokens": dict(
        loss_type="dapo", sampled=True, sampling_correction="token_truncate"
    ),
    "token_advantages": dict(loss_type="bnpo", token_advantages=True),
}
COUPLED = {
    "gspo": dict(loss_type="grpo", importance_sampling_level="sequence", old=True),
    "vespo": dict(loss_type="vespo", old=True),
    "off_policy": dict(loss_type="grpo", off_policy_mask_threshold=0.1, old=True),
    "quantile": dict(loss_type="grpo", top_entropy_quantile=0.5),
    "own_sampler": dict(loss_type="grpo", sampled=True),
}


def policy_case(dtype, options, shift) -> tuple[Problem, torch.Tensor, dict]:
    p = problems.make(TOKENS, V=211, D=16, dtype=dtype, ignored=0.3, shift=shift, bias=True)
    p.targets[-1] = -100
    options = dict(options)
    kinds = {k: options.pop(k, False) for k in ("old", "sampled", "token_advantages")}
    with torch.no_grad():
        now = losses.token_log_probs(p.e, p.c, p.targets, p.bias, shift=shift).log_probs
    g = torch.Generator().manual_seed(1)

    def near(t, by):
        return t + by * torch.randn(t.shape, generator=g).to(t.device)

    advantages = torch.randn(now.shape if kinds["token_advantages"] else now.shape[0], generator=g)
    if kinds["old"]:
        options["old_log_probs"] = near(now, 0.3)
    if kinds["sampled"]:
        options["sampling_log_probs"] = near(now, 0.1)
    if "beta" in options:
        options["reference"] = near(now, 0.3)
    return p, advantages.to(now), options


def compare(p: Problem, advantages, options, **how):
    needs_entropy = bool(options.keys() & {"entropy_coef", "top_entropy_quantile"})
    rows = losses.linear_loss(
        "policy", p.e, p.c, p.targets, p.bias, advantages=advantages, **p.options, **options, **how
    )
    policy = losses.token_log_probs(
        p.e, p.c, p.targets, p.bias, return_entropy=needs_entropy, **p.options
    )
    whole = losses.policy_loss(policy, advantages, **options)
    assert rows.metrics.keys() == whole.metrics.keys()
    pairs = [(rows.loss, whole.loss), *((rows.metrics[k], whole.metrics[k]) for k in rows.metrics)]
    pairs += zip(
        torch.autograd.grad(rows.loss, p.parameters), torch.autograd.grad(whole.loss, p.parameters)
    )
    tolerance = dict(rtol=3e-2, atol=1e-3) if p.e.dtype == BF16 else dict(rtol=1e-4, atol=1e-6)
    for a, b in pairs:
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("options", POLICY.values(), ids=POLICY.keys())
def test_policy_losses_by_rows(options, dtype, shift, chunks):
    p, advantages, options = policy_case(dtype, options, shift)
    compare(p, advantages, options)
    # On Hopper entropies rule out the schedule by rows.
    assert len(chunks) == 1 or ("entropy_coef" in options and p.e.device.type == "cuda")


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("options", COUPLED.values(), ids=COUPLED.keys())
def test_policy_losses_that_couple_tokens(options, chunks):
    compare(*policy_case(F32, options, 1))
    assert not chunks


def long_policy_case(options) -> tuple[Problem, torch.Tensor, dict, int]:
    """Sequences that do not fit into one chunk of the smallest plan, whose bytes come last."""
    p, advantages, options = policy_case(F32, options, 1)
    p.e = p.e.detach().repeat(1, 20, 1).requires_grad_()
    p.targets = p.targets.repeat(1, 20)
    p.targets[2, 40:] = -100  # of another length
    with torch.no_grad():
        now = losses.token_log_probs(p.e, p.c, p.targets, p.bias, shift=1).log_probs
    for name in options.keys() & {"old_log_probs", "reference", "sampling_log_probs"}:
        options[name] = now + 0.1 * torch.randn(now.shape)
    if advantages.dim() == 2:
        advantages = torch.randn(now.shape)
    wants_entropy = "entropy_coef" in options
    return p, advantages, options, plan_by_rows(p, wants_entropy=wants_entropy).least_bytes


@pytest.mark.parametrize("options", POLICY.values(), ids=POLICY.keys())
def test_policy_losses_in_several_chunks(options, chunks):
    p, advantages, options, most = long_policy_case(options)
    with pytest.raises(ValueError, match=f"the smallest plan needs {most} bytes"):
        compare(p, advantages, options, schedule="rows", max_workspace=0)
    compare(p, advantages, options, schedule="rows", max_workspace=most)
    assert chunks[-1] > 4
    compare(p, advantages, options, schedule="rows")
    assert chunks[-1] == 1


def test_a_policy_loss_is_refused_before_any_product(chunks):
    p, advantages, options = policy_case(F32, POLICY["kl"], 0)
    for wrong in (dict(advantages=advantages[:-1]), dict(epsilon=-1.0), dict(delta=2.0, loss_type="sapo")):
        how = dict(options, advantages=advantages) | wrong
        with pytest.raises(ValueError, match="advantages must be|epsilon must be|takes no delta"):
            losses.linear_loss("policy", p.e, p.c, p.targets, p.bias, **how)
    assert not chunks


def test_a_compiled_policy_loss():
    p, advantages, options = policy_case(F32, POLICY["kl"] | POLICY["sampler"] | dict(entropy_coef=0.1), 1)

    def step(e, c):
        return losses.linear_loss("policy", e, c, p.targets, p.bias, shift=1, advantages=advantages, **options)

    results = []
    for call_it in (step, torch.compile(step, fullgraph=True)):
        made = call_it(p.e, p.c)
        results.append((made.loss, *made.metrics.values(), *torch.autograd.grad(made.loss, (p.e, p.c))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_policy_loss_of_no_token():
    p, advantages, options = policy_case(F32, POLICY["entropy"], 0)
    p.targets.fill_(-100)
    how = dict(options, advantages=advantages, schedule="rows")
    loss = losses.linear_loss("policy", p.e, p.c, p.targets, p.bias, **how).loss
    assert loss == 0
    assert not any(g.any() for g in torch.autograd.grad(loss, p.parameters))


def test_entries_that_are_no_row_change_nothing(monkeypatch):
    """As lists of rows have them on CUDA, in chunks without any row too."""
    p, advantages, options, most = long_policy_case(POLICY["kl"])
    of_chunk = by_rows._coefficients

    def grads():
        how = dict(schedule="rows", max_workspace=most, shift=1)
        policy = losses.linear_loss(
            "policy", p.e, p.c, p.targets, p.bias, advantages=advantages, **options, **how
        ).loss
        token = linear_token_loss(p.e, p.c, p.targets, focal, p.bias, **how)
        return policy, token, *torch.autograd.grad(policy + token, p.parameters)

    def padded(row_loss, listed, *rest):
        none = torch.full((3,), -1)
        of_chunk(row_loss, none, *rest)
        return of_chunk(row_loss, torch.cat([none, listed, none]), *rest)

    expected = grads()
    monkeypatch.setattr(by_rows, "_coefficients", padded)
    for a, b in zip(grads(), expected, strict=True):
        torch.testing.assert_close(a, b)


class Written(TorchDispatchMode):
    """How many elements operators have written."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op is torch.ops.aten.index_copy_.default:  # into a tensor of all rows
            self.elements += args[3].numel()
        elif not op.is_view and op is not torch.ops.aten.new_empty.default:
            made = out if isinstance(out, (tuple, list)) else [out]
            self.elements += sum(t.numel() for t in made if isinstance(t, torch.Tensor))
        return out


@pytest.mark.parametrize("options", POLICY.values(), ids=POLICY.keys())
def test_a_chunk_of_a_policy_loss_costs_its_own_rows(options, chunks, monkeypatch):
    """Between the products no chunk works on the batch: their work adds up to that of one."""
    p, advantages, options, most = long_policy_case(options)
    of_chunk, written = by_rows._coefficients, []

    def counted(*args):
        with Written() as mode:
            made = of_chunk(*args)
        written[-1] += mode.elements
        return made

    monkeypatch.setattr(by_rows, "_coefficients", counted)
    for max_workspace in (None, most):
        written.append(0)
        losses.linear_loss(
            "policy", p.e, p.c, p.targets, p.bias, advantages=advantages, schedule="rows",
            max_workspace=max_workspace, **p.options, **options,
        )  # fmt: skip
    one, several = written
    assert chunks[0] == 1 and chunks[1] > 4
    assert one > p.targets.numel() and several < 1.2 * one


@cuda
@pytest.mark.usefixtures("on_cuda")
def test_policy_losses_wait_for_nothing_on_cuda():
    p, advantages, options = policy_case(BF16, POLICY["kl"], 1)
    how = dict(advantages=advantages, **p.options, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = losses.linear_loss("policy", p.e, p.c, p.targets, p.bias, **how).loss
        torch.autograd.grad(loss, p.parameters)
    finally:
        torch.cuda.set_sync_debug_mode("default")

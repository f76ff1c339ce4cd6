"""The losses of cutloss.losses from stored logits, sequence by sequence, by their definitions.
Shares nothing with the package."""

import math

import torch
import torch.nn.functional as F
from helpers.problems import Problem
from torch import Tensor


def rows(p: Problem) -> dict[str, list[Tensor]]:
    """Of each sequence of p, its tokens that count: log p(target) and entropy, (tokens) each, the
    log of the sum of squared probabilities, and where they stand."""
    o = dict(p.options)
    shift = int(o.get("shift", 0))
    e = p.e[:, : p.e.shape[1] - shift]
    targets = p.targets[:, shift:]
    z = (e @ p.c.T).to(torch.float64 if p.e.dtype == torch.float64 else torch.float32)
    z = z * o.get("logit_scale", 1.0)
    if p.bias is not None:
        z = z + p.bias
    if o.get("softcap"):
        z = o["softcap"] * torch.tanh(z / o["softcap"])
    temperature = o.get("temperature", 1.0)
    if isinstance(temperature, Tensor):
        temperature = temperature[:, shift:, None].to(z)
    log_p = F.log_softmax(z / temperature, -1)
    found = {"log_probs": [], "entropy": [], "squares": [], "at": []}
    for row in range(targets.shape[0]):
        at = (targets[row] != o.get("ignore_index", -100)).nonzero()[:, 0]
        here = log_p[row, at]
        found["log_probs"].append(here.gather(-1, targets[row, at][:, None])[:, 0])
        found["entropy"].append(-(here.exp() * here).sum(-1))
        found["squares"].append(torch.logsumexp(2 * here, -1))
        found["at"].append(at)
    return found


def log_sigmoid(x: Tensor) -> Tensor:
    return -F.softplus(-x)


def mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean()


# Preference, with a reference -----------------------------------------------------------------


def score(u: Tensor, kind: str, a: float) -> Tensor:
    """f'(e^u) of the f-divergence, up to a constant."""
    t = u.exp()
    if kind == "forward_kl":
        return 1 - 1 / t
    if kind == "js_divergence":
        return torch.log(2 * t / (1 + t))
    if kind == "alpha_divergence" and a != 1:
        return (t ** (a - 1) - 1) / (a - 1)
    return u


def dpo(
    policy: list[Tensor], reference: list[Tensor], squares: list[Tensor], loss_type="sigmoid",
    loss_weights=None, beta=0.1, label_smoothing=0.0, f_divergence_type="reverse_kl",
    f_alpha_divergence_coef=0.5, discopop_tau=0.05, ld_alpha=None, use_weighting=False,
) -> Tensor:  # fmt: skip
    if not isinstance(loss_type, str):
        parts = [
            dpo(policy, reference, squares, name, None, beta, label_smoothing, f_divergence_type,
                f_alpha_divergence_coef, discopop_tau, ld_alpha, use_weighting)
            for name in loss_type
        ]  # fmt: skip
        return sum(w * part for w, part in zip(loss_weights or [1.0] * len(parts), parts))
    B, eps = len(policy) // 2, label_smoothing
    w, l, ref_w, ref_l = [], [], [], []
    for i in range(B):
        shared = min(len(policy[i]), len(policy[B + i]))
        alpha = 1.0 if ld_alpha is None else ld_alpha
        for sums, tokens in (
            (w, policy[i]), (l, policy[B + i]), (ref_w, reference[i]), (ref_l, reference[B + i]),
        ):  # fmt: skip
            sums.append(tokens[:shared].sum() + alpha * tokens[shared:].sum())
    if loss_type == "aot":
        return mean([
            -(1 - eps) * log_sigmoid(beta * d) - eps * log_sigmoid(-beta * d)
            for d in torch.stack([a - b for a, b in zip(w, l)]).sort().values
            - torch.stack([a - b for a, b in zip(ref_w, ref_l)]).sort().values
        ])  # fmt: skip
    if loss_type == "aot_unpaired":
        return mean([
            -(1 - eps) * log_sigmoid(beta * d) - eps * log_sigmoid(-beta * d)
            for d in torch.stack([a - b for a, b in zip(w, ref_w)]).sort().values
            - torch.stack([a - b for a, b in zip(l, ref_l)]).sort().values
        ])  # fmt: skip
    losses = []
    for i in range(B):
        u_w, u_l = w[i] - ref_w[i], l[i] - ref_l[i]
        r_w, r_l = beta * u_w, beta * u_l
        s_w = score(u_w, f_divergence_type, f_alpha_divergence_coef)
        s_l = score(u_l, f_divergence_type, f_alpha_divergence_coef)
        x = beta * (s_w - s_l)
        of_mean = s_w / max(len(policy[i]), 1) - s_l / max(len(policy[B + i]), 1)
        q = 1 / (1 + torch.exp(-x))
        if loss_type == "sigmoid":
            loss = torch.log(1 + torch.exp(-x))
        elif loss_type == "hinge":
            loss = (1 - x).clamp(min=0)
        elif loss_type == "ipo":
            loss = (of_mean - 0.5 / beta).square()
        elif loss_type == "exo_pair":
            loss = q * torch.log(q / (1 - eps)) + (1 - q) * torch.log((1 - q) / eps)
        elif loss_type == "nca_pair":
            loss = -log_sigmoid(r_w) - log_sigmoid(-r_w) / 2 - log_sigmoid(-r_l) / 2
        elif loss_type == "robust":
            loss = (eps * log_sigmoid(-x) - (1 - eps) * log_sigmoid(x)) / (1 - 2 * eps)
        elif loss_type == "bco_pair":
            loss = -log_sigmoid(r_w) - log_sigmoid(-r_l)
        elif loss_type == "sppo_hard":
            loss = (u_w - 0.5 / beta).square() + (u_l + 0.5 / beta).square()
        elif loss_type == "apo_zero":
            loss = 1 - torch.sigmoid(r_w) + torch.sigmoid(r_l)
        elif loss_type == "apo_down":
            loss = torch.sigmoid(r_w) + 1 - torch.sigmoid(r_w - r_l)
        elif loss_type == "discopop":
            s = torch.sigmoid(x / discopop_tau)
            loss = (1 - s) * -log_sigmoid(x) + s * torch.exp(-x)
        elif loss_type == "sft":
            loss = -torch.cat(policy[:B]).mean()
        elif loss_type == "sigmoid_norm":
            loss = -log_sigmoid(beta * of_mean)
        if use_weighting:
            for row in (i, B + i):
                n = max(len(policy[row]), 1)
                loss = loss * ((policy[row] - squares[row]).sum() / n).exp().detach()
        losses.append(loss)
    return mean(losses)


# Policy ---------------------------------------------------------------------------------------


def policy(
    now: list[Tensor], entropy: list[Tensor], advantages, old, ref, sampling, loss_type="dapo",
    importance_sampling_level="token", epsilon=0.2, epsilon_high=None, delta=None, beta=0.0,
    use_bias_correction_kl=True, sampling_correction="sequence_mask", sampling_clip_min=None,
    sampling_clip_max=3.0, off_policy_mask_threshold=None, top_entropy_quantile=1.0,
    entropy_coef=0.0, num_items_in_batch=None, max_completion_length=None, sapo_temperature_pos=1.0,
    sapo_temperature_neg=1.05, vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0,
    vespo_lambda_neg=2.0,
) -> Tensor:  # fmt: skip
    """Lists of (tokens), one of each sequence; old, ref and sampling may be None. `advantages`: a
    list of (tokens) too."""
    high = epsilon if epsilon_high is None else epsilon_high
    least = -math.inf if sampling_clip_min is None else sampling_clip_min
    most = math.inf if sampling_clip_max is None else sampling_clip_max
    count = sum(len(tokens) for tokens in now)
    floor = math.log(1e-8)
    threshold = -1.0
    if top_entropy_quantile < 1:
        threshold = torch.cat(entropy).detach().quantile(1 - top_entropy_quantile)
    sums, bonus = [], []
    for i, p in enumerate(now):
        n = max(len(p), 1)
        o = p.detach() if old is None else old[i]
        keep = entropy[i].detach() >= threshold
        bonus.append(entropy[i][keep])
        ratio = (p - o).exp()
        if importance_sampling_level == "sequence":
            ratio = ((p - o).sum() / n).exp().expand(len(p))
        correction = torch.ones_like(p)
        if sampling is not None and sampling_correction is not None:
            said = ~sampling[i].isnan()
            correction = torch.where(said, (o - sampling[i]).exp(), 1.0)
            if sampling_correction.startswith("sequence"):
                correction = correction.prod().expand(len(p))
            if sampling_correction.endswith("truncate"):
                correction = correction.clamp(least, most)
            else:
                correction = correction * (correction >= least) * (correction <= most)
        a = advantages[i]
        positive, negative = (a > 0).to(p), (a < 0).to(p)
        if loss_type == "cispo":
            terms = -ratio.detach().clamp(max=high) * a * p
        elif loss_type == "sapo":
            tau = sapo_temperature_pos * positive + sapo_temperature_neg * (1 - positive)
            terms = -4 / tau / (1 + torch.exp(-tau * (ratio - 1))) * a
        elif loss_type == "vespo":
            w = (p - o).detach().clamp(-20, 20).sum() + correction.log().clamp(floor, 20).sum()
            w = w.clamp(floor, 20).exp()
            k = vespo_k_neg * negative + vespo_k_pos * (1 - negative)
            decay = vespo_lambda_neg * negative + vespo_lambda_pos * (1 - negative)
            terms = -(decay.exp() * w**k * torch.exp(-decay * w)) * a * p
        else:
            first = ratio if delta is None else ratio.clamp(max=delta)
            second = ratio.clamp(1 - epsilon, 1 + high)
            terms = -torch.min(first * a, second * a)
        if off_policy_mask_threshold is not None:
            q = o if sampling is None else sampling[i]
            drift = (q - p.detach()).nan_to_num(0.0).sum() / n
            if drift > off_policy_mask_threshold:
                terms = terms * (1 - negative)
        terms = terms * keep * (1 if loss_type == "vespo" else correction)
        if beta:
            d = ref[i] - p
            k3 = d.exp() - d - 1
            terms = terms + beta * (k3 * ratio if use_bias_correction_kl else k3)
        sums.append(terms.sum())
    B = len(now)
    if loss_type in ("grpo", "sapo"):
        loss = sum(s / max(len(p), 1) for s, p in zip(sums, now)) / B
    elif loss_type == "bnpo":
        loss = sum(sums) / count
    elif loss_type == "dr_grpo":
        loss = sum(sums) / (B * max_completion_length)
    elif loss_type == "luspo":
        loss = sum(sums) / B
    else:
        loss = sum(sums) / (count if num_items_in_batch is None else num_items_in_batch)
    bonus = torch.cat(bonus)
    over = len(bonus) if num_items_in_batch is None else num_items_in_batch
    return loss - entropy_coef * bonus.sum() / over if entropy_coef else loss


# Preference without a reference, and without pairs ---------------------------------------------


def cpo(
    policy: list[Tensor], loss_type="sigmoid", beta=0.1, label_smoothing=0.0, cpo_alpha=1.0,
    simpo_gamma=0.5, alpha=0.0,
) -> Tensor:  # fmt: skip
    B, losses = len(policy) // 2, []
    for i in range(B):
        w, l = (
            t.sum() / (max(len(t), 1) if loss_type in ("ipo", "simpo") else 1)
            for t in (policy[i], policy[B + i])
        )
        if alpha:
            w, l = (1 - w.exp() ** -alpha) / alpha, (1 - l.exp() ** -alpha) / alpha
        x = beta * (w - l) - (simpo_gamma if loss_type == "simpo" else 0.0)
        if loss_type == "hinge":
            losses.append((1 - x).clamp(min=0))
        elif loss_type == "ipo":
            losses.append((w - l - 0.5 / beta).square())
        else:
            eps = label_smoothing
            losses.append(-(1 - eps) * log_sigmoid(x) - eps * log_sigmoid(-x))
    return mean(losses) - cpo_alpha * torch.cat(policy[:B]).mean()


def orpo(policy: list[Tensor], odds: list[Tensor], beta: float) -> Tensor:
    """odds: the tokens that the odds are made of."""
    B, terms = len(policy) // 2, []
    for i in range(B):
        if len(odds[i]) and len(odds[B + i]):
            p_w, p_l = odds[i].mean().exp(), odds[B + i].mean().exp()
            terms.append(-torch.log(torch.sigmoid(torch.log(p_w / (1 - p_w) / (p_l / (1 - p_l))))))
    return -torch.cat(policy[:B]).mean() + beta * sum(terms) / B


def kto(
    policy: list[Tensor], reference: list[Tensor], desirable: list[bool], kl=0.0, loss_type="kto",
    beta=0.1, desirable_weight=1.0, undesirable_weight=1.0,
) -> Tensor:  # fmt: skip
    losses, kl = [], max(float(kl), 0.0)
    for p, r, liked in zip(policy, reference, desirable):
        u = p.sum() - r.sum()
        if liked:
            losses.append(desirable_weight * (1 - torch.sigmoid(beta * (u - kl))))
        else:
            losses.append(undesirable_weight * (1 - torch.sigmoid(beta * (kl - u))))
    return mean(losses)


# Distillation ---------------------------------------------------------------------------------


def logits(e, c, bias, softcap=None, logit_scale=1.0) -> Tensor:
    z = (e @ c.T).to(torch.float64 if e.dtype == torch.float64 else torch.float32) * logit_scale
    z = z if bias is None else z + bias
    return softcap * torch.tanh(z / softcap) if softcap else z


def divergence(log_s: Tensor, log_t: Tensor, kind: str, beta: float) -> Tensor:
    """Over the last dimension; an entry of probability 0 in both adds nothing."""
    s, t = log_s.exp(), log_t.exp()

    def kl(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        there = p > 0
        difference = torch.where(there, log_p, 0.0) - torch.where(there, log_q, 0.0)
        return (p * difference).sum(-1)

    if kind == "tvd":
        return (s - t).abs().sum(-1) / 2
    if kind == "forward_kl" or (kind == "jsd" and beta == 0):
        return kl(t, log_t, log_s)
    if kind == "reverse_kl" or (kind == "jsd" and beta == 1):
        return kl(s, log_s, log_t)
    log_m = torch.log(beta * t + (1 - beta) * s)
    return beta * kl(t, log_t, log_m) + (1 - beta) * kl(s, log_s, log_m)


def top_k(z: Tensor, ids: Tensor, log_t: Tensor, tail: str) -> tuple[Tensor, Tensor]:
    """Of one row, z (V): log-probabilities of the events, the student's and the teacher's."""
    here = log_t > -math.inf
    ids, log_t = ids[here], log_t[here].to(z.dtype)
    log_s = F.log_softmax(z, -1)
    if tail == "ignore":
        return log_s[ids], log_t
    if tail == "renormalise":
        return F.log_softmax(z[ids], -1), F.log_softmax(log_t, -1)
    others = torch.tensor([v for v in range(len(z)) if v not in ids.tolist()], dtype=torch.long)
    left = torch.log1p(-log_t.exp().sum()).reshape(1)
    return (
        torch.cat([log_s[ids], torch.logsumexp(log_s[others], -1).reshape(1)]),
        torch.cat([log_t, left]),
    )


def distilled(
    z: Tensor, targets: Tensor | None, pair, kind="forward_kl", beta=0.5, temperature=1.0,
    soft_weight=1.0, hard_weight=0.0, token_weight=None, reduction="mean", num_items=None,
    ignore_index=-100,
) -> Tensor:  # fmt: skip
    """z: (N,V), the student's; pair: from a row's number and its logits over the temperature to
    the two rows of log-probabilities."""
    losses, weights = [], []
    for n in range(z.shape[0]):
        counts = targets is None or targets[n] != ignore_index
        weight = (1.0 if token_weight is None else token_weight[n]) if counts else 0.0
        weights.append(weight)
        if not counts:
            losses.append(z.new_zeros(()))
            continue
        loss = soft_weight * divergence(*pair(n, z[n] / temperature), kind, beta)
        if hard_weight:
            loss = loss + hard_weight * F.cross_entropy(z[n], targets[n])
        losses.append(weight * loss)
    losses = torch.stack(losses)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    over = sum(weights) if num_items is None else num_items
    return losses.sum() / (over if over else 1.0)

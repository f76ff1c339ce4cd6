"""Distillation: a student's problem, its teacher, and their loss by hand."""

import torch
from helpers import losses_by_hand as by_hand
from helpers import problems
from helpers.problems import F64
from helpers.tolerance import assert_close

from cutloss import losses

D_TEACHER = 20
OF_LOGITS = ("softcap", "logit_scale")


def teacher_of(p, dtype=None, seed=1):
    """Hidden states and classifier of other size, not far from those of p in what they say."""
    g = torch.Generator().manual_seed(seed)
    e, c = (t.detach().double().cpu() for t in (p.e, p.c))
    wider = [torch.randn(*t.shape[:-1], D_TEACHER - t.shape[-1], generator=g) for t in (e, c)]
    made = [torch.cat([t, 0.5 * w.double()], -1) for t, w in zip((e, c), wider)]
    made.append(torch.randn(c.shape[0], generator=g, dtype=F64) if p.bias is not None else None)
    moved = (None if t is None else t.to(p.e.device, dtype or p.e.dtype) for t in made)
    return tuple(moved)


def shifted(p, shift):
    """Of p and a tensor like its targets, what is predicted, as rows."""
    length = p.targets.shape[-1] - shift

    def of_e(t):
        return t[..., :length, :].reshape(-1, t.shape[-1])

    def of_targets(t):
        return t[..., shift:].reshape(-1)

    return of_e, of_targets


HAND_NAMES = {"divergence": "kind", "num_items_in_batch": "num_items"}


def hand(p, pair_of, **options):
    """The loss of p by hand. pair_of(dtype): as `pair` of losses_by_hand.distilled."""
    options = {HAND_NAMES.get(k, k): v for k, v in options.items()}
    of_e, of_targets = shifted(p, int(options.pop("shift", 0)))
    of_logits = {k: options.pop(k) for k in OF_LOGITS if k in options}
    weight = options.pop("token_weight", None)
    z = by_hand.logits(of_e(p.e), p.c, p.bias, **of_logits)
    return by_hand.distilled(
        z, of_targets(p.targets), pair_of(p.e.dtype),
        token_weight=None if weight is None else of_targets(weight).to(z), **options,
    )  # fmt: skip


def upstream_of(loss):
    return torch.linspace(0.5, 1.5, loss.numel(), device=loss.device).reshape(loss.shape).to(loss)


def check(p, loss, expected, lenience=2):
    """`expected`: from a problem to its loss."""
    results = []
    for q, value in ((p, loss), (p.to(F64), None), (p, None)):
        value = expected(q) if value is None else value
        grads = torch.autograd.grad(value, q.parameters, upstream_of(value))
        results.append((value.reshape(-1), *grads))
    for name, value, truth, plain in zip(("loss", "de", "dc", "dbias"), *results):
        if p.e.dtype == F64:
            torch.testing.assert_close(value, truth, rtol=1e-9, atol=1e-12)
        else:
            assert_close(value, truth, plain, name, lenience)


def distil(p, teacher, **options):
    e, c, bias = teacher
    return losses.linear_distillation(
        p.e, p.c, e, c, p.targets, p.bias, bias, **p.options, **options
    )


def pair_of_teacher(p, teacher, temperature=1.0, teacher_softcap=None, teacher_logit_scale=1.0):
    of_e, _ = shifted(p, int(p.options.get("shift", 0)))

    def pair_of(dtype):
        e, c, bias = (None if t is None else t.to(dtype) for t in teacher)
        z = by_hand.logits(of_e(e), c, bias, teacher_softcap, teacher_logit_scale) / temperature
        log_t = torch.log_softmax(z, -1)
        return lambda n, of_row: (torch.log_softmax(of_row, -1), log_t[n])

    return pair_of


def of_two_models(p, teacher, options):
    options = p.options | options
    names = ("teacher_softcap", "teacher_logit_scale")
    kinds = {k: options.pop(k) for k in names if k in options}
    pair_of = pair_of_teacher(p, teacher, options.get("temperature", 1.0), **kinds)
    return lambda q: hand(q, pair_of, **options)


def stored(p, K, seed=2, mass=0.9):
    """Ids without order, and log-probabilities whose sum is less than 1; one row has fewer."""
    g = torch.Generator().manual_seed(seed)
    shape = p.e.shape[:-1]
    ids = torch.rand(*shape, p.c.shape[0], generator=g).argsort(-1)[..., :K]
    log_t = torch.log_softmax(2 * torch.randn(*shape, K, generator=g, dtype=F64), -1)
    log_t = log_t + torch.tensor(mass, dtype=F64).log()
    if K > 2:
        log_t[..., 0, 1:3] = -torch.inf
        ids[..., 0, 1], ids[..., 0, 2] = -1, ids[..., 0, 0]  # not there, and so not looked at
    return ids.to(problems.device), log_t.to(problems.device)

"""Losses of sequences: a problem, its log-probabilities, and what every family is called with."""

from helpers import problems
from helpers.problems import Problem

from cutloss import losses


def problem(dtype, head, sequences=6, seed=0) -> Problem:
    """Sequences of different lengths with gaps; the last has no token that counts."""
    p = problems.make((sequences, 9), 61, 12, dtype, seed=seed, ignored=0.25, **head)
    p.targets[0, :4] = -100
    p.targets[1, 6:] = -100
    p.targets[-1] = -100
    return p


def log_probs(p: Problem, **options) -> losses.TokenLogProbs:
    return losses.token_log_probs(p.e, p.c, p.targets, p.bias, **p.options, **options)


# Every loss of every family with what it cannot do without.
CALLS = {
    "dpo": dict(reference=True),
    "kto": dict(reference=True, kl=0.1, desirable=[True, False, True, True, False, False]),
    "cpo": {},
    "simpo": {},
    "orpo": {},
    "policy": dict(reference=True, beta=0.1, advantages=[1.0, -2.0, 0.5, -0.1, 0.0, 3.0],
                   entropy_coef=0.1, top_entropy_quantile=0.6),
}  # fmt: skip
TYPES = {
    "dpo": [n for n in losses.DPO if n != "exo_pair"],
    "kto": ["kto"],
    "cpo": list(losses.CPO),
    "policy": [n for n in losses.POLICY if n != "cispo"],
}

"""Divergences of a student's distribution from a teacher's: a small table of formulas.

Each takes log-probabilities of the same entries, (R,W): the student's s and the teacher's t, finite
even where a class cannot be (its probability is then exactly 0, and 0 * log 0 is 0). It returns

    loss    (R), the sum over the entries
    slope   (R,W), the derivative by s, as if the entries of s did not depend on each other; less
            a multiple of p_s (`omitted`), which over all classes changes nothing of what follows

and from the slope the derivative by logits follows, whatever the divergence: slope - p_s sum(slope)
(`by_logits`). All of it in place where it can be: t is used up, s is left as it is.
"""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

Result = tuple[Tensor | None, Tensor]


@dataclasses.dataclass(frozen=True)
class Divergence:
    of_entries: Callable[[Tensor, Tensor, float, bool], Result]  # s, t, beta, whether the loss too
    buffers: int  # tensors of (R,W) alive at most, s and t among them
    omitted: float = 0.0
    infinite: str = ""  # which of the two may not be 0 where the other is not, if either


def forward_kl(s: Tensor, t: Tensor, beta: float, wants_loss: bool) -> Result:
    """sum p_t (log p_t - log p_s). Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a
    Neural Network" (arXiv:1503.02531), up to the teacher's entropy."""
    p = t.exp()
    loss = t.sub_(s).mul_(p).sum(-1) if wants_loss else None
    return loss, p.neg_()


def reverse_kl(s: Tensor, t: Tensor, beta: float, wants_loss: bool) -> Result:
    """sum p_s (log p_s - log p_t). Gu et al. 2023, "MiniLLM" (arXiv:2306.08543), equation 1."""
    slope = torch.sub(s, t, out=t).mul_(s.exp())
    return slope.sum(-1) if wants_loss else None, slope


def jsd(s: Tensor, t: Tensor, beta: float, wants_loss: bool) -> Result:
    """beta KL(p_t || m) + (1 - beta) KL(p_s || m), m = beta p_t + (1 - beta) p_s. Agarwal et al.
    2023, "On-Policy Distillation of Language Models" (GKD, arXiv:2306.13649), equation 1."""
    m = s + math.log1p(-beta)
    rest = t + math.log(beta)
    torch.logaddexp(m, rest, out=m)
    loss = None
    if wants_loss:
        p = torch.exp(t, out=rest)
        loss = beta * t.sub_(m).mul_(p).sum(-1)
    slope = torch.sub(s, m, out=m).mul_(torch.exp(s, out=rest)).mul_(1 - beta)
    return loss + slope.sum(-1) if wants_loss else None, slope


def tvd(s: Tensor, t: Tensor, beta: float, wants_loss: bool) -> Result:
    """sum |p_s - p_t| / 2, with a slope of 0 where they are equal. Wen et al. 2023, "f-Divergence
    Minimization for Sequence-Level Knowledge Distillation" (arXiv:2307.15190), section 3.2."""
    p = s.exp()
    difference = torch.sub(p, t.exp_(), out=t)
    loss = torch.linalg.vector_norm(difference, 1, dim=-1) / 2 if wants_loss else None
    return loss, difference.sign_().mul_(p).div_(2)


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": Divergence(forward_kl, 3, infinite="student"),
    "reverse_kl": Divergence(reverse_kl, 3, omitted=1.0, infinite="teacher"),
    "jsd": Divergence(jsd, 4),
    "tvd": Divergence(tvd, 3),
}


def by_logits(slope: Tensor, s: Tensor, total: Tensor) -> Tensor:
    """The derivative by logits, in the slope's memory; s is used up. `total`: (R,1), the slope's
    sum over all classes."""
    return slope.addcmul_(s.exp_(), total, value=-1)

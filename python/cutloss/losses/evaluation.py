"""Perplexity and accuracy: sums that add up over batches and ranks, and what is made of them."""

import dataclasses
import enum

import torch
from torch import Tensor

from .. import sharded
from .._core import checks
from .._implementations import LinearCrossEntropyImpl
from ..functional import linear_cross_entropy
from ..sharded import VocabParallelOptions
from . import _arguments as args


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Of some tokens; add those of several batches::

        total = sum(evaluations[1:], evaluations[0])
        torch.distributed.all_reduce(total.sums)       # over ranks
        print(total.perplexity().item(), total.accuracy().item())

    :param sums: (3), fp64: of the tokens' nll, of those that are predicted right, and of all, each
        times the token's weight.
    """

    sums: Tensor

    def __add__(self, other: "Evaluation") -> "Evaluation":
        return Evaluation(self.sums + other.sums)

    def nll(self) -> Tensor:
        """The mean over tokens, NaN for none."""
        return self.sums[0] / self.sums[2]

    def perplexity(self) -> Tensor:
        """e^nll"""
        return self.nll().exp()

    def accuracy(self) -> Tensor:
        """The share of tokens whose target has the largest logit, NaN for none."""
        return self.sums[1] / self.sums[2]


@torch.no_grad()
def evaluate(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool | int = 0,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    max_workspace: int | None = None,
    num_valid: int | None = None,
    impl: str | enum.Enum = LinearCrossEntropyImpl.CCE,
    vocab_parallel_options: VocabParallelOptions | None = None,
) -> Evaluation:
    """Loss and accuracy of a batch, without the logits and without gradients.

    The arguments are those of :func:`cutloss.linear_cross_entropy`; token_weight, in the shape of
    targets, weighs each token in every sum. Of a classifier in shards every rank gets the whole
    sums: add them up over ranks that have other tokens, not over those that have other classes.
    """
    e, c, bias, targets, vocab_parallel_options = sharded.local(
        e, c, bias, targets, vocab_parallel_options
    )
    nll, predictions = linear_cross_entropy(
        e, c, targets, bias, ignore_index=ignore_index, shift=shift, temperature=temperature,
        softcap=softcap, logit_scale=logit_scale, max_workspace=max_workspace,
        num_valid=num_valid, impl=impl, reduction="none", return_predictions=True,
        vocab_parallel_options=vocab_parallel_options,
    )  # fmt: skip
    shift = int(shift)
    scored = targets[..., shift:] if shift else targets
    weight = None
    if token_weight is not None:
        checks.token_weight(token_weight, targets)
        weight = token_weight[..., shift:] if shift else token_weight
    counts = scored != ignore_index
    return Evaluation(torch.stack(_sums([nll, predictions == scored], counts, weight)))


def perplexity(
    nll: Tensor, mask: Tensor | None = None, token_weight: Tensor | None = None
) -> Tensor:
    """e^(the mean nll of tokens), a scalar in fp64 without a gradient; NaN for no token.

    A mean of the perplexities of batches is not the perplexity of all: add :func:`evaluate` up.

    :param nll: Of each token, as ``linear_cross_entropy(..., reduction="none")`` returns it.
    :param mask: Which tokens count, bool, in its shape: ``targets != -100``. None: all.
    :param token_weight: In its shape.
    """
    total, over = _sums([_given("nll", nll)], _mask(mask, nll), token_weight)
    return (total / over).exp()


def token_accuracy(predictions: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """The share of targets that are predicted right, a scalar in fp64; NaN for no token.

    :param predictions: Classes, as ``linear_cross_entropy(..., return_predictions=True)`` returns
        them.
    :param targets: In the shape of predictions: with a shift, ``targets[..., shift:]``.
    """
    args.layout("predictions", predictions)
    args.layout("targets", targets)
    if predictions.shape != targets.shape:
        raise ValueError(
            f"predictions must have the shape of targets: got {args.shape(predictions)} and "
            f"{args.shape(targets)}; with a shift pass targets[..., shift:]"
        )
    right, over = _sums([predictions == targets], targets != ignore_index, None)
    return right / over


def z_loss(
    lse: Tensor,
    mask: Tensor | None = None,
    *,
    coefficient: float = 1e-4,
    num_items_in_batch: float | Tensor | None = None,
) -> Tensor:
    """coefficient times the mean of lse^2 over tokens: a penalty that keeps the logits' normaliser
    near 1 (Chowdhery et al. 2022, "PaLM", arXiv:2204.02311, section 5). 0 for no token.

    For losses of your own: ``linear_cross_entropy(..., z_loss=coefficient)`` has it built in, at no
    cost.

    :param lse: The log-sum-exp of each token's logits, as ``return_lse=True`` returns it. Gets a
        gradient.
    :param mask: Which tokens count, bool, in its shape. None: all.
    :param num_items_in_batch: What the sum is divided by instead, at least 1.
    :return: A scalar, fp32 (fp64 for fp64).
    """
    coefficient = args.not_negative("coefficient", coefficient)
    lse = _given("lse", lse)
    lse = lse.to(torch.promote_types(lse.dtype, torch.float32))
    mask = _mask(mask, lse)
    squares = torch.where(mask, lse, 0.0).square().sum()
    if num_items_in_batch is None:
        return coefficient * squares / mask.sum().clamp(min=1)
    return coefficient * squares / checks.num_items(num_items_in_batch)


def _given(name: str, t: Tensor) -> Tensor:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    args.layout(name, t)
    args.floating(name, t)
    return t


def _mask(mask: Tensor | None, t: Tensor) -> Tensor:
    if mask is None:
        return torch.ones_like(t, dtype=torch.bool)
    if isinstance(mask, Tensor):
        args.layout("mask", mask)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != t.shape:
        given = type(mask).__name__
        if isinstance(mask, Tensor):
            given = f"{mask.dtype} of shape {args.shape(mask)}"
        raise ValueError(f"mask must be bool of shape {args.shape(t)}, got {given}")
    return mask


@torch.no_grad()
def _sums(values: list[Tensor], mask: Tensor, weight: Tensor | None) -> list[Tensor]:
    """Of each, and last of the weights alone, where the mask is True; fp64."""
    if weight is None:
        weight = torch.ones_like(mask, dtype=torch.float64)
    else:
        args.layout("token_weight", weight)
    if weight.shape != mask.shape:
        raise ValueError(
            f"token_weight must be of shape {args.shape(mask)}, got {args.shape(weight)}"
        )
    weight = torch.where(mask, weight.double(), 0.0)
    terms = (torch.where(weight == 0, 0.0, t.double() * weight) for t in values)
    return [*(t.sum() for t in terms), weight.sum()]

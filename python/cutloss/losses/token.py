"""``linear_token_loss``: a loss that is a function of each token's own nll and entropy."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .._core import checks
from .._core.operands import shape_of_rows
from .._core.weighting import Rows
from .._torch import by_rows, private
from ..sharded import VocabParallelOptions
from . import _arguments, _function_key, _row_function, _rows
from ._row_function import RowFunction
from .log_probs import TokenLogProbs


def linear_token_loss(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    fn: RowFunction,
    bias: Tensor | None = None,
    *,
    per_token: Mapping[str, Tensor] | None = None,
    entropy: bool = False,
    lse: bool = False,
    normalizer: float | Tensor | None = None,
    return_rows: bool = False,
    ignore_index: int = -100,
    shift: bool | int = 0,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    max_workspace: int | None = None,
    num_valid: int | None = None,
    schedule: str = "auto",
    vocab_parallel_options: VocabParallelOptions | None = None,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """The sum of ``fn(nll)`` over tokens, divided by one number, without storing the logits.

    The loss may weigh a token by its own probability, entropy and whatever the caller knows of it:
    DFT, focal loss, PPO and GRPO with ratios of tokens. Gradients for e, c and bias are exact. By
    rows (see ``schedule`` of :func:`cutloss.linear_cross_entropy`) they are made with the loss,
    chunk by chunk, at the price of the mean of nll: three matrix products, two where c is frozen.

    ::

        def dft(nll):  # Wu et al. 2025, "On the Generalization of SFT" (arXiv:2508.05629)
            return nll.neg().exp().detach() * nll

        loss = linear_token_loss(e, c, targets, dft)

    :param fn: Called with tensors of R rows, R any number: ``fn(nll)``, and by name what else is
        asked for: ``entropy``, ``lse``, the entries of per_token. Returns one loss of each row,
        (R). It is differentiated by PyTorch, so ``detach()`` and ``torch.no_grad()`` mean what
        they say. Each row's result must depend on this row alone, and be the same from call to
        call: rows arrive in chunks. That is looked at with the first chunk that can show it, and
        again at evaluations 2, 4, 8, ... (one a chunk) of the same function, in the same dtypes.
        The same is what has the same code and is steered alike: by flags, numbers and strings in
        its closure, defaults and attributes, and in the functions, classes, objects and modules
        that it uses. Where one of these is not compared (``os.environ``, ``getattr``, an import
        within the function, ``__slots__``, more than some hundred values), every chunk is looked
        at. Values of tensors are data: rows that are coupled for rare data only can pass between
        looks; CUTLOSS_CHECK=1 looks at every chunk. Where rows are coupled there is a ValueError.
        On CUDA looking waits for the device: first looks do so eight times for one definition;
        else, and at later looks, the loss is NaN instead (and stays so, after a later look), as it
        is in CUDA graphs and under torch.compile, which look at every chunk. Parameters of its own
        get no gradient (an error). It may be called with rows that do not count, whose results are
        left out, and again by a second backward: then what it closes over must be as it was.
        Autocast is off around it.
    :param per_token: Tensors in the shape of targets (the entry of the target's position counts),
        or of targets less ``shift``; they may have more dimensions after those. fn is called with
        their rows, by name. They take no gradient.
    :param entropy: Whether fn takes the entropy of each row's distribution; it has a gradient.
    :param lse: Whether fn takes the log-sum-exp of each row's logits; it has a gradient.
    :param normalizer: What the sum is divided by, a number or a tensor of one: 1 for the sum, the
        number of tokens of all micro-batches. None: the number of tokens that count; where there
        is none the loss is NaN and gradients are zero.
    :param return_rows: Also return nll, and entropy and lse where fn takes them, by name, in the
        shape of targets less ``shift``, without gradients.
    :return: The loss, fp32 (fp64 for fp64 inputs). It is bitwise repeatable, if fn is.

    The other arguments are those of :func:`cutloss.linear_cross_entropy`. fp16 gradients are made
    in backward, as everywhere, which takes a fourth product or memory for the logits; so does
    torch.compile, under which fn is traced; and so does a classifier in shards
    (vocab_parallel_options, DTensor), for which fn and per_token must be the same on all ranks.
    """
    given = _rows.given(e, c, bias, targets, vocab_parallel_options)
    with given.exchange(shift) as of_shard:
        call = _rows.RowCall.of(
            given, of_shard, temperature, ignore_index=ignore_index, softcap=softcap, shift=shift,
            logit_scale=logit_scale, max_workspace=max_workspace, schedule=schedule,
            num_valid=num_valid, return_entropy=entropy, return_lse=lse,
            normalizer=normalizer if isinstance(normalizer, Tensor) else None,
        )  # fmt: skip
        checks.flags(return_rows=return_rows)
        if private.is_in_vmap():
            raise NotImplementedError(
                "linear_token_loss does not work inside torch.vmap: loop over the batch, or pass "
                "it as more rows of e and targets; cutloss.losses.token_log_probs works there"
            )
        if not callable(fn):
            raise TypeError(f"fn must be a function of nll, got {type(fn).__name__}")
        slices = _slices(per_token, given.targets, call.options.shift)
        names = tuple(name for name, is_taken in (("entropy", entropy), ("lse", lse)) if is_taken)
        if not torch.compiler.is_compiling():
            _row_function.check_parameters(fn, (*names, *slices))
        of_fn = FunctionOfRows(fn, names, slices, call.counts(), _normalizer(normalizer))
        if call.immediate:
            reads = [t for t in (*slices.values(), normalizer) if isinstance(t, Tensor)]
            loss, rows = by_rows.loss(
                call.operands, call.options, of_fn.begin, of_fn.undefined(), reads
            )
        else:
            rows = call.statistics()
            loss = of_fn.of_all(rows, any(call.options.needs))
    if not return_rows:
        return loss
    return loss, {k: t.detach().reshape(call.shape) for k, t in of_fn.statistics(rows).items()}


class FunctionOfRows:
    """A loss that is a sum of fn over rows; a by_rows.RowLoss after begin()."""

    def __init__(
        self,
        fn: RowFunction,
        names: tuple[str, ...],
        slices: dict[str, Tensor],
        counts: Tensor,
        normalizer: Tensor | float | None,
    ):
        self.fn = fn
        self.key = None if torch.compiler.is_compiling() else _function_key.key_of(fn)
        self.names = ("nll", *names)
        self.slices = slices
        self.counts = counts  # (N), bool
        self.is_mean = normalizer is None
        self.divisor = counts.sum() if normalizer is None else normalizer

    def undefined(self) -> Tensor | None:
        """Whether it is the mean of nothing."""
        return self.divisor == 0 if self.is_mean else None

    def statistics(self, at: Rows) -> dict[str, Tensor]:
        return {name: getattr(at, name) for name in self.names}

    def begin(self) -> "FunctionOfRows":
        self.total = torch.zeros((), dtype=torch.float64, device=self.counts.device)
        return self

    def coefficients(self, rows: by_rows.ChunkRows, at: Rows) -> Rows:
        taken = by_rows.leaves(**self.statistics(at))
        with torch.enable_grad():
            out = self._evaluate(taken, {k: t[rows.index] for k, t in self.slices.items()})
            total = torch.where(rows.is_row, out, 0.0).double().sum()
        self.total = self.total + total.detach()
        d = by_rows.derivatives(total, taken)
        by = self.divisor
        by = by.to(at.nll.dtype) if isinstance(by, Tensor) else by
        return Rows(**{name: g / by for name, g in d.items()})

    def value(self, at: Rows) -> Tensor:
        return (self.total / self.divisor).to(at.nll.dtype)

    def of_all(self, at: Rows, wants_gradient: bool) -> Tensor:
        """All rows at once, for gradients that are made in backward, or for none."""
        statistics, slices, counts = self.statistics(at), self.slices, self.counts
        if counts.device.type == "cpu" and not torch.compiler.is_compiling():
            chosen = counts.nonzero().squeeze(1)  # on a device their number is not known
            statistics = {k: t[chosen] for k, t in statistics.items()}
            slices = {k: t[chosen] for k, t in slices.items()}
            counts = counts[chosen]
        out = self._evaluate(statistics, slices, wants_gradient)
        return (torch.where(counts, out, 0.0).double().sum() / self.divisor).to(at.nll.dtype)

    def _evaluate(
        self, statistics: dict[str, Tensor], slices: dict[str, Tensor], wants_gradient: bool = True
    ) -> Tensor:
        out = _row_function.evaluate(self.fn, self.key, statistics, slices)
        if wants_gradient and not torch.compiler.is_compiling():
            _row_function.check_gradient(out, statistics)
        return out


def _slices(
    per_token: Mapping[str, Tensor] | None, targets: Tensor, shift: int
) -> dict[str, Tensor]:
    """By name, (N, ...)."""
    if per_token is None:
        return {}
    if not isinstance(per_token, Mapping):
        raise TypeError(
            f"per_token must be a dict of tensors by name, got {type(per_token).__name__}"
        )
    shapes = tuple(targets.shape), shape_of_rows(targets, shift)
    slices = {}
    for name, t in per_token.items():
        if name in ("nll", "entropy", "lse"):
            raise ValueError(f"per_token must not have an entry {name!r}: fn has its own")
        what = f"per_token[{name!r}]"
        if isinstance(t, TokenLogProbs):
            raise TypeError(f"{what} must be a tensor, got TokenLogProbs: pass its log_probs")
        checks.tensors(**{what: t})
        if private.requires_grad(t):
            raise ValueError(
                f"cutloss makes no gradient for {what}: pass it detached, or make the loss of "
                f"cutloss.losses.token_log_probs"
            )
        checks.same_device(targets, **{what: t})
        if t.shape[: targets.dim()] not in shapes:
            raise ValueError(
                f"{what} must begin with the shape of targets, {shapes[0]}"
                + (f", or of targets less the shift, {shapes[1]}" if shift else "")
                + f": got {checks.shape(t)}; one number a sequence is x[:, None].expand(B, L)"
            )
        if shift and t.shape[: targets.dim()] == shapes[0]:
            t = t.movedim(targets.dim() - 1, 0)[shift:].movedim(0, targets.dim() - 1)
        slices[name] = t.reshape(math.prod(shapes[1]), *t.shape[targets.dim() :])
    return slices


def _normalizer(value: float | Tensor | None) -> float | Tensor | None:
    if value is None:
        return None
    if isinstance(value, Tensor):
        if private.requires_grad(value):
            raise ValueError("cutloss makes no gradient for normalizer: pass it detached")
        if value.numel() != 1:
            raise ValueError(f"normalizer must be one number, got {checks.shape(value)}")
        if value.device.type == "cpu" and not torch.compiler.is_compiling():
            _arguments.positive("normalizer", value.item())
        return value.reshape(()).double()
    return _arguments.positive("normalizer", value)

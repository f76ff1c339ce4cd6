"""liger-kernel's losses of pairs: DPO, CPO, SimPO and ORPO. Chosen sequences first, as there."""

from torch import Tensor, nn

from .._core import checks
from ..functional import linear_cross_entropy
from ..losses import TokenLogProbs, cpo_loss, dpo_loss, token_log_probs
from ..losses import _arguments as args
from ..losses.cpo import odds_ratios
from ._liger_outputs import zero_for_nothing
from ._liger_sequences import averaged, check, logit_sums, reference_sums

Outputs = tuple[Tensor, tuple[Tensor, ...]]

_ORDER = "(lin_weight, _input, target)"

# Theirs; cutloss.losses.dpo_loss has more.
_DPO = (
    "sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero",
    "apo_down", "discopop",
)  # fmt: skip


class _Pairs(nn.Module):
    """What the four have in common: `forward` of each makes the loss of the pairs alone."""

    def __init__(
        self, ignore_index: int, beta: float, alpha: float, compute_nll_loss: bool, compiled: bool,
        average_log_prob: bool, chunk_size: int,
    ):  # fmt: skip
        super().__init__()
        checks.ignore_index(ignore_index)
        checks.flags(
            compute_nll_loss=compute_nll_loss, compiled=compiled, average_log_prob=average_log_prob
        )
        self.ignore_index = ignore_index
        self.beta = args.positive("beta", beta)
        self.alpha = args.finite("alpha", alpha)
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size

    def _log_probs(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None
    ) -> tuple[TokenLogProbs, TokenLogProbs]:
        """Of each token, and what sums of sequences are made of."""
        check(_ORDER, _input, lin_weight, target)
        tokens = token_log_probs(_input, lin_weight, target, bias, ignore_index=self.ignore_index)
        args.pairs(tokens)
        return tokens, averaged(tokens, self.average_log_prob)

    def _returned(
        self,
        loss: Tensor,
        nll: Tensor | None,
        policy: TokenLogProbs,
        logits: tuple[Tensor, Tensor, Tensor | None],
        reference: Tensor | float = 0.0,
        more: tuple[Tensor, ...] = (),
    ) -> Outputs:
        """`loss`: of the pairs. `logits`: what they are made of. `reference`: sums, (2 B)."""
        sums = policy.sum().detach()
        chosen, rejected = sums.chunk(2)
        rewards = (self.beta * (sums - reference)).chunk(2)
        _input, lin_weight, _ = logits
        each = max(sums.shape[0] // 2, 1) * _input.shape[1] * lin_weight.shape[0]
        means = (t.sum() / max(each, 1) for t in logit_sums(*logits).chunk(2))
        if nll is None:
            nll = loss.new_zeros(())
        else:
            loss = loss + self.alpha * nll
        return loss, (chosen, rejected, *means, nll.detach(), *rewards, *more)


class LigerFusedLinearDPOLoss(_Pairs):
    """``liger_kernel.chunked_loss.LigerFusedLinearDPOLoss``, by
    :func:`cutloss.losses.dpo_loss`.

    :param ignore_index: Targets of prompt and padding.
    :param beta: As cutloss's; more than 0.
    :param alpha: Weight of the chosen sequences' mean nll, where compute_nll_loss is True.
    :param compute_nll_loss: Add that.
    :param compiled: Not needed: nothing is compiled.
    :param use_ref_model: False: the reference's log-probabilities are 0.
    :param average_log_prob: Means over a sequence's tokens in place of sums.
    :param chunk_size: Not needed.
    :param loss_type: "sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard",
        "apo_zero", "apo_down" or "discopop".
    :param label_smoothing: For "exo_pair" and "robust". The others refuse it, where theirs do not
        look at it.
    :param discopop_tau: For "discopop".
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ):
        super().__init__(
            ignore_index, beta, alpha, compute_nll_loss, compiled, average_log_prob, chunk_size
        )
        checks.flags(use_ref_model=use_ref_model)
        if loss_type not in _DPO:
            raise ValueError(
                f"loss_type must be one of liger-kernel's, {', '.join(map(repr, _DPO))}, got "
                f"{loss_type!r}; for others call cutloss.losses.linear_loss('dpo', _input, "
                f"lin_weight, target, bias, reference=(ref_input, ref_weight), loss_type=...)"
            )
        self.use_ref_model = use_ref_model
        self.loss_type = loss_type
        self.label_smoothing = label_smoothing
        self.discopop_tau = discopop_tau

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> Outputs:
        """(V, D), (2 B, L, D), (2 B, L), (V), and the reference model's (2 B, L, D'), (V, D'), (V).
        The loss, and chosen and rejected log-probabilities (B), chosen and rejected mean logits,
        the nll (0 where it is not added), chosen and rejected rewards (B), without gradients."""
        tokens, policy = self._log_probs(lin_weight, _input, target, bias)
        reference = reference_sums(
            self.use_ref_model, (ref_input, ref_weight, ref_bias), target, self.ignore_index,
            self.average_log_prob, policy,
        )  # fmt: skip
        loss = dpo_loss(
            policy, reference, loss_type=self.loss_type, beta=self.beta,
            label_smoothing=self.label_smoothing, discopop_tau=self.discopop_tau,
        ).loss  # fmt: skip
        nll = args.chosen_nll(tokens) if self.compute_nll_loss else None
        return self._returned(loss, nll, policy, (_input, lin_weight, bias), reference)


class LigerFusedLinearCPOLoss(_Pairs):
    """``liger_kernel.chunked_loss.LigerFusedLinearCPOLoss``, by :func:`cutloss.losses.cpo_loss`.

    :param ignore_index: Targets of prompt and padding.
    :param beta: As cutloss's; more than 0.
    :param alpha: cutloss's ``cpo_alpha``.
    :param label_smoothing: As cutloss's.
    :param compute_nll_loss: False: as an alpha of 0.
    :param compiled: Not needed: nothing is compiled.
    :param average_log_prob: Means over a sequence's tokens in place of sums.
    :param chunk_size: Not needed.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ):
        super().__init__(
            ignore_index, beta, alpha, compute_nll_loss, compiled, average_log_prob, chunk_size
        )
        self.label_smoothing = label_smoothing

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Outputs:
        """(V, D), (2 B, L, D), (2 B, L) and (V). Returns what LigerFusedLinearDPOLoss returns."""
        tokens, policy = self._log_probs(lin_weight, _input, target, bias)
        loss = cpo_loss(
            policy, beta=self.beta, label_smoothing=self.label_smoothing, cpo_alpha=0.0
        ).loss
        nll = args.chosen_nll(tokens) if self.compute_nll_loss else None
        return self._returned(loss, nll, policy, (_input, lin_weight, bias))


class LigerFusedLinearSimPOLoss(_Pairs):
    """``liger_kernel.chunked_loss.LigerFusedLinearSimPOLoss``, by
    :func:`cutloss.losses.simpo_loss`. **By default with the chosen sequences' nll**, as theirs.

    :param ignore_index: Targets of prompt and padding.
    :param beta: As cutloss's; more than 0.
    :param alpha: cutloss's ``cpo_alpha``.
    :param label_smoothing: As cutloss's.
    :param compute_nll_loss: False: as an alpha of 0.
    :param compiled: Not needed: nothing is compiled.
    :param gamma: cutloss's ``simpo_gamma``.
    :param chunk_size: Not needed.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
    ):
        super().__init__(ignore_index, beta, alpha, compute_nll_loss, compiled, True, chunk_size)
        self.label_smoothing = label_smoothing
        self.gamma = gamma

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Outputs:
        """(V, D), (2 B, L, D), (2 B, L) and (V). Returns what LigerFusedLinearDPOLoss returns; its
        log-probabilities are means over a sequence's tokens."""
        tokens, policy = self._log_probs(lin_weight, _input, target, bias)
        loss = cpo_loss(
            tokens, loss_type="simpo", beta=self.beta, simpo_gamma=self.gamma,
            label_smoothing=self.label_smoothing, cpo_alpha=0.0,
        ).loss  # fmt: skip
        nll = args.chosen_nll(tokens) if self.compute_nll_loss else None
        return self._returned(loss, nll, policy, (_input, lin_weight, bias))


class LigerFusedLinearORPOLoss(_Pairs):
    """``liger_kernel.chunked_loss.LigerFusedLinearORPOLoss``, by :func:`cutloss.losses.orpo_loss`.

    :param ignore_index: Targets of prompt and padding.
    :param beta: The paper's lambda; more than 0.
    :param compute_nll_loss: False: the odds ratio's part alone.
    :param compiled: Not needed: nothing is compiled.
    :param chunk_size: Not needed.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
    ):
        super().__init__(ignore_index, beta, 1.0, compute_nll_loss, compiled, True, chunk_size)

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> Outputs:
        """(V, D), (2 B, L, D), (2 B, L), (V), and the targets of the nll, (2 B, L), where they are
        not those of the odds (they cost another loss of the chosen sequences). Returns what
        LigerFusedLinearDPOLoss returns, of means over a sequence's tokens, and then the mean
        log-sigmoid of the log odds ratio and the mean log odds ratio."""
        tokens, policy = self._log_probs(lin_weight, _input, target, bias)
        _, difference, log_ratio = odds_ratios(tokens)
        nll = self._nll(tokens, lin_weight, _input, bias, nll_target)
        means = args.mean(log_ratio.detach()), args.mean(difference.detach())
        return self._returned(
            -self.beta * args.mean(log_ratio), nll, policy, (_input, lin_weight, bias), more=means
        )

    def _nll(
        self,
        tokens: TokenLogProbs,
        lin_weight: Tensor,
        _input: Tensor,
        bias: Tensor | None,
        nll_target: Tensor | None,
    ) -> Tensor | None:
        if nll_target is None:
            return args.chosen_nll(tokens) if self.compute_nll_loss else None
        if not self.compute_nll_loss:
            raise ValueError(
                "compute_nll_loss is False, so nll_target would not be used: leave it out, or pass "
                "compute_nll_loss=True"
            )
        if nll_target.shape != tokens.mask.shape:
            raise ValueError(
                f"nll_target must be (2 B, L) as target is: got nll_target "
                f"{checks.shape(nll_target)} and target {checks.shape(tokens.mask)}"
            )
        B = tokens.mask.shape[0] // 2
        chosen = nll_target[:B]
        nll = linear_cross_entropy(
            _input[:B], lin_weight, chosen, bias, ignore_index=self.ignore_index
        )
        return zero_for_nothing(nll, chosen != self.ignore_index)

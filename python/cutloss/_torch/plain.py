"""The plain path: the same per-row outputs from stored logits, in ordinary PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core import checks
from .._core.options import Options
from .._core.weighting import Rows
from .softcap import capped


def statistics(
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_temperature: Tensor | None,
    class_weight: Tensor | None,
    options: Options,
    wants_lse: bool,
) -> Rows:
    """Arguments as those of the operator `statistics`."""
    stats = options.stats
    shift, ignore_index = options.shift, options.ignore_index
    V, D = c.shape
    target = targets[:, shift:].reshape(-1).long()
    if checks.may_look(target.device):
        checks.values(targets, row_temperature, shift, V, ignore_index, options.num_valid)
    valid = target != ignore_index

    # Ignored rows are zeroed before the product: a NaN there must not reach the gradient of C.
    rows = e[:, : e.shape[1] - shift].reshape(-1, D)
    rows = torch.where(valid[:, None], rows, 0.0)
    z = F.linear(rows, c).to(stats)
    if options.logit_scale != 1.0:
        z = z * options.logit_scale
    if bias is not None:
        z = z + bias.to(stats)
    z = capped(z, options.softcap)
    if row_temperature is not None:
        z = z / row_temperature[:, None]
    if options.temperature != 1.0:
        z = z / options.temperature

    def counted(t: Tensor) -> Tensor:
        return torch.where(valid, t, 0.0)

    nothing = z.new_empty(0)
    result = Rows(
        nll=F.cross_entropy(z, target, reduction="none", ignore_index=ignore_index),
        lse=counted(torch.logsumexp(z, dim=-1)) if wants_lse else nothing,
        log_sum=nothing,
        entropy=nothing,
        zbar_centred=nothing,
        argmax=torch.where(valid, z.argmax(-1), -1) if options.wants_argmax else nothing,
    )
    if options.wants_entropy:
        log_p = F.log_softmax(z, dim=-1)
        finite = log_p.masked_fill(log_p == -torch.inf, 0.0)
        result.entropy = counted(-(log_p.exp() * finite).sum(-1))
    if options.wants_zbar:
        centred = z - z.detach().amax(-1, keepdim=True)
        result.log_sum = counted(torch.logsumexp(centred, dim=-1))
        weighted = centred if class_weight is None else centred * class_weight
        result.zbar_centred = counted(weighted.sum(-1) / V)
    return result

"""What was decided for a loss, as fields."""

import dataclasses
import json


@dataclasses.dataclass(frozen=True)
class PlannedBuffer:
    """One buffer of a plan's memory.

    :param memory: The call that has it: "kept" (from forward to backward, or, where gradients are
        made with the loss, from a chunk's statistics to its gradients), "forward" or "backward".
    :param name: What it holds.
    :param bytes: Its size.
    :param lifetime: How long it holds it: "step" (within one step), "seam" (from a chunk's
        statistics to its gradients), "call", or "kept" (from forward to backward).
    :param lies_in: The memory that holds it where it has none of its own: another buffer, or a
        gradient ("dC"). Else empty.
    :param until: When that memory is needed for what it is there for. Else empty.
    """

    memory: str
    name: str
    bytes: int
    lifetime: str
    lies_in: str
    until: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was decided for a loss (:func:`plan`). ``str(plan)`` says it in words.

    :param engine: What computes it: "cpu", "cuda/library", "cuda/fused_sm90".
    :param algorithm: In which way: "cpu/by_rows".
    :param schedule: "rows", "vocabulary", or "none" where no gradient is wanted.
    :param in_forward: Whether gradients are made along with the loss.
    :param keeps_logits: Whether logits are kept from forward to backward.
    :param products: Matrix products of 2 N V D operations, forward and backward together.
    :param predicted_time: What the plan was chosen by: the time of forward and backward in such
        products, as the engine's tuning foretells it. Comparable within one engine only.
    :param rows: Rows of the loss, N.
    :param chunks: How many chunks of rows there are, and
    :param chunk_rows: the rows of each, whose statistics are made together.
    :param block_rows: Rows, and
    :param block_columns: columns of vocabulary, of one product of logits.
    :param gradient_rows: The same of the gradients' products, rows and
    :param gradient_columns: columns.
    :param kept_bytes: Memory from forward to backward,
    :param forward_bytes: beside it during forward, and
    :param backward_bytes: during backward.
    :param least_bytes: The least ``max_workspace`` with which there is a plan.
    :param ledger: The memory, buffer by buffer.
    :param reasons: A line for each engine and each way that was considered, gradients with the loss
        first.
    :param text: The plan in words, for people: they may change.
    """

    engine: str
    algorithm: str
    schedule: str
    in_forward: bool
    keeps_logits: bool
    products: int
    predicted_time: float
    rows: int
    chunks: int
    chunk_rows: int
    block_rows: int
    block_columns: int
    gradient_rows: int
    gradient_columns: int
    kept_bytes: int
    forward_bytes: int
    backward_bytes: int
    least_bytes: int
    ledger: tuple[PlannedBuffer, ...]
    reasons: tuple[str, ...]
    text: str

    @classmethod
    def of_fields(cls, fields: str) -> "Plan":
        """From what the library writes, JSON."""
        read = json.loads(fields)
        read["ledger"] = tuple(PlannedBuffer(**buffer) for buffer in read["ledger"])
        read["reasons"] = tuple(read["reasons"])
        return cls(**read)

    @property
    def peak_bytes(self) -> int:
        """The most memory that the loss takes beside its inputs and gradients, and beside packed
        copies of tensors whose rows the engine cannot read where they lie."""
        return self.kept_bytes + max(self.forward_bytes, self.backward_bytes)

    def __str__(self) -> str:
        """In words, with the reasons that a call has beside its plan's own."""
        own = self.text.rstrip("\n")
        return "\n".join([own, *(r for r in self.reasons if r not in own)])

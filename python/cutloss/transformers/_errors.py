"""The error of whoever asks for logits that are not there."""


class LogitsNotMadeError(NotImplementedError, AttributeError):
    """Something asked for logits that cutloss did not make. (An AttributeError, since hasattr may
    be what asks.)"""

    def __init__(self, what: str):
        super().__init__(
            f"{what} of logits that were not made: cutloss.patch computes the loss of this model "
            f"without them, and knows a scale (a number, or a tensor of one), a vector of one "
            f"number for each class that is added, one tanh, dtypes, what transposes, groups or "
            f"picks positions and leaves the vocabulary whole, and F.cross_entropy, or log_softmax "
            f"with F.nll_loss. Where the logits are wanted call the model with "
            f"return_logits=True, or cutloss.unpatch it"
        )

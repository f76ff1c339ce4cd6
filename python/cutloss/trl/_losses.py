"""The losses of TRL's trainers that are functions of logits there, and of hidden states here.

Each is put right before the class of TRL among the bases of a trainer, so that a class of a user
in front of both, whose compute_loss calls super()'s, gets it too.
"""

import functools
import types

import torch
from torch import Tensor

from ..losses import linear_distillation
from ..transformers import _operands
from ..transformers._patch import unwrapped
from ..transformers._unmade_logits import UnmadeLogits
from ._head import add_fused_lm_head, label_smoothing, version


def bases(trainer: type) -> tuple[type, ...]:
    """The trainer, and in front of each class of TRL below it the one with its loss."""
    losses = {
        "trl.trainer.sft_trainer.SFTTrainer": _SFT,
        "trl.experimental.gkd.gkd_trainer.GKDTrainer": _GKD,
    }
    found = [trainer]
    for kind in trainer.__mro__:
        loss = losses.get(f"{kind.__module__}.{kind.__qualname__}")
        if loss is _GKD:
            _check_divergence_of_its_own(trainer, kind)
        if loss is not None:
            found.append(_with_loss(loss, kind))
        if loss is not None and kind is trainer:
            found.remove(trainer)  # since no class may stand before one that derives from it
    return tuple(found)


@functools.cache
def _with_loss(loss: type, kind: type) -> type:
    return type(f"{loss.__name__}Loss", (loss, kind), {"__module__": __name__})


class _SFT:
    """Label smoothing, which TRL leaves to Transformers' LabelSmoother, of logits."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.compute_loss_func is not None:
            raise NotImplementedError(
                f"compute_loss_func is {self.compute_loss_func}: {version()} gives it the model's "
                f"logits, which would be made in every step. Derive a class from SFTTrainer whose "
                f"compute_loss makes the loss of model(**inputs, fused_lm_head=True).log_probs and "
                f"pass it to with_cutloss, use a function of cutloss.losses in a loop of your own, "
                f"or take trl's own trainer"
            )
        if self._smoothing() and self.aux_loss_enabled:
            raise NotImplementedError(
                f"label_smoothing_factor={self.label_smoother.epsilon} with "
                f"router_aux_loss_coef={self.router_aux_loss_coef} on a mixture of experts: "
                f"{version()} leaves the auxiliary loss out of a smoothed loss, which cutloss does "
                f"not; set one of them to 0, or use trl's own trainer"
            )

    def _smoothing(self) -> float:
        """Where TRL's compute_loss would call the label_smoother."""
        if self.label_smoother is None or self.args.loss_type != "nll":
            return 0.0
        return self.label_smoother.epsilon

    def compute_loss(self, *args, **kwargs):
        smoothing, smoother = self._smoothing(), self.label_smoother
        if not smoothing:
            return super().compute_loss(*args, **kwargs)
        self.label_smoother = None  # so TRL's takes its loss from log_probs
        try:
            with label_smoothing(smoothing):
                return super().compute_loss(*args, **kwargs)
        finally:
            self.label_smoother = smoother


class _GKD:
    """The generalised Jensen-Shannon divergence of student and teacher."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._check_formula()
        # TRL has prepared the teacher by now, which compiles it under torch_compile.
        teacher = self.accelerator.unwrap_model(self.teacher_model, keep_torch_compile=False)
        add_fused_lm_head(unwrapped(teacher))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs:  # an evaluation that wants logits
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        self.teacher_model.eval()
        with torch.no_grad():
            teacher = self.teacher_model(**given, of_unmade_logits=lambda logits: logits)

        def divergence(student: UnmadeLogits) -> Tensor:
            return _divergence(student, teacher, inputs["labels"], self.beta, num_items_in_batch)

        # Within the student's forward, where DDP sees it and FSDP has the classifier gathered.
        return model(**given, of_unmade_logits=divergence)

    def _check_formula(self) -> None:
        """Raises NotImplementedError unless TRL's own compute_loss, called with small random
        logits, gives the loss and the gradient that this class computes for the same logits."""
        draw = torch.Generator().manual_seed(0)
        of_student, of_teacher = torch.randn(2, 2, 5, 7, generator=draw, dtype=torch.float64) * 2
        labels = torch.tensor([[-100, 1, 2, 3, -100], [-100, -100, 4, 5, 6]])
        inputs = dict(input_ids=labels.clamp(0), attention_mask=labels.clamp(1, 1), labels=labels)
        teacher = self.teacher_model
        for items in (None, 11):
            ours = of_student.clone().requires_grad_()
            one = torch.eye(7, dtype=torch.float64)
            got = _jsd(ours, one, of_teacher, one, labels, self.beta, items)
            theirs = of_student.clone().requires_grad_()
            self.teacher_model = _Logits(of_teacher)
            try:
                want = super().compute_loss(
                    _Logits(theirs), dict(inputs), num_items_in_batch=items
                )
            except Exception as error:
                raise NotImplementedError(
                    f"GKDTrainer of {version()} computes its loss in a way that cutloss does not "
                    f"know (see above): use trl's own trainer, or trl==1.16.0"
                ) from error
            finally:
                self.teacher_model = teacher
            (got_grad,), (want_grad,) = (
                torch.autograd.grad(loss, z) for loss, z in ((got, ours), (want, theirs))
            )
            same = torch.allclose(got, want, rtol=1e-6, atol=1e-9)
            if not (same and torch.allclose(got_grad, want_grad, rtol=1e-6, atol=1e-9)):
                raise NotImplementedError(
                    f"on made-up logits GKDTrainer's loss is {want.item():.7g} with {version()}, "
                    f"and {got.item():.7g} with cutloss, or its gradient is another: use trl's own "
                    f"trainer, or trl==1.16.0"
                )


def _check_divergence_of_its_own(trainer: type, kind: type) -> None:
    if trainer.generalized_jsd_loss is not kind.generalized_jsd_loss:
        raise NotImplementedError(
            f"{trainer.__name__} has a generalized_jsd_loss of its own, a function of logits, "
            f"which cutloss would not call: leave it out, or use {trainer.__name__} as it is; "
            f"cutloss.losses.linear_distillation has other divergences, for a loop of your own"
        )


class _Logits:
    """In place of a model."""

    def __init__(self, logits: Tensor):
        self.logits = logits

    def eval(self) -> None:
        pass

    def __call__(self, **inputs):
        return types.SimpleNamespace(logits=self.logits)


def _divergence(
    student: UnmadeLogits,
    teacher: UnmadeLogits,
    labels: Tensor,
    beta: float,
    num_items_in_batch: Tensor | int | None,
) -> Tensor:
    """With both classifiers where their weights are: the teacher's outside, without gradients."""
    wants_gradients = torch.is_grad_enabled()

    def of_teacher(te, tc, teacher_bias, logit_scale, softcap):
        transform = dict(
            teacher_bias=teacher_bias, teacher_logit_scale=logit_scale, teacher_softcap=softcap
        )

        def of_student(e, c, bias, logit_scale, softcap):
            more = dict(bias=bias, logit_scale=logit_scale, softcap=softcap, **transform)
            targets = labels.to(c.device)
            return _jsd(e, c, te, tc, targets, beta, num_items_in_batch, **more)

        with torch.set_grad_enabled(wants_gradients):
            return _operands.evaluate(student, of_student)

    with torch.no_grad():
        return _operands.evaluate(teacher, of_teacher)


def _jsd(
    e: Tensor,
    c: Tensor,
    teacher_e: Tensor,
    teacher_c: Tensor,
    labels: Tensor,
    beta: float,
    num_items_in_batch: Tensor | int | None,
    **more,
) -> Tensor:
    result = linear_distillation(
        e, c, teacher_e, teacher_c, labels, divergence="jsd", beta=beta, shift=1,
        num_items_in_batch=num_items_in_batch, **more,
    )  # fmt: skip
    return result.loss

"""The same training run once with cutloss and once with plain PyTorch, step by step in turn."""

import contextlib
import dataclasses
import time

import torch

from cutloss.cli.bench.methods import synchronise
from cutloss.cli.demo.model import LanguageModel
from cutloss.cli.usage import UserError

WARM_UP = 10  # steps over which the learning rate rises


@dataclasses.dataclass
class Setting:
    V: int
    D: int
    layers: int
    length: int  # tokens of a sequence
    batch: int  # sequences of a step
    learning_rate: float
    dtype: str  # fp32, or bf16: autocast, with the parameters in fp32
    device: str
    seed: int

    @property
    def tokens(self):
        return self.batch * self.length


class Batches:
    """Random windows of the text; both runs see the same ones."""

    def __init__(self, ids, setting):
        needed = setting.length + 1
        if len(ids) < needed:
            raise UserError(
                f"the text has {len(ids)} tokens; a sequence and its next word need {needed}"
            )
        self._ids = torch.tensor(ids)
        self._windows = len(ids) - setting.length
        self._setting = setting
        self._random = torch.Generator().manual_seed(setting.seed)

    def next(self):
        """Inputs and targets, (batch, length) each."""
        s = self._setting
        starts = torch.randint(self._windows, (s.batch,), generator=self._random)
        windows = torch.stack([self._ids[i : i + s.length + 1] for i in starts.tolist()])
        return windows[:, :-1].to(s.device), windows[:, 1:].to(s.device)


class Run:
    """One model, its optimizer, and the loss it is trained with."""

    def __init__(self, name, loss_function, setting):
        self.name = name
        self.losses = []
        self.loss_seconds = []  # forward and backward of the loss
        self.step_seconds = []
        self.loss_function = loss_function
        self.setting = setting
        torch.manual_seed(setting.seed)  # every run starts from the same parameters
        model = LanguageModel(setting.V, setting.D, setting.layers, setting.length)
        self.model = model.to(setting.device)
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=setting.learning_rate, betas=(0.9, 0.95), fused=True
        )

    def step(self, inputs, targets):
        start = self._now()
        warm_up = min(1.0, (len(self.losses) + 1) / WARM_UP)
        for group in self._optimizer.param_groups:
            group["lr"] = self.setting.learning_rate * warm_up
        with autocast(self.setting):
            hidden = self.model(inputs)
        # The graph is cut at E, so that the loss can be timed alone; the gradient then goes on.
        e = hidden.detach().requires_grad_()
        before = self._now()
        with autocast(self.setting):
            loss = self.loss_function(e, self.model.classifier, targets)
        loss.backward()
        after = self._now()
        hidden.backward(e.grad)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.item())
        self.loss_seconds.append(after - before)
        self.step_seconds.append(self._now() - start)

    def _now(self):
        synchronise(self.setting.device)
        return time.perf_counter()


def autocast(setting):
    if setting.dtype == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(setting.device, torch.bfloat16)


def train(runs, batches, steps, seconds, report):
    """Steps every run in turn until the steps or the seconds are used up; report after each."""
    end = time.monotonic() + seconds
    for step in range(steps):
        inputs, targets = batches.next()
        # Whoever goes first alternates: neither always finds the other's data in the caches.
        for run in runs if step % 2 == 0 else reversed(runs):
            run.step(inputs, targets)
        report(step + 1)
        if time.monotonic() > end:
            return


@dataclasses.dataclass
class Agreement:
    """Two losses at the same parameters and batch: differences by ‖a - b‖ / ‖b‖."""

    loss: float
    de: float
    dc: float


def agreement(run, ours, plain, batches):
    inputs, targets = batches.next()
    with torch.no_grad(), autocast(run.setting):
        hidden = run.model(inputs)
    results = []
    for loss_function in (ours, plain):
        e = hidden.detach().clone().requires_grad_()
        c = run.model.classifier.detach().clone().requires_grad_()
        with autocast(run.setting):
            loss = loss_function(e, c, targets)
        loss.backward()
        results.append((loss.detach(), e.grad, c.grad))
    return Agreement(*(_distance(a, b) for a, b in zip(*results)))


def _distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()

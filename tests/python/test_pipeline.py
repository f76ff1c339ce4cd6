"""torch.distributed.pipelining: two stages in two processes, eight microbatches, the head on the
last stage. Gradients are those of plain PyTorch on the whole batch, unpipelined; and of the
gradients of C only one is held, whatever the number of microbatches in flight."""

import copy
import ctypes
import json
import pathlib
import runpy

import processes
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import checks
from tolerance import assert_near
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from cutloss import LinearCrossEntropyLoss
from cutloss.cli.bench import record

V, D, LENGTH, MICROBATCHES = 8009, 16, 9, 8
SIZE_OF_DC = V * D * 4


class First(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.mid = nn.Linear(D, D)

    def forward(self, x):
        return torch.tanh(self.mid(self.embedding(x)))


class Last(nn.Module):
    """The loss is made of what comes out."""

    def __init__(self, schedule):
        super().__init__()
        self.mid = nn.Linear(D, D)
        self.head = LinearCrossEntropyLoss(D, V, shift=1, schedule=schedule)

    def forward(self, hidden):
        return torch.tanh(self.mid(hidden))


class LastWithLoss(Last):
    """The loss comes out: as FSDP needs it, which gathers the head's weight in forward."""

    def forward(self, hidden, labels, tokens):
        return self.head(super().forward(hidden), labels, num_items_in_batch=tokens[0])


def make(world, tied, schedule, kind=Last):
    """Both stages, the same in every process."""
    torch.manual_seed(1)
    first, last = First(), kind(schedule)
    if tied:
        with torch.no_grad():
            last.head.weight.copy_(first.embedding.weight)
    return first.to(world.device), last.to(world.device)


def batch(world, ignored):
    g = torch.Generator().manual_seed(2)
    x = torch.randint(0, V, (2 * MICROBATCHES, LENGTH), generator=g)
    labels = x.masked_fill(torch.rand(x.shape, generator=g) < ignored, -100)
    return x.to(world.device), labels.to(world.device)


def plain_gradients(first, last, x, labels, tied):
    """In the order of the parameters of both. Tied: for either weight the sum over both."""
    first, last = copy.deepcopy(first), copy.deepcopy(last)
    logits = F.linear(Last.forward(last, first(x)), last.head.weight)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
    if tied:
        both = first.embedding.weight.grad + last.head.weight.grad
        first.embedding.weight.grad = last.head.weight.grad = both
    return [[p.grad for p in module.parameters()] for module in (first, last)]


def compare(stage, expected):
    for (name, p), want in zip(stage.submod.named_parameters(), expected, strict=True):
        assert_near(p.grad, want, name)


def stage_of(world, modules):
    return PipelineStage(modules[world.rank], world.rank, world.size, world.device)


def check_gradients(world, pipeline, tied, schedule):
    """Microbatches with different numbers of tokens: each adds its part of the mean over all."""
    modules = make(world, tied, schedule)
    x, labels = batch(world, ignored=0.6)
    tokens = (labels[:, 1:] != -100).sum()
    stage = stage_of(world, modules)
    head = modules[1].head

    def loss_fn(hidden, labels):
        return head(hidden, labels, num_items_in_batch=tokens)

    steps = pipeline(stage, n_microbatches=MICROBATCHES, loss_fn=loss_fn, scale_grads=False)
    optimizer = torch.optim.SGD(stage.submod.parameters(), lr=0.5)
    for _ in range(2):
        expected = plain_gradients(*modules, x, labels, tied)
        optimizer.zero_grad()
        if stage.is_first:
            steps.step(x)
        else:
            losses = []
            steps.step(target=labels, losses=losses, return_outputs=False)
            assert len(losses) == MICROBATCHES
        if tied:
            weight = modules[0].embedding.weight if stage.is_first else head.weight
            dist.all_reduce(weight.grad)  # among the processes that hold it
        compare(stage, expected[world.rank])
        optimizer.step()
        for module in modules:  # for the reference of the next step, what the other has
            for p in module.parameters():
                dist.broadcast(p.detach(), int(module is modules[1]))


def check_means(world, pipeline):
    """As many tokens in each: the mean of means, which the pipeline divides itself."""
    modules = make(world, False, "vocabulary")
    x, labels = batch(world, ignored=0.0)
    stage = stage_of(world, modules)
    steps = pipeline(stage, n_microbatches=MICROBATCHES, loss_fn=modules[1].head)
    steps.step(x) if stage.is_first else steps.step(target=labels, return_outputs=False)
    compare(stage, plain_gradients(*modules, x, labels, False)[world.rank])


def check_loss_in_the_stage(world, pipeline, schedule):
    modules = make(world, False, schedule, LastWithLoss)
    x, labels = batch(world, ignored=0.6)
    tokens = (labels[:, 1:] != -100).sum().expand(MICROBATCHES)  # one for each microbatch
    stage = stage_of(world, modules)
    steps = pipeline(
        stage, n_microbatches=MICROBATCHES, loss_fn=lambda loss, _: loss, scale_grads=False
    )
    if stage.is_first:
        steps.step(x)
    else:
        steps.step(target=labels, labels=labels, tokens=tokens, return_outputs=False)
    compare(stage, plain_gradients(*modules, x, labels, False)[world.rank])


# Memory -------------------------------------------------------------------------------------------


class _Mallinfo2(ctypes.Structure):
    NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES.split()]


def bytes_in_use(device):
    if device.type == "cuda":
        return torch.cuda.memory_allocated()
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    info = mallinfo2()
    return info.uordblks + info.hblkhd


# Gradients of C that are held for each microbatch more that went forward: of the loss "by rows",
# which makes them in forward, GPipe holds them all, and 1F1B that of one microbatch.
HELD = {
    (ScheduleGPipe, "rows"): 1,
    (ScheduleGPipe, "vocabulary"): 0,
    (Schedule1F1B, "rows"): 0,
    (Schedule1F1B, "vocabulary"): 0,
}


def check_memory(world, pipeline, schedule):
    modules = make(world, False, schedule)
    x, labels = batch(world, ignored=0.0)
    stage = stage_of(world, modules)
    held = []

    def loss_fn(hidden, labels):
        loss = modules[1].head(hidden, labels)
        held.append(bytes_in_use(world.device))
        return loss

    steps = pipeline(stage, n_microbatches=MICROBATCHES, loss_fn=loss_fn)
    for _ in range(2):  # in the second C has its gradient
        held.clear()
        steps.step(x) if stage.is_first else steps.step(target=labels, return_outputs=False)
    if stage.is_last:
        each = (held[-1] - held[1]) / (MICROBATCHES - 2) / SIZE_OF_DC
        assert abs(each - HELD[pipeline, schedule]) < 0.1, [h / SIZE_OF_DC for h in held]


def check_backward_in_two_parts(world, schedule):
    """As pipelines without a bubble do it: input first, weights later."""
    _, last = make(world, False, schedule)
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, LENGTH, D, generator=g).to(world.device).requires_grad_()
    labels = torch.randint(0, V, (2, LENGTH), generator=g).to(world.device)

    def loss():
        return last.head(last(hidden), labels)

    want = torch.autograd.grad(loss(), [hidden, *last.parameters()])
    (d_hidden,), groups = stage_backward_input([loss()], None, [hidden], last.parameters())
    stage_backward_weight(last.parameters(), groups)
    got = [d_hidden, *(p.grad for p in last.parameters())]
    for i in range(len(want)):
        assert torch.equal(got[i], want[i])


# The benchmark ------------------------------------------------------------------------------------

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "benchmarks" / "pipeline_memory.py"
TINY = """--layers 4 --dim 64 --heads 4 --kv-heads 2 --ffn 128 --vocabulary 503 --sequence 32
--microbatches 4 --dtype bf16-autocast""".split()
EXPECTED = {"plain": "none", "cutloss": "rows", "cutloss-vocabulary": "vocabulary"}


def check_lines(lines, stage):
    """Those of one process. The script raises where the losses of its methods differ."""
    assert [problem for line in lines for problem in record.problems(line)] == []
    found = [(r["pipeline"], r["schedule"], r["stage"][:6]) for r in lines]
    expected = EXPECTED.values()
    assert found == [(p, s, f"{stage} of 2") for p in ("gpipe", "1f1b") for s in expected]


def check_the_benchmark(world):
    script = runpy.run_path(str(SCRIPT))
    how = ["--device", world.device.type, "--stages", "2", "--methods", ",".join(EXPECTED)]
    lines = script["measure_all"](script["parsed"]([*TINY, *how]))
    check_lines(lines, world.rank + 1)


SCHEDULES = ("rows", "vocabulary")
PIPELINES = (ScheduleGPipe, Schedule1F1B)
CHECKS = [
    *checks(check_memory, PIPELINES, SCHEDULES),
    *checks(check_gradients, PIPELINES, (False, True), SCHEDULES),
    *checks(check_means, PIPELINES),
    *checks(check_loss_in_the_stage, PIPELINES, SCHEDULES),
]
if torch.__version__ >= (2, 12):  # before, torch's own two parts took no autograd function of Python's
    CHECKS += checks(check_backward_in_two_parts, SCHEDULES)
if SCRIPT.exists():
    CHECKS += checks(check_the_benchmark)


BY_SIZE = {2: CHECKS}
on_cpu = processes.results_of(BY_SIZE)
on_cuda = processes.results_of(BY_SIZE, "cuda")


@processes.each(BY_SIZE)
def test_cpu(on_cpu, size, check):
    on_cpu.passed(size, check)


@processes.needs_two_devices
@processes.each(BY_SIZE)
def test_cuda(on_cuda, size, check):
    on_cuda.passed(size, check)


@pytest.mark.skipif(not SCRIPT.exists(), reason="no benchmarks beside the tests")
def test_the_benchmark_of_a_stage_alone(tmp_path):
    results = tmp_path / "results.json"
    how = ["--device", "cpu", "--methods", ",".join(EXPECTED), "--json", str(results)]
    runpy.run_path(str(SCRIPT))["main"]([*TINY, *how])
    check_lines([json.loads(line) for line in results.read_text().splitlines()], 2)

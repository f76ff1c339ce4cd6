"""DeepSpeed, in two processes on the CPU: ZeRO-3 takes each weight away after the forward of its
module, and has to bring it back for backward. The weights after three steps are those of plain
PyTorch in one process, on all batches."""

import copy
import importlib.util
import os
import sys
import tempfile

import pytest
import torch
from helpers import processes
from helpers.processes import checks
from helpers.small_model import Model, batch, joined, make, plain_loss
from helpers.tolerance import assert_near

from cutloss import linear_cross_entropy

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)

STEPS, RATE = 3, 0.5


class WithTheFunction(Model):
    """The weight of another module, as an argument."""

    def forward(self, x, labels):
        bias = self.head.bias
        return linear_cross_entropy(self.body(x), self.head.weight, labels, bias, shift=1)


def engine_of(model, stage, **config):
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,  # its default is 1
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Its default keeps small weights whole everywhere.
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        **config,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def plain_training(model, batches):
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        plain_loss(model, *joined(batches)).backward()
        optimizer.step()
    return dict(model.named_parameters())


def start():
    os.environ["DS_ACCELERATOR"] = "cpu"  # read when it is imported
    import deepspeed

    # What it would compile here makes reductions quicker, and nothing else.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    deepspeed.init_distributed(verbose=False)


def check_zero(world, stage, kind, tied, schedule):
    start()
    import deepspeed

    torch.manual_seed(1)
    model = kind(tied, schedule=schedule)
    batches = [batch(10 + rank) for rank in range(world.size)]
    expected = plain_training(model, batches)
    engine = engine_of(model, stage)
    if stage == 3:
        assert model.head.weight.numel() == 0
        match = r"ZeRO-3 .* \(101, 16\) when whole: .* in the forward"
        with pytest.raises(ValueError, match=match):
            linear_cross_entropy(torch.randn(3, 16), model.head.weight, torch.arange(3))
    for _ in range(STEPS):
        engine.backward(engine(*batches[world.rank]))
        engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        for name, p in model.named_parameters():
            assert_near(p, expected[name], name)


def check_backward_without_the_weight(world, schedule):
    """The weight was gathered by hand, for forward alone."""
    start()
    import deepspeed

    model = make(False, schedule=schedule)
    engine_of(model, 3)
    e = torch.randn(3, 16, requires_grad=True)
    with deepspeed.zero.GatheredParameters([model.head.weight]):
        loss = linear_cross_entropy(e, model.head.weight, torch.arange(3), schedule=schedule)
    with pytest.raises(RuntimeError, match=r"c is \(0,\) in backward.*\(V, 16\).*ZeRO-3"):
        loss.backward()


def check_saved_weights(world, stage, tied):
    """A head loads what DeepSpeed saves, with the names of its state_dict."""
    start()
    model, other = make(tied), make(tied)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    engine = engine_of(model, stage)
    with tempfile.TemporaryDirectory() as folder:
        engine.save_16bit_model(folder, "weights.bin")
        if world.rank == 0:
            saved = torch.load(f"{folder}/weights.bin")
            assert "head.output_embeddings.weight" in saved
            torch.nn.init.zeros_(other.head.weight)
            other.load_state_dict(saved, strict=True)
            for name, value in other.state_dict().items():
                assert torch.equal(value, values[name]), name


SCHEDULES = ("rows", "vocabulary")
CHECKS = [
    *checks(check_zero, (3,), (Model, WithTheFunction), (False, True), SCHEDULES),
    *checks(check_zero, (1, 2), (Model,), (True,), SCHEDULES[:1]),
    *checks(check_backward_without_the_weight, SCHEDULES),
    *checks(check_saved_weights, (2, 3), (False, True)),
]


BY_SIZE = {2: CHECKS}
test_cpu = processes.on_cpu(BY_SIZE)

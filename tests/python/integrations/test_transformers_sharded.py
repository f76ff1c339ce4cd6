"""A patched model under DistributedDataParallel and fully_shard, in two processes on the CPU."""

import pytest
import torch.distributed as dist
from helpers import processes
from helpers.architectures import batch, make
from helpers.patched import NoLogits
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import cutloss


def wrapped(model, how):
    if how == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))  # also where there is a GPU
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if how == "fsdp_head":  # its weight is whole only while it is called
        fully_shard(model.lm_head, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def check_like_one_process(world, how):
    """Loss and gradients are those of one process with all sequences."""
    stock, inputs = make("LlamaForCausalLM"), batch()
    items = (inputs["labels"][:, 1:] != -100).sum().item()
    loss = stock(**inputs, num_items_in_batch=items).loss
    loss.backward()
    model = wrapped(cutloss.patch(make("LlamaForCausalLM")), how)
    mine = {k: v[world.rank : world.rank + 1] for k, v in inputs.items()}
    with NoLogits():
        part = model(**mine, num_items_in_batch=items / 2).loss  # gradients are averaged over two
        part.backward()
    whole = part.detach().clone()
    dist.all_reduce(whole)
    worst = abs(whole.item() / 2 - loss.item())
    for p, q in zip(model.parameters(), stock.parameters(), strict=True):
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        worst = max(worst, (grad - q.grad).abs().max().item())
    assert worst < 1e-5


CHECKS = processes.checks(check_like_one_process, ("ddp", "fsdp_root", "fsdp_head"))
results = processes.Results({2: CHECKS})


@pytest.mark.parametrize(
    "module", ["torch.distributed.fsdp._fully_shard._fsdp_state", "deepspeed.runtime.zero"]
)
def test_hooks_that_gather_are_called_for_the_layer_alone(module):
    """Once for what stands for the logits, once for the loss, with rows of the batch, which each
    gather and free a weight that is sharded."""
    calls = []

    def before(layer, args):
        calls.append(args[0].numel())

    def after(layer, args, output):
        calls.append(args[0].numel())

    before.__module__ = after.__module__ = module
    model, inputs = make("LlamaForCausalLM").train(), batch()
    model.lm_head.register_forward_pre_hook(before)
    model.lm_head.register_forward_hook(after)
    cutloss.patch(model)
    sizes = set(calls)
    assert sizes == {2 * 4 * 32}  # of the tiny batch that it compares
    for _ in range(2):
        calls.clear()
        model(**inputs).loss.backward()
        assert calls == [inputs["input_ids"].numel() * 32] * 4


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_two_processes(tmp_path_factory, check):
    results.passed(tmp_path_factory, 2, check)

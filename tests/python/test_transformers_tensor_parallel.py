"""A patched model whose classifier parallelize_module has sharded by its classes, in two processes
and under fully_shard in four: loss and gradients are those of the unpatched model in one."""


import peft
import processes
import pytest
import torch
from architectures import batch, make
from processes import checks
from test_transformers import NoLogits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleOutput,
    parallelize_module,
)
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

import cutloss
from cutloss.trl import _head as _trl_head

LLAMA = "LlamaForCausalLM"


def whole(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def single(kind, inputs, **options):
    model = make(kind).train()
    loss = model(**inputs, **options).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def agree(model, loss, want, world):
    assert abs(loss.item() - want[0].item()) < 1e-5 * (1 + abs(want[0].item()))
    grads = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    for name, expected in want[1].items():
        if name in grads:
            assert (grads[name] - expected).abs().max() < 1e-5, name
    assert any("layers.0" in name for name in grads)


PLANS = {
    "gathered": {"lm_head": ColwiseParallel(output_layouts=Replicate())},
    "sequence": {
        "model.norm": PrepareModuleOutput(
            output_layouts=Replicate(), desired_output_layouts=Shard(1)
        ),
        "lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    },
}


def untied(kind):
    """With a classifier of its own: parallelize_module leaves the embedding whole."""
    model = make(kind)
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    return model


def check_loss(world, kind, plan, when):
    inputs = batch()
    stock = untied(kind).train()
    loss = stock(**inputs).loss
    loss.backward()
    want = loss.detach(), {n: p.grad for n, p in stock.named_parameters() if p.grad is not None}
    model = untied(kind).train()
    if when == "patched first":
        cutloss.patch(model)
    parallelize_module(model, world.mesh, PLANS[plan])
    if when == "patched last":
        cutloss.patch(model)
    for _ in range(2):
        model.zero_grad()
        with NoLogits():
            loss = model(**inputs).loss
            loss.backward()
        agree(model, loss, want, world)
        assert model.lm_head.weight.grad.placements == (Shard(0),)
    model.eval()
    with torch.no_grad():
        logits, expected = model(**inputs).logits, stock.eval()(**inputs).logits
    assert (logits - expected).abs().max() < 1e-5
    cutloss.unpatch(model)


def check_options(world):
    """Of the patch and of the call."""
    inputs = batch()
    options = dict(z_loss=1e-2, label_smoothing=0.1)
    want = cutloss.patch(untied(LLAMA).train(), **options)(**inputs, num_items_in_batch=5).loss
    model = parallelize_module(untied(LLAMA).train(), world.mesh, PLANS["gathered"])
    cutloss.patch(model, **options)
    loss = model(**inputs, num_items_in_batch=5).loss
    assert abs(loss - want) < 1e-5


def check_head_of_trl(world, kind):
    """What TRL's trainers ask of a model: every number of every token."""
    inputs = {k: v for k, v in batch().items() if k != "attention_mask"}
    results = []
    for plan in (None, PLANS["gathered"]):
        model = untied(kind).train()
        if plan is not None:
            parallelize_module(model, world.mesh, plan)
        _trl_head.add_fused_lm_head(model, temperature=0.8, outputs=_trl_head._OUTPUTS)
        made = model(**inputs, fused_lm_head=True)
        made.loss.backward()
        results.append([made.loss, *(getattr(made, name) for name in _trl_head._OUTPUTS)])
        results[-1].append(whole(model.lm_head.weight.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


def check_refusals(world):
    def refused(error, match, model, **options):
        with pytest.raises(error, match=match):
            cutloss.patch(model, **options)

    # Logits of some classes, of which the model's own loss can not be right.
    local = parallelize_module(untied(LLAMA), world.mesh, {"lm_head": ColwiseParallel()})
    refused(RuntimeError, "which the model itself can not take", local)
    # Of Transformers' own plan, which puts a forward over the layer's.
    of_plan = untied(LLAMA)
    for name in ("lm_head", "lm_head.weight"):
        apply_tensor_parallelism(of_plan, world.mesh, {name: "colwise_gather_output"})
    refused(NotImplementedError, "tp_plan.*by .*parallelize_module", of_plan)
    # A weight that somebody sharded without a plan for what goes in.
    by_hand = untied(LLAMA).train()
    sharded = distribute_tensor(by_hand.lm_head.weight.detach(), world.mesh, [Shard(0)])
    by_hand.lm_head.weight = nn.Parameter(sharded)
    cutloss.patch(by_hand, verify=False)
    with pytest.raises(NotImplementedError, match="is a DTensor.*leave the head out"):
        by_hand(**batch())
    # An adapter of a classifier in shards.
    config = peft.LoraConfig(target_modules=["lm_head"], r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(untied(LLAMA), config).train()
    plan = {"base_model.model.lm_head.base_layer": ColwiseParallel(output_layouts=Replicate())}
    parallelize_module(adapted, world.mesh, plan)
    cutloss.patch(adapted, verify=False)
    with pytest.raises(NotImplementedError, match="sharded by its classes.*an adapter"):
        adapted(**batch())


def check_fsdp(world, wrapped):
    mesh = init_device_mesh(world.device.type, (2, 2), mesh_dim_names=("dp", "tp"))
    inputs = batch()
    items = (inputs["labels"][:, 1:] != -100).sum().item()
    want = single(LLAMA, inputs, num_items_in_batch=items)
    model = untied(LLAMA).train()
    parallelize_module(model, mesh["tp"], PLANS["gathered"])
    cutloss.patch(model)
    if wrapped == "head":
        fully_shard(model.lm_head, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    at = mesh.get_local_rank("dp")
    mine = {k: v[at : at + 1] for k, v in inputs.items()}
    for _ in range(2):
        model.zero_grad()
        with NoLogits():
            part = model(**mine, num_items_in_batch=items / 2).loss  # averaged over two
            part.backward()
        total = part.detach().clone()
        torch.distributed.all_reduce(total, group=mesh.get_group("dp"))
        agree(model, total / 2, want, world)


OF_LOGITS = ("Gemma2ForCausalLM", "CohereForCausalLM")  # which cap them, and scale them
CHECKS = [
    *checks(check_loss, (LLAMA,), PLANS, ("patched first", "patched last")),
    *checks(check_loss, OF_LOGITS, ("gathered",), ("patched last",)),
    *checks(check_options),
    *checks(check_head_of_trl, (LLAMA, "Gemma2ForCausalLM")),
    *checks(check_refusals),
]
OF_FOUR = checks(check_fsdp, ("root", "head"))


BY_SIZE = {2: CHECKS, 4: OF_FOUR}
results = processes.results_of(BY_SIZE)


@processes.each(BY_SIZE)
def test_cpu(results, size, check):
    results.passed(size, check)

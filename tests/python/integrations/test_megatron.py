"""cutloss.integrations.megatron with stand-ins that have the names of Megatron-Core's output layer,
config and parameters, in two and three processes: the loss and gradients are those of plain PyTorch
in one. Megatron itself is not installed here."""

import types

import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import processes
from helpers.processes import checks, refused
from helpers.sharded_problems import same_on_all
from helpers.tolerance import assert_near
from torch import nn

from cutloss.integrations.megatron import (
    column_parallel_head,
    linear_cross_entropy,
    output_processor,
)

S, B, H = 12, 3, 16  # S is a multiple of the numbers of ranks


class ColumnParallelLinear(nn.Module):
    """Has what an output layer of Megatron-Core has, as far as the loss reads it."""

    def __init__(self, input_size, output_size, *, config, bias=False, tp_group=None,
                 skip_bias_add=False, skip_weight_param_allocation=False):  # fmt: skip
        super().__init__()
        self.config, self.tp_group = config, tp_group
        self.sequence_parallel = config.sequence_parallel
        self.gradient_accumulation_fusion = config.gradient_accumulation_fusion
        self.disable_grad_reduce, self.skip_bias_add = False, skip_bias_add
        self.output_size_per_partition = output_size // dist.get_world_size(tp_group)
        self.weight = self.bias = None
        if not skip_weight_param_allocation:
            self.weight = nn.Parameter(torch.empty(self.output_size_per_partition, input_size))
        if bias:
            self.bias = nn.Parameter(torch.empty(self.output_size_per_partition))

    def forward(self, input_, weight=None, runtime_gather_output=None):
        return F.linear(input_, self.weight if weight is None else weight, self.bias), None


class GPTModel(nn.Module):
    """Calls the hook as Megatron's does: before the output layer, with names."""

    def __init__(self, output_layer, shared=None):
        super().__init__()
        self.output_layer, self.shared, self.config = output_layer, shared, output_layer.config

    def forward(self, hidden_states, labels=None, output_processor=None,
                output_processor_context=None):  # fmt: skip
        if output_processor is None:
            return self.output_layer(hidden_states, weight=self.shared)[0]
        return output_processor(
            hidden_states=hidden_states, output_layer=self.output_layer, output_weight=self.shared,
            labels=labels, loss_mask=None, context=output_processor_context, config=self.config,
        )  # fmt: skip


def config_of(**changes):
    of_all = dict(sequence_parallel=False, gradient_accumulation_fusion=False,
                  defer_embedding_wgrad_compute=False, use_mup=False)  # fmt: skip
    return types.SimpleNamespace(**{**of_all, **changes})


def problem(world, dtype=torch.float32, ignored=True):
    V = 40 * world.size
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(V, (B, S), generator=g)
    if ignored:
        labels[:, :2] = -100
    return types.SimpleNamespace(
        hidden=torch.randn(S, B, H, generator=g).to(world.device, dtype),
        weight=torch.randn(V, H, generator=g).to(world.device, dtype),
        bias=torch.randn(V, generator=g).to(world.device, dtype),
        labels=labels.to(world.device),
        mask=torch.rand(B, S, generator=g).to(world.device),
        shard=slice(40 * world.rank, 40 * (world.rank + 1)),
        V=V,
    )


def plain(p, softcap=None, bias=False):
    """In fp64: (b, s), and the gradients of what Megatron makes of it, a masked sum."""
    hidden, weight, b = (t.double().requires_grad_() for t in (p.hidden, p.weight, p.bias))
    logits = F.linear(hidden, weight, b if bias else None)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits.flatten(0, 1), p.labels.T.flatten(), reduction="none")
    loss = loss.view(S, B).T
    (loss * p.mask).sum().backward()
    return loss.detach(), hidden.grad, weight.grad, b.grad


def mine(world, p, sequence_parallel):
    hidden = p.hidden.chunk(world.size)[world.rank] if sequence_parallel else p.hidden
    return hidden.clone().requires_grad_()


def compare(world, p, loss, hidden, dweight, want, sequence_parallel, products=torch.float32):
    assert loss.shape == (B, S) and loss.is_contiguous() and loss.dtype == torch.float32
    assert_near(loss, want[0], "loss", products)
    same_on_all(world, loss.detach())
    expected = want[1].chunk(world.size)[world.rank] if sequence_parallel else want[1]
    assert_near(hidden.grad, expected, "hidden's gradient", products)
    assert_near(dweight, want[2][p.shard], "weight's gradient", products)


def layer_of(world, p, kind=ColumnParallelLinear, bias=False, **changes):
    layer = kind(H, p.V, config=config_of(**changes), bias=bias, tp_group=dist.group.WORLD)
    with torch.no_grad():
        layer.weight = nn.Parameter(p.weight[p.shard].clone())
        if bias:
            layer.bias = nn.Parameter(p.bias[p.shard].clone())
    return layer


# The ways to call it ------------------------------------------------------------------------------


def check_function(world, dtype, sequence_parallel, softcap):
    p = problem(world, dtype)
    hidden = mine(world, p, sequence_parallel)
    weight, bias = (t[p.shard].clone().requires_grad_() for t in (p.weight, p.bias))
    loss = linear_cross_entropy(
        hidden, weight, p.labels, dist.group.WORLD, bias=bias, softcap=softcap,
        sequence_parallel=sequence_parallel,
    )  # fmt: skip
    (loss * p.mask).sum().backward()
    want = plain(p, softcap, bias=True)
    compare(world, p, loss, hidden, weight.grad, want, sequence_parallel, dtype)
    assert_near(bias.grad, want[3][p.shard], "bias' gradient", dtype)


def check_options(world):
    p = problem(world)
    hidden, weight = p.hidden, p.weight[p.shard]
    loss, lse = linear_cross_entropy(hidden, weight, p.labels, dist.group.WORLD, return_lse=True)
    logits = F.linear(p.hidden, p.weight)
    counts = p.labels != -100
    assert_near(lse[counts], logits.logsumexp(-1).T[counts], "lse", torch.float32)
    mean = linear_cross_entropy(hidden, weight, p.labels, dist.group.WORLD, reduction="mean")
    assert_near(mean, loss.sum() / counts.sum(), "mean", torch.float32)


def check_output_processor(world, sequence_parallel, tied):
    p = problem(world)
    layer = layer_of(world, p, sequence_parallel=sequence_parallel)
    shared = layer.weight
    if tied:
        layer.weight = None
    model = GPTModel(layer, shared if tied else None)
    hidden = mine(world, p, sequence_parallel)
    loss = model(hidden, p.labels, output_processor=output_processor())
    (loss * p.mask).sum().backward()
    compare(world, p, loss, hidden, shared.grad, plain(p), sequence_parallel)


def check_head(world, bias):
    p = problem(world)
    Head = column_parallel_head(ColumnParallelLinear, softcap=4.0)
    layer = layer_of(world, p, Head, bias=bias)
    before = layer_of(world, p, ColumnParallelLinear, bias=bias)
    layer.load_state_dict(before.state_dict(), strict=True)  # names are those of the class
    assert list(layer.state_dict()) == list(before.state_dict())
    hidden = mine(world, p, False)
    loss = layer(hidden, labels=p.labels)
    (loss * p.mask).sum().backward()
    want = plain(p, softcap=4.0, bias=bias)
    compare(world, p, loss, hidden, layer.weight.grad, want, False)
    logits, _ = layer(p.hidden)  # as ever
    want = F.linear(p.hidden, p.weight[p.shard], p.bias[p.shard] if bias else None)
    assert torch.equal(logits, want)
    refused(TypeError, "options of the loss need labels", lambda: layer(p.hidden, reduction="sum"))


# Gradient accumulation ----------------------------------------------------------------------------


def with_main_grad(weight, has_flag=True, zero_out=False):
    """As Megatron's DistributedDataParallel leaves a parameter: what is in `grad` is added to
    main_grad, unless it was there already, and dropped."""
    weight.main_grad = torch.ones(weight.shape, dtype=torch.float32, device=weight.device)
    if has_flag:
        weight.grad_added_to_main_grad = False
    weight.zero_out_wgrad = zero_out
    weight.seen = 0

    def hook(param):
        weight.seen += 1
        if param.grad is not None and (
            not getattr(param, "grad_added_to_main_grad", False) or param.zero_out_wgrad
        ):
            param.main_grad.add_(param.grad)
        param.grad = None

    weight.register_post_accumulate_grad_hook(hook)


def check_main_grad(world, dtype, fused):
    """Over micro-batches, fused and not."""
    p = problem(world, dtype)
    layer = layer_of(world, p, gradient_accumulation_fusion=fused)
    with_main_grad(layer.weight)
    model = GPTModel(layer)
    for _ in range(3):
        hidden = mine(world, p, False)
        loss = model(hidden, p.labels, output_processor=output_processor())
        (loss * p.mask).sum().backward()
    want = plain(p)[2][p.shard]
    assert layer.weight.seen == 3 and layer.weight.grad is None
    assert layer.weight.grad_added_to_main_grad is fused
    assert_near(layer.weight.main_grad - 1, 3 * want, "main_grad", dtype)


def check_main_grad_of_tied(world):
    """The embedding's own gradient is added to what the head leaves, and both arrive once."""
    p = problem(world)
    weight = nn.Parameter(p.weight[p.shard].clone())
    with_main_grad(weight, zero_out=True)
    ids = torch.arange(5, device=world.device)
    hidden = mine(world, p, False)
    loss = linear_cross_entropy(
        hidden, weight, p.labels, dist.group.WORLD, gradient_accumulation_fusion=True
    )
    ((loss * p.mask).sum() + F.embedding(ids, weight).sum()).backward()
    want = plain(p)[2][p.shard]
    want[:5] += 1
    assert_near(weight.main_grad - 1, want, "main_grad", torch.float32)


def check_main_grad_without_flag(world):
    p = problem(world)
    weight = nn.Parameter(p.weight[p.shard].clone())
    with_main_grad(weight, has_flag=False)
    loss = linear_cross_entropy(
        p.hidden, weight, p.labels, dist.group.WORLD, gradient_accumulation_fusion=True
    )
    (loss * p.mask).sum().backward()
    assert weight.grad is None
    assert_near(weight.main_grad - 1, plain(p)[2][p.shard], "main_grad", torch.float32)


def check_main_grad_gets_the_sums(world):
    """In fp32, as they are: nothing is rounded to the weight's 16 bits on the way."""
    p = problem(world, torch.bfloat16)
    weight = nn.Parameter(p.weight[p.shard].clone())
    with_main_grad(weight)
    weight.main_grad.zero_()
    loss = linear_cross_entropy(
        p.hidden, weight, p.labels, dist.group.WORLD, gradient_accumulation_fusion=True
    )
    (loss * p.mask).sum().backward()
    rounded = weight.main_grad.bfloat16().float()
    assert (rounded != weight.main_grad).float().mean() > 0.9
    assert_near(weight.main_grad, plain(p)[2][p.shard], "main_grad", torch.bfloat16)


def check_options_of_each_token(world):
    """(b, s), as labels are, where b and s are the same number too."""
    torch.manual_seed(4)
    n = 4
    hidden, labels = torch.randn(n, n, 8), torch.randint(12 * world.size, (n, n))
    whole = torch.randn(12 * world.size, 8) / 3
    weights, temperatures = torch.rand(n, n) + 0.5, torch.rand(n, n) + 0.5
    made = hidden, labels, whole, weights, temperatures
    hidden, labels, whole, weights, temperatures = (t.to(world.device) for t in made)
    own = whole.chunk(world.size)[world.rank]
    got = linear_cross_entropy(
        hidden, own, labels, dist.group.WORLD, token_weight=weights, temperature=temperatures
    )
    z = (hidden.transpose(0, 1) @ whole.T) / temperatures[..., None]
    want = weights * F.cross_entropy(z.flatten(0, 1), labels.flatten(), reduction="none").view(n, n)
    torch.testing.assert_close(got, want)
    refused(ValueError, "shifted already", lambda: linear_cross_entropy(
        hidden, own, labels, dist.group.WORLD, shift=1))  # fmt: skip
    refused(ValueError, "token_weight must be", lambda: linear_cross_entropy(
        hidden, own, labels, dist.group.WORLD, token_weight=weights[0]))  # fmt: skip


def check_main_grad_of_others_gradients(world):
    """A backward that is asked for the hidden state's gradient alone adds nothing."""
    p = problem(world)
    weight = nn.Parameter(p.weight[p.shard].clone())
    with_main_grad(weight)
    hidden = mine(world, p, False)
    loss = linear_cross_entropy(
        hidden, weight, p.labels, dist.group.WORLD, gradient_accumulation_fusion=True
    )
    loss = (loss * p.mask).sum()
    (alone,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    assert (weight.main_grad == 1).all() and not weight.grad_added_to_main_grad
    refused(NotImplementedError, "each of which would be added", lambda: torch.autograd.grad(
        loss, hidden, loss.new_ones(2), is_grads_batched=True, retain_graph=True))  # fmt: skip
    loss.backward()
    assert torch.equal(hidden.grad, alone)
    assert_near(weight.main_grad - 1, plain(p)[2][p.shard], "main_grad", torch.float32)


def check_main_grad_is_left_alone(world):
    """Where the weight is frozen, and under no_grad."""
    p = problem(world)
    weight = nn.Parameter(p.weight[p.shard].clone())
    with_main_grad(weight)
    options = dict(gradient_accumulation_fusion=True)
    with torch.no_grad():
        linear_cross_entropy(p.hidden, weight, p.labels, dist.group.WORLD, **options)
    weight.requires_grad_(False)
    hidden = mine(world, p, False)
    linear_cross_entropy(hidden, weight, p.labels, dist.group.WORLD, **options).sum().backward()
    assert (weight.main_grad == 1).all() and not weight.grad_added_to_main_grad


# What waits, and what is refused ------------------------------------------------------------------


def check_pre_hooks_are_called(world):
    """The distributed optimizer gathers parameters, and a forward pre-hook waits for that."""
    p = problem(world)
    layer = layer_of(world, p)
    with torch.no_grad():
        layer.weight.fill_(float("nan"))

    def gather(module, *unused):
        module.weight.data.copy_(p.weight[p.shard])

    layer.register_forward_pre_hook(gather)
    hidden = mine(world, p, False)
    loss = GPTModel(layer)(hidden, p.labels, output_processor=output_processor())
    (loss * p.mask).sum().backward()
    compare(world, p, loss, hidden, layer.weight.grad, plain(p), False)
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    refused(NotImplementedError, "use column_parallel_head", lambda: GPTModel(layer)(
        hidden, p.labels, output_processor=output_processor()))  # fmt: skip


def check_another_group(world):
    """The group is the one that was passed: here this rank alone, which has all classes."""
    p = problem(world)
    groups = [dist.new_group([rank]) for rank in range(world.size)]
    hidden, weight = mine(world, p, False), p.weight.clone().requires_grad_()
    loss = linear_cross_entropy(
        hidden, weight, p.labels, groups[world.rank], sequence_parallel=True
    )
    (loss * p.mask).sum().backward()
    want = plain(p)
    assert_near(loss, want[0], "loss", torch.float32)
    assert_near(weight.grad, want[2], "weight's gradient", torch.float32)


def check_refusals(world):
    p = problem(world)
    layer = layer_of(world, p, bias=True)
    weight = p.weight[p.shard]
    everyone = dist.group.WORLD

    def function(hidden=p.hidden, w=weight, labels=p.labels, group=everyone, **more):
        return linear_cross_entropy(hidden, w, labels, group, **more)

    refused(TypeError, "output_layer.tp_group", lambda: function(group=None))
    refused(ValueError, r"labels \(b, s\)", lambda: function(labels=p.labels.T))
    trained = nn.Parameter(weight.clone())
    fused = dict(gradient_accumulation_fusion=True)
    refused(ValueError, "needs weight.main_grad", lambda: function(w=trained, **fused))
    trained.main_grad = torch.zeros(1, device=weight.device)
    refused(ValueError, r"got \(1,\)", lambda: function(w=trained, **fused))
    setattr(trained, "__fsdp_param__", True)
    refused(NotImplementedError, "Megatron-FSDP", lambda: function(w=trained, **fused))

    def processed(layer, **options):
        model = GPTModel(layer)
        return model(p.hidden, p.labels, output_processor=output_processor(**options))

    refused(ValueError, "makes the loss of labels", lambda: GPTModel(layer)(
        p.hidden, output_processor=output_processor()))  # fmt: skip
    layer.skip_bias_add = True
    refused(NotImplementedError, "skip_bias_add", lambda: processed(layer))
    deferring = layer_of(world, p, defer_embedding_wgrad_compute=True)
    refused(NotImplementedError, "switch it off", lambda: processed(deferring))
    scaled = layer_of(world, p, use_mup=True)
    refused(ValueError, "pass logit_scale", lambda: processed(scaled))
    processed(scaled, logit_scale=0.5)
    capped = layer_of(world, p, final_logit_softcapping=30.0)
    refused(ValueError, "pass softcap=30.0", lambda: processed(capped))
    processed(capped, softcap=30.0)
    tied = layer_of(world, p)
    tied.weight = None
    refused(ValueError, "the shared embedding's", lambda: processed(tied))
    rows = weight[: 39 + world.rank % 2]  # shards that are not equal
    few = p.labels.clamp(max=30)
    with processes.looking():
        refused(
            ValueError, "every rank must make the same calls", lambda: function(w=rows, labels=few)
        )


BOTH = (False, True)
CHECKS = [
    *checks(check_function, (torch.float32, torch.bfloat16), BOTH, (None, 5.0)),
    *checks(check_options),
    *checks(check_output_processor, BOTH, BOTH),
    *checks(check_head, BOTH),
    *checks(check_main_grad, (torch.float32, torch.bfloat16), BOTH),
    *checks(check_main_grad_of_tied),
    *checks(check_main_grad_without_flag),
    *checks(check_main_grad_gets_the_sums),
    *checks(check_options_of_each_token),
    *checks(check_main_grad_of_others_gradients),
    *checks(check_main_grad_is_left_alone),
    *checks(check_pre_hooks_are_called),
    *checks(check_another_group),
    *checks(check_refusals),
]
SIZES = (2, 3)


BY_SIZE = {size: CHECKS for size in SIZES}
test_cpu = processes.on_cpu(BY_SIZE)
test_cuda = processes.on_two_devices(BY_SIZE[2])

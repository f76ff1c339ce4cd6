"""Modules whose classifier lies in shards: LinearCrossEntropy with options, heads whose weight
parallelize_module or distribute_tensor has sharded, alone and under FSDP. Loss and gradients are
those of plain PyTorch in one process."""

import copy

import torch
import torch.nn.functional as F
from helpers import processes
from helpers.processes import checks, refused
from helpers.small_model import D, V, batch, compare, make, plain_gradients, plain_loss, whole
from helpers.tolerance import assert_near
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from cutloss import (
    CausalLMHead,
    LinearCrossEntropy,
    LinearCrossEntropyLoss,
    VocabParallelOptions,
    compat,
    get_loss,
    linear_cross_entropy,
    torch_compat,
)


def problem(world, shape=(4, 12)):
    g = torch.Generator().manual_seed(0)
    e = torch.randn(*shape, D, generator=g)
    targets = torch.randint(V, shape, generator=g)
    targets[:, :3] = -100
    return e.to(world.device), targets.to(world.device)


def plain(head, e, targets, shift=0):
    """Loss, and gradients of e, weight and bias, of a head that is whole."""
    e, head = e.clone().requires_grad_(), copy.deepcopy(head)
    logits = F.linear(e, head.weight, head.bias)
    length = e.shape[-2] - shift
    logits, targets = logits[..., :length, :].flatten(0, -2), targets[..., shift:].flatten()
    loss = F.cross_entropy(logits, targets)
    loss.backward()
    bias = None if head.bias is None else head.bias.grad
    return loss.detach(), e.grad, head.weight.grad, bias


# Options ------------------------------------------------------------------------------------------


def check_module_with_options(world):
    """In their forward modules, and losses by name, take what the function takes."""
    e, targets = problem(world)
    torch.manual_seed(1)
    linear = nn.Linear(D, V).to(world.device)
    want = plain(linear, e, targets, shift=1)
    own = VocabParallelOptions.from_vocab(V)
    shard = slice(own.start, own.stop)
    shifted = F.pad(targets[:, 1:], (0, 1), value=-100)
    modules = (  # liger's names have no shift
        (LinearCrossEntropy(shift=1), targets),
        (get_loss("cce", shift=1), targets),
        (get_loss("liger"), shifted),
    )
    for module, labels in modules:
        mine = e.clone().requires_grad_()
        c, bias = (t.detach()[shard].clone().requires_grad_() for t in (linear.weight, linear.bias))
        loss = module(mine, c, labels, bias, vocab_parallel_options=own)
        loss.backward()
        assert_near(loss, want[0], "loss", torch.float32)
        assert_near(mine.grad, want[1], "e.grad", torch.float32)
        assert_near(c.grad, want[2][shard], "c.grad", torch.float32)
        assert_near(bias.grad, want[3][shard], "bias.grad", torch.float32)
    refused(NotImplementedError, "takes a whole classifier", lambda: get_loss("torch")(
        e, linear.weight[shard], targets, vocab_parallel_options=own))  # fmt: skip
    weighted = LinearCrossEntropy(weight=torch.ones(own.stop - own.start, device=world.device))
    refused(ValueError, "weight must be", lambda: weighted(
        e, linear.weight[shard], targets, vocab_parallel_options=own))  # fmt: skip


# Tensor parallelism -------------------------------------------------------------------------------


def check_head_of_dtensors(world, kind, bias, how):
    """`how`: by whom the head's weight became a DTensor, and how the hidden states lie."""
    shift = 1 if kind is CausalLMHead else 0
    e, targets = problem(world)
    mesh = init_device_mesh(world.device.type, (world.size,))
    torch.manual_seed(1)
    linear = nn.Linear(D, V, bias=bias).to(world.device)
    want = plain(linear, e, targets, shift)
    mine = e.clone().requires_grad_()
    if how == "distribute_tensor":
        for name, p in list(linear.named_parameters()):
            setattr(linear, name, nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])))
    elif how == "sequence":
        parallelize_module(linear, mesh, ColwiseParallel(input_layouts=Shard(1)))
        mine = e.chunk(world.size, 1)[world.rank].clone().requires_grad_()
    elif how == "dtensor":
        parallelize_module(linear, mesh, ColwiseParallel(input_layouts=Shard(0)))
        mine = distribute_tensor(e, mesh, [Shard(0)]).requires_grad_()
    else:
        parallelize_module(linear, mesh, ColwiseParallel())
    head = kind(linear)
    assert isinstance(head.weight, DTensor)
    for _ in range(2):
        mine.grad = None
        head.zero_grad()
        result = head(mine, targets)
        loss = result if isinstance(result, torch.Tensor) else result.loss
        loss.backward()
        assert not isinstance(loss, DTensor)
        assert_near(loss, want[0], "loss", torch.float32)
        expected = want[1]
        if how == "sequence":
            expected = expected.chunk(world.size, 1)[world.rank]
        assert_near(whole(mine.grad), expected, "e.grad", torch.float32)
        assert head.weight.grad.placements == (Shard(0),)
        assert_near(whole(head.weight.grad), want[2], "weight.grad", torch.float32)
        if bias:
            assert_near(whole(head.bias.grad), want[3], "bias.grad", torch.float32)


def check_num_items(world):
    e, targets = problem(world)
    head = CausalLMHead(D, V, device=world.device)
    with torch.no_grad():
        head.weight.fill_(0.1)
    want = head(e, targets, num_items_in_batch=7).loss
    parallelize_module(head, world.mesh, {"output_embeddings": ColwiseParallel()})
    got = head(e, targets, num_items_in_batch=torch.tensor(7, device=world.device)).loss
    assert_near(got, want, "loss", torch.float32)


def check_logits_are_whole(world, tied):
    """In evaluation, with their gradients."""
    e, targets = problem(world)
    torch.manual_seed(1)
    layer = (nn.Embedding(V, D) if tied else nn.Linear(D, V)).to(world.device)
    single = CausalLMHead(copy.deepcopy(layer), softcap=5.0, logit_scale=0.5).eval()
    plan = RowwiseParallel() if tied else ColwiseParallel()
    head = CausalLMHead(parallelize_module(layer, world.mesh, plan), softcap=5.0, logit_scale=0.5)
    head.eval()
    results = []
    for h in (single, head):
        mine = e.clone().requires_grad_()
        loss, logits, *_ = h(mine, targets)
        (loss + logits.square().mean()).backward()
        results.append((loss.detach(), logits.detach(), mine.grad, whole(h.weight.grad)))
    for name, a, b in zip(("loss", "logits", "e.grad", "weight.grad"), *results, strict=True):
        assert not isinstance(b, DTensor)
        assert_near(b, a, name, torch.float32)


def check_own_bias(world):
    """A bias that the head makes for a weight that is a DTensor already lies as the weight does;
    one that is plain beside such a weight is refused."""
    e, targets = problem(world)
    layer = parallelize_module(
        nn.Linear(D, V, bias=False, device=world.device), world.mesh, ColwiseParallel()
    )
    head = LinearCrossEntropyLoss(layer, bias=True)
    head(e, targets).backward()
    assert head.bias.grad.placements == (Shard(0),)
    late = LinearCrossEntropyLoss(nn.Linear(D, V, bias=False, device=world.device), bias=True)
    parallelize_module(late, world.mesh, {"output_embeddings": ColwiseParallel()})
    refused(ValueError, "bias must be a DTensor placed as c is", lambda: late(e, targets))


def check_calls_of_others(world):
    """Those of other packages come to the same function."""
    sequences, of_sequences = problem(world)
    e, targets = sequences.flatten(0, 1), of_sequences.flatten()
    liked = torch.tensor([True, False, True, True], device=world.device)
    c = torch.randn(V, D, generator=torch.Generator().manual_seed(3)).to(world.device)
    calls = (
        lambda c: compat.liger.LigerFusedLinearCrossEntropyLoss()(c, e, targets),
        lambda c: torch_compat.linear_cross_entropy(e, c, targets),
        lambda c: compat.liger.LigerFusedLinearCPOLoss()(c, sequences, of_sequences)[0],
        lambda c: compat.liger.LigerFusedLinearKTOLoss()(
            sequences, c, of_sequences, preference_labels=liked
        )[0],
        lambda c: compat.liger.LigerFusedLinearGRPOLoss(beta=0.0)(
            sequences, c, of_sequences.clamp(min=0), of_sequences != -100, liked.float() - 0.5
        )[0],
    )
    for call in calls:
        one, parts = c.clone().requires_grad_(), distribute_tensor(c, world.mesh, [Shard(0)])
        loss, want = call(parts.requires_grad_()), call(one)
        loss.backward(), want.backward()
        assert_near(loss, want, "loss", torch.float32)
        assert_near(parts.grad.full_tensor(), one.grad, "c.grad", torch.float32)
    of_both = (
        compat.liger.LigerFusedLinearCPOLoss()(c, sequences, of_sequences)[1]
        for c in (parts.detach(), one.detach())
    )
    for got, want in zip(*of_both, strict=True):
        torch.testing.assert_close(got, want)


def check_tied_weight_that_fsdp_left_sharded(world):
    """A head outside of what fully_shard was given, each process with a batch of its own."""
    model = make(True, world.device)
    fully_shard(model.body, mesh=world.mesh, reshard_after_forward=True)
    x, labels = batch(10 + world.rank, device=world.device)
    with processes.looking():
        refused(
            ValueError, "other targets .* in the forward of the module", lambda: model(x, labels)
        )


def check_other_placements(world):
    e, targets = problem(world)
    for placement in (Replicate(), Shard(1)):
        layer = nn.Linear(D, V, bias=False, device=world.device)
        placed = distribute_tensor(layer.weight.detach(), world.mesh, [placement])
        layer.weight = nn.Parameter(placed)
        head = LinearCrossEntropyLoss(layer)
        refused(ValueError, "of LinearCrossEntropyLoss, which takes", lambda: head(e, targets))


# Tensor parallelism under FSDP, a mesh of two dimensions ------------------------------------------


def in_both(world, tied, wrapped):
    """Sharded by classes over tp, and everything over dp."""
    mesh = init_device_mesh(world.device.type, (2, 2), mesh_dim_names=("dp", "tp"))
    model = make(tied, world.device)
    if tied:
        layer = RowwiseParallel(input_layouts=Replicate())
        parallelize_module(model, mesh["tp"], {"body.embedding": layer})
    else:
        parallelize_module(model, mesh["tp"], {"head.output_embeddings": ColwiseParallel()})
    for name in wrapped:
        fully_shard(model.get_submodule(name), mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"]), mesh


def check_fsdp_and_tensor_parallel(world, tied, wrapped):
    if tied and "head" in wrapped:
        return  # a parameter of two groups, which fully_shard itself refuses
    model, mesh = in_both(world, tied, wrapped)
    # One for each rank of dp; those of a tp group have the same.
    batches = [batch(i, device=world.device) for i in (10, 11)]
    single = make(tied, world.device)
    expected = plain_gradients(single, batches)
    mine = batches[mesh.get_local_rank("dp")]
    for _ in range(2):
        model.zero_grad()
        loss = model(*mine)
        loss.backward()
        assert_near(loss, plain_loss(single, *mine), "loss", torch.float32)
        compare(model, expected)


def check_outside_of_forward_is_refused(world):
    """There the weight is a shard of a shard."""
    model, _ = in_both(world, False, ("head",))
    e, targets = problem(world)
    match = "on a mesh of 2 dimensions.* in the forward of the module"
    refused(ValueError, match, lambda: linear_cross_entropy(e, model.head.weight, targets))
    head = LinearCrossEntropyLoss(D, V, device=world.device)
    mesh = init_device_mesh(world.device.type, (2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(head, mesh["tp"], {"output_embeddings": ColwiseParallel()})
    fully_shard(head.output_embeddings, mesh=mesh["dp"])
    refused(ValueError, "give it the whole LinearCrossEntropyLoss", lambda: head(e, targets))


WAYS = ("distribute_tensor", "parallelize_module", "sequence", "dtensor")
CHECKS = [
    *checks(check_module_with_options),
    *checks(check_head_of_dtensors, (LinearCrossEntropyLoss, CausalLMHead), (False, True), WAYS),
    *checks(check_num_items),
    *checks(check_logits_are_whole, (False, True)),
    *checks(check_own_bias),
    *checks(check_other_placements),
    *checks(check_calls_of_others),
    *checks(check_tied_weight_that_fsdp_left_sharded),
]
OF_FOUR = [
    *checks(check_fsdp_and_tensor_parallel, (False, True), [(), ("head",), ("body.mid",)]),
    *checks(check_outside_of_forward_is_refused),
]


BY_SIZE = {2: CHECKS, 4: OF_FOUR}
test_cpu = processes.on_cpu(BY_SIZE)
test_cuda = processes.on_two_devices(BY_SIZE[2])

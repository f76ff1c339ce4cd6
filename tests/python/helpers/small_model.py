"""A language model small enough for any test with our head, and its loss in plain PyTorch."""

import copy
import re

import torch
import torch.nn.functional as F
from helpers.tolerance import assert_near
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cutloss import CausalLMHead

V, D = 101, 16

Batch = tuple[Tensor, Tensor]


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.mid = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.mid(self.embedding(x)))


class Model(nn.Module):
    """Its forward returns the loss."""

    def __init__(self, tied: bool = False, **options):
        super().__init__()
        self.body = Body()
        head = (self.body.embedding,) if tied else (D, V)
        self.head = CausalLMHead(*head, bias=not tied, **options)

    def forward(self, x: Tensor, labels: Tensor, num_items: float | Tensor | None = None) -> Tensor:
        return self.head(self.body(x), labels, num_items_in_batch=num_items).loss


def make(tied: bool = False, device: torch.device | str = "cpu", **options) -> Model:
    torch.manual_seed(1)
    return Model(tied, **options).to(device)


def batch(seed: int, ignored: float = 0.0, device: torch.device | str = "cpu", n: int = 2) -> Batch:
    """The tokens, and as labels the same, of which some are ignored."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, V, (n, 9), generator=g)
    labels = x.masked_fill(torch.rand(x.shape, generator=g) < ignored, -100)
    return x.to(device), labels.to(device)


def count(labels: Tensor) -> Tensor:
    """Tokens that are predicted."""
    return (labels[:, 1:] != -100).sum()


def plain_loss(model: Model, x: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(model.body(x), model.head.weight, model.head.bias)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def plain_gradients(model: Model, batches: list[Batch]) -> dict[str, Tensor]:
    """Of the mean over batches of each one's mean, by the name of the parameter."""
    model = copy.deepcopy(model)
    model.zero_grad()
    sum(plain_loss(model, *b) for b in batches).div(len(batches)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def joined(batches: list[Batch]) -> Batch:
    x, labels = zip(*batches)
    return torch.cat(x), torch.cat(labels)


def whole(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def unwrapped(name):
    """Of a parameter, in the model that was wrapped."""
    return re.sub(r"_checkpoint_wrapped_module\.|_fsdp_wrapped_module\.|module\.", "", name)


def compare(model, expected, products=torch.float32):
    found = {unwrapped(name): p for name, p in model.named_parameters()}
    assert found.keys() == expected.keys()
    for name, p in found.items():
        assert_near(whole(p.grad), expected[name], name, products)

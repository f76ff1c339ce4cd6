"""Language models of Transformers at the sizes of published ones, with random weights."""

import copy
import dataclasses
import json
import pathlib

import torch

from cutloss.cli.bench.cases import DTYPES
from cutloss.cli.usage import UserError

# What optimizer and gradients take is the parameters' dtype; AdamW in fp16 would overflow.
TRAIN_DTYPES = ("bf16", "bf16-autocast", "fp32")
LEARNING_RATE = 1e-6
# Of the logits. Weights as they are initialised give 0.6 to 1, and then a softcap that somebody leaves
# out changes the loss by less than rounding does.
LOGIT_DEVIATION = 3.0


@dataclasses.dataclass(frozen=True)
class Shape:
    """A named model, and what a step of it is made of."""

    model: str
    tokens: int
    sequence: int  # tokens of each sequence
    dtype: str
    device: str
    seed: int = 0

    @property
    def entry(self):
        return entries()[self.model]

    @property
    def all_layers(self):
        return self.entry["config"]["num_hidden_layers"]

    @property
    def autocast_to(self):
        return DTYPES[self.dtype][2]

    @property
    def parameter_dtype(self):
        return DTYPES[self.dtype][1]


@dataclasses.dataclass
class Setup:
    """A model with its optimizer and the tokens of a step."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    tokens: torch.Tensor  # (sequences, length)
    layers: int


def entries():
    """{name: {"class", "attention", "config"}}. Gemma 2 is eager: of what PyTorch brings, nothing else
    has the softcap of its attention."""
    path = pathlib.Path(__file__).parents[1] / "data" / "training.json"
    return json.loads(path.read_text(encoding="utf-8"))


def build(entry, layers, dtype, device, **changed):
    """The model of an entry with so many layers, in training mode; `changed`: of its config."""
    import transformers

    kind = getattr(transformers, entry["class"])
    config = kind.config_class(**{**entry["config"], "num_hidden_layers": layers, **changed})
    config.use_cache = False
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=entry["attention"]
        )
    return model.train()


def set_up(shape, layers):
    torch.manual_seed(shape.seed)
    model = build(shape.entry, layers, shape.parameter_dtype, shape.device)
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(
            std=LOGIT_DEVIATION / model.config.hidden_size**0.5
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    size = shape.tokens // shape.sequence, shape.sequence
    tokens = torch.randint(model.config.vocab_size, size, device=shape.device)
    return Setup(model, optimizer, tokens, layers)


def sharing_parameters(model):
    """A copy of the model whose parameters and buffers are the model's own tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(t): t for t in tensors})


def checked_layers(shape, layers):
    if layers is not None and layers > shape.all_layers:
        raise UserError(f"--layers {layers}: {shape.model} has {shape.all_layers} layers")
    return layers


def most_layers(count, attempt):
    """(layers, what attempt(layers) returned) for the greatest number of layers, of at most `count`,
    whose attempt does not return None; (0, None) where one layer is too many already.

    More layers need more memory, so the number is found by halving."""
    found = attempt(count)
    if found is not None:
        return count, found
    fits, too_many = 0, count
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if attempt(middle) is None:
            too_many = middle
        else:
            fits = middle
    return fits, attempt(fits) if fits else None

"""Contrastive training of two towers, as CLIP's, without the batch's matrix of similarities.

    python examples/clip.py --steps 100 --device cpu

Images and their texts come in pairs. Each image has to find its text among all texts of the batch,
and each text its image: the cross-entropy of X Aᵀ and of A Xᵀ, where the "classes" of one tower are
the features of the other. So N = V = the batch, and gradients flow to both sides of both products.
The loss is that of Radford et al. 2021, "Learning Transferable Visual Models From Natural Language
Supervision", section 2.3.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

from cutloss import linear_cross_entropy

PIXELS, WORDS, MEANING = 192, 96, 24


class Clip(nn.Module):
    def __init__(self, width: int = 256, features: int = 64):
        super().__init__()
        self.image = nn.Sequential(nn.Linear(PIXELS, width), nn.GELU(), nn.Linear(width, features))
        self.text = nn.Sequential(nn.Linear(WORDS, width), nn.GELU(), nn.Linear(width, features))
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def features(self, images, texts):
        """Of length 1 each, and the learnt scale of their products."""
        x = F.normalize(self.image(images), dim=-1)
        a = F.normalize(self.text(texts), dim=-1)
        return x, a, self.log_scale.exp().clamp(max=100)

    def loss(self, images, texts):
        x, a, scale = self.features(images, texts)
        pairs = torch.arange(len(x), device=x.device)
        # logit_scale= takes a number. This scale is learnt, so it multiplies the features.
        text_of_image = linear_cross_entropy(scale * x, a, pairs)
        image_of_text = linear_cross_entropy(scale * a, x, pairs)
        return (text_of_image + image_of_text) / 2

    def plain_loss(self, images, texts):
        """The same with the similarities stored."""
        x, a, scale = self.features(images, texts)
        pairs = torch.arange(len(x), device=x.device)
        similarities = scale * x @ a.T
        return (F.cross_entropy(similarities, pairs) + F.cross_entropy(similarities.T, pairs)) / 2

    @torch.no_grad()
    def accuracy(self, images, texts):
        """How many images find their text; the predictions come with the loss."""
        x, a, _ = self.features(images, texts)
        pairs = torch.arange(len(x), device=x.device)
        _, found = linear_cross_entropy(x, a, pairs, return_predictions=True)
        return (found == pairs).float().mean()


class Pairs:
    """Two noisy views of one hidden meaning."""

    def __init__(self, batch: int, device: str):
        self.batch, self.device = batch, device
        self.of_images = torch.randn(MEANING, PIXELS, device=device)
        self.of_texts = torch.randn(MEANING, WORDS, device=device)

    def draw(self):
        meaning = torch.randn(self.batch, MEANING, device=self.device)
        images, texts = (torch.tanh(meaning @ view) for view in (self.of_images, self.of_texts))
        return images + 0.5 * torch.randn_like(images), texts + 0.5 * torch.randn_like(texts)


def make(batch: int = 2048, device: str = "cpu"):
    """The model, and what its batches are drawn from."""
    torch.manual_seed(0)
    return Clip().to(device), Pairs(batch, device)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    model, pairs = make(args.batch, args.device)
    with torch.no_grad():
        first = pairs.draw()
        print(f"cutloss {model.loss(*first):.6f}, plain PyTorch {model.plain_loss(*first):.6f}")
    print(f"similarities never stored: 2 x {args.batch**2 * 4 / 2**20:.1f} MiB")

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for step in range(args.steps):
        optimizer.zero_grad()
        loss = model.loss(*pairs.draw())
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if step % 20 == 0 or step == args.steps - 1:
            print(f"step {step:3}  loss {losses[-1]:.4f}")
    print(f"images that find their text: {model.accuracy(*pairs.draw()):.1%}")
    return [loss.item() for loss in losses]


if __name__ == "__main__":
    main()

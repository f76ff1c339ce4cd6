"""An image classifier with 100,000 classes, few of them frequent.

    python examples/classifier.py --steps 60 --device cpu

The head of a classifier is a linear layer, and its loss is the one of a language model with another
vocabulary. Options are those of F.cross_entropy: the head's bias, label smoothing, and class
weights, so that the many rare classes are not drowned by the few frequent ones.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

from cutloss import linear_cross_entropy

CLASSES, SIDE, SMOOTHING = 100_000, 12, 0.05


class Classifier(nn.Module):
    def __init__(self, class_weight, features: int = 64):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.GELU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.GELU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(32 * (SIDE // 4) ** 2, features), nn.LayerNorm(features),
        )  # fmt: skip
        self.head = nn.Linear(features, CLASSES)
        self.register_buffer("class_weight", class_weight)

    def loss(self, images, labels):
        return linear_cross_entropy(
            self.backbone(images),
            self.head.weight,
            labels,
            self.head.bias,
            weight=self.class_weight,
            label_smoothing=SMOOTHING,
        )

    def plain_loss(self, images, labels):
        """The same with the logits stored."""
        logits = self.head(self.backbone(images))
        return F.cross_entropy(logits, labels, self.class_weight, label_smoothing=SMOOTHING)


class Images:
    """A noisy pattern for each class; the class of rank r is drawn with a frequency of 1 / r."""

    def __init__(self, batch: int, device: str):
        self.batch, self.device = batch, device
        frequency = 1 / torch.arange(1, CLASSES + 1, device=device)
        self.frequency = frequency / frequency.sum()
        self.patterns = torch.randn(CLASSES, 1, SIDE, SIDE, device=device)

    def class_weight(self):
        """Rare classes count more: by the fourth root of how rare they are, 1 on average."""
        weight = self.frequency**-0.25
        return weight / (weight * self.frequency).sum()

    def draw(self):
        labels = torch.multinomial(self.frequency, self.batch, replacement=True)
        images = self.patterns[labels]
        return images + 0.3 * torch.randn_like(images), labels


def make(batch: int = 512, device: str = "cpu"):
    """The model, and what its batches are drawn from."""
    torch.manual_seed(0)
    images = Images(batch, device)
    return Classifier(images.class_weight()).to(device), images


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    model, images = make(args.batch, args.device)
    with torch.no_grad():
        first = images.draw()
        print(f"cutloss {model.loss(*first):.6f}, plain PyTorch {model.plain_loss(*first):.6f}")
    print(f"logits never stored: {args.batch * CLASSES * 4 / 2**20:.1f} MiB")

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(args.steps):
        optimizer.zero_grad()
        loss = model.loss(*images.draw())
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if step % 20 == 0 or step == args.steps - 1:
            print(f"step {step:3}  loss {losses[-1]:.4f}")
    return [loss.item() for loss in losses]


if __name__ == "__main__":
    main()

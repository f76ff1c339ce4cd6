"""What somebody looks at next, out of a catalogue of 200,000 items, without sampling negatives.

    python examples/recommender.py --steps 60 --device cpu

A causal transformer reads the items that a user saw and scores all others with the same embeddings
that it reads (Kang and McAuley 2018, "Self-Attentive Sequential Recommendation"). Catalogues are
large, so such models are commonly trained on a sample of wrong items, with a correction for what
the sample leaves out. Here every item counts, exactly. Item 0 is padding.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

from cutloss import linear_cross_entropy

ITEMS, GENRES, PADDING = 200_000, 50, 0


class Recommender(nn.Module):
    def __init__(self, length: int, features: int = 32):
        super().__init__()
        self.items = nn.Embedding(ITEMS, features, padding_idx=PADDING)
        self.places = nn.Embedding(length, features)
        nn.init.normal_(self.items.weight, std=features**-0.5)
        self.layers = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(features, 2, 4 * features, dropout=0.0, batch_first=True),
            num_layers=2,
        )
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        self.register_buffer("mask", mask)

    def hidden(self, seen):
        """(users, length) to (users, length, features)."""
        inputs = self.items(seen) + self.places.weight
        return self.layers(inputs, mask=self.mask, is_causal=True)

    def loss(self, seen):
        # What was seen is also what is to be predicted, one place later; padding predicts nothing.
        return linear_cross_entropy(
            self.hidden(seen), self.items.weight, seen, shift=1, ignore_index=PADDING
        )

    def plain_loss(self, seen):
        """The same with a score stored for each user, place and item."""
        scores = self.hidden(seen)[:, :-1] @ self.items.weight.T
        return F.cross_entropy(scores.flatten(0, 1), seen[:, 1:].flatten(), ignore_index=PADDING)


class Visits:
    """Users have a taste for one genre, and look at its popular items more than at others."""

    def __init__(self, users: int, length: int, device: str):
        self.users, self.length, self.device = users, length, device
        in_genre = (ITEMS - 1) // GENRES
        self.popularity = 1 / torch.arange(1.0, in_genre + 1, device=device)

    def draw(self):
        ranks = torch.multinomial(self.popularity, self.users * self.length, replacement=True)
        genre = torch.randint(GENRES, (self.users, 1), device=self.device)
        seen = 1 + ranks.view(self.users, self.length) * GENRES + genre
        count = torch.randint(2, self.length + 1, (self.users, 1), device=self.device)
        return seen.where(torch.arange(self.length, device=self.device) < count, PADDING)


def make(batch: int = 32, device: str = "cpu", length: int = 20):
    """The model, and what its batches are drawn from."""
    torch.manual_seed(0)
    return Recommender(length).to(device), Visits(batch, length, device)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=32, help="users")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    model, visits = make(args.batch, args.device)
    with torch.no_grad():
        first = visits.draw()
        print(f"cutloss {model.loss(first):.6f}, plain PyTorch {model.plain_loss(first):.6f}")
    scores = args.batch * (visits.length - 1) * ITEMS
    print(f"scores never stored: {scores * 4 / 2**20:.1f} MiB")

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(args.steps):
        optimizer.zero_grad()
        loss = model.loss(visits.draw())
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if step % 20 == 0 or step == args.steps - 1:
            print(f"step {step:3}  loss {losses[-1]:.4f}")
    return [loss.item() for loss in losses]


if __name__ == "__main__":
    main()

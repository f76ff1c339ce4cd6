"""A small causal language model: everything before the classifier."""

import torch
import torch.nn.functional as F
from torch import nn

HEAD = 32  # width of an attention head


class Block(nn.Module):
    def __init__(self, D):
        super().__init__()
        self.norm_attention = nn.LayerNorm(D)
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.attention_out = nn.Linear(D, D, bias=False)
        self.norm_mlp = nn.LayerNorm(D)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))

    def forward(self, x):  # (batch, length, D)
        batch, length, D = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, length, 3, D // HEAD, HEAD)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (batch, heads, length, HEAD)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, length, D))
        return x + self.mlp(self.norm_mlp(x))


class LanguageModel(nn.Module):
    """Returns the embeddings E that the loss takes; the classifier C is the word table itself."""

    def __init__(self, V, D, layers, length):
        super().__init__()
        self.words = nn.Embedding(V, D)
        self.positions = nn.Embedding(length, D)
        self.blocks = nn.ModuleList(Block(D) for _ in range(layers))
        self.norm = nn.LayerNorm(D)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    @property
    def classifier(self):
        return self.words.weight  # (V, D)

    def forward(self, ids):  # (batch, length)
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.words(ids) + self.positions(places)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)  # (batch, length, D)

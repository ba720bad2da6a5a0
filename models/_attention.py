"""Attention over sequences that are padded: rotary positions, and masks, True where there is something."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rotated(vectors: Tensor) -> Tensor:
    """Rotary positions (Su et al., arXiv 2104.09864) of [b, heads, t, size]: a product of two then depends on how far apart they stand."""
    half = vectors.shape[-1] // 2
    frequencies = 10_000.0 ** (-torch.arange(half, device=vectors.device) / half)
    angles = torch.arange(vectors.shape[2], device=vectors.device)[:, None] * frequencies
    cosine, sine = angles.cos().to(vectors), angles.sin().to(vectors)
    first, second = vectors[..., :half], vectors[..., half:]
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], -1)


def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean over what is there: [b, t, width] -> [b, width]."""
    share = (mask / mask.sum(1, keepdim=True)).to(hidden)
    return (hidden * share[..., None]).sum(1)


class Layer(nn.Module):
    """Attention of one sequence to itself or to another, then a perceptron, both normalised before (pre-LN) and beside the identity."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between, self.other = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key_value, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, other: Tensor, mask: Tensor) -> Tensor:
        """[b, t, width] asks `other` [b, s, width], of which the places in `mask` [b, s] are there."""
        query = self.query(self.before(hidden)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.key_value(self.other(other)).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(rotated(query), rotated(key), value, attn_mask=mask[:, None, None])
        hidden = hidden + self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))
        return hidden + self.dropout(self.perceptron(self.between(hidden)))

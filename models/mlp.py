"""A multilayer perceptron for tables: embedded categories beside the numbers, then equal blocks.

Blocks are Linear, LayerNorm, ReLU, Dropout. LayerNorm, since batch statistics depend on how a batch is cut over processes.
"""

import torch
from pydantic import Field
from torch import Tensor, nn

from data import Info
from engine.config import ModelConfig, UserError


class Config(ModelConfig):
    width: int = Field(256, ge=1)
    """units of a block"""
    depth: int = Field(3, ge=1)
    """number of blocks"""
    dropout: float = Field(0.1, ge=0, lt=1)
    """share of a block's outputs set to zero in training"""
    embedding: int = Field(8, ge=1)
    """size of a category's embedding"""


class Model(nn.Module):
    def __init__(self, config: Config, info: Info) -> None:
        super().__init__()
        if not info.numeric and not info.categories:
            raise UserError('model.name = "mlp": the data has neither numbers nor categories; choose a model made for it')
        # One table for all columns, each with its range of rows: one lookup a batch.
        starts = torch.tensor([0, *info.categories]).cumsum(0)
        self.register_buffer("starts", starts[:-1], persistent=False)
        self.embedding = nn.Embedding(sum(info.categories), config.embedding) if info.categories else None
        width = info.numeric + len(info.categories) * config.embedding
        blocks = []
        for _ in range(config.depth):
            blocks += [nn.Linear(width, config.width), nn.LayerNorm(config.width), nn.ReLU(), nn.Dropout(config.dropout)]
            width = config.width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width, info.outputs)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """float32 [b] for one output, else [b, outputs]: logits, or standardised values."""
        parts = [batch["numeric"]] if "numeric" in batch else []
        if self.embedding is not None:
            parts.append(self.embedding(batch["categorical"] + self.starts).flatten(1))
        output = self.head(self.blocks(torch.cat(parts, dim=1)))
        return output.squeeze(1) if output.shape[1] == 1 else output

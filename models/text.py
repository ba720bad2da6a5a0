"""Texts: a transformers model by name or folder, or a small encoder from scratch over hashed n-grams of tokens.

The encoder sums an embedding of each token with embeddings of the n-grams that end there (Bojanowski et al., "Enriching Word Vectors with
Subword Information", arXiv 1607.04606), which on a small data set do more than depth; then come layers of self-attention, and a mean.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from data import Info
from engine.config import UserError
from models._pretrained import PREFIX, Pretrained, build, exported

__all__ = ["Config", "Model", "exported"]


class Config(Pretrained):
    width: int = Field(128, ge=1)
    """size of a token's vector; this and what follows is of a model from scratch"""
    layers: int = Field(2, ge=0)
    """layers of self-attention; 0: only a mean of embeddings"""
    heads: int = Field(4, ge=1)
    """heads of self-attention, which divide width"""
    ngrams: int = Field(4, ge=1)
    """tokens of the longest n-grams that have embeddings; 1: none but the tokens themselves"""
    buckets: int = Field(2**17, ge=1)
    """embeddings of n-grams; n-grams whose hashes meet share one"""
    dropout: float = Field(0.1, ge=0, lt=1)
    """share of the outputs of layers, and of the mean, set to zero in training"""
    ngram_dropout: float = Field(0.0, ge=0, lt=1)
    """share of n-grams left out in training"""


class Model(nn.Module):
    prefix = PREFIX

    def __init__(self, config: Config, info: Info) -> None:
        super().__init__()
        more = info.more
        if "vocabulary" not in more:
            raise UserError('model.name = "text": the data has no texts; choose data.name = "text", or a model made for these data')
        self.files: dict[str, str] = {}
        if config.pretrained:
            kinds = {"binary": "multi_label_classification", "multiclass": "single_label_classification"}
            names = info.labels if info.outputs > 1 else info.labels[1:] or ["value"]
            head = {"num_labels": info.outputs, "problem_type": kinds.get(info.kind, "regression"), "id2label": dict(enumerate(names))}
            self.net = build("AutoModelForSequenceClassification", config, info, **head)
            tokens, places = (getattr(self.net.config, key, None) for key in ("vocab_size", "max_position_embeddings"))
            if tokens and more["vocabulary"] > tokens:
                raise UserError(f"data.tokenizer: has {more['vocabulary']:,} tokens, model.pretrained {tokens:,}; take the model's own tokenizer")
            if places and more["max_length"] > places:
                raise UserError(f"data.max_length = {more['max_length']}: model.pretrained takes at most {places} tokens")
            self.net.config.pad_token_id = more["pad"]
            self.files["config.json"] = self.net.config.to_json_string(use_diff=False)
        else:
            self.net = Encoder(config, info)

    def hidden(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Vectors of tokens [b, t, width], and bool [b, t], True on tokens."""
        tokens, mask = batch["tokens"], batch["mask"]
        if isinstance(self.net, Encoder):
            return self.net.hidden(tokens, mask), mask
        return self.net.base_model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state, mask

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """float32 [b] for one output, else [b, outputs]: logits, or standardised values."""
        if isinstance(self.net, Encoder):
            output = self.net(batch["tokens"], batch["mask"])
        else:
            output = self.net(input_ids=batch["tokens"], attention_mask=batch["mask"].long()).logits
        return output.squeeze(1) if output.shape[1] == 1 else output


class Encoder(nn.Module):
    def __init__(self, config: Config, info: Info) -> None:
        super().__init__()
        if config.layers and config.width % config.heads:
            raise UserError(f"model.heads = {config.heads}: must divide model.width = {config.width}")
        self.config = config
        self.tokens = nn.Embedding(info.more["vocabulary"], config.width)
        self.grams = nn.Embedding(config.buckets, config.width) if config.ngrams > 1 else None
        self.places = nn.Embedding(-(-info.more["max_length"] // 8) * 8, config.width) if config.layers else None
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width) if config.layers else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.width, info.outputs)
        for table in (table for table in (self.tokens, self.grams, self.places) if table is not None):
            nn.init.normal_(table.weight, std=0.1)

    def hidden(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """int64 [b, t], bool [b, t] -> float32 [b, t, width]"""
        hidden = self.tokens(tokens)
        if self.grams is not None:
            grams = self.grams(hashed(tokens, self.config.ngrams, self.config.buckets))
            if self.training and self.config.ngram_dropout:
                kept = torch.rand(grams.shape[:-1], device=grams.device) >= self.config.ngram_dropout
                grams = grams * kept.unsqueeze(-1) / (1 - self.config.ngram_dropout)
            hidden = hidden + grams.sum(2)
        if self.places is not None:
            hidden = hidden + self.places.weight[: tokens.shape[1]]
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return self.norm(hidden)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """int64 [b, t], bool [b, t] -> float32 [b, outputs]"""
        hidden, count = self.hidden(tokens, mask) * mask.unsqueeze(-1), mask.sum(1, keepdim=True)
        # A sum of independent embeddings grows like the root of their number.
        return self.head(self.dropout(hidden.sum(1) / (count if self.config.layers else count.sqrt()).to(hidden.dtype)))


def hashed(tokens: Tensor, longest: int, buckets: int) -> Tensor:
    """int64 [b, t] -> [b, t, longest - 1]: a number below `buckets` for each n-gram of 2 to `longest` tokens that ends at a token."""
    found, mixed = [], tokens
    for reach in range(1, longest):
        before = F.pad(tokens, (reach, 0))[:, : tokens.shape[1]]
        mixed = mixed * 1_000_003 + before * (2 * reach + 7919)  # wraps around, on any device alike
        found.append(((mixed ^ (mixed >> 17)) * 0x9E3779B1 >> 7) % buckets)
    return torch.stack(found, dim=2)


class Layer(nn.Module):
    """Self-attention and a perceptron, normalised before (pre-LN)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads, width = config.heads, config.width
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        query, key, value = self.project(self.before(hidden)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None])
        hidden = hidden + self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))
        return hidden + self.dropout(self.perceptron(self.between(hidden)))

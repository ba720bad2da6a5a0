"""Causal language models of transformers: fine-tuned by name or folder, or from scratch by size."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from data import Info
from engine.config import UserError
from engine.metrics import Kind
from models._pretrained import PREFIX, Pretrained, build, exported

__all__ = ["KINDS", "Config", "Model", "exported", "perplexity", "token_loss"]


class Config(Pretrained):
    architecture: Literal["llama", "gpt2"] = "llama"
    """of a model from scratch; so are the sizes below"""
    width: int = Field(256, ge=2)
    """size of a token's vector"""
    layers: int = Field(4, ge=1)
    """blocks of self-attention and a perceptron"""
    heads: int = Field(4, ge=1)
    """heads of self-attention, which divide width"""
    dropout: float = Field(0.0, ge=0, lt=1)
    """share of outputs set to zero in training"""


class Model(nn.Module):
    prefix = PREFIX

    def __init__(self, config: Config, info: Info) -> None:
        super().__init__()
        if info.kind != "language":
            raise UserError('model.name = "causal_lm": the data are no running text; choose data.name = "corpus", or a model made for these data')
        self.net = build("AutoModelForCausalLM", config, info, None if config.pretrained else from_scratch(config, info))
        self.files = {"config.json": self.net.config.to_json_string(use_diff=False)}
        sizes = self.net.config
        # Forward and backward: 6 a weight that is multiplied with, and the products of queries, keys and values (arXiv 2204.02311, appendix B).
        looked_up = 0 if sizes.tie_word_embeddings else self.net.get_input_embeddings().weight.numel()
        weights = sum(parameter.numel() for parameter in self.net.parameters()) - looked_up
        self.flops_per_token = 6 * weights + 12 * sizes.num_hidden_layers * sizes.hidden_size * info.more["max_length"]

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """float32 [b]: the mean cross-entropy of a sample's tokens. (Its logits would be [b, t, vocabulary].)"""
        tokens, count = batch["tokens"], batch["target"]
        # What fills a short block stands after its text, where causal attention does not see it.
        logits = self.net(input_ids=tokens[:, :-1], use_cache=False).logits.float()
        losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        counted = torch.arange(losses.shape[1], device=losses.device) < count[:, None]
        return (losses * counted).sum(1) / count


def from_scratch(config: Config, info: Info) -> Any:
    import transformers

    if config.width % (2 * config.heads):
        raise UserError(f"model.width = {config.width}: must be a multiple of 2 x model.heads ({config.heads})")
    common = {"vocab_size": info.more["vocabulary"], "bos_token_id": None, "eos_token_id": info.more["end"], "tie_word_embeddings": True}
    if config.architecture == "gpt2":
        drop = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout)
        sizes = {"n_embd": config.width, "n_layer": config.layers, "n_head": config.heads, "n_positions": info.more["max_length"]}
        return transformers.GPT2Config(**common, **drop, **sizes)
    sizes = {"hidden_size": config.width, "num_hidden_layers": config.layers, "num_attention_heads": config.heads}
    more = {"intermediate_size": 4 * config.width, "max_position_embeddings": info.more["max_length"], "attention_dropout": config.dropout}
    return transformers.LlamaConfig(**common, **sizes, **more)


def token_loss(output: Tensor, batch: dict[str, Tensor], progress: Any) -> Tensor:
    """The model's own; samples weigh as many as their tokens."""
    return output


def perplexity(info: Info) -> Any:
    """exp of the mean cross-entropy over all tokens; of samples' perplexities [n] and numbers of tokens [n]."""
    from torchmetrics import Metric

    class Perplexity(Metric):
        def __init__(self) -> None:
            super().__init__()
            self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
            self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

        def update(self, perplexities: Tensor, counts: Tensor) -> None:
            self.total += (perplexities.double().log() * counts).sum()
            self.count += counts.sum()

        def compute(self) -> Tensor:
            return (self.total / self.count).exp()

    return Perplexity()


KINDS = {"language": Kind("token_loss", ("perplexity",), "min perplexity", lambda output, info: output.double().exp())}

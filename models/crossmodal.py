"""Sound and transcript together: projections of two encoders' vectors, attention of each to the other, attention of each to itself, a mean.

An encoder is a run of this repository (models/audio.py, models/text.py), a pretrained model of transformers, or none where the data has
features already. Frozen encoders run once over the training files; what they say is cached by the hash of their weights. Their weights
are kept in best/ with the rest, so that new files need nothing else.
"""

import dataclasses

import torch
from pydantic import Field
from torch import Tensor, nn

from data import Info, Splits
from engine.config import ModelConfig, UserError
from models._attention import Layer, pooled
from models._encoders import Encoded, encoded, open_encoder

SIDES = ("audio", "text")
HEADS = ("net.head", "net.classifier", "net.projector", "net.pre_classifier", "net.score")


class Config(ModelConfig):
    audio: str = ""
    """run folder of models/audio.py, or a pretrained model's name or folder; empty: the data has features of sounds"""
    text: str = ""
    """run folder of models/text.py, or a pretrained model's name or folder; empty: the data has features of transcripts"""
    frozen: bool = True
    """encoders stay as they are, and run once over the training files"""
    width: int = Field(64, ge=8)
    """size of the vectors after the projections"""
    heads: int = Field(4, ge=1)
    """heads of attention; twice as many divide width"""
    cross_layers: int = Field(1, ge=0)
    """layers in which each side attends to the other"""
    layers: int = Field(1, ge=0)
    """layers in which each side attends to itself"""
    dropout: float = Field(0.2, ge=0, lt=1)
    """share of the outputs of layers set to zero in training"""


class Model(nn.Module):
    def __init__(self, config: Config, info: Info) -> None:
        super().__init__()
        if config.width % (2 * config.heads):
            raise UserError(f"model.heads = {config.heads}: twice as many must divide model.width = {config.width}")
        self.frozen, self.files = config.frozen, {}
        self.encoders, sizes = nn.ModuleDict(), {}
        for side in SIDES:
            if getattr(config, side):
                encoder, self.files[f"{side}.json"] = open_encoder(side, getattr(config, side), info)
                # A head that nobody asks has no gradient, which DDP would wait for.
                for name, parameter in encoder.named_parameters():
                    parameter.requires_grad_(not config.frozen and not name.startswith(HEADS) and ".pooler." not in name)
                self.encoders[side] = encoder
                shape = encoder.net.config
                sizes[side] = getattr(shape, "hidden_size", None) or shape.width
            elif f"{side}_size" not in info.more or (side == "audio" and "form" in info.more):
                raise UserError(f"model.{side}: missing; name a run or a pretrained model, or a column of .npy features in data.{side}")
            else:
                sizes[side] = info.more[f"{side}_size"]
        self.projections = nn.ModuleDict({side: nn.Sequential(nn.LayerNorm(size), nn.Linear(size, config.width)) for side, size in sizes.items()})
        shape = (config.width, config.heads, config.dropout)
        self.cross = nn.ModuleList(nn.ModuleDict({side: Layer(*shape) for side in SIDES}) for _ in range(config.cross_layers))
        self.layers = nn.ModuleList(nn.ModuleDict({side: Layer(*shape) for side in SIDES}) for _ in range(config.layers))
        self.head = nn.Sequential(nn.LayerNorm(2 * config.width), nn.Dropout(config.dropout), nn.Linear(2 * config.width, info.outputs))

    def train(self, mode: bool = True) -> "Model":
        """A frozen encoder knows no dropout."""
        super().train(mode)
        self.encoders.train(mode and not self.frozen)
        return self

    def vectors(self, side: str, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """[b, t, size] and bool [b, t] of one side, from the batch where they are there, else from the encoder."""
        if f"{side}_vectors" in batch:
            return batch[f"{side}_vectors"], batch[f"{side}_vectors_mask"]
        if side in self.encoders:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
                return self.encoders[side].hidden(batch)
        return batch[side], batch["audio_mask" if side == "audio" else "mask"]

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits or standardised values, [b] for one output, else [b, outputs]."""
        hidden, masks = {}, {}
        for side in SIDES:
            vectors, masks[side] = self.vectors(side, batch)
            hidden[side] = self.projections[side](vectors)
        for layer in self.cross:
            hidden = {side: layer[side](hidden[side], hidden[other], masks[other]) for side, other in (SIDES, SIDES[::-1])}
        for layer in self.layers:
            hidden = {side: layer[side](hidden[side], hidden[side], masks[side]) for side in SIDES}
        output = self.head(torch.cat([pooled(hidden[side], masks[side]) for side in SIDES], 1))
        return output.squeeze(1) if output.shape[1] == 1 else output


def prepare(model: Model, splits: Splits, device: torch.device) -> Splits:
    """Run the frozen encoders over all parts, once."""
    if not model.frozen or not model.encoders:
        return splits
    model.to(device).eval()
    parts = {part: Encoded(data, {side: encoded(model.encoders[side], side, data, device) for side in model.encoders})
             for part, data in (("train", splits.train), ("valid", splits.valid), ("test", splits.test)) if data is not None}  # fmt: skip
    return dataclasses.replace(splits, **parts)

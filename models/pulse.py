"""Heart rate from windows of signals: a convolutional network for each clip and a recurrent one over the sequence of clips.

The shape is RhythmNet's (Niu et al., arXiv 1910.11515). The output is a distribution over beats per minute, in bins of equal ratio: on such
an axis another heart rate is a shift, for the fundamental and its harmonics alike, so that convolutions over the spectrum need to learn it once.
"""

import math
import types
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from data import Info
from engine.config import ModelConfig, UserError
from models.vision import residual

SLOWEST, FASTEST, RATIO = 30.0, 240.0, 1.02
BINS = 1 + round(math.log(FASTEST / SLOWEST) / math.log(RATIO))
WITH_HARMONICS = BINS + round(math.log(2) / math.log(RATIO))


def rates(count: int = BINS) -> Tensor:
    """Beats per minute of each bin, [count]; those after the first BINS are harmonics."""
    return SLOWEST * RATIO ** torch.arange(count)


class Config(ModelConfig):
    backbone: Literal["spectrum", "residual"] = "spectrum"
    """of a clip: convolutions over its spectrum, or the residual network of models/vision.py over the window as an image"""
    width: int = Field(24, ge=8, multiple_of=8)
    """channels of the convolutions"""
    depth: int = Field(3, ge=1)
    """convolutions over the spectrum, or stages of the residual network"""
    recurrent: Literal["none", "gru", "lstm"] = "gru"
    """network over the sequence of clips"""
    units: int = Field(64, ge=1)
    """of the recurrent network, in each direction"""
    layers: int = Field(1, ge=1)
    """of the recurrent network"""
    bidirectional: bool = True
    """whether a clip knows of later clips"""
    dropout: float = Field(0.2, ge=0, lt=1)
    """share of the features set to zero in training"""


class Spectrum(nn.Module):
    """Signals [n, channels, window] -> features [n, width, WITH_HARMONICS], logits of the bins from the same convolutions."""

    def __init__(self, channels: int, window: int, rate: float, config: Config) -> None:
        super().__init__()
        angles = 2 * math.pi * rates(WITH_HARMONICS).double() / 60 / rate * torch.arange(window).double()[:, None]
        waves = torch.cat([angles.cos(), angles.sin()], 1) * torch.hann_window(window, dtype=torch.float64)[:, None]
        self.register_buffer("waves", waves.float(), persistent=False)
        self.start = nn.Conv1d(channels, config.width, 7, padding=3)
        self.blocks = nn.ModuleList()
        for reach in (2**place for place in range(config.depth)):
            convolution = nn.Conv1d(config.width, config.width, 7, padding=3 * reach, dilation=reach)
            norm = nn.GroupNorm(config.width // 8, config.width)
            self.blocks.append(nn.Sequential(norm, nn.GELU(), nn.Dropout(config.dropout), convolution))

    def forward(self, signal: Tensor) -> Tensor:
        signal = signal - signal.mean(-1, keepdim=True)
        real, imaginary = (signal @ self.waves).chunk(2, -1)
        power = torch.hypot(real, imaginary)
        logarithm = (power / power.mean(-1, keepdim=True).clamp_min(1e-12) + 0.05).log()
        features = self.start(logarithm - logarithm.mean(-1, keepdim=True))
        for block in self.blocks:
            features = features + block(features)
        return features


class Model(nn.Module):
    def __init__(self, config: Config, info: Info) -> None:
        super().__init__()
        if "signal" not in info.more:
            raise UserError('model.name = "pulse": the data has no signals; set data.name = "signals"')
        *shape, window = info.more["signal"]
        self.backbone = config.backbone
        if config.backbone == "spectrum":
            self.clip: nn.Module = Spectrum(math.prod(shape), window, info.more["rate"], config)
            self.logits = nn.Conv1d(config.width, 1, 1)
            self.squeeze = nn.Sequential(nn.GELU(), nn.Conv1d(config.width, 2, 5, 4, 2), nn.Flatten())
            features = 2 * math.ceil(WITH_HARMONICS / 4)
        else:
            # A signal is an image of one colour, its channels above one another; a map has a colour for each channel.
            self.clip = residual(shape[0] if len(shape) > 1 else 1, config.width, config.depth, 1)
            features = config.width * 2 ** (config.depth - 1)
            self.logits = nn.Linear(features, BINS)
        self.dropout = nn.Dropout(config.dropout)
        self.sequence = None
        if config.recurrent != "none":
            kind = nn.GRU if config.recurrent == "gru" else nn.LSTM
            self.sequence = kind(features, config.units, config.layers, batch_first=True, bidirectional=config.bidirectional)
            self.correction = nn.Linear(config.units * (1 + config.bidirectional), BINS)
        self.register_buffer("rates", rates(), persistent=False)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """[b, clips, 1 + BINS] in training, else [b, 1 + BINS] of the middle clip: the rate in beats per minute, then the bins' logits."""
        count, clips = batch["signal"].shape[:2]
        signal = batch["signal"].flatten(0, 1)
        if self.backbone == "spectrum":
            features = self.clip(signal.flatten(1, -2))
            logits = self.logits(features)[:, 0, :BINS].unflatten(0, (count, clips))
            features = self.squeeze(features)
        else:
            signal = signal if signal.dim() == 4 else signal[:, None]
            features = self.clip((signal - signal.mean(-1, keepdim=True)) / (signal.std(-1, keepdim=True) + 1e-6))
            logits = self.logits(features).unflatten(0, (count, clips))
        if self.sequence is not None:
            told, _ = self.sequence(self.dropout(features).unflatten(0, (count, clips)))
            logits = logits + self.correction(self.dropout(told))
        logits = logits.float()
        output = torch.cat([logits.softmax(-1) @ self.rates[:, None], logits], -1)
        return output if self.training else output[:, clips // 2]


def rate(output: Tensor, info: Info) -> Tensor:
    return output[..., 0].double()


KINDS = {"regression": types.SimpleNamespace(loss="label_distribution", metrics=("mae", "rmse", "pearson"), best="min mae", predict=rate)}


def truth(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Beats per minute of every clip of the output; NaN where a sequence goes on beyond its recording."""
    return batch["targets"] if output.dim() == 3 else batch["target"]


def over_clips(values: Tensor, rates: Tensor) -> Tensor:
    """The mean of each sample over its clips [b]."""
    there = ~rates.isnan()
    return values if values.dim() == 1 else values.where(there, 0).sum(1) / there.sum(1)


def label_distribution(
    output: Tensor,
    batch: dict[str, Tensor],
    progress: Any,
    *,
    sigma: float = 4.0,
    distribution: float = 1.0,
    spectrum: float = 0.0,
    distance: float = 0.0,
    ramp: float = 0.0,
) -> Tensor:
    """A weighted sum of three parts, after PhysFormer (Yu et al., arXiv 2111.12082): the divergence of the output from a normal distribution around
    the rate (`sigma`, beats per minute), the cross-entropy of its spectrum with the bin of the rate, and the distance of its mean, in units of sigma.

    The weights of the latter two rise from nothing over the first `ramp` epochs: the shape first, then the place.
    """
    rates_ = truth(output, batch)
    known, grid = rates_.nan_to_num(SLOWEST)[..., None], rates(output.shape[-1] - 1).to(output)
    logarithm = output[..., 1:].log_softmax(-1)
    label = (-0.5 * ((grid - known) / sigma) ** 2).log_softmax(-1)
    risen = min(1.0, progress.epoch / ramp) if ramp and progress else 1.0
    value = distribution * (label.exp() * (label - logarithm)).sum(-1)
    if spectrum:
        value = value - spectrum * risen * logarithm.gather(-1, (grid - known).abs().argmin(-1, keepdim=True)).squeeze(-1)
    if distance:
        value = value + distance * risen * (output[..., 0] - known.squeeze(-1)).abs() / sigma
    return over_clips(value, rates_)


def mse(output: Tensor, batch: dict[str, Tensor], progress: Any) -> Tensor:
    rates_ = truth(output, batch)
    return over_clips((output[..., 0] - rates_.nan_to_num()) ** 2, rates_)


def negative_pearson(output: Tensor, batch: dict[str, Tensor], progress: Any) -> Tensor:
    """1 - Pearson's r over all clips of the micro-batch. It couples samples, so it depends on how a batch is cut, and leaves the level free."""
    rates_ = truth(output, batch)
    there = ~rates_.isnan()
    pairs = torch.stack([output[..., 0][there], rates_[there]])
    pairs = F.normalize(pairs - pairs.mean(1, keepdim=True), dim=1)
    return 1 - (pairs[0] * pairs[1]).sum()

"""Sounds: a small network from nothing over log-mel frames, by convolutions and attention or by their statistics; or a classifier of
transformers over waveforms."""

import itertools
import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from data import Info, Splits
from engine.config import UserError
from models._attention import Layer, pooled
from models._pretrained import PREFIX, Pretrained, build, exported

__all__ = ["Config", "Model", "exported"]


QUANTILES = (0.1, 0.5, 0.9)
CEPSTRA = 24


class Config(Pretrained):
    network: Literal["attention", "statistics"] = "attention"
    """from nothing: convolutions and attention over frames, or, where there are few sounds, a perceptron over statistics of the whole sound"""
    channels: int = Field(16, ge=1)
    """of the first convolution; the second has twice, the third four times as many"""
    width: int = Field(96, ge=8)
    """size of a frame's vector, or of the perceptron's layer"""
    layers: int = Field(2, ge=0)
    """layers of self-attention"""
    heads: int = Field(4, ge=1)
    """heads of self-attention, which divide width"""
    normalize: Literal["corpus", "utterance"] = "corpus"
    """what is subtracted from each band: its mean over the training part, or over the sound itself, which takes loudness and microphone away"""
    dropout: float = Field(0.2, ge=0, lt=1)
    """share of the outputs of layers set to zero in training"""
    masks: int = Field(2, ge=0)
    """spans of time, and as many bands, that are blotted out in training (SpecAugment)"""
    mask_time: float = Field(0.2, ge=0, le=1)
    """longest span blotted out, as a share of the sound"""
    mask_bands: float = Field(0.2, ge=0, le=1)
    """widest band blotted out, as a share of the spectrum"""
    stretch: float = Field(0.15, ge=0, lt=1)
    """largest relative change of tempo in training"""
    shift: float = Field(0.05, ge=0, lt=1)
    """largest shift of pitch in training, as a share of the spectrum"""


class Model(nn.Module):
    prefix = PREFIX

    def __init__(self, config: Config, info: Info) -> None:
        super().__init__()
        if "audio_size" not in info.more and "rate" not in info.more:
            raise UserError('model.name = "audio": the data has no sounds; set data.name = "utterances" and data.audio')
        self.files: dict[str, str] = {}
        waveform = info.more.get("form") == "waveform"
        if config.pretrained:
            self.net = build("AutoModelForAudioClassification", config, info, num_labels=info.outputs)
            if not waveform or not hasattr(self.net.config, "conv_stride"):
                takes = 'waveforms; set data.form = "waveform"' if not waveform else "no waveforms; choose one that does, such as HuBERT"
                raise UserError(f"model.pretrained = {config.pretrained!r}: the model takes {takes}")
            # Their own masks come from NumPy's generator, which is no function of the step; dropped layers have no gradient, which DDP waits for.
            self.net.config.apply_spec_augment, self.net.config.layerdrop = False, 0.0
            for name, parameter in self.net.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and not name.endswith("masked_spec_embed"))
            self.files["config.json"] = self.net.config.to_json_string(use_diff=False)
        elif waveform:
            raise UserError('data.form = "waveform": is for model.pretrained; a model from nothing takes "logmel"')
        else:
            self.net = {"attention": Encoder, "statistics": Statistics}[config.network](config, info)

    def hidden(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Vectors of frames [b, t, width], and bool [b, t], True where there is sound."""
        audio, mask = batch["audio"], batch["audio_mask"]
        if isinstance(self.net, Encoder | Statistics):
            return self.net.hidden(audio, mask)
        body = self.net.base_model
        # As their authors trained them: those with GroupNorm over time know no mask.
        given = mask.long() if self.net.config.feat_extract_norm == "layer" else None
        hidden = body(audio, attention_mask=given).last_hidden_state
        return hidden, body._get_feature_vector_attention_mask(hidden.shape[1], mask.long()).bool()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits or standardised values, [b] for one output, else [b, outputs]."""
        if isinstance(self.net, Encoder | Statistics):
            output = self.net.head(self.net.dropout(pooled(*self.hidden(batch))))
        else:
            given = batch["audio_mask"].long() if self.net.config.feat_extract_norm == "layer" else None
            output = self.net(batch["audio"], attention_mask=given).logits
        return output.squeeze(1) if output.shape[1] == 1 else output


class Encoder(nn.Module):
    """Three convolutions, each halving time and spectrum, then self-attention."""

    def __init__(self, config: Config, info: Info) -> None:
        super().__init__()
        if config.width % (2 * config.heads):
            raise UserError(f"model.heads = {config.heads}: twice as many must divide model.width = {config.width}")
        self.config, size = config, info.more["audio_size"]
        for name, default in (("mean", 0.0), ("std", 1.0)):  # of each band over the training part
            self.register_buffer(name, torch.tensor(info.more.get(f"audio_{name}", [default] * size)), persistent=False)
        channels = [1, config.channels, 2 * config.channels, 4 * config.channels]
        self.convolutions = nn.ModuleList(nn.Conv2d(inputs, outputs, 3, 2, 1) for inputs, outputs in itertools.pairwise(channels))
        self.norms = nn.ModuleList(nn.GroupNorm(1, outputs) for outputs in channels[1:])
        self.project = nn.Linear(channels[-1] * -(-size // 8), config.width)
        self.layers = nn.ModuleList(Layer(config.width, config.heads, config.dropout) for _ in range(config.layers))
        self.norm, self.dropout = nn.LayerNorm(config.width), nn.Dropout(config.dropout)
        self.channel_dropout = nn.Dropout2d(config.dropout / 2)
        self.head = nn.Linear(config.width, info.outputs)

    def hidden(self, audio: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """[b, t, size], bool [b, t] -> [b, t / 8, width], bool [b, t / 8]"""
        there = mask[:, :, None]
        own = (audio * there).sum(1, keepdim=True) / there.sum(1, keepdim=True)
        image = (audio - (own if self.config.normalize == "utterance" else self.mean)) / self.std * there
        if self.training:
            image = varied(image, mask, self.config)
        image = image[:, None]
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            # Silence before each convolution, so that a sound does not depend on what its batch is padded to.
            image = convolution(image * mask[:, None, :, None])
            # Normalised frame by frame, for the same reason.
            image = norm(image.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(image), -1)).transpose(1, 2)
            image, mask = self.channel_dropout(F.gelu(image)), mask[:, ::2]
        hidden = self.project(image.transpose(1, 2).flatten(2))
        for layer in self.layers:
            hidden = layer(hidden, hidden, mask)
        return self.norm(hidden), mask


class Statistics(nn.Module):
    """What classic systems hear emotions by (functionals of spectrum and cepstrum, as in Eyben et al., openSMILE, 2010), and a perceptron."""

    def __init__(self, config: Config, info: Info) -> None:
        super().__init__()
        self.config, size = config, info.more["audio_size"]
        kept = min(CEPSTRA, size)
        cosines = torch.cos(math.pi / size * (torch.arange(size) + 0.5)[:, None] * torch.arange(kept)) * (2 / size) ** 0.5
        self.register_buffer("cosines", cosines, persistent=False)  # of the discrete cosine transform, type II
        count = (size + kept) * (3 + len(QUANTILES))
        for name, value in (("mean", torch.zeros(count)), ("std", torch.ones(count))):  # of each statistic over the training part; see prepare()
            self.register_buffer(name, value)
        self.dropout, self.before = nn.Dropout(config.dropout), nn.Dropout(0.4 * config.dropout)
        self.layer, self.head = nn.Linear(count, config.width), nn.Linear(config.width, info.outputs)

    def described(self, audio: Tensor, mask: Tensor) -> Tensor:
        """[b, t, size], bool [b, t] -> [b, statistics]: mean, deviation, deviation of the change between frames, and quantiles of each band."""
        values = torch.cat([audio, audio @ self.cosines], -1)
        mean, deviation = moments(values, mask)
        _, change = moments(values.diff(dim=1), mask[:, 1:])  # its mean tells the first and the last frame alone
        ranked, last = values.masked_fill(~mask[..., None], torch.inf).sort(1).values, mask.sum(1) - 1
        places = [(share * last).round().long()[:, None, None].expand(-1, 1, values.shape[-1]) for share in QUANTILES]
        return torch.cat([mean, deviation, change, *(ranked.gather(1, place)[:, 0] for place in places)], -1)

    def hidden(self, audio: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """[b, t, size], bool [b, t] -> [b, 1, width], bool [b, 1]: a sequence of one."""
        statistics = (self.described(audio, mask) - self.mean) / self.std
        return F.gelu(self.layer(self.before(statistics)))[:, None], mask[:, :1]


def moments(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation over what is there: [b, t, n], bool [b, t] -> [b, n] each. One frame has no change: zeros."""
    there, count = mask[..., None], mask.sum(1, keepdim=True).clamp_min(1)
    mean = (values * there).sum(1) / count
    return mean, (((values - mean[:, None]) ** 2 * there).sum(1) / count + 1e-6).sqrt()


def prepare(model: Model, splits: Splits, device: torch.device) -> Splits:
    """Measure the scale of each statistic over the training part."""
    net = model.net
    if isinstance(net, Statistics):
        batches = map(splits.train.__getitems__, torch.arange(len(splits.train)).split(64))
        found = torch.cat([net.described(batch["audio"], batch["audio_mask"]) for batch in batches])
        net.mean.copy_(found.mean(0))
        net.std.copy_(found.std(0, correction=0) + 1e-5)
    return splits


def varied(image: Tensor, mask: Tensor, config: Config) -> Tensor:
    """[b, t, size] of another tempo and pitch, with spans of time and bands blotted out (SpecAugment, Park et al., arXiv 1904.08779)."""
    count, length, size = image.shape
    share = lambda *shape: torch.rand(count, *shape, device=image.device)  # noqa: E731
    if config.stretch or config.shift:
        moves = torch.zeros(count, 2, 3, device=image.device)
        moves[:, 0, 0] = 1
        moves[:, 0, 2] = 2 * config.shift * (2 * share() - 1)
        moves[:, 1, 1] = 1 + config.stretch * (2 * share() - 1)
        moves[:, 1, 2] = (moves[:, 1, 1] - 1) * (2 * share() - 1)
        grid = F.affine_grid(moves, [count, 1, length, size], align_corners=False)
        image = F.grid_sample(image[:, None], grid, padding_mode="border", align_corners=False)[:, 0]
    for _ in range(config.masks):
        image = image.masked_fill(blots(share(2), mask.sum(1), config.mask_time, length)[:, :, None], 0)
        image = image.masked_fill(blots(share(2), torch.full_like(share(), size), config.mask_bands, size)[:, None], 0)
    return image


def blots(random: Tensor, places: Tensor, widest: float, length: int) -> Tensor:
    """bool [b, length]: one span within the first `places` [b] of each, by two random numbers [b, 2]."""
    span = random[:, :1] * widest * places[:, None]
    start = random[:, 1:] * (places[:, None] - span)
    line = torch.arange(length, device=random.device)
    return (line >= start) & (line < start + span)

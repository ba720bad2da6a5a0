"""Images: a small residual network of our own, or a pretrained classifier of transformers or timm."""

import itertools
import json
from pathlib import Path

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from data import Info
from engine.config import UserError
from models._pretrained import PREFIX, Pretrained, build, exported

__all__ = ["Config", "Model", "exported"]


class Config(Pretrained):
    width: int = Field(32, ge=8, multiple_of=8)
    """channels of the first stage; each further stage has twice as many and half the pixels a side. This and what follows is of a model
    from nothing; pretrained = "timm:NAME" takes one of timm"""
    stages: int = Field(3, ge=1)
    """stages of equal resolution"""
    blocks: int = Field(1, ge=1)
    """residual blocks of a stage"""
    dropout: float = Field(0.1, ge=0, lt=1)
    """share of the pooled features set to zero in training"""


class Block(nn.Module):
    """Two convolutions beside the identity (He et al., arXiv 1603.05027), with GroupNorm, since batch statistics depend on the cut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(norm(inputs), nn.ReLU(), nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False))
        self.second = nn.Sequential(norm(outputs), nn.ReLU(), nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False))
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        return self.shortcut(image) + self.second(self.first(image))


def norm(channels: int) -> nn.Module:
    return nn.GroupNorm(min(8, channels // 4), channels)


def residual(channels: int, width: int, stages: int, blocks: int) -> nn.Sequential:
    """[b, channels, h, w] -> features [b, width x 2^(stages - 1)], pooled over the whole image."""
    widths = [width, *(width * 2**stage for stage in range(stages) for _ in range(blocks))]
    first = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
    layers = [Block(inputs, outputs, 2 if outputs > inputs else 1) for inputs, outputs in itertools.pairwise(widths)]
    return nn.Sequential(first, *layers, norm(widths[-1]), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Model(nn.Module):
    prefix = PREFIX

    def __init__(self, config: Config, info: Info) -> None:
        super().__init__()
        if "image" not in info.more:
            raise UserError('model.name = "vision": the data has no images; set data.name = "images"')
        channels, size, _ = info.more["image"]
        self.files: dict[str, str] = {}
        if not config.pretrained:
            features = residual(channels, config.width, config.stages, config.blocks)
            head = nn.Linear(config.width * 2 ** (config.stages - 1), info.outputs)
            self.net: nn.Module = nn.Sequential(features, nn.Dropout(config.dropout), head)
            self.mean, self.std, self.size = [0.5], [0.5], size
        elif config.pretrained.startswith("timm:"):
            self.net, self.mean, self.std, self.size = timm_model(config.pretrained[5:], info, size)
        else:
            self.net = build("AutoModelForImageClassification", config, info, num_labels=info.outputs)
            self.mean, self.std, self.files = scale(info.folder or config.pretrained, getattr(self.net.config, "num_channels", 3))
            self.files["config.json"] = self.net.config.to_json_string(use_diff=False)
            wanted = getattr(self.net.config, "image_size", size)
            self.size = wanted if isinstance(wanted, int) else wanted[0]

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits or values, [b] for one output, else [b, outputs], of batch["image"] [b, channels, h, w] in [0, 1]."""
        image = batch["image"]
        mean, std = (image.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        image = (image - mean) / std  # grey becomes three channels where there are three means
        if image.shape[-1] != self.size:
            image = F.interpolate(image, (self.size, self.size), mode="bilinear", antialias=True)
        output = self.net(image)
        output = getattr(output, "logits", output)
        return output.squeeze(1) if output.shape[1] == 1 else output


def scale(name: str, channels: int) -> tuple[list[float], list[float], dict[str, str]]:
    """Mean and deviation of each channel that a classifier wants, and the file that says so. A grey image becomes as many channels."""
    try:
        file = Path(name, "preprocessor_config.json")
        if not file.exists():
            from transformers.utils import cached_file

            file = Path(cached_file(name, file.name))
        told = json.loads(file.read_text())
    except (OSError, ValueError, TypeError):
        return [0.5] * channels, [0.5] * channels, {}
    mean, std = (told.get(key, [0.5] * channels) for key in ("image_mean", "image_std"))
    return mean, std, {file.name: json.dumps(told)}


def timm_model(name: str, info: Info, size: int) -> tuple[nn.Module, list[float], list[float], int]:
    try:
        import timm
    except ImportError:
        raise UserError(f'model.pretrained = "timm:{name}": needs a package that is not installed: pip install timm') from None
    net = timm.create_model(name, pretrained=not info.folder, num_classes=info.outputs)
    wanted = timm.data.resolve_model_data_config(net)
    return net, list(wanted["mean"]), list(wanted["std"]), wanted["input_size"][-1] if wanted.get("fixed_input_size") else size

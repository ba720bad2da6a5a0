"""Encoders for models over several senses: runs of this repository or models of transformers, and what they say, kept on the disk."""

import dataclasses
import hashlib
import json
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from data import Info, _cache
from data._dataset import TableDataset
from engine.config import UserError, module, read_toml, validate


def open_encoder(side: str, name: str, info: Info) -> tuple[nn.Module, str]:
    """The model of a run or of transformers, and a JSON that says how to build it again. Raises UserError."""
    described = json.loads(Path(info.folder, f"{side}.json").read_text()) if info.folder else describe(side, name, info)
    file = module("models", described["model"]["name"])
    config, _ = validate("model", file.Config, described["model"])
    with tempfile.TemporaryDirectory() as folder:
        for given, text in described["files"].items():
            Path(folder, Path(given).name).write_text(text)  # whoever wrote the file may have named another folder
        place = folder if described["files"] or described["run"] else ""
        encoder = file.Model(config, types.SimpleNamespace(**described["info"] | {"folder": place}))
    if described["run"] and not info.folder:  # in inference the weights come with the whole model's
        weights: dict[str, Tensor] = {}
        for shard in Path(described["run"]).glob("model*.safetensors"):
            weights |= load_file(shard)
        try:
            encoder.net.load_state_dict(weights)  # in files the names lack the model's prefix
        except RuntimeError as error:
            said = str(error).splitlines()[1].strip()
            raise UserError(f"{described['run']}: the weights do not fit ({said}); was models/ edited since?") from None
    return encoder, json.dumps(described | {"files": getattr(encoder, "files", {})})


def describe(side: str, name: str, info: Info) -> dict[str, Any]:
    """Settings, info and transformers config of an encoder. Raises UserError where the run does not fit the data."""
    best = next((path for path in (Path(name, "best"), Path(name)) if (path / "info.json").exists()), None)
    if best is None:
        if Path(name, "config.toml").exists():
            raise UserError(f"model.{side} = {name!r}: the run has not ended, so there is no best/ yet; train it first")
        return {"run": "", "model": {"name": side, "pretrained": name}, "info": dataclasses.asdict(info), "files": {}}
    told = json.loads((best / "info.json").read_text())
    for key in {"audio": ("form", "rate", "audio_size"), "text": ("vocabulary", "pad")}[side]:
        there, here = told["more"].get(key), info.more.get(key)
        if there != here:
            remedy = f"the audio keys of {best}/config.toml" if side == "audio" else f'data.tokenizer = "{best}"'
            raise UserError(f"model.{side} = {name!r}: was trained on other inputs ({key} = {there!r} there, {here!r} in the data); set {remedy}")
    files = {path.name: path.read_text() for path in best.glob("config.json")}
    return {"run": str(best), "model": read_toml(best / "config.toml")["model"], "info": told, "files": files}


class Encoded(Dataset):
    """A part with its encoders' vectors in place of sounds and transcripts."""

    def __init__(self, dataset: Any, columns: dict[str, _cache.Arrays]) -> None:
        self.dataset, self.columns, self.lengths = dataset, columns, dataset.lengths
        if hasattr(dataset, "weights"):
            self.weights = dataset.weights

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, positions: Tensor) -> dict[str, Tensor]:
        places = positions % len(self)
        batch = TableDataset.__getitems__(self.dataset, places) if len(self.columns) == 2 else self.dataset.__getitems__(places)
        for side, column in self.columns.items():
            batch[f"{side}_vectors"], batch[f"{side}_vectors_mask"] = column.padded(places.numpy())
        return batch


def encoded(encoder: nn.Module, side: str, dataset: Any, device: torch.device, size: int = 64) -> _cache.Arrays:
    """The vectors of one part's rows, from a cache keyed by the encoder's weights and by what it reads."""
    names = ("audio", "audio_mask") if side == "audio" else ("tokens", "mask")

    def batches() -> Iterator[dict[str, Tensor]]:
        for rows in torch.arange(len(dataset)).split(size):
            batch = dataset.__getitems__(rows)
            yield {name: batch[name] for name in names}

    def vectors(more: dict[str, Any]) -> Iterator[np.ndarray]:
        for batch in batches():
            with torch.no_grad():
                hidden, mask = encoder.hidden({name: value.to(device) for name, value in batch.items()})
            yield from (row[there].numpy() for row, there in zip(hidden.float().cpu(), mask.cpu(), strict=True))

    weights = hashlib.blake2b()
    for name, tensor in sorted(encoder.state_dict().items()):
        weights.update(name.encode() + tensor.cpu().numpy().tobytes())
    contents = (value.numpy().tobytes() for batch in batches() for value in batch.values())
    return _cache.packed(vectors, np.float32, _cache.key_of("vectors", [side, weights.hexdigest()], contents))

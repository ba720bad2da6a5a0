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
from data._listing import Arrays
from data.utterances import Sequences
from engine.config import UserError, module, read_toml, validate


def open_encoder(side: str, name: str, info: Info) -> tuple[nn.Module, str]:
    """The model of a run or of transformers, and a JSON that says how to build it again. Raises UserError."""
    kept = Path(getattr(info, "folder", "") or ".", f"{side}.json")
    if getattr(info, "folder", ""):  # in inference the weights come with the whole model's
        described = json.loads(kept.read_text())
    else:
        described = describe(side, name, info)
    file = module("models", described["model"]["name"])
    config, _ = validate("model", file.Config, described["model"])
    with tempfile.TemporaryDirectory() as folder:
        for given, text in described["files"].items():
            Path(folder, given).write_text(text)
        place = folder if described["files"] or described["run"] else ""
        encoder = file.Model(config, types.SimpleNamespace(**described["info"] | {"folder": place}))
    if described["run"] and not getattr(info, "folder", ""):
        load_weights(encoder, Path(described["run"]))
    files = getattr(encoder, "files", {})
    return encoder, json.dumps(described | {"files": files})


def describe(side: str, name: str, info: Info) -> dict[str, Any]:
    """Settings, info and transformers config of an encoder. Raises UserError where the run does not fit the data."""
    best = next((path for path in (Path(name, "best"), Path(name)) if (path / "info.json").exists()), None)
    if best is None:
        if Path(name, "config.toml").exists():
            raise UserError(f"model.{side} = {name!r}: the run has not ended, so there is no best/ yet; train it first")
        return {"run": "", "model": {"name": side, "pretrained": name}, "info": dataclasses.asdict(info), "files": {}}
    told = json.loads((best / "info.json").read_text())
    facts = {"audio": ("form", "rate", "audio_size"), "text": ("vocabulary", "pad")}[side]
    wrong = [key for key in facts if told["more"].get(key) != info.more.get(key)]
    if wrong:
        remedy = f"the audio keys of {best}/config.toml" if side == "audio" else f'data.tokenizer = "{best}"'
        values = f"{wrong[0]} = {told['more'].get(wrong[0])!r} there, {info.more.get(wrong[0])!r} in the data"
        raise UserError(f"model.{side} = {name!r}: was trained on other inputs ({values}); set {remedy}")
    files = {"config.json": (best / "config.json").read_text()} if (best / "config.json").exists() else {}
    return {"run": str(best), "model": read_toml(best / "config.toml")["model"], "info": told, "files": files}


def load_weights(encoder: nn.Module, best: Path) -> None:
    """Those of best/, whose names lack the model's prefix. Raises UserError."""
    found: dict[str, Tensor] = {}
    for file in sorted(best.glob("model*.safetensors")):
        found |= load_file(file)
    prefix = getattr(encoder, "prefix", "")
    names = {name.removeprefix(prefix): name for name in encoder.state_dict()}
    try:
        encoder.load_state_dict({names.get(name, name): tensor for name, tensor in found.items()})
    except RuntimeError as error:
        raise UserError(f"{best}: the weights do not fit ({str(error).splitlines()[1].strip()}); was models/ edited since?") from None


class Encoded(Dataset):
    """A part with its encoders' vectors in place of sounds and transcripts."""

    def __init__(self, dataset: Any, columns: dict[str, Sequences]) -> None:
        self.dataset, self.columns = dataset, columns
        self.weights, self.lengths = dataset.weights, dataset.lengths

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, positions: Tensor) -> dict[str, Tensor]:
        places = positions % len(self)
        batch = self.dataset.labels(self.dataset.rows(places)) if len(self.columns) == 2 else self.dataset.__getitems__(places)
        for side, column in self.columns.items():
            batch[f"{side}_vectors"], batch[f"{side}_vectors_mask"] = column.padded(places.numpy())
        return batch


def encoded(encoder: nn.Module, side: str, dataset: Any, device: torch.device, size: int = 64) -> Sequences:
    """The vectors of one part's rows, from a cache keyed by the encoder's weights and by what it reads."""

    def batches() -> Iterator[dict[str, Tensor]]:
        names = ("audio", "audio_mask") if side == "audio" else ("tokens", "mask")
        for rows in torch.arange(len(dataset)).split(size):
            batch = dataset.__getitems__(rows)
            yield {name: batch[name] for name in names}

    @torch.no_grad()
    def write(folder: Path) -> None:
        starts, width = [0], 0
        with open(folder / "values", "wb") as file:
            for batch in batches():
                vectors, mask = encoder.hidden({name: value.to(device) for name, value in batch.items()})
                width = vectors.shape[-1]
                vectors[mask].float().cpu().numpy().tofile(file)
                starts += (starts[-1] + width * mask.sum(1).cumsum(0).cpu()).tolist()
        np.save(folder / "starts.npy", np.array(starts))
        (folder / "width").write_text(str(width))

    weights = hashlib.blake2b()
    for name, tensor in sorted(encoder.state_dict().items()):
        weights.update(name.encode() + tensor.cpu().numpy().tobytes())
    contents = (value.numpy().tobytes() for batch in batches() for value in batch.values())
    folder = _cache.kept(_cache.key_of(["vectors", side, weights.hexdigest()], contents), write)
    starts = np.load(folder / "starts.npy")
    values = np.memmap(folder / "values", np.float32, "r")
    return Sequences(Arrays(values, starts, {}), int((folder / "width").read_text()))

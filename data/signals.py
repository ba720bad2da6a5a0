"""Windows of multi-channel signals, [channels, samples], or of spatio-temporal maps, [channels, regions, samples], from .npy files.

A row names a file, where its window starts and the rate in it, such as the heart rate. Files are memory-mapped. A sample is a sequence
of clips: the row's own window in the middle, and those of the rows before and after it in the same file.
"""

import dataclasses
import functools
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from data import Info, Rows, Splits, _listing
from engine.config import UserError


class Config(_listing.Config):
    file: str = "file"
    """column of the .npy files"""
    start: str = ""
    """column of each window's first sample; empty: every window starts at 0"""
    window: int = Field(ge=2)
    """samples of a window"""
    rate: float = Field(gt=0)
    """samples a second"""
    target: str = "bpm"
    """column to predict, in beats per minute"""
    clips: int = Field(1, ge=1)
    """windows of a sample: the row's own in the middle of its neighbours; an odd number"""
    stretch: float = Field(0.0, ge=0, lt=1)
    """training windows are played up to this share faster or slower, and their rates with them"""
    augment_seed: int = Field(0, ge=0, lt=2**63)
    """seed of the stretching"""


class Windows(_listing.Part):
    """Sequences of clips. A batch: "signal" float32 [b, clips, channels, (regions,) window]; "target" [b] and "targets" [b, clips] in
    beats per minute, NaN beyond the ends of a recording."""

    def __init__(self, listing: _listing.Listing, part: str, config: Config, recordings: list[np.ndarray | None], starts: np.ndarray) -> None:
        """The recording of each row, and the first sample of its window."""
        super().__init__(listing, part, config)
        self.config, self.recordings, self.starts = config, recordings, starts
        self.stretch = config.stretch if part == "train" else 0.0
        names = np.array([id(recordings[row]) for row in listing.rows[part]])  # rows of one file share its array
        self.clips, self.inside = neighbours(names, starts[listing.rows[part]], config.clips)

    def __getitems__(self, positions: Tensor) -> dict[str, Tensor]:
        places = positions.numpy() % len(self)
        clips = self.index.numpy()[self.clips[places]]
        factors = (1 + self.stretch) ** (2 * _listing.shares(positions, self.config.augment_seed, 1)[:, 0] - 1)
        signal = np.stack([[self.window(row, factor) for row in sample] for sample, factor in zip(clips, factors, strict=True)])
        batch = {"signal": torch.from_numpy(signal)}
        if "target" in self.columns:
            targets = self.columns["target"][torch.from_numpy(clips)] * torch.from_numpy(factors).float()[:, None]
            batch["targets"] = targets.where(torch.from_numpy(self.inside[places]), torch.nan)
            batch["target"] = targets[:, self.config.clips // 2]
        return batch

    def window(self, row: int, factor: float) -> np.ndarray:
        """float32 [..., window]: the row's window, or `factor` times as much of the recording around it, squeezed into as many samples."""
        recording, count, start = self.recordings[row], self.config.window, self.starts[row]
        if factor == 1:
            return np.array(recording[..., start : start + count], np.float32)
        length = recording.shape[-1]
        factor = min(factor, (length - 1) / count)
        places = np.clip(start + count * (1 - factor) / 2, 0, length - 1 - count * factor) + np.arange(count) * factor
        whole = places.astype(np.int64)
        part = recording[..., whole[0] : whole[-1] + 2].astype(np.float32)
        left, weight = part[..., whole - whole[0]], (places - whole).astype(np.float32)
        return np.nan_to_num(left + weight * (part[..., whole - whole[0] + 1] - left))


def neighbours(files: np.ndarray, starts: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows before and after each row in its file by their starts, int64 [n, count], the last repeated; bool [n, count], where there was one."""
    names = np.unique(files, return_inverse=True)[1]
    order = np.lexsort((starts, names))
    place = np.argsort(order)
    first, last = np.searchsorted(names[order], names), np.searchsorted(names[order], names, "right") - 1
    wanted = place[:, None] + np.arange(count) - count // 2
    found = np.clip(wanted, first[:, None], last[:, None])
    return order[found], found == wanted


def windows(listing: _listing.Listing, config: Config, shape: list[int] | None = None) -> tuple[list[np.ndarray | None], np.ndarray, list[int]]:
    """Each row's recording, memory-mapped, and first sample, int64 [n]; and the recordings' shape without samples: that of the run, or of
    the first file. Rows whose windows are not whole and finite are left out of the parts."""
    # Each recording that is mapped holds a file open; a thousand is a common limit.
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    files = listing.files(config.file)
    texts = listing.texts[config.start].to_pylist() if config.start else ["0"] * len(files)
    opened = functools.cache(recording)
    found, starts, bad = [None] * len(files), np.zeros(len(files), np.int64), {}
    for row, (file, text) in enumerate(zip(files, texts, strict=True)):
        try:
            found[row] = opened(file)
            shape = shape or list(found[row].shape[:-1])
            if list(found[row].shape[:-1]) != shape:
                raise UserError(f"{file}: is {found[row].dtype} {list(found[row].shape)}, not a recording {[*shape, 'samples']}")
            starts[row] = first_sample(found[row], text, config.window, file)
        except UserError as error:
            bad[row] = str(error)
    listing.skip(bad, config.on_bad)
    return found, starts, shape or []


def recording(file: Path | None) -> np.ndarray:
    """[channels, samples] or [channels, regions, samples], memory-mapped. Raises UserError."""
    try:
        found = np.load(file or "", mmap_mode="r")
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{file}: cannot be read as .npy: {error}") from None
    if not isinstance(found, np.ndarray):
        raise UserError(f"{file}: holds several arrays (.npz); save each as .npy")
    if found.ndim not in (2, 3) or found.dtype.kind not in "fiu":
        raise UserError(
            f"{file}: is {found.dtype} {list(found.shape)}, not a recording of numbers [channels, samples] or [channels, regions, samples]"
        )
    return found


def first_sample(recording: np.ndarray, start: str | None, count: int, file: Path | None) -> int:
    """Raises UserError for a window that is not whole or not finite."""
    try:
        first = int(float(start))  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"the start {start!r} is no sample's number") from None
    if first < 0 or first + count > recording.shape[-1]:
        raise UserError(f"the window of {count} samples from {first} leaves {file}, which has {recording.shape[-1]:,}")
    wrong = ~np.isfinite(recording[..., first : first + count])
    if wrong.any():
        raise UserError(f"{file}: holds NaN or infinity at sample {first + np.argwhere(wrong)[0][-1]}")
    return first


def load(config: Config, kind: str = "auto") -> Splits:
    """`kind` is "regression": the losses and scores of a rate."""
    if config.clips % 2 == 0:
        raise UserError(f"data.clips = {config.clips}: must be odd, so that a row's own window is in the middle")
    wanted = {"file": config.file} | ({"start": config.start} if config.start else {})
    listing = _listing.read(config, "regression" if kind == "auto" else kind, wanted)
    *found, shape = windows(listing, config)
    # Targets stay in beats per minute, which the losses of a model speak.
    listing.info = dataclasses.replace(listing.info, target_mean=0.0, target_std=1.0)
    return listing.splits(Windows, config, *found, more={"signal": [*shape, config.window], "rate": config.rate})


def read_rows(path: str | Path, config: Config, preprocessing: dict[str, Any], info: Info, chunk_rows: int = 65536) -> Iterator[Rows]:
    """A table to predict; a row's neighbours are those of its chunk."""
    wanted = [config.file] + ([config.start] if config.start else [])
    for listing in _listing.chunks(config.open(path), config, info, wanted, chunk_rows):
        *found, _ = windows(listing, config, info.more["signal"][:-1])
        yield from listing.new(Windows, config, *found)

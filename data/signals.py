"""Windows of multi-channel signals, [channels, samples], or of spatio-temporal maps, [channels, regions, samples], from .npy files.

A row names a file, where its window starts and the rate in it, such as the heart rate. Files are memory-mapped. A sample is a sequence
of clips: the row's own window in the middle, and those of the rows before and after it in the same file.
"""

import dataclasses
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

    def __init__(self, listing: _listing.Listing, part: str, config: Config, recordings: dict[Path, np.ndarray]) -> None:
        super().__init__(listing, part, config)
        self.files, self.starts, self.recordings = listing.files(config.file), starts(listing, config), recordings
        self.stretch = config.stretch if part == "train" else 0.0
        self.clips, self.inside = neighbours([str(self.files[row]) for row in self.index], self.starts[self.index], config.clips)

    def __getitems__(self, positions: Tensor) -> dict[str, Tensor]:
        places = positions.numpy() % len(self)
        clips = self.index[self.clips[places]]
        factors = (1 + self.stretch) ** (2 * _listing.shares(positions, self.config.augment_seed, 1)[:, 0] - 1)
        signal = np.stack([[self.window(row, factor) for row in sample] for sample, factor in zip(clips, factors, strict=True)])
        batch = {"signal": torch.from_numpy(signal)}
        if self.target is not None:
            targets = self.target[torch.from_numpy(clips)] * torch.from_numpy(factors).float()[:, None]
            batch["targets"] = targets.where(torch.from_numpy(self.inside[places]), torch.nan)
            batch["target"] = targets[:, self.config.clips // 2]
        return batch

    def window(self, row: int, factor: float) -> np.ndarray:
        """float32 [..., window]: the row's window, or `factor` times as much of the recording around it, squeezed into as many samples."""
        recording, count, start = self.recordings[self.files[row]], self.config.window, self.starts[row]
        if factor == 1:
            return np.array(recording[..., start : start + count], np.float32)
        length = recording.shape[-1]
        factor = min(factor, (length - 1) / count)
        places = np.clip(start + count * (1 - factor) / 2, 0, length - 1 - count * factor) + np.arange(count) * factor
        whole = places.astype(np.int64)
        part = recording[..., whole[0] : whole[-1] + 2].astype(np.float32)
        left, weight = part[..., whole - whole[0]], (places - whole).astype(np.float32)
        return np.nan_to_num(left + weight * (part[..., whole - whole[0] + 1] - left))


def starts(listing: _listing.Listing, config: Config) -> np.ndarray:
    """First samples of the windows; 0 for a bad row, which is in no part."""
    good = {row for rows in listing.rows.values() for row in rows.tolist()}
    texts = listing.texts.get(config.start, ["0"] * len(listing.where))
    return np.array([int(float(text)) if row in good else 0 for row, text in enumerate(texts)])


def neighbours(files: list[str], starts: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows before and after each row in its file by their starts, int64 [n, count], the last repeated; bool [n, count], where there was one."""
    names = np.unique(files, return_inverse=True)[1]
    order = np.lexsort((starts, names))
    place = np.argsort(order)
    first, last = np.searchsorted(names[order], names), np.searchsorted(names[order], names, "right") - 1
    wanted = place[:, None] + np.arange(count) - count // 2
    found = np.clip(wanted, first[:, None], last[:, None])
    return order[found], found == wanted


def opened(listing: _listing.Listing, config: Config, shape: list[int]) -> dict[Path, np.ndarray]:
    """The memory-mapped files; rows whose windows are not whole and finite are skipped. `shape` is that of the run, or set to the first file's."""
    recordings: dict[Path, np.ndarray] = {}
    bad = {}
    for row, file in enumerate(listing.files(config.file)):
        try:
            if file not in recordings:
                recordings[file] = np.load(file or "", mmap_mode="r")
            recording = recordings[file]
            shape[:] = shape or recording.shape[:-1]
            if recording.ndim not in (2, 3) or recording.dtype.kind not in "fiu" or list(recording.shape[:-1]) != shape:
                wanted = f"a recording of numbers {[*shape, 'samples']}, [channels, samples] or [channels, regions, samples]"
                raise UserError(f"{file}: is {recording.dtype} {list(recording.shape)}, not {wanted}")
            check_window(file, recording, listing.texts[config.start][row] if config.start else "0", config.window)
        except FileNotFoundError:
            bad[row] = f"{file}: no such file"
        except (OSError, ValueError, EOFError) as error:
            bad[row] = f"{file}: cannot be read as .npy: {error}"
        except UserError as error:
            bad[row] = str(error)
    listing.skip(bad, config.on_bad)
    return recordings


def check_window(file: Path, recording: np.ndarray, start: str | None, count: int) -> None:
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


def load(config: Config, kind: str = "auto") -> Splits:
    """`kind` is "regression": the losses and scores of a rate."""
    if config.clips % 2 == 0:
        raise UserError(f"data.clips = {config.clips}: must be odd, so that a row's own window is in the middle")
    wanted = {"file": config.file} | ({"start": config.start} if config.start else {})
    shape: list[int] = []
    listing = _listing.read(config, "regression" if kind == "auto" else kind, wanted)
    recordings = opened(listing, config, shape)
    # Targets stay in beats per minute, which the losses of a model speak.
    info = dataclasses.replace(listing.info, target_mean=0.0, target_std=1.0, more={"signal": [*shape, config.window], "rate": config.rate})
    listing.target = torch.from_numpy(listing.samples.target)
    parts = {part: Windows(listing, part, config, recordings) for part in listing.rows}
    return Splits(parts["train"], parts["valid"], parts.get("test"), info, {"shape": shape}, listing.notes)


def read_rows(path: str | Path, config: Config, preprocessing: dict[str, Any], info: Info, chunk_rows: int = 65536) -> Iterator[Rows]:
    """A table to predict; a row's neighbours are those of its chunk."""
    from data._files import open_source

    wanted = [config.file] + ([config.start] if config.start else [])
    source = open_source(Path(path), "--input", config.separator, config.encoding, config.quote)
    for listing in _listing.chunks(source, config, info, wanted, chunk_rows):
        recordings = opened(listing, config, list(preprocessing["shape"]))
        if len(listing.rows["input"]):
            yield listing.input(Windows(listing, "input", config, recordings))

"""Utterances: rows with a sound file (wav, flac …), a transcript, or both, and a label.

Sounds are decoded once, mixed to mono, resampled, cut to a maximal length, and kept in a memory-mapped cache as log-mel frames or as
they sound. A column may also name precomputed features (.npy, [frames, size] or [size]), which are read as they are. Transcripts are
cut into tokens as in data/text.py, or by the tokenizer of a text run.
"""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic
import torch
from pydantic import Field
from torch import Tensor

from data import Info, Rows, Splits, _listing, _tokenizer
from engine.config import UserError

WINDOW, HOP = 0.025, 0.010  # seconds of a frame and between frames


class Config(_listing.Config, _tokenizer.Tokenizing):
    audio: str = ""
    """column of sound files, or of precomputed features (.npy); empty: no sound"""
    text: str = ""
    """column of transcripts, or of precomputed features (.npy); empty: no text"""
    form: Literal["logmel", "waveform"] = "logmel"
    """what a sound becomes: frames of a log-mel spectrum, or standardised samples, as wav2vec 2.0 and HuBERT take them"""
    rate: int = Field(16_000, ge=1000)
    """samples a second; sounds of another rate are resampled"""
    seconds: float = Field(10.0, gt=0.1)
    """longest sound; what is beyond is cut off, and counted"""
    mels: int = Field(64, ge=8)
    """bands of the log-mel spectrum"""
    max_length: int = Field(128, ge=4)
    """most tokens of a transcript"""
    group_lengths: bool = True
    """training batches of utterances of similar length"""

    @pydantic.model_validator(mode="after")
    def has_a_column(self) -> "Config":
        if not self.audio and not self.text:
            raise ValueError("needs audio, text or both; they name columns")
        return self

    def wanted(self) -> dict[str, str]:
        return {key: getattr(self, key) for key in ("audio", "text") if getattr(self, key)}


@dataclasses.dataclass
class Sequences:
    """What one column holds: rows of [length, size] or, without a size, of [length]."""

    arrays: _listing.Arrays
    size: int | None
    pad: float = 0.0

    def padded(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """[b, t(, size)] and bool [b, t], True where there is something; t is of the longest, in eights."""
        found = [self.arrays[row].reshape(-1, self.size) if self.size else self.arrays[row] for row in rows]
        longest = -(-max(1, *map(len, found)) // 8) * 8
        values = np.full((len(rows), longest, *found[0].shape[1:]), self.pad, self.arrays.values.dtype)
        mask = np.zeros((len(rows), longest), bool)
        for place, array in enumerate(found):
            values[place, : len(array)] = array
            mask[place, : max(1, len(array))] = True  # attention to nothing would be NaN
        return torch.from_numpy(values), torch.from_numpy(mask)


class Utterances(_listing.Part):
    """A batch: "audio" float32 [b, t, size] or [b, t] with "audio_mask" bool [b, t]; "tokens" int64 [b, t] or "text" float32 [b, t, size],
    with "mask"; and "target"."""

    def __init__(self, listing: _listing.Listing, part: str, config: Config, columns: dict[str, Sequences]) -> None:
        super().__init__(listing, part, config)
        self.columns = columns
        first = next(iter(columns.values()))
        self.lengths = torch.from_numpy(np.diff(first.arrays.starts)[self.index] // (first.size or 1)) if config.group_lengths else None

    def __getitems__(self, positions: Tensor) -> dict[str, Tensor]:
        rows = self.rows(positions)
        batch = self.labels(rows)
        for name, column in self.columns.items():
            values, batch["audio_mask" if name == "audio" else "mask"] = column.padded(rows)
            batch[name] = values.long() if name == "tokens" else values
        return batch


def decode(path: Path | None, config: Config, done: list[str]) -> np.ndarray:
    """float32 [frames, mels] or [samples]. What was done to it is added to `done`. Raises UserError."""
    if path is None:
        raise UserError("names no sound")
    try:
        import soundfile
    except ImportError:
        raise UserError('data.name = "utterances": needs packages of requirements-extra.txt: pip install soundfile soxr') from None
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (OSError, RuntimeError) as error:  # soundfile's own error is a RuntimeError
        raise UserError(f"{path}: " + ("cannot be read as sound: " + str(error).split(": ")[-1] if path.exists() else "no such file")) from None
    if not len(samples):
        raise UserError(f"{path}: has no samples")
    if not np.isfinite(samples).all():
        raise UserError(f"{path}: holds NaN or infinity")
    done += ["mixed to mono"] * (samples.shape[1] > 1)
    samples = samples.mean(1)
    if rate != config.rate:
        import soxr

        done.append(f"resampled from {rate:,} to {config.rate:,} Hz")
        samples = soxr.resample(samples, rate, config.rate)
    longest = round(config.seconds * config.rate)
    done += [f"cut to {config.seconds:g} seconds"] * (len(samples) > longest)
    samples = samples[:longest]
    return logmel(samples, config) if config.form == "logmel" else (samples - samples.mean()) / (samples.std() + 1e-7)


def features(path: Path | None, size: int) -> np.ndarray:
    """float32 [frames, size] of a .npy file. Raises UserError."""
    try:
        array = np.atleast_2d(np.load(path or ""))
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: " + (f"cannot be read as .npy: {error}" if path and path.exists() else "no such file")) from None
    if array.ndim != 2 or array.shape[1] != (size or array.shape[1]) or array.dtype.kind not in "fiu" or not np.isfinite(array).all():
        raise UserError(f"{path}: must hold finite numbers [frames, {size or 'size'}] or [{size or 'size'}], not {array.dtype} {list(array.shape)}")
    return array.astype(np.float32)


def logmel(samples: np.ndarray, config: Config) -> np.ndarray:
    """float32 [frames, mels]: natural logarithms of the power in each band, as transformers' extractors compute it."""
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    window, hop = round(WINDOW * config.rate), round(HOP * config.rate)
    bands = mel_filter_bank(window // 2 + 1, config.mels, 50.0, config.rate / 2, config.rate, norm="slaney", mel_scale="htk")
    samples = np.pad(samples, (0, max(0, window - len(samples))))
    frames = spectrogram(samples, window_function(window, "hann"), window, hop, power=2.0, mel_filters=bands, log_mel="log", mel_floor=1e-8)
    return frames.T.astype(np.float32)


def precomputed(names: list[str | None]) -> bool:
    return any(name and name.endswith(".npy") for name in names)


def first_size(paths: list[Path | None]) -> int:
    """Width of the first .npy file that can be read."""
    for path in paths:
        with contextlib.suppress(UserError):
            return features(path, 0).shape[1]
    return 0


def read_columns(listing: _listing.Listing, config: Config, sizes: dict[str, int], tokenized: Any, cache: bool) -> dict[str, Sequences]:
    """What the rows' files and transcripts hold; bad rows are skipped. `sizes` are of precomputed features, by key; those of the first
    file are added to it. `tokenized(texts)` gives tokens, where each text's begin, and how many were cut."""
    columns, bad, done = {}, {}, []
    for key, name in config.wanted().items():
        paths = listing.files(name)
        if precomputed(listing.texts[name]):
            size = sizes.setdefault(key, first_size(paths))
            settings, form = ["features", size], (lambda row, paths=paths, size=size: features(paths[row], size))
        elif key == "audio":
            size = config.mels if config.form == "logmel" else None
            settings = ["sounds", config.form, config.rate, config.seconds, config.mels]
            form = lambda row, paths=paths: decode(paths[row], config, done)  # noqa: E731
        else:
            texts = [text or "" for text in listing.texts[name]]
            bad = {row: f"the transcript in column {name!r} is empty" for row, text in enumerate(texts) if not text.strip()} | bad
            tokens, starts, cut = tokenized(texts)
            listing.notes += [f"cut: {cut:,} transcripts have more than data.max_length = {config.max_length} tokens"] * bool(cut)
            columns["tokens"] = Sequences(_listing.Arrays(tokens, starts, {}), None, listing.info.more.get("pad", 0))
            continue
        arrays = _listing.cached(settings, paths, np.float32, form) if cache else _listing.gathered(len(paths), np.float32, form)
        columns[key], bad = Sequences(arrays, size), arrays.bad | bad
    listing.notes += [f"{count:,} sounds {what}" for what, count in Counter(done).items()]
    listing.skip(bad, config.on_bad)
    return columns


def load(config: Config, kind: str = "auto") -> Splits:
    listing, files = _listing.read(config, kind, config.wanted()), {}
    texts = listing.texts.get(config.text, [])
    more: dict[str, Any] = {}
    if config.text and not precomputed(texts):
        files = _tokenizer.made(config, lambda: [[texts[row] or "" for row in listing.rows["train"]]])
        more = _tokenizer.facts(files) | {"max_length": config.max_length}
    listing.info = dataclasses.replace(listing.info, more=more)
    sizes: dict[str, int] = {}
    columns = read_columns(listing, config, sizes, lambda given: _tokenizer.stored(files, config.max_length, lambda: [given]), cache=True)
    more |= {f"{key}_size": size for key, size in sizes.items()}
    if config.audio and "audio" not in sizes:
        more |= {"form": config.form, "rate": config.rate}
        if config.form == "logmel":
            rows = listing.rows["train"]
            rows = rows[:: -(-len(rows) // 1000)]  # of a thousand sounds, since a mean of more is hardly another
            frames = np.concatenate([columns["audio"].arrays[row].reshape(-1, config.mels) for row in rows])
            more |= {"audio_size": config.mels, "audio_mean": frames.mean(0).tolist(), "audio_std": (frames.std(0) + 1e-5).tolist()}
    parts = {part: Utterances(listing, part, config, columns) for part in listing.rows}
    return Splits(parts["train"], parts["valid"], parts.get("test"), listing.info, {"sizes": sizes}, listing.notes, files)


def read_rows(path: str | Path, config: Config, preprocessing: dict[str, Any], info: Info, chunk_rows: int = 1024) -> Iterator[Rows]:
    """A table to predict, at most 1,024 utterances at a time."""
    from data._files import open_source

    source = open_source(Path(path), "--input", config.separator, config.encoding, config.quote)
    stored, tokenizer = Path(preprocessing.get("folder", ""), "tokenizer.json"), None
    if "vocabulary" in info.more:
        tokenizer = _tokenizer.opened(stored.read_text(), config.max_length)
    for listing in _listing.chunks(source, config, info, [*config.wanted().values()], min(chunk_rows, 1024)):
        columns = read_columns(listing, config, preprocessing["sizes"], lambda texts: _tokenizer.encode(tokenizer, texts), cache=False)
        if len(listing.rows["input"]):
            yield listing.input(Utterances(listing, "input", config, columns))

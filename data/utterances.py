"""Utterances: rows with a sound file (wav, flac …), a transcript, or both, and a label.

Sounds are decoded once, mixed to mono, resampled, cut to a maximal length, and kept in a memory-mapped cache as log-mel frames or as
they sound. A column may also name precomputed features (.npy, [frames, size] or [size]), which are read as they are. Transcripts are
cut into tokens as in data/text.py, or by the tokenizer of a text run.
"""

import functools
import importlib.util
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic
from pydantic import Field

from data import Info, Rows, Splits, _cache, _listing, _tokenizer
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


def decode(path: Path, config: Config, done: list[str]) -> np.ndarray:
    """float32 [frames, mels] or [samples]. What was done to it is added to `done`. Raises UserError."""
    import soundfile

    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (OSError, RuntimeError) as error:  # soundfile's own error is a RuntimeError
        raise UserError(f"{path}: cannot be read as sound: {str(error).split(': ')[-1]}") from None
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


def features(path: Path, size: int = 0) -> np.ndarray:
    """float32 [frames, size] of a .npy file; 0: of any size. Raises UserError."""
    try:
        array = np.atleast_2d(np.load(path))
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: cannot be read as .npy: {error}") from None
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


def precomputed(listing: _listing.Listing, column: str) -> bool:
    return any(name and name.endswith(".npy") for name in listing.texts[column].to_pylist())


def read_columns(listing: _listing.Listing, config: Config, tokenizer: Any, pad: int = 0, cache: bool = False) -> dict[str, _cache.Arrays]:
    """What the rows' files and transcripts hold, by its name in a batch. Bad rows are left out of the parts."""
    columns, bad, done = {}, {}, []
    for key, name in config.wanted().items():
        if precomputed(listing, name):
            files = listing.files(name)
            size = listing.info.more.get(f"{key}_size") or getattr(_listing.first(files, features), "shape", [0])[-1]
            settings, read = ["features", size], functools.partial(features, size=size)
        elif key == "audio":
            for package in ("soundfile", "soxr"):  # else each row would be bad for want of it, and stay so in the cache
                if importlib.util.find_spec(package) is None:
                    raise UserError(f'data.name = "utterances": needs packages of requirements-extra.txt: pip install {package}')
            files, read = listing.files(name), functools.partial(decode, config=config, done=done)
            settings = ["sounds", config.form, config.rate, config.seconds, config.mels]
        else:
            texts = [text or "" for text in listing.texts[name].to_pylist()]
            bad = {row: f"the transcript in column {name!r} is empty" for row, text in enumerate(texts) if not text.strip()} | bad
            columns["tokens"] = _tokenizer.tokens(tokenizer, lambda texts=texts: [texts], pad, cache)
            if cut := columns["tokens"].more["cut"]:
                listing.notes.append(f"cut: {cut:,} transcripts have more than data.max_length = {config.max_length} tokens")
            continue
        columns[key], wrong = _listing.read_files(files, read, np.float32, settings if cache else None)
        bad = wrong | bad
    listing.notes += [f"{count:,} sounds {what}" for what, count in Counter(done).items()]
    listing.skip(bad, config.on_bad)
    return columns


def load(config: Config, kind: str = "auto") -> Splits:
    """Raises UserError for what is wrong with the files."""
    listing, files, more, tokenizer = _listing.read(config, kind, config.wanted()), {}, {}, None
    if config.text and not precomputed(listing, config.text):
        train = [text or "" for text in listing.texts[config.text].take(listing.rows["train"]).to_pylist()]
        files = _tokenizer.made(config, lambda: [train])
        more = _tokenizer.facts(files) | {"max_length": config.max_length}
        tokenizer = _tokenizer.opened(files["tokenizer.json"], config.max_length)
    columns = read_columns(listing, config, tokenizer, more.get("pad", 0), cache=True)
    more |= {f"{key}_size": columns[key].values.shape[1] for key in columns if columns[key].values.ndim > 1}
    if config.audio and not precomputed(listing, config.audio):
        more |= {"form": config.form, "rate": config.rate}
        if config.form == "logmel":
            audio, rows = columns["audio"], listing.rows["train"]
            rows = rows[:: -(-len(rows) // 1000)]  # of a thousand sounds, since a mean of more is hardly another
            frames = np.concatenate([audio.values[audio.starts[row] : audio.starts[row + 1]] for row in rows])
            more |= {"audio_mean": frames.mean(0).tolist(), "audio_std": (frames.std(0) + 1e-5).tolist()}
    return listing.splits(_listing.Sequences, config, columns, more=more, files=files)


def read_rows(path: str | Path, config: Config, preprocessing: dict[str, Any], info: Info, chunk_rows: int = 1024) -> Iterator[Rows]:
    """A table to predict, at most 1,024 utterances at a time."""
    tokenizer = None
    if "vocabulary" in info.more:
        tokenizer = _tokenizer.opened(Path(preprocessing["folder"], "tokenizer.json").read_text(), config.max_length)
    for listing in _listing.chunks(config.open(path), config, info, config.wanted().values(), min(chunk_rows, 1024)):
        columns = read_columns(listing, config, tokenizer, info.more.get("pad", 0))
        yield from listing.new(_listing.Sequences, config, columns)

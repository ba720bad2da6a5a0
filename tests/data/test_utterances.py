"""Utterances: sounds of any rate and width, transcripts, features; what is said of those that cannot be used."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data import utterances
from engine.config import UserError

soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed")
RATE = 16_000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PLAINLOOP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tone(frequency: float, seconds: float, rate: int = RATE) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """24 tones of eight speakers, from 0.3 to 0.53 seconds: "low" of 300 Hz, "high" of 2,000 Hz."""
    lines = ["path,text,label,who"]
    (tmp_path / "sounds").mkdir()
    for number in range(24):
        label = ("low", "high")[number % 2]
        name = f"sounds/{number}.{('wav', 'flac')[number // 12]}"
        soundfile.write(tmp_path / name, tone(300 if label == "low" else 2000, 0.3 + number / 100), RATE)
        lines.append(f"{name},{'la' * (1 + number % 5)},{label},{number // 3}")
    (tmp_path / "train.csv").write_text("\n".join(lines))
    return tmp_path


def config(folder: Path, **more: object) -> utterances.Config:
    return utterances.Config(**{"name": "utterances", "root": str(folder), "train": "train.csv", "target": "label", "audio": "path"} | more)


def whole(dataset: Any) -> dict[str, torch.Tensor]:
    return dataset.__getitems__(torch.arange(len(dataset)))


def add(folder: Path, samples: np.ndarray, rate: int = RATE, name: str = "sounds/more.wav") -> Path:
    """A row more, of these samples."""
    soundfile.write(folder / name, samples, rate, subtype="FLOAT")
    with open(folder / "train.csv", "a") as file:
        file.write(f"\n{name},la,low,9\n")
    return folder / name


def test_log_mel_frames_and_their_mask(folder: Path) -> None:
    splits = utterances.load(config(folder, mels=32))
    batch = whole(splits.train)
    assert splits.info.labels == ["high", "low"] and splits.info.more["audio_size"] == 32 and len(splits.info.more["audio_mean"]) == 32
    assert batch["audio"].dtype == torch.float32 and batch["audio"].shape[1] % 8 == 0 and batch["audio"].shape[2] == 32
    lengths = batch["audio_mask"].sum(1)
    assert lengths.max() - lengths.min() > 5 and (batch["audio"][~batch["audio_mask"]] == 0).all()
    loudest = torch.stack([audio[:length].mean(0).argmax() for audio, length in zip(batch["audio"], lengths, strict=True)])
    low = batch["target"] == 1
    assert loudest[low].max() < loudest[~low].min()


def test_speakers_stay_whole(folder: Path) -> None:
    splits = utterances.load(config(folder, group="who", text="text", audio=""))
    assert all(len(part) % 3 == 0 for part in (splits.train, splits.valid, splits.test))
    speakers = [set((part.index // 3).tolist()) for part in (splits.train, splits.valid, splits.test)]
    assert sum(map(len, speakers)) == len(set.union(*speakers)) == 8


def test_waveforms_are_standardised(folder: Path) -> None:
    batch = whole(utterances.load(config(folder, form="waveform")).train)
    assert batch["audio"].dim() == 2
    for audio, mask in zip(batch["audio"], batch["audio_mask"], strict=True):
        assert abs(float(audio[mask].mean())) < 1e-3 and float(audio[mask].std()) == pytest.approx(1, abs=1e-2)


def test_another_rate_and_stereo_sound_the_same_and_are_said_once(folder: Path) -> None:
    plain = add(folder, tone(300, 1.0))
    for name, samples, rate in (("stereo", np.stack([tone(300, 1.0)] * 2, 1), RATE), ("fast", tone(300, 1.0, 44_100), 44_100)):
        add(folder, samples, rate, f"sounds/{name}.wav")
    add(folder, tone(300, 3.0), RATE, "sounds/long.wav")
    settings = config(folder, seconds=2.0)
    done: list[str] = []
    wanted, *others = (utterances.decode(folder / "sounds" / f"{name}.wav", settings, done) for name in ("more", "stereo", "fast", "long"))
    assert plain.exists() and np.allclose(wanted, others[0], atol=1e-3) and others[2].shape == (201, 64)
    band = int(wanted.mean(0).argmax())
    assert abs(others[1][:, band].mean() - wanted[:, band].mean()) < 0.1 and abs(len(others[1]) - len(wanted)) <= 1
    notes = utterances.load(settings).notes
    for said in ("1 sounds resampled from 44,100 to 16,000 Hz", "1 sounds mixed to mono", "1 sounds cut to 2 seconds"):
        assert notes.count(said) == 1


def test_sounds_are_decoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = whole(utterances.load(config(folder)).train)
    monkeypatch.setattr(utterances, "decode", lambda *_: pytest.fail("decoded again"))
    again = whole(utterances.load(config(folder)).train)
    assert torch.equal(first["audio"], again["audio"])


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        (np.zeros(0, np.float32), r"row 25: .*more.wav: has no samples"),
        (np.full(800, np.nan, np.float32), r"row 25: .*more.wav: holds NaN or infinity"),
        ("gone", r"row 25: .*more.wav: no such file"),
        ("text", r"row 25: .*more.wav: cannot be read as sound"),
    ],
)
def test_bad_sounds_name_their_row(folder: Path, samples: np.ndarray | str, said: str) -> None:
    file = add(folder, samples if isinstance(samples, np.ndarray) else tone(300, 0.2))
    if isinstance(samples, str):
        file.unlink()
    if samples == "text" if isinstance(samples, str) else False:
        file.write_text("no sound")
    with pytest.raises(UserError, match=said):
        utterances.load(config(folder))
    splits = utterances.load(config(folder, on_bad="skip"))
    assert sum(map(len, (splits.train, splits.valid, splits.test))) == 24 and any("skipped 1 bad rows" in note for note in splits.notes)
    (rows,) = utterances.read_rows(folder / "train.csv", config(folder, on_bad="skip"), splits.preprocessing, splits.info)
    assert len(rows.dataset) == 24 and rows.ids == {"row": list(range(24))}


def test_transcripts_beside_sounds(folder: Path) -> None:
    settings = config(folder, text="text", tokenizer="characters")
    splits = utterances.load(settings)
    batch = whole(splits.train)
    assert batch["tokens"].dtype == torch.int64 and set(batch) == {"audio", "audio_mask", "tokens", "mask", "target"}
    sizes = torch.tensor([2 + 2 * (1 + row % 5) for row in splits.train.index])  # [CLS] and [SEP] around the letters
    assert torch.equal(batch["mask"].sum(1), sizes) and "tokenizer.json" in splits.files
    (folder / "tokenizer.json").write_text(splits.files["tokenizer.json"])
    (rows,) = utterances.read_rows(folder / "train.csv", settings, splits.preprocessing | {"folder": str(folder)}, splits.info)
    again = rows.dataset.__getitems__(splits.train.index)
    assert all(torch.equal(batch[name], again[name]) for name in batch) and rows.labelled
    (folder / "train.csv").write_text((folder / "train.csv").read_text().replace(",la,", ",,"))
    with pytest.raises(UserError, match="row 1: the transcript in column 'text' is empty"):
        utterances.load(settings)


def test_features_are_read_as_they_are(folder: Path) -> None:
    lines = ["path,words,label"]
    for row in range(20):
        np.save(folder / f"{row}.npy", np.full((1 + row % 3, 5), row, np.float32))
        np.save(folder / f"word{row}.npy", np.full(7, row, np.float32))
        lines.append(f"{row}.npy,word{row}.npy,{'ab'[row % 2]}")
    (folder / "train.csv").write_text("\n".join(lines))
    settings = config(folder, text="words")
    splits = utterances.load(settings)
    batch = whole(splits.train)
    assert batch["audio"].shape[2] == 5 and batch["text"].shape[2] == 7 and torch.equal(batch["text"][:, 0, 0].long(), splits.train.index)
    assert torch.equal(batch["audio_mask"].sum(1), 1 + splits.train.index % 3)
    np.save(folder / "3.npy", np.zeros((2, 6)))
    with pytest.raises(UserError, match=r"row 4: .*3.npy: must hold finite numbers \[frames, 5\]"):
        utterances.load(settings)


def test_a_column_is_needed(folder: Path) -> None:
    with pytest.raises(ValueError, match="needs audio, text or both"):
        config(folder, audio="")


@pytest.mark.skipif("PLAINLOOP_DATA" not in os.environ, reason="PLAINLOOP_DATA is unset: the public data sets are not here")
def test_real_utterances() -> None:
    root = os.environ["PLAINLOOP_DATA"]
    splits = utterances.load(config(Path(root), train="emodb/train.csv", valid="emodb/valid.csv", test="emodb/test.csv", target="emotion"))
    assert (len(splits.train), len(splits.valid), len(splits.test)) == (339, 69, 127) and splits.info.outputs == 7
    assert splits.train.__getitems__(torch.arange(4))["audio"].shape == (4, 208, 64)

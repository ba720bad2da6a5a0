"""Windows of signals: sequences of clips, stretching, and windows that cannot be used."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data import signals
from engine.config import UserError

RATE = 50.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four recordings of two channels: waves of 60, 90, 120 and 150 beats per minute, and noise; ten windows of each."""
    lines = ["file,start,bpm,who"]
    for number in range(4):
        bpm = 60 + 30 * number
        waves = np.sin(2 * np.pi * bpm / 60 * np.arange(2000) / RATE)
        noise = np.random.default_rng(number).normal(size=2000)
        np.save(tmp_path / f"{number}.npy", np.stack([waves, noise]).astype(np.float32))
        lines += [f"{number}.npy,{start},{bpm + start / 1000},{number}" for start in range(0, 1500, 150)]
    (tmp_path / "windows.csv").write_text("\n".join(lines))
    return tmp_path


def config(folder: Path, **more: object) -> signals.Config:
    values = {"name": "signals", "root": str(folder), "train": "windows.csv", "start": "start", "window": 400, "rate": RATE, "group": "who"}
    return signals.Config(**values | {"valid_fraction": 0.25, "test_fraction": 0.25} | more)


def whole(dataset: signals.Windows) -> dict[str, torch.Tensor]:
    return dataset.__getitems__(torch.arange(len(dataset)))


def test_windows_are_those_of_the_files_and_subjects_stay_whole(folder: Path) -> None:
    splits = signals.load(config(folder))
    assert splits.info.kind == "regression" and splits.info.more["signal"] == [2, 400]
    seen = []
    for part in (splits.train, splits.valid, splits.test):
        batch = whole(part)
        assert batch["signal"].shape == (len(part), 1, 2, 400) and batch["signal"].dtype == torch.float32
        for signal, target in zip(batch["signal"], batch["target"], strict=True):
            number, start = (int(target) - 60) // 30, round((float(target) - 60) % 30 * 1000)
            assert np.array_equal(signal[0], np.load(folder / f"{number}.npy")[:, start : start + 400])
        seen.append({(int(target) - 60) // 30 for target in batch["target"]})
    assert sorted(map(len, seen)) == [1, 1, 2] and set.union(*seen) == {0, 1, 2, 3}


def test_clips_are_neighbours_in_time_whatever_the_rows_order(folder: Path) -> None:
    header, *lines = (folder / "windows.csv").read_text().splitlines()
    (folder / "windows.csv").write_text("\n".join([header, *np.random.default_rng(0).permutation(lines)]))
    batch = whole(signals.load(config(folder, clips=5)).train)
    middle = batch["target"]
    assert batch["signal"].shape[1:] == (5, 2, 400) and torch.equal(batch["targets"][:, 2], middle)
    steps = batch["targets"].diff(dim=1)
    assert torch.allclose(steps[~steps.isnan()], torch.tensor(0.15), atol=1e-4)
    starts = (middle % 30 * 1000).round() / 150
    assert torch.equal(batch["targets"].isnan().sum(1), (2 - starts).clamp(min=0) + (starts - 7).clamp(min=0))


def test_stretching_scales_the_rate(folder: Path) -> None:
    train = signals.load(config(folder, stretch=0.3)).train
    batch, again, next_epoch = (train.__getitems__(torch.arange(20) + shift) for shift in (0, 0, 20))
    assert torch.equal(batch["signal"], again["signal"]) and not torch.equal(batch["target"], next_epoch["target"])
    power = torch.fft.rfft(torch.nn.functional.pad(batch["signal"][:, 0, 0], (0, 7600))).abs()
    found = power.argmax(-1) * RATE / 8000 * 60
    assert batch["target"].std() > 10 and (found - batch["target"]).abs().max() < 3


def test_a_map_and_a_new_table(folder: Path) -> None:
    np.save(folder / "map.npy", np.random.default_rng(0).integers(0, 255, (3, 6, 500)).astype(np.uint8))
    rows = "\n".join(f"map.npy,{start},{start}" for start in range(0, 100, 10))
    (folder / "maps.csv").write_text(f"file,start,bpm\n{rows}\n")
    settings = config(folder, train="maps.csv", group="", clips=3)
    splits = signals.load(settings)
    assert whole(splits.train)["signal"].shape[1:] == (3, 3, 6, 400)
    (folder / "new.csv").write_text("start,file\n70,map.npy\n20,map.npy\n")
    (new,) = signals.read_rows(folder / "new.csv", settings, splits.preprocessing, splits.info)
    batch = whole(new.dataset)
    assert not new.labelled and set(batch) == {"signal"} and new.ids == {"row": [0, 1]}
    assert np.array_equal(batch["signal"][0, 1], np.load(folder / "map.npy")[..., 70:470])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("0.npy,1601,60,0", r"row 41: the window of 400 samples from 1601 leaves .*0.npy, which has 2,000"),
        ("0.npy,-1,60,0", "row 41: the window of 400 samples from -1 leaves"),
        ("0.npy,ten,60,0", "row 41: the start 'ten' is no sample's number"),
        ("nan.npy,100,60,0", r"row 41: .*nan.npy: holds NaN or infinity at sample 450"),
        ("gone.npy,0,60,0", r"row 41: .*gone.npy: no such file"),
        ("text.npy,0,60,0", r"row 41: .*text.npy: cannot be read as .npy"),
        ("two.npz,0,60,0", r"row 41: .*two.npz: holds several arrays"),
        ("three.npy,0,60,0", r"row 41: .*three.npy: is float64 \[3, 900\], not .*\[2, 'samples'\]"),
    ],
)
def test_bad_windows_name_their_row(folder: Path, row: str, said: str) -> None:
    holed = np.zeros((2, 2000))
    holed[1, 450] = np.nan
    np.save(folder / "nan.npy", holed)
    np.save(folder / "three.npy", np.zeros((3, 900)))
    np.savez(folder / "two.npz", holed, holed)
    (folder / "text.npy").write_text("no array")
    with open(folder / "windows.csv", "a") as file:
        file.write(f"\n{row}\n")
    with pytest.raises(UserError, match=said):
        signals.load(config(folder))
    splits = signals.load(config(folder, on_bad="skip"))
    assert sum(map(len, (splits.train, splits.valid, splits.test))) == 40 and any("skipped 1 bad rows" in note for note in splits.notes)
    with pytest.raises(UserError, match=said):
        next(signals.read_rows(folder / "windows.csv", config(folder), splits.preprocessing, splits.info))


def test_clips_must_be_odd(folder: Path) -> None:
    with pytest.raises(UserError, match=r"data.clips = 4: must be odd"):
        signals.load(config(folder, clips=4))

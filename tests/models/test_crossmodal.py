"""Sound and transcript together: masks, encoders that are runs, cached vectors, and precomputed features."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import commands
import sounds
from data import Info, Splits
from data.utterances import Config as DataConfig
from data.utterances import load
from engine.config import UserError, dump_toml, module
from models import crossmodal
from models._attention import Layer, pooled, rotated
from models.crossmodal import Config, Model

soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed")


def info(outputs: int = 3) -> Info:
    return Info("multiclass", outputs, [str(label) for label in range(outputs)], more={"audio_size": 5, "text_size": 7})


def batch(pad: int = 0) -> dict[str, torch.Tensor]:
    made = {}
    for side, size, lengths in (("audio", 5, (9, 4)), ("text", 7, (3, 6))):
        mask = torch.arange(10 + pad) < torch.tensor(lengths)[:, None]
        values = torch.randn(2, 10, size, generator=torch.Generator().manual_seed(size))
        made[side] = torch.cat([values, torch.full((2, pad, size), 9.0)], 1)
        made["audio_mask" if side == "audio" else "mask"] = mask
    return made


def test_output_shapes_and_padding() -> None:
    model = Model(Config(name="crossmodal", width=16, heads=2), info()).eval()
    assert model(batch()).shape == (2, 3)
    assert torch.allclose(model(batch()), model(batch(pad=6)), atol=1e-5)
    assert Model(Config(name="crossmodal", width=16, heads=2), info(1))(batch()).shape == (2,)


def test_each_side_hears_the_other() -> None:
    model = Model(Config(name="crossmodal", width=16, heads=2, layers=0), info()).eval()
    given = {name: value.requires_grad_(value.is_floating_point()) for name, value in batch().items()}
    model(given).sum().backward()
    for side, mask in (("audio", "audio_mask"), ("text", "mask")):
        there = given[side].grad.abs().sum(-1) > 0
        assert torch.equal(there, given[mask])


def test_rotary_positions_tell_distances() -> None:
    vectors = torch.randn(1, 1, 1, 8).expand(1, 1, 12, 8)
    products = (rotated(vectors) @ rotated(vectors).transpose(-1, -2))[0, 0]
    assert torch.allclose(products.diagonal(3), products.diagonal(3)[0].expand(9), atol=1e-4)
    assert (products[0] - products[0, 0]).abs().max() > 0.1


def test_pooling_is_over_what_is_there() -> None:
    mask = torch.tensor([[True, True, False]])
    assert torch.equal(pooled(torch.tensor([[[1.0], [3.0], [100.0]]]), mask), torch.tensor([[2.0]]))
    assert Layer(16, 2, 0.0)(torch.randn(1, 3, 16), torch.randn(1, 3, 16), mask).shape == (1, 3, 16)


def test_it_needs_features_or_encoders() -> None:
    with pytest.raises(UserError, match=r"model.audio: missing; name a run"):
        Model(Config(name="crossmodal"), Info("binary", 1, more={"audio_size": 64, "form": "logmel", "vocabulary": 9}))


def write_data(folder: Path) -> None:
    """48 utterances: the sound tells one bit of four labels, the transcript the other."""
    generator, lines = np.random.default_rng(0), ["path,text,label"]
    for number in range(48):
        sounds.write_noise(folder / f"{number}.wav", generator, 3200, number % 2)
        lines.append(f"{number}.wav,{('mono', 'bibi')[number // 2 % 2] * (1 + number % 3)},{'abcd'[number % 4]}")
    (folder / "all.csv").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/audio and runs/text."""
    folder = tmp_path_factory.mktemp("runs")
    write_data(folder)
    shared = ["data.train=all.csv", "data.valid=", "data.test=", "data.target=label", "train.epochs=6", "train.batch_size=8"]
    for name, more in (("audio", ["model.channels=4", "model.width=16", "model.heads=2"]), ("text", ["model.width=16", "model.buckets=64"])):
        config = commands.ROOT / "conf" / f"emodb_{name}.toml"
        commands.succeed("train.py", "--config", config, *shared, *more, f"run.dir=runs/{name}", folder=folder)
    return folder


def crossed(folder: Path, *more: str, run: str = "runs/crossmodal") -> commands.Ended:
    words = ["data.train=all.csv", "data.valid=", "data.test=", "data.target=label", "train.epochs=15", "train.batch_size=8", "optim.lr=5e-3"]
    words += ["model.audio=runs/audio", "model.text=runs/text", "data.tokenizer=runs/text/best", "model.width=16", "model.heads=2"]
    return commands.run(
        "train.py", "--config", commands.ROOT / "conf" / "emodb_crossmodal.toml", *words, *more, f"run.dir={run}", folder=folder, HF_HUB_OFFLINE="1"
    )


@pytest.mark.slow
def test_runs_as_encoders_from_training_to_a_vote(runs: Path) -> None:
    ended = crossed(runs)
    assert ended.status == 0, ended.text
    assert len(list(Path(runs, "runs", "cache").glob("vectors-*"))) == 6  # two encoders, three parts
    for name in ("audio", "text"):  # best/ is all that is needed
        Path(runs, "runs", name).rename(runs / f"away-{name}")
    try:
        out = commands.succeed("infer.py", "runs/crossmodal", "--input", "all.csv", "--output", "c.csv", folder=runs)
    finally:
        for name in ("audio", "text"):
            Path(runs, f"away-{name}").rename(runs / "runs" / name)
    assert float(out.split("accuracy ")[1].split()[0]) > 0.7  # one side alone: half
    out = commands.succeed("infer.py", "runs/audio", "runs/crossmodal", "--input", "all.csv", "--output", "v.csv", folder=runs)
    assert float(out.split("accuracy ")[1].split()[0]) > 0.5


def write_best(folder: Path, name: str, splits: Splits, **settings: object) -> None:
    """What train.py would leave of an untrained encoder."""
    config = {"name": name, "width": 16, "layers": 1, "heads": 2, **settings}
    file = module("models", name)
    encoder = file.Model(file.Config(**config), splits.info)
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(dump_toml({"model": config}))
    (folder / "info.json").write_text(json.dumps(dataclasses.asdict(splits.info)))
    save_file({key.removeprefix(encoder.prefix): value for key, value in encoder.state_dict().items()}, folder / "model.safetensors")


def test_cached_vectors_are_the_encoders_and_follow_their_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAINLOOP_CACHE", str(tmp_path / "cache"))
    write_data(tmp_path)
    splits = load(DataConfig(name="utterances", root=str(tmp_path), train="all.csv", target="label", audio="path", text="text", tokenizer="bpe"))
    write_best(tmp_path / "audio" / "best", "audio", splits, channels=2)
    write_best(tmp_path / "text" / "best", "text", splits, buckets=64)
    model = Model(Config(name="crossmodal", audio=str(tmp_path / "audio"), text=str(tmp_path / "text")), splits.info)
    ready = crossmodal.prepare(model, splits, torch.device("cpu"))
    rows = torch.tensor([5, 0, 3])
    with torch.no_grad():
        model.eval()
        assert torch.allclose(model(splits.valid.__getitems__(rows)), model(ready.valid.__getitems__(rows)), atol=1e-5)
    assert "audio" not in ready.valid.__getitems__(rows) and not any(p.requires_grad for p in model.encoders.parameters())
    assert model.train().encoders["audio"].training is False

    def kept() -> int:
        crossmodal.prepare(model, splits, torch.device("cpu"))
        return len(list((tmp_path / "cache").glob("vectors-*")))

    assert kept() == 6  # two encoders, three parts
    with torch.no_grad():
        next(model.encoders["text"].parameters()).add_(1)
    assert kept() == 9


@pytest.mark.slow
def test_encoders_may_go_on_learning(runs: Path) -> None:
    ended = crossed(runs, "model.frozen=false", "train.steps=4", run="runs/learning")
    assert ended.status == 0, ended.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data.tokenizer=bpe"], "model.text = 'runs/text': was trained on other inputs (vocabulary"),
        (["data.mels=32"], "model.audio = 'runs/audio': was trained on other inputs (audio_size"),
        (["model.audio=runs/none"], "model.pretrained = 'runs/none'"),
    ],
)
def test_encoders_of_other_inputs(runs: Path, words: list[str], said: str) -> None:
    ended = crossed(runs, *words, run="runs/wrong")
    assert ended.status == 2 and said in ended.errors and "Traceback" not in ended.errors

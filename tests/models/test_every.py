"""Every file of models/: twenty steps on two processes, killed and resumed, then predictions of a new file."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import commands
import launch
from engine import config

TABLE = "data.name=table data.train=table.csv data.target=label"
FILES = "data.target=label data.on_bad=error"
SMALL = "model.width=16 model.heads=2"
# Model -> (its settings, the file to predict). The fixture writes the files.
CASES = {
    "mlp": (f"{TABLE} model.width=8", "table.csv"),
    "tabm": (f"{TABLE} model.width=8 model.members=2 model.numbers=plain", "table.csv"),
    "vision": ("data.name=images data.train=images data.crop=1 model.width=8 model.stages=2", "images"),
    "audio": (f"data.name=utterances data.train=sounds.csv data.audio=path {FILES} model.channels=2 {SMALL}", "sounds.csv"),
    "crossmodal": (f"data.name=utterances data.train=features.csv data.audio=sound data.text=words {FILES} {SMALL}", "features.csv"),
    "pulse": ("data.name=signals data.train=signals.csv data.window=200 data.rate=50.0 data.clips=3 model.width=8 model.depth=1", "signals.csv"),
    "text": (f"data.name=text data.train=texts.csv data.text=text data.target=label {SMALL} model.buckets=64", "texts.csv"),
    "causal_lm": (f'data.name=corpus data.train=["corpus.txt"] data.block=16 data.vocabulary=300 {SMALL} model.layers=1', "corpus.txt"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 rows of two classes in every form."""
    from PIL import Image

    folder, generator = tmp_path_factory.mktemp("every"), np.random.default_rng(0)
    (folder / "images").mkdir()
    labels, rows = ["ab"[row % 2] for row in range(48)], range(48)

    def write(name: str, **columns: object) -> None:
        pd.DataFrame(columns).to_csv(folder / f"{name}.csv", index=False)

    write("table", x=generator.normal(size=48), colour=["red", "blue", "green"] * 16, label=labels)
    write("texts", text=[f"{label} film number {row}" for row, label in enumerate(labels)], label=labels)
    write("features", sound=[f"{row}.npy" for row in rows], words=[f"{row}.npy" for row in rows], label=labels)
    write("signals", file="wave.npy", start=[30 * row for row in rows], bpm=[60.0 + row for row in rows])
    write("sounds", path=[f"{row}.wav" for row in rows], label=labels)
    for row, label in enumerate(labels):
        (folder / "images" / label).mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (8, 8, 3), np.uint8)).save(folder / "images" / label / f"{row}.png")
        np.save(folder / f"{row}.npy", generator.normal(size=(1 + row % 5, 6)).astype(np.float32))
    np.save(folder / "wave.npy", generator.normal(size=(2, 2000)).astype(np.float32))
    (folder / "corpus.txt").write_text("\n\n".join(f"line {row} says {row * row}" for row in range(400)))
    soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed")
    for row in rows:
        soundfile.write(folder / f"{row}.wav", generator.normal(size=2000) / 9, 16000)
    (folder / "empty.toml").write_text("")
    return folder


def test_none_is_forgotten() -> None:
    assert set(CASES) == set(config.listing("models"))


@pytest.mark.slow
@pytest.mark.parametrize("model", CASES)
def test_in_sixteen_bits_under_zero(folder: Path, model: str) -> None:
    settings, _ = CASES[model]
    run = folder / f"{model}-bf16"
    words = ["--config", folder / "empty.toml", f"model.name={model}", *settings.split(), f"data.root={folder}", "strategy.name=zero3-offload"]
    words += ["train.precision=bf16", "train.steps=3", "train.batch_size=8", f"run.dir={run}"]
    launch.run(*words, log=launch.new_log(run), PLAINLOOP_CACHE=str(folder / "cache"))
    assert (run / "result.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero3-offload"])
@pytest.mark.parametrize("model", CASES)
def test_killed_resumed_and_predicted(folder: Path, model: str, strategy: str) -> None:
    settings, source = CASES[model]
    run = folder / f"{model}-{strategy}"
    words = ["--config", folder / "empty.toml", f"model.name={model}", *settings.split(), f"data.root={folder}", f"strategy.name={strategy}"]
    words += ["train.steps=20", "train.batch_size=8", "train.save_every=5", "train.eval_every=10", f"run.dir={run}"]
    how = {"processes": 2, "script": launch.ROOT / "tests" / "child.py", "PLAINLOOP_CACHE": str(folder / "cache")}
    # The second save, after ten steps, waits for the first to be whole.
    killed = launch.start(*words, log=launch.new_log(run), KILL="step/13/0/launcher", KILLS=str(run.with_suffix(".kills")), **how)
    assert killed.wait() != 0 and run.with_suffix(".kills").exists(), killed.text
    said = launch.run(*words, log=launch.new_log(run), **how)
    assert "\nresumed " in said and (run / "result.json").exists()
    out = run.with_suffix(".csv")
    commands.succeed("infer.py", run, "--input", folder / source, "--output", out, folder=folder)
    assert len(pd.read_csv(out)) == 48 or model == "causal_lm"

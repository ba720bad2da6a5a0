"""Predictions from a run folder: the right rows in the right order, in both formats, in bounded memory, without a launcher or with one."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import commands
import infer
import launch
from engine import report

INFER = commands.ROOT / "infer.py"
ABOUT_THE_END = slice(infer.CHUNK - 3, infer.CHUNK + 3)
TABLE = """
[data]
name = "table"
train = "{name}.csv"
target = "y"
id = "key"
[model]
name = "mlp"
width = 8
depth = 1
[train]
steps = 20
batch_size = 32
[optim]
lr = 1e-2
"""


def table(kind: str, rows: int, seed: int = 0) -> pd.DataFrame:
    generator = np.random.default_rng(seed)
    found = pd.DataFrame({"key": [f"k{number}" for number in range(rows)][::-1], "a": generator.normal(size=rows).round(4)})
    found["b"] = generator.choice(["red", "green", "blue"], rows)
    signal = found.a + (found.b == "red") + 0.1 * generator.normal(size=rows)
    found["y"] = {
        "binary": np.where(signal > 0, "yes", "no"),
        "multiclass": np.clip(signal.round(), -1, 1).astype(int),
        "regression": signal * 7 + 50,
    }[kind]
    return found


SPLITS = (" --checkpoint step=3", " --checkpoint step=9", "")
KINDS = {
    "binary": ["key", "prediction", "probability_no", "probability_yes"],
    "multiclass": ["key", "prediction", "probability_-1", "probability_0", "probability_1"],
    "regression": ["key", "prediction"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run of each kind, and a file to predict: without its labels, and with them in other columns' order beside a column unheard of."""
    folder = tmp_path_factory.mktemp("infer")
    trains, infers = [], []
    for kind in KINDS:
        table(kind, 301).to_csv(folder / f"{kind}.csv", index=False)
        (folder / f"{kind}.toml").write_text(TABLE.format(name=kind))
        trains.append(["train.py", "--config", f"{kind}.toml", f"run.dir={kind}"])
        new = table(kind, 77, seed=1)
        new.drop(columns="y").to_csv(folder / f"new_{kind}.csv", index=False)
        new.assign(z=3)[["y", "z", "b", "a", "key"]].to_parquet(folder / f"labelled_{kind}.parquet")
        run = ["infer.py", kind, "--input"]
        infers.append([*run, f"new_{kind}.csv", "--output", f"plain_{kind}.csv"])
        infers.append([*run, f"new_{kind}.csv", "--output", f"plain_{kind}.parquet"])
        infers.append([*run, f"labelled_{kind}.parquet", "--output", f"labelled_{kind}.csv"])
        infers.append([*run, f"new_{kind}.csv", "--output", f"logits_{kind}.csv", "--logits"])
    run = ["run.dir=steps", "data.dataset=wine", "model.width=8", "train.steps=9", "train.save_every=3", "train.eval_every=9", "train.keep_last=9"]
    steps = [["train.py", *run], *(["infer.py", "steps", "--split", "test", *words.split()] for words in SPLITS)]
    ended = commands.many([*trains, *infers, *steps], folder)
    assert [end.status for end in ended] == [0] * len(ended), "".join(end.text for end in ended)
    (folder / "said.txt").write_text("".join(end.out for end in ended[len(trains) : -len(steps)]))
    for words, end in zip(SPLITS, ended[-len(SPLITS) :], strict=True):
        (folder / f"split{words}.txt").write_text(end.out)
    return folder


@pytest.mark.parametrize(("kind", "columns"), KINDS.items())
def test_predictions_have_id_label_and_a_probability_for_each_class(folder, kind, columns):
    found, given = pd.read_csv(folder / f"plain_{kind}.csv"), table(kind, 77, seed=1)
    assert list(found) == columns
    assert list(found.key) == list(given.key)
    if kind == "regression":
        assert np.corrcoef(found.prediction, given.y)[0, 1] > 0.5
        return
    chances = found[columns[2:]].to_numpy()
    assert np.allclose(chances.sum(1), 1, atol=1e-6)
    labels = np.array([column.removeprefix("probability_") for column in columns[2:]])
    assert list(found.prediction.astype(str)) == list(labels[chances.argmax(1)])
    assert (found.prediction == given.y).mean() > 0.7


@pytest.mark.parametrize("kind", KINDS)
def test_parquet_holds_what_csv_does(folder, kind):
    expected = pd.read_csv(folder / f"plain_{kind}.csv", dtype=None if kind == "regression" else {"prediction": str})  # a label is a text
    pd.testing.assert_frame_equal(pd.read_parquet(folder / f"plain_{kind}.parquet"), expected, check_dtype=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_label_column_gives_scores_and_the_same_predictions(folder, kind):
    assert (folder / f"labelled_{kind}.csv").read_bytes() == (folder / f"plain_{kind}.csv").read_bytes()
    said = (folder / "said.txt").read_text().splitlines()
    (line,) = [line for line in said if line.startswith(f"labelled_{kind}.parquet: loss ")]
    assert not [line for line in said if line.startswith(f"new_{kind}.csv: ")]
    found, given = pd.read_csv(folder / f"plain_{kind}.csv"), table(kind, 77, seed=1)
    if kind == "regression":
        assert f"mae {np.abs(found.prediction - given.y).mean():.4g}" in line
    else:
        assert f"accuracy {(found.prediction == given.y).mean():.4g}" in line


@pytest.mark.parametrize("kind", ["binary", "multiclass"])
def test_logits_are_those_of_the_probabilities(folder, kind):
    chances, logits = (pd.read_csv(folder / f"{name}_{kind}.csv") for name in ("plain", "logits"))
    assert list(logits) == [name.replace("probability", "logit") for name in chances]
    softmax = torch.tensor(logits.iloc[:, 2:].to_numpy()).softmax(1).numpy()
    assert np.allclose(softmax, chances.iloc[:, 2:].to_numpy(), atol=1e-6)
    assert list(logits.prediction) == list(chances.prediction)


def test_without_an_id_rows_are_numbered_and_categories_may_be_new(folder):
    new = table("binary", 5, seed=2).drop(columns=["key", "y"])
    new.loc[3, "b"] = "violet"
    new.loc[4, "a"] = None
    new.to_csv(folder / "odd.csv", index=False)
    (end,) = commands.many([["infer.py", "binary", "--input", "odd.csv", "--output", "odd_out.csv"]], folder)
    assert end.status == 0, end.text
    found = pd.read_csv(folder / "odd_out.csv")
    assert list(found.row) == [0, 1, 2, 3, 4]
    assert found.notna().all(axis=None)


def test_best_is_enough_also_without_accelerate_and_deepspeed(folder, tmp_path):
    shutil.copytree((folder / "binary/best").resolve(), tmp_path / "model")
    for name in ("accelerate", "deepspeed", "transformers"):
        (tmp_path / "absent" / name).mkdir(parents=True)
        (tmp_path / "absent" / name / "__init__.py").write_text(f"raise ImportError('{name} is not installed')\n")
    environment = commands.environment() | {"PYTHONPATH": f"{tmp_path}/absent"}
    words = ["model", "--input", str(folder / "new_binary.csv"), "--output", "out.csv"]
    ended = subprocess.run([sys.executable, str(INFER), *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "out.csv").read_bytes() == (folder / "plain_binary.csv").read_bytes()


def test_another_checkpoint_may_be_chosen(folder):
    third, last, best = ((folder / f"split{words}.txt").read_text() for words in SPLITS)
    assert last == best
    assert third.startswith("test: loss ")
    assert third != last


@pytest.fixture(scope="module")
def large(folder) -> pd.DataFrame:
    """More rows than a chunk has, and an odd number; and the few about its end alone."""
    rows = table("binary", infer.CHUNK + 10_001, seed=3)
    rows.to_csv(folder / "large.csv", index=False)
    rows[ABOUT_THE_END].to_csv(folder / "few.csv", index=False)
    for end in commands.many([["infer.py", "binary", "--input", f"{name}.csv", "--output", f"{name}_out.csv"] for name in ("large", "few")], folder):
        assert end.status == 0, end.text
    return rows


def test_several_chunks_are_one_file(folder, large):
    found = pd.read_csv(folder / "large_out.csv")
    assert list(found.key) == list(large.key)
    assert (found.prediction == large.y).mean() > 0.7
    pd.testing.assert_frame_equal(pd.read_csv(folder / "few_out.csv"), found[ABOUT_THE_END].reset_index(drop=True), atol=1e-6)


def test_two_processes_write_the_same_bytes(folder, tmp_path, large):
    words = ["binary", "--input", "large.csv", "--output", str(tmp_path / "out.csv")]
    said = launch.run(*words, log=tmp_path / "log", processes=2, folder=folder, script=INFER)
    assert (tmp_path / "out.csv").read_bytes() == (folder / "large_out.csv").read_bytes()
    assert said.count("large.csv: loss") == said.count("predictions ") == 1


@pytest.mark.slow
def test_accelerate_launch_writes_the_same_bytes(folder, tmp_path, large):
    words = ["binary", "--input", "large.csv", "--output", str(tmp_path / "out.csv")]
    launcher = [*commands.ACCELERATE, "--multi_gpu", "--num_processes", "2", "--main_process_port=0"]
    end = commands.run("infer.py", *words, folder=folder, launcher=launcher)
    assert end.status == 0, end.text
    alone = [tmp_path / "alone.csv" if word.endswith("out.csv") else word for word in words]
    assert commands.run("infer.py", *alone, folder=folder).status == 0
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "alone.csv").read_bytes()


def test_two_processes_predict_fewer_rows_than_they_are(folder, tmp_path):
    table("binary", 1, seed=4).to_csv(folder / "single.csv", index=False)
    launch.run("binary", "--input", "single.csv", "--output", tmp_path / "out.csv", log=tmp_path / "log", processes=2, folder=folder, script=INFER)
    assert len(pd.read_csv(tmp_path / "out.csv")) == 1


def test_an_output_that_cannot_be_written_ends_two_processes_with_one_line(folder, tmp_path, large):
    words = ["binary", "--input", "large.csv", "--output", "gone/out.csv"]
    run = launch.start(*words, log=tmp_path / "log", processes=2, folder=folder, script=INFER)
    assert run.wait() == 1
    assert len([line for line in run.text.splitlines() if line.startswith("error: --output gone/out.csv")]) == 1
    assert "in predict_file" not in run.text  # of a rank's traceback


def test_a_mistake_in_a_later_chunk_leaves_nothing_behind(folder, large):
    spoilt = large.astype({"a": str})
    spoilt.loc[infer.CHUNK + 5, "a"] = "tall"
    spoilt.to_csv(folder / "spoilt.csv", index=False)
    before = set(folder.iterdir())
    (folder / "kept.csv").write_text("an older output")
    (end,) = commands.many([["infer.py", "binary", "--input", "spoilt.csv", "--output", "kept.csv"]], folder)
    assert (end.status, end.errors.count("\n")) == (2, 1)
    assert "'tall'" in end.errors
    assert set(folder.iterdir()) == before | {folder / "kept.csv"}
    assert (folder / "kept.csv").read_text() == "an older output"


def test_a_predictor_gives_the_numbers_of_result_json(folder):
    import json

    predictor = infer.Predictor(folder / "multiclass", torch.device("cpu"))
    scores, predictions, target = predictor.score(predictor.split("test"))
    assert scores == json.loads((folder / "multiclass/result.json").read_text())["test"]
    assert predictions.shape == (len(target), 3)
    assert scores["accuracy"] == pytest.approx((predictions.argmax(1) == target).mean())
    assert report.scores_text(scores).startswith("loss ")


def test_parts_of_a_file_that_has_changed_are_neither_scored_nor_trained_on(tmp_path):
    """One more category moves the codes of those after it; other values move the scales."""
    (tmp_path / "binary.toml").write_text(TABLE.format(name="binary"))
    table("binary", 301).to_csv(tmp_path / "binary.csv", index=False)
    train, test = ["--config", "binary.toml", "run.dir=run"], ["run", "--split", "test"]
    steps = [(commands.ROOT / "train.py", train), (INFER, test)]
    for script, words in steps:
        launch.run(*words, script=script, folder=tmp_path, log=tmp_path / "log")
    learned = (tmp_path / "run/preprocessing.json").read_bytes()
    changed = table("binary", 301)
    changed.loc[:9, ["a", "b"]] = [9.0, "black"]  # not all of them are test rows
    changed.to_csv(tmp_path / "binary.csv", index=False)
    (tmp_path / "run/result.json").unlink()
    for script, words in steps:
        refused = launch.start(*words, script=script, folder=tmp_path, log=tmp_path / f"{script.stem}.log")
        assert refused.wait() == 2, refused.text
        assert "data.train is not what this run learned from (other vocabularies, scales)" in refused.text
        assert "Traceback" not in refused.text
    assert (tmp_path / "run/preprocessing.json").read_bytes() == learned


PEAK = """
import atexit, re, runpy, sys
atexit.register(lambda: print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1], file=sys.stderr))
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(folder, tmp_path):
    def peak(rows: int) -> float:
        """Megabytes of a process that predicts this many rows. (The system's own account of a child begins with its parent's.)"""
        generator = np.random.default_rng(0)
        wide = {f"unused{number}": generator.normal(size=rows).round(6) for number in range(6)}
        pd.DataFrame({"key": np.arange(rows), "a": generator.normal(size=rows), "b": "red", **wide}).to_csv(tmp_path / "rows.csv", index=False)
        words = [
            sys.executable,
            "-c",
            PEAK.replace("sys.argv[1]", repr(str(INFER))),
            str(folder / "binary"),
            "--input",
            "rows.csv",
            "--output",
            "out.csv",
        ]
        ended = subprocess.run(words, cwd=tmp_path, env=commands.environment(), capture_output=True, text=True, check=True)
        assert len(pd.read_csv(tmp_path / "out.csv")) == rows
        return int(ended.stderr.split()[-1]) / 1024

    # Arrow reads ahead by some blocks of 4 MB, which a file of 65 MB fills; the larger one has 260 MB.
    small, much = peak(infer.CHUNK * 12), peak(infer.CHUNK * 48)
    assert much < small + 150

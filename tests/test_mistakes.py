"""What is wrong with the input is said in one clear line that names it, with status 2, no traceback, and nothing lost."""

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import commands
import launch
from engine import process

TABLE = """
[data]
name = "table"
train = "good.csv"
target = "y"
[model]
name = "mlp"
width = 8
depth = 1
[train]
steps = 2
batch_size = 16
"""

# Mistake -> (the command after its script, the words that its line must hold). "folder" of the fixture holds the files.
TRAIN = {
    "missing file": ("data.train=gone.csv", "data.train", "gone.csv", "no such file"),
    "missing config": ("--config gone.toml", "gone.toml", "no such file"),
    "directory": ("data.train=directory", "data.train", "is a folder"),
    "config is a directory": ("--config directory", "directory", "cannot be read"),
    "empty file": ("data.train=empty.csv", "empty.csv", "empty"),
    "header only": ("data.train=header.csv", "header.csv", "no rows"),
    "missing target column": ("data.target=yy", "data.target", "'yy'", "did you mean y?"),
    "all-missing column": ("data.train=missing_column.csv", "'b'", "missing in every"),
    "two columns of one name": ("data.train=two_columns.csv", "'a'", "2 columns"),
    "constant target": ("data.train=constant.csv", "'y'", "nothing to learn"),
    "constant number as target": ("data.train=constant_number.csv task.kind=regression", "'y'", "nothing to learn"),
    "label in test not in train": ("data.test=other_label.csv", "data.test", "'maybe'", "not in train"),
    "regression on strings": ("task.kind=regression", "task.kind", "'y'", "texts"),
    "binary with three labels": ("task.kind=binary data.target=c", "task.kind", "'c'", "3 values"),
    "NaN in the target": ("data.train=nan_target.csv", "'y'", "row 7"),
    "dates": ("data.train=dates.csv", "'when'", "dates"),
    "invalid UTF-8": ("data.train=latin.csv", "latin.csv", "utf-8", "data.encoding"),
    "truncated Parquet": ("data.train=cut.parquet", "cut.parquet", "damaged or cut off"),
    "malformed TOML": ("--config malformed.toml", "malformed.toml", "line 2", "column 11"),
    "TOML in another encoding": ("--config latin.toml", "latin.toml", "UTF-8"),
    "unknown key": ("optim.learning_rate=1e-3", "optim.learning_rate", "unknown key"),
    "unknown key of the data": ("data.targett=y", "data.targett", "did you mean target?"),
    "unknown section": ("optimm.lr=1e-3", "optimm", "did you mean optim?"),
    "unknown model": ("model.name=mpl", "model.name", "'mpl'", "did you mean mlp?"),
    "unknown data": ("data.name=tabel", "data.name", "'tabel'", "did you mean table?"),
    "unknown metric": ('task.metrics=["acuracy"]', "task.metrics", "did you mean accuracy?"),
    "unknown best": ("task.best=max.f1", "task.best", "max <metric>"),
    "unknown loss": ("task.loss=bec", "task.loss", "did you mean bce?"),
    "a module for a loss": ("task.loss=torch", "task.loss", "'torch'", "no such loss"),
    "a module for a metric": ('task.metrics=["nn"]', "task.metrics", "'nn'", "no metric"),
    "a module for an optimizer": ("optim.name=nn", "optim.name", "'nn'", "no such optimizer"),
    "unknown loss option": ("task.loss_options.smoothing=0.1", "task.loss_options.smoothing", "label_smoothing"),
    "unknown kind": ("task.kind=multi_class", "task.kind", "did you mean multiclass?"),
    "unknown optimizer": ("optim.name=adamw", "optim.name", "did you mean AdamW?"),
    "unknown optimizer option": ("optim.options.beta=1", "optim.options.beta", "did you mean betas?"),
    "refused optimizer option": ("optim.options.betas=[2.0,1.0]", "optim.options", "beta"),
    "too few values of an optimizer option": ("optim.options.betas=[0.9]", "optim.options", "refused"),
    "no override": ("train.steps", "'train.steps'", "section.key=value"),
    "wrong type": ("train.steps=many", "train.steps", "'many'", "int"),
    "batch 0": ("train.batch_size=0", "train.batch_size = 0", "greater than 0"),
    "negative lr": ("optim.lr=-1", "optim.lr = -1", "greater than 0"),
    "NaN as lr": ("optim.lr=nan", "optim.lr", "finite"),
    "fractions leave no rows": ("data.valid_fraction=0.6 data.test_fraction=0.6", "valid_fraction", "less than 1"),
    "3 processes for a batch of 64": ("train.batch_size=64", "train.batch_size = 64", "(3)", "63"),
    "micro-batch that does not divide": ("train.micro_batch=5", "train.batch_size = 16", "(5)", "15"),
    "unwritable run folder": ("run.dir=good.csv/run", "good.csv/run", "run.dir"),
    "read-only run folder": ("run.dir=/proc/run", "/proc/run", "run.dir"),
    "run folder of another config": ("run.dir=run optim.lr=0.5", "run", "optim.lr = 0.001 there, 0.5 here", "run.dir"),
    "a second process on the same run folder": ("run.dir=owned", "owned", f"locked by process {os.getpid()}", "run.dir"),
    "run folder must be empty": ("run.dir=run run.resume=never", "run.resume", "never"),
    "resume from nothing": ("run.dir=fresh run.resume=gone", "run.resume", "gone"),
    "fp16 on a CPU": ("train.precision=fp16", "train.precision", "GPU"),
    "unknown option": ("--epochs 3", "--epochs"),
}
INFER = {
    "a folder that is no run": ("directory --split test", "directory", "not a run folder"),
    "no folder at all": ("gone --split test", "gone", "no such file or folder"),
    "a file that lacks a feature column": ("run --input lacks.csv --output out.csv", "lacks.csv", "'b'"),
    "nothing to predict": ("run", "--input", "--split"),
    "no output": ("run --input good.csv", "--output"),
    "an output of unknown kind": ("run --input good.csv --output out.xlsx", "out.xlsx", ".parquet"),
    "an output that cannot be written": ("run --input good.csv --output gone/out.csv", "gone/out.csv", "--output"),
    "an output that is the input": ("run --input good.csv --output good.csv", "good.csv", "the input itself"),
    "an output of a score": ("run --split test --output out.csv", "--output", "--input"),
    "best without its preprocessing": ("incomplete --input good.csv --output out.csv", "preprocessing.json", "copy the whole folder"),
    "torn info": ("torn_info --split test", "info.json", "torn"),
    "an output below a file": ("run --input good.csv --output good.csv/out.csv", "good.csv/out.csv", "--output"),
    "an output that is a folder": ("run --input good.csv --output folder.csv", "folder.csv", "--output"),
    "a missing file to predict": ("run --input gone.csv --output out.csv", "gone.csv", "no such file"),
    "a header to predict": ("run --input header.csv --output out.csv", "header.csv", "no rows"),
    "a label unknown to the run": ("run --input other_label.csv --output out.csv", "other_label.csv", "'maybe'"),
    "a text where training had numbers": ("run --input text.csv --output out.csv", "text.csv", "'b'", "'tall'"),
    "a checkpoint that is not there": ("run --checkpoint step=77 --split test", "step=77"),
    "a word for a checkpoint": ("run --checkpoint last --split test", "last", "step=NUMBER"),
    "an unknown part": ("run --split tests", "--split", "tests"),
    "torn weights": ("torn --split test", "model.safetensors", "cannot be read"),
    "a mistyped run folder": ("runs/mlp-digits/ddp/width=8-abcdef --split test", "width=8-abcdef", "no such file or folder"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    generator = np.random.default_rng(0)
    good = pd.DataFrame({"a": generator.normal(size=61), "b": generator.normal(size=61), "c": generator.choice(["red", "green", "blue"], 61)})
    good["y"] = np.where(good.a + good.b > 0, "yes", "no")
    changed = {
        "good": good,
        "header": good[:0],
        "missing_column": good.assign(b=np.nan),
        "constant": good.assign(y="yes"),
        "constant_number": good.assign(y=1.5),
        "other_label": good.assign(y=["maybe", *good.y[1:]]),
        "nan_target": good.assign(y=[*good.y[:6], None, *good.y[7:]]),
        "dates": good.assign(when=pd.date_range("2024-01-01", periods=61).astype(str)),
        "lacks": good.drop(columns="b"),
        "text": good.assign(b=["tall", *good.b[1:]]),
    }
    for name, table in changed.items():
        table.to_csv(folder / f"{name}.csv", index=False)
    (folder / "two_columns.csv").write_text((folder / "good.csv").read_text().replace("a,b,c,y", "a,a,c,y", 1))
    (folder / "latin.csv").write_bytes((folder / "good.csv").read_text().replace("green", "grün").encode("latin-1"))
    (folder / "empty.csv").touch()
    (folder / "directory").mkdir()
    (folder / "folder.csv").mkdir()
    good.to_parquet(folder / "cut.parquet")
    (folder / "cut.parquet").write_bytes((folder / "cut.parquet").read_bytes()[:-100])
    (folder / "good.toml").write_text(TABLE)
    (folder / "malformed.toml").write_text("[optim]\nlr = 1e-3 1\n")
    (folder / "latin.toml").write_bytes('[model]\nlabel = "grün"\n'.encode("latin-1"))
    (end,) = commands.many([["train.py", "--config", "good.toml", "run.dir=run"]], folder)
    assert end.status == 0, end.text
    shutil.copytree(folder / "run/best", folder / "torn")
    os.truncate(folder / "torn/model.safetensors", 100)
    shutil.copytree(folder / "run/best", folder / "torn_info")
    os.truncate(folder / "torn_info/info.json", 20)
    shutil.copytree(folder / "run/best", folder / "incomplete")
    (folder / "incomplete/preprocessing.json").unlink()
    return folder


def fingerprint(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def ended(folder) -> dict[str, commands.Ended]:
    """How each of them ended; whatever was there before is there afterwards."""
    lines = {}
    for name, (words, *_) in TRAIN.items():
        processes = ["WORLD_SIZE=3"] if name.startswith("3 processes") else []
        lines[name] = [*processes, "train.py", "--config", "good.toml", *words.split()]
    lines |= {name: ["infer.py", *words.split()] for name, (words, *_) in INFER.items()}
    with process.lock(folder / "owned"):
        before = fingerprint(folder)
        found = dict(zip(lines, commands.many(list(lines.values()), folder), strict=True))
        after = fingerprint(folder)
    assert {path: after.get(path) for path in before} == before
    assert not [path for path in after if "out." in path or path.endswith(".tmp")]
    return found


@pytest.mark.parametrize("mistake", [*TRAIN, *INFER])
def test_one_line_names_the_mistake(ended, mistake):
    end = ended[mistake]
    assert end.status == 2, end.text
    lines = end.errors.splitlines()
    assert len(lines) == 1, end.text
    assert lines[0].startswith("error: ")
    assert "Traceback" not in end.text
    for word in (TRAIN | INFER)[mistake][1:]:
        assert word in lines[0]


def test_a_true_command_says_the_same(folder):
    end = commands.run("train.py", "--config", "good.toml", "data.target=yy", folder=folder)
    assert (end.status, end.out) == (2, "")
    assert end.errors == f"error: data.target = 'yy': {folder}/good.csv has no such column; did you mean y?\n"
    end = commands.run("infer.py", "directory", "--split", "test", folder=folder)
    assert (end.status, end.out) == (2, "")
    assert end.errors.startswith("error: directory: not a run folder")


@pytest.mark.parametrize(
    ("words", "needle"),
    [
        (["train.batch_size=64"], "train.batch_size = 64: must be a multiple of the number of processes (3), such as 63"),
        (["train.batch_size=63", "data.target=yy"], "data.target = 'yy'"),
        (["train.batch_size=63", "run.dir=good.csv/run"], "good.csv/run: the run folder cannot be written"),
    ],
)
def test_several_processes_say_it_once(folder, tmp_path, words, needle):
    """The launcher adds what it always says of a failed process."""
    run = launch.start("--config", "good.toml", *words, log=tmp_path / "log", processes=3, folder=folder)
    assert run.wait() == 1
    (line,) = [line for line in run.text.splitlines() if line.startswith("error: ")]
    assert needle in line


def test_after_a_mistake_the_same_run_folder_serves(folder):
    mistakes = (["data.target=yy"], ["optim.name=adamw"], [], ["run.resume=never"])
    ended = commands.many([["train.py", "--config", "good.toml", "run.dir=again", *words] for words in mistakes], folder)
    assert [end.status for end in ended] == [2, 2, 0, 2]

"""Training from the command line: what a run leaves, how it ends, and that any number of processes trains the same."""

import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import commands
import launch
from engine import config, report, settings

SHORT = ("model.width=16", "model.depth=1", "train.batch_size=32", "train.steps=12", "train.eval_every=4")
SETS = {"digits": "multiclass", "wine": "multiclass", "breast_cancer": "binary", "diabetes": "regression"}
NEWEST = "epoch=000-step=00000012"  # of the digits
TABLE = """
[data]
name = "table"
train = "rows.csv"
target = "y"
balance = "class_weights"
[model]
name = "mlp"
width = 16
depth = 2
dropout = 0.0
[train]
batch_size = 24
steps = 40
eval_every = 20
clip = 0.5
[optim]
lr = 1e-2
schedule = "cosine"
warmup_ratio = 0.1
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A table of an odd number of rows whose classes are of unequal size."""
    folder = tmp_path_factory.mktemp("train")
    generator = np.random.default_rng(0)
    rows = pd.DataFrame({"a": generator.normal(size=331), "b": generator.normal(size=331), "c": generator.choice(["red", "green", "blue"], 331)})
    rows["y"] = np.where(rows.a + (rows.c == "red") + generator.normal(size=331) > 1, "yes", "no")
    rows.to_csv(folder / "rows.csv", index=False)
    (folder / "table.toml").write_text(TABLE)
    return folder


def wine(run: str, *words: str) -> list[str]:
    return ["train.py", "data.dataset=wine", f"run.dir={run}", *SHORT, *words]


@pytest.fixture(scope="module")
def ended(folder) -> dict[str, commands.Ended]:
    """Many commands, one after another in one process."""
    sgd = "optim.name=SGD"
    lines = {f"train {name}": ["train.py", f"data.dataset={name}", f"run.dir={name}", *SHORT] for name in SETS}
    lines |= {f"infer {name}": ["infer.py", name, "--split", "test"] for name in SETS}
    lines |= {
        "again": wine("wine"),
        "longer": wine("wine", "train.steps=16"),
        "never": wine("never", "run.resume=never"),
        "from a run": wine("from_run", "run.resume=wine", "train.steps=20", "optim.lr=1e-4"),
        "from a checkpoint": wine(
            "from_checkpoint", "run.resume=digits/checkpoints/epoch=000-step=00000012", "data.dataset=digits", "train.steps=13"
        ),
        "overfit": wine(
            "overfit", "train.overfit=10", "train.steps=150", "train.eval_every=150", "model.dropout=0.0", "optim.lr=1e-2", "train.batch_size=4"
        ),
        "patience": wine("patience", sgd, "optim.lr=1e-12", "train.eval_every=1", "train.patience=3", "train.min_delta=0.01"),
        "patience, more epochs": wine(
            "patience", sgd, "optim.lr=1e-12", "train.eval_every=1", "train.patience=3", "train.min_delta=0.01", "train.steps=99"
        ),
        "patience again": wine("patience", sgd, "optim.lr=1e-12", "train.eval_every=1", "train.patience=5", "train.min_delta=0.01"),
        "diverged at once": wine("diverged", sgd, "optim.lr=1e30", "train.eval_every=1"),
        "diverged later": wine("diverged_later", "run.resume=wine", sgd, "optim.lr=1e30", "train.steps=100", "train.eval_every=50"),
        "infer after divergence": ["infer.py", "diverged_later", "--split", "test"],
        "bf16": wine("bf16", "train.precision=bf16"),
        "workers": wine("workers", "train.workers=2", "model.dropout=0.0"),
        "no workers": wine("no_workers", "train.workers=0", "model.dropout=0.0"),
        "derived": ["train.py", "data.dataset=wine", *SHORT, "run.seed=1"],
        "derived, another seed": ["train.py", "data.dataset=wine", *SHORT, "run.seed=2"],
        "own table": ["train.py", "--config", "table.toml", "run.dir=one", "train.micro_batch=12"],
    }
    return dict(zip(lines, commands.many(list(lines.values()), folder), strict=True))


def result(run: Path) -> dict:
    return json.loads((run / "result.json").read_text())


def evaluations(run: Path) -> list[dict]:
    return report.read_lines(run / "metrics.jsonl")


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(max((run / "checkpoints").iterdir(), key=lambda path: path.name.rpartition("=")[2]) / "model.safetensors")


@pytest.mark.parametrize(("name", "kind"), SETS.items())
def test_a_run_folder_explains_itself(folder, ended, name, kind):
    run = folder / name
    assert ended[f"train {name}"].status == 0, ended[f"train {name}"].text
    picture = "residuals.png" if kind == "regression" else "confusion.png"
    for file in ("config.toml", "curves.png", picture, "best/model.safetensors", "best/config.toml", "best/info.json", "best/preprocessing.json"):
        assert (run / file).stat().st_size > 0
    assert json.loads((run / "info.json").read_text())["kind"] == kind
    assert [line["step"] for line in evaluations(run)][:3] == [4, 8, 12]
    for line in evaluations(run):
        assert set(line) == {"step", "epoch", "lr", "train", "valid", "clock"}
        assert set(line["train"]) == set(line["valid"]) == set(result(run)["test"])
    again = settings.parse([run / "config.toml"])
    assert config.dump_toml(again.values()) == (run / "config.toml").read_text()
    assert result(run)["best"] == next(line["valid"] for line in evaluations(run) if line["step"] == result(run)["step"])
    assert not list(run.rglob("*.pkl")) + list(run.rglob("*.pt")) + list(run.rglob("*.bin"))


@pytest.mark.parametrize("name", SETS)
def test_infer_scores_what_result_json_holds(folder, ended, name):
    assert ended[f"infer {name}"].out == f"test: {report.scores_text(result(folder / name)['test'])}\n"


def test_best_is_the_best_evaluation(folder, ended):
    for name, (direction, score) in {"wine": (max, "accuracy"), "diabetes": (min, "rmse")}.items():
        assert result(folder / name)["best"][score] == direction(line["valid"][score] for line in evaluations(folder / name)[:3])


def test_a_finished_run_says_so_and_is_left_alone(folder, ended):
    assert ended["again"].status == 0
    assert "finished at step 12" in ended["again"].out
    assert "epoch" not in ended["again"].out.partition("parameters")[2].partition("resumed")[0]
    before = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "digits").rglob("*") if path.is_file()}
    commands.many([["train.py", "data.dataset=digits", "run.dir=digits", *SHORT]], folder)
    after = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "digits").rglob("*") if path.is_file()}
    assert {path.name for path in before if before[path] != after.get(path)} <= {".lock"}
    assert set(after) == set(before)


def test_more_steps_go_on(folder, ended):
    assert "resumed wine/checkpoints/epoch=003-step=00000012 at step 12" in ended["longer"].out
    assert [line["step"] for line in evaluations(folder / "wine")] == [4, 8, 12, 16]
    assert ended["never"].status == 0


def test_another_run_goes_on_from_a_run_or_a_checkpoint(folder, ended):
    assert ended["from a run"].status == 0, ended["from a run"].text
    assert [line["step"] for line in evaluations(folder / "from_run")] == [4, 8, 12, 16, 20]
    assert [line["step"] for line in evaluations(folder / "wine")] == [4, 8, 12, 16]
    assert evaluations(folder / "from_run")[4]["lr"] == 1e-4
    assert ended["from a checkpoint"].status == 0, ended["from a checkpoint"].text
    assert [line["step"] for line in evaluations(folder / "from_checkpoint")] == [4, 8, 12, 13]


def test_a_few_samples_are_learned_by_heart(folder, ended):
    (line,) = evaluations(folder / "overfit")
    assert line["train"]["accuracy"] == 1.0
    assert line["train"]["loss"] < 0.01 < line["valid"]["loss"]


def test_patience_ends_a_run_that_does_not_improve(folder, ended):
    assert ended["patience"].status == 0
    assert "finished at step 4; more train.patience would go on" in ended["patience, more epochs"].out
    assert [line["step"] for line in evaluations(folder / "patience")] == [1, 2, 3, 4, 5, 6]  # 4, and 2 with more patience
    assert result(folder / "patience")["step"] == 1
    assert "resumed patience/checkpoints/epoch=001-step=00000004" in ended["patience again"].out


def test_a_loss_that_is_not_finite_ends_with_status_3(folder, ended):
    end = ended["diverged at once"]
    assert end.status == 3
    assert end.errors == ""
    assert end.out.splitlines()[-1].startswith("diverged: ")
    assert not (folder / "diverged/best").exists()
    assert not (folder / "diverged/result.json").exists()


def test_the_last_good_weights_stay(folder, ended):
    assert ended["diverged later"].status == 3
    assert ended["infer after divergence"].status == 0, ended["infer after divergence"].text
    expected = result(folder / "wine")
    assert (folder / "diverged_later/best").resolve().name == f"best-{expected['step']}"
    for name, tensor in load_file(folder / "diverged_later/best/model.safetensors").items():
        assert torch.isfinite(tensor).all()
        assert torch.equal(tensor, load_file(folder / "wine/best/model.safetensors")[name])


def test_bf16_trains_and_keeps_weights_whole(folder, ended):
    assert ended["bf16"].status == 0, ended["bf16"].text
    assert {tensor.dtype for tensor in last_weights(folder / "bf16").values()} == {torch.float32}
    assert result(folder / "bf16")["test"]["loss"] == pytest.approx(result(folder / "wine")["test"]["loss"], abs=0.3)


def test_reading_ahead_changes_nothing(folder, ended):
    one, other = last_weights(folder / "workers"), last_weights(folder / "no_workers")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_another_seed_is_another_folder_beside(folder, ended):
    runs = sorted((folder / "runs/mlp-wine/ddp").iterdir())
    assert len(runs) == 2
    assert all(path.name.startswith("width=16-depth=1-embedding=8-fp32-batch=32-lr=0.001-") for path in runs)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_train_as_one_does(folder, tmp_path, ended, accumulation):
    """Rows odd in number, class weights, clipping and a schedule; one process accumulates too."""
    assert ended["own table"].status == 0, ended["own table"].text
    run = folder / f"two-{accumulation}"
    said = launch.run(
        "--config", "table.toml", f"run.dir={run}", f"train.micro_batch={12 // accumulation}", log=tmp_path / "log", processes=2, folder=folder
    )
    one, two = last_weights(folder / "one"), last_weights(run)
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-4
    moved = max(float(tensor.abs().max()) for tensor in two.values())
    assert moved > 0.1
    for name, value in result(folder / "one")["test"].items():
        assert result(run)["test"][name] == pytest.approx(value, abs=1e-4)
    assert said.count("best at step") == 1
    log = launch.run(run, "--split", "test", log=tmp_path / "infer.log", processes=2, folder=folder, script=commands.ROOT / "infer.py")
    assert f"test: {report.scores_text(result(run)['test'])}\n" in log


def test_the_loss_that_is_logged_is_of_the_whole_batch(folder, ended):
    one, two = (report.read_lines(folder / run / "steps.jsonl") for run in ("one", "two-1"))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for line, other in zip(one, two, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "options"), [(1, ()), (1, ("--num_processes", "1")), (2, ("--multi_gpu", "--num_processes", "2"))])
def test_accelerate_launch(folder, tmp_path, ended, processes, options):
    words = ["--config", "table.toml", f"run.dir={tmp_path}/run", "train.micro_batch=12"]
    launcher = [*commands.ACCELERATE, "--mixed_precision", "bf16", "--cpu" if processes == 1 else "--main_process_port=0", *options]
    end = commands.run("train.py", *words, folder=folder, launcher=launcher)
    assert end.status == 0, end.text
    assert "the launcher says mixed_precision = bf16; the settings win" in end.out
    one, other = last_weights(folder / "one"), last_weights(tmp_path / "run")
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-4


@pytest.mark.slow
def test_torchrun_as_a_user_types_it(folder, tmp_path, ended):
    launcher = [*commands.TORCHRUN, "2"]
    end = commands.run("train.py", "--config", "table.toml", f"run.dir={tmp_path}/run", folder=folder, launcher=launcher)
    assert end.status == 0, end.text
    one, other = last_weights(folder / "one"), last_weights(tmp_path / "run")
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-4


@pytest.mark.slow
def test_a_compiled_model_trains_and_predicts(folder, ended):
    train, infer = commands.many([wine("compiled", "train.compile=true", "model.dropout=0.0"), ["infer.py", "compiled", "--split", "test"]], folder)
    assert train.status == 0, train.text
    assert infer.out == f"test: {report.scores_text(result(folder / 'compiled')['test'])}\n"
    one, other = last_weights(folder / "compiled"), last_weights(folder / "no_workers")
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-4


@pytest.fixture
def environment():
    """train() puts what launchers and Accelerate want into the environment: not into that of other tests."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def test_a_trial_writes_nothing_and_is_told_each_evaluation(tmp_path, monkeypatch, environment):
    from train import train

    monkeypatch.chdir(tmp_path)
    seen = []
    values = settings.parse([config.ROOT / "conf/digits.toml"], ["data.dataset=wine", *SHORT])
    found = train(values, on_eval=lambda step, scores: seen.append((step, scores["accuracy"])), trial=True)
    assert [step for step, _ in seen] == [4, 8, 12]
    assert found["best"]["accuracy"] == max(score for _, score in seen)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_was_loaded_for_evaluation_is_trained_with_dropout(tmp_path, monkeypatch, environment):
    """As transformers' from_pretrained returns it."""
    from models.mlp import Model
    from train import train

    made, forward, modes = Model.__init__, Model.forward, []

    def loaded(self, *words):
        made(self, *words)
        self.eval()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Model, "__init__", loaded)
    monkeypatch.setattr(Model, "forward", lambda self, batch: modes.append(all(part.training for part in self.modules())) or forward(self, batch))
    train(settings.parse([config.ROOT / "conf/digits.toml"], ["data.dataset=wine", *SHORT, "train.eval_every=12"]), trial=True)
    assert modes[:12] == [True] * 12 and not any(modes[12:])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pseudo-terminals")
def test_on_a_terminal_there_is_a_bar(folder, tmp_path):
    import fcntl
    import pty
    import struct
    import termios

    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execve(
            sys.executable,
            [sys.executable, str(commands.ROOT / "train.py"), "data.dataset=wine", "run.dir=bar", *SHORT],
            commands.environment(TERM="xterm"),
        )
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 25, 100, 0, 0))
    said = b""
    try:
        while piece := os.read(terminal, 65536):
            said += piece
    except OSError:  # how a pseudo-terminal ends
        pass
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, said.decode()
    assert "12/12" in said.decode()

"""A study: killed workers and parents, one reading of the data, two ranks that agree, failures, pictures, wrong input."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import optuna
import pandas as pd
import pytest
import tomli

import commands
import launch

TOML = """
[data]
name = "bundled"
dataset = "wine"
[model]
name = "mlp"
width = 8
depth = 1
[task]
best = "max accuracy"
[train]
epochs = 4
batch_size = 32
[boost]
rounds = 60
patience = 20
[tune]
trials = 6
[tune.space]
"optim.lr" = { low = 1e-4, high = 1e-1, log = true }
"model.width" = { low = 4, high = 16, step = 4 }
"""
DATA = """
import os
from data.bundled import *
from data import bundled

def noted(function):
    def called(config, kind="auto"):
        with open(os.environ["READS"], "a") as file:
            print(os.getpid(), file=file)
        return function(config, kind)

    return called

read, load = noted(bundled.read), noted(bundled.load)
"""
MODEL = """
import json, os
from models.mlp import Config
from models import mlp

class Model(mlp.Model):
    def __init__(self, config, info):
        super().__init__(config, info)
        with open(os.environ["READS"], "a") as file:
            print(json.dumps(["trial", config.width, config.dropout]), file=file)
        if os.environ.get("FAILS", "never") in (str(config.width), "always", f"rank{os.environ.get('RANK')}"):
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    def forward(self, batch):
        if self.training:
            with open(f"{os.environ['READS']}-rank{os.environ.get('RANK', '0')}", "a") as file:
                print(json.dumps([id(self), self.width, self.dropout_rate]), file=file)
        return super().forward(batch)
"""


@pytest.fixture(autouse=True)
def _nothing_runs_on():
    yield
    launch.end_all()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A copy of the repository with a data file and a model file more."""
    root = tmp_path_factory.mktemp("copy")
    for name in ("engine", "data", "models"):
        shutil.copytree(commands.ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*commands.ROOT.glob("*.py"), commands.ROOT / "pyproject.toml"]:
        shutil.copy(path, root)
    (root / "data" / "counted.py").write_text(DATA)
    (root / "models" / "counted.py").write_text(
        MODEL.replace("self.width, self.dropout_rate", "*self.drawn").replace(
            "super().__init__(config, info)", "super().__init__(config, info)\n        self.drawn = [config.width, config.dropout]"
        )
    )
    (root / "x.toml").write_text(TOML)
    return root


def tune(root, place, *words, log="tune", **how):
    """A supervisor starts its workers by its own command line, so it is a process as a user starts it."""
    place.parent.mkdir(parents=True, exist_ok=True)
    environment = {"READS": str(place.with_name("reads")), **how.pop("environment", {})}
    words = ["--config", root / "x.toml", f"run.dir={place}", *words]
    return launch.start(*words, script=root / "tune.py", folder=root, log=place.with_name(f"{log}.log"), cold=True, **how, **environment)


def trials_of(place):
    return pd.read_csv(place / "trials.csv", keep_default_na=False)


def study_of(place):
    backend = optuna.storages.journal.JournalFileBackend(str(place / "study.journal"))
    return optuna.load_study(study_name=place.name, storage=optuna.storages.JournalStorage(backend))


def states(place):
    """Of the wanted trials; none before there is a study."""
    try:
        return [(trial.state.name, trial.user_attrs["slot"]) for trial in study_of(place).get_trials(deepcopy=False) if "slot" in trial.user_attrs]
    except (ValueError, KeyError, IndexError, OSError):
        return []


def finished(place):
    return [slot for state, slot in states(place) if state in ("COMPLETE", "PRUNED")]


@pytest.mark.slow
def test_a_study_from_the_config_to_the_tuned_run(root, tmp_path):
    place = tmp_path / "study"
    words = ["tune.workers=2", "data.name=counted", "tune.trials=10"]
    text = tune(root, place, *words).succeed(300)
    assert re.search(r"best \S+  done 10/10  pruned \d+  failed 0  left 0:00:0\d", text)
    assert "look at the study: optuna-dashboard" in text
    table = trials_of(place)
    assert len(table) == 10
    assert set(table["state"]) <= {"COMPLETE", "PRUNED"}
    assert (table["optim.lr"][0], table["model.width"][0]) == (1e-3, 8)  # the numbers of the config
    # Read and prepared once by each worker, whichever trials it had.
    reads = Counter((tmp_path / "reads").read_text().split())
    assert set(reads.values()) == {1}
    assert len(reads) == len({trial.user_attrs["worker"] for trial in study_of(place).trials if "slot" in trial.user_attrs}) == 2
    for name in ("history", "importances", "slices", "parallel"):
        assert (place / f"{name}.png").stat().st_size > 5000
        page = (place / f"{name}.html").read_text()
        assert not re.search(r'<(script|link)[^>]+(src|href)="http', page)
    # The same command again finds nothing to do, and more trials are added to those.
    assert "done 10/10" in tune(root, place, *words, log="again").succeed(300)
    assert tune(root, place, *words[:2], "tune.trials=11", log="more").succeed(300)
    assert len(trials_of(place)) == 11
    # What was tuned, and nothing else.
    best = trials_of(place).sort_values("value", key=pd.to_numeric, kind="stable").iloc[-1]
    text = (place / "best.toml").read_text()
    tuned = study_of(place).best_params
    assert tomli.loads(text) == {"run": {"tuned": True}, "optim": {"lr": tuned["optim.lr"]}, "model": {"width": tuned["model.width"]}}
    commands.succeed("train.py", "--config", root / "x.toml", "--config", place / "best.toml", folder=tmp_path, root=root)
    [run] = (tmp_path / "runs").glob("*/ddp-tuned/*/result.json")
    assert json.loads(run.read_text())["best"]["accuracy"] == pytest.approx(float(best["value"]))


@pytest.mark.slow
def test_boosted_trials_are_pruned_over_rounds(root, tmp_path):
    place = tmp_path / "study"
    space = 'tune.space={"boost.params.learning_rate" = { low = 1e-3, high = 0.5, log = true }, "boost.params.num_leaves" = { low = 2, high = 40 }}'
    words = ["tune.target=boost", "tune.trials=14", "boost.params.learning_rate=0.3", "boost.patience=0", space, "task.best=min loss"]
    tune(root, place, *words, "boost.params.min_data_in_leaf=5").succeed(300)
    table = trials_of(place)
    pruned, complete = (table[table["state"] == state]["steps"] for state in ("PRUNED", "COMPLETE"))
    assert len(pruned)
    assert set(complete) == {3}  # 60 rounds, one look each 20
    assert pruned.max() < 3
    text = commands.succeed("boost.py", "--config", root / "x.toml", *words, "--config", place / "best.toml", folder=tmp_path, root=root)
    assert "boost-tuned" in text
    assert tomli.loads((place / "best.toml").read_text())["boost"]["params"]["min_data_in_leaf"] == 5  # a free table is replaced whole


@pytest.mark.slow
def test_failing_trials_have_their_reason_and_five_stop_the_study(root, tmp_path):
    space = 'tune.space={"model.width" = [4, 8, 16]}'
    some = tune(root, tmp_path / "some", space, "model.name=counted", environment={"FAILS": "16"}).succeed(300)
    table = trials_of(tmp_path / "some")
    assert (table["state"] != "FAIL").sum() == 6
    assert set(table[table["state"] == "FAIL"]["reason"]) <= {"out of memory: RuntimeError: CUDA out of memory. Tried to allocate 2 GiB"}
    assert f"failed {(table['state'] == 'FAIL').sum()}" in some
    all_ = tune(root, tmp_path / "all", "model.name=counted", environment={"FAILS": "always"}, log="all")
    assert all_.wait(300) == 2
    assert "error: 5 trials failed one after another, the last by: out of memory: RuntimeError: CUDA" in all_.text
    assert "Traceback" not in all_.text
    assert len(trials_of(tmp_path / "all")) == 5
    diverging = tune(root, tmp_path / "nan", "optim.lr=0.1", 'tune.space={"optim.lr" = { low = 1e18, high = 1e20 }}', "optim.name=SGD", log="nan")
    assert diverging.wait(300) == 2
    assert "the last by: Diverged: " in diverging.text


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_workers_and_keeps_what_is_there(root, tmp_path, number):
    place = tmp_path / "study"
    # A shell's background job, as tests may be, ignores SIGINT and hands that down.
    running = tune(root, place, "tune.workers=2", "tune.trials=100000", before=["env", "--default-signal=INT"])
    running.until(lambda: len(finished(place)) >= 3, 300)
    workers = launch.children(running.pid)
    running.kill(number)
    assert running.wait(300) == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert not any(map(launch.alive, workers))
    assert "finished trials are kept, the same command goes on" in running.text
    assert "Traceback" not in running.text
    assert (place / "best.toml").exists()
    done = len(finished(place))
    assert (trials_of(place)["state"] != "FAIL").sum() == done
    assert f"done {done}/{done}" in tune(root, place, f"tune.trials={done}", log="again").succeed(300)


@pytest.mark.slow
def test_a_signal_to_torchrun_keeps_what_is_there(root, tmp_path):
    place = tmp_path / "study"
    running = tune(root, place, "tune.trials=100000", processes=2)
    running.until(lambda: len(finished(place)) >= 3, 300)
    running.kill(signal.SIGTERM)
    assert running.wait(300) == 1
    assert (place / "best.toml").exists()
    assert (trials_of(place)["state"] != "FAIL").sum() == len(finished(place)) >= 3


@pytest.mark.slow
def test_grids_other_samplers_and_timeouts(root, tmp_path):
    grid = 'tune.sampler_options={search_space = {"model.width" = [4, 8, 12]}}'
    tune(
        root,
        tmp_path / "grid",
        'tune.space={"model.width" = [4, 8, 12]}',
        "tune.sampler=GridSampler",
        grid,
        "tune.trials=50",
        "tune.pruner=NopPruner",
    ).succeed(300)
    assert set(trials_of(tmp_path / "grid")["model.width"]) == {4, 8, 12}
    # The config has no number for this key, which a first trial could have.
    cells = 'tune.sampler_options={search_space = {"boost.params.num_leaves" = [4, 8, 12]}}'
    space = 'tune.space={"boost.params.num_leaves" = [4, 8, 12]}'
    words = ["tune.target=boost", "tune.sampler=GridSampler", "tune.pruner=NopPruner", "tune.trials=3"]
    tune(root, tmp_path / "free", space, cells, *words, log="free").succeed(300)
    assert set(trials_of(tmp_path / "free")["boost.params.num_leaves"]) == {4, 8, 12}
    other = tune(root, tmp_path / "other", space.replace("num_leaves", "max_depth"), cells, *words, log="other")
    assert other.wait(300) == 2
    assert "error: tune.sampler = 'GridSampler': cannot draw from tune.space: " in other.text
    assert "Traceback" not in other.text
    words = ["tune.sampler=RandomSampler", "tune.pruner=HyperbandPruner", "tune.timeout=1", "tune.trials=100000"]
    assert re.search("left 0:00:0[01]", tune(root, tmp_path / "late", *words, log="late").succeed(300))
    assert len(finished(tmp_path / "late")) < 1000


@pytest.mark.slow
def test_a_second_supervisor_joins_by_the_storage(root, tmp_path):
    """Two folders stand for two machines; the count is exact though both queue trials."""
    url = f"tune.storage=sqlite:///{tmp_path / 'shared.db'}"
    one, two = (tune(root, tmp_path / name / "study", url, "tune.trials=16", log=name) for name in ("a", "b"))
    one.succeed(300), two.succeed(300)
    study = optuna.load_study(study_name="study", storage=url.partition("=")[2])
    kept = [trial for trial in study.trials if trial.state.name in ("COMPLETE", "PRUNED")]
    assert sorted(trial.user_attrs["slot"] for trial in kept) == list(range(16))
    assert len({trial.user_attrs["worker"] for trial in kept}) == 2


@pytest.mark.slow
def test_ten_killed_workers_and_a_killed_parent(root, tmp_path):
    place, generator, wanted = tmp_path / "study", random.Random(0), 60
    words = ["tune.workers=2", f"tune.trials={wanted}", "train.epochs=8"]
    running = tune(root, place, *words)
    kills, parent, done, attempt = 0, 5, 0, itertools.count()
    while kills < 10:
        done = len(finished(place))
        running.until(lambda done=done: len(finished(place)) > done, 300)
        if kills == parent:
            parent, workers = None, launch.children(running.pid)
            running.kill()
            running.wait()
            assert launch.eventually(lambda workers=workers: not any(map(launch.alive, workers)), 60)
            running = tune(root, place, *words, log=f"again{next(attempt)}")
            continue
        workers = [pid for pid in launch.children(running.pid) if has_finished_one(place, pid)]
        if workers:
            os.kill(generator.choice(workers), signal.SIGKILL)
            kills += 1
    running.succeed(240)
    assert sorted(finished(place)) == list(range(wanted))
    assert (place / "best.toml").exists()
    table = trials_of(place)
    values = table[table["state"] != "FAIL"][["optim.lr", "model.width"]]
    assert len(values.drop_duplicates()) == wanted  # none twice
    assert set(table[table["state"] == "FAIL"]["reason"]) <= {"its worker died"}


def has_finished_one(place, pid):
    return any(
        trial.user_attrs.get("worker", "").split(" ")[1:2] == [str(pid)] and trial.state.name in ("COMPLETE", "PRUNED")
        for trial in study_of(place).get_trials(deepcopy=False)
    )


@pytest.mark.slow
def test_two_ranks_draw_and_prune_alike(root, tmp_path):
    place = tmp_path / "study"
    space = 'tune.space={"model.dropout" = { low = 0.0, high = 0.9 }, "model.width" = { low = 2, high = 64, log = true }}'
    words = [space, "model.name=counted", "tune.trials=14", "optim.lr=1e-2", "run.seed=3"]
    launch.start("--config", root / "x.toml", f"run.dir={place}", *words, script=root / "tune.py", folder=root, log=tmp_path / "log", processes=2,
                 cold=True, READS=str(tmp_path / "reads")).succeed(240)  # fmt: skip
    logged = []
    for rank in (0, 1):
        lines = [json.loads(line) for line in (tmp_path / f"reads-rank{rank}").read_text().splitlines()]
        # One model after another, each with its number of steps.
        logged.append([(drawn, len(list(steps))) for drawn, steps in itertools.groupby(lines, key=lambda line: line[1:])])
    table = trials_of(place)
    assert logged[0] == logged[1]
    assert [drawn for drawn, _ in logged[0]] == table[["model.width", "model.dropout"]].values.tolist()
    pruned = table["state"] == "PRUNED"
    assert pruned.any()
    steps = np.array([steps for _, steps in logged[0]])
    assert steps[pruned].max() < steps[~pruned].min()


@pytest.mark.slow
def test_a_rank_that_fails_alone_ends_all_and_the_study_goes_on(root, tmp_path):
    place = tmp_path / "study"
    words = ["--config", root / "x.toml", f"run.dir={place}", "model.name=counted", "tune.trials=2"]
    how = {"script": root / "tune.py", "folder": root, "processes": 2, "cold": True, "READS": str(tmp_path / "reads")}
    failing = launch.start(*words, log=tmp_path / "failing", FAILS="rank1", **how)
    assert failing.wait(180) != 0
    assert "a process failed alone in a trial: RuntimeError: CUDA out of memory" in failing.text
    launch.start(*words, log=tmp_path / "log", **how).succeed(180)
    assert sorted(finished(place)) == [0, 1]


@pytest.mark.slow
def test_a_strategy_gives_each_trial_its_own_process(root, tmp_path):
    tune(
        root, tmp_path / "study", 'tune.space={"strategy.name" = ["ddp", "zero2"], "optim.lr" = { low = 1e-3, high = 1e-2 }}', "tune.trials=3"
    ).succeed(200)
    workers = [trial.user_attrs["worker"] for trial in study_of(tmp_path / "study").trials if "slot" in trial.user_attrs]
    assert len(set(workers)) == len(workers) == 3
    assert set(trials_of(tmp_path / "study")["state"]) <= {"COMPLETE", "PRUNED"}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_each_trial_is_in_the_tracker_under_one_group(root, tmp_path, processes):
    place = tmp_path / "study"
    words = ['track.to=["wandb"]', "track.mode=offline", "tune.trials=2", "tune.pruner=NopPruner"]
    text = tune(root, place, *words, processes=processes).succeed(300)
    assert "is left" not in text
    assert len(list(place.glob("wandb/offline-run-*/run-*.wandb"))) == 1
    for number in ("0000", "0001"):
        [record] = (place / "trials" / number).glob("wandb/offline-run-*/run-*.wandb")
        assert b"accuracy" in record.read_bytes()
        assert place.name.encode() in record.read_bytes()


@pytest.mark.slow
def test_lightgbm_stepwise_over_folds(root, tmp_path):
    place = tmp_path / "study"
    words = ["tune.method=lightgbm-stepwise", "boost.folds=3", "boost.rounds=20", "task.best=min loss", "data.dataset=breast_cancer"]
    first = tune(root, place, *words)
    first.until(lambda: "done 12" in first.text, 200)
    first.kill()
    first.wait()
    tune(root, place, *words, log="again").succeed(250)
    table = trials_of(place)
    table = table[table["state"] == "COMPLETE"]  # the killed one is not
    assert len(table) >= 7 + 20 + 10 + 20 + 5
    text = commands.succeed("boost.py", "--config", root / "x.toml", *words[1:], "--config", place / "best.toml", folder=tmp_path, root=root)
    assert "boost-tuned" in text
    tuned = study_of(place).best_value
    plain = json.loads(subprocess.run([sys.executable, "-c", PLAIN], cwd=root, env=commands.environment(), capture_output=True, check=True).stdout)
    assert table["value"].astype(float).min() == tuned < plain


PLAIN = """
import json, lightgbm
from sklearn.datasets import load_breast_cancer
x, y = load_breast_cancer(return_X_y=True)
result = lightgbm.cv({"objective": "binary", "verbosity": -1, "learning_rate": 0.1}, lightgbm.Dataset(x, y), 20, nfold=3, seed=0)
print(json.dumps(result["valid binary_logloss-mean"][-1]))
"""

WRONG = {
    "empty": ("tune.space={}", "tune.space", "empty"),
    "unknown key": ('tune.space={"optim.lrr" = [1e-3]}', "optim.lrr", "did you mean optim.lr?"),
    "unknown section": ('tune.space={"optimm.lr" = [1e-3]}', "optimm.lr", "did you mean optim.lr?"),
    "what makes no other result": ('tune.space={"run.dir" = ["a"]}', "run.dir", "no such setting"),
    "entry of no table": ('tune.space={"optim.lr.x" = [1e-3]}', "optim.lr.x", "no such setting"),
    "empty choice": ('tune.space={"optim.lr" = []}', "optim.lr", "empty"),
    "neither range nor choice": ('tune.space={"optim.lr" = 3}', "tune.space", "list of choices"),
    "low above high": ('tune.space={"optim.lr" = { low = 1e-1, high = 1e-3 }}', "optim.lr", "low = 0.1 must be less than high = 0.001"),
    "empty range": ('tune.space={"optim.lr" = { low = 1e-3, high = 1e-3 }}', "optim.lr", "must be less than"),
    "log with 0": ('tune.space={"optim.lr" = { low = 0, high = 1, log = true }}', "optim.lr", "low = 0 must be above 0"),
    "log with step": ('tune.space={"model.width" = { low = 1, high = 9, log = true, step = 2 }}', "model.width", "drop one"),
    "log of another type": ('tune.space={"model.width" = { low = 1, high = 9, log = "yes" }}', "model.width", "true or false"),
    "no high": ('tune.space={"optim.lr" = { low = 1e-3 }}', "optim.lr", "needs two numbers"),
    "step of another type": ('tune.space={"model.width" = { low = 1, high = 9, step = "a" }}', "model.width", "step"),
    "step of 0": ('tune.space={"model.width" = { low = 1, high = 9, step = 0 }}', "model.width", "step = 0"),
    "unknown key of a range": ('tune.space={"optim.lr" = { low = 1e-3, hihg = 1 }}', "optim.lr", "did you mean high?"),
    "choice of another type": ('tune.space={"model.width" = [8, "wide"]}', "model.width", "wide", "integer"),
    "range out of bounds": ('tune.space={"model.dropout" = { low = 0.5, high = 1.5 }}', "model.dropout", "1.5"),
    "real range of whole numbers": ('tune.space={"model.width" = { low = 1.5, high = 3 }}', "model.width", "1.5"),
    "unknown sampler": ("tune.sampler=TPE", "tune.sampler", "TPESampler"),
    "unknown option of a sampler": ("tune.sampler_options={startup = 3}", "tune.sampler_options", "startup"),
    "unknown pruner": ("tune.pruner=Median", "tune.pruner", "MedianPruner"),
    "unknown target": ("tune.target=bost", "tune.target", "bost"),
    "best unsaid": ("task.best=auto", "task.best", "by name"),
    "no server": ("tune.storage=postgresql://u:secretword@127.0.0.1:1/x", "tune.storage", "cannot be reached", "***"),
    "unwritable file": ("tune.storage=sqlite:////nowhere/at/all.db", "tune.storage", "cannot be reached"),
    "no URL": ("tune.storage=somewhere", "tune.storage", "cannot be reached"),
}


@pytest.fixture(scope="module")
def wrong(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong")
    lines = [["tune.py", "--config", root / "x.toml", f"run.dir={folder / str(number)}", words[0]] for number, words in enumerate(WRONG.values())]
    return dict(zip(WRONG, commands.many(lines, folder, root), strict=True))


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_clear_line(wrong, name):
    ended, words = wrong[name], WRONG[name][1:]
    assert ended.status == 2, ended.text
    [line] = [line for line in ended.errors.splitlines() if line.startswith("error: ")]
    assert all(word in line for word in words), line
    assert "Traceback" not in ended.text
    assert "secretword" not in ended.text


@pytest.mark.slow
def test_a_study_of_another_space_and_data_that_cannot_be_read(root, tmp_path):
    place = tmp_path / "study"
    tune(root, place, "tune.trials=1").succeed(300)
    for word, said in {
        'tune.space={"optim.lr" = [1e-3, 1e-2]}': "tune.space",
        "train.batch_size=16": "train.batch_size",
        "tune.target=boost": "target",
    }.items():
        other = tune(root, place, word, log=said)
        assert other.wait(300) == 2
        [line] = other.text.splitlines()
        assert "is one of another config" in line
        assert said in line
        assert "set run.dir" in line
    gone = tune(root, tmp_path / "gone", "data.name=table", "data.train=gone.csv", "data.target=y", "data.dataset=wine", log="gone")
    assert gone.wait(300) == 2

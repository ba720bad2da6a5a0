"""Trackers: real offline wandb and real TensorBoard files; wandb's own client against servers on loopback."""

import gzip
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import commands
import launch
import servers
from engine import report, tracking
from engine.settings import parse

DIGITS = [commands.ROOT / "conf" / "digits.toml"]
TRACKED = ("train.log_every=2", 'track.to=["wandb"]')
LONG = ("train.steps=3000", "train.log_every=2", "train.eval_every=150", "train.save_every=100", "model.width=64", 'track.to=["wandb"]')
HEADER = 7
BLOCK = 32768


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch, tmp_path):
    for key in [key for key in os.environ if key.startswith("WANDB_") or key == "PLAINLOOP_ALERTS"]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # nobody's credentials
    (tmp_path / "home").mkdir()
    yield
    launch.end_all()


def records(path: Path) -> list[Any]:
    """Records of a file of wandb's: 7 bytes, then blocks of LevelDB's log."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, found, place, parts = path.read_bytes(), [], HEADER, b""
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        piece = data[place + 7 : place + 7 + length]
        assert len(piece) == length, f"{path} is torn at {place} of {len(data)}"
        parts = parts + piece if kind in (3, 4) else piece
        if kind in (1, 4):
            found.append(Record.FromString(parts))
        place += 7 + length
    return found


def offline(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/offline-run-*/*.wandb"))


def history(paths: list[Path]) -> list[dict[str, Any]]:
    rows = [record.history for path in paths for record in records(path) if record.HasField("history")]
    return [{item.nested_key[0] if item.nested_key else item.key: json.loads(item.value_json) for item in row.item} for row in rows]


def told(path: Path) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """wandb's record of a run: itself, its config and its last summary."""
    found = records(path)
    run = next(record.run for record in found if record.HasField("run"))
    summary = {}
    for record in found:
        summary |= {(item.nested_key[0] if item.nested_key else item.key): json.loads(item.value_json) for item in record.summary.update}
    return run, {item.key: json.loads(item.value_json) for item in run.config.update}, summary


def logged(run: Path) -> dict[int, dict[str, Any]]:
    """What the journals have, by step, under a tracker's names."""
    rows: dict[int, dict[str, Any]] = {}
    for name in ("steps.jsonl", "metrics.jsonl"):
        for line in report.read_lines(run / name):
            parts = {f"{part}/{key}": value for part in ("train", "valid") if part in line for key, value in line[part].items()}
            rows.setdefault(line["step"], {}).update(parts | {key: line[key] for key in ("loss", "lr", "gradient_norm") if key in line})
    return rows


def once(rows: list[dict[str, Any]], run: Path) -> None:
    """Each step of the journals stands in the rows once, in order, with its values."""
    wanted = logged(run)
    assert [row["_step"] for row in rows] == sorted(wanted)
    for row in rows:
        assert wanted[row["_step"]].items() <= row.items()


# Names


def test_one_rule_names_the_folder_and_the_tracker(monkeypatch):
    monkeypatch.setenv("PLAINLOOP_RUNS", "/runs")
    settings = parse(DIGITS, ["strategy.name=zero2", "run.tuned=true"])
    name = tracking.name(settings)
    assert name.startswith("zero2-tuned/width=256-depth=2-")
    assert "-fp32-batch=64-lr=0.001-" in name
    assert tracking.run_folder(settings) == Path("/runs/mlp-digits", name)
    projects = [tracking.project(settings, script) for script in ("train", "tune", "test", "predict", "boost")]
    assert projects == [*(f"mlp-digits-{script}" for script in ("train", "tune", "test", "predict")), "lightgbm-digits-boost"]
    assert tracking.project(settings, "test", of="boost") == "lightgbm-digits-test"
    assert tracking.run_folder(settings, "boost").parts[2:4] == ("lightgbm-digits", "boost-tuned")
    assert tracking.run_folder(settings, "tune").parts[2:4] == ("mlp-digits", "tune-tuned")
    assert tracking.project(parse(DIGITS, ["tune.target=boost"]), "tune") == "lightgbm-digits-tune"


def test_every_setting_that_changes_the_result_changes_the_name():
    changes = ["run.seed=1", "model.dropout=0.3", "optim.lr=1e-4", "optim.weight_decay=0.1", "train.precision=bf16", "data.split_seed=3"]
    names = {tracking.name(parse(DIGITS, [change])) for change in ["run.seed=0", *changes]}
    assert len(names) == 7
    free = ["train.epochs=99", "train.micro_batch=8", "track.tags=['a']", "train.log_every=3"]
    assert {tracking.name(parse(DIGITS, [change])) for change in free} == {tracking.name(parse(DIGITS, []))}


def test_long_and_strange_names_are_cut_and_stay_apart():
    labels = ["x" * 300, "x" * 299, "a/b", "a_b", "a b", "naïve", "..", "#?%:\\"]
    settings = [parse(DIGITS, [f"model.label={label}"]) for label in labels]
    folders = [tracking.run_folder(one) for one in settings]
    projects = [tracking.project(one, "train") for one in settings]
    assert len(set(folders)) == len(set(projects)) == len(labels)
    assert all(len(name) <= 128 and not set(name) & set("/\\#?%: ") for name in projects)
    assert all(len(tracking.name(one)) <= 128 and len(folder.parts) == len(folders[0].parts) for one, folder in zip(settings, folders, strict=True))


def test_a_long_name_loses_whole_words():
    params = [f"boost.params.parameter_number_{number}={number}2345678" for number in range(12)]
    settings = parse(DIGITS, params)
    name = tracking.name(settings, "boost")
    assert len(name) <= 128
    words = name.removeprefix("boost/").split("-")[:-1]
    assert all(word == "folds=0" or any(word == param.removeprefix("boost.params.") for param in params) for word in words)
    assert name != tracking.name(parse(DIGITS, [*params, "boost.params.parameter_number_11=999999999"]), "boost")


# One run from both sides


RUNS = [
    ("model.width=16",),
    ("model.width=16", "run.seed=1"),
    ("model.width=16", "strategy.name=zero2"),
    ("model.depth=1", "data.dataset=wine", "train.batch_size=16"),
    ("model.width=8", "data.dataset=diabetes", "train.batch_size=32"),
    ("model.width=16", "run.seed=2", "strategy.name=zero3-offload", "train.clip=1.0"),
]


@pytest.mark.slow
def test_from_the_record_to_the_checkpoint_and_back(tmp_path):
    for place, words in enumerate(RUNS):
        more = {"processes": 2} if place == 2 else {}
        launch.run(
            "--config", DIGITS[0], "train.epochs=2", *TRACKED, *words, log=tmp_path / f"{place}.log", PLAINLOOP_RUNS=str(tmp_path / "runs"), **more
        )
    files = sorted((tmp_path / "runs").glob("*/*/*/wandb/offline-run-*/*.wandb"))
    assert len(files) == len(RUNS)
    names = set()
    for path in files:
        run, config, summary = told(path)
        folder = Path(summary["run_folder"])
        assert folder == Path(config["run_folder"]) == path.parent.parent.parent
        assert (Path(summary["weights"]) / "model.safetensors").exists()
        assert list(folder.glob(f"checkpoints/*-step={summary['best_step']:08d}/manifest.json"))
        record = json.loads((folder / "tracker.json").read_text())  # and from the folder to the record
        assert (record["id"], record["project"], record["name"]) == (run.run_id, run.project, run.display_name)
        assert [str(path.parent.parent)] == record["places"]
        assert run.display_name == f"{folder.parent.name}/{folder.name}"
        assert f"{run.project}" == f"{folder.parent.parent.name}-train"
        once(history([path]), folder)
        result = json.loads((folder / "result.json").read_text())
        assert {key: value for key, value in summary.items() if key.startswith("test/")} == {f"test/{key}": v for key, v in result["test"].items()}
        assert config["micro"] * config["processes"] * config["accumulation"] == config["train.batch_size"]
        assert {"commit", "dirty", "command", "versions.torch", "versions.plainloop", "hardware.host", "parameters", "optim.lr"} <= config.keys()
        rows = history([path])
        assert {"loss", "lr", "gradient_norm", "samples_per_second", "step_seconds", "memory_mb"} <= rows[0].keys()
        assert {"curves", "predictions"} <= rows[-1].keys()
        assert len(list(path.parent.glob("files/media/images/*.png"))) == 2
        names.add((run.project, run.display_name, run.run_id))
    assert len({name for _, name, _ in names}) == len({run_id for *_, run_id in names}) == len(RUNS)


def test_a_boosted_run_has_a_row_a_round_and_its_features(tmp_path):
    run = tmp_path / "run"
    words = ["boost.folds=2", "boost.rounds=25", "boost.patience=0", "boost.params.num_leaves=4", "data.dataset=wine", *TRACKED, f"run.dir={run}"]
    commands.succeed("boost.py", "--config", DIGITS[0], *words, folder=tmp_path)
    (path,) = offline(run)
    rows = history([path])
    once(rows, run)
    assert [(row["fold"], row["round"]) for row in rows] == [(fold, round_) for fold in range(2) for round_ in range(1, 26)]
    assert all("valid/multi_logloss" in row for row in rows)
    assert [row["round"] for row in rows if "train/multi_logloss" in row] == [1, 20, 1, 20]
    assert {"curves", "confusion", "importance", "features"} <= rows[-1].keys()
    (table,) = path.parent.glob("files/media/table/features*.json")
    columns, *features = (json.loads(table.read_text())[key] for key in ("columns", "data"))
    assert columns == ["feature", "gain", "split", "shap"] and len(features[0]) == 13
    _, config, summary = told(path)
    assert summary["weights"] == summary["run_folder"] == str(run) and config["boost.params.num_leaves"] == 4


def test_a_test_is_recorded_beside_its_run(tmp_path):
    run = tmp_path / "run"
    launch.run("--config", DIGITS[0], "train.epochs=2", *TRACKED, "model.width=16", f"run.dir={run}", log=tmp_path / "train.log")
    trained = json.loads((run / "tracker.json").read_text())
    said = commands.succeed("infer.py", run, "--split", "test", folder=tmp_path)
    record = json.loads((run / "test" / "tracker.json").read_text())
    assert (record["project"], record["name"]) == (trained["project"].replace("-train", "-test"), trained["name"])
    _, config, summary = told(*offline(run / "test"))
    assert summary["run_folder"] == config["run_folder"] == str(run) and summary["weights"] == str(run / "best")
    assert f"accuracy {summary['test/accuracy']:.4g}" in said
    assert json.loads((run / "tracker.json").read_text()) == trained
    words = [sys.executable, "-m", "engine.trackers", tmp_path / "nothing"]
    ended = subprocess.run(words, cwd=commands.ROOT, env=commands.environment(), capture_output=True, text=True)
    assert ended.returncode == 2 and "has no tracker.json" in ended.stderr and not (tmp_path / "nothing").exists()


@pytest.mark.slow
def test_history_has_each_step_once_after_kills_and_syncs(tmp_path):
    run = tmp_path / "run"
    words = ("--config", DIGITS[0], *launch.TINY, *LONG, f"run.dir={run}", 'track.to=["wandb", "tensorboard"]')
    torn = 0
    for part, number in enumerate((signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, None)):
        running = launch.start(*words, log=tmp_path / f"{part}.log")
        if number:
            running.until(lambda part=part: len(offline(run)) > part and offline(run)[part].stat().st_size > 40_000)
            running.kill(number)
            assert running.wait() in (-number, 143)
            try:
                history(offline(run))
            except AssertionError:
                torn += 1
        else:
            running.succeed()
    files = offline(run)
    assert len(files) == 4
    assert len({told(path)[0].run_id for path in files}) == 1
    once(history(files), run)
    assert "resumed" in (tmp_path / "3.log").read_text()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(2, 3001, 2))
    assert set(events.Tags()["images"]) == {"curves", "confusion"}
    server = servers.Wandb()
    synced = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", *(path.parent for path in files)],
        cwd=tmp_path, env=commands.environment(WANDB_BASE_URL=server.url, WANDB_API_KEY=servers.KEY), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert synced.returncode == 0, synced.stdout + synced.stderr
    assert "incomplete" not in synced.stdout + synced.stderr
    (remote,) = server.runs.values()
    assert [row["_step"] for row in remote["history"]] == sorted(logged(run))
    print(f"{torn} of 3 files were torn")


def test_a_torn_file_is_made_whole(tmp_path):
    run = tmp_path / "run"
    launch.run("--config", DIGITS[0], *launch.TINY, *TRACKED, f"run.dir={run}", log=tmp_path / "log")
    (path,) = offline(run)
    steps = [row["_step"] for row in history([path])]
    data = path.read_bytes()
    os.truncate(path, data.index(b"gradient_norm", len(data) // 2) + 5)  # within a record, wherever the others end
    with pytest.raises(AssertionError, match="torn"):
        history([path])
    said = subprocess.run(
        [sys.executable, "-m", "engine.trackers", run], cwd=commands.ROOT, env=commands.environment(), capture_output=True, text=True
    )
    assert said.stdout == f"wandb sync {path.parent}\n", said.stderr
    kept = [row["_step"] for row in history([path])]
    assert kept == steps[: len(kept)]


@pytest.mark.slow
def test_an_online_run_that_was_killed_goes_on(tmp_path):
    server, run = servers.Wandb(), tmp_path / "run"
    words = ("--config", DIGITS[0], *launch.TINY, *LONG, "train.patience=0", "train.log_every=5", f"run.dir={run}")
    online = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": servers.KEY, "WANDB_PROJECT": "elsewhere"}
    # wandb's client sends each 15 s, so this run must be one that no computer ends by then.
    running = launch.start(*words, "train.steps=1000000", log=tmp_path / "first.log", **online)
    running.until(lambda: any(len(remote["history"]) > 20 for remote in server.runs.values()))
    running.kill()
    running.wait()
    (remote,) = server.runs.values()
    sent, last = remote["history"][-1]["_step"], max(logged(run))
    assert sent <= last
    text = launch.run(*words, f"train.steps={last + 200}", log=tmp_path / "second.log", **online)
    assert "warning" not in text
    assert "resumed" in text
    (remote,) = server.runs.values()
    once(remote["history"], run)
    assert remote["history"][-1]["_step"] == last + 200
    assert remote["project"] == "elsewhere"
    assert json.loads((run / "tracker.json").read_text())["url"].startswith(server.url)


def test_a_run_that_was_killed_while_its_tracker_took_the_end_tells_it_again(tmp_path):
    server, run = servers.Wandb(), tmp_path / "run"
    words = ("--config", DIGITS[0], *launch.TINY, *TRACKED, f"run.dir={run}")
    online = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": servers.KEY}
    running = launch.start(*words, log=tmp_path / "first.log", **online)
    running.until("wandb http")
    server.silent = True
    running.until(lambda: (run / "report.html").exists())
    running.kill()
    running.wait()
    server.silent, result = False, (run / "result.json").read_bytes()
    (remote,) = server.runs.values()
    assert remote["history"] == []
    text = launch.run(*words, log=tmp_path / "second.log", **online)
    assert "finished at step 24" in text
    assert "warning" not in text
    once(remote["history"], run)
    assert {"curves", "confusion", "predictions"} <= remote["history"][-1].keys()
    assert (run / "result.json").read_bytes() == result
    text = launch.run(*words, log=tmp_path / "third.log", **online)
    assert "finished at step 24" in text
    assert "wandb" not in text  # it knows all


def test_a_slow_server_misses_nothing_in_silence(tmp_path):
    server, run = servers.Wandb(), tmp_path / "run"
    words = ("--config", DIGITS[0], *launch.TINY, *TRACKED, f"run.dir={run}")
    online = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": servers.KEY}
    text = launch.run(*words, log=tmp_path / "log", WANDB_FINISH_TIMEOUT="0.01", **online)
    (folder,) = run.glob("wandb/run-*")
    assert text.count("warning") == 1
    assert f"server has not taken all of this run; later: wandb sync --include-online {folder}" in text
    (remote,) = server.runs.values()
    assert remote["history"] == []
    command = [sys.executable, "-m", "wandb", "sync", "--include-online", folder]
    subprocess.run(command, cwd=tmp_path, env=commands.environment(**online), capture_output=True, check=True, timeout=60)
    assert [row["_step"] for row in remote["history"]] == sorted(logged(run))


OTHERS = """
import sys
from pathlib import Path
from engine import tracking
from engine.settings import parse

if __name__ == "__main__":
    settings = parse([Path("conf/digits.toml")], ['track.to=["wandb"]'])
    with tracking.Tracker(settings, Path(sys.argv[1]), "tune") as study:
        study.start()
        with tracking.Tracker(settings, Path(sys.argv[2]), "tune", called="0", group="study") as trial:
            trial.start()
            trial.log({"step": 1, "valid": {"loss": 2.0}})
        study.log({"step": 1, "value": 2.0})
"""


def test_a_trial_that_missed_the_server_leaves_its_study_its_tracker(tmp_path):
    """Under torchrun both are in one process."""
    server, folders = servers.Wandb(), [tmp_path / "study", tmp_path / "trial"]
    for folder in folders:
        folder.mkdir()
    online = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": servers.KEY, "WANDB_FINISH_TIMEOUT": "0.01"}
    command = [sys.executable, "-c", OTHERS, *folders]
    ended = subprocess.run(command, cwd=commands.ROOT, env=commands.environment(**online), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    for folder in folders:
        (record,) = folder.glob("wandb/run-*")
        assert f"later: wandb sync --include-online {record}" in ended.stderr
    assert ended.stderr.count("\n") == 2, ended.stderr


# What fails, hangs or asks


def test_a_server_that_never_answers_holds_up_nothing(tmp_path):
    run = tmp_path / "run"
    words = ("--config", DIGITS[0], *launch.TINY, *TRACKED, f"run.dir={run}")
    variables = {"WANDB_BASE_URL": servers.Silent().url, "WANDB_API_KEY": servers.KEY, "WANDB_INIT_TIMEOUT": "6"}
    running = launch.start(*words, log=tmp_path / "log", **variables)
    running.until(lambda: (run / "report.html").exists(), timeout=60)
    end = time.monotonic()
    assert running.wait() == 0, running.text
    waited = time.monotonic() - end
    print(f"the exit waited {waited:.1f} s")
    assert waited < tracking.PATIENCE + 5
    assert running.text.count("warning: wandb goes on offline") == 1
    once(history(offline(run)), run)


@pytest.mark.slow
def test_a_server_that_falls_silent_delays_the_exit_by_no_more_than_is_stated(tmp_path):
    server, run = servers.Wandb(), tmp_path / "run"
    words = ("--config", DIGITS[0], *launch.TINY, *TRACKED, "train.steps=2000", "train.eval_every=500", f"run.dir={run}")
    running = launch.start(*words, log=tmp_path / "log", WANDB_BASE_URL=server.url, WANDB_API_KEY=servers.KEY, cold=True)
    running.until("wandb http")
    server.silent = True
    running.until(lambda: (run / "report.html").exists())
    end = time.monotonic()
    assert running.wait() == 0, running.text
    waited = time.monotonic() - end
    print(f"the exit waited {waited:.1f} s")
    assert waited < tracking.PATIENCE + 8
    assert f"did not answer within {tracking.PATIENCE} s" in running.text
    assert "Traceback" not in running.text


def test_a_tracker_that_fails_says_so_once(tmp_path):
    run = tmp_path / "run"
    words = ("--config", DIGITS[0], *launch.TINY, f"run.dir={run}", 'track.to=["mlflow", "wandb"]')
    (tmp_path / "file").touch()
    said = launch.run(*words, log=tmp_path / "log", WANDB_DIR=str(tmp_path / "mine"), WANDB_NAME="my name", WANDB_TAGS="a,b")
    assert said.count("warning") == said.count("warning: mlflow is left, training goes on") == 1
    assert "pip install mlflow" in said
    (path,) = offline(tmp_path / "mine")  # wandb's variables are honoured, and the folder still knows where
    assert (told(path)[0].display_name, list(told(path)[0].tags)) == ("my name", ["a", "b"])
    assert json.loads((run / "tracker.json").read_text())["places"] == [str(path.parent.parent)]


def test_disabled_is_disabled(tmp_path):
    for place, (variables, words) in enumerate([({"WANDB_MODE": "disabled"}, ()), ({}, ("track.mode=disabled",))]):
        run = tmp_path / str(place)
        said = launch.run("--config", DIGITS[0], *launch.TINY, *TRACKED, *words, f"run.dir={run}", log=tmp_path / f"{place}.log", **variables)
        assert "warning" not in said
        assert not offline(run)


def test_without_credentials_nobody_is_asked(tmp_path):
    """On a terminal, where wandb would ask for a key."""
    ours, theirs = pty.openpty()
    command = [
        sys.executable,
        commands.ROOT / "train.py",
        "--config",
        DIGITS[0],
        *launch.TINY,
        *TRACKED,
        "track.mode=online",
        f"run.dir={tmp_path}/run",
    ]
    process = subprocess.Popen(command, cwd=commands.ROOT, env=commands.environment(), stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    said = b""
    try:
        while part := os.read(ours, 65536):
            said += part
    except OSError:  # the other end is closed
        pass
    assert process.wait(60) == 0, said.decode()
    assert b"wandb offline" in said
    assert b"API key" not in said


def test_an_unknown_tracker_is_a_mistake(tmp_path):
    (ended,) = commands.many([["train.py", "--config", DIGITS[0], 'track.to=["wandbb"]']], tmp_path)
    assert ended.status == 2
    assert ended.errors.startswith("error: track.to = 'wandbb': must be 'wandb', 'tensorboard'")


# Alerts and secrets


@pytest.mark.parametrize("url", ["postgresql://me:pa/ss@host/db", "postgresql://host/db?user=me&password=pass", "https://:pass@host"])
def test_passwords_in_addresses_are_hidden(url):
    assert "pa" not in tracking.without_secrets(url).replace("password", "")


def test_alerts_tell_how_a_run_ended_and_secrets_appear_nowhere(tmp_path):
    alerts, run = servers.Alerts(), tmp_path / "run"
    secrets = ["slackTokenThatIsSecret", servers.KEY, "databasePassword", "hubTokenThatIsSecret"]
    variables = {"PLAINLOOP_ALERTS": alerts.address(secrets[0]), "WANDB_API_KEY": servers.KEY, "HF_TOKEN": secrets[3], "WANDB_MODE": "offline"}
    storage = f"tune.storage=postgresql://me:{secrets[2]}@localhost/study"
    words = ["--config", DIGITS[0], *launch.TINY, *TRACKED, storage, f"track.tags=['{secrets[3]}']"]
    launch.run(*words, f"run.dir={run}", log=tmp_path / "finished.log", cold=True, **variables)
    launch.start(*words, f"run.dir={tmp_path}/diverged", "optim.lr=1e30", log=tmp_path / "diverged.log", **variables).wait()
    stopped = launch.start(*words, f"run.dir={tmp_path}/stopped", "train.steps=100000", log=tmp_path / "stopped.log", **variables)
    stopped.until(lambda: (tmp_path / "stopped" / "metrics.jsonl").exists())
    stopped.kill(signal.SIGTERM)
    assert stopped.wait() == 143
    assert [alert["title"] for alert in alerts.posted] == [f"{end}: mlp-digits" for end in ("finished", "diverged", "preempted")]
    assert "test: loss" in alerts.posted[0]["message"]
    assert f"run folder {run}" in alerts.posted[0]["message"]
    assert "the loss is not finite" in alerts.posted[1]["message"]
    assert all(alert["path"] == f"/{secrets[0]}" for alert in alerts.posted)
    assert [record.alert.title for record in records(offline(run)[0]) if record.HasField("alert")] == ["finished: mlp-digits"]
    files = [Path(folder, name) for folder, _, names in os.walk(tmp_path) for name in names]
    files = [path for path in files if path.is_file()]  # wandb's sockets come and go
    assert run / "config.toml" in files
    for path in files:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        assert [secret for secret in secrets if secret.encode() in data] == [], path
    assert "postgresql://***@localhost/study" in (run / "config.toml").read_text()


def test_the_last_lines_of_an_error_are_told(tmp_path, monkeypatch):
    alerts = servers.Alerts()
    monkeypatch.setenv("PLAINLOOP_ALERTS", alerts.address("here"))
    settings = parse(DIGITS, [])
    with pytest.raises(ZeroDivisionError), tracking.Tracker(settings, tmp_path):
        _ = 1 / 0
    with pytest.raises(KeyboardInterrupt), tracking.Tracker(settings, tmp_path):
        raise KeyboardInterrupt  # whoever did that knows
    with pytest.raises(ZeroDivisionError), tracking.Tracker(parse(DIGITS, ["track.alerts=false"]), tmp_path):
        _ = 1 / 0
    assert [alert["title"] for alert in alerts.posted] == ["failed: mlp-digits"]
    assert "ZeroDivisionError: division by zero" in alerts.posted[0]["message"]
    assert "1 / 0" in alerts.posted[0]["message"]


def test_alerts_name_the_package_they_need(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "apprise", None)
    monkeypatch.setenv("PLAINLOOP_ALERTS", "json://localhost/x")
    with pytest.raises(ZeroDivisionError), tracking.Tracker(parse(DIGITS, []), tmp_path):
        _ = 1 / 0
    assert capsys.readouterr().err == "warning: PLAINLOOP_ALERTS needs the package apprise: pip install apprise\n"


def test_alerts_to_a_server_that_never_answers_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PLAINLOOP_ALERTS", servers.Silent().url.replace("http", "json"))
    begun = time.monotonic()
    with pytest.raises(ZeroDivisionError), tracking.Tracker(parse(DIGITS, []), tmp_path):
        _ = 1 / 0
    assert time.monotonic() - begun < tracking.PATIENCE + 2
    assert "warning" in capsys.readouterr().err


# Profile


def test_profile_leaves_a_trace_and_a_table(tmp_path):
    run = tmp_path / "run"
    launch.run("--config", DIGITS[0], *launch.TINY, "train.profile=true", f"run.dir={run}", log=tmp_path / "log")
    trace = json.loads(gzip.decompress((run / "trace.json.gz").read_bytes()))
    assert {event["name"] for event in trace["traceEvents"] if event["name"].startswith("ProfilerStep")} == {
        f"ProfilerStep#{n}" for n in range(5, 10)
    }
    assert "aten::addmm" in (run / "profile.txt").read_text()
    assert not (run / "tensorboard").exists()

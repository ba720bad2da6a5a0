"""Names, one rule for run folders and trackers; what a tracker is told of a run, by a thread that may wait or fail; alerts.

Training never waits for a tracker nor fails with one, and its end waits PATIENCE seconds at most.
"""

import contextlib
import hashlib
import json
import os
import platform
import queue
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
import traceback
import uuid
from importlib import metadata
from pathlib import Path
from typing import Any

import tomli
import torch

from engine import process, report
from engine.config import ROOT, UserError
from engine.settings import Settings

RESULT_SECTIONS = {
    "train": ("run", "task", "data", "model", "train", "optim"),
    "boost": ("run", "task", "data", "boost"),
    "tune": ("run", "task", "data", "model", "train", "optim", "boost", "tune"),
}
LONGEST = 93  # characters of each part of a name, before its letters; wandb takes 128 in all
PATIENCE = 30  # seconds that the end of a run waits for trackers and alerts
GATHER = 1  # second that lines for a tracker are gathered: told in one go, each takes a third of the processor time
PACKAGES = ["torch", "accelerate", "deepspeed", "transformers", "torchmetrics", "wandb", "optuna", "lightgbm", "xgboost", "numpy", "pandas"]
SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD", "PLAINLOOP_ALERTS")


def result_values(values: dict[str, Any], settings: Settings, script: str) -> dict[str, Any]:
    """Those settings that make another experiment, as {"section.key": value}."""
    kept = {}
    for section in RESULT_SECTIONS[script]:
        free = type(getattr(settings, section)).unchanged_result
        kept |= {f"{section}.{key}": value for key, value in values.get(section, {}).items() if key not in free and value is not None}
    return without_secrets(kept)


def boosts(settings: Settings, script: str) -> bool:
    return script == "boost" or (script == "tune" and settings.tune.target == "boost")


def subject(settings: Settings, script: str) -> str:
    return f"{settings.boost.library if boosts(settings, script) else settings.model.label}-{settings.data.label}"


def project(settings: Settings, script: str, of: str = "train") -> str:
    """<model>-<data>-<script>; `of` is the script whose run a test or a prediction takes."""
    return settings.track.project or plain(f"{subject(settings, of if script in ('test', 'predict') else script)}-{script}")


def name(settings: Settings, script: str = "train") -> str:
    """<strategy>[-tuned]/<detail>: a run in its tracker, and the end of its folder's path. Tests and predictions are called like their run."""
    return f"{settings.strategy.name if script == 'train' else script}{'-tuned' if settings.run.tuned else ''}/{detail(settings, script)}"


def run_folder(settings: Settings, script: str = "train") -> Path:
    """run.dir, else <runs>/<model>-<data>/<name>."""
    derived = Path(os.environ.get("PLAINLOOP_RUNS") or "runs", plain(subject(settings, script)), name(settings, script))
    return Path(settings.run.dir or derived)


def detail(settings: Settings, script: str = "train") -> str:
    """<hyper-parameters>-<letters of all that makes another experiment>. Where they are too many the longest give way; none is cut in two."""
    if boosts(settings, script):
        named = "+".join(settings.boost.features)
        features = named if len(named) <= 40 else len(settings.boost.features)
        chosen, last = {"folds": settings.boost.folds, "features": features, **settings.boost.params}, []
    else:
        chosen = {key: value for key, value in settings.model.model_dump().items() if key not in ("name", "label", "pretrained")}
        last = [settings.train.precision, f"batch={settings.train.batch_size}", f"lr={settings.optim.lr:g}"]
    words = [f"{key}={value}" for key, value in chosen.items() if isinstance(value, int | str) and value != ""] + last
    while len("-".join(words)) > LONGEST:
        words.remove(max(words, key=len))
    return plain("-".join(words), json.dumps(result_values(settings.values(), settings, script), sort_keys=True, default=str))


def plain(text: str, whole: str = "") -> str:
    """What file systems and trackers take, and six letters of the whole where that is more: no two names become one."""
    kept = re.sub(r"[^\w.=+,-]", "_", text, flags=re.ASCII)[:LONGEST]
    return kept if kept == (whole or text) else f"{kept}-{hashlib.sha256((whole or text).encode()).hexdigest()[:6]}"


def without_secrets(value: Any) -> Any:
    """Settings or text without passwords in URLs and without the values of secret environment variables."""
    if isinstance(value, dict):
        return {key: without_secrets(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_secrets(inner) for inner in value]
    if not isinstance(value, str):
        return value
    for secret in (word for key in os.environ if key.endswith(SECRET) for word in re.split(r"[\s,]+", os.environ[key]) if len(word) >= 8):
        value = value.replace(secret, "***")
    value = re.sub(r"(?i)([?&](?:password|passwd|pwd|token|key|secret)=)[^&\s]+", r"\1***", value)
    return re.sub(r"://[^/\s:@]*:[^\s@]+@", "://***@", value)


def origin() -> dict[str, Any]:
    """Where a run comes from: commit, command line, versions, hardware."""

    def git(*words: str) -> str:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=5).stdout.strip()
        return ""

    versions = {"plainloop": tomli.loads((ROOT / "pyproject.toml").read_text())["project"]["version"], "python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    gpus = [torch.cuda.get_device_name(place) for place in range(torch.cuda.device_count())]
    memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    hardware = {"host": socket.gethostname(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "memory_gb": memory, "gpus": gpus}
    commit = {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    return commit | {"command": without_secrets(shlex.join(sys.argv)), "versions": versions, "hardware": hardware}


def read_record(run: Path) -> dict[str, Any]:
    """tracker.json: what a run is called in its trackers, and where it comes from. {} before the first start."""
    try:
        return json.loads((run / "tracker.json").read_text()) if (run / "tracker.json").exists() else {}
    except ValueError:
        raise UserError(f"{run}/tracker.json: it is torn; delete it, and the run begins a new record in its trackers") from None


def ended(run: Path) -> bool:
    """Whether its result stands and its trackers were told. What a kill left out between the two, the next start makes up for."""
    return (run / "result.json").exists() and read_record(run).get("ended", True)


class Tracker:
    """A run in the trackers of track.to, as a context that tells how it ended. Without a folder, and beyond rank 0, it does nothing."""

    def __init__(self, settings: Settings, run: Path | None, script: str = "train", of: str = "", called: str = "", group: str = ""):
        """`run` is the folder that keeps its record. A test or a prediction is one `of` the script that trained; a name in place of the
        usual one, and a group, are for trials."""
        self.settings, self.script, self.of, self.called, self.group = settings, script, of or script, called, group
        self.run = run if process.rank() == 0 else None
        self.record: dict[str, Any] = {}
        self.trackers: list[Any] = []
        self.tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.ending = threading.Event()
        self.news = ""

    def start(self, step: int = 0, **more: Any) -> None:
        """Begin, or go on at a step. `more` joins the settings in the trackers' config: how the batch is cut, how many parameters."""
        if self.run is None:
            return
        before, track = read_record(self.run), self.settings.track
        label = before.get("id") or os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:12]
        called = {"id": label, "project": project(self.settings, self.script, self.of), "name": self.called or name(self.settings, self.of)}
        called |= {"group": self.group, "run_folder": str(self.run.resolve()), "places": before.get("places", []), "ended": False}
        self.record = called | origin() | more
        self.write_record()
        if track.to and track.mode != "disabled":
            from engine.trackers import Accelerated, Wandb

            self.trackers = [Wandb(self) if kind == "wandb" else Accelerated(self, kind) for kind in track.to]
            self.thread.start()
            self._tell("open", step)

    def write_record(self) -> None:
        process.write_text(self.run / "tracker.json", json.dumps(self.record, indent=1))

    def log(self, line: dict[str, Any]) -> None:
        """A line of steps.jsonl or metrics.jsonl."""
        self._tell("log", line)

    def conclude(self, step: int, result: dict[str, Any], pictures: list[Path], table: report.Table) -> None:
        """The result at the last step: scores, pictures, and a table."""
        self.news = "\n".join(
            f"{part}: {report.scores_text(scores)}" for part, scores in result.items() if part in ("best", "train", "valid", "test", "input")
        )
        self._tell("conclude", step, result, pictures, table)

    def _tell(self, method: str, *arguments: Any) -> None:
        if self.trackers:
            self.tasks.put((method, arguments))

    def _work(self) -> None:
        while task := self.tasks.get():
            for tracker in list(self.trackers):
                try:
                    getattr(tracker, task[0], ignore)(*task[1])
                except Exception as error:
                    if tracker in self.trackers:
                        self.trackers.remove(tracker)
                        warn(f"{tracker.kind} is left, training goes on, the run folder has all", error)
                        getattr(tracker, "leave", ignore)()
            if self.tasks.empty():
                self.ending.wait(GATHER)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self.run is None:
            return
        endings = {None: "finished", process.Stopped: "preempted", process.Diverged: "diverged", KeyboardInterrupt: ""}
        ending = endings.get(kind, "failed")
        said = "".join(traceback.format_exception(error)).strip().splitlines()[-5:] if ending == "failed" else [str(error or self.news)]
        title, text = f"{ending}: {subject(self.settings, self.of)}", without_secrets("\n".join([*said, f"run folder {self.run}"]))
        threads = [self.thread, threading.Thread(target=alert, args=(title, text), daemon=True)]
        if self.settings.track.alerts and ending and (error or self.record):
            threads[1].start()
            self._tell("alert", title, text, error is None)
        self._tell("finish", 0 if error is None else 1)
        self.tasks.put(None)
        self.ending.set()
        deadline = time.monotonic() + PATIENCE
        for thread in threads:
            if thread.ident:
                thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in threads):
            process.warn(f"trackers or alerts did not answer within {PATIENCE} s and are left; the run folder has all")
            left, self.trackers = self.trackers, []
            for tracker in left:
                getattr(tracker, "leave", ignore)()
        if self.record and error is None:
            self.record["ended"] = True
            self.write_record()


def ignore(*_: Any) -> None:
    """What not every tracker does: alerts, and leaving a process behind."""


def warn(text: str, error: Exception) -> None:
    process.warn(without_secrets(f"{text}: {type(error).__name__}: {error}").splitlines()[0])


def alert(title: str, text: str) -> None:
    """Tell the addresses in PLAINLOOP_ALERTS: apprise's URLs of Slack, Discord, mail and many more."""
    addresses = os.environ.get("PLAINLOOP_ALERTS", "").strip()
    try:
        if addresses:
            import apprise

            sender = apprise.Apprise()
            if not sender.add(addresses) or not sender.notify(title=title, body=text):
                process.warn("not every address in PLAINLOOP_ALERTS took the alert")
    except ImportError:
        process.warn("PLAINLOOP_ALERTS needs the package apprise: pip install apprise")

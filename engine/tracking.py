"""Names, one rule for run folders and trackers; and the trackers themselves: wandb, and what Accelerate knows beside it.

A thread talks to them: training never waits for a tracker nor fails with one, and its end waits PATIENCE seconds at most.
steps.jsonl and metrics.jsonl are the truth: what a tracker lost in a kill is told again, what it has is not.

    python -m engine.tracking RUN …      after a kill without a resumption: make the offline records fit for `wandb sync`
"""

import contextlib
import hashlib
import json
import os
import platform
import queue
import re
import shlex
import shutil
import socket
import struct
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
from engine.config import ROOT
from engine.settings import Settings

RESULT_SECTIONS = {
    "train": ("run", "task", "data", "model", "train", "optim"),
    "boost": ("run", "task", "data", "boost"),
    "tune": ("run", "task", "data", "model", "train", "optim", "boost", "tune"),
}
LONGEST = 100  # characters of each part of a name; wandb takes 128 in all
PATIENCE = 30  # seconds that the end of a run waits for trackers and alerts
PACKAGES = "torch accelerate deepspeed transformers torchmetrics wandb optuna lightgbm xgboost numpy pandas scikit-learn".split()
WANDB = {"silent": True, "init_timeout": 15, "finish_timeout": 20, "x_disable_viewer": True, "x_transaction_log_flush_interval": 1}
OFFLINE = ("offline", "dryrun", "disabled")
"""settings that its environment variables overrule; the last keeps what a kill loses small"""


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
    """<hyper-parameters>-<six letters of all that makes another experiment>. Where they are too many, the longest give way; none is cut in two."""
    if boosts(settings, script):
        chosen, last = {"folds": settings.boost.folds, "features": len(settings.boost.features) or "", **settings.boost.params}, []
    else:
        chosen = {key: value for key, value in settings.model.model_dump().items() if key not in ("name", "label", "pretrained")}
        last = [settings.train.precision, f"batch={settings.train.batch_size}", f"lr={settings.optim.lr:g}"]
    words = [f"{key}={value}" for key, value in chosen.items() if isinstance(value, int | str) and value != ""] + last
    while len("-".join(words)) > LONGEST - 7:
        words.remove(max(words, key=len))
    values = result_values(settings.values(), settings, script)
    return plain("-".join(words), letters(json.dumps(values, sort_keys=True, default=str)))


def plain(text: str, ending: str = "") -> str:
    """What file systems and trackers take. Where something is replaced or cut, letters of the whole follow: no two names become one."""
    kept = re.sub(r"[^\w.=+,-]", "_", text, flags=re.ASCII)[: LONGEST - 7]
    ending = ending or ("" if kept == text else letters(text))
    return f"{kept}-{ending}" if ending else kept


def letters(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def without_secrets(value: Any) -> Any:
    """Settings or text without passwords in URLs and without the values of secret environment variables."""
    if isinstance(value, dict):
        return {key: without_secrets(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_secrets(inner) for inner in value]
    if not isinstance(value, str):
        return value
    for key in (key for key in os.environ if key.endswith(("KEY", "TOKEN", "SECRET", "PASSWORD", "PLAINLOOP_ALERTS"))):
        for secret in re.split(r"[\s,]+", os.environ[key]):
            value = value.replace(secret, "***") if len(secret) >= 8 else value
    return re.sub(r"://[^/\s:@]*:[^/\s@]+@", "://***@", value)


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


def flat(values: dict[str, Any], sign: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= {f"{key}{sign}{inner}": deep for inner, deep in flat(value, sign).items()} if isinstance(value, dict) else {key: value}
    return found


def row(line: dict[str, Any]) -> dict[str, Any]:
    """A journal's line as a tracker takes it: "valid/accuracy", "samples_per_second"."""
    return {key.removeprefix("clock/"): value for key, value in flat(line, "/").items() if key != "step"}


def read_record(run: Path) -> dict[str, Any]:
    """tracker.json: what a run is called in its trackers, and where it comes from. {} before the first start."""
    return json.loads((run / "tracker.json").read_text()) if (run / "tracker.json").exists() else {}


class Tracker:
    """A run in the trackers of track.to, as a context that tells how it ended. Without a run folder, and beyond rank 0, it does nothing."""

    def __init__(self, settings: Settings, run: Path | None, script: str = "train"):
        self.settings, self.run, self.script = settings, run, script
        self.record: dict[str, Any] = {}
        self.kinds: list[Any] = []
        self.tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.news = ""

    def start(self, step: int = 0, **more: Any) -> None:
        """Begin, or go on at a step. `more` joins the settings in the trackers' config: how the batch is cut, how many parameters."""
        if self.run is None or process.rank() > 0:
            return
        before = read_record(self.run)
        label = before.get("id") or os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:12]
        called = {"id": label, "project": project(self.settings, self.script), "name": name(self.settings, self.script)}
        self.record = called | {"run_folder": str(self.run.resolve()), "places": before.get("places", []), **origin(), **more}
        self.write_record()
        if self.settings.track.mode == "disabled" or not self.settings.track.to:
            return
        self.kinds = [Wandb(self) if kind == "wandb" else Accelerated(self, kind) for kind in self.settings.track.to]
        self.thread.start()
        self._tell("open")
        for line in report.history(self.run, step):
            self.log(line)

    def write_record(self) -> None:
        aside = self.run / ".tracker.json.tmp"
        aside.write_text(json.dumps(self.record, indent=1))
        os.replace(aside, self.run / "tracker.json")

    def log(self, line: dict[str, Any]) -> None:
        """A line of steps.jsonl or metrics.jsonl."""
        self._tell("log", line)

    def conclude(self, step: int, result: dict[str, Any], pictures: list[Path], table: tuple[list[str], list[list[Any]]]) -> None:
        """The result at the last step: scores, pictures, and a table of columns' names and rows."""
        self.news = "\n".join(f"{part}: {report.scores_text(scores)}" for part, scores in result.items() if part in ("best", "test", "valid"))
        self._tell("conclude", step, result, pictures, table)

    def _tell(self, method: str, *arguments: Any) -> None:
        if self.kinds:
            self.tasks.put((method, arguments))

    def _work(self) -> None:
        while task := self.tasks.get():
            for kind in list(self.kinds):
                try:
                    getattr(kind, task[0])(*task[1])
                except Exception as error:
                    self.kinds.remove(kind)
                    warn(f"{kind.kind} is left, training goes on, the run folder has all", error)
                    if kind.kind == "wandb":
                        end_service()

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self.run is None or process.rank() > 0:
            return
        endings = {type(None): "finished", process.Stopped: "preempted", process.Diverged: "diverged", KeyboardInterrupt: ""}
        ending = endings.get(type(error), "failed")
        said = "".join(traceback.format_exception(error)).strip().splitlines()[-5:] if ending == "failed" else [str(error or self.news)]
        title, text = f"{ending}: {subject(self.settings, self.script)}", without_secrets("\n".join([*said, f"run folder {self.run}"]))
        crier = threading.Thread(target=cry, args=(title, text), daemon=True)
        if self.settings.track.alerts and ending and (error or self.record):
            crier.start()
            self._tell("alert", title, text, error is None)
        self._tell("finish", 0 if error is None else 1)
        self.tasks.put(None)
        deadline = time.monotonic() + PATIENCE
        for thread in (self.thread, crier):
            if thread.ident:
                thread.join(max(0.0, deadline - time.monotonic()))
        if self.thread.is_alive() or crier.is_alive():
            process.say(f"warning: trackers or alerts did not answer within {PATIENCE} s and are left; the run folder has all")
            end_service()


def warn(text: str, error: Exception) -> None:
    process.say(without_secrets(f"warning: {text}: {type(error).__name__}: {error}").splitlines()[0])


def cry(title: str, text: str) -> None:
    """Send an alert to the addresses in PLAINLOOP_ALERTS: apprise's URLs of Slack, Discord, mail and many more."""
    addresses = os.environ.get("PLAINLOOP_ALERTS", "").strip()
    if not addresses:
        return
    try:
        import apprise

        sender = apprise.Apprise()
        if not sender.add(addresses) or not sender.notify(title=title, body=text):
            process.say("warning: not every address in PLAINLOOP_ALERTS took the alert")
    except ImportError:
        process.say("warning: PLAINLOOP_ALERTS needs the package apprise: pip install apprise")


class Wandb:
    """Online where there are credentials, else offline; what fails online goes on offline. It never asks."""

    kind = "wandb"

    def __init__(self, tracker: Tracker):
        self.tracker = tracker
        self.seen: set[int] = set()

    def open(self) -> None:
        # wandb's reports to its makers would wait 30 s at exit for a server that does not answer.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        track, record = self.tracker.settings.track, self.tracker.record
        mode = wandb.setup(self.settings()).settings.mode if track.mode == "auto" else track.mode
        for path in record_files(self.tracker.run):
            steps = mend(path)
            # What an online run's own file has, the server may lack: starting_step says.
            self.seen |= steps if path.parent.name.startswith("offline") else set()
        try:
            self.run = self.init(mode)
        except Exception as error:
            if mode in OFFLINE:
                raise
            warn("wandb goes on offline", error)
            end_service()
            self.run = self.init("offline")
        self.seen |= set(range(self.run.starting_step))
        self.run.summary["run_folder"] = record["run_folder"]
        folder = Path(self.run.settings.sync_dir)
        record |= {"places": sorted({*record["places"], str(folder.parent)}), "url": self.run.url or ""}
        self.tracker.write_record()
        process.say(f"wandb {self.run.url}" if self.run.url else f"wandb is offline; later: wandb sync {folder.parent}/*-{record['id']}")

    def settings(self) -> Any:
        import wandb

        return wandb.Settings(**{key: value for key, value in WANDB.items() if f"WANDB_{key.upper().removeprefix('X')}" not in os.environ})

    def init(self, mode: str) -> Any:
        import wandb

        track, record = self.tracker.settings.track, self.tracker.record
        wandb.setup(self.settings())
        if mode not in OFFLINE and not wandb.login(prompt=False, verify=False):
            mode = "offline"
        words, sys.argv = sys.argv, without_secrets(sys.argv)  # wandb writes the command line down
        try:
            return wandb.init(
                id=record["id"], resume="allow", mode=mode, dir=os.environ.get("WANDB_DIR") or self.tracker.run,
                project=track.project or os.environ.get("WANDB_PROJECT") or record["project"], entity=track.entity or None,
                name=os.environ.get("WANDB_NAME") or record["name"], tags=track.tags or None,
                config=flat(without_secrets(self.tracker.settings.values()) | record, "."),
            )  # fmt: skip
        finally:
            sys.argv = words

    def log(self, line: dict[str, Any]) -> None:
        if line["step"] not in self.seen:  # what has one step becomes one row, written when the next step comes
            self.run.log(row(line), step=line["step"])

    def conclude(self, step: int, result: dict[str, Any], pictures: list[Path], table: tuple[list[str], list[list[Any]]]) -> None:
        import wandb

        weights = (self.tracker.run / "best").resolve()
        self.run.summary.update(row(result) | {"best_step": result.get("step"), "weights": str(weights)})
        try:
            media = {picture.stem: wandb.Image(str(picture)) for picture in pictures} | {"predictions": wandb.Table(columns=table[0], data=table[1])}
            self.run.summary.update(media) if step in self.seen else self.run.log(media, step=step)
        except Exception as error:  # a table asks the server before it goes
            warn("wandb has no pictures of this run", error)

    def alert(self, title: str, text: str, good: bool) -> None:
        self.run.alert(title=title, text=text, level="INFO" if good else "ERROR")

    def finish(self, code: int) -> None:
        self.run.finish(exit_code=code)


def record_files(run: Path) -> list[Path]:
    """wandb's own files of a run, one of each process that worked on it."""
    record = read_record(run)
    folders = {*map(Path, record["places"]), run.resolve() / "wandb"}
    return sorted(path for folder in folders for path in folder.glob(f"*run-*-{record['id']}/run-{record['id']}.wandb"))


def mend(path: Path) -> set[int]:
    """Steps in a file of wandb's: 7 bytes, then LevelDB's log of Records. Cuts off a record that a kill has torn; `wandb sync` refuses it."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole, parts, steps = path.read_bytes(), 7, 7, b"", set()
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        place += 7 + length
        if kind not in (1, 2, 3, 4) or place > len(data):
            break
        parts = (parts if kind in (3, 4) else b"") + data[place - length : place]
        if kind in (1, 4):  # a whole record, or the last part of one
            record, whole = Record.FromString(parts), place
            steps |= {record.history.step.num} if record.HasField("history") else set()
    os.truncate(path, whole)
    return steps


def end_service() -> None:
    """Kill wandb's own process, which keeps this one from ending for as long as its server does not answer."""
    import psutil
    import wandb

    for child in psutil.Process().children():
        if child.name() == "wandb-core":
            child.kill()
    ending = threading.Thread(target=lambda: contextlib.suppress(Exception)(wandb.teardown)(), daemon=True)
    ending.start()
    ending.join(5)


class Accelerated:
    """Another of Accelerate's trackers. None says what it has of a run, so a resumed one is told again from its start, as a new record."""

    def __init__(self, tracker: Tracker, kind: str):
        self.tracker, self.kind = tracker, kind

    def open(self) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

        if self.kind not in map(str, get_available_trackers()):
            raise ImportError(f"it needs its package: pip install {self.kind}")
        maker, run, record = LOGGER_TYPE_TO_CLASS[self.kind], self.tracker.run, self.tracker.record
        shutil.rmtree(run / self.kind, ignore_errors=True)
        self.inner = maker(self.kind, run) if maker.requires_logging_directory else maker(record["project"])
        self.inner.start()
        config = flat(without_secrets(self.tracker.settings.values()) | record, ".")
        self.inner.store_init_configuration({key: value if isinstance(value, int | float | str) else str(value) for key, value in config.items()})

    def log(self, line: dict[str, Any]) -> None:
        self.inner.log(row(line), step=line["step"])

    def conclude(self, step: int, result: dict[str, Any], pictures: list[Path], table: Any) -> None:
        self.inner.log({key: value for key, value in row(result).items() if isinstance(value, int | float)}, step=step)
        if self.kind == "tensorboard":
            from matplotlib.image import imread

            for picture in pictures:
                self.inner.tracker.add_image(picture.stem, imread(picture), step, dataformats="HWC")

    def alert(self, *_: Any) -> None:
        """It has none; PLAINLOOP_ALERTS does."""

    def finish(self, code: int) -> None:
        self.inner.finish()


if __name__ == "__main__":
    for folder in map(Path, sys.argv[1:]):
        with process.lock(folder):
            for file in record_files(folder):
                mend(file)
                print(f"wandb sync {file.parent}")

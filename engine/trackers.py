"""wandb, and the trackers that Accelerate knows. They may wait and fail: engine.tracking calls them in a thread of their own.

steps.jsonl and metrics.jsonl are the truth: what a tracker lost in a kill is told again, what it has is not.

    python -m engine.trackers RUN …      make the offline records of killed runs whole, which `wandb sync` asks for
"""

import contextlib
import os
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import psutil

from engine import process, report
from engine.config import UserError
from engine.tracking import Tracker, read_record, warn, without_secrets

WANDB = {
    "silent": True, "init_timeout": 15, "finish_timeout": 20, "finish_timeout_raises": True, "x_disable_viewer": True,
    "x_transaction_log_flush_interval": 1,
}  # fmt: skip
"""what its environment variables overrule; the last keeps small what a kill loses"""
OFFLINE = ("offline", "dryrun", "disabled")


def flat(values: dict[str, Any], sign: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= {f"{key}{sign}{inner}": deep for inner, deep in flat(value, sign).items()} if isinstance(value, dict) else {key: value}
    return found


def row(line: dict[str, Any]) -> dict[str, Any]:
    """A journal's line as a tracker takes it: "valid/accuracy", "samples_per_second"."""
    return {key.removeprefix("clock/"): value for key, value in flat(line, "/").items() if key != "step" and value is not None}


def config(tracker: Tracker) -> dict[str, Any]:
    return flat(without_secrets(tracker.settings.values()) | tracker.record, ".")


class Wandb:
    """Online where there are credentials, else offline; what fails online goes on offline. It never asks."""

    kind = "wandb"

    def __init__(self, tracker: Tracker):
        self.tracker = tracker
        self.seen: set[int] = set()

    def open(self, step: int) -> None:
        # Its reports to its makers would wait 30 s at exit for a server that does not answer. On one core its own process takes
        # a third less of their time, and it leaves the others alone.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("GOMAXPROCS", "1")
        import wandb

        for path in record_files(self.tracker.run):
            steps = mend(path)
            # What an online run's file has, the server may lack: starting_step tells.
            self.seen |= steps if path.parent.name.startswith("offline") else set()
        self.settings = wandb.Settings(**{key: value for key, value in WANDB.items() if f"WANDB_{key.upper().removeprefix('X')}" not in os.environ})
        mode = self.tracker.settings.track.mode
        mode = wandb.setup(self.settings).settings.mode if mode == "auto" else mode
        try:
            self.run = self.init(mode)
        except Exception as error:
            if mode in OFFLINE:
                raise
            warn("wandb goes on offline", error)
            self.leave()
            self.run = self.init("offline")
        for child in processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                child.nice(10)  # training goes first
        self.seen |= set(range(self.run.starting_step))
        record, folder = self.tracker.record, Path(self.run.settings.sync_dir).parent
        self.run.summary["run_folder"] = record["run_folder"]
        record |= {"places": sorted({*record["places"], str(folder)}), "url": self.run.url or ""}
        self.tracker.write_record()
        process.say(f"wandb {self.run.url or f'offline; later: wandb sync {folder}/offline-*-{self.run.id}'}")
        for line in report.history(self.tracker.run, step):
            self.log(line)

    def init(self, mode: str) -> Any:
        import wandb

        track, record = self.tracker.settings.track, self.tracker.record
        wandb.setup(self.settings)
        if mode not in OFFLINE and not wandb.login(prompt=False, verify=False):
            mode = "offline"
        words, sys.argv = sys.argv, without_secrets(sys.argv)  # wandb writes the command line down
        try:
            return wandb.init(
                id=record["id"], resume="allow", mode=mode, dir=os.environ.get("WANDB_DIR") or self.tracker.run, config=config(self.tracker),
                project=track.project or os.environ.get("WANDB_PROJECT") or record["project"], entity=track.entity or None,
                name=os.environ.get("WANDB_NAME") or record["name"], tags=without_secrets(track.tags) or None, group=record["group"] or None,
                reinit="create_new",  # under torchrun a study has a run beside those of its trials
            )  # fmt: skip
        finally:
            sys.argv = words

    def log(self, line: dict[str, Any]) -> None:
        if line["step"] not in self.seen:  # all of one step becomes one row, written when the next step comes
            self.run.log(row(line), step=line["step"])

    def conclude(self, step: int, result: dict[str, Any], pictures: list[Path], table: report.Table) -> None:
        import wandb

        run = Path(self.tracker.record["run_folder"])
        weights = str(run / "best" if (run / "best").exists() else run)
        self.run.summary.update(row(result) | {"best_step": result.get("step"), "weights": weights})
        try:
            media = {picture.stem: wandb.Image(str(picture)) for picture in pictures} | {table[0]: wandb.Table(columns=table[1], data=table[2])}
            self.run.summary.update(media) if step in self.seen else self.run.log(media, step=step)
        except Exception as error:  # a table asks the server before it goes
            warn("wandb has no pictures of this run", error)

    def alert(self, title: str, text: str, good: bool) -> None:
        self.run.alert(title=title, text=text, level="INFO" if good else "ERROR")

    def finish(self, code: int) -> None:
        try:
            self.run.finish(exit_code=code)
        except TimeoutError:  # not raised further: other runs of this process may go on
            process.warn(f"wandb's server has not taken all of this run; later: {upload(Path(self.run.settings.sync_dir))}")

    def leave(self) -> None:
        """Kill wandb's own process: it would keep this one from ending for as long as its server does not answer."""
        import wandb

        for child in processes():
            child.kill()
        with contextlib.suppress(Exception, SystemExit):  # it leaves with the status of what was killed
            wandb.teardown()


def processes() -> list[psutil.Process]:
    """wandb's own, which write and send what it is told."""
    return [child for child in psutil.Process().children() if child.name() == "wandb-core"]


def upload(folder: Path) -> str:
    """The command; it passes over what was online at its start unless it is told."""
    return f"wandb sync {'' if folder.name.startswith('offline') else '--include-online '}{folder}"


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


class Accelerated:
    """Another of Accelerate's trackers. None says what it has of a run, so a resumed one is told all again, as a new record."""

    def __init__(self, tracker: Tracker, kind: str):
        self.tracker, self.kind = tracker, kind

    def open(self, step: int) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

        if self.kind not in map(str, get_available_trackers()):
            raise ImportError(f"it needs its package: pip install {self.kind}")
        maker, run = LOGGER_TYPE_TO_CLASS[self.kind], self.tracker.run
        shutil.rmtree(run / self.kind, ignore_errors=True)
        self.inner = maker(self.kind, run) if maker.requires_logging_directory else maker(self.tracker.record["project"])
        self.inner.start()
        values = config(self.tracker).items()
        self.inner.store_init_configuration({key: value if isinstance(value, int | float | str) else str(value) for key, value in values})
        for line in report.history(run, step):
            self.log(line)

    def log(self, line: dict[str, Any]) -> None:
        self.inner.log({key: value for key, value in row(line).items() if isinstance(value, int | float)}, step=line["step"])

    def conclude(self, step: int, result: dict[str, Any], pictures: list[Path], table: Any) -> None:
        self.log(result | {"step": step})
        if self.kind == "tensorboard":
            from matplotlib.image import imread

            for picture in pictures:
                self.inner.tracker.add_image(picture.stem, imread(picture), step, dataformats="HWC")

    def finish(self, code: int) -> None:
        self.inner.finish()


def main() -> None:
    for folder in map(Path, sys.argv[1:]):
        if not read_record(folder):
            raise UserError(f"{folder}: has no tracker.json; name a run folder that was tracked")
        with process.lock(folder):
            for file in record_files(folder):
                mend(file)
                print(upload(file.parent))


if __name__ == "__main__":
    sys.exit(process.exit_status(main))

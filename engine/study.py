"""A study of Optuna: its direction, sampler, pruner and storage, and its one owner."""

import fcntl
import inspect
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from engine import process, tracking
from engine.config import UserError, suggestion
from engine.settings import Settings


def rule(settings: Settings) -> tuple[str, str]:
    """("max" or "min", the score that decides). A study must know it before the first trial."""
    if settings.task.best == "auto":
        raise UserError('task.best = "auto": a search needs it by name, such as "max accuracy" or "min rmse"')
    direction, score = settings.task.best.split()
    return direction, score


def lock(settings: Settings, place: Path) -> Any:
    """One supervisor a folder. Machines that share a storage by its URL may share the folder too."""
    return process.lock(place / f".{socket.gethostname()}" if settings.tune.storage else place)


def by_name(module: Any, key: str, name: str, options: dict[str, Any]) -> Any:
    """An object of a class of optuna.samplers or optuna.pruners. Raises UserError."""
    known = [word for word in module.__all__ if not word.startswith("Base")]
    if name not in known:
        raise UserError(f"tune.{key} = {name!r}: no such class of {module.__name__}{suggestion(name, known)}")
    try:
        return getattr(module, name)(**options)
    except (TypeError, ValueError, ImportError) as error:
        raise UserError(f"tune.{key}_options = {options}: {name} refuses them: {error}") from None


class JournalLock:
    """The kernel's own lock, which ends with its owner. It also cuts off a line that a kill tore: the next would be glued to it."""

    def __init__(self, path: Path):
        self.path = path

    def acquire(self) -> bool:
        self.file = open(self.path, "r+b")
        fcntl.flock(self.file, fcntl.LOCK_EX)
        size = self.file.seek(0, os.SEEK_END)
        if size and (self.file.seek(-1, os.SEEK_END), self.file.read())[1] != b"\n":
            self.file.seek(0)
            self.file.truncate(self.file.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        self.file.close()


def storage(folder: Path, url: str) -> Any:
    """The journal in the study's folder, or any storage of Optuna by its URL. Raises UserError where it cannot be reached."""
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    if not url:
        path = folder / "study.journal"
        backend = optuna.storages.journal.JournalFileBackend(str(path), lock_obj=JournalLock(path))
        return optuna.storages.JournalStorage(backend)
    for last in (False, True):
        try:
            return optuna.storages.get_storage(url)
        except (SQLAlchemyError, ValueError, ImportError, OSError) as error:
            if last:
                said = tracking.without_secrets(str(error).splitlines()[0])
                raise UserError(f"tune.storage = {tracking.without_secrets(url)!r}: cannot be reached: {said}") from None
            time.sleep(1)  # another machine may have made the same tables at this moment


def open_study(settings: Settings, folder: Path, seed: int) -> Any:
    """The study of these settings, begun or gone on with. Raises UserError for a study of others."""
    import optuna

    tune = settings.tune
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    options = dict(tune.sampler_options)
    if "seed" in inspect.signature(getattr(optuna.samplers, tune.sampler, dict).__init__).parameters:
        options.setdefault("seed", seed % 2**32)
    study = optuna.create_study(
        study_name=folder.name,
        sampler=by_name(optuna.samplers, "sampler", tune.sampler, options),
        pruner=by_name(optuna.pruners, "pruner", tune.pruner, tune.pruner_options),
        storage=storage(folder, tune.storage),
        direction={"max": "maximize", "min": "minimize"}[rule(settings)[0]],
        load_if_exists=True,
    )
    ours = json.loads(json.dumps(tracking.result_values(settings.values(), settings, "tune")))
    theirs = study.user_attrs.get("settings", ours)
    for key in sorted(ours.keys() | theirs):
        if ours.get(key) != theirs.get(key):
            what = f"{key} = {theirs.get(key)!r} there, {ours.get(key)!r} here"
            raise UserError(f"{folder}: the study {folder.name} is one of another config ({what}); set run.dir to another folder")
    if "settings" not in study.user_attrs:
        study.set_user_attr("settings", ours)
    return study

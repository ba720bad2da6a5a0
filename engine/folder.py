"""The run folder: one owner, one set of settings, and what was learned from the data beside them."""

import dataclasses
import json
import os
import types
from pathlib import Path
from typing import IO, Any

import tomli

from engine import checkpoint, process, tracking
from engine.config import UserError, dump_toml
from engine.settings import Settings


def claim(run: Path, settings: Settings, script: str = "train") -> IO[str]:
    """Lock a run folder, check that it is this experiment's, write its settings. The lock lasts as long as the file.

    Raises UserError where another process owns the folder, where it holds a run of other settings, or must hold none.
    """
    # What could not be continued is refused before the lock: the owner's settings are the clearer answer.
    refuse_others(run, settings, script)
    owner = process.lock(run)
    try:
        source = settings.run.resume
        if source not in ("auto", "never") and not checkpoint.folders(run):
            checkpoint.adopt(Path(source), run)
        write_text(run / "config.toml", dump_toml(tracking.without_secrets(settings.values())))
    except OSError as error:
        raise UserError(f"{run}: the run folder cannot be written: {error.strerror}; set run.dir to another") from None
    return owner


def refuse_others(run: Path, settings: Settings, script: str) -> None:
    # A mistake found after the settings were written leaves nothing to protect.
    begun = checkpoint.folders(run) or (run / "result.json").exists() or any((run / "folds").glob("*"))
    if not begun or not (run / "config.toml").exists():
        return
    if settings.run.resume == "never":
        raise UserError(f'{run}: it holds a run already; run.resume = "never" refuses it: set run.dir to another folder')
    try:
        before = tracking.result_values(tomli.loads((run / "config.toml").read_text()), settings, script)
    except (tomli.TOMLDecodeError, UnicodeDecodeError):
        raise UserError(f"{run}/config.toml: it is torn; move the folder aside or set run.dir to another") from None
    now = tracking.result_values(settings.values(), settings, script)
    changed = [f"{key} = {before.get(key)!r} there, {now.get(key)!r} here" for key in sorted(before.keys() | now) if before.get(key) != now.get(key)]
    if changed:
        raise UserError(f"{run}: it holds a run of another config ({'; '.join(changed)}); set run.dir to another folder")


def write_text(path: Path, text: str) -> None:
    """Whole or not at all, also through a kill or a full disk."""
    aside = path.with_name(f".{path.name}.tmp")
    with open(aside, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def write_inputs(run: Path, info: Any, preprocessing: dict[str, Any]) -> None:
    """What was learned from the training data, in JSON: with it and the weights a new file can be predicted."""
    write_text(run / "info.json", json.dumps(dataclasses.asdict(info), indent=1))
    write_text(run / "preprocessing.json", json.dumps(preprocessing))


def read_info(folder: Path) -> Any:
    """The data's Info as an object with the same attributes."""
    return types.SimpleNamespace(**json.loads((folder / "info.json").read_text()))


def read_result(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text())


def read_preprocessing(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "preprocessing.json").read_text())

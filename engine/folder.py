"""The run folder: one owner, one set of settings, and what was learned from the data beside them."""

import dataclasses
import json
import math
import types
from pathlib import Path
from typing import IO, Any

import tomli

from engine import checkpoint, process, tracking
from engine.config import UserError, dump_toml
from engine.process import write_text
from engine.settings import Settings


def claim(run: Path, settings: Settings, script: str = "train") -> IO[str]:
    """Lock a run folder, check that it is this experiment's, write its settings. The lock lasts as long as the file.

    Raises UserError where another process owns the folder, where it holds a run of other settings, or must hold none.
    """
    # What could not be continued is refused before the lock: the owner's settings are the clearer answer.
    refuse_others(run, settings, script)
    owner = process.lock(run)
    refuse_others(run, settings, script)  # again: who owned it until a moment ago may have begun a run of other settings
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
    begun = checkpoint.folders(run) or (run / "result.json").exists() or any((run / "folds").glob("fold*.json"))
    if not begun or not (run / "config.toml").exists():
        return
    if settings.run.resume == "never":
        raise UserError(f'{run}: it holds a run already; run.resume = "never" refuses it: set run.dir to another folder')
    try:
        values = tomli.loads((run / "config.toml").read_text())
        before = tracking.result_values(values, settings, script)
    except (tomli.TOMLDecodeError, UnicodeDecodeError):
        raise UserError(f"{run}/config.toml: it is torn; move the folder aside or set run.dir to another") from None
    now = tracking.result_values(settings.values(), settings, script)
    changed = [f"{key} = {before.get(key)!r} there, {now.get(key)!r} here" for key in sorted(before.keys() | now) if before.get(key) != now.get(key)]
    if changed:
        raise UserError(f"{run}: it holds a run of another config ({'; '.join(changed)}); set run.dir to another folder")
    source = settings.run.resume
    # The same command again goes on; so does a path to the folder itself.
    if source not in ("auto", values["run"].get("resume")) and Path(source).resolve() != run.resolve():
        raise UserError(f"{run}: it holds a run already; run.resume = {source!r} begins another from there: set run.dir to a new folder")


def write_inputs(run: Path, info: Any, preprocessing: dict[str, Any], files: dict[str, str] = {}) -> None:
    """What was learned from the training data, in JSON: with it and the weights a new file can be predicted.

    `files`, texts by name (a tokenizer, a transformers config), stand in files/ and come into best/ under these names.
    Raises UserError where a run that goes on had learned something else.
    """
    if checkpoint.folders(run) and (run / "preprocessing.json").exists():
        require_learned(run, info, preprocessing)
    write_text(run / "info.json", json.dumps(dataclasses.asdict(info), indent=1))
    write_text(run / "preprocessing.json", json.dumps(preprocessing))
    for name, text in files.items():
        (run / "files").mkdir(exist_ok=True)
        write_text(run / "files" / name, text)


def read_info(folder: Path) -> Any:
    """The data's Info as an object with the same attributes, and the folder it stands in."""
    return types.SimpleNamespace(**read_json(folder / "info.json") | {"folder": str(folder)})


def read_result(run: Path) -> dict[str, Any]:
    return read_json(run / "result.json")


def read_preprocessing(folder: Path) -> dict[str, Any]:
    return read_json(folder / "preprocessing.json") | {"folder": str(folder)}


def require_learned(folder: Path, info: Any, preprocessing: dict[str, Any]) -> None:
    """Raises UserError where the data teach today what the run did not learn: its model would take their codes and scales for its own."""
    learned = ("labels", "target_mean")
    before = {name: value for name, value in read_json(folder / "info.json").items() if name in learned} | read_json(folder / "preprocessing.json")
    now = json.loads(json.dumps({name: getattr(info, name) for name in learned} | preprocessing))
    if changed := [name for name in now if not alike(before.get(name), now[name])]:
        raise not_learned(folder, changed)


def not_learned(folder: Path, changed: list[str]) -> UserError:
    what = f"data.train is not what this run learned from (other {', '.join(changed)})"
    return UserError(f"{folder}: {what}; bring the file back; new rows are predicted by --input, or trained on in another run.dir")


def alike(one: Any, other: Any) -> bool:
    """Of what JSON holds; numbers may differ by what another processor rounds."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-12)
    return one == other


def read_json(path: Path) -> dict[str, Any]:
    """Raises UserError for a file that is not there or torn."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "torn"
        raise UserError(f"{path}: {reason}; copy the whole folder again, or train again") from None

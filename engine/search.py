"""The search space, the study and its journal: what tune.py asks of Optuna."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.config import UserError, suggestion
from engine.settings import Settings, Tune, replaced

RANGE_KEYS = {"low", "high", "log", "step"}
FREE = "boost.params."


def check_space(settings: Settings) -> None:
    """Every key, range and choice, before the first trial. Raises UserError with a line for each mistake."""
    space, errors = settings.tune.space, []
    if not space:
        errors.append('tune.space: empty; name what is searched, such as "optim.lr" = { low = 1e-5, high = 1e-2, log = true }')
    for key, wanted in space.items():
        try:
            check_key(settings, key)
            for value in range_ends(key, wanted) if isinstance(wanted, dict) else choices(key, wanted):
                replaced(settings, {key: value})
        except UserError as error:
            errors += [line if line.startswith("tune.space") else f"tune.space: {line}" for line in error.lines]
    if errors:
        raise UserError(*errors)


def check_key(settings: Settings, key: str) -> None:
    section, _, name = key.partition(".")
    if key.startswith(FREE) and len(key) > len(FREE):
        return
    values = settings.values()
    if section in ("tune", "track", "run") or section not in values or name not in values[section]:
        known = [f"{section}.{name}" for section in ("model", "optim", "train", "data", "task", "strategy", "boost") for name in values[section]]
        raise UserError(f"tune.space.{key!r}: no such setting{suggestion(key, known)}" if section in values else f"tune.space.{key!r}: no such section")


def range_ends(key: str, wanted: Mapping[str, Any]) -> list[int | float]:
    unknown = sorted(set(wanted) - RANGE_KEYS)
    if unknown:
        raise UserError(f"tune.space.{key!r}: unknown key {unknown[0]!r}{suggestion(unknown[0], RANGE_KEYS)}")
    ends = [wanted.get("low"), wanted.get("high")]
    if not all(isinstance(end, int | float) and not isinstance(end, bool) and math.isfinite(end) for end in ends):
        raise UserError(f"tune.space.{key!r} = {dict(wanted)}: needs two numbers, low and high")
    low, high = ends
    if low >= high:
        raise UserError(f"tune.space.{key!r}: low = {low} must be less than high = {high}")
    if wanted.get("log") and low <= 0:
        raise UserError(f"tune.space.{key!r}: low = {low} must be above 0 where log = true")
    if wanted.get("log") and "step" in wanted:
        raise UserError(f"tune.space.{key!r}: step = {wanted['step']} cannot be had with log = true; drop one")
    if wanted.get("step", 1) <= 0:
        raise UserError(f"tune.space.{key!r}: step = {wanted['step']} must be above 0")
    return [low, high]


def choices(key: str, wanted: list[Any]) -> list[Any]:
    if not wanted:
        raise UserError(f"tune.space.{key!r} = []: empty; give the values to choose from")
    return wanted


def suggest(trial: Any, space: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a trial by setting. A range of two whole numbers gives whole numbers."""
    values = {}
    for key, wanted in space.items():
        if not isinstance(wanted, dict):
            # Optuna takes no lists as choices: their place in the list stands for them.
            plain = all(isinstance(value, str | int | float | bool) for value in wanted)
            values[key] = trial.suggest_categorical(key, wanted) if plain else wanted[trial.suggest_categorical(key, range(len(wanted)))]
        elif isinstance(wanted["low"], int) and isinstance(wanted["high"], int):
            values[key] = trial.suggest_int(key, wanted["low"], wanted["high"], step=wanted.get("step", 1), log=wanted.get("log", False))
        else:
            values[key] = trial.suggest_float(key, wanted["low"], wanted["high"], step=wanted.get("step"), log=wanted.get("log", False))
    return values


def first_trial(settings: Settings) -> dict[str, Any]:
    """The config's own numbers, as far as the space holds them."""
    values, first = settings.values(), {}
    for key, wanted in settings.tune.space.items():
        section, _, name = key.partition(".")
        value = settings.boost.params.get(key.removeprefix(FREE)) if key.startswith(FREE) else values[section].get(name)
        inside = wanted["low"] <= value <= wanted["high"] if isinstance(wanted, dict) and value is not None else value in wanted
        if inside and (isinstance(wanted, dict) or isinstance(value, str | int | float | bool)):
            first[key] = value
    return first


def by_name(module: Any, key: str, name: str, options: dict[str, Any]) -> Any:
    """An object of a class of optuna.samplers or optuna.pruners. Raises UserError."""
    known = [word for word in module.__all__ if not word.startswith("Base")]
    if name not in known:
        raise UserError(f"tune.{key} = {name!r}: no such class of {module.__name__}{suggestion(name, known)}")
    try:
        return getattr(module, name)(**options)
    except (TypeError, ValueError) as error:
        raise UserError(f"tune.{key}_options = {options}: {name} refuses them: {error}") from None


def storage(folder: Path, url: str) -> Any:
    """The journal in the study's folder, or any storage of Optuna by its URL. Raises UserError where it cannot be reached."""
    import optuna

    if not url:
        # An absolute path, else a lock that a killed worker left is never taken over.
        path = str((folder / "study.journal").resolve())
        journal = optuna.storages.journal
        return optuna.storages.JournalStorage(journal.JournalFileBackend(path, lock_obj=journal.JournalFileOpenLock(path, grace_period=5)))
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return optuna.storages.get_storage(url)
    except (SQLAlchemyError, ValueError, ImportError, OSError) as error:
        raise UserError(f"tune.storage = {url!r}: cannot be reached: {str(error).splitlines()[0]}") from None


def mend_journal(folder: Path) -> None:
    """With no writer alive: cut a line that a kill tore, else the next would be glued to it, and drop the killed writer's lock."""
    path = folder / "study.journal"
    (folder / "study.journal.lock").unlink(missing_ok=True)
    if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
        with open(path, "r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


def open_study(settings: Settings, folder: Path, seed: int, direction: str) -> Any:
    """The study of these settings, begun or gone on with. Raises UserError for a study of another space."""
    import optuna

    tune: Tune = settings.tune
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    options = dict(tune.sampler_options)
    if "seed" in getattr(optuna.samplers, tune.sampler, object).__init__.__code__.co_varnames:
        options.setdefault("seed", seed)
    study = optuna.create_study(
        study_name=folder.name,
        storage=storage(folder, tune.storage),
        sampler=by_name(optuna.samplers, "sampler", tune.sampler, options),
        pruner=by_name(optuna.pruners, "pruner", tune.pruner, tune.pruner_options),
        direction={"max": "maximize", "min": "minimize"}[direction],
        load_if_exists=True,
    )
    space = json.dumps(tune.space, sort_keys=True)
    if study.user_attrs.setdefault("space", space) != space:
        before = json.loads(study.user_attrs["space"])
        different = sorted(key for key in before.keys() | tune.space if before.get(key) != tune.space.get(key))[0]
        raise UserError(f"{folder}: the study {folder.name} searches another space (it differs at {different!r}); set run.dir to another folder")
    study.set_user_attr("space", space)
    return study

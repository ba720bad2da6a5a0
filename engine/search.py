"""The search space: its keys, ranges and choices, and what a trial draws from them."""

import math
from collections.abc import Mapping
from typing import Any

from engine.config import UserError, suggestion
from engine.settings import Settings, replaced

RANGE_KEYS = {"low", "high", "log", "step"}


def check_space(settings: Settings) -> None:
    """Every key, range and choice, before the first trial. Raises UserError with a line for each mistake."""
    space, errors = settings.tune.space, []
    if not space:
        errors.append('tune.space: empty; name what is searched, such as "optim.lr" = { low = 1e-5, high = 1e-2, log = true }')
    for key, wanted in space.items():
        try:
            current(settings, key)
            for value in range_ends(settings, key, wanted) if isinstance(wanted, dict) else wanted:
                replaced(settings, {key: value})
            if not wanted:
                raise UserError(f"tune.space.{key!r} = []: empty; give the values to choose from")
        except UserError as error:
            errors += [line if line.startswith("tune.space") else f"tune.space: {line}" for line in error.lines]
    if errors:
        raise UserError(*errors)


def current(settings: Settings, key: str) -> Any:
    """The config's own value of "section.key", or of "section.table.entry" (None where the table lacks it). Raises UserError."""
    values = settings.values()
    section, _, name = key.partition(".")
    name, _, entry = name.partition(".")
    known = [f"{section}.{name}" for section in values.keys() - {"run", "track", "tune"} for name in values[section]]
    if f"{section}.{name}" not in known or (entry and not isinstance(values[section][name], dict)):
        raise UserError(f"tune.space.{key!r}: no such setting{suggestion(key, known)}")
    return values[section][name].get(entry) if entry else values[section][name]


def whole(settings: Settings, key: str, wanted: Mapping[str, Any]) -> bool:
    """Whether a range gives whole numbers: of whole ends, unless the setting itself is a real number."""
    numbers = [wanted["low"], wanted["high"], wanted.get("step", 1)]
    return all(isinstance(number, int) for number in numbers) and not isinstance(current(settings, key), float)


def range_ends(settings: Settings, key: str, wanted: Mapping[str, Any]) -> list[int | float]:
    unknown = sorted(set(wanted) - RANGE_KEYS)
    if unknown:
        raise UserError(f"tune.space.{key!r}: unknown key {unknown[0]!r}{suggestion(unknown[0], RANGE_KEYS)}")
    numbers, log = [wanted.get("low"), wanted.get("high"), wanted.get("step", 1)], wanted.get("log", False)
    if not all(isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number) for number in numbers):
        raise UserError(f"tune.space.{key!r} = {dict(wanted)}: needs two numbers, low and high, and step as a number where it is given")
    low, high, step = numbers
    for wrong, said in (
        (low >= high, f"low = {low} must be less than high = {high}"),
        (not isinstance(log, bool), f"log = {log!r} must be true or false"),
        (log is True and low <= 0, f"low = {low} must be above 0 where log = true"),
        (log is True and "step" in wanted, f"step = {step} cannot be had with log = true; drop one"),
        (step <= 0, f"step = {step} must be above 0"),
    ):
        if wrong:
            raise UserError(f"tune.space.{key!r}: {said}")
    return [low, high, low + step] if "step" in wanted and low + step <= high else [low, high]


def plain(wanted: list[Any]) -> bool:
    """Optuna takes no lists or tables as choices: their place stands for them."""
    return all(isinstance(value, str | int | float | bool) for value in wanted)


def chosen(settings: Settings, key: str, drawn: Any) -> Any:
    """The value of a setting, from what Optuna keeps of it."""
    wanted = settings.tune.space[key]
    return drawn if isinstance(wanted, dict) or plain(wanted) or drawn is None else wanted[drawn]


def suggest(trial: Any, settings: Settings) -> dict[str, Any]:
    """The values of a trial by setting."""
    values = {}
    for key, wanted in settings.tune.space.items():
        if not isinstance(wanted, dict):
            values[key] = chosen(settings, key, trial.suggest_categorical(key, wanted if plain(wanted) else range(len(wanted))))
        elif whole(settings, key, wanted):
            values[key] = trial.suggest_int(key, wanted["low"], wanted["high"], step=wanted.get("step", 1), log=wanted.get("log", False))
        else:
            values[key] = trial.suggest_float(key, wanted["low"], wanted["high"], step=wanted.get("step"), log=wanted.get("log", False))
    return values


def first_trial(settings: Settings) -> dict[str, Any]:
    """The config's own numbers, as far as the space holds them."""
    first = {}
    for key, wanted in settings.tune.space.items():
        value = current(settings, key)
        if isinstance(wanted, dict):
            first |= {key: value} if value is not None and wanted["low"] <= value <= wanted["high"] else {}
        elif value in wanted:
            first[key] = value if plain(wanted) else wanted.index(value)
    return first

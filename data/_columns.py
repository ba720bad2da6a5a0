"""Columns of a table: which are features, what they hold, and their values as arrays."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data._files import Source, codes, numbers
from data._scale import blocks
from engine.config import UserError, suggestion

if TYPE_CHECKING:
    from data.table import Config

ROW_NUMBERS = re.compile(r"Unnamed: \d+|__index_level_\d+__")
"""names that pandas gives to its index"""
DATES = re.compile(r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}([T ].*)?|\d{1,2}[-/.]\d{1,2}[-/.](\d{2}|\d{4})( .*)?")
DECIMAL_COMMA = re.compile(r"[-+]?(\d{1,3}(\.\d{3})+|\d+),\d+")


@dataclass
class Columns:
    """Values of all n rows as read, file after file."""

    numeric: np.ndarray
    """float32 [n, k], NaN where missing"""
    categorical: np.ndarray
    """int32 [n, c], 0 where missing"""
    target: np.ndarray
    """float64 [n], or int32 [n] numbers of its words"""
    weights: np.ndarray | None
    groups: np.ndarray | None
    """int32 [n]"""
    ids: list[Any] | None
    words: dict[str, dict[str, int]]
    """by column of texts: their numbers from 1, in the order in which they came"""


def choose(sources: dict[str, Source], config: "Config", notes: list[str]) -> list[str]:
    """Columns that may be features, in the training file's order. Raises UserError for settings that name no column."""
    source = sources["train"]
    roles = {"target": config.target, "id": config.id, "group": config.group, "weight": config.weight}
    lists = {"drop": config.drop, "categorical": config.categorical, "numeric": config.numeric}
    named = [(key, name) for key, name in roles.items() if name] + [(key, name) for key, names in lists.items() for name in names]
    for key, name in named:
        if name not in source.names:
            raise UserError(f"data.{key} = {name!r}: {source.path} has no such column{suggestion(name, source.names)}")
        if key != "target" and name == config.target:
            raise UserError(f"data.{key} = {name!r}: is the target; take it out of one of the two")
        if key == "categorical" and name in config.numeric:
            raise UserError(f"data.categorical = {name!r}: stands in data.numeric too; take it out of one of the two")
    indices = {name for file in sources.values() for name in file.names if ROW_NUMBERS.fullmatch(name)}
    indices -= {name for _, name in named}
    if indices:
        notes.append(f"dropped: {', '.join(sorted(indices))} has no name of its own and is most likely row numbers")
    ignored = {*config.drop, *indices}
    for part, other in sources.items():
        for name in sorted((set(source.names) ^ set(other.names)) - ignored):
            what = "has no" if name in source.names else "has a"
            remedy = "give the files the same columns, or name it in data.drop"
            raise UserError(f"data.{part} = {str(other.path)!r}: {what} column {name!r}, unlike data.train; {remedy}")
    return [name for name in source.names if name not in {*roles.values(), *ignored}]


def divide(source: Source, names: list[str], kinds: dict[str, str], config: "Config") -> tuple[list[str], list[str]]:
    """Numeric and categorical columns, as given, else by what they hold."""
    for name in [*names, config.target]:
        if kinds[name] == "dates" and name not in config.categorical:
            raise no_feature(source, name, "dates or times")
    kinds = {**kinds, **dict.fromkeys(config.categorical, "text"), **dict.fromkeys(config.numeric, "number")}
    return [name for name in names if kinds[name] == "number"], [name for name in names if kinds[name] != "number"]


def no_feature(source: Source, name: str, what: str) -> UserError:
    change = "write them with a point" if "comma" in what else "turn them into numbers, such as days since one of them"
    return UserError(f"{source.path}: column {name!r} holds {what}; {change}, or name it in data.drop or data.categorical")


def fill(
    sources: dict[str, Source],
    counts: dict[str, int],
    numeric: list[str],
    categorical: list[str],
    config: "Config",
    target_is_number: bool,
) -> Columns:
    """Read batch by batch into arrays of their final size, so that numbers are in memory once. Raises UserError."""
    total = sum(counts.values())
    columns = Columns(
        numeric=np.empty((total, len(numeric)), np.float32),
        categorical=np.empty((total, len(categorical)), np.int32),
        target=np.empty(total, np.float64 if target_is_number else np.int32),
        weights=np.empty(total, np.float32) if config.weight else None,
        groups=np.empty(total, np.int32) if config.group else None,
        ids=[] if config.id else None,
        words={name: {} for name in [*categorical, config.target, config.group]},
    )
    names = [*numeric, *categorical, config.target, config.weight, config.group, config.id]
    end = 0
    for source in sources.values():
        first = end
        for batch in source.batches([name for name in dict.fromkeys(names) if name]):
            rows = slice(end, end := end + batch.num_rows)
            columns.numeric[rows], columns.categorical[rows] = features(
                batch, numeric, categorical, columns.words, source.path, grow=True
            )
            fill_roles(columns, batch, rows, source.path, rows.start - first, config)
    for name in [*categorical, config.target]:
        words = columns.words[name]
        for what, pattern in {"dates": DATES, "numbers with a decimal comma": DECIMAL_COMMA}.items():
            if words and name not in config.categorical and all(map(pattern.fullmatch, words)):
                raise no_feature(sources["train"], name, f"{what} such as {next(iter(words))!r}")
    return columns


def features(
    batch: Any, numeric: list[str], categorical: list[str], words: dict[str, dict[str, int]], path: Path, grow: bool
) -> tuple[np.ndarray, np.ndarray]:
    """float32 [b, k] and int32 [b, c] of one record batch; `grow` adds unknown texts to the words."""
    left = np.empty((batch.num_rows, len(numeric)), np.float32)
    right = np.empty((batch.num_rows, len(categorical)), np.int32)
    for position, name in enumerate(numeric):
        left[:, position] = numbers(batch.column(name), f"{path}: column {name!r}")
    for position, name in enumerate(categorical):
        right[:, position] = codes(batch.column(name), words[name], grow)
    return left, right


def fill_roles(columns: Columns, batch: Any, rows: slice, path: Path, row: int, config: "Config") -> None:
    """The columns that are no features; `row` is the batch's first within its file."""
    target = batch.column(config.target)
    where = f"{path}: column {config.target!r}"
    if columns.target.dtype == np.float64:
        columns.target[rows] = numbers(target, where)
        refuse(np.isnan(columns.target[rows]), where, "no value", row)
    else:
        columns.target[rows] = codes(target, columns.words[config.target], grow=True)
        refuse(columns.target[rows] == 0, where, "no value", row)
    if columns.weights is not None:
        where = f"{path}: column {config.weight!r}"
        columns.weights[rows] = numbers(batch.column(config.weight), where)
        refuse(~(columns.weights[rows] >= 0), where, "a missing or negative weight", row)
    if columns.groups is not None:
        columns.groups[rows] = codes(batch.column(config.group), columns.words[config.group], grow=True)
        refuse(columns.groups[rows] == 0, f"{path}: column {config.group!r}", "no value", row)
    if columns.ids is not None:
        columns.ids += batch.column(config.id).to_pylist()


def refuse(wrong: np.ndarray, where: str, what: str, row: int) -> None:
    """Raises UserError for the first row that is wrong, counted from 1 below the header."""
    if wrong.any():
        raise UserError(f"{where}: {what} in row {row + int(wrong.argmax()) + 1}; fill it or remove the row")


def learn_vocabularies(columns: Columns, names: list[str], train: np.ndarray, notes: list[str]) -> dict[str, list[str]]:
    """Number the categories of the training rows in sorted order, in place; leave out constant columns."""
    vocabularies, keep = {}, []
    for position, name in enumerate(names):
        column, numbered = columns.categorical[:, position], columns.words[name]
        used = np.bincount(column[train], minlength=len(numbered) + 1)
        words = sorted(word for word, code in numbered.items() if used[code])
        if not words:
            raise all_missing(name)
        if len(words) == 1 and not used[0]:
            notes.append(f"dropped: {name} is {words[0]!r} in every training row")
            continue
        if len(words) > max(100, len(train) // 2):
            what = f"{name} has {len(words):,} categories in {len(train):,} training rows"
            notes.append(f"{what}; if it names rows, set data.id or data.drop")
        lookup = np.zeros(len(used), np.int32)
        lookup[[numbered[word] for word in words]] = np.arange(1, len(words) + 1)
        columns.categorical[:, position] = lookup[column]
        vocabularies[name] = words
        keep.append(position)
    columns.categorical = np.ascontiguousarray(columns.categorical[:, keep])
    return vocabularies


def learn_numeric(columns: Columns, names: list[str], train: np.ndarray, notes: list[str]) -> tuple[list[str], list[str]]:
    """Leave out columns that are constant over the training rows. Names of the others, and of those with missing values."""
    low, high = np.full(len(names), np.inf), np.full(len(names), -np.inf)
    missing = np.zeros(len(names), np.int64)
    for rows in blocks(train):
        block = columns.numeric[rows]
        low, high = np.fmin(low, np.fmin.reduce(block)), np.fmax(high, np.fmax.reduce(block))
        missing += np.isnan(block).sum(0)
    for name, count in zip(names, missing, strict=True):
        if count == len(train):
            raise all_missing(name)
    constant = (low == high) & (missing == 0)
    notes += [f"dropped: {names[position]} is {low[position]:g} in every training row" for position in np.flatnonzero(constant)]
    if constant.any():
        columns.numeric = np.ascontiguousarray(columns.numeric[:, ~constant])
    kept = [name for name, same in zip(names, constant, strict=True) if not same]
    return kept, [name for name, count in zip(names, missing, strict=True) if count]


def all_missing(name: str) -> UserError:
    return UserError(f"data.train: column {name!r} is missing in every training row; name it in data.drop")

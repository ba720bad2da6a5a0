"""Columns of a table: which are features, and their values as arrays."""

import re
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import compute, types

from data import Info
from data._files import Source
from data.table import Config, Files
from engine.config import UserError, suggestion

Sources = dict[str, Source]  # "train", and "valid" and "test" where they have files; rows are counted in this order
MISSING = pa.array(["", "?", "NA", "N/A", "n/a", "NaN", "nan", "null", "NULL", "#N/A"])
ROW_NUMBERS = re.compile(r"Unnamed: \d+|__index_level_\d+__")  # names that pandas gives to its index
NO_CATEGORIES = {
    "dates": re.compile(r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}([T ].*)?|\d{1,2}[-/.]\d{1,2}[-/.](\d{2}|\d{4})( .*)?"),
    "numbers with a decimal comma": re.compile(r"[-+]?(\d{1,3}(\.\d{3})+|\d+),\d+"),
}


def choose(sources: Sources, config: Config, notes: list[str]) -> list[str]:
    """Columns that may be features, in the training file's order. Raises UserError for settings that name no column."""
    source = sources["train"]
    roles = {key: [getattr(config, key)] for key in ("target", "id", "group", "weight") if getattr(config, key)}
    named = roles | {"drop": config.drop, "categorical": config.categorical, "numeric": config.numeric}
    for key, name in ((key, name) for key, names in named.items() for name in names):
        if name not in source.names:
            raise UserError(f"data.{key} = {name!r}: {source.path} has no such column{suggestion(name, source.names)}")
        if (name == config.target and key != "target") or (key == "categorical" and name in config.numeric):
            what = "is the target" if name == config.target else "stands in data.numeric too"
            raise UserError(f"data.{key} = {name!r}: {what}; take it out of one of the two")
    indices = {name for file in sources.values() for name in file.names if ROW_NUMBERS.fullmatch(name)}.difference(*named.values())
    notes += [f"dropped: {name} has no name of its own and is most likely row numbers" for name in sorted(indices)]
    ignored = indices.union(config.drop)
    for part, other in sources.items():
        for name in sorted({*source.names}.symmetric_difference(other.names) - ignored):
            has = "has no" if name in source.names else "has a"
            remedy = "give the files the same columns, or name it in data.drop"
            raise UserError(f"data.{part} = {str(other.path)!r}: {has} column {name!r}, unlike data.train; {remedy}")
    return [name for name in source.names if name not in ignored.union(*roles.values())]


def clean(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    """A column of numbers as it is, any other as trimmed texts, null where missing. Raises UserError for what is neither."""
    if any(is_number(column.type) for is_number in (types.is_integer, types.is_floating, types.is_decimal, types.is_null)):
        return column
    words = (types.is_string, types.is_large_string, types.is_string_view, types.is_dictionary, types.is_boolean)
    if not any(is_text(column.type) for is_text in (*words, types.is_date, types.is_timestamp)):
        raise UserError(f"{where} holds neither numbers nor texts; name it in data.drop")
    text = compute.utf8_trim_whitespace(column.cast(pa.string()))
    return compute.if_else(compute.is_in(text, value_set=MISSING), None, text)


def numbers(column: pa.ChunkedArray, where: str) -> np.ndarray:
    """float64 [n], NaN where missing or beyond float32. Raises UserError for a text that is no number."""
    try:
        column = column if types.is_boolean(column.type) else clean(column, where)
        values = column.cast(pa.float64(), safe=False).to_numpy()
    except pa.ArrowInvalid as error:  # Failed to parse string: 'few' as a scalar of type double
        wrong = str(error).partition(": ")[2].partition(" as a scalar")[0]
        raise UserError(f"{where}: {wrong} is not a number; correct it, or name the column in data.categorical and train again") from None
    return np.where(np.abs(values) <= np.finfo(np.float32).max, values, np.nan)


def texts(columns: list[tuple[pa.ChunkedArray, str]], vocabulary: list[str] | None = None) -> tuple[np.ndarray, list[str]]:
    """int32 [n]: numbers in a vocabulary, from 1; 0 where missing or not in it. And that vocabulary; if not given, all words, sorted."""
    chunks = [chunk for column, where in columns for chunk in clean(column, where).cast(pa.string()).chunks]
    encoded = pa.chunked_array(chunks).dictionary_encode().combine_chunks()
    words = encoded.dictionary.to_pylist()
    vocabulary = sorted(words) if vocabulary is None else vocabulary
    return renumber(words, vocabulary)[encoded.indices.cast(pa.int64()).fill_null(-1).to_numpy() + 1], vocabulary


def renumber(words: list[str], vocabulary: list[str]) -> np.ndarray:
    """int32 [1 + len(words)]: 0, then where each word stands in the vocabulary, from 1; 0 for one that it lacks."""
    known = {word: number for number, word in enumerate(vocabulary, 1)}
    numbers = [0]
    for word in words:
        # As other programs write it: integers beside missing ones become floats, booleans change their case.
        spellings = [word, word.removesuffix(".0"), word + ".0"]
        spellings += [word.lower(), word.capitalize()] if word.lower() in ("true", "false") else []
        numbers.append(next((known[form] for form in spellings if form in known), 0))
    return np.array(numbers, np.int32)


def read(sources: Sources, name: str, kind: str = "", complete: bool = False) -> tuple[np.ndarray, list[str] | None]:
    """A column of all files, one after the other: as `numbers` and None, or as `texts`.

    `kind` is "number", "text", or empty: told from the training file. Raises UserError, if `complete` for a missing value too.
    """
    columns = [(source.column(name), f"{source.path}: column {name!r}") for source in sources.values()]
    if kind == "number" or (not kind and holds_numbers(*columns[0], spelt=bool(sources["train"].separator))):
        values, words = np.concatenate([numbers(*column) for column in columns]), None
    else:
        values, words = texts(columns)
    for what, pattern in NO_CATEGORIES.items():
        if words and not kind and all(map(pattern.fullmatch, words)):
            remedy = "turn them into plain numbers, or name it in data.drop or data.categorical"
            raise UserError(f"{columns[0][1]} holds {what} such as {words[0]!r}; {remedy}")
    missing = np.isnan(values) if words is None else values == 0
    for column, where in columns if complete else ():
        if missing[: len(column)].any():
            raise UserError(f"{where}: no value in row {missing.argmax() + 1}; fill it or remove the row")
        missing = missing[len(column) :]
    return values, words


def holds_numbers(column: pa.ChunkedArray, where: str, spelt: bool) -> bool:
    """Whether it is a column of numbers, or, where numbers are `spelt`, one of texts that all spell a number."""
    try:
        return (spelt or clean(column, where) is column) and numbers(column, where) is not None
    except UserError:
        return False


def read_target(sources: Sources, config: Files, kind: str, notes: list[str]) -> tuple[np.ndarray, str, list[str]]:
    """The target as int64 class numbers or float32 numbers, the task, and the names of the classes. Raises UserError."""
    values, words = read(sources, config.target, complete=True)
    found, name = np.unique(values), f"the target {config.target!r}"
    if kind == "auto":
        trained = np.unique(values[: len(sources["train"].column(config.target))])
        classes = words or (len(trained) <= 20 and (trained == np.round(trained)).all())
        kind = ("binary" if len(found) == 2 else "multiclass") if classes else "regression"
        notes.append(f"task: {kind}, since {config.target} has {len(found):,} different values")
    if kind == "regression":
        if words:
            raise UserError(f'task.kind = "regression": {name} holds texts such as {words[0]!r}; use "auto", or a column of numbers')
        if config.balance != "none":
            raise UserError(f'data.balance = "{config.balance}": {name} is a number, not a class; set it to "none"')
        return values.astype(np.float32), kind, []
    labels = words or [repr(value).removesuffix(".0") for value in found.tolist()]
    if kind == "binary" and len(labels) > 2:
        raise UserError(f'task.kind = "binary": {name} has {len(labels)} values ({", ".join(labels[:5])}); use "multiclass"')
    return np.searchsorted(found, values), kind, labels


def read_features(
    sources: Sources, names: list[str], config: Config, rows: int, train: np.ndarray, notes: list[str]
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """float32 [n, k], int32 [n, c], and which columns these are, with the words that the training rows hold.

    Leaves out columns that are constant over the training rows. Raises UserError for one without a value there, or if none is left.
    """
    forced = dict.fromkeys(config.categorical, "text") | dict.fromkeys(config.numeric, "number")
    # Wide enough for all, since what a column holds is known once it is read; so numbers are in memory once.
    numeric, categorical = np.empty((rows, len(names)), np.float32), np.empty((rows, len(names)), np.int32)
    learned: dict[str, Any] = {"numeric": [], "missing": [], "categorical": [], "vocabularies": {}}
    for name in names:
        values, words = read(sources, name, forced.get(name, ""))
        if words is None:
            values = values.astype(np.float32)
            known = values[train][~np.isnan(values[train])]
            found, missing = sorted({known.min(), known.max()} if len(known) else ()), len(known) < len(train)
        else:
            used = np.bincount(values[train], minlength=len(words) + 1)
            found, missing = [word for word, count in zip(words, used[1:], strict=True) if count], used[0] > 0
        if not found:
            raise UserError(f"data.train: column {name!r} is missing in every training row; name it in data.drop")
        if len(found) == 1 and not missing:
            notes.append(f"dropped: {name} is {found[0]} in every training row")
        elif words is None:
            numeric[:, len(learned["numeric"])] = values
            learned["numeric"].append(name)
            learned["missing"] += [name] if missing else []
        else:
            categorical[:, len(learned["categorical"])] = renumber(words, found)[values]
            learned["categorical"].append(name)
            learned["vocabularies"][name] = found
            if len(found) > max(100, len(train) // 2):
                notes.append(f"{name} has {len(found):,} categories in {len(train):,} training rows; if it names rows, set data.id or data.drop")
    if not learned["numeric"] and not learned["categorical"]:
        raise UserError(f"{sources['train'].path}: no feature is left beside the target {config.target!r}; see data.drop")
    numeric, categorical = numeric[:, : len(learned["numeric"])], categorical[:, : len(learned["categorical"])]
    return np.ascontiguousarray(numeric), np.ascontiguousarray(categorical), learned


def known_target(column: pa.ChunkedArray, where: str, info: Info, start: int) -> np.ndarray:
    """A target to score against, as `read_target` gives it. Raises UserError for what is missing or unknown to the run."""
    target = texts([(column, where)], info.labels)[0].astype(np.int64) - 1 if info.labels else numbers(column, where).astype(np.float32)
    wrong = target < 0 if info.labels else np.isnan(target)
    if wrong.any():
        what = f"{column[int(wrong.argmax())].as_py()!r} in row {start + wrong.argmax() + 1}"
        known = f"label of the run ({', '.join(info.labels[:20])})" if info.labels else "number"
        raise UserError(f"{where}: {what} is no {known}; correct it, or remove the column to predict without scores")
    return target

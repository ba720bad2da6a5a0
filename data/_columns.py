"""Columns of files as arrays: numbers, or words by their number in a vocabulary."""

import math
import re

import numpy as np
import pyarrow as pa
from pyarrow import compute, types

from data._files import Source
from engine.config import UserError

Sources = dict[str, Source]  # "train", and "valid" and "test" where they have files; rows are counted in this order
Columns = list[tuple[pa.ChunkedArray, str]]  # with what messages call them
MISSING = pa.array(["", "?", "NA", "N/A", "n/a", "NaN", "nan", "null", "NULL", "#N/A"])
DAY, MONTH, YEAR = r"\d{1,2}", r"(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?", r"(\d{2}|\d{4})"
DATES = (rf"\d{{4}}[-/.]{DAY}[-/.]{DAY}", rf"{DAY}[-/.]{DAY}[-/.]{YEAR}", rf"{MONTH} {DAY},? {YEAR}", rf"{DAY}\.?[- ]{MONTH}[- ]{YEAR}")
NO_CATEGORIES = {
    "dates": re.compile(f"({'|'.join(DATES)})([t ].*)?", re.IGNORECASE),
    "numbers with a decimal comma": re.compile(r"[-+]?(\d{1,3}(\.\d{3})+|\d+),\d+"),
}


def of(sources: Sources, name: str) -> Columns:
    return [(source.column(name), f"{source.path}: column {name!r}") for source in sources.values()]


def plain_texts(columns: Columns) -> pa.ChunkedArray:
    """Texts as they stand, one column after the other. Raises UserError."""
    chunks = []
    for column, where in columns:
        try:
            chunks += column.cast(pa.string()).chunks
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise UserError(f"{where}: holds {column.type}, not texts; name another column") from None
    return pa.chunked_array(chunks, pa.string())


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


def texts(columns: Columns, vocabulary: list[str] | None = None) -> tuple[np.ndarray, list[str]]:
    """int32 [n]: numbers in a vocabulary, from 1; 0 where missing, -1 where not in it. And that vocabulary; if not given, all words, sorted."""
    chunks = [chunk for column, where in columns for chunk in clean(column, where).cast(pa.string()).chunks]
    encoded = pa.chunked_array(chunks).dictionary_encode().combine_chunks()
    words = encoded.dictionary.to_pylist()
    vocabulary = sorted(words) if vocabulary is None else vocabulary
    return renumber(words, vocabulary, -1)[encoded.indices.cast(pa.int64()).fill_null(-1).to_numpy() + 1], vocabulary


def renumber(words: list[str], vocabulary: list[str], lacking: int = 0) -> np.ndarray:
    """int32 [1 + len(words)]: 0, then where each word stands in the vocabulary, from 1; `lacking` for one that it lacks."""
    known = {word: number for number, word in enumerate(vocabulary, 1)}
    numbers = [0]
    for word in words:
        # As other programs write it: integers beside missing ones become floats, booleans change their case.
        spellings = [word, word.removesuffix(".0"), word + ".0"]
        spellings += [word.lower(), word.capitalize()] if word.lower() in ("true", "false") else []
        numbers.append(next((known[form] for form in spellings if form in known), lacking))
    return np.array(numbers, np.int32)


def read(sources: Sources, name: str, kind: str = "", complete: bool = False) -> tuple[np.ndarray, list[str] | None]:
    """A column of all files, one after the other: as `numbers` and None, or as `texts`.

    `kind` is "number", "text", or empty: told from the training file. Raises UserError, if `complete` for a missing value too.
    """
    columns = of(sources, name)
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
            row = int(missing.argmax())
            value = clean(column, where)[row].as_py()
            what = "no value" if value is None or math.isnan(float(value)) else f"{value} is infinite or too large,"
            raise UserError(f"{where}: {what} in row {row + 1}; correct it or remove the row")
        missing = missing[len(column) :]
    return values, words


def holds_numbers(column: pa.ChunkedArray, where: str, spelt: bool) -> bool:
    """Whether it is a column of numbers, or, where numbers are `spelt`, one of texts that all spell a number."""
    try:
        return (spelt or clean(column, where) is column) and numbers(column, where) is not None
    except UserError:
        return False

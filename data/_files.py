"""Rows of CSV and Parquet files, plain or compressed, in batches of bounded memory.

A CSV is read as text throughout: what a column holds is decided once for the whole file, never batch by batch, so that
"007" stays "007" where a column is a category, and training and prediction read alike.
"""

import codecs
import csv
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import UserError

MISSING = ("", "?", "NA", "N/A", "n/a", "NaN", "nan", "null", "NULL", "#N/A")
SEPARATORS = ",;\t|"
COMPRESSION = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4"}
EXCEL = "a zip archive or an Excel workbook"
FOREIGN = {b"PK\x03\x04": EXCEL, b"\xd0\xcf\x11\xe0": EXCEL, b"\xfd7zXZ": "an xz archive"}
BOMS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
SAMPLE = 1 << 20
"""bytes from which the header, the separator and the encoding are told"""


@dataclass(frozen=True)
class Source:
    """A table on disk, opened far enough to know its columns; or one in memory (`table`), for data that has no file."""

    path: Path
    names: list[str]
    separator: str = ""
    """"" for Parquet and for a table in memory"""
    encoding: str = ""
    compression: str | None = None
    skip: int = 0
    """lines of a CSV before its rows: the header, and blank ones above it"""
    table: Any = None
    """pyarrow.Table"""

    def batches(self, names: list[str], rows: int = 65536) -> Iterator[Any]:
        """pyarrow record batches of at most `rows` rows: text columns from a CSV, typed ones from Parquet."""
        with reading(self):
            for batch in self._reader(names, rows):
                for start in range(0, batch.num_rows, rows):
                    yield batch.slice(start, rows)

    def _reader(self, names: list[str], rows: int) -> Any:
        if self.table is not None:
            return self.table.select(names).to_batches(max_chunksize=rows)
        if not self.separator:
            file = parquet_file(self.path, self.compression)
            for name in names:
                if type_kind(file.schema_arrow.field(name).type) == "nested":
                    raise UserError(f"{self.path}: column {name!r} holds neither numbers nor texts; name it in data.drop")
            return file.iter_batches(rows, columns=names)
        import pyarrow as pa
        import pyarrow.csv as pa_csv

        return pa_csv.open_csv(
            pa.input_stream(str(self.path), compression=self.compression),
            # A row may not be longer than a block.
            pa_csv.ReadOptions(
                block_size=4 << 20, encoding=self.encoding, column_names=self.names, skip_rows_after_names=self.skip
            ),
            pa_csv.ParseOptions(delimiter=self.separator, newlines_in_values=True),
            pa_csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), include_columns=names),
        )

    def survey(self, names: list[str]) -> tuple[int, dict[str, str]]:
        """Number of rows, and "number", "text", "dates" or "nested" for each of the columns.

        Parquet says so itself; a CSV is read through once, and a column of it is "number" if every value is one or missing.
        """
        rows, kinds = 0, dict.fromkeys(names, "number")
        if self.separator:
            for batch in self.batches(names or self.names[:1]):
                rows += batch.num_rows
                texts = (name for name in names if kinds[name] == "number" and as_float(batch.column(name)) is None)
                kinds.update(dict.fromkeys(texts, "text"))
        else:
            with reading(self):
                schema, rows = summary(self)
            kinds = {name: type_kind(schema.field(name).type) for name in names}
        if not rows:
            raise no_rows(self.path)
        return rows, kinds


def open_source(path: Path, key: str, separator: str = "", encoding: str = "") -> Source:
    """Find out how to read a file. `key` is the setting that names it. Raises UserError."""
    try:
        with open(path, "rb") as file:
            start = file.read(8)
    except FileNotFoundError:
        where = "; relative paths start at data.root" if key.startswith("data.") else "; name a CSV or Parquet file"
        raise UserError(f"{key} = {str(path)!r}: no such file{where}") from None
    except IsADirectoryError:
        raise UserError(f"{key} = {str(path)!r}: is a folder; name one CSV or Parquet file in it") from None
    except OSError as error:
        raise UserError(f"{key} = {str(path)!r}: cannot be read: {error.strerror}") from None
    if not start:
        raise UserError(f"{key} = {str(path)!r}: the file is empty; it needs a header and rows")
    for magic, what in FOREIGN.items():
        if start.startswith(magic):
            raise UserError(f"{key} = {str(path)!r}: is {what}; unpack or save it as CSV or Parquet")
    compression = next((name for magic, name in COMPRESSION.items() if start.startswith(magic)), None)
    source = Source(path, [], separator, encoding, compression)
    with reading(source):
        import pyarrow as pa

        sample = pa.input_stream(str(path), compression=compression).read(SAMPLE)
        if sample.startswith(b"PAR1"):
            source = Source(path, parquet_file(path, compression).schema_arrow.names, compression=compression)
        elif ".parquet" in path.suffixes:
            raise UserError(f"{key} = {str(path)!r}: is not Parquet, whatever its name; write it again")
        else:
            source = csv_source(source, sample)
    repeated = sorted({name for name in source.names if source.names.count(name) > 1})
    if repeated:
        raise UserError(f"{path}: {source.names.count(repeated[0])} columns are named {repeated[0]!r}; rename all but one")
    return source


def csv_source(source: Source, sample: bytes) -> Source:
    """Encoding, separator and column names from the first bytes of the file."""
    encoding = source.encoding or next((name for bom, name in BOMS.items() if sample.startswith(bom)), "utf-8")
    try:
        " ".encode(encoding)  # unlike codecs.lookup, knows that "hex" is no encoding of text
        encoding = codecs.lookup(encoding).name
        text = codecs.getincrementaldecoder("utf-8-sig" if encoding == "utf-8" else encoding)().decode(sample)
    except LookupError:
        raise UserError(f"data.encoding = {encoding!r}: no such encoding; known: utf-8, cp1252, utf-16, euc_kr …") from None
    except UnicodeDecodeError as error:
        raise bad_bytes(Source(source.path, [], encoding=encoding, compression=source.compression), error) from None
    if "\0" in text:
        raise UserError(f'{source.path}: holds zero bytes; if it is UTF-16 set data.encoding = "utf-16-le", else save it as CSV')
    lines = text.splitlines(keepends=True)
    blank = next((number for number, line in enumerate(lines) if line.strip()), None)
    if blank is None:
        raise UserError(f"{source.path}: the file is empty; it needs a header and rows")
    try:
        separator = source.separator or find_separator(lines[blank : blank + 50])
        header = next(csv.reader(lines[blank:], delimiter=separator))
    except csv.Error as error:
        raise UserError(f"{source.path}: the header cannot be read: {error}; is this a CSV?") from None
    names = [name.strip() or f"Unnamed: {position}" for position, name in enumerate(header)]
    return Source(source.path, names, separator, encoding, source.compression, skip=blank + 1)


def find_separator(lines: list[str]) -> str:
    """The separator that cuts most of the first rows into as many fields as the header, quotes respected; the most fields win."""
    best = (0.0, 0, ",")
    for separator in SEPARATORS:
        widths = [len(row) for row in csv.reader(lines, delimiter=separator) if row]
        if widths and widths[0] > 1:
            agreeing = sum(width == widths[0] for width in widths) / len(widths)
            best = max(best, (round(agreeing, 1), widths[0], separator))
    return best[2]


def parquet_file(path: Path, compression: str | None) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    if compression:
        return parquet.ParquetFile(pa.BufferReader(pa.input_stream(str(path), compression=compression).read()))
    # Else the whole file is fetched ahead, and held until it is read: measured, 1.3 GB of a file of 1.2 GB.
    return parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)


def summary(source: Source) -> tuple[Any, int]:
    """Arrow schema and number of rows."""
    if source.table is not None:
        return source.table.schema, source.table.num_rows
    file = parquet_file(source.path, source.compression)
    return file.schema_arrow, file.metadata.num_rows


@contextmanager
def reading(source: Source) -> Iterator[None]:
    """Turn what pyarrow says of a damaged file into one line. Nothing but reading belongs inside."""
    import pyarrow as pa

    try:
        yield
    except UnicodeDecodeError as error:
        raise bad_bytes(source, error) from None
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        said = str(error).split("\n")[0][:200]
        if "UTF8" in said:
            raise bad_bytes(source, error) from None
        if "CSV" in said or "straddling" in said:
            remedy = f"check that row's quotes and separators (data.separator is {source.separator!r})"
            raise UserError(f"{source.path}: {said.removeprefix('CSV parse error: ')}; {remedy}") from None
        raise UserError(f"{source.path}: damaged or cut off: {said.rstrip('.')}; copy or write the file again") from None


def bad_bytes(source: Source, error: Exception) -> UserError:
    """The line that names where a file leaves its encoding: the file is read again, since pyarrow does not say."""
    import pyarrow as pa

    where = "somewhere"
    if source.encoding == "utf-8":
        for number, line in enumerate(io.BufferedReader(pa.input_stream(str(source.path), compression=source.compression)), 1):
            try:
                line.decode()
            except UnicodeDecodeError as found:
                where = f"in line {number}, byte {found.start + 1} (0x{line[found.start]:02x})"
                break
    remedy = 'set data.encoding, such as "cp1252" or "euc_kr"'
    return UserError(f"{source.path}: is not {source.encoding} {where}; {remedy}")


def no_rows(path: Path) -> UserError:
    return UserError(f"{path}: has a header and no rows; add rows below it")


def type_kind(kind: Any) -> str:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        return "text"
    if types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind) or types.is_null(kind):
        return "number"
    if types.is_temporal(kind):
        return "dates"
    return "text" if is_text(kind) or types.is_boolean(kind) else "nested"


def is_text(kind: Any) -> bool:
    import pyarrow.types as types

    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def as_float(column: Any) -> Any:
    """A pyarrow column as float64 with nulls for what is missing; None if it holds a text that is no number."""
    import pyarrow as pa
    import pyarrow.compute as compute

    column = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    if is_text(column.type):
        text = compute.utf8_trim_whitespace(column.cast(pa.string()))
        column = compute.if_else(compute.is_in(text, value_set=pa.array(MISSING)), None, text)
    try:
        return column.cast(pa.float64(), safe=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None


def numbers(column: Any, where: str) -> np.ndarray:
    """float64 [n], NaN where missing or beyond float32. Raises UserError naming `where` and the first text that is no number."""
    import pyarrow as pa

    values = as_float(column)
    if values is None:
        texts = column.cast(pa.string()).to_pylist() if is_text(column.type) else []
        wrong = next((repr(text) for text in texts if as_float(pa.array([text])) is None), f"a value of type {column.type}")
        raise UserError(f"{where}: {wrong} is not a number; correct it, or name the column in data.categorical and train again")
    values = values.to_numpy(zero_copy_only=False)
    in_range = np.abs(values) <= np.finfo(np.float32).max
    return values if in_range.all() else np.where(in_range, values, np.nan)


def codes(column: Any, vocabulary: dict[str, int], grow: bool) -> np.ndarray:
    """int32 [n]: the vocabulary's number of each text, 0 where missing. Unknown texts are added to it, or 0."""
    import pyarrow as pa

    column = column if pa.types.is_dictionary(column.type) else column.cast(pa.string()).dictionary_encode()
    found = [0]
    for value in column.dictionary.cast(pa.string()).to_pylist():
        value = (value or "").strip()
        if value in MISSING:
            found.append(0)
        elif grow:
            found.append(vocabulary.setdefault(value, len(vocabulary) + 1))
        else:
            found.append(next((vocabulary[form] for form in spellings(value) if form in vocabulary), 0))
    # Code 0 of `found` stands for null.
    return np.array(found, np.int32)[column.indices.cast(pa.int64()).fill_null(-1).to_numpy() + 1]


def spellings(value: str) -> tuple[str, ...]:
    """The same value as other programs write it: integers beside missing ones become floats, booleans change their case."""
    booleans = (value.lower(), value.capitalize()) if value.lower() in ("true", "false") else ()
    return (value, value.removesuffix(".0"), value + ".0", *booleans)

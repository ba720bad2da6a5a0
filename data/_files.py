"""Rows of CSV, Parquet and JSONL files, plain or compressed.

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

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
from pyarrow.parquet import ParquetFile

from engine.config import UserError, suggestion

COMPRESSION = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4"}
FOREIGN = {b"PK\x03\x04": "a zip archive or an Excel workbook", b"\xd0\xcf\x11\xe0": "an Excel workbook", b"\xfd7zXZ": "an xz archive"}


@dataclass
class Source:
    """A table: on disk, opened far enough to know its columns, or in memory."""

    path: Path
    names: list[str]
    parquet: ParquetFile | None = None
    table: pa.Table | None = None  # all rows, where they are in memory
    separator: str = ""  # this and what follows is of a CSV
    encoding: str = ""
    quote: str = '"'
    compression: str | None = None
    skip: int = 0  # lines before the rows: the header, and blank ones above it

    def require(self, key: str, name: str) -> None:
        """Raises UserError where there is no column of the name that data.<key> gives."""
        if name not in self.names:
            raise UserError(f"data.{key} = {name!r}: {self.path} has no such column{suggestion(name, self.names)}")

    def batches(self, names: list[str], rows: int = 65536) -> Iterator[pa.Table]:
        """Tables of 1 to `rows` rows: text columns from a CSV, typed ones from Parquet. Raises UserError."""
        count = 0
        with reading(self):
            if self.parquet:
                reader: Any = self.parquet.iter_batches(rows, columns=names)
            elif self.table is not None:
                reader = self.table.select(names).to_batches(rows)
            else:
                reader = pa_csv.open_csv(
                    pa.input_stream(str(self.path), compression=self.compression),
                    # A row may not be longer than a block.
                    pa_csv.ReadOptions(block_size=4 << 20, encoding=self.encoding, column_names=self.names, skip_rows_after_names=self.skip),
                    pa_csv.ParseOptions(delimiter=self.separator, quote_char=self.quote or False, newlines_in_values=bool(self.quote)),
                    pa_csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), include_columns=names),
                )
            for batch in reader:
                count += batch.num_rows
                yield from (pa.Table.from_batches([batch.slice(start, rows)]) for start in range(0, batch.num_rows, rows))
        if not count:
            raise UserError(f"{self.path}: has a header and no rows; add rows below it")

    def column(self, name: str) -> pa.ChunkedArray:
        """All of a column. Parquet is read column by column, so that one at a time is in memory; a CSV once, and held."""
        if self.parquet:
            return pa.concat_tables(self.batches([name])).column(0)
        self.table = self.table or pa.concat_tables(self.batches(self.names))
        return self.table.column(name)


def open_source(path: Path, key: str, separator: str = "", encoding: str = "", quote: str = '"') -> Source:
    """Find out how to read a file. `key` is the setting that names it. Raises UserError."""
    where = f"{key} = {str(path)!r}"
    try:
        with open(path, "rb") as file:
            start = file.read(8)
    except OSError as error:
        what = "is a folder" if path.is_dir() else str(error.strerror).lower()
        raise UserError(f"{where}: {what}; name one CSV, Parquet or JSONL file") from None
    for magic, what in FOREIGN.items():
        if start.startswith(magic):
            raise UserError(f"{where}: is {what}; unpack or save it as CSV or Parquet")
    compression = next((name for magic, name in COMPRESSION.items() if start.startswith(magic)), None)
    source = Source(path, [], separator=separator, encoding=encoding, quote=quote, compression=compression)
    with reading(source):
        stream = pa.input_stream(str(path), compression=compression)
        sample = stream.read(1 << 20)
        if sample.startswith(b"PAR1"):
            # With pre_buffer the whole file is fetched ahead, and held until it is read: measured, 1.3 GB of a file of 1.2 GB.
            unpacked = pa.BufferReader(sample + stream.read()) if compression else path
            source.parquet = ParquetFile(unpacked, buffer_size=1 << 20, pre_buffer=False)
            source.names = source.parquet.schema_arrow.names
        elif ".parquet" in path.suffixes:
            raise UserError(f"{where}: is not Parquet, whatever its name; write it again")
        elif {".jsonl", ".ndjson"} & {*path.suffixes}:
            longest = pa_json.ReadOptions(block_size=64 << 20)  # of a line
            source.table = pa_json.read_json(pa.input_stream(str(path), compression=compression), longest)
            source.names = source.table.column_names
        else:
            read_header(source, sample)
    repeated = [name for name in source.names if source.names.count(name) > 1]
    if repeated:
        raise UserError(f"{path}: {repeated.count(repeated[0])} columns are named {repeated[0]!r}; rename all but one")
    return source


def read_header(source: Source, sample: bytes) -> None:
    """Encoding, separator and column names of a CSV from its first bytes."""
    encoding = source.encoding or ("utf-16" if sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8")
    try:
        " ".encode(encoding)  # unlike codecs.lookup, knows that "hex" is no encoding of text
    except LookupError:
        raise UserError(f"data.encoding = {encoding!r}: no such encoding; known: utf-8, cp1252, utf-16, euc_kr …") from None
    source.encoding = codecs.lookup(encoding).name
    text = codecs.getincrementaldecoder("utf-8-sig" if source.encoding == "utf-8" else encoding)().decode(sample)
    if "\0" in text:
        raise UserError(f'{source.path}: holds zero bytes; if it is UTF-16 set data.encoding = "utf-16-le", else save it as CSV')
    if not text.strip():
        raise UserError(f"{source.path}: the file is empty; it needs a header and rows")
    lines = text.splitlines(keepends=True)
    blank = next(number for number, line in enumerate(lines) if line.strip())
    source.separator = source.separator or max(",;\t|", key=lambda separator: fit(lines[blank : blank + 50], separator, source.quote))
    header = next(csv.reader(lines[blank:], **dialect(source.separator, source.quote)))
    source.names = [name.strip() or f"Unnamed: {position}" for position, name in enumerate(header)]
    source.skip = blank + 1


def dialect(separator: str, quote: str) -> dict[str, Any]:
    """Arguments of csv.reader."""
    return {"delimiter": separator, "quotechar": quote or None, "quoting": csv.QUOTE_MINIMAL if quote else csv.QUOTE_NONE}


def fit(lines: list[str], separator: str, quote: str) -> tuple[float, int]:
    """How many of the first rows a separator cuts into as many fields as the header, quotes respected; and into how many."""
    widths = [len(row) for row in csv.reader(lines, **dialect(separator, quote)) if row]
    return (round(widths.count(widths[0]) / len(widths), 1), widths[0]) if widths[0] > 1 else (0, 0)


@contextmanager
def reading(source: Source) -> Iterator[None]:
    """Turn what is said of a damaged file into one line. Nothing but reading belongs inside."""
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, csv.Error, UnicodeError) as error:
        said = str(error).split("\n")[0][:200].rstrip(".")
        if isinstance(error, UnicodeError) or "UTF8" in said:
            said = f'is not {source.encoding} {bad_bytes(source)}; set data.encoding, such as "cp1252" or "euc_kr"'
        elif isinstance(error, csv.Error) or "CSV" in said or "straddling" in said:
            remedy = f"check that row's quotes and separators (data.separator is {source.separator!r}, data.quote {source.quote!r})"
            said = f"{said.removeprefix('CSV parse error: ')}; {remedy}"
        else:
            said = f"damaged or cut off: {said}; copy or write the file again"
        raise UserError(f"{source.path}: {said}") from None


def bad_bytes(source: Source) -> str:
    """Where a file leaves its encoding: it is read again, since pyarrow does not say."""
    file = io.BufferedReader(pa.input_stream(str(source.path), compression=source.compression))
    for number, line in enumerate(file if source.encoding == "utf-8" else (), 1):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            return f"in line {number}, byte {error.start + 1} (0x{line[error.start]:02x})"
    return "somewhere"

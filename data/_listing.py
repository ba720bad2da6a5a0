"""Tables whose rows name files or hold texts, and what is read of them."""

import contextlib
import dataclasses
import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from data import Info, Rows, Splits, _cache
from data._dataset import TableDataset
from data._samples import Files, Samples, batch_target, new_rows, read_samples
from engine.config import UserError


class Config(Files):
    on_bad: Literal["error", "skip"] = "error"
    """what becomes of a row whose file or text is missing or damaged: the end with the row named, or a row less, and a count"""


@dataclass
class Listing(Samples):
    """Rows of tables; of a file to predict there is one part, "input"."""

    texts: dict[str, Any]
    """the wanted columns, pyarrow.ChunkedArray [n] of texts"""
    places: list[tuple[Path, int, int]]
    """tables, the number of the first row that is of each, and that row's number in the file"""
    ids: dict[str, list]
    """of a file to predict"""
    notes: list[str]

    def place(self, row: int) -> tuple[Path, int]:
        """The table of a row, and which row of it that is, from 1."""
        path, first, number = [place for place in self.places if place[1] <= row][-1]
        return path, row - first + number + 1

    def files(self, column: str) -> list[Path | None]:
        """The files that a column names. Relative paths start at the table."""
        return [self.place(row)[0].parent / name if name else None for row, name in enumerate(self.texts[column].to_pylist())]

    def skip(self, bad: dict[int, str], on_bad: str) -> None:
        """Leave out bad rows, and note how many. Raises UserError for the first one unless they are to be skipped, or if none is left."""
        if not bad:
            return
        path, number = self.place(min(bad))
        first = f"{path}: row {number}: {bad[min(bad)]}"
        if on_bad == "error":
            more = f" ({len(bad) - 1:,} more rows are bad)" if len(bad) > 1 else ""
            raise UserError(f'{first}{more}; correct it, or leave such rows out with data.on_bad = "skip"')
        self.rows = {part: np.setdiff1d(rows, list(bad)) for part, rows in self.rows.items()}
        for part, rows in self.rows.items():
            if not len(rows) and part != "input":
                raise UserError(f"data.{part}: every row is bad; the first is {first}")
        self.notes.append(f"skipped {len(bad):,} bad rows; the first is {first}")

    def splits(self, dataset: type[TableDataset], config: Config, *read: Any, more: dict[str, Any], files: dict[str, str] | None = None) -> Splits:
        """All parts, of a dataset's class, and of what was read for it; `more` belongs to Info."""
        parts = {"test": None} | {part: dataset(self, part, config, *read) for part in self.rows}
        return Splits(**parts, info=dataclasses.replace(self.info, more=more), preprocessing={}, notes=self.notes, files=files or {})

    def new(self, dataset: type[TableDataset], config: Config, *read: Any) -> Iterator[Rows]:
        """A chunk of a file to predict, if a row is left. It has no other place for its notes than the screen."""
        for note in self.notes:
            print(note, file=sys.stderr)
        if len(kept := self.rows["input"]):
            ids = {name: [ids[row] for row in kept] for name, ids in self.ids.items()}
            yield Rows(dataset(self, "input", config, *read), ids, self.target is not None)


class Part(TableDataset):
    """Rows of one part of a listing, with "target" where it is known; a subclass adds to a batch what was read of the rows."""

    def __init__(self, listing: Listing, part: str, config: Config) -> None:
        columns = {} if listing.target is None else {"target": batch_target(listing.target, listing.info)}
        super().__init__(columns, torch.from_numpy(listing.rows[part]), listing.part_weights(part, config.balance))


class Sequences(Part):
    """Rows of unequal length. A batch: "tokens" int64 [b, t] or "text" float32 [b, t, size], with "mask" bool [b, t], True where there is
    something; "audio" float32 [b, t, size] or [b, t], with "audio_mask"; and "target"."""

    def __init__(self, listing: Listing, part: str, config: Any, arrays: dict[str, _cache.Arrays]) -> None:
        super().__init__(listing, part, config)
        self.arrays = arrays
        first = next(iter(arrays.values()))
        self.lengths = torch.from_numpy(np.diff(first.starts))[self.index] if config.group_lengths else None

    def __getitems__(self, positions: Tensor) -> dict[str, Tensor]:
        batch, rows = super().__getitems__(positions), self.rows(positions).numpy()
        for name, arrays in self.arrays.items():
            values, batch["audio_mask" if name == "audio" else "mask"] = arrays.padded(rows)
            batch[name] = values.long() if name == "tokens" else values
        return batch


def read(config: Config, kind: str, wanted: dict[str, str], sources: dict[str, Any] | None = None) -> Listing:
    """The rows of the training files. `wanted` are columns by the key that names them. Raises UserError."""
    from data import _columns

    sources, notes = sources or config.sources(), []
    for source in sources.values():
        for key, name in (wanted | {key: getattr(config, key) for key in ("target", "group", "weight")}).items():
            if name:
                source.require(key, name)
    samples = read_samples(sources, config, kind, notes)
    texts = {name: _columns.plain_texts(_columns.of(sources, name)) for name in wanted.values()}
    starts = np.cumsum([0, *(len(source.column(config.target)) for source in sources.values())]).tolist()
    places = [(source.path, start, 0) for source, start in zip(sources.values(), starts, strict=False)]
    return Listing(**vars(samples), texts=texts, places=places, ids={}, notes=notes)


def chunks(source: Any, config: Config, info: Info, wanted: Iterable[str], count: int) -> Iterator[Listing]:
    """A table to predict (data._files.Source), `count` rows at a time; its target is optional. Raises UserError for a column that it lacks."""
    from data import _columns

    for table, start, target, ids in new_rows(source, [*wanted], config.target, config.id, info, count):
        texts = {name: _columns.plain_texts([(table.column(name), f"{source.path}: column {name!r}")]) for name in wanted}
        yield Listing(target, {"input": np.arange(len(table))}, None, None, info, texts, [(source.path, 0, start)], ids, [])


def read_files(
    files: list[Any], read: Callable[[Any], np.ndarray], dtype: type, settings: list | None = None
) -> tuple[_cache.Arrays, dict[int, str]]:
    """What `read` gives of each file, and what is wrong with bad ones (its UserError) by row; they are empty.

    With settings it is memory-mapped from a cache keyed by them and by the names, sizes and times of the files.
    """

    def attempt(file: Any) -> np.ndarray | str:
        try:
            if file is None:
                raise UserError("names no file")
            if isinstance(file, Path) and not file.exists():
                raise UserError(f"{file}: no such file")
            return read(file)
        except UserError as error:
            return str(error)

    def arrays(more: dict[str, Any]) -> Iterator[np.ndarray]:
        more["bad"] = []
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoders let other threads run
            for start in range(0, len(files), 256):  # no more than 256 wait in memory
                for row, found in enumerate(pool.map(attempt, files[start : start + 256]), start):
                    if isinstance(found, str):
                        more["bad"].append((row, found))
                    yield np.empty(0, dtype) if isinstance(found, str) else found

    key = ""
    if settings:
        facts = [
            (str(file), file.stat().st_size, file.stat().st_mtime_ns, os.access(file, os.R_OK)) if file and file.exists() else str(file)
            for file in files
        ]
        key = _cache.key_of("files", settings, [repr(facts).encode()])
    found = _cache.packed(arrays, dtype, key)
    return found, dict(found.more["bad"])


def first(files: Iterable[Any], read: Callable[[Any], Any]) -> Any:
    """What `read` gives of the first file that can be read; None where none can."""
    for file in files:
        with contextlib.suppress(UserError):
            if file is not None:
                return read(file)
    return None


def shares(positions: Tensor, seed: int, count: int) -> np.ndarray:
    """float64 [b, count] in [0, 1): random numbers as a pure function of (seed, position), by the SplitMix64 hash."""
    state = positions.numpy().astype(np.uint64)[:, None] * np.uint64(count) + np.arange(count, dtype=np.uint64)
    # The seed is hashed: added as it is, seed `count` would be seed 0 of the next position.
    start = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=8).digest())
    for constant in (start, 1):
        state = (state + np.uint64(constant)) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)) / 2.0**53

"""Tables whose rows name files (images, sounds, signals), and what was read from those files, kept memory-mapped."""

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data import Info, Rows, _cache
from data.table import Files, Samples, batch_target, read_samples
from engine.config import UserError, suggestion


class Config(Files):
    on_bad: Literal["error", "skip"] = "error"
    """what becomes of a row whose file is missing or damaged: the end with the row named, or a row less, and a count"""


@dataclass
class Listing:
    """All n rows, those of the training file first."""

    texts: dict[str, list[str | None]]
    """the wanted columns"""
    folders: list[Path]
    """where each row's relative paths start: at its table"""
    where: list[str]
    """table and row, for messages"""
    rows: dict[str, np.ndarray]
    """int64 rows of each part, ascending; of a file to predict there is one part, "input\""""
    info: Info
    target: Tensor | None
    """[n], as in a batch"""
    samples: Samples | None = None
    """of training files"""
    ids: dict[str, list] = field(default_factory=dict)
    """of a file to predict"""
    notes: list[str] = field(default_factory=list)

    def files(self, column: str) -> list[Path | None]:
        return [folder / name if name else None for folder, name in zip(self.folders, self.texts[column], strict=True)]

    def skip(self, bad: dict[int, str], on_bad: str) -> None:
        """Leave out bad rows, and note how many. Raises UserError for the first one unless they are to be skipped, or if none is left."""
        lines = [f"{self.where[row]}: {why}" for row, why in sorted(bad.items())]
        if not lines:
            return
        if on_bad == "error":
            more = f" ({len(lines) - 1:,} more rows are bad)" if len(lines) > 1 else ""
            raise UserError(f'{lines[0]}{more}; correct it, or leave such rows out with data.on_bad = "skip"')
        self.rows = {part: np.setdiff1d(rows, list(bad)) for part, rows in self.rows.items()}
        for part, rows in self.rows.items():
            if not len(rows) and part != "input":
                raise UserError(f"data.{part}: every row is bad; the first is {lines[0]}")
        self.notes.append(f"skipped {len(lines):,} bad rows; the first is {lines[0]}")

    def input(self, dataset: Dataset) -> Rows:
        """A file to predict. It has no other place for its notes than the screen."""
        for note in self.notes:
            print(note, file=sys.stderr)
        kept = self.rows["input"]
        return Rows(dataset, {name: [ids[row] for row in kept] for name, ids in self.ids.items()}, self.target is not None)


class Part(Dataset):
    """Rows of one part of a listing; a subclass adds to `labels` what was read from the rows' files."""

    def __init__(self, listing: Listing, part: str, config: Config) -> None:
        self.index, self.target, self.config = listing.rows[part], listing.target, config
        self.sample_weights = listing.samples.part_weights(part, config.balance) if listing.samples else None
        self.weights = None if self.sample_weights is None else self.weights_of

    def __len__(self) -> int:
        return len(self.index)

    def rows(self, positions: Tensor) -> np.ndarray:
        return self.index[positions.numpy() % len(self)]

    def weights_of(self, indices: Tensor) -> Tensor:
        return self.sample_weights[torch.from_numpy(self.rows(indices))]

    def labels(self, rows: np.ndarray) -> dict[str, Tensor]:
        return {} if self.target is None else {"target": self.target[torch.from_numpy(rows)]}


def read(config: Config, kind: str, wanted: dict[str, str], sources: dict[str, Any] | None = None) -> Listing:
    """The rows of the training files. `wanted` are columns by the key that names them. Raises UserError."""
    import pyarrow as pa

    sources, notes = sources or config.sources(), []
    for source in sources.values():
        for key, name in (wanted | {key: getattr(config, key) for key in ("target", "group", "weight")}).items():
            if name and name not in source.names:
                raise UserError(f"data.{key} = {name!r}: {source.path} has no such column{suggestion(name, source.names)}")
    samples = read_samples(sources, config, kind, notes)
    texts: dict[str, list] = {name: [] for name in wanted.values()}
    folders, where = [], []
    for source in sources.values():
        for name in texts:
            texts[name] += source.column(name).cast(pa.string()).to_pylist()
        size = len(source.column(config.target))
        folders += [source.path.parent] * size
        where += [f"{source.path}: row {row + 1}" for row in range(size)]
    return Listing(texts, folders, where, samples.rows, samples.info, batch_target(samples.target, samples.info), samples, notes=notes)


def chunks(source: Any, config: Config, info: Any, wanted: list[str], count: int) -> Iterator[Listing]:
    """A table to predict, `count` rows at a time; its target is optional. Raises UserError for a column that it lacks."""
    import pyarrow as pa

    from data import _columns

    for name in wanted:
        if name not in source.names:
            raise UserError(f"{source.path}: has no column {name!r}, which the run was trained with{suggestion(name, source.names)}")
    start = 0
    for batch in source.batches([name for name in source.names if name in {*wanted, config.target, config.id}], count):
        texts = {name: batch.column(name).cast(pa.string()).to_pylist() for name in wanted}
        target = None
        if config.target in batch.column_names:
            known = _columns.known_target(batch.column(config.target), f"{source.path}: column {config.target!r}", info, start)
            target = batch_target(known, info)
        rows = np.arange(len(batch))
        ids = {config.id: batch.column(config.id).to_pylist()} if config.id in batch.column_names else {"row": (rows + start).tolist()}
        where = [f"{source.path}: row {start + row + 1}" for row in rows]
        yield Listing(texts, [source.path.parent] * len(batch), where, {"input": rows}, info, target, ids=ids)
        start += len(batch)


@dataclass
class Arrays:
    """Arrays of the rows, flat, one after the other; a bad row's is empty."""

    values: np.ndarray
    starts: np.ndarray  # int64 [n + 1]
    bad: dict[int, str]

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.starts[row] : self.starts[row + 1]]


def read_all(count: int, read_row: Callable[[int], np.ndarray]) -> Iterator[np.ndarray | str]:
    """Each row's array, or what is wrong with it, in order; by threads, since decoders let other threads run."""

    def attempt(row: int) -> np.ndarray | str:
        try:
            return read_row(row)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, count, 256):  # no more than 256 wait in memory
            yield from pool.map(attempt, range(start, min(start + 256, count)))


def gathered(count: int, dtype: type, read_row: Callable[[int], np.ndarray]) -> Arrays:
    """What `read_row` gives of each row, in memory."""
    found = list(read_all(count, read_row))
    bad = {row: why for row, why in enumerate(found) if isinstance(why, str)}
    arrays = [np.empty(0, dtype) if row in bad else np.asarray(array, dtype).ravel() for row, array in enumerate(found)]
    return Arrays(np.concatenate(arrays), np.cumsum([0, *map(len, arrays)]), bad)


def cached(settings: list, files: list[Path | None], dtype: type, read_row: Callable[[int], np.ndarray]) -> Arrays:
    """As `gathered`, memory-mapped from a cache keyed by these settings and by the names, sizes and times of the files."""

    def write(folder: Path) -> None:
        starts, bad = [0], []
        with open(folder / "values", "wb") as values:
            for row, found in enumerate(read_all(len(files), read_row)):
                if isinstance(found, str):
                    bad.append(f"{row} {found}")
                else:
                    np.asarray(found, dtype).tofile(values)
                starts.append(values.tell() // np.dtype(dtype).itemsize)
            values.write(bytes(8))  # an empty file could not be mapped
        np.save(folder / "starts.npy", np.array(starts))
        (folder / "bad").write_text("\0".join(bad))

    facts = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) if file and file.exists() else str(file) for file in files]
    folder = _cache.kept(_cache.key_of(settings, [repr(facts).encode()]), write)
    lines = [line.partition(" ") for line in (folder / "bad").read_text().split("\0") if line]
    starts = np.load(folder / "starts.npy")
    values = np.memmap(folder / "values", dtype, "r", shape=(int(starts[-1]),))
    return Arrays(values, starts, {int(row): why for row, _, why in lines})


def shares(positions: Tensor, seed: int, count: int) -> np.ndarray:
    """float64 [b, count] in [0, 1): random numbers as a pure function of (seed, position), by the SplitMix64 hash."""
    state = positions.numpy().astype(np.uint64)[:, None] * np.uint64(count) + np.arange(count, dtype=np.uint64)
    for constant in (seed, 0):
        state = (state + np.uint64(constant + 1)) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)) / 2.0**53

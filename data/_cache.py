"""Arrays that are computed once, kept on the disk and memory-mapped by all who want them: other runs, ranks and reading processes."""

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def folder() -> Path:
    return Path(os.environ.get("PLAINLOOP_CACHE") or Path(os.environ.get("PLAINLOOP_RUNS") or "runs", "cache"))


def key_of(what: str, settings: Any, contents: Iterable[Any] = ()) -> str:
    """A name for what follows from plain settings and from contents (buffers of bytes)."""
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
    for content in contents:
        digest.update(hashlib.blake2b(content, digest_size=16).digest())
    return f"{what}-{digest.hexdigest()}"


def kept(key: str, write: Callable[[Path], None]) -> Path:
    """The folder of a key. The first to want it has `write` fill it, aside and renamed when whole; others wait for that."""
    place = folder() / key
    if not place.exists():
        folder().mkdir(parents=True, exist_ok=True)
        with open(folder() / f".{key}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not place.exists():
                aside = folder() / f".{key}.tmp"
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir()
                write(aside)
                os.rename(aside, place)
                os.unlink(lock.name)
    return place


@dataclass
class Arrays:
    """Arrays of rows, [length, ...], end to end in one."""

    values: np.ndarray
    starts: np.ndarray  # int64 [n + 1]: row i is values[starts[i] : starts[i + 1]]
    more: dict[str, Any]  # JSON: what else was found
    pad: float = 0

    def padded(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """[b, t, ...] and bool [b, t], True where there is something; t is of the longest, in eights."""
        starts, sizes = self.starts[rows], self.starts[rows + 1] - self.starts[rows]
        columns = np.arange(-(-max(int(sizes.max()), 1) // 8) * 8)
        values = self.values[np.minimum(starts[:, None] + columns, len(self.values) - 1)]
        values[columns >= sizes[:, None]] = self.pad
        # Of an empty row one place of padding counts: a softmax over nothing is NaN.
        return torch.from_numpy(values), torch.from_numpy(columns < np.maximum(sizes, 1)[:, None])


def packed(read: Callable[[dict[str, Any]], Iterable[np.ndarray]], dtype: type, key: str = "") -> Arrays:
    """The arrays that `read(more)` yields, one a row, all of one shape [length, ...] or empty; it may leave JSON in `more`.

    With a key they are rows of an Arrow file that is memory-mapped, and read only where its folder is not there yet.
    """
    if not key:
        more: dict[str, Any] = {}
        arrays = [np.asarray(array, dtype) for array in read(more)]
        values = np.concatenate([array for array in arrays if len(array)] or [np.empty(0, dtype)])
        return Arrays(values, np.cumsum([0, *map(len, arrays)]), more)

    import pyarrow as pa  # it takes a while, which --help need not wait for

    def write(folder: Path) -> None:
        more, starts, shape = {}, [0], []
        with open(folder / "values", "wb") as values:
            for array in read(more):
                np.asarray(array, dtype).tofile(values)
                starts.append(starts[-1] + len(array))
                shape = list(array.shape[1:]) or shape
        # One batch, so that a row is found without knowing which batch it is in; its values pass through the map, not through memory.
        values = pa.py_buffer(np.memmap(folder / "values", dtype, "r")) if starts[-1] else pa.py_buffer(b"")
        flat = pa.Array.from_buffers(pa.from_numpy_dtype(dtype), starts[-1] * math.prod(shape), [None, values])
        lists = pa.LargeListArray.from_arrays(pa.array(np.array(starts) * math.prod(shape)), flat)
        batch = pa.record_batch({"rows": lists}).replace_schema_metadata({"about": json.dumps({"shape": shape, "more": more})})
        with pa.ipc.new_file(folder / "rows.arrow", batch.schema) as file:
            file.write_batch(batch)
        (folder / "values").unlink()

    batch = pa.ipc.open_file(pa.memory_map(str(kept(key, write) / "rows.arrow"))).get_batch(0)
    rows, told = batch.column("rows"), json.loads(batch.schema.metadata[b"about"])
    shape = told["shape"]
    return Arrays(rows.values.to_numpy().reshape(-1, *shape), rows.offsets.to_numpy() // math.prod(shape), told["more"])

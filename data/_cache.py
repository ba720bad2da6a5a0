"""Arrays that are computed once, kept on the disk and memory-mapped by all who want them: other runs, ranks and reading processes."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np


def folder() -> Path:
    return Path(os.environ.get("PLAINLOOP_CACHE") or Path(os.environ.get("PLAINLOOP_RUNS") or "runs", "cache"))


def key_of(settings: Any, contents: Iterable[Any] = ()) -> str:
    """A name for what follows from plain settings and from contents (buffers of bytes)."""
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
    for content in contents:
        digest.update(hashlib.blake2b(content, digest_size=16).digest())
    return digest.hexdigest()


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


def mapped(path: Path) -> np.ndarray:
    """A .npy file as a read-only array that takes no memory of its own."""
    return np.load(path, mmap_mode="r")

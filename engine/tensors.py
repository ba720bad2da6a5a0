"""Tensors in files: safetensors written as a stream, hashed on the way, and read by ranges."""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in NAMES.items()}
CHUNK = 1 << 24  # bytes; hashing large chunks releases the interpreter to the training thread


class TensorWriter:
    """One safetensors file: shapes first, then the tensors in that order, so that only one is in memory at a time."""

    def __init__(self, path: Path, specs: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: dict[str, str] | None = None):
        header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        offset = 0
        for name, (dtype, shape) in specs.items():
            end = offset + nbytes(dtype, shape)
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.specs = dict(specs)
        self.expected = iter(specs)
        self.hash = hashlib.sha256()
        self.bytes = 0
        self.file = open(path, "wb")
        self._put(memoryview(len(text).to_bytes(8, "little") + text))

    def write(self, name: str, tensor: torch.Tensor) -> None:
        assert name == next(self.expected), f"{name} is out of turn"
        assert (tensor.dtype, tuple(tensor.shape)) == (self.specs[name][0], tuple(self.specs[name][1])), name
        if tensor.numel():
            self._put(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))

    def _put(self, view: memoryview) -> None:
        for start in range(0, len(view), CHUNK):
            self.hash.update(view[start : start + CHUNK])
            self.file.write(view[start : start + CHUNK])
        self.bytes += len(view)

    def close(self) -> dict[str, Any]:
        """Bring the file to the disk. Returns its entry for a manifest."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return {"bytes": self.bytes, "sha256": self.hash.hexdigest()}


def nbytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    return math.prod(shape) * dtype.itemsize


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    tensors = dict(sorted(tensors.items()))  # an optimizer's state comes back in another order
    writer = TensorWriter(path, {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()})
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    return writer.close()


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_folder(folder: Path) -> None:
    """A rename is on the disk only when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


class StoredTensors:
    """Tensors by name from several files. Those in `shapes` lie in equal flat pieces, one a file, padded at the end."""

    def __init__(self, files: Sequence[Path], shapes: Mapping[str, Sequence[int]]):
        self.shapes = shapes
        self.places: dict[str, list[Any]] = {}
        for path in files:
            file = safe_open(path, framework="pt")
            for name in file.keys():
                self.places.setdefault(name, []).append(file)

    def spec(self, name: str) -> tuple[torch.dtype, Sequence[int]]:
        """dtype and true shape, without reading the tensor."""
        part = self.places[name][0].get_slice(name)
        return DTYPES[part.get_dtype()], self.shapes[name] if name in self.shapes else part.get_shape()

    def full(self, name: str) -> torch.Tensor:
        if name not in self.shapes:
            return self.places[name][0].get_tensor(name)
        flat = torch.cat([file.get_tensor(name) for file in self.places[name]])
        return flat[: math.prod(self.shapes[name])].reshape(self.shapes[name])

    def piece(self, name: str, rank: int, processes: int) -> torch.Tensor:
        """This rank's flat piece, zero-padded to ceil(elements / processes)."""
        if name in self.shapes and len(self.places[name]) == processes:
            return self.places[name][rank].get_tensor(name)
        flat = self.full(name).reshape(-1)
        size = math.ceil(flat.numel() / processes)
        return torch.nn.functional.pad(flat[rank * size : (rank + 1) * size], (0, max(0, size - max(0, flat.numel() - rank * size))))

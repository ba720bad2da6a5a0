"""Images: a folder for each class, a table of paths and labels, or the 8 x 8 digits that come with scikit-learn.

Every image is decoded once, scaled, and kept as bytes in a memory-mapped cache; a batch is one indexing of it. Flips, crops and
jitter of the training part are a pure function of (seed, epoch, index).
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic
import torch
from pydantic import Field
from torch import Tensor

from data import Info, Rows, Splits, _listing
from engine.config import UserError

ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


class Config(_listing.Config):
    train: str = ""
    """folder with a folder of images for each class, or a table whose rows name images; empty: the digits of scikit-learn"""
    file: str = "path"
    """column of the images' files"""
    target: str = "label"
    """column to predict"""
    size: int = Field(0, ge=0)
    """pixels a side, to which the shorter side is scaled before the middle is cut out; 0: the shorter side of the first image"""
    colour: Literal["auto", "grey", "rgb"] = "auto"
    """channels kept; "auto": those of the first image"""
    flip: float = Field(0.0, ge=0, le=1)
    """share of training images that are mirrored left to right"""
    crop: int = Field(0, ge=0)
    """most pixels by which a training image is shifted, up or down and to a side; its edge is repeated"""
    jitter: float = Field(0.0, ge=0, le=1)
    """largest relative change of a training image's brightness and contrast"""
    augment_seed: int = Field(0, ge=0, lt=2**63)
    """seed of flips, crops and jitter"""

    @pydantic.model_validator(mode="after")
    def parts_need_a_training_folder(self) -> "Config":
        if not self.train and (self.valid or self.test):
            raise ValueError("valid and test are of no use without train; name the training folder or table too")
        return self


class Images(_listing.Part):
    """A batch: "image" float32 [b, channels, size, size] in [0, 1], and "target"."""

    def __init__(self, listing: _listing.Listing, part: str, config: Config, pixels: _listing.Arrays, shape: list[int]) -> None:
        super().__init__(listing, part, config)
        self.pixels, self.augment = pixels.values.reshape(-1, *shape), part == "train"
        self.places = pixels.starts // math.prod(shape)  # not the rows, since a bad one has no pixels

    def __getitems__(self, positions: Tensor) -> dict[str, Tensor]:
        rows = self.rows(positions)
        image = self.pixels[self.places[rows]]
        if self.augment:
            image = augmented(image, positions, self.config)
        return {"image": torch.from_numpy(image).float() / 255, **self.labels(rows)}


def augmented(image: np.ndarray, positions: Tensor, config: Config) -> np.ndarray:
    """Mirrored, shifted and jittered [b, channels, size, size], one way for each (seed, position)."""
    random, places = _listing.shares(positions, config.augment_seed, 5), np.arange(image.shape[-1])
    shift = np.floor(random[:, :2] * (2 * config.crop + 1)).astype(np.int64) - config.crop
    down, across = (np.clip(places + shift[:, [axis]], 0, places[-1]) for axis in (0, 1))
    across = np.where(random[:, 2:3] < config.flip, across[:, ::-1], across)
    count, channels = image.shape[:2]
    image = image[np.arange(count)[:, None, None, None], np.arange(channels)[:, None, None], down[:, None, :, None], across[:, None, None, :]]
    if config.jitter:
        contrast, brightness = (1 + config.jitter * (2 * random[:, place, None, None, None] - 1) for place in (3, 4))
        middle = image.mean((1, 2, 3), keepdims=True)
        image = np.clip(middle * brightness + (image - middle) * contrast, 0, 255).astype(np.float32)
    return image


def open_images(path: Path, key: str, config: Config) -> Any:
    """A table (data._files.Source) of image files: of a folder, each labelled with the name of the folder it lies in, or as it is."""
    import pyarrow as pa

    from data._files import Source, open_source

    if not path.is_dir():
        return open_source(path, key, config.separator, config.encoding, config.quote)
    files = sorted(file.relative_to(path) for file in path.rglob("*") if file.suffix.lower() in ENDINGS)
    if not files:
        raise UserError(f"{key} = {str(path)!r}: no image lies in this folder; known endings: {' '.join(sorted(ENDINGS))}")
    columns = {config.file: [str(file) for file in files]}
    if all(len(file.parts) > 1 for file in files):
        columns[config.target] = [file.parts[0] for file in files]
    elif key != "--input":
        raise UserError(f"{key} = {str(path)!r}: {files[0]} lies in no folder of a class; move it into one, or give a table of paths and labels")
    return Source(path / "folder", [*columns], table=pa.table(columns))


def bundled(config: Config) -> tuple[Any, np.ndarray]:
    """The digits as a table, and their pixels [n, 8, 8]."""
    import pyarrow as pa
    from sklearn.datasets import load_digits

    from data._files import Source

    bunch = load_digits()
    columns = {config.file: [str(row) for row in range(len(bunch.target))], config.target: bunch.target}
    return Source(Path("digits"), [*columns], table=pa.table(columns)), (bunch.images * 255 / 16).round().astype(np.uint8)


def decode(source: Path | np.ndarray | None, shape: list[int] | None = None) -> np.ndarray:
    """uint8 [channels, size, size]; without such a shape that of the image. Raises UserError."""
    from PIL import Image, ImageOps

    if source is None:
        raise UserError("names no image")
    try:
        with Image.fromarray(source) if isinstance(source, np.ndarray) else Image.open(source) as image:
            image = ImageOps.exif_transpose(image)
            image = image.convert("L" if (shape[0] == 1 if shape else image.mode in ("1", "L", "LA", "I;16")) else "RGB")
            pixels = np.asarray(ImageOps.fit(image, (shape[1] if shape else min(image.size),) * 2, Image.Resampling.BILINEAR))
    except FileNotFoundError:
        raise UserError(f"{source}: no such file") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{source}: cannot be read as an image ({str(error).replace(repr(str(source)), 'it')})") from None
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def load(config: Config, kind: str = "auto") -> Splits:
    images: Any = None
    if config.train:
        names = {"train": config.train, "valid": config.valid, "test": config.test}
        tables = {part: open_images(config.path(name), f"data.{part}", config) for part, name in names.items() if name}
    else:
        table, images = bundled(config)
        tables = {"train": table}
    listing = _listing.read(config, kind, {"file": config.file}, tables)
    files = listing.files(config.file)
    shape = first_shape(files if images is None else images, config)
    if images is None:
        pixels = _listing.cached(["images", *shape], files, np.uint8, lambda row: decode(files[row], shape))
        listing.skip(pixels.bad, config.on_bad)
    else:
        pixels = _listing.gathered(len(images), np.uint8, lambda row: decode(images[row], shape))
    info = dataclasses.replace(listing.info, more={"image": shape})
    parts = {part: Images(listing, part, config, pixels, shape) for part in listing.rows}
    return Splits(parts["train"], parts["valid"], parts.get("test"), info, {"image": shape}, listing.notes)


def first_shape(images: Any, config: Config) -> list[int]:
    """[channels, size, size] of the settings, or of the first image that can be read."""
    channels, size = {"auto": 0, "grey": 1, "rgb": 3}[config.colour], config.size
    for image in images:
        if channels and size:
            break
        with contextlib.suppress(UserError):
            shape = decode(image).shape
            channels, size = channels or shape[0], size or shape[1]
    return [channels or 3, size or 8, size or 8]


def read_rows(path: str | Path, config: Config, preprocessing: dict[str, Any], info: Info, chunk_rows: int = 4096) -> Iterator[Rows]:
    """A table or a folder of images to predict, at most 4,096 decoded at a time."""
    shape = preprocessing["image"]
    for listing in _listing.chunks(open_images(Path(path), "--input", config), config, info, [config.file], min(chunk_rows, 4096)):
        files = listing.files(config.file)
        pixels = _listing.gathered(len(files), np.uint8, lambda row, files=files: decode(files[row], shape))
        listing.skip(pixels.bad, config.on_bad)
        if len(listing.rows["input"]):
            yield listing.input(Images(listing, "input", config, pixels, shape))

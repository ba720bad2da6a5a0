"""Images: a folder for each class, a table of paths and labels, or the 8 x 8 digits that come with scikit-learn.

Every image is decoded once, scaled, and kept as bytes in a memory-mapped cache; a batch is one indexing of it. Flips, crops and
jitter of the training part are a pure function of (seed, epoch, index).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic
import torch
from pydantic import Field
from torch import Tensor

from data import Info, Rows, Splits, _cache, _listing
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

    def open(self, path: str | Path, key: str = "--input") -> Any:
        """A table of image files, or a folder of them as such a table (data._files.Source), with the folder that each lies in as its label."""
        folder = Path(path)
        if not folder.is_dir():
            return super().open(path, key)
        files = sorted(file.relative_to(folder) for file in folder.rglob("*") if file.suffix.lower() in ENDINGS)
        if not files:
            raise UserError(f"{key} = {str(path)!r}: no image lies in this folder; known endings: {' '.join(sorted(ENDINGS))}")
        columns = {self.file: [str(file) for file in files]}
        if all(len(file.parts) > 1 for file in files):
            columns[self.target] = [file.parts[0] for file in files]
        elif key != "--input":
            raise UserError(f"{key} = {str(path)!r}: {files[0]} lies in no folder of a class; move it into one, or give a table of paths and labels")
        return in_memory(folder / "folder", columns)


class Images(_listing.Part):
    """A batch: "image" float32 [b, channels, size, size] in [0, 1], and "target"."""

    def __init__(self, listing: _listing.Listing, part: str, config: Config, pixels: _cache.Arrays) -> None:
        super().__init__(listing, part, config)
        self.pixels, self.config, self.augment = pixels, config, part == "train"

    def __getitems__(self, positions: Tensor) -> dict[str, Tensor]:
        image = self.pixels.values[self.pixels.starts[self.rows(positions).numpy()]]  # not of the rows themselves, since a bad one has no pixels
        if self.augment:
            image = augmented(image, positions, self.config)
        return {"image": torch.from_numpy(image).float() / 255, **super().__getitems__(positions)}


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


def in_memory(path: Path, columns: dict[str, Any]) -> Any:
    import pyarrow as pa

    from data._files import Source

    return Source(path, [*columns], table=pa.table(columns))


def decode(source: Path | np.ndarray, shape: list[int] | None = None) -> np.ndarray:
    """uint8 [1, channels, size, size]; without such a shape that of the image. Raises UserError."""
    from PIL import Image, ImageOps

    try:
        with Image.fromarray(source) if isinstance(source, np.ndarray) else Image.open(source) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):  # convert() would cut off what is above 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image = image.convert("L" if (shape[0] == 1 if shape else image.mode in ("1", "L", "LA")) else "RGB")
            pixels = np.asarray(ImageOps.fit(image, (shape[1] if shape else min(image.size),) * 2, Image.Resampling.BILINEAR))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{source}: cannot be read as an image ({str(error).replace(repr(str(source)), 'it')})") from None
    return pixels[None, None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)[None]


def load(config: Config, kind: str = "auto") -> Splits:
    """Raises UserError for what is wrong with the files."""
    sources, images = None, []
    if not config.train:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = list((digits.images * 255 / 16).round().astype(np.uint8))
        sources = {"train": in_memory(Path("digits"), {config.file: list(map(str, range(len(images)))), config.target: digits.target})}
    listing = _listing.read(config, kind, {"file": config.file}, sources)
    images = images or listing.files(config.file)
    channels, size = {"auto": 0, "grey": 1, "rgb": 3}[config.colour], config.size
    if not channels or not size:
        found = _listing.first(images, decode)
        _, first_channels, side, _ = (1, 3, 8, 8) if found is None else found.shape
        channels, size = channels or first_channels, size or side
    shape = [channels, size, size]
    pixels = read_pixels(listing, images, config, shape, cache=bool(config.train))
    return listing.splits(Images, config, pixels, more={"image": shape})


def read_pixels(listing: _listing.Listing, images: list, config: Config, shape: list[int], cache: bool) -> _cache.Arrays:
    """uint8 [n, channels, size, size] in all. Bad rows are left out of the parts."""
    pixels, bad = _listing.read_files(images, lambda image: decode(image, shape), np.uint8, ["images", *shape] if cache else None)
    listing.skip(bad, config.on_bad)
    return pixels


def read_rows(path: str | Path, config: Config, preprocessing: dict[str, Any], info: Info, chunk_rows: int = 4096) -> Iterator[Rows]:
    """A table or a folder of images to predict, at most 4,096 decoded at a time."""
    for listing in _listing.chunks(config.open(path), config, info, [config.file], min(chunk_rows, 4096)):
        pixels = read_pixels(listing, listing.files(config.file), config, info.more["image"], cache=False)
        yield from listing.new(Images, config, pixels)

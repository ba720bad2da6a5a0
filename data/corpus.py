"""Running text in blocks of equal length, for language models: text files, or the text column of tables.

Documents are cut into tokens once and packed end to end into a memory-mapped file; a block begins where the one before it ends.
"""

import glob
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import Dataset

from data import Info, Rows, Splits, _tokenizer
from engine.config import UserError

CHUNK = 1_000_000  # characters that are tokenized at a time, at least


class Config(_tokenizer.Tokenizing):
    train: list[str]
    """text files, by name or pattern ("books/**/*.txt"), a document each; or tables (CSV, JSONL, Parquet), a document a row"""
    valid: list[str] = []
    """validation files; empty: the last valid_fraction of the training files' blocks"""
    test: list[str] = []
    """test files; empty: test_fraction of the training files' blocks, those before the validation's"""
    text: str = ""
    """column of the texts, where files are tables"""
    encoding: str = "utf-8"
    """of text files and CSVs"""
    valid_fraction: float = Field(0.05, gt=0, lt=0.5)
    """share of the training files for validation, where valid is empty"""
    test_fraction: float = Field(0.05, ge=0, lt=0.5)
    """share of the training files for the test, where test is empty; 0 = no test"""
    block: int = Field(256, ge=2)
    """tokens of a sample"""


class Blocks(Dataset):
    """Some blocks of packed tokens. A batch: "tokens" int64 [b, block + 1], of which the last is only predicted;
    "target" int64 [b], how many are predicted: fewer than `block` at the end of the text, where the rest is filled."""

    def __init__(self, tokens: np.ndarray, block: int, blocks: range) -> None:
        self.tokens, self.tokens_per_sample, self.blocks = tokens, block, blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def weights(self, indices: Tensor) -> Tensor:
        """Tokens predicted, float32 [b]: a loss is a mean over tokens."""
        starts = (indices + self.blocks.start) * self.tokens_per_sample
        return (len(self.tokens) - 1 - starts).clamp(max=self.tokens_per_sample).float()

    def __getitems__(self, positions: Tensor) -> dict[str, Tensor]:
        indices = positions % len(self)
        places = (indices.numpy()[:, None] + self.blocks.start) * self.tokens_per_sample + np.arange(self.tokens_per_sample + 1)
        tokens = self.tokens[np.minimum(places, len(self.tokens) - 1)].astype(np.int64)
        return {"tokens": torch.from_numpy(tokens), "target": self.weights(indices).long()}


def load(config: Config, kind: str = "auto") -> Splits:
    """Blocks for a model of the kind "language". Raises UserError for what is wrong with the files."""
    given = {part: paths(config, part) for part in ("train", "valid", "test") if getattr(config, part)}
    files = _tokenizer.made(config, lambda: chunks(documents(given["train"], config)))
    tokenizer = _tokenizer.opened(files["tokenizer.json"])
    packed = {part: _tokenizer.tokens(tokenizer, lambda found=found: chunks(documents(found, config))).values for part, found in given.items()}
    blocks = {part: range(blocks_of(tokens, config.block)) for part, tokens in packed.items()}
    for part, share in (("valid", config.valid_fraction), ("test", config.test_fraction)):
        if part not in given and share:
            size = max(1, round(share * blocks_of(packed["train"], config.block)))
            packed[part], blocks[part], blocks["train"] = packed["train"], blocks["train"][-size:], blocks["train"][:-size]
    parts = {part: Blocks(packed[part], config.block, blocks[part]) for part in ("train", "valid", "test") if part in blocks}
    for part, dataset in parts.items():
        if not len(dataset):
            raise UserError(f"data.{part}: too little text for a block of data.block = {config.block} tokens; give more files or a smaller block")
    info = Info("language", 1, more=_tokenizer.facts(files) | {"max_length": config.block})
    notes = [f"{part}: {len(dataset):,} blocks of {config.block} tokens" for part, dataset in parts.items()]
    return Splits(parts["train"], parts["valid"], parts.get("test"), info, {}, notes, files)


def blocks_of(tokens: np.ndarray, block: int) -> int:
    return -(-max(0, len(tokens) - 1) // block)


def paths(config: Config, part: str) -> list[Path]:
    """The files of a part, in order of their names. Raises UserError where a pattern has none."""
    patterns = [os.path.join(glob.escape(config.root), pattern) for pattern in getattr(config, part)]
    found = [sorted(path for path in map(Path, glob.iglob(pattern, recursive=True)) if path.is_file()) for pattern in patterns]
    if [] in found:
        raise UserError(f"data.{part}: no file is named {getattr(config, part)[found.index([])]!r} in {config.root}; correct it, or data.root")
    return list(dict.fromkeys(itertools.chain(*found)))


def documents(files: list[Path], config: Config) -> Iterator[str]:
    """The texts that are not empty. A file is in memory at a time. Raises UserError for one that is no text."""
    from data._files import open_source

    for path in files:
        if config.text:
            source = open_source(path, "data.train", encoding=config.encoding)
            source.require("text", config.text)
            texts: Any = itertools.chain.from_iterable(batch.column(0).to_pylist() for batch in source.batches([config.text]))
        else:
            try:
                texts = [path.read_text(config.encoding)]
            except (UnicodeDecodeError, LookupError) as error:
                raise UserError(f"{path}: is not {config.encoding} ({error}); set data.encoding, or take it out") from None
            except OSError as error:
                raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        yield from (text for text in texts if text and text.strip())


def chunks(texts: Iterator[str]) -> Iterator[list[str]]:
    """Lists of texts, together at least CHUNK characters each but the last."""
    chunk, size = [], 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def read_rows(path: str | Path, config: Config, preprocessing: dict[str, Any], info: Info, chunk_rows: int = 65536) -> Iterator[Rows]:
    """Blocks of a file's documents, each document by itself: an id is the document's number and the block's. Raises UserError."""
    tokenizer = _tokenizer.opened(Path(preprocessing["folder"], "tokenizer.json").read_text())
    for number, text in enumerate(documents([Path(path)], config)):
        tokens = _tokenizer.tokens(tokenizer, lambda text=text: [[text]], cache=False).values
        whole = range(blocks_of(tokens, config.block))
        for blocks in (whole[first : first + chunk_rows] for first in whole[::chunk_rows]):
            yield Rows(Blocks(tokens, config.block, blocks), {"document": [number] * len(blocks), "block": [*blocks]}, True)

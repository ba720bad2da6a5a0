"""Running text in blocks of equal length, for language models: text files, or the text column of tables.

Documents are cut into tokens once and packed end to end into a memory-mapped file; a block begins where the one before it ends.
"""

import itertools
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
    """Blocks first to last of packed tokens. A batch: "tokens" int64 [b, block + 1], of which the last is only predicted;
    "target" int64 [b], how many are predicted: fewer than `block` at the end of the text, where the rest is filled."""

    def __init__(self, tokens: np.ndarray, block: int, first: int, last: int) -> None:
        self.tokens, self.tokens_per_sample, self.first, self.last = tokens, block, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def weights(self, indices: Tensor) -> Tensor:
        """Tokens predicted, float32 [b]: a loss is a mean over tokens."""
        starts = (indices + self.first) * self.tokens_per_sample
        return (len(self.tokens) - 1 - starts).clamp(max=self.tokens_per_sample).float()

    def __getitems__(self, positions: Tensor) -> dict[str, Tensor]:
        indices = positions % len(self)
        places = (indices.numpy()[:, None] + self.first) * self.tokens_per_sample + np.arange(self.tokens_per_sample + 1)
        tokens = self.tokens[np.minimum(places, len(self.tokens) - 1)].astype(np.int64)
        return {"tokens": torch.from_numpy(tokens), "target": self.weights(indices).long()}


def load(config: Config, kind: str = "auto") -> Splits:
    """Blocks for a model of the kind "language". Raises UserError for what is wrong with the files."""
    given = {part: paths(config, part) for part in ("train", "valid", "test") if getattr(config, part)}
    files = _tokenizer.made(config, lambda: chunks(documents(given["train"], config)))
    packed = {part: _tokenizer.stored(files, 0, lambda found=found: chunks(documents(found, config)))[0] for part, found in given.items()}
    whole = {part: blocks_of(tokens, config.block) for part, tokens in packed.items()}
    count, parts = whole["train"], {}
    for part, share in (("valid", config.valid_fraction), ("test", config.test_fraction)):
        if part not in given and share:
            size = max(1, round(share * whole["train"]))
            parts[part], count = Blocks(packed["train"], config.block, count - size, count), count - size
    parts |= {part: Blocks(tokens, config.block, 0, whole[part] if part != "train" else count) for part, tokens in packed.items()}
    for part, dataset in ((part, parts[part]) for part in ("train", "valid", "test") if part in parts):
        if dataset.last <= max(dataset.first, 0):
            raise UserError(f"data.{part}: too little text for a block of data.block = {config.block} tokens; give more files or a smaller block")
    info = Info("language", 1, more=_tokenizer.facts(files) | {"max_length": config.block})
    notes = [f"{part}: {len(parts[part]):,} blocks of {config.block} tokens" for part in ("train", "valid", "test") if part in parts]
    return Splits(parts["train"], parts["valid"], parts.get("test"), info, {}, notes, files)


def blocks_of(tokens: np.ndarray, block: int) -> int:
    return -(-max(0, len(tokens) - 1) // block)


def paths(config: Config, part: str) -> list[Path]:
    """The files of a part, in order of their names. Raises UserError where a pattern has none."""
    found = [sorted(path for path in Path(config.root).glob(pattern) if path.is_file()) for pattern in getattr(config, part)]
    if [] in found:
        raise UserError(f"data.{part}: no file is named {getattr(config, part)[found.index([])]!r} in {config.root}; correct it, or data.root")
    return list(dict.fromkeys(itertools.chain(*found)))


def documents(files: list[Path], config: Config) -> Iterator[str]:
    """The texts that are not empty. A file is in memory at a time. Raises UserError for one that is no text."""
    from data._files import open_source

    for path in files:
        if config.text:
            source = open_source(path, "data.train", encoding=config.encoding)
            if config.text not in source.names:
                raise UserError(f"data.text = {config.text!r}: {path} has no such column")
            texts: Any = (text for batch in source.batches([config.text]) for text in batch.column(0).to_pylist())
        else:
            try:
                texts = [path.read_text(config.encoding)]
            except (UnicodeDecodeError, LookupError) as error:
                raise UserError(f"{path}: is not {config.encoding} ({error}); set data.encoding, or take it out") from None
            except OSError as error:
                raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        yield from (text for text in texts if text and text.strip())


def chunks(texts: Iterator[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    for text in texts:
        chunk.append(text)
        if sum(map(len, chunk)) >= CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def read_rows(path: str | Path, config: Config, preprocessing: dict[str, Any], info: Info, chunk_rows: int = 65536) -> Iterator[Rows]:
    """Blocks of a file's documents, each document by itself: an id is the document's number and the block's. Raises UserError."""
    tokenizer = _tokenizer.opened(Path(preprocessing["folder"], "tokenizer.json").read_text())
    for number, text in enumerate(documents([Path(path)], config)):
        tokens, _, _ = _tokenizer.encode(tokenizer, [text])
        for first in range(0, blocks_of(tokens, config.block), chunk_rows):
            last = min(first + chunk_rows, blocks_of(tokens, config.block))
            ids = {"document": [number] * (last - first), "block": list(range(first, last))}
            yield Rows(Blocks(tokens, config.block, first, last), ids, True)

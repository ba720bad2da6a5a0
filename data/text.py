"""Texts with a label: CSV, TSV, JSONL or Parquet, one file that is split or a file for each part.

They are cut into tokens once; the tokens lie in memory-mapped files under $PLAINLOOP_CACHE (else runs/cache), named by content and
settings. Batches hold texts of similar length and are padded to their longest.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import Dataset

from data import Info, Rows, Splits, _tokenizer, table
from engine.config import UserError, suggestion

CHUNK = 10_000  # texts that are tokenized at a time


class Config(table.Files, _tokenizer.Tokenizing):
    text: str
    """column of the texts"""
    max_length: int = Field(128, ge=4)
    """most tokens of a text; what is beyond is cut off, and the texts are counted"""
    group_lengths: bool = True
    """training batches of texts of similar length"""
    on_bad: Literal["error", "skip"] = "error"
    """what becomes of an empty text: the end with its row named, or a row less, and a count"""


class Texts(Dataset):
    """Texts of one part. A batch: "tokens" int64 [b, t], "mask" bool [b, t] (True on tokens), "target"; t is of the longest, in eights."""

    def __init__(
        self,
        tokens: np.ndarray,
        offsets: np.ndarray,
        pad: int,
        target: Tensor | None,
        rows: np.ndarray,
        weights: Tensor | None = None,
        group_lengths: bool = True,
    ) -> None:
        """int32 tokens of all texts end to end, int64 [n + 1] where each begins; `rows` are this part's; target and weights [n] are of all."""
        self.tokens, self.pad, self.target = tokens, pad, target
        self.index = torch.from_numpy(rows)
        self.starts = offsets[rows]
        self.sizes = offsets[rows + 1] - self.starts
        self.lengths = torch.from_numpy(self.sizes) if group_lengths else None
        self.sample_weights = weights
        self.weights = None if weights is None else self.weights_of

    def __len__(self) -> int:
        return len(self.index)

    def weights_of(self, indices: Tensor) -> Tensor:
        return self.sample_weights[self.index[indices]]

    def __getitems__(self, positions: Tensor) -> dict[str, Tensor]:
        places = (positions % len(self)).numpy()
        starts, sizes = self.starts[places], self.sizes[places]
        columns = np.arange(-(-max(int(sizes.max()), 1) // 8) * 8)
        tokens = self.tokens[np.minimum(starts[:, None] + columns, len(self.tokens) - 1)]
        tokens = np.where(columns < sizes[:, None], tokens, self.pad).astype(np.int64)
        # A text of which no token is left is one of padding: a softmax over nothing is NaN.
        batch = {"tokens": torch.from_numpy(tokens), "mask": torch.from_numpy(columns < np.maximum(sizes, 1)[:, None])}
        if self.target is not None:
            batch["target"] = self.target[self.index[places]]
        return batch


def load(config: Config, kind: str = "auto") -> Splits:
    """Tokens for a deep model. `kind` is task.kind. Raises UserError for what is wrong with the files."""
    import pyarrow as pa

    sources, notes = config.sources(), []
    for source in sources.values():
        for key in ("text", "target", "group", "weight"):
            if getattr(config, key) not in ("", *source.names):
                name = getattr(config, key)
                raise UserError(f"data.{key} = {name!r}: {source.path} has no such column{suggestion(name, source.names)}")
    samples = table.read_samples(sources, config, kind, notes)
    read = {part: read_texts(source.column(config.text), f"{source.path}: column {config.text!r}", config) for part, source in sources.items()}
    texts, bad = (
        pa.chunked_array([chunk for column, _ in read.values() for chunk in column.chunks]),
        np.concatenate([bad for _, bad in read.values()]),
    )
    for part, rows in samples.rows.items():
        if skipped := int(bad[rows].sum()):
            samples.rows[part] = rows[~bad[rows]]
            notes.append(f"skipped: {skipped:,} rows of {part} with an empty text")
    train = texts.take(pa.array(samples.rows["train"]))
    files = _tokenizer.made(config, lambda: lists(train))
    tokens, offsets, cut = _tokenizer.stored(files, config.max_length, lambda: lists(texts))
    if cut:
        notes.append(f"cut: {cut:,} of {len(texts):,} texts have more than data.max_length = {config.max_length} tokens")
    more = _tokenizer.facts(files) | {"max_length": config.max_length}
    info = dataclasses.replace(samples.info, more=more)
    shared = (tokens, offsets, more["pad"], table.batch_target(samples.target, info))
    weights = {part: samples.part_weights(part, config.balance) for part in samples.rows}
    parts = {part: Texts(*shared, rows, weights[part], config.group_lengths) for part, rows in samples.rows.items()}
    preprocessing = {key: getattr(config, key) for key in ("text", "target", "id", "max_length")}
    return Splits(parts["train"], parts["valid"], parts.get("test"), info, preprocessing, notes, files)


def read_texts(column: Any, where: str, config: Config, start: int = 0) -> tuple[Any, np.ndarray]:
    """A column (pyarrow.ChunkedArray [n]) as texts, and which of them are empty, bool [n]. Raises UserError for what holds no text."""
    import pyarrow as pa
    from pyarrow import compute

    try:
        texts = compute.fill_null(column.cast(pa.string()), "")
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise UserError(f"{where}: holds {column.type}, not texts; set data.text to another column") from None
    bad = compute.equal(compute.utf8_trim_whitespace(texts), "").to_numpy()
    if bad.any() and config.on_bad == "error":
        remedy = 'fill it, remove the row, or set data.on_bad = "skip"'
        raise UserError(f"{where}: the text in row {start + bad.argmax() + 1} is empty; {remedy}")
    return texts, bad


def lists(texts: Any) -> Iterator[list[str]]:
    return (texts.slice(start, CHUNK).to_pylist() for start in range(0, len(texts), CHUNK))


def read_rows(path: str | Path, config: Config, preprocessing: dict[str, Any], info: Info, chunk_rows: int = 65536) -> Iterator[Rows]:
    """A file to predict, in chunks of at most `chunk_rows` rows; the label is optional. Raises UserError."""
    from data import _columns, _files

    source = _files.open_source(Path(path), "--input", config.separator, config.encoding, config.quote)
    text, target, identity = (preprocessing[key] for key in ("text", "target", "id"))
    if text not in source.names:
        raise UserError(f"{path}: has no column {text!r}, which the run was trained with{suggestion(text, source.names)}")
    tokenizer = _tokenizer.opened(Path(preprocessing["folder"], "tokenizer.json").read_text(), preprocessing["max_length"])
    start = 0
    for batch in source.batches([name for name in source.names if name in {text, target, identity}], chunk_rows):
        texts, bad = read_texts(batch.column(text), f"{path}: column {text!r}", config, start)
        tokens, offsets, _ = _tokenizer.encode(tokenizer, texts.to_pylist())
        known = None
        if target in batch.column_names:
            known = table.batch_target(_columns.known_target(batch.column(target), f"{path}: column {target!r}", info, start), info)
        rows = np.flatnonzero(~bad)
        ids = {identity: batch.column(identity).take(rows).to_pylist()} if identity in batch.column_names else {"row": (rows + start).tolist()}
        if len(rows):
            yield Rows(Texts(tokens, offsets, info.more["pad"], known, rows), ids, known is not None)
        start += len(batch)

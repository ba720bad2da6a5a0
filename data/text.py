"""Texts with a label: CSV, TSV, JSONL or Parquet, one file that is split or a file for each part.

They are cut into tokens once; the tokens lie in memory-mapped files under $PLAINLOOP_CACHE (else runs/cache), named by content and
settings. Batches hold texts of similar length and are padded to their longest.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from data import Info, Rows, Splits, _listing, _tokenizer
from engine.config import UserError

CHUNK = 10_000  # texts that are tokenized at a time


class Config(_listing.Config, _tokenizer.Tokenizing):
    text: str
    """column of the texts"""
    max_length: int = Field(128, ge=4)
    """most tokens of a text; what is beyond is cut off, and the texts are counted"""
    group_lengths: bool = True
    """training batches of texts of similar length"""


def load(config: Config, kind: str = "auto") -> Splits:
    """Tokens for a deep model. `kind` is task.kind. Raises UserError for what is wrong with the files."""
    listing = _listing.read(config, kind, {"text": config.text})
    texts = filled(listing, config)
    train = texts.take(listing.rows["train"])
    files = _tokenizer.made(config, functools.partial(lists, train))
    more = _tokenizer.facts(files) | {"max_length": config.max_length}
    tokenizer = _tokenizer.opened(files["tokenizer.json"], config.max_length)
    tokens = _tokenizer.tokens(tokenizer, functools.partial(lists, texts), more["pad"])
    if cut := tokens.more["cut"]:
        listing.notes.append(f"cut: {cut:,} of {len(texts):,} texts have more than data.max_length = {config.max_length} tokens")
    return listing.splits(_listing.Sequences, config, {"tokens": tokens}, more=more, files=files)


def filled(listing: _listing.Listing, config: Config) -> Any:
    """The texts (pyarrow.ChunkedArray [n]). Rows whose text is empty are left out of the parts. Raises UserError unless they may be."""
    from pyarrow import compute

    texts = compute.fill_null(listing.texts[config.text], "")
    bad = compute.equal(compute.utf8_trim_whitespace(texts), "").to_numpy()
    if bad.any() and config.on_bad == "error":
        path, row = listing.place(int(bad.argmax()))
        remedy = 'fill it, remove the row, or set data.on_bad = "skip"'
        raise UserError(f"{path}: column {config.text!r}: the text in row {row} is empty; {remedy}")
    for part, rows in listing.rows.items():
        if skipped := int(bad[rows].sum()):
            listing.rows[part] = rows[~bad[rows]]
            listing.notes.append(f"skipped: {skipped:,} rows of {part} with an empty text")
        if not len(listing.rows[part]) and part != "input":
            raise UserError(f"data.{part}: every text of column {config.text!r} is empty")
    return texts


def lists(texts: Any) -> Iterator[list[str]]:
    return (texts.slice(start, CHUNK).to_pylist() for start in range(0, len(texts), CHUNK))


def read_rows(path: str | Path, config: Config, preprocessing: dict[str, Any], info: Info, chunk_rows: int = 65536) -> Iterator[Rows]:
    """A file to predict, in chunks of at most `chunk_rows` rows; the label is optional. Raises UserError."""
    tokenizer = _tokenizer.opened(Path(preprocessing["folder"], "tokenizer.json").read_text(), config.max_length)
    for listing in _listing.chunks(config.open(path), config, info, [config.text], chunk_rows):
        tokens = _tokenizer.tokens(tokenizer, functools.partial(lists, filled(listing, config)), info.more["pad"], cache=False)
        yield from listing.new(_listing.Sequences, config, {"tokens": tokens})

"""Running text: documents packed into blocks, every token predicted once."""

from pathlib import Path
from typing import Any

import pytest
import torch

from data import Splits, _tokenizer, corpus
from engine.config import UserError, validate


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PLAINLOOP_CACHE", str(tmp_path / "cache"))
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text("".join(f"line {line} of {number}\n" for line in range(40 + number)))
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "rows.csv").write_text("id,words\n" + "".join(f"{row},some words {row}\n" for row in range(50)))
    (tmp_path / "latin.txt").write_bytes("grün".encode("latin-1"))
    return tmp_path


def config(folder: Path, **keys: Any) -> corpus.Config:
    values = {"name": "corpus", "root": str(folder), "train": ["[0-9].txt", "blank.txt"], "block": 32, "tokenizer": "characters", **keys}
    settings, lines = validate("data", corpus.Config, values)
    if lines:
        raise UserError(*lines)
    return settings


def tokens_of(dataset: corpus.Blocks) -> list[int]:
    """What the blocks predict, end to end."""
    batch = dataset.__getitems__(torch.arange(len(dataset)) + 3 * len(dataset))
    assert batch["tokens"].shape == (len(dataset), dataset.tokens_per_sample + 1) and batch["tokens"].dtype == torch.int64
    assert torch.equal(batch["target"].float(), dataset.weights(torch.arange(len(dataset))))
    return [int(token) for row, count in zip(batch["tokens"], batch["target"], strict=True) for token in row[1 : 1 + count]]


def decoded(splits: Splits, tokens: list[int]) -> str:
    return _tokenizer.opened(splits.files["tokenizer.json"]).decode(tokens)


@pytest.mark.parametrize("block", [2, 32, 1000])
def test_every_token_but_the_first_is_predicted_once(folder, block):
    splits = corpus.load(config(folder, block=block))
    found = [token for part in (splits.train, splits.test, splits.valid) for token in tokens_of(part)]
    assert found == splits.train.tokens[1:].tolist()
    assert decoded(splits, found) == "".join((folder / f"{number}.txt").read_text() for number in range(5))
    assert len(splits.valid) == max(1, round(0.05 * sum(map(len, (splits.train, splits.test, splits.valid)))))


def test_parts_may_have_their_own_files(folder):
    splits = corpus.load(config(folder, train=["[0-2].txt"], valid=["3.txt"], test=["rows.csv"]))
    assert decoded(splits, tokens_of(splits.valid)) == (folder / "3.txt").read_text()
    assert decoded(splits, tokens_of(splits.train)) == "".join((folder / f"{number}.txt").read_text() for number in range(3))
    whole = corpus.load(config(folder, train=[str(folder / "[0-2].txt")], valid=["3.txt"], test=["rows.csv"]))
    assert tokens_of(whole.train) == tokens_of(splits.train)
    rows = corpus.load(config(folder, train=["rows.csv"], text="words"))
    assert decoded(rows, rows.train.tokens.tolist()) == "".join(f"some words {row}" for row in range(50))


def test_a_new_file_is_cut_into_blocks_of_its_own(folder):
    settings = config(folder)
    splits = corpus.load(settings)
    (folder / "tokenizer.json").write_text(splits.files["tokenizer.json"])
    chunks = list(corpus.read_rows(folder / "3.txt", settings, {"folder": str(folder)}, splits.info, 10))
    assert all(chunk.labelled and len(chunk.dataset) <= 10 for chunk in chunks)
    assert decoded(splits, [token for chunk in chunks for token in tokens_of(chunk.dataset)]) == (folder / "3.txt").read_text()
    assert [block for chunk in chunks for block in chunk.ids["block"]] == list(range(sum(len(chunk.dataset) for chunk in chunks)))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"train": ["*.md"]}, ["data.train", "'*.md'", "no file"]),
        ({"train": ["[0-9].txt", "latin.txt"]}, ["latin.txt", "utf-8", "data.encoding"]),
        ({"train": ["blank.txt"]}, ["data.train", "too little text"]),
        ({"train": ["rows.csv"], "text": "word"}, ["data.text = 'word'", "no such column"]),
        ({"test": ["blank.txt"]}, ["data.test", "too little text"]),
        ({"tokenizer": "gone/folder"}, ["data.tokenizer = 'gone/folder'"]),
    ],
)
def test_a_mistake_is_said_in_one_line(folder, keys, words):
    with pytest.raises(UserError) as error:
        corpus.load(config(folder, **keys))
    assert len(error.value.lines) == 1
    for word in words:
        assert word in str(error.value)

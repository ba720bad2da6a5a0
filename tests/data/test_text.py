"""Texts: reading, tokens, batches, predicting on new files, and what a user's file may have wrong."""

import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from data import Splits, _cache, _tokenizer, text
from engine.config import UserError, validate
from engine.order import Order
from engine.settings import Plan

REAL = os.environ.get("PLAINLOOP_DATA", "")
WORDS = ["좋아요", "정말 재미있다", "별로", "지루하고 또 지루하다", "best film", "worst"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAINLOOP_CACHE", str(tmp_path / "cache"))


def config(root: Path | str, **keys: Any) -> text.Config:
    values = {"name": "text", "root": str(root), "train": "train.tsv", "target": "y", "text": "review", "tokenizer": "characters", **keys}
    settings, lines = validate("data", text.Config, values)
    if lines:
        raise UserError(*lines)
    return settings


def write(folder: Path, rows: list[tuple[str, str]], name: str = "train.tsv") -> Path:
    (folder / name).write_text("id\treview\ty\n" + "".join(f"{number}\t{one}\t{label}\n" for number, (one, label) in enumerate(rows)))
    return folder / name


def reviews(count: int = 60) -> list[tuple[str, str]]:
    return [(f"{WORDS[number % 6]} {'아' * (number % 11)}", ["pos", "pos", "neg", "neg", "pos", "neg"][number % 6]) for number in range(count)]


def load(root: Path, kind: str = "auto", **keys: Any) -> Splits:
    return text.load(config(root, **keys), kind)


def texts_of(splits: Splits, part: Any) -> list[str]:
    """A part's texts, from its tokens."""
    tokenizer = _tokenizer.opened(splits.files["tokenizer.json"])
    batch = part.__getitems__(torch.arange(len(part)))
    return [tokenizer.decode(row[mask].tolist()) for row, mask in zip(batch["tokens"], batch["mask"], strict=True)]


# Batches


@pytest.mark.parametrize("tokenizer", ["characters", "bpe", "auto"])
def test_tokens_are_the_texts_and_targets_their_labels(tmp_path, tokenizer):
    write(tmp_path, reviews())
    splits = load(tmp_path, tokenizer=tokenizer, vocabulary=100)
    known = {one.strip(): float(label == "pos") for one, label in reviews()}
    seen = 0
    for part in (splits.train, splits.valid, splits.test):
        batch = part.__getitems__(torch.arange(len(part)))
        assert (batch["tokens"].dtype, batch["mask"].dtype, batch["target"].dtype) == (torch.int64, torch.bool, torch.float32)
        assert batch["tokens"].shape == batch["mask"].shape and batch["tokens"].shape[1] % 8 == 0
        for shown, target in zip(texts_of(splits, part), batch["target"].tolist(), strict=True):
            assert known[shown.strip()] == target
            seen += 1
    assert seen == 60
    assert (splits.info.kind, splits.info.labels, splits.info.outputs) == ("binary", ["neg", "pos"], 1)
    assert splits.info.more["vocabulary"] <= 100
    assert json.loads(json.dumps(splits.preprocessing)) == splits.preprocessing


def test_padding_is_masked_and_as_long_as_the_longest_needs(tmp_path):
    write(tmp_path, reviews())
    train = load(tmp_path).train
    for places in torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).split(5):
        batch = train.__getitems__(places + 7 * len(train))  # of a later epoch
        assert batch["tokens"][~batch["mask"]].eq(0).all()
        assert batch["mask"].sum(1).tolist() == train.lengths[places].tolist()
        assert batch["mask"].shape[1] == -(-int(train.lengths[places].max()) // 8) * 8


def test_numbers_are_a_regression(tmp_path):
    write(tmp_path, [(one, f"{number / 7:.3f}") for number, (one, _) in enumerate(reviews())])
    splits = load(tmp_path)
    target = splits.train.__getitems__(torch.arange(len(splits.train)))["target"]
    assert splits.info.kind == "regression" and abs(target.mean()) < 1e-5 and abs(target.std(correction=0) - 1) < 1e-5


def test_weights_of_classes(tmp_path):
    write(tmp_path, reviews(66)[:-2] + [("x", "pos")] * 34)
    train = load(tmp_path, balance="class_weights").train
    target = train.__getitems__(torch.arange(len(train)))["target"]
    weights = train.weights(torch.arange(len(train)))
    assert float(weights[target == 1].sum()) == pytest.approx(float(weights[target == 0].sum()), rel=1e-5)
    assert not hasattr(load(tmp_path).train, "weights")


def test_batches_of_similar_length_are_padded_less(tmp_path):
    generator = np.random.default_rng(0)
    write(tmp_path, [("아" * int(size), ["a", "b"][size % 2]) for size in generator.integers(1, 100, 3000)])

    def padded(**keys: Any) -> float:
        train = load(tmp_path, **keys).train
        batches = [train.__getitems__(places)["mask"] for places, _ in Order(train, len(train), 30, Plan(30, 1, 1), 0).batches(0, 0, 50)]
        return 1 - sum(int(mask.sum()) for mask in batches) / sum(mask.numel() for mask in batches)

    assert padded(group_lengths=True) < 0.1 < 0.3 < padded(group_lengths=False)


# Tokenizers and the cache


def test_normalization_is_part_of_the_tokenizer(tmp_path):
    write(tmp_path, [("\uff27OOD  ㅋㅋㅋㅋㅋ", "a"), ("각", "b")] * 20)
    plain = load(tmp_path)
    assert set(texts_of(plain, plain.train)) == {"\uff27OOD  ㅋㅋㅋㅋㅋ", "각"}
    changed = load(tmp_path, normalize=["nfkc", "lower", "spaces", "repeats", "nfd"])
    assert set(texts_of(changed, changed.train)) == {"good \u110f\u110f", "\u1100\u1161\u11a8"}


def test_a_tokenizer_is_learned_from_the_training_rows_alone(tmp_path):
    write(tmp_path, reviews())
    write(tmp_path, [("zzz", "pos"), ("zzz", "neg")] * 5, "test.tsv")
    splits = load(tmp_path, test="test.tsv")
    assert "z" not in _tokenizer.opened(splits.files["tokenizer.json"]).get_vocab()
    assert set(texts_of(splits, splits.test)) == {""}  # unknown, which is skipped as special tokens are


def test_tokens_are_an_arrow_file_that_is_memory_mapped(tmp_path):
    write(tmp_path, reviews(5000))
    load(tmp_path)
    tokens = load(tmp_path).train.arrays["tokens"]
    [path] = (tmp_path / "cache").glob("tokens-*/rows.arrow")
    with pa.ipc.open_file(path) as file:
        rows = file.read_all().column("rows")
    assert [tokens.values[first:end].tolist() for first, end in itertools.pairwise(tokens.starts)] == rows.to_pylist()
    assert str(path) in Path("/proc/self/maps").read_text()


def test_it_is_learned_and_applied_once(tmp_path, monkeypatch):
    write(tmp_path, reviews())
    first = load(tmp_path, tokenizer="bpe", vocabulary=80)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    monkeypatch.setattr(_tokenizer, "learn", None)
    monkeypatch.setattr(_tokenizer, "encode", None)
    again = load(tmp_path, tokenizer="bpe", vocabulary=80)
    kept_tokens, read_tokens = first.train.arrays["tokens"].values, again.train.arrays["tokens"].values
    assert (kept_tokens == read_tokens).all()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()} == kept
    write(tmp_path, [*reviews(59), ("new", "pos")])
    with pytest.raises(TypeError):  # another text, another cache
        load(tmp_path, tokenizer="bpe", vocabulary=80)


@pytest.mark.parametrize("tokenizer", ["characters", "bpe"])
def test_learning_again_gives_the_same_tokenizer(tmp_path, monkeypatch, tokenizer):
    write(tmp_path, [(f"{one} {number * 7919 % 101}", label) for number, (one, label) in enumerate(reviews(600))])
    first = load(tmp_path, tokenizer=tokenizer, vocabulary=150).files
    monkeypatch.setenv("PLAINLOOP_CACHE", str(tmp_path / "other"))
    assert load(tmp_path, tokenizer=tokenizer, vocabulary=150).files == first


def test_a_cache_that_was_not_finished_is_made_again(tmp_path):
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        _cache.kept("key", fail)
    assert [path.name for path in _cache.kept("key", lambda folder: (folder / "whole").touch()).iterdir()] == ["whole"]


# Files


def test_json_lines_and_parquet_are_read_alike(tmp_path):
    import pandas as pd

    table = pd.read_csv(write(tmp_path, reviews()), sep="\t")
    table.to_parquet(tmp_path / "train.parquet")
    table.to_json(tmp_path / "train.jsonl", orient="records", lines=True, force_ascii=False)
    found = [load(tmp_path, train=f"train.{kind}") for kind in ("tsv", "parquet", "jsonl")]
    assert found[0].info == found[1].info == found[2].info
    assert texts_of(found[0], found[0].test) == texts_of(found[1], found[1].test) == texts_of(found[2], found[2].test)


def test_quotes_stand_for_themselves_where_none_are_meant(tmp_path):
    rows = [*reviews(58), ('"별로', "pos"), ('별로 "아" 정말"', "neg")]
    write(tmp_path, rows)
    splits = load(tmp_path, quote="")
    assert sum(map(len, (splits.train, splits.valid, splits.test))) == 60
    shown = [one for part in (splits.train, splits.valid, splits.test) for one in texts_of(splits, part)]
    assert '"별로' in shown and '별로 "아" 정말"' in shown


def predicted(path: Path, settings: text.Config, splits: Splits, folder: Path, rows: int = 65536) -> list[Any]:
    (folder / "tokenizer.json").write_text(splits.files["tokenizer.json"])
    return list(text.read_rows(path, settings, splits.preprocessing | {"folder": str(folder)}, splits.info, rows))


def test_new_files_become_the_same_tokens(tmp_path):
    settings = config(tmp_path, id="id")
    path = write(tmp_path, reviews())
    splits = text.load(settings)
    chunks = predicted(path, settings, splits, tmp_path, 25)
    assert [len(chunk.dataset) for chunk in chunks] == [25, 25, 10] and all(chunk.labelled for chunk in chunks)
    assert [name for chunk in chunks for name in chunk.ids["id"]] == [str(number) for number in range(60)]
    shown = [one for chunk in chunks for one in texts_of(splits, chunk.dataset)]
    assert [one.strip() for one in shown] == [one.strip() for one, _ in reviews()]
    (tmp_path / "bare.csv").write_text("more,review\n1,정말\n2,별로\n")
    (chunk,) = predicted(tmp_path / "bare.csv", settings, splits, tmp_path)
    assert not chunk.labelled and chunk.ids == {"row": [0, 1]}


# Mistakes


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"text": "reviw"}, ["data.text = 'reviw'", "no such column", "did you mean review?"]),
        ({"target": "label"}, ["data.target = 'label'", "no such column"]),
        ({"tokenizer": "/no/such/folder"}, ["data.tokenizer = '/no/such/folder'", "no tokenizer there", "characters"]),
        ({"max_length": 3}, ["data.max_length = 3"]),
        ({"normalize": ["upper"]}, ["data.normalize", "nfkc"]),
        ({"train": "gone.tsv"}, ["data.train", "gone.tsv", "no such file"]),
    ],
)
def test_a_mistake_is_said_in_one_line(tmp_path, keys, words):
    write(tmp_path, reviews())
    with pytest.raises(UserError) as error:
        load(tmp_path, **keys)
    assert len(error.value.lines) == 1
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("empty", ["", "   "])
def test_an_empty_text_is_named_or_skipped_and_counted(tmp_path, empty):
    path = write(tmp_path, [*reviews(40), (empty, "pos"), *reviews(20)])
    with pytest.raises(UserError, match=r"train.tsv: column 'review': the text in row 41 is empty; .*data.on_bad"):
        load(tmp_path)
    settings = config(tmp_path, on_bad="skip")
    splits = text.load(settings)
    assert sum(map(len, (splits.train, splits.valid, splits.test))) == 60
    assert [line for line in splits.notes if line.startswith("skipped: 1 rows of ")]
    rows = [row for chunk in predicted(path, settings, splits, tmp_path, 30) for row in chunk.ids["row"]]
    assert rows == [*range(40), *range(41, 61)]
    with pytest.raises(UserError, match="row 41 is empty"):
        predicted(path, config(tmp_path), splits, tmp_path, 30)


def test_a_text_over_the_limit_is_cut_and_counted(tmp_path):
    write(tmp_path, [*reviews(58), ("가" * 500, "pos"), ("나" * 500, "neg")])
    splits = load(tmp_path, max_length=64)
    assert "cut: 2 of 60 texts have more than data.max_length = 64 tokens" in splits.notes
    assert max(part.lengths.max() for part in (splits.train, splits.valid, splits.test)) == 64


def test_a_text_of_which_nothing_is_left_has_one_token_of_padding(tmp_path):
    tokens, mask = _cache.Arrays(np.array([5, 6], np.int32), np.array([0, 2, 2]), {}, pad=1).padded(np.array([1, 0]))
    assert mask.sum(1).tolist() == [1, 2] and tokens[0].eq(1).all() and tokens[1, :2].tolist() == [5, 6]


@pytest.mark.skipif(not REAL, reason="PLAINLOOP_DATA is unset: the public data sets are not here")
def test_reviews_of_films_keep_their_rows():
    splits = text.load(config(REAL, train="nsmc/train.tsv", test="nsmc/valid.tsv", target="label", text="document", quote="", valid_fraction=0.1))
    assert [len(part) for part in (splits.train, splits.valid, splits.test)] == [36000, 4000, 5000]
    assert splits.info.labels == ["0", "1"]

"""Tables: reading, splitting, scaling, predicting on new files, and every mistake a user's file may hold."""

import bz2
import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch

import commands
from boost import boost
from data import Splits, _scale, table
from engine.config import UserError, dump_toml, validate
from engine.settings import parse

REAL = os.environ.get("PLAINLOOP_DATA", "")
needs_data = pytest.mark.skipif(not REAL, reason="PLAINLOOP_DATA is unset: the public data sets are not here")


def config(root: Path | str, **keys: Any) -> table.Config:
    values = {"name": "table", "root": str(root), "train": "train.csv", "target": "y", **keys}
    settings, lines = validate("data", table.Config, values)
    if lines:
        raise UserError(*lines)
    return settings


def write(folder: Path, text: str, name: str = "train.csv", encoding: str = "utf-8") -> Path:
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return path


def rows(count: int = 40, header: str = "a,b,y", row: Any = lambda i: f"{i},{'uvw'[i % 3]},{['no', 'yes'][i % 2]}") -> str:
    return "\n".join([header, *(row(i) for i in range(count))]) + "\n"


def whole(dataset: Any) -> dict[str, torch.Tensor]:
    return dataset.__getitems__(torch.arange(len(dataset)))


def load(root: Path, **keys: Any) -> Splits:
    return table.load(config(root, **keys))


def boosted(root: Path, **keys: Any) -> list[str]:
    """What boost.py says of the same mistake."""
    values = {"name": "table", "root": str(root), "train": "train.csv", "target": "y", **keys}
    (root / "boost.toml").write_text(dump_toml({"data": values, "model": {"name": "mlp"}}))
    with pytest.raises(UserError) as caught:
        boost(parse([root / "boost.toml"]), trial=True)
    return caught.value.lines


# Reading


def test_one_file_is_split_by_class_and_its_columns_are_told(tmp_path: Path) -> None:
    write(tmp_path, rows(100))
    splits = load(tmp_path)
    assert [len(part) for part in (splits.train, splits.valid, splits.test)] == [60, 20, 20]
    assert splits.info.kind == "binary"
    assert splits.info.labels == ["no", "yes"]
    assert splits.info.outputs == 1
    assert splits.info.numeric == 1
    assert splits.info.categories == [4]
    batch = whole(splits.train)
    assert {name: (value.dtype, tuple(value.shape)) for name, value in batch.items()} == {
        "numeric": (torch.float32, (60, 1)),
        "categorical": (torch.int64, (60, 1)),
        "target": (torch.float32, (60,)),
    }
    assert batch["target"].mean() == 0.5
    assert batch["numeric"].mean().abs() < 1e-6
    assert abs(batch["numeric"].std(correction=0) - 1) < 1e-6
    assert json.loads(json.dumps(splits.preprocessing)) == splits.preprocessing
    assert "train: 60 rows (no 30, yes 30)" in splits.notes


def test_split_is_a_function_of_its_seed_and_misses_no_row(tmp_path: Path) -> None:
    write(tmp_path, rows(97))
    first, again, other = (table.read(config(tmp_path, split_seed=seed)).rows for seed in (1, 1, 2))
    assert all((first[part] == again[part]).all() for part in first)
    assert not np.array_equal(first["test"], other["test"])
    assert sorted(np.concatenate(list(first.values()))) == list(range(97))


def test_groups_stay_whole(tmp_path: Path) -> None:
    write(tmp_path, rows(200, "a,film,y", lambda i: f"{i},film{i * 7 % 23},{i % 2}"))
    found = table.read(config(tmp_path, group="film"))
    parts = [set(found.groups[positions]) for positions in found.rows.values()]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    assert found.preprocessing["numeric"] == ["a"]
    assert not found.preprocessing["categorical"]


def test_parts_from_files_are_views_of_one_array(tmp_path: Path) -> None:
    for part in ("train", "valid", "test"):
        write(tmp_path, rows(), f"{part}.csv")
    splits = load(tmp_path, valid="valid.csv", test="test.csv")
    pointers = {part.columns["numeric"].untyped_storage().data_ptr() for part in (splits.train, splits.valid, splits.test)}
    assert len(pointers) == 1
    assert splits.train.index is None
    by_fraction = load(tmp_path)
    assert by_fraction.train.columns["numeric"] is by_fraction.test.columns["numeric"]


def test_test_fraction_of_zero_gives_no_test(tmp_path: Path) -> None:
    write(tmp_path, rows())
    assert load(tmp_path, test_fraction=0.0).test is None


def test_a_test_part_is_split_off_unasked_only_of_a_single_file(tmp_path: Path) -> None:
    write(tmp_path, rows())
    write(tmp_path, rows(), "other.csv")
    for keys, train, valid, test in [
        ({"valid": "other.csv"}, 40, 40, None),
        ({"valid": "other.csv", "test_fraction": 0.2}, 32, 40, 8),
        ({"test": "other.csv"}, 32, 8, 40),
        ({"valid": "other.csv", "test": "other.csv", "test_fraction": 0.2}, 40, 40, 40),
    ]:
        splits = load(tmp_path, **keys)
        assert (len(splits.train), len(splits.valid), splits.test and len(splits.test)) == (train, valid, test)


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_separator_and_encoding_are_found(tmp_path: Path, separator: str, encoding: str) -> None:
    text = rows(40, "a;größe;y", lambda i: f'{i};"x;,|\tü{i % 2}";{i % 2}')
    plain = '"x;,|\tü{}"'
    text = text.replace(";", separator) if separator != ";" else text
    for i in range(2):
        text = text.replace(plain.format(i).replace(";", separator), plain.format(i))
    write(tmp_path, text, encoding=encoding)
    found = load(tmp_path).preprocessing
    assert found["vocabularies"] == {"größe": ["x;,|\tü0", "x;,|\tü1"]}


def test_a_tab_may_be_written_as_backslash_t(tmp_path: Path) -> None:
    write(tmp_path, rows(40, "a,b\ty", lambda i: f"{i},5\t{i % 2}").replace("0,5\t", "0,25\t"))
    for separator in ("\t", r"\t"):
        assert load(tmp_path, separator=separator, categorical=["a,b"]).preprocessing["categorical"] == ["a,b"]


def test_an_encoding_can_be_given(tmp_path: Path) -> None:
    write(tmp_path, rows(40, "a,b,y", lambda i: f"{i},ü{i % 2},{i % 2}"), encoding="cp1252")
    assert load(tmp_path, encoding="cp1252").preprocessing["vocabularies"] == {"b": ["ü0", "ü1"]}


def test_a_header_may_begin_like_an_archive(tmp_path: Path) -> None:
    write(tmp_path, rows(header="PK,b,y"))
    assert load(tmp_path).preprocessing["numeric"] == ["PK"]


def test_line_ends_quoted_line_breaks_and_blank_lines(tmp_path: Path) -> None:
    text = "\r\n\r\n" + rows(40, " a , b,y", lambda i: f'{i},"two\nlines {i % 2}",{i % 2}').replace("\n", "\r\n") + "\r\n"
    write(tmp_path, text)
    found = load(tmp_path)
    assert found.preprocessing["numeric"] == ["a"]
    assert len(found.preprocessing["vocabularies"]["b"]) == 2
    assert sum(len(part) for part in (found.train, found.valid, found.test)) == 40


@pytest.mark.parametrize("name", ["gzip", "bz2", "zstd", "lz4"])
def test_compressed_files_read_as_plain_ones(tmp_path: Path, name: str) -> None:
    plain = write(tmp_path, rows())
    with pa.output_stream(str(tmp_path / "packed"), compression=name) as file:
        file.write(plain.read_bytes())
    expected, found = whole(load(tmp_path).train), whole(load(tmp_path, train="packed").train)
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_parquet_reads_as_the_same_csv(tmp_path: Path) -> None:
    write(tmp_path, rows(40, "a,b,c,y", lambda i: f"{i / 4 if i % 5 else ''},{'uvw'[i % 3] if i % 7 else ''},{i % 2 == 0},{i % 3}"))
    values = {
        "a": [i / 4 if i % 5 else None for i in range(40)],
        "b": pa.array(["uvw"[i % 3] if i % 7 else None for i in range(40)]).dictionary_encode(),
        "c": [i % 2 == 0 for i in range(40)],
        "y": [i % 3 for i in range(40)],
    }
    parquet.write_table(pa.table(values), tmp_path / "train.parquet", row_group_size=7)
    expected, found = load(tmp_path), load(tmp_path, train="train.parquet")
    assert expected.info == found.info
    assert found.info.kind == "multiclass"
    assert found.info.outputs == 3
    for name, value in whole(found.train).items():
        assert torch.equal(value, whole(expected.train)[name])
    # A CSV from Python says True where Arrow says true: it is the same category.
    rows_of_csv = next(table.read_rows(tmp_path / "train.csv", config(tmp_path), found.preprocessing, found.info))
    assert rows_of_csv.dataset.columns["categorical"].min(0).values.tolist() == [0, 1]


def test_missing_values_of_all_spellings(tmp_path: Path) -> None:
    spellings = ["?", "", " ", "NA", "NaN", "nan", "null", "N/A"]
    write(
        tmp_path,
        rows(80, "a,b,y", lambda i: f"{spellings[i % 8] if i % 2 else i},{spellings[i % 8] if i % 3 else 'u'},{i % 4 // 2}"),
    )
    splits = load(tmp_path)
    batch = whole(splits.train)
    assert splits.preprocessing["missing"] == ["a"]
    assert splits.info.numeric == 2
    missing = batch["numeric"][:, 1] == 1
    assert 0 < missing.sum() < len(missing)
    assert (batch["numeric"][missing, 0] == 0).all()
    assert splits.preprocessing["vocabularies"] == {"b": ["u"]}
    assert set(batch["categorical"].flatten().tolist()) == {0, 1}


def test_columns_given_as_categories_stay_text(tmp_path: Path) -> None:
    write(tmp_path, rows(40, "a,zip,y", lambda i: f"{i},{'007' if i % 2 else '7'},{i % 4 // 2}"))
    given = load(tmp_path, categorical=["zip"])
    assert given.preprocessing["vocabularies"] == {"zip": ["007", "7"]}
    write(tmp_path, "zip,a\n007,1\n7.0,2\n8,3\n", "new.csv")
    new = next(table.read_rows(tmp_path / "new.csv", config(tmp_path), given.preprocessing, given.info))
    assert whole(new.dataset)["categorical"].flatten().tolist() == [1, 2, 0]
    assert not new.labelled
    assert new.ids == {"row": [0, 1, 2]}


def test_a_late_text_makes_the_whole_column_text(tmp_path: Path) -> None:
    write(tmp_path, rows(150_000, "a,b,long,y", lambda i: f"{i},{i % 50},{'x' * 30},{i % 2}") + "1,none,x,1\n" * 9)
    splits = load(tmp_path)
    assert splits.preprocessing["numeric"] == ["a"]
    assert len(splits.preprocessing["vocabularies"]["b"]) == 51


def test_categories_of_validation_alone_are_unseen(tmp_path: Path) -> None:
    write(tmp_path, rows())
    write(tmp_path, rows(row=lambda i: f"{i},{'xu'[i % 2]},{['no', 'yes'][i % 2]}"), "valid.csv")
    splits = load(tmp_path, valid="valid.csv")
    assert set(whole(splits.valid)["categorical"].flatten().tolist()) == {0, 1}


def test_constant_columns_and_row_numbers_are_dropped_with_a_note(tmp_path: Path) -> None:
    write(tmp_path, rows(40, ",a,five,same,y", lambda i: f"{i},{i},5,s,{i % 2}"))
    splits = load(tmp_path)
    assert splits.preprocessing["numeric"] == ["a"]
    assert splits.preprocessing["categorical"] == []
    assert [note.split()[1] for note in splits.notes if note.startswith("dropped")] == ["Unnamed:", "five", "same"]


def test_names_of_rows_are_remarked(tmp_path: Path) -> None:
    write(tmp_path, rows(400, "a,b,y", lambda i: f"{i},name{i},{i % 2}"))
    assert any("data.id" in note for note in load(tmp_path).notes)


@pytest.mark.parametrize(
    ("target", "kind", "labels"),
    [
        (lambda i: i % 2, "binary", ["0", "1"]),
        (lambda i: i % 3 - 1, "multiclass", ["-1", "0", "1"]),
        (lambda i: i % 3 / 2, "regression", []),
        (lambda i: i, "regression", []),
        (lambda i: f"{i % 2}.0", "binary", ["0", "1"]),
    ],
)
def test_the_task_is_told_from_the_target(tmp_path: Path, target: Any, kind: str, labels: list[str]) -> None:
    write(tmp_path, rows(90, "a,y", lambda i: f"{i % 8},{target(i)}"))
    info = load(tmp_path).info
    assert (info.kind, info.labels) == (kind, labels)


def test_the_task_can_be_given(tmp_path: Path) -> None:
    write(tmp_path, rows(90, "a,y", lambda i: f"{i % 8},{i % 2}"))
    assert table.load(config(tmp_path), "regression").info.kind == "regression"
    two = table.load(config(tmp_path), "multiclass")
    assert two.info.outputs == 2
    assert whole(two.train)["target"].dtype == torch.int64


def test_regression_targets_are_standardised_by_training_rows(tmp_path: Path) -> None:
    write(tmp_path, rows(200, "a,y", lambda i: f"{i % 8},{i * 10 + 0.5}"))
    splits = load(tmp_path)
    raw = table.read(config(tmp_path))
    target = whole(splits.train)["target"]
    assert target.mean().abs() < 1e-6
    assert abs(target.std(correction=0) - 1) < 1e-6
    in_units = target * splits.info.target_std + splits.info.target_mean
    assert np.allclose(in_units, raw.target[raw.rows["train"]], atol=1e-3)


def test_the_first_layer_is_raw(tmp_path: Path) -> None:
    write(tmp_path, rows(40, "id,a,b,y", lambda i: f"n{i},{i if i % 5 else ''},{'uvw'[i % 3]},{i % 2}"))
    raw = table.read(config(tmp_path, id="id"))
    assert raw.numeric.dtype == np.float32
    assert raw.categorical.dtype == np.int32
    assert raw.target.dtype == np.int64
    assert np.isnan(raw.numeric[::5]).all()
    assert raw.numeric[7, 0] == 7
    assert raw.ids[7].as_py() == "n7"
    new = next(table.read_rows(tmp_path / "train.csv", config(tmp_path), raw.preprocessing, raw.info))
    assert np.array_equal(new.dataset.columns["numeric"].numpy(), raw.numeric, equal_nan=True)


# Weights


def test_class_weights_make_classes_equal_in_training_alone(tmp_path: Path) -> None:
    write(tmp_path, rows(100, "a,y", lambda i: f"{i},{int(i % 5 == 0)}"))
    splits = load(tmp_path, balance="class_weights")
    weights, target = splits.train.weights(torch.arange(60)), whole(splits.train)["target"]
    assert torch.allclose(weights.unique(), torch.tensor([60 / (2 * 48), 60 / (2 * 12)]))
    assert torch.isclose(weights[target == 1].sum(), weights[target == 0].sum())
    assert not hasattr(splits.valid, "weights")
    assert not hasattr(load(tmp_path).train, "weights")


def test_undersampling_drops_training_rows_alone(tmp_path: Path) -> None:
    write(tmp_path, rows(100, "a,y", lambda i: f"{i},{int(i % 5 == 0)}"))
    splits = load(tmp_path, balance="undersample")
    assert len(splits.train) == 24
    assert whole(splits.train)["target"].mean() == 0.5
    assert len(splits.valid) == 20
    assert "train: 24 rows (0 12, 1 12)" in splits.notes


def test_a_column_of_weights_goes_with_its_rows(tmp_path: Path) -> None:
    write(tmp_path, rows(100, "a,w,y", lambda i: f"{i},{i / 10},{i % 2}"))
    splits = load(tmp_path, weight="w", numeric_transform="none")
    for part in (splits.train, splits.valid, splits.test):
        positions = torch.arange(len(part)) + 3 * len(part)
        assert torch.allclose(part.weights(positions), part.__getitems__(positions)["numeric"][:, 0] / 10)


# Scales


def test_quantile_transform_equals_scikit_learns() -> None:
    from sklearn.preprocessing import QuantileTransformer

    generator = np.random.default_rng(0)
    values = np.concatenate([generator.lognormal(size=3000), generator.integers(0, 4, 3000)])
    noisy = values + np.random.default_rng(5).normal(0, 1e-5 * values.std(), len(values))
    fitted = QuantileTransformer(output_distribution="normal", n_quantiles=200, subsample=10**9).fit(noisy[:, None])
    quantiles = _scale.learn_quantiles(values, len(values), np.random.default_rng(5))
    assert np.allclose(quantiles, fitted.quantiles_[:, 0], atol=1e-12)
    new = np.concatenate([values, generator.normal(size=1000) * 9, [np.nan, values.min(), values.max(), quantiles[0] + 5e-8]])
    expected = fitted.transform(new[:, None])[:, 0]
    assert np.allclose(_scale.to_normal(new, np.array(quantiles)), expected, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("unit", [1e-12, 1e-8, 1.0, 1e8])
def test_quantile_transform_does_not_depend_on_the_unit(unit: float) -> None:
    values = np.random.default_rng(0).lognormal(size=3000)

    def normal(values: np.ndarray) -> np.ndarray:
        return _scale.to_normal(values, np.array(_scale.learn_quantiles(values, len(values), np.random.default_rng(5))))

    assert normal(values).std() > 0.9
    assert np.allclose(normal(values * unit), normal(values), atol=1e-6)


def test_quantiles_of_training_columns_are_kept_for_bins(tmp_path: Path) -> None:
    write(tmp_path, rows(300, "a,b,y", lambda i: f"{i**3},{i if i % 4 else ''},{i % 2}"))
    splits = load(tmp_path, numeric_transform="quantile")
    edges = splits.info.more["quantiles"]
    assert len(edges) == splits.info.numeric == 3
    assert all(len(column) == 257 for column in edges)
    assert edges[0] == sorted(edges[0])
    assert abs(edges[0][128]) < 0.02
    assert load(tmp_path).info.more == {}


def test_scales_come_from_training_rows_alone(tmp_path: Path) -> None:
    write(tmp_path, rows(40, "a,y", lambda i: f"{i},{i % 2}"))
    write(tmp_path, rows(40, "a,y", lambda i: f"{i + 1000},{i % 2}"), "valid.csv")
    splits = load(tmp_path, valid="valid.csv", test_fraction=0.0)
    assert splits.preprocessing["scales"]["mean"] == [19.5]
    assert torch.isclose(
        whole(splits.valid)["numeric"].mean() * splits.train.columns["numeric"].new_tensor(11.5434),
        torch.tensor(1000.0),
        rtol=1e-3,
    )


# New files


@pytest.mark.parametrize("transform", ["standard", "quantile", "none"])
@pytest.mark.parametrize("chunk_rows", [7, 65536])
def test_a_new_file_gives_the_training_tensors(tmp_path: Path, transform: str, chunk_rows: int) -> None:
    write(tmp_path, rows(100, "id,a,b,y", lambda i: f"n{i},{i * i if i % 6 else ''},{'uvw'[i % 3]},{i * 1.5}"))
    settings = config(tmp_path, id="id", numeric_transform=transform)
    splits = table.load(settings)
    lines = (tmp_path / "train.csv").read_text().splitlines()
    shuffled = "\n".join(";".join([*reversed(line.split(",")), "more"]) for line in lines)
    write(tmp_path, shuffled, "new.csv")
    preprocessing = json.loads(json.dumps(splits.preprocessing))
    chunks = list(table.read_rows(tmp_path / "new.csv", settings, preprocessing, splits.info, chunk_rows))
    assert max(len(chunk.dataset) for chunk in chunks) <= chunk_rows
    for name, column in splits.train.columns.items():
        assert torch.equal(torch.cat([chunk.dataset.columns[name] for chunk in chunks]), column)
    assert [value for chunk in chunks for value in chunk.ids["id"]] == [f"n{i}" for i in range(100)]
    assert all(chunk.labelled for chunk in chunks)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a,y\n1,no\n", "'b'"),
        ("a,b,y\n1,u,perhaps\n", "'perhaps'"),
        ("a,b,y\n1,u,\n", "remove the column"),
        ("a,b,y\nmany,u,no\n", "'many'"),
        ("a,b,y\n", "no rows"),
        ("", "empty"),
        ("a,b,b\n1,2,3\n", "named 'b'"),
    ],
)
def test_mistakes_in_a_new_file(tmp_path: Path, text: str, word: str) -> None:
    write(tmp_path, rows())
    splits = load(tmp_path)
    path = write(tmp_path, text, "new.csv")
    with pytest.raises(UserError, match=word) as caught:
        list(table.read_rows(path, config(tmp_path), splits.preprocessing, splits.info))
    assert len(caught.value.lines) == 1
    assert "new.csv" in str(caught.value)


# Mistakes


def date_rows(value: str) -> str:
    return rows(40, "a,day,y", lambda i: f"{i},{value.format(i % 9 + 1)},{i % 2}")


@pytest.mark.parametrize(
    ("text", "keys", "word"),
    [
        (rows(), {"train": "nothing.csv"}, "nothing.csv': no such file"),
        (rows(), {"train": "."}, "folder"),
        ("", {}, "empty"),
        ("\n\n", {}, "empty"),
        ("a,b,y\n", {}, "no rows"),
        (rows(), {"target": "z"}, "'z'"),
        (rows(header="age,b,income"), {"target": "incme"}, "did you mean income"),
        (rows(40, "a,b,y", lambda i: f"{i},,{i % 2}"), {}, "'b' is missing"),
        (rows(40, "a,a,y", lambda i: f"{i},{i},{i % 2}"), {}, "named 'a'"),
        (rows(40, "a,y", lambda i: f"{i},same"), {}, "same in every"),
        (rows(40, "a,y", lambda i: f"{i},2.5"), {}, "2.5 in every"),
        (rows(40, "a,y", lambda i: f"{i},{i % 2 if i != 16 else ''}"), {}, "'y': no value in row 17"),
        (rows(40, "a,y", lambda i: f"{i},{['no', 'yes'][i % 2] if i else 'NA'}"), {}, "'y': no value in row 1"),
        (rows(40, "a,y", lambda i: f"{i},{i / 3 if i != 16 else 'inf'}"), {}, "'y': inf is infinite or too large, in row 17"),
        (date_rows("2024-01-0{}"), {}, "'day' holds dates such as '2024-01-01'"),
        (date_rows("0{}.01.2024"), {}, "dates"),
        (date_rows("{}/1/24 10:00"), {}, "dates"),
        (date_rows('"Jan 0{}, 2024"'), {}, "dates"),
        (date_rows("{} March 2024"), {}, "dates"),
        (date_rows('"{},5"'), {}, "decimal comma"),
        (rows(), {"drop": ["c"]}, "data.drop = 'c'"),
        (rows(), {"categorical": ["c"]}, "data.categorical = 'c'"),
        (rows(), {"numeric": ["c"]}, "data.numeric = 'c'"),
        (rows(), {"numeric": ["b"]}, "'u' is not a number"),
        (rows(), {"id": "c"}, "data.id = 'c'"),
        (rows(), {"group": "c"}, "data.group = 'c'"),
        (rows(), {"weight": "c"}, "data.weight = 'c'"),
        (rows(), {"weight": "b"}, "'u' is not a number"),
        (rows(40, "a,w,y", lambda i: f"{i},{i - 3},{i % 2}"), {"weight": "w"}, "negative weight"),
        (rows(40, "a,w,y", lambda i: f"{i},0,{i % 2}"), {"weight": "w"}, "is 0 in every train row"),
        (rows(), {"drop": ["y"]}, "is the target"),
        (rows(), {"numeric": ["a"], "categorical": ["a"]}, "data.numeric too"),
        (rows(), {"drop": ["a", "b"]}, "no feature"),
        (rows(40, "a,b,y", lambda i: f"1,u,{i % 2}"), {}, "no feature"),
        (rows(), {"valid_fraction": 0.5, "test_fraction": 0.5}, "less than 1"),
        (rows(40, "a,y", lambda i: f"{i},{'uv'[i % 2] if i else 'once'}"), {}, "'once' has only 1"),
        (rows(2, "a,y", lambda i: f"{i},{i}.5"), {}, "only 2 row"),
        (rows(40, "a,g,y", lambda i: f"{i},{i % 2},{i % 3}"), {"group": "g"}, "no group is left"),
        (rows(40, "a,g,y", lambda i: f"{i},{i % 9 or ''},{i % 2}"), {"group": "g"}, "'g': no value"),
        (rows(40) + "1,2,no,extra\n", {}, "Expected 3 columns, got 4"),
        (rows(40) + '1,"open,no\n', {}, "quotes"),
        (rows(), {"separator": ";;"}, "at most 1 character"),
        (rows(), {"encoding": "klingon"}, "klingon"),
        (rows(), {"encoding": "hex"}, "'hex': no such encoding"),
        (rows().replace("u", "\0"), {}, "zero bytes"),
        (rows(), {"target": "a", "balance": "undersample"}, "undersample"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, keys: dict[str, Any], word: str) -> None:
    write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load(tmp_path, **keys)
    assert word in str(caught.value)
    assert len(caught.value.lines) == 1
    assert "\n" not in str(caught.value)
    assert boosted(tmp_path, **keys) == caught.value.lines


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (rows(header="a,c,y"), "column 'b', unlike"),
        (rows(header="a,b,more,y", row=lambda i: f"{i},u,1,no"), "has a column 'more'"),
        (rows(row=lambda i: f"{i},u,perhaps"), "label 'perhaps'"),
        (rows(row=lambda i: f"few,u,{['no', 'yes'][i % 2]}"), "'few' is not a number"),
    ],
)
def test_mistakes_in_a_second_file(tmp_path: Path, text: str, word: str) -> None:
    write(tmp_path, rows())
    write(tmp_path, text, "test.csv")
    with pytest.raises(UserError) as caught:
        load(tmp_path, test="test.csv")
    assert word in str(caught.value)
    assert "test" in str(caught.value)
    assert boosted(tmp_path, test="test.csv") == caught.value.lines


@pytest.mark.parametrize(("kind", "target", "word"), [("regression", "b", "'u'"), ("binary", "b", "multiclass")])
def test_a_task_that_does_not_fit_the_target(tmp_path: Path, kind: str, target: str, word: str) -> None:
    write(tmp_path, rows())
    with pytest.raises(UserError, match=word):
        table.load(config(tmp_path, target=target), kind)


def test_a_wrong_encoding_is_found_with_its_place(tmp_path: Path) -> None:
    lines = rows(30000).encode().splitlines(keepends=True)
    lines[29990] = "7,größe,no\n".encode("cp1252")
    for content in (b"".join(lines), b"".join([*lines[:1], lines[29990], *lines[1:]])):
        (tmp_path / "train.csv").write_bytes(content)
        with pytest.raises(UserError) as caught:
            load(tmp_path)
        assert "byte 5 (0xf6)" in str(caught.value)
        assert "data.encoding" in str(caught.value)
        assert "in line" in str(caught.value)


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.999])
@pytest.mark.parametrize("name", ["train.parquet", "train.csv.gz", "train.csv.bz2"])
def test_files_that_are_cut_off(tmp_path: Path, name: str, keep: float) -> None:
    text = rows(20000).encode()
    parquet.write_table(pa.table({"a": np.random.default_rng(0).normal(size=5000), "y": [0, 1] * 2500}), tmp_path / "train.parquet")
    (tmp_path / "train.csv.gz").write_bytes(gzip.compress(text))
    (tmp_path / "train.csv.bz2").write_bytes(bz2.compress(text))
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(UserError, match="damaged or cut off"):
        load(tmp_path, train=name)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        (pa.array([0, 1] * 20, pa.timestamp("s")), "dates"),
        (pa.array([0, 1] * 20, pa.date32()), "dates"),
        (pa.array([[1], [2]] * 20), "neither numbers nor texts"),
        (pa.nulls(40), "is missing in every"),
        (pa.array([None] * 40, pa.string()), "is missing in every"),
    ],
)
def test_parquet_columns_that_are_no_features(tmp_path: Path, values: pa.Array, word: str) -> None:
    parquet.write_table(pa.table({"a": list(range(40)), "x": values, "y": [0, 1] * 20}), tmp_path / "train.parquet")
    with pytest.raises(UserError, match=f"'x'.*{word}"):
        load(tmp_path, train="train.parquet")
    assert load(tmp_path, train="train.parquet", drop=["x"]).info.numeric == 1


@pytest.mark.parametrize(("content", "word"), [(b"PK\x03\x04 etc", "zip"), (b"a,y\n1,2\n", "not Parquet")])
def test_files_of_another_format(tmp_path: Path, content: bytes, word: str) -> None:
    (tmp_path / "train.parquet").write_bytes(content)
    with pytest.raises(UserError, match=word):
        load(tmp_path, train="train.parquet")


# Real files


@needs_data
def test_adult() -> None:
    files = {part: f"adult/{part}.csv" for part in ("train", "valid", "test")}
    settings = config(REAL, **files, target="income")
    splits = table.load(settings)
    assert [len(part) for part in (splits.train, splits.valid, splits.test)] == [26048, 6513, 16281]
    assert splits.info.labels == ["<=50K", ">50K"]
    assert splits.info.numeric == 6
    assert len(splits.info.categories) == 8
    assert "?" not in splits.preprocessing["vocabularies"]["workclass"]
    new = table.read_rows(Path(REAL, "adult/test.csv"), settings, splits.preprocessing, splits.info)
    assert torch.equal(torch.cat([whole(chunk.dataset)["numeric"] for chunk in new]), whole(splits.test)["numeric"])


@needs_data
def test_bank_and_telco() -> None:
    bank = table.load(config(REAL, train="bank/bank-additional-full.csv", target="y", drop=["duration"]))
    assert "duration" not in bank.preprocessing["numeric"]
    assert "unknown" in bank.preprocessing["vocabularies"]["job"]
    assert bank.info.labels == ["no", "yes"]
    telco = table.load(config(REAL, train="telco/Telco-Customer-Churn.csv", target="Churn", id="customerID"))
    assert "TotalCharges" in telco.preprocessing["numeric"]
    assert "customerID" not in telco.preprocessing["categorical"]
    assert telco.preprocessing["missing"] == ["TotalCharges"]


@needs_data
def test_california() -> None:
    files = {part: f"california/{part}.csv" for part in ("train", "valid", "test")}
    splits = table.load(config(REAL, **files, target="MedHouseVal", numeric_transform="quantile"))
    assert splits.info.kind == "regression"
    assert splits.info.numeric == 8
    assert abs(splits.info.target_mean - 2.07) < 0.01
    assert whole(splits.train)["numeric"].std(0).sub(1).abs().max() < 0.1


# Costs


def test_importing_reads_no_heavy_package() -> None:
    command = "import sys, data.table, data.bundled; print([m for m in ('pyarrow', 'sklearn', 'pandas', 'scipy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_a_batch_costs_microseconds() -> None:
    dataset = table.TableDataset({"numeric": torch.randn(200_000, 30), "target": torch.randn(200_000)})
    positions = torch.randint(0, 10**6, (1000, 256))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = []  # of this thread's own work: other tests run beside
    for _ in range(10):
        start = time.thread_time()
        for row in positions:
            dataset.__getitems__(row)
        seconds.append((time.thread_time() - start) / len(positions))
    torch.set_num_threads(threads)
    assert min(seconds) < 40e-6


@pytest.mark.slow
def test_ten_million_rows_of_parquet_fit_into_four_gigabytes(tmp_path: Path) -> None:
    schema = pa.schema([(name, pa.float32()) for name in [*(f"x{i}" for i in range(30)), "y"]])
    generator = np.random.default_rng(0)
    with parquet.ParquetWriter(tmp_path / "train.parquet", schema, compression="none", use_dictionary=False) as writer:
        for _ in range(10):
            columns = [generator.standard_normal(1_000_000, np.float32) for _ in schema]
            writer.write_table(pa.table(columns, schema=schema))
    program = "import resource, sys, train; train.main(); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    words = ["data.name=table", f"data.root={tmp_path}", "data.train=train.parquet", "data.target=y", "task.kind=regression", "model.name=mlp"]
    words += ["model.width=16", "model.depth=1", "train.epochs=1", "train.batch_size=65536", f"run.dir={tmp_path}/run"]
    (tmp_path / "empty.toml").touch()
    command = [sys.executable, "-c", program, "--config", str(tmp_path / "empty.toml"), *words]
    done = subprocess.run(command, cwd=commands.ROOT, capture_output=True, text=True, check=True)
    assert "train: 6,000,000 rows" in done.stdout
    kibibytes = int(done.stdout.split()[-1])
    assert kibibytes * 1024 < 4e9

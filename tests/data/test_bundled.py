"""Data sets that come with scikit-learn."""

from pathlib import Path

import pytest
import torch

from data import bundled
from engine.config import validate


def config(dataset: str, **keys: object) -> bundled.Config:
    settings, lines = validate("data", bundled.Config, {"name": "bundled", "dataset": dataset, **keys})
    assert not lines
    return settings


@pytest.mark.parametrize(
    ("dataset", "kind", "rows", "numeric"),
    [
        ("digits", "multiclass", 1797, 61),
        ("breast_cancer", "binary", 569, 30),
        ("wine", "multiclass", 178, 13),
        ("diabetes", "regression", 442, 10),
    ],
)
def test_each_set(dataset: str, kind: str, rows: int, numeric: int) -> None:
    splits = bundled.load(config(dataset))
    assert splits.info.kind == kind
    assert splits.info.numeric == numeric
    assert len(splits.train) + len(splits.valid) + len(splits.test) == rows
    assert splits.train.__getitems__(torch.arange(5))["numeric"].shape == (5, numeric)


def test_the_label_is_the_sets_name_unless_given() -> None:
    assert config("digits").label == "digits"
    assert config("digits", label="mine").label == "mine"


def test_an_unknown_set_is_refused_with_those_there_are() -> None:
    _, lines = validate("data", bundled.Config, {"name": "bundled", "dataset": "iris"})
    assert len(lines) == 1
    assert "iris" in lines[0]
    assert "digits" in lines[0]


def test_a_csv_of_scikit_learns_names_gives_the_same_tensors(tmp_path: Path) -> None:
    from sklearn.datasets import load_breast_cancer

    load_breast_cancer(as_frame=True).frame.to_csv(tmp_path / "new.csv", index=False)
    settings = config("breast_cancer")
    splits = bundled.load(settings)
    chunks = list(bundled.read_rows(tmp_path / "new.csv", settings, splits.preprocessing, splits.info))
    assert chunks[0].labelled
    for name, column in splits.train.columns.items():
        assert torch.equal(torch.cat([chunk.dataset.columns[name] for chunk in chunks]), column)

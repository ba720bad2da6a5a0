"""A table's columns in one matrix for boosting, and how its rows are cut into folds."""

import dataclasses
import functools
import zlib
from typing import Any

import numpy as np
import torch

from engine import config
from engine.config import UserError, suggestion
from engine.settings import Settings

Fold = tuple[np.ndarray, np.ndarray]
"""training and validation rows, ascending"""


@dataclasses.dataclass
class Data:
    """A data file's Table with the chosen columns in one matrix, for any number of folds and trials."""

    table: Any
    """info and preprocessing are of the chosen columns, the target in its own units; rows["folds"] are training and validation"""
    matrix: np.ndarray
    """float32 [n, features]: numbers, then categories as numbers from 0; NaN where missing or unseen in training"""
    names: list[str]
    balance: str
    """data.balance: class weights count in training alone"""
    binned: dict[str, Any] = dataclasses.field(default_factory=dict)
    """what a library has built of these rows"""

    def weights(self, rows: np.ndarray, training: bool = False) -> np.ndarray | None:
        weights = self.table.part_weights("train" if training else "valid", self.balance)
        return None if weights is None else weights.numpy()[rows]

    def made(self, record: dict[str, Any], fold: Fold) -> bool:
        """Whether a fold was made of these rows. Of one that older code has written it cannot be told."""
        return "rows" not in record or record["rows"] == self.mark(fold)

    def mark(self, fold: Fold) -> str:
        """Of what a fold is made: another one where the files have changed."""
        mark = self.checksum
        for rows in fold:
            mark = zlib.crc32(rows, mark)
        return f"{mark:08x}"

    @functools.cached_property
    def checksum(self) -> int:
        """Of matrix, target and sample weights of training and validation rows, made once. Test rows may be others at any time."""
        mark, rows = 0, self.table.rows["folds"]
        for values in (self.matrix, self.table.target, self.table.weights):
            mark = mark if values is None else zlib.crc32(np.ascontiguousarray(values[rows]), mark)
        return mark


@dataclasses.dataclass
class Part:
    """Rows of Data as a data set: the matrix is its numbers."""

    data: Data
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, positions: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = self.rows[positions.numpy()]
        return {"numeric": torch.from_numpy(self.data.matrix[rows]), "target": torch.from_numpy(self.data.table.target[rows])}

    def weights(self, positions: torch.Tensor) -> torch.Tensor | None:
        weights = self.data.weights(self.rows[positions.numpy()])
        return None if weights is None else torch.from_numpy(weights)


def prepare(settings: Settings, table: Any = None) -> Data:
    """Choose boost.features of a data file's table, which is read where it is not given. Raises UserError."""
    data_file = config.module("data", settings.data.name)
    if not hasattr(data_file, "read"):
        raise UserError(f'data.name = "{settings.data.name}": has no columns to boost; use "table" or "bundled"')
    table = table or data_file.read(settings.data, settings.task.kind)
    # Kept with the table: the trials of a search share what is made here, and what the library bins.
    made = vars(table).setdefault("boosted", {})
    if (identity := getattr(settings.data, "id", "")) in ("row", "fold", "prediction"):
        raise UserError(f"data.id = {identity!r}: is what a column of the predictions is called; rename it in the file")
    key = tuple(settings.boost.features)
    if key not in made:
        made[key] = choose(settings, table)
    return made[key]


def choose(settings: Settings, table: Any) -> Data:
    learned, wanted = table.preprocessing, settings.boost.features
    known = learned["numeric"] + learned["categorical"]
    for name in wanted:
        if name not in known:
            raise UserError(f"boost.features = {name!r}: no such column among the features{suggestion(name, known)}")
    places = {key: [place for place, name in enumerate(learned[key]) if not wanted or name in wanted] for key in ("numeric", "categorical")}
    named = {key: [learned[key][place] for place in kept] for key, kept in places.items()}
    matrix = to_matrix(table.numeric[:, places["numeric"]] if wanted else table.numeric, table.categorical[:, places["categorical"]])
    # Trees need no scale: targets stay in their own units, here and where this preprocessing reads a new file.
    units = {"target_mean": 0.0, "target_std": 1.0}
    sizes = [table.info.categories[place] for place in places["categorical"]]
    info = dataclasses.replace(table.info, numeric=len(named["numeric"]), categories=sizes, **units)
    vocabularies = {name: learned["vocabularies"][name] for name in named["categorical"]}
    learned = {**learned, **named, **units, "vocabularies": vocabularies, "missing": []}
    rows = {**table.rows, "folds": np.sort(np.concatenate([table.rows["train"], table.rows["valid"]]))}
    chosen = dataclasses.replace(table, info=info, preprocessing=learned, rows=rows)
    return Data(chosen, matrix, named["numeric"] + named["categorical"], getattr(settings.data, "balance", "none"))


def to_matrix(numeric: np.ndarray, categorical: np.ndarray) -> np.ndarray:
    if not categorical.shape[1]:
        return numeric
    codes = categorical.astype(np.float32) - 1
    codes[codes < 0] = np.nan
    return np.concatenate([numeric, codes], axis=1, dtype=np.float32)


def cut(settings: Settings, data: Data) -> list[Fold]:
    """The folds. Raises UserError where they cannot be cut."""
    table, count, split = data.table, settings.boost.folds, settings.boost.split
    if not count:
        if split != "auto":
            raise UserError(f'boost.split = "{split}": says how folds are cut, and there are none; set boost.folds, or leave it out')
        return [(table.rows["train"], table.rows["valid"])]
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, TimeSeriesSplit

    if data.balance == "undersample":
        raise UserError('data.balance = "undersample": would judge folds by rows that were dropped at will; use "class_weights", or boost.folds = 0')
    rows, shuffled = table.rows["folds"], {"shuffle": True, "random_state": getattr(settings.data, "split_seed", 0)}
    target, groups = table.target[rows], None if table.groups is None else table.groups[rows]
    if not table.info.labels:  # numbers are stratified by their ranks, in ten classes
        target = np.argsort(np.argsort(target, kind="stable")) * max(1, min(10, len(rows) // count)) // len(rows)
    if split == "auto":
        split = "stratified" if groups is None else "group"
    if split == "group" and groups is None:
        raise UserError('boost.split = "group": needs data.group, the column of which equal values stay in one fold')
    if split == "time":
        if "test" in getattr(settings.data, "fractions", dict)():
            raise UserError(
                'boost.split = "time": the test part is drawn from all times; set data.test_fraction = 0, or data.test where there is a file'
            )
        splitter, most, what = TimeSeriesSplit, len(rows) - 1, "rows after the first"
    elif split == "group":
        largest = np.unique(target, return_counts=True)[1].max()
        splitter, most, what = StratifiedGroupKFold, min(len(np.unique(groups)), largest), "groups, or rows of the largest class"
    else:
        splitter, most, what = StratifiedKFold, np.unique(target, return_counts=True)[1].min(), "rows of the smallest class"
    if count > most:
        raise UserError(f"boost.folds = {count}: there are only {most} {what}; choose at most as many")
    folds = splitter(count, **(shuffled if split != "time" else {})).split(rows, target, groups)
    return [(rows[fit], rows[held]) for fit, held in folds]

"""Tables: CSV, TSV or Parquet, one file split by fraction or a file for each part.

Two layers. `read` gives raw columns, as gradient boosting wants them; `load` scales their numbers for a deep model. What
is learned from the training rows (vocabularies, scales, label names) is kept as JSON, so that `read_rows` turns a new
file into the same tensors.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pydantic
import torch
from pydantic import Field
from torch import Tensor

from data import Info, Rows, Splits, _columns, _scale
from data._columns import Columns
from data._dataset import TableDataset, part_dataset
from data._files import Source, codes, no_rows, numbers, open_source
from data._parts import split_rows, undersample
from engine.config import DataConfig, UserError, suggestion


class Config(DataConfig):
    train: str
    """CSV, TSV or Parquet file, plain or compressed (.gz, .bz2, .zst, .lz4)"""
    valid: str = ""
    """validation file; empty: valid_fraction of the training file"""
    test: str = ""
    """test file; empty: test_fraction of the training file"""
    target: str
    """column to predict"""
    drop: list[str] = []
    """columns that are no features"""
    categorical: list[str] = []
    """columns of categories, read as text ("007" stays "007"); besides these, every column that holds a text is one"""
    numeric: list[str] = []
    """columns that must hold numbers; besides these, every column of which all values are numbers or missing is one"""
    id: str = ""
    """column copied to the predictions; never a feature"""
    group: str = ""
    """column of which equal values stay in one part (a patient, a film); never a feature"""
    weight: str = ""
    """column of sample weights, 0 or more; never a feature"""
    valid_fraction: float = Field(0.2, gt=0, lt=1)
    """share of the training file for validation, where valid is empty"""
    test_fraction: float = Field(0.2, ge=0, lt=1)
    """share of the training file for the test, where test is empty; 0 = no test"""
    split_seed: int = Field(0, ge=0)
    """seed of the split by fraction and of undersampling; run.seed leaves them alone"""
    separator: str = Field("", max_length=1)
    """character between the fields of a CSV; empty: found among , ; | and tab"""
    encoding: str = ""
    """of a CSV, such as "cp1252"; empty: what its first bytes say, else UTF-8"""
    numeric_transform: Literal["standard", "quantile", "none"] = "standard"
    """scale of numbers: mean 0 and deviation 1; a normal distribution by quantiles; as they are"""
    balance: Literal["none", "class_weights", "undersample"] = "none"
    """training classes of unequal size: weigh samples by rows / (classes x rows of the class), or drop rows of the larger ones"""

    @pydantic.model_validator(mode="after")
    def fractions_leave_rows(self) -> Self:
        total = (0 if self.valid else self.valid_fraction) + (0 if self.test else self.test_fraction)
        if total >= 1:
            raise ValueError(f"valid_fraction + test_fraction = {total:g}: must be less than 1, to leave rows for training")
        return self


@dataclass
class Table:
    """Raw columns of all n rows, those of the training file first."""

    numeric: np.ndarray
    """float32 [n, k], NaN where missing"""
    categorical: np.ndarray
    """int32 [n, c]: 0 where missing or unseen in training, else the position in the training vocabulary + 1"""
    target: np.ndarray
    """int64 [n] class numbers, or float32 [n] in the target's own units"""
    rows: dict[str, np.ndarray]
    """"train", "valid" and, where there is one, "test": int64 rows in ascending order"""
    weights: np.ndarray | None
    """float32 [n] of the weight column"""
    groups: np.ndarray | None
    """int32 [n]: equal numbers where the group column is equal"""
    ids: list | None
    """values of the id column"""
    info: Info
    preprocessing: dict[str, Any]
    """JSON: what was learned from the training rows"""
    notes: list[str]


def load(config: Config, kind: str = "auto") -> Splits:
    """Tensors for a deep model. `kind` is task.kind. Raises UserError for what is wrong with the files."""
    return tensors(read(config, kind), config)


def read(config: Config, kind: str = "auto") -> Table:
    """The raw columns. `kind` is "binary", "multiclass", "regression", or "auto": told from the target."""
    names = {"train": config.train, "valid": config.valid, "test": config.test}
    sources = {
        part: open_source(config.path(name), f"data.{part}", config.separator, config.encoding)
        for part, name in names.items()
        if name
    }
    return assemble(sources, config, kind)


def assemble(sources: dict[str, Source], config: Config, kind: str = "auto") -> Table:
    """The table of opened files, of which "train" may be the only one."""
    notes: list[str] = []
    names = _columns.choose(sources, config, notes)
    counts, kinds = {}, {}
    for part, source in sources.items():
        counts[part], found = source.survey([*names, config.target] if part == "train" else [])
        kinds = kinds or found
    numeric, categorical = _columns.divide(sources["train"], names, kinds, config)
    columns = _columns.fill(sources, counts, numeric, categorical, config, kinds[config.target] == "number")
    target, info = label(columns, config, kind, counts["train"], notes)
    rows = part_rows(columns, target, info, counts, config)
    vocabularies = _columns.learn_vocabularies(columns, categorical, rows["train"], notes)
    numeric, missing = _columns.learn_numeric(columns, numeric, rows["train"], notes)
    if not numeric and not vocabularies:
        raise UserError(f"{sources['train'].path}: no feature is left beside the target {config.target!r}; see data.drop")
    if info.kind == "regression":
        target = target.astype(np.float32)
        known = target[rows["train"]].astype(np.float64)
        if known.min() == known.max():
            raise nothing_to_learn(config, f"{known[0]:g}")
        info = dataclasses.replace(info, target_mean=float(known.mean()), target_std=float(known.std()))
    info = dataclasses.replace(info, numeric=len(numeric), categories=[len(words) + 1 for words in vocabularies.values()])
    notes += [part_note(part, target[positions], info) for part, positions in rows.items()]
    preprocessing = {
        "target": config.target,
        "id": config.id,
        "numeric": numeric,
        "missing": missing,
        "categorical": list(vocabularies),
        "vocabularies": vocabularies,
        "labels": info.labels,
        "target_mean": info.target_mean,
        "target_std": info.target_std,
        "separator": sources["train"].separator,
        "encoding": sources["train"].encoding,
    }
    features = (columns.numeric, columns.categorical)
    return Table(*features, target, rows, columns.weights, columns.groups, columns.ids, info, preprocessing, notes)


def label(columns: Columns, config: Config, kind: str, count: int, notes: list[str]) -> tuple[np.ndarray, Info]:
    """The target as int64 class numbers or as it is, and the task; `count` rows are the training file's."""
    values, words = columns.target, list(columns.words[config.target])
    if kind == "regression" or (kind == "auto" and not words and not few_integers(values[:count])):
        if words:
            remedy = 'set task.kind = "auto", or name a column of numbers in data.target'
            raise UserError(f'task.kind = "regression": the target {config.target!r} holds texts such as {words[0]!r}; {remedy}')
        notes += [f"task: regression, since {config.target} has many different numbers"] if kind == "auto" else []
        return values, Info("regression", 1)
    if words:
        labels = sorted(words)
        target = np.argsort(np.argsort(words))[values - 1]
    else:
        found, target = np.unique(values, return_inverse=True)
        labels = [str(int(value)) if value.is_integer() else repr(value) for value in found.tolist()]
    if len(labels) < 2:
        raise nothing_to_learn(config, labels[0])
    if kind == "auto":
        kind = "binary" if len(labels) == 2 else "multiclass"
        notes.append(f"task: {kind}, since {config.target} has {len(labels)} different values")
    return target.astype(np.int64), Info(kind, 1 if kind == "binary" else len(labels), labels)


def nothing_to_learn(config: Config, value: str) -> UserError:
    return UserError(f"data.target = {config.target!r}: is {value} in every training row, so there is nothing to learn")


def few_integers(values: np.ndarray) -> bool:
    if len(np.unique(values[:65536])) > 20:
        return False
    found = np.unique(values)
    return len(found) <= 20 and bool((found == np.round(found)).all())


def part_rows(columns: Columns, target: np.ndarray, info: Info, counts: dict[str, int], config: Config) -> dict[str, np.ndarray]:
    """Rows of each part: a file's own, or a fraction of the training file's. Raises UserError for labels that training lacks."""
    rows, start = {}, 0
    for part, count in counts.items():
        rows[part] = np.arange(start, start := start + count)
    wanted = {"valid": config.valid_fraction, "test": config.test_fraction}
    fractions = {part: share for part, share in wanted.items() if part not in rows and share}
    if fractions:
        count = counts["train"]
        groups = None if columns.groups is None else columns.groups[:count]
        classes = target[:count] if info.labels else np.zeros(count, np.int64)
        rows |= split_rows(classes, groups, fractions, info.labels, config.split_seed)
    rows = {part: rows[part] for part in ("train", "valid", "test") if part in rows}
    check_labels(target, rows, info, config)
    if config.balance == "undersample":
        rows["train"] = undersample(rows["train"], target, config.split_seed)
    return rows


def check_labels(target: np.ndarray, rows: dict[str, np.ndarray], info: Info, config: Config) -> None:
    if not info.labels:
        if config.balance != "none":
            what = f"the target {config.target!r} is a number, not a class"
            raise UserError(f'data.balance = "{config.balance}": {what}; set it to "none"')
        return
    trained = np.unique(target[rows["train"]])
    for part, positions in rows.items():
        unknown = np.setdiff1d(target[positions], trained)
        if len(unknown):
            what = f"label {info.labels[unknown[0]]!r} of {config.target!r} is in {part} and not in train"
            raise UserError(f"data.{part}: {what}; correct it, or give training rows of that class")
    if info.kind == "binary" and len(info.labels) > 2:
        what = f"the target {config.target!r} has {len(info.labels)} values ({', '.join(info.labels[:5])})"
        raise UserError(f'task.kind = "binary": {what}; use "multiclass"')


def part_note(part: str, target: np.ndarray, info: Info) -> str:
    counts = np.bincount(target, minlength=len(info.labels))[:20] if info.labels else []
    classes = ", ".join(f"{name} {count:,}" for name, count in zip(info.labels, counts, strict=False))
    return f"{part}: {len(target):,} rows" + (f" ({classes}{', …' if len(info.labels) > 20 else ''})" if classes else "")


def tensors(table: Table, config: Config) -> Splits:
    """Scale the table's numbers in place, put its target into a batch's form, and hand out its parts."""
    preprocessing, train = table.preprocessing, table.rows["train"]
    scales = _scale.learn(table.numeric, train, config.numeric_transform, config.split_seed)
    preprocessing = {**preprocessing, "scales": scales}
    columns, info = batch_columns(table.numeric, table.categorical, preprocessing), table.info
    if "numeric" in columns:
        edges = _scale.bin_edges(columns["numeric"].numpy(), train) if config.numeric_transform == "quantile" else None
        info = dataclasses.replace(info, numeric=columns["numeric"].shape[1], more={"quantiles": edges} if edges else {})
    columns["target"] = batch_target(table.target, info)
    parts = {}
    for part, rows in table.rows.items():
        weights = None if table.weights is None else torch.from_numpy(table.weights)
        if part == "train" and config.balance == "class_weights":
            counts = np.bincount(table.target[train])
            by_class = torch.from_numpy((len(train) / (len(counts) * counts))[table.target].astype(np.float32))
            weights = by_class if weights is None else by_class * weights
        parts[part] = part_dataset(columns, rows, weights)
    return Splits(parts["train"], parts["valid"], parts.get("test"), info, preprocessing, table.notes)


def batch_columns(numeric: np.ndarray, categorical: np.ndarray, preprocessing: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of raw features; numbers are scaled in place where there are scales (a boosted model has none)."""
    columns = {}
    if numeric.shape[1]:
        if "scales" in preprocessing:
            missing = [preprocessing["numeric"].index(name) for name in preprocessing["missing"]]
            numeric = _scale.apply(numeric, missing, preprocessing["scales"])
        columns["numeric"] = torch.from_numpy(numeric)
    if categorical.shape[1]:
        columns["categorical"] = torch.from_numpy(categorical)
    return columns


def batch_target(target: np.ndarray, info: Info) -> Tensor:
    """Class numbers int64 [n], of two classes float32 [n]; numbers float32 [n], standardised."""
    if info.kind == "multiclass":
        return torch.from_numpy(target)
    return torch.from_numpy(((target - info.target_mean) / info.target_std).astype(np.float32))


def read_rows(
    path: str | Path, config: Config, preprocessing: dict[str, Any], info: Info, chunk_rows: int = 65536
) -> Iterator[Rows]:
    """A file to predict, in chunks of at most `chunk_rows` rows: columns in any order, extra ones ignored, target optional.

    By the preprocessing of `Splits` the numbers are scaled; by that of `Table`, which has no scales, they stay raw.
    Raises UserError for a missing column, a text where training had numbers, or a label unknown to the run.
    """
    source = open_source(Path(path), "--input", config.separator, config.encoding)
    numeric, categorical, target = (preprocessing[key] for key in ("numeric", "categorical", "target"))
    for name in [*numeric, *categorical]:
        if name not in source.names:
            raise UserError(f"{path}: has no column {name!r}, which the run was trained with{suggestion(name, source.names)}")
    identity = preprocessing["id"] if preprocessing["id"] in source.names else ""
    others = [name for name in (target, identity) if name in source.names]
    words = {name: numbered(preprocessing["vocabularies"][name]) for name in categorical}
    start = 0
    for batch in source.batches([*numeric, *categorical, *others], chunk_rows):
        count = batch.num_rows
        features = _columns.features(batch, numeric, categorical, words, source.path, grow=False)
        columns = batch_columns(*features, preprocessing)
        if target in others:
            columns["target"] = batch_target(read_target(batch.column(target), f"{path}: column {target!r}", info, start), info)
        ids = {identity: batch.column(identity).to_pylist()} if identity else {"row": list(range(start, start + count))}
        yield Rows(TableDataset(columns), ids, target in others)
        start += count
    if not start:
        raise no_rows(source.path)


def numbered(words: list[str]) -> dict[str, int]:
    return {word: code for code, word in enumerate(words, start=1)}


def read_target(column: Any, where: str, info: Info, start: int) -> np.ndarray:
    """A target to score against, as in Table. Raises UserError for what is missing or unknown to the run."""
    if info.labels:
        target = codes(column, numbered(info.labels), grow=False).astype(np.int64) - 1
        wrong = target < 0
    else:
        target = numbers(column, where).astype(np.float32)
        wrong = np.isnan(target)
    if wrong.any():
        row = int(wrong.argmax())
        known = f"; the run knows {', '.join(info.labels[:20])}" if info.labels else ""
        what = f"{column[row].as_py()!r} in row {start + row + 1} is no {'label' if known else 'number'} to score against"
        raise UserError(f"{where}: {what}{known}; correct it, or remove the column to predict without scores")
    return target

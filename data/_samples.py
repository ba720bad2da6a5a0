"""What the rows of files have in common, whatever they hold: parts, targets, weights and groups; and how a new file is gone through."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import pydantic
import torch
from pydantic import Field
from torch import Tensor

from data import Info
from data._dataset import split_rows, undersample
from engine.config import DataConfig, UserError, suggestion


class Parts(DataConfig):
    """How the rows of files are read, split and weighed."""

    separator: Annotated[str, pydantic.BeforeValidator(lambda text: "\t" if text == "\\t" else text)] = Field("", max_length=1)
    """character between the fields of a CSV; empty: found among , ; | and tab"""
    encoding: str = ""
    """of a CSV, such as "cp1252"; empty: what its first bytes say, else UTF-8"""
    quote: str = Field('"', max_length=1)
    """character around a field of a CSV that holds separators or line breaks; empty: fields stand as they are, quotes too"""
    valid_fraction: float = Field(0.2, gt=0, lt=1)
    """share of the training file for validation, where valid is empty"""
    test_fraction: float | None = Field(None, ge=0, lt=1)
    """share of the training file for the test, where test is empty; 0 = no test; default: 0.2, or 0 where valid names a file"""
    split_seed: int = Field(0, ge=0)
    """seed of the split by fraction and of undersampling; run.seed leaves them alone"""
    balance: Literal["none", "class_weights", "undersample"] = "none"
    """training classes of unequal size: weigh samples by rows / (classes x rows of the class), or drop rows of the larger ones"""

    def open(self, path: str | Path, key: str = "--input") -> Any:
        """A file as data._files.Source. `key` is the setting that names it. Raises UserError."""
        from data._files import open_source  # pyarrow takes a while, which --help need not wait for

        return open_source(Path(path), key, self.separator, self.encoding, self.quote)

    def fractions(self) -> dict[str, float]:
        """Shares of the training file for the parts without a file of their own."""
        files = [part for part in ("valid", "test") if getattr(self, part, "")]
        test = self.test_fraction if self.test_fraction is not None else 0.0 if files else 0.2
        return {part: share for part, share in (("valid", self.valid_fraction), ("test", test)) if share and part not in files}

    @pydantic.model_validator(mode="after")
    def fractions_leave_rows(self) -> Self:
        if (total := sum(self.fractions().values())) >= 1:
            raise ValueError(f"valid_fraction + test_fraction = {total:g}: must be less than 1, to leave rows for training")
        return self


class Files(Parts):
    """What the rows of files are for, whatever they hold."""

    train: str
    """CSV, TSV, Parquet or JSONL (.jsonl) file, plain or compressed (.gz, .bz2, .zst, .lz4)"""
    valid: str = ""
    """validation file; empty: valid_fraction of the training file"""
    test: str = ""
    """test file; empty: test_fraction of the training file"""
    target: str
    """column to predict"""
    id: str = ""
    """column copied to the predictions; never a feature"""
    group: str = ""
    """column of which equal values stay in one part (a patient, a film); never a feature"""
    weight: str = ""
    """column of sample weights, 0 or more, in the loss and in the boosting libraries' own metrics; other scores count rows alike. Never a feature"""

    def sources(self) -> dict[str, Any]:
        """The files, opened (data._files.Source), by part. Raises UserError."""
        names = {"train": self.train, "valid": self.valid, "test": self.test}
        return {part: self.open(self.path(name), f"data.{part}") for part, name in names.items() if name}


@dataclass
class Samples:
    """What all n rows have, whatever their features; those of the training file come first."""

    target: np.ndarray | None  # int64 [n] class numbers, or float32 [n] in the target's own units; None in a file to predict without
    rows: dict[str, np.ndarray]  # "train", "valid" and, where there is one, "test": int64 rows in ascending order
    weights: np.ndarray | None  # float32 [n] of the weight column
    groups: np.ndarray | None  # int32 [n]: equal numbers where the group column is equal
    info: Info

    def part_weights(self, part: str, balance: str) -> Tensor | None:
        """float32 [n]: the weight column, times those of the classes in training."""
        weights = self.weights
        if part == "train" and balance == "class_weights":
            counts = np.bincount(self.target[self.rows[part]])
            by_class = (counts.sum() / (len(counts) * counts))[self.target].astype(np.float32)
            weights = by_class if weights is None else by_class * weights
        return None if weights is None else torch.from_numpy(weights)


def read_samples(sources: dict[str, Any], config: Files, kind: str, notes: list[str]) -> Samples:
    """Targets, parts, weights and groups of opened files. Raises UserError."""
    from data import _columns

    target, kind, labels = read_target(sources, config, kind, notes)
    groups = _columns.read(sources, config.group, "text", complete=True)[0].astype(np.int32) if config.group else None
    weights = _columns.read(sources, config.weight, "number", complete=True)[0].astype(np.float32) if config.weight else None
    if weights is not None and weights.min() < 0:
        raise UserError(f"data.weight = {config.weight!r}: holds a negative weight, {weights.min():g}; weights are 0 or more")
    ends = np.cumsum([len(source.column(config.target)) for source in sources.values()])
    rows = part_rows(dict(zip(sources, np.split(np.arange(ends[-1]), ends[:-1]), strict=True)), target, labels, groups, config, notes)
    for part, chosen in rows.items() if weights is not None else ():
        if not weights[chosen].any():
            raise UserError(f"data.weight = {config.weight!r}: is 0 in every {part} row, so no score of them has a value; choose another column")
    trained = target[rows["train"]]
    if trained.min() == trained.max():
        value = labels[trained[0]] if labels else f"{trained[0]:g}"
        raise UserError(f"data.target = {config.target!r}: is {value} in every training row, so there is nothing to learn; choose another column")
    moments = {} if labels else {"target_mean": float(trained.mean(dtype=np.float64)), "target_std": float(trained.std(dtype=np.float64))}
    return Samples(target, rows, weights, groups, Info(kind, 1 if kind in ("binary", "regression") else len(labels), labels, **moments))


def read_target(sources: dict[str, Any], config: Files, kind: str, notes: list[str]) -> tuple[np.ndarray, str, list[str]]:
    """The target as int64 class numbers or float32 numbers, the task, and the names of the classes. Raises UserError."""
    from data import _columns

    values, words = _columns.read(sources, config.target, complete=True)
    found, name = np.unique(values), f"the target {config.target!r}"
    if kind == "auto":
        trained = np.unique(values[: len(sources["train"].column(config.target))])
        classes = words or (len(trained) <= 20 and (trained == np.round(trained)).all())
        kind = ("binary" if len(found) == 2 else "multiclass") if classes else "regression"
        notes.append(f"task: {kind}, since {config.target} has {len(found):,} different values")
    if kind == "regression":
        if words:
            raise UserError(f'task.kind = "regression": {name} holds texts such as {words[0]!r}; use "auto", or a column of numbers')
        if config.balance != "none":
            raise UserError(f'data.balance = "{config.balance}": {name} is a number, not a class; set it to "none"')
        return values.astype(np.float32), kind, []
    labels = words or [repr(value).removesuffix(".0") for value in found.tolist()]
    if kind == "binary" and len(labels) > 2:
        other = "multiclass" if words or len(labels) <= 20 else "regression"
        raise UserError(f'task.kind = "binary": {name} has {len(labels)} values ({", ".join(labels[:5])}); use "{other}"')
    return np.searchsorted(found, values), kind, labels


def part_rows(
    rows: dict[str, np.ndarray], target: np.ndarray, labels: list[str], groups: np.ndarray | None, config: Parts, notes: list[str]
) -> dict[str, np.ndarray]:
    """Rows of each part, from those of each file. Raises UserError for labels that training lacks."""
    if shares := config.fractions():
        count = len(rows["train"])
        rows = rows | split_rows(target[:count], labels, None if groups is None else groups[:count], shares, config.split_seed)
    if config.balance == "undersample":
        rows["train"] = undersample(rows["train"], target, config.split_seed)
    rows = {part: rows[part] for part in ("train", "valid", "test") if part in rows}
    sizes = {part: np.bincount(target[positions], minlength=len(labels)) if labels else np.zeros(0) for part, positions in rows.items()}
    for part, positions in rows.items():
        for unknown in np.flatnonzero((sizes["train"] == 0) & (sizes[part] > 0)):
            what = f"label {labels[unknown]!r} of {config.target!r} is in {part} and not in train"
            raise UserError(f"data.{part}: {what}; correct it, or give training rows of that class")
        shown = [f"{name} {size:,}" for name, size in zip(labels[:20], sizes[part], strict=False)] + ["…"] * (len(labels) > 20)
        notes.append(f"{part}: {len(positions):,} rows" + (f" ({', '.join(shown)})" if shown else ""))
    return rows


def batch_target(target: np.ndarray, info: Info) -> Tensor:
    """Class numbers int64 [n], of two classes float32 [n]; numbers float32 [n], standardised."""
    return torch.from_numpy(target if info.kind == "multiclass" else ((target - info.target_mean) / info.target_std).astype(np.float32))


def new_rows(
    source: Any, wanted: list[str], target: str, identity: str, info: Info, count: int
) -> Iterator[tuple[Any, int, np.ndarray | None, dict[str, list]]]:
    """A file to predict (data._files.Source), `count` rows at a time: their pyarrow.Table, the first one's number in the file, the target
    where the file has it, and ids. Raises UserError for a wanted column that it lacks, or a label unknown to the run."""
    for name in wanted:
        if name not in source.names:
            raise UserError(f"{source.path}: has no column {name!r}, which the run was trained with{suggestion(name, source.names)}")
    start = 0
    for table in source.batches([name for name in source.names if name in {*wanted, target, identity}], count):
        truth, ids = None, {"row": list(range(start, start + len(table)))}
        if identity in table.column_names:
            ids = {identity: table.column(identity).to_pylist()}
        if target in table.column_names:
            truth = known_target(table.column(target), f"{source.path}: column {target!r}", info, start)
        yield table, start, truth, ids
        start += len(table)


def known_target(column: Any, where: str, info: Info, start: int) -> np.ndarray:
    """A target (pyarrow.ChunkedArray) as `read_target` gives it. Raises UserError for what is missing or unknown to the run."""
    from data import _columns

    if info.labels:
        target = _columns.texts([(column, where)], info.labels)[0].astype(np.int64) - 1  # -1 or -2 for what is no label
        wrong, known = target < 0, f"label of the run ({', '.join(info.labels[:20])})"
    else:
        target = _columns.numbers(column, where).astype(np.float32)
        wrong, known = np.isnan(target), "number"
    if wrong.any():
        row = int(wrong.argmax())
        raise UserError(
            f"{where}: {column[row].as_py()!r} in row {start + row + 1} is no {known}; correct it, or remove the column to predict without scores"
        )
    return target

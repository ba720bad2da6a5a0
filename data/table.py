"""Tables: CSV, TSV or Parquet, one file split by fraction or a file for each part.

Two layers. `read` gives raw columns, as gradient boosting wants them; `load` scales their numbers for a deep model. What is learned
from the training rows (vocabularies, scales, label names) is kept as JSON, so that `read_rows` turns a new file into the same tensors.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import pydantic
import torch
from pydantic import Field
from torch import Tensor

from data import Info, Rows, Splits, _scale
from data._dataset import TableDataset, part_dataset, split_rows, undersample
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
    """column of sample weights, 0 or more; never a feature"""

    def sources(self) -> dict[str, Any]:
        """The files, opened (data._files.Source), by part. Raises UserError."""
        from data._files import open_source  # pyarrow takes a while, which --help need not wait for

        names = {"train": self.train, "valid": self.valid, "test": self.test}
        form = (self.separator, self.encoding, self.quote)
        return {part: open_source(self.path(name), f"data.{part}", *form) for part, name in names.items() if name}


class Preparation(Parts):
    numeric_transform: Literal["standard", "quantile", "none"] = "standard"
    """scale of numbers: mean 0 and deviation 1; a normal distribution by quantiles; as they are"""


class Config(Files, Preparation):
    drop: list[str] = []
    """columns that are no features"""
    categorical: list[str] = []
    """columns of categories, read as text ("007" stays "007"); besides these, every column that holds a text is one"""
    numeric: list[str] = []
    """columns that must hold numbers; besides these, every column of which all values are numbers or missing is one"""


@dataclass
class Samples:
    """What all n rows have, whatever their features; those of the training file come first."""

    target: np.ndarray  # int64 [n] class numbers, or float32 [n] in the target's own units
    rows: dict[str, np.ndarray]  # "train", "valid" and, where there is one, "test": int64 rows in ascending order
    weights: np.ndarray | None  # float32 [n] of the weight column
    groups: np.ndarray | None  # int32 [n]: equal numbers where the group column is equal
    info: Info

    def part_weights(self, part: str, balance: str) -> Tensor | None:
        """float32 [n]: the weight column, times those of the classes in training."""
        weights, train = self.weights, self.rows["train"]
        if part == "train" and balance == "class_weights":
            counts = np.bincount(self.target[train])
            by_class = (len(train) / (len(counts) * counts))[self.target].astype(np.float32)
            weights = by_class if weights is None else by_class * weights
        return None if weights is None else torch.from_numpy(weights)


@dataclass
class Table(Samples):
    """Raw columns of all n rows."""

    numeric: np.ndarray  # float32 [n, k], NaN where missing
    categorical: np.ndarray  # int32 [n, c]: 0 where missing or unseen in training, else the position in the training vocabulary + 1
    ids: Any  # pyarrow.ChunkedArray [n]: the id column as texts, or None
    preprocessing: dict[str, Any]  # JSON: what was learned from the training rows
    notes: list[str]


def load(config: Config, kind: str = "auto") -> Splits:
    """Tensors for a deep model. `kind` is task.kind. Raises UserError for what is wrong with the files."""
    return tensors(read(config, kind), config)


def read(config: Config, kind: str = "auto") -> Table:
    """The raw columns. `kind` is "binary", "multiclass", "regression", or "auto": told from the target."""
    return assemble(config.sources(), config, kind)


def assemble(sources: dict[str, Any], config: Config, kind: str = "auto") -> Table:
    """The table of opened files (data._files.Source), of which "train" may be the only one."""
    import pyarrow as pa

    from data import _columns

    notes: list[str] = []
    names = _columns.choose(sources, config, notes)
    samples = read_samples(sources, config, kind, notes)
    ids = [chunk for source in sources.values() for chunk in source.column(config.id).cast(pa.string()).chunks] if config.id else None
    numeric, categorical, learned = _columns.read_features(sources, names, config, len(samples.target), samples.rows["train"], notes)
    categories = [len(words) + 1 for words in learned["vocabularies"].values()]
    info = dataclasses.replace(samples.info, numeric=len(learned["numeric"]), categories=categories)
    preprocessing = {"target": config.target, "id": config.id, "labels": info.labels, "separator": sources["train"].separator, **learned}
    shared = {**vars(samples), "info": info}
    return Table(**shared, numeric=numeric, categorical=categorical, ids=ids and pa.chunked_array(ids), preprocessing=preprocessing, notes=notes)


def read_samples(sources: dict[str, Any], config: Files, kind: str, notes: list[str]) -> Samples:
    """Targets, parts, weights and groups of opened files. Raises UserError."""
    from data import _columns

    target, kind, labels = _columns.read_target(sources, config, kind, notes)
    groups = _columns.read(sources, config.group, "text", complete=True)[0].astype(np.int32) if config.group else None
    weights = _columns.read(sources, config.weight, "number", complete=True)[0].astype(np.float32) if config.weight else None
    if weights is not None and weights.min() < 0:
        raise UserError(f"data.weight = {config.weight!r}: holds a negative weight, {weights.min():g}; weights are 0 or more")
    files, start = {}, 0
    for part, source in sources.items():
        files[part] = np.arange(start, start := start + len(source.column(config.target)))
    rows = part_rows(files, target, labels, groups, config, notes)
    trained = target[rows["train"]]
    if trained.min() == trained.max():
        value = labels[trained[0]] if labels else f"{trained[0]:g}"
        raise UserError(f"data.target = {config.target!r}: is {value} in every training row, so there is nothing to learn; choose another column")
    moments = {} if labels else {"target_mean": float(trained.mean(dtype=np.float64)), "target_std": float(trained.std(dtype=np.float64))}
    return Samples(target, rows, weights, groups, Info(kind, 1 if kind in ("binary", "regression") else len(labels), labels, **moments))


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


def tensors(table: Table, config: Preparation) -> Splits:
    """Scale the table's numbers in place, put its target into a batch's form, and hand out its parts."""
    train, info = table.rows["train"], table.info
    preprocessing = {**table.preprocessing, "scales": _scale.learn(table.numeric, train, config.numeric_transform, config.split_seed)}
    columns = batch_columns(table.numeric, table.categorical, preprocessing)
    if "numeric" in columns:
        numeric = columns["numeric"].numpy()
        more = {"quantiles": _scale.bin_edges(numeric, train)} if config.numeric_transform == "quantile" else {}
        info = dataclasses.replace(info, numeric=numeric.shape[1], more=more)
    columns["target"] = batch_target(table.target, info)
    parts = {}
    for part, rows in table.rows.items():
        parts[part] = part_dataset(columns, rows, table.part_weights(part, config.balance))
    return Splits(parts["train"], parts["valid"], parts.get("test"), info, preprocessing, table.notes)


def batch_columns(numeric: np.ndarray, categorical: np.ndarray, preprocessing: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of raw features; numbers are scaled in place where there are scales (a boosted model has none)."""
    if "scales" in preprocessing:
        missing = [preprocessing["numeric"].index(name) for name in preprocessing["missing"]]
        numeric = _scale.apply(numeric, missing, preprocessing["scales"])
    return {name: torch.from_numpy(array) for name, array in (("numeric", numeric), ("categorical", categorical)) if array.shape[1]}


def batch_target(target: np.ndarray, info: Info) -> Tensor:
    """Class numbers int64 [n], of two classes float32 [n]; numbers float32 [n], standardised."""
    return torch.from_numpy(target if info.kind == "multiclass" else ((target - info.target_mean) / info.target_std).astype(np.float32))


def read_rows(path: str | Path, config: Preparation, preprocessing: dict[str, Any], info: Info, chunk_rows: int = 65536) -> Iterator[Rows]:
    """A file to predict, in chunks of at most `chunk_rows` rows: columns in any order, extra ones ignored, target optional.

    By the preprocessing of `Splits` the numbers are scaled; by that of `Table`, which has no scales, they stay raw.
    Raises UserError for a missing column, a text where training had numbers, or a label unknown to the run.
    """
    from data import _columns, _files

    source = _files.open_source(Path(path), "--input", config.separator, config.encoding, config.quote)
    numeric, vocabularies, target, identity = (preprocessing[key] for key in ("numeric", "vocabularies", "target", "id"))
    for name in [*numeric, *vocabularies]:
        if name not in source.names:
            raise UserError(f"{path}: has no column {name!r}, which the run was trained with{suggestion(name, source.names)}")
    start = 0
    for batch in source.batches([name for name in source.names if name in {*numeric, *vocabularies, target, identity}], chunk_rows):
        given = {name: (batch.column(name), f"{path}: column {name!r}") for name in batch.column_names}
        numbers = np.array([_columns.numbers(*given[name]) for name in numeric], np.float32)
        texts = np.array([_columns.texts([given[name]], words)[0] for name, words in vocabularies.items()], np.int32)
        columns = batch_columns(*(array.reshape(-1, len(batch)).T.copy() for array in (numbers, texts)), preprocessing)
        if target in given:
            columns["target"] = batch_target(_columns.known_target(*given[target], info, start), info)
        ids = {identity: batch.column(identity).to_pylist()} if identity in given else {"row": list(range(start, start + len(batch)))}
        yield Rows(TableDataset(columns), ids, target in given)
        start += len(batch)

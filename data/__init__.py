"""One kind of data a file: `class Config(DataConfig)`, `load(config, kind) -> Splits` (kind is task.kind), and for new files
`read_rows(path, config, preprocessing, info, chunk_rows) -> Iterator[Rows]`.

`data.name = "table"` means `data/table.py`: the folder listing is the registry, so adding a dataset is adding a file.

A dataset is map-style. `__getitems__(positions)` takes an int64 tensor of positions [b] and returns one batch as a dict
of tensors whose first dimension is b; a position is `epoch * len(dataset) + index`, so that augmentation may depend on
the epoch. "target" is the key the losses read. A dataset whose samples do not count alike also has
`weights(indices) -> float tensor [b]`; a weight belongs to a sample, so no process ever needs to ask another.
"""

from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import Dataset


@dataclass(frozen=True)
class Info:
    """What a model must know of its data to be built. It is kept as JSON beside the weights: plain values only."""

    kind: str
    """"binary", "multiclass", "regression", or a kind that the model's file brings"""
    outputs: int
    """width of the model's output: 1 for binary and regression, the number of classes for multiclass"""
    labels: list[str] = field(default_factory=list)
    """class names by index; empty for regression"""
    numeric: int = 0
    """columns of batch["numeric"], float32 [b, numeric]"""
    categories: list[int] = field(default_factory=list)
    """vocabulary size of each column of batch["categorical"], int64 [b, len(categories)]; code 0 is missing or unseen"""
    target_mean: float = 0.0
    target_std: float = 1.0
    """regression targets in a batch are (value - mean) / std; scores and predictions are in the target's own units"""
    more: dict[str, Any] = field(default_factory=dict)
    """what only one kind of data has: a vocabulary, the shape of an image"""
    folder: str = ""
    """where weights stand that the model is built for, in inference; empty in training"""


@dataclass
class Splits:
    """The three parts of a data set and what was learned from its training part."""

    train: Dataset
    valid: Dataset
    test: Dataset | None
    info: Info
    preprocessing: dict[str, Any]
    """JSON: scales, vocabularies, label names; with it a new file is turned into the same tensors. read_rows finds in it "folder" too"""
    notes: list[str] = field(default_factory=list)
    """lines said at the start: rows a split, rows a class"""
    files: dict[str, str] = field(default_factory=dict)
    """texts that are kept as files of these names beside the weights: a tokenizer"""


@dataclass
class Rows:
    """A chunk of a file to predict, in the file's order."""

    dataset: Dataset
    """its batches have "target" only where `labelled`"""
    ids: dict[str, list]
    """columns copied to the predictions: the id column, or {"row": [...]}"""
    labelled: bool
    unseen: dict[str, int] = field(default_factory=dict)
    """by column, how many values training never saw; they count as missing"""

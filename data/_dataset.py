"""Parts of a table: which rows they have, and their batches."""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from engine.config import UserError


class TableDataset(Dataset):
    """Rows of tensors [n, ...] that several parts share; `index` (int64) names this part's, None means all. It has `weights` where they are given."""

    def __init__(self, columns: dict[str, Tensor], index: Tensor | None = None, sample_weights: Tensor | None = None) -> None:
        self.columns, self.index, self.sample_weights = columns, index, sample_weights
        self.length = len(index if index is not None else next(iter(columns.values())))
        if sample_weights is not None:
            self.weights = self.weights_of

    def __len__(self) -> int:
        return self.length

    def rows(self, positions: Tensor) -> Tensor:
        rows = positions % self.length
        return rows if self.index is None else self.index.index_select(0, rows)

    def weights_of(self, indices: Tensor) -> Tensor:
        return self.sample_weights.index_select(0, self.rows(indices))

    def __getitems__(self, positions: Tensor) -> dict[str, Tensor]:
        rows = self.rows(positions)
        batch = {name: column.index_select(0, rows) for name, column in self.columns.items()}
        if "categorical" in batch:
            # int32 halves the memory of the whole; an embedding's indices are int64.
            batch["categorical"] = batch["categorical"].long()
        return batch


def part_dataset(columns: dict[str, Tensor], rows: np.ndarray, weights: Tensor | None) -> TableDataset:
    """Views of adjacent rows need no index, which saves a lookup a batch."""
    first, stop = int(rows[0]), int(rows[-1]) + 1
    if stop - first != len(rows):
        return TableDataset(columns, torch.from_numpy(rows), weights)
    return TableDataset({name: column[first:stop] for name, column in columns.items()}, None, None if weights is None else weights[first:stop])


def split_rows(classes: np.ndarray, labels: list[str], groups: np.ndarray | None, shares: dict[str, float], seed: int) -> dict[str, np.ndarray]:
    """Rows of "train" and of each named share, in ascending order. Raises UserError for a class or a part of too few.

    Every class gives the same share of its rows; where there are groups (int [n]) they stay whole instead. Shuffled end to end,
    a row or group goes to the share in which its middle lies.
    """
    generator, names = np.random.default_rng(seed), [*shares, "train"]
    parts = np.empty(len(classes), np.int8)
    strata = classes if labels and groups is None else np.zeros(len(classes), np.int8)
    for number in np.unique(strata):
        rows = np.flatnonzero(strata == number)
        if groups is None and len(rows) < len(names):
            what = f"class {labels[number]!r}" if labels else "the file"
            raise UserError(f"data.train: {what} has only {len(rows)} row(s) to split into {len(names)} parts; add rows or remove the class")
        units = np.arange(len(rows)) if groups is None else np.unique(groups, return_inverse=True)[1]
        sizes = np.bincount(units)
        order = generator.permutation(len(sizes))
        middles = (np.cumsum(sizes[order]) - sizes[order] / 2) / len(rows)
        dealt = np.empty(len(sizes), np.int8)
        dealt[order] = np.searchsorted(np.cumsum([*shares.values()]), middles)
        parts[rows] = dealt[units]
    for number, part in enumerate(names):
        if number not in parts:
            remedy = "change the fractions or data.split_seed, or give a file for each part"
            raise UserError(f"data.train: no {'row' if groups is None else 'group'} is left for {part}; {remedy}")
    return {part: np.flatnonzero(parts == number) for number, part in enumerate(names)}


def undersample(train: np.ndarray, target: np.ndarray, seed: int) -> np.ndarray:
    """As many training rows of every class as the smallest has, in ascending order."""
    generator, classes = np.random.default_rng(seed), target[train]
    found, sizes = np.unique(classes, return_counts=True)
    return np.sort(np.concatenate([generator.permutation(train[classes == number])[: sizes.min()] for number in found]))

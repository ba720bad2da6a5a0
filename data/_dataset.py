"""Batches of a table: tensors that the parts share, and the rows of each part."""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset


class TableDataset(Dataset):
    """Rows of tensors [n, ...] that several parts share; `index` (int64) names this part's, None means all."""

    def __init__(self, columns: dict[str, Tensor], index: Tensor | None = None) -> None:
        self.columns = columns
        self.index = index
        self.length = len(index if index is not None else next(iter(columns.values())))

    def __len__(self) -> int:
        return self.length

    def rows(self, positions: Tensor) -> Tensor:
        rows = positions % self.length
        return rows if self.index is None else self.index.index_select(0, rows)

    def __getitems__(self, positions: Tensor) -> dict[str, Tensor]:
        rows = self.rows(positions)
        batch = {name: column.index_select(0, rows) for name, column in self.columns.items()}
        if "categorical" in batch:
            # int32 halves the memory of the whole; an embedding's indices are int64.
            batch["categorical"] = batch["categorical"].long()
        return batch


class WeightedTableDataset(TableDataset):
    """Samples that do not count alike."""

    def __init__(self, columns: dict[str, Tensor], index: Tensor | None, sample_weights: Tensor) -> None:
        super().__init__(columns, index)
        self.sample_weights = sample_weights

    def weights(self, indices: Tensor) -> Tensor:
        return self.sample_weights.index_select(0, self.rows(indices))


def part_dataset(columns: dict[str, Tensor], rows: np.ndarray, weights: Tensor | None) -> TableDataset:
    """Views of adjacent rows need no index, which saves a lookup a batch."""
    index, first, stop = None, int(rows[0]), int(rows[-1]) + 1
    if stop - first == len(rows):
        columns = {name: column[first:stop] for name, column in columns.items()}
        weights = None if weights is None else weights[first:stop]
    else:
        index = torch.from_numpy(rows)
    return TableDataset(columns, index) if weights is None else WeightedTableDataset(columns, index, weights)

"""Data sets that come with scikit-learn: real, small, and here without a download."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import Field

from data import Info, Rows, Splits, table
from data._files import Source
from engine.config import DataConfig


class Config(DataConfig):
    dataset: Literal["digits", "breast_cancer", "wine", "diabetes"]
    """1,797 handwritten digits of 8 x 8 pixels; 569 tumours and 178 wines by measurements; 442 patients by progression"""
    valid_fraction: float = Field(0.15, gt=0, lt=0.5)
    """share of the rows for validation"""
    test_fraction: float = Field(0.2, ge=0, lt=0.5)
    """share of the rows for the test"""
    split_seed: int = Field(0, ge=0)
    """seed of the split, the same share of every class in each part"""
    numeric_transform: Literal["standard", "quantile", "none"] = "standard"
    """scale of numbers: mean 0 and deviation 1; a normal distribution by quantiles; as they are"""
    balance: Literal["none", "class_weights", "undersample"] = "none"
    """training classes of unequal size: weigh samples, or drop rows of the larger classes"""

    @pydantic.model_validator(mode="before")
    @classmethod
    def label_is_the_name(cls, values: Any) -> Any:
        if isinstance(values, dict) and not values.get("label") and isinstance(values.get("dataset"), str):
            return {**values, "label": values["dataset"]}
        return values


def load(config: Config, kind: str = "auto") -> Splits:
    """Tensors for a deep model."""
    return table.tensors(read(config, kind), as_table(config))


def read(config: Config, kind: str = "auto") -> table.Table:
    """The raw columns, named as scikit-learn names them; the target's column is "target"."""
    import pyarrow
    from sklearn import datasets

    bunch = getattr(datasets, f"load_{config.dataset}")()
    columns = {name: bunch.data[:, position] for position, name in enumerate(map(str, bunch.feature_names))}
    rows = pyarrow.table({**columns, "target": bunch.target})
    return table.assemble({"train": Source(Path(config.dataset), rows.column_names, table=rows)}, as_table(config), kind)


def read_rows(
    path: str | Path, config: Config, preprocessing: dict[str, Any], info: Info, chunk_rows: int = 65536
) -> Iterator[Rows]:
    """A file to predict, as table.read_rows."""
    return table.read_rows(path, as_table(config), preprocessing, info, chunk_rows)


def as_table(config: Config) -> table.Config:
    """The same settings as a table's."""
    shared = {name: value for name, value in config if name in table.Config.model_fields}
    return table.Config(**shared, train=config.dataset, target="target")

"""Data sets that come with scikit-learn: real, small, and here without a download."""

from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import Field

from data import Splits, table


class Config(table.Preparation):
    dataset: Literal["digits", "breast_cancer", "wine", "diabetes"]
    """1,797 handwritten digits of 8 x 8 pixels; 569 tumours and 178 wines by measurements; 442 patients by progression"""
    valid_fraction: float = Field(0.15, gt=0, lt=1)
    """share of the rows for validation"""

    @pydantic.model_validator(mode="before")
    @classmethod
    def label_is_the_name(cls, values: Any) -> Any:
        return {**values, "label": values.get("label") or str(values.get("dataset", ""))}

    def as_table(self) -> table.Config:
        shared = {name: value for name, value in self if name in table.Config.model_fields}
        return table.Config(**shared, train=self.dataset, target="target")


def load(config: Config, kind: str = "auto") -> Splits:
    """Tensors for a deep model."""
    return table.tensors(read(config, kind), config)


def read(config: Config, kind: str = "auto") -> table.Table:
    """The raw columns, named as scikit-learn names them; the target's column is "target"."""
    import pyarrow as pa
    from sklearn import datasets

    from data._files import Source

    bunch = getattr(datasets, f"load_{config.dataset}")()
    rows = pa.table([*bunch.data.T, bunch.target], [*map(str, bunch.feature_names), "target"])
    return table.assemble({"train": Source(Path(config.dataset), rows.column_names, table=rows)}, config.as_table(), kind)


read_rows = table.read_rows

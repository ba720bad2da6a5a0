"""Predictions as files: what infer.py and boost.py write, and what a vote reads in place of a run."""

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from engine import boosting, process
from engine.config import UserError


def columns(labels: list[str], predictions: np.ndarray, logits: bool) -> dict[str, Any]:
    """Predictions as columns of the output: the label's name and one column a class, or the value."""
    if not labels:
        return {"prediction": predictions}
    if predictions.ndim == 1:  # binary: one logit; the other class's is zero
        other = np.zeros_like(predictions) if logits else 1 - predictions
        predictions = np.stack([other, predictions], axis=1)
    word = "logit" if logits else "probability"
    named = {f"{word}_{label}": predictions[:, place] for place, label in enumerate(labels)}
    return {"prediction": [labels[place] for place in predictions.argmax(axis=1)], **named}


def write_tables(tables: Iterator[dict[str, Any]], target: Path | None) -> None:
    """CSV or Parquet by the ending, a chunk at a time; the file appears whole or not at all. Without a target all is only computed."""
    import pyarrow as pa
    from pyarrow import csv, parquet

    if target is None:
        for _ in tables:
            pass
        return
    aside, writer = target.with_name(f".{target.name}.tmp"), None
    try:
        for columns_ in tables:
            table = pa.table(columns_)
            writer = writer or (parquet.ParquetWriter if target.suffix == ".parquet" else csv.CSVWriter)(aside, table.schema)
            writer.write_table(table)
        if writer:
            writer.close()
            os.replace(aside, target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror or error}") from None
    finally:
        if aside.exists():
            aside.unlink()


class Saved:
    """A file of predictions that infer.py wrote, in place of its run. Its data sets are slices of rows."""

    def __init__(self, path: Path):
        import pyarrow as pa
        from pyarrow import csv, parquet

        try:
            if path.suffix == ".parquet":
                table = parquet.read_table(path)
            else:
                with csv.open_csv(path) as file:
                    named = list(itertools.takewhile("prediction".__ne__, file.schema.names))
                texts = dict.fromkeys(named, pa.string())  # "007" stays "007"
                table = csv.read_csv(path, convert_options=csv.ConvertOptions(column_types=texts))
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: cannot be read as predictions: {str(error).splitlines()[0]}") from None
        if "prediction" not in table.column_names:
            raise UserError(f"{path}: has no column 'prediction'; give what infer.py --output wrote, or a run folder")
        first = table.column_names.index("prediction")
        names = table.column_names[first + 1 :] or ["prediction"]
        labels = [name.partition("_")[2] for name in names if name != "prediction"]
        kind = "multiclass" if len(labels) > 2 else "binary" if labels else "regression"
        self.path, self.info = path, SimpleNamespace(labels=labels, kind=kind)
        self.ids = {name: texts_of(table[name].to_pylist()) for name in table.column_names[:first]}
        try:
            values = np.stack([table[name].to_numpy().astype(np.float64) for name in names], axis=1)
        except (ValueError, TypeError):
            values = np.array(np.nan)
        if not np.isfinite(values).all():
            raise UserError(f"{path}: {', '.join(names)} hold what is no number; write the predictions again")
        values = boosting.probabilities(values) if names[0].startswith("logit_") else values
        self.values = values if len(labels) > 2 else values[:, -1]
        if [*self.ids] == ["row"]:
            process.warn(f"{path}: its rows are told by their numbers alone, so they must come from the file that is voted on; see data.id")

    def split(self, _: str) -> slice:
        return slice(None)

    def holds(self, ids: dict[str, Any], rows: slice, count: int) -> bool:
        """Whether its `rows` are these `count`, by the columns of both."""
        shared = self.ids.keys() & ids.keys()
        same = all(self.ids[name][rows] == texts_of(ids[name]) for name in shared)
        return len(self.values[rows]) == count and (count == 0 or (bool(shared) and same))

    def predict(self, rows: slice, logits: bool, _: None) -> np.ndarray:
        return boosting.margins(self.values[rows], self.info) if logits else self.values[rows]


def texts_of(values: Sequence[Any]) -> list[str]:
    return ["" if value is None else str(value) for value in values]

"""Scores of boosted models, and prediction from their files."""

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine import config, evaluate, folder, settings
from engine.boost_data import Data, Part, cut, prepare, to_matrix
from engine.boosters import LIBRARIES
from engine.config import UserError
from engine.settings import Settings
from engine.tensors import sha256


def margins(predictions: np.ndarray, info: Any) -> np.ndarray:
    """What a loss takes, float64: logits of probabilities [n] or [n, classes], or values [n]."""
    if not info.labels:
        return predictions.astype(np.float64)
    probabilities = np.clip(predictions.astype(np.float64), 1e-15, 1 - 1e-15)
    return np.log(probabilities) - (np.log1p(-probabilities) if predictions.ndim == 1 else 0)


def probabilities(logits: np.ndarray) -> np.ndarray:
    """float64 of logits [n] or [n, classes]."""
    values = torch.from_numpy(logits.astype(np.float64))
    return (values.sigmoid() if values.ndim == 1 else values.softmax(1)).numpy()


def own_metrics(settings: Settings) -> Any:
    """The model's file, of which a metric may be named in [task]."""
    return config.module("models", settings.model.name)


def scorer_of(settings: Settings, info: Any, names: Sequence[str] = ()) -> evaluate.Scorer:
    """Of these scores, or those of the settings. The loss is the kind's own: what a library minimises is boost.params' affair.

    Raises UserError for an unknown metric.
    """
    chosen = [name for name in names if name != "loss"] or settings.task.metrics
    task, model_file = settings.task.model_copy(update={"loss": "auto", "loss_options": {}, "metrics": chosen}), own_metrics(settings)
    return evaluate.Scorer(task, info, model_file, torch.device("cpu"))


def require_kind(predictions: np.ndarray, info: Any) -> None:
    """Raises UserError where they are not what the kind of task is scored by."""
    what = "probabilities of the classes" if info.labels else "one number a row"
    shape = (info.outputs,) if info.kind == "multiclass" else ()
    if predictions.shape[1:] != shape or (info.labels and (predictions.min() < 0 or predictions.max() > 1 + 1e-6)):
        raise UserError(f"boost.params: with these the library does not predict {what}; take another objective, or none")


def add_scores(scorer: evaluate.Scorer, predictions: np.ndarray, target: torch.Tensor, weights: torch.Tensor | None = None) -> None:
    """Count rows into a scorer by their probabilities or values."""
    target = target.long() if predictions.ndim == 2 else target.float()
    scorer.add(torch.from_numpy(margins(predictions, scorer.info)), {"target": target}, weights)


def score(scorer: evaluate.Scorer, part: Part, predictions: np.ndarray) -> dict[str, float]:
    """Scores of predicted rows."""
    every = torch.arange(len(part))
    add_scores(scorer, predictions, torch.from_numpy(part.data.table.target[part.rows]), part.weights(every))
    return scorer.compute()


def fold_file(run: Path, number: int, suffix: str) -> Path:
    return run / "folds" / f"fold{number}{suffix}"


def read_fold(run: Path, number: int, suffix: str) -> dict[str, Any] | None:
    """The record of a fold that is done; None where its files are not there, or not as they were written."""
    model, record = fold_file(run, number, suffix), fold_file(run, number, ".json")
    found = json.loads(record.read_text()) if model.exists() and record.exists() else None
    return found if found and found.get("sha256") == sha256(model) else None


class BoostPredictor:
    """The boosters of a run folder, averaged over folds; to infer.py what Predictor is."""

    def __init__(self, path: Path, overrides: list[str] | None = None, files: list[str] | None = None):
        self.path, self.settings = path, settings.parse([path / "config.toml", *(files or [])], overrides or [])
        self.info, self.preprocessing = folder.read_info(path), folder.read_preprocessing(path)
        names, boost = self.preprocessing["numeric"] + self.preprocessing["categorical"], self.settings.boost
        self.library = LIBRARIES[boost.library](self.info, names)
        suffix, numbers = self.library.suffix, range(max(1, boost.folds))
        self.folds = [read_fold(path, number, suffix) for number in numbers]
        if None in self.folds:
            ended = (path / "result.json").exists()
            what = "is missing or damaged" if ended else "the run has not ended and has no such fold"
            remedy = f"delete {path}/result.json, and the same boost.py command makes it again" if ended else "the same boost.py command goes on"
            raise UserError(f"{fold_file(path, self.folds.index(None), suffix)}: {what}; {remedy}")
        self.boosters = [self.library.load(fold_file(path, number, suffix)) for number in numbers]

    def scorer(self) -> evaluate.Scorer:
        return scorer_of(self.settings, self.info)

    def split(self, part: str) -> Part | None:
        """A part of the run's own data; None where there is no such part."""
        return Part(self.data, self.data.table.rows[part]) if part in self.data.table.rows else None

    @functools.cached_property
    def data(self) -> Data:
        """The run's own, read once. Raises UserError where they have changed."""
        data = prepare(self.settings)
        folder.require_learned(self.path, data.table.info, data.table.preprocessing)
        if not all(data.made(record, fold) for record, fold in zip(self.folds, cut(self.settings, data), strict=True)):
            raise folder.not_learned(self.path, ["rows"])
        return data

    def read(self, source: Path, rows: int) -> Iterator[Any]:
        """A file to predict, in chunks."""
        return config.module("data", self.settings.data.name).read_rows(source, self.settings.data, self.preprocessing, self.info, rows)

    def score(self, dataset: Any) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
        """Scores, predictions and targets of a labelled data set, in its order."""
        scorer = self.scorer()
        predictions = self.predict(dataset, False, scorer)
        return scorer.compute(), predictions, dataset.__getitems__(torch.arange(len(dataset)))["target"].numpy()

    def predict(self, dataset: Any, logits: bool, scorer: evaluate.Scorer | None) -> np.ndarray:
        """Probabilities (or their logits) [n] or [n, classes], or values [n]: the mean over folds, in the rows' order."""
        positions = torch.arange(len(dataset))
        batch, weights_of = dataset.__getitems__(positions), getattr(dataset, "weights", lambda _: None)
        numeric = batch["numeric"].numpy() if "numeric" in batch else np.empty((len(dataset), 0), np.float32)
        matrix = to_matrix(numeric, batch["categorical"].numpy()) if "categorical" in batch else numeric
        logits = logits and bool(self.info.labels)
        predictions = self.average(matrix, logits)
        if scorer:  # by probabilities, whatever is asked for
            add_scores(scorer, self.average(matrix, False) if logits else predictions, batch["target"], weights_of(positions))
        return predictions

    def average(self, matrix: np.ndarray, logits: bool) -> np.ndarray:
        folds = [self.library.predict(booster, matrix, logits) for booster in self.boosters]
        if len(folds) == 1:
            return folds[0]
        # Logits of the mean probability, not the mean logit: whichever is asked for, it is one prediction.
        mean = np.mean([probabilities(fold) for fold in folds] if logits else folds, axis=0, dtype=np.float64)
        return margins(mean, self.info) if logits else mean

    def held_out(self) -> np.ndarray:
        """Predictions of the validation part, of each row by the fold that was not trained on it. Raises UserError."""
        from pyarrow import parquet

        if not (self.path / "oof.parquet").exists():
            raise UserError(f"{self.path}: the run has not ended; the same boost.py command goes on")
        table, rows = parquet.read_table(self.path / "oof.parquet").to_pandas().set_index("row"), self.data.table.rows["valid"]
        if len(missing := np.setdiff1d(rows, table.index)):
            raise UserError(f"{self.path}: {len(missing)} validation rows have no out-of-fold prediction; no weights can be fitted to them")
        predictions = table.loc[rows, [f"probability_{label}" for label in self.info.labels] or ["prediction"]].to_numpy()
        return predictions if self.info.kind == "multiclass" else predictions[:, -1]

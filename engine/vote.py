"""Soft voting: predictions of several runs for the same rows, averaged with weights."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from engine import boosting, evaluate, metrics, process
from engine.config import UserError


class Saved:
    """A file of predictions that infer.py wrote, in place of its run. Its data sets are slices of rows."""

    def __init__(self, path: Path):
        import pyarrow as pa
        from pyarrow import csv, parquet

        try:
            table = parquet.read_table(path) if path.suffix == ".parquet" else csv.read_csv(path)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: cannot be read as predictions: {str(error).splitlines()[0]}") from None
        if "prediction" not in table.column_names:
            raise UserError(f"{path}: has no column 'prediction'; give what infer.py --output wrote, or a run folder")
        first = table.column_names.index("prediction")
        names = table.column_names[first + 1 :] or ["prediction"]
        labels = [name.partition("_")[2] for name in names if name != "prediction"]
        kind = "multiclass" if len(labels) > 2 else "binary" if labels else "regression"
        self.path, self.info = path, SimpleNamespace(labels=labels, kind=kind)
        self.ids = {name: list(map(str, table[name].to_pylist())) for name in table.column_names[:first]}
        values = np.stack([table[name].to_numpy() for name in names], axis=1)
        values = torch.from_numpy(values).double().softmax(1).numpy() if names[0].startswith("logit_") else values
        self.values = values if len(labels) > 2 else values[:, -1]

    def split(self, _: str) -> slice:
        return slice(None)

    def holds(self, ids: dict[str, Any], rows: slice, count: int) -> bool:
        """Whether its `rows` are these `count`, as far as columns of both tell."""
        shared = self.ids.keys() & ids.keys()
        return len(self.values[rows]) == count and all(self.ids[name][rows] == list(map(str, ids[name])) for name in shared)

    def predict(self, rows: slice, logits: bool, _: None) -> np.ndarray:
        return boosting.margins(self.values[rows], self.info) if logits else self.values[rows]


class Vote:
    """Members that vote; to infer.py what Predictor is, over a list of data sets, one a member."""

    def __init__(self, members: Sequence[Any], weights: Sequence[float] | None, average: str):
        self.members = members
        self.first = next((place for place, member in enumerate(members) if not isinstance(member, Saved)), -1)
        if self.first < 0:
            raise UserError("infer.py: a vote needs one run folder at least, to read the rows by; the others may be files of predictions")
        self.path, self.settings, known = members[self.first].path, members[self.first].settings, members[self.first].info
        # In the target's own units, whatever a member was trained in.
        self.info = SimpleNamespace(kind=known.kind, labels=known.labels, outputs=known.outputs, target_mean=0.0, target_std=1.0)
        if known.kind not in metrics.KINDS:
            raise UserError(f"{self.path}: is a {known.kind} task; a vote is for {', '.join(metrics.KINDS)}")
        for member in members:
            there, here = (f"{info.kind} of {', '.join(info.labels) or 'a number'}" for info in (member.info, known))
            if there != here:
                raise UserError(f"{member.path}: predicts {there}, {self.path} {here}; runs that vote must agree on their labels")
        self.logit = average == "logit" and bool(known.labels)
        self.weights = np.array(weights or [1 / len(members)] * len(members))
        if len(self.weights) != len(members):
            raise UserError(f"--weights: {len(self.weights)} for {len(members)} runs; give one a run")
        if self.weights.min() < 0 or abs(self.weights.sum() - 1) > 1e-6:
            raise UserError(f"--weights {' '.join(map(str, weights or []))}: must be 0 or more and sum to 1; they sum to {self.weights.sum():g}")

    def scorer(self) -> evaluate.Scorer:
        return boosting.scorer_of(self.settings, self.info)

    def targets(self, sets: list[Any], place: int) -> np.ndarray:
        parts = [sets[place].__getitems__(some)["target"] for some in torch.arange(len(sets[place])).split(4096)]
        return (metrics.value(torch.cat(parts), self.members[place].info) if self.info.kind == "regression" else torch.cat(parts)).numpy()

    def split(self, part: str) -> list[Any] | None:
        """The members' data sets of a part; None where one has none. Raises UserError where they are not the same rows."""
        sets = [member.split(part) for member in self.members]
        if any(dataset is None for dataset in sets):
            return None
        truth = self.targets(sets, self.first)
        for place, member in enumerate(self.members):
            if isinstance(member, Saved):
                count, same = len(member.values), member.holds({"row": range(len(truth))}, slice(None), len(truth))
            else:
                count = len(sets[place])
                same = count == len(truth) and np.allclose(self.targets(sets, place), truth, rtol=1e-4, atol=1e-6)
            if not same:
                raise UserError(f"{member.path}: its {count} {part} rows are not the {len(truth)} of {self.path}, or in another order")
        return sets

    def read(self, source: Path, count: int) -> Iterator[Any]:
        """A file to predict, in chunks, beside the same rows of saved predictions. Raises UserError where those are of others."""
        saved, start = [member for member in self.members if isinstance(member, Saved)], 0

        def check(ids: dict[str, Any], rows: slice, count: int) -> None:
            for member in saved:
                if not member.holds(ids, rows, count):
                    what = f"its {len(member.values)} rows, by {list(member.ids)}, are not those of {source}"
                    raise UserError(f"{member.path}: {what}; it must predict the same rows in their order")

        for chunks in zip(*(member.read(source, count) for member in self.members if member not in saved), strict=True):
            rows, runs, ids = slice(start, start := start + len(chunks[0].dataset)), iter(chunks), chunks[0].ids
            check(ids, rows, len(chunks[0].dataset))
            sets = [rows if member in saved else next(runs).dataset for member in self.members]
            yield SimpleNamespace(dataset=sets, ids=ids, labelled=all(chunk.labelled for chunk in chunks))
        check({}, slice(start, None), 0)

    def score(self, sets: list[Any]) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
        scorer = self.scorer()
        predictions = self.predict(sets, False, scorer)
        return scorer.compute(), predictions, self.targets(sets, self.first)

    def predict(self, sets: list[Any], logits: bool, scorer: evaluate.Scorer | None) -> np.ndarray:
        """Probabilities (or logits) [n] or [n, classes], or values [n]."""
        parts = [member.predict(dataset, self.logit, None) for member, dataset in zip(self.members, sets, strict=True)]
        predictions = self.mix(parts, self.weights)
        if scorer:
            boosting.add_scores(scorer, predictions, torch.from_numpy(self.targets(sets, self.first)))
        return boosting.margins(predictions, self.info) if logits else predictions

    def mix(self, parts: list[np.ndarray], weights: np.ndarray) -> np.ndarray:
        mixed = torch.from_numpy(np.tensordot(weights, np.array(parts, np.float64), 1))
        return (mixed if not self.logit else mixed.sigmoid() if mixed.ndim == 1 else mixed.softmax(1)).numpy()

    def fit(self) -> None:
        """Find the convex weights with the smallest log loss, or squared error, on the validation part. Raises UserError."""
        from scipy.optimize import minimize
        from sklearn.metrics import log_loss, mean_squared_error

        for member in self.members:
            if isinstance(member, Saved):
                raise UserError(f"--fit-weights: {member.path} is a file, which has no validation part; give its run folder, or --weights")
        sets = self.split("valid")
        truth, parts = self.targets(sets, self.first), []
        for member, dataset in zip(self.members, sets, strict=True):
            # A fold's rows are judged by the boosters that were not trained on them.
            if isinstance(member, boosting.BoostPredictor) and len(member.boosters) > 1:
                parts.append(boosting.margins(member.held_out(), self.info) if self.logit else member.held_out())
            else:
                parts.append(member.predict(dataset, self.logit, None))

        def loss(weights: np.ndarray) -> float:
            mixed = self.mix(parts, weights)
            return log_loss(truth, mixed, labels=range(len(self.info.labels))) if self.info.labels else mean_squared_error(truth, mixed)

        count, sums = len(parts), {"type": "eq", "fun": lambda weights: weights.sum() - 1}
        found = minimize(loss, [1 / count] * count, method="SLSQP", bounds=[(0, 1)] * count, constraints=[sums], options={"ftol": 1e-10}).x
        found = np.round(np.clip(found, 0, 1), 4)
        found[found.argmax()] += 1 - found.sum()
        self.weights = np.round(found, 4)
        for member, alone in zip(self.members, np.eye(count), strict=True):
            process.say(f"valid loss {loss(alone):.6g}  {member.path}")
        process.say(f"valid loss {loss(self.weights):.6g}  --weights {' '.join(f'{weight:g}' for weight in self.weights)}")

"""Soft voting: predictions of several runs for the same rows, averaged with weights."""

import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine import boosting, evaluate, metrics, process
from engine.config import UserError


class Saved:
    """A file of predictions that infer.py wrote, in place of its run."""

    def __init__(self, path: Path):
        import pyarrow as pa
        from pyarrow import csv, parquet

        self.path = path
        try:
            table = parquet.read_table(path) if path.suffix == ".parquet" else csv.read_csv(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{path}: is no table of predictions: {str(error).splitlines()[0]}") from None
        names = table.column_names
        if "prediction" not in names:
            raise UserError(f"{path}: has no column 'prediction'; it must be what infer.py --output wrote, or a run folder")
        found = [name.partition("_") for name in names[names.index("prediction") + 1 :]]
        labels = [label for _, _, label in found]
        self.info = types.SimpleNamespace(labels=labels, kind="regression" if not labels else "binary" if len(labels) == 2 else "multiclass")
        self.ids = {name: [str(value) for value in table[name].to_pylist()] for name in names[: names.index("prediction")] if name != "fold"}
        values = np.stack([table["_".join([word, label])].to_numpy() for word, _, label in found] or [table["prediction"].to_numpy()], axis=1)
        if labels and found[0][0] == "logit":
            values = torch.from_numpy(values).double().softmax(1).numpy()
        self.values = values if self.info.kind == "multiclass" else values[:, -1]

    def predict(self, rows: slice, logits: bool, _: None) -> np.ndarray:
        return boosting.margins(self.values[rows], self.info) if logits else self.values[rows]


class Vote:
    """Members that vote; to infer.py what Predictor is, over a list of data sets, one a member."""

    def __init__(self, members: Sequence[Any], weights: Sequence[float] | None, average: str):
        runs = [member for member in members if not isinstance(member, Saved)]
        if not runs:
            raise UserError("infer.py: a vote needs one run folder at least, to read the rows by; the others may be files of predictions")
        self.members, self.runs, self.first, self.settings = members, runs, runs[0], runs[0].settings
        known = self.first.info
        # Everything is in the target's own units here.
        self.info = types.SimpleNamespace(kind=known.kind, labels=known.labels, outputs=known.outputs, target_mean=0.0, target_std=1.0)
        if known.kind not in metrics.KINDS:
            raise UserError(f"{self.first.path}: a {known.kind} task cannot be voted on; only {', '.join(metrics.KINDS)}")
        for member in members:
            if (member.info.kind, member.info.labels) != (known.kind, known.labels):
                there, here = (f"{info.kind} of {', '.join(info.labels) or 'a number'}" for info in (member.info, known))
                raise UserError(f"{member.path}: predicts {there}; {self.first.path}: {here}; runs that vote must agree on the labels")
        self.logit = average == "logit" and bool(known.labels)
        self.weights = np.full(len(members), 1 / len(members)) if weights is None else np.array(weights)
        if len(self.weights) != len(members):
            raise UserError(f"--weights: {len(self.weights)} for {len(members)} runs; give one a run")
        if (self.weights < 0).any() or not np.isclose(self.weights.sum(), 1, rtol=0, atol=1e-6):
            raise UserError(f"--weights {' '.join(map(str, weights or []))}: must be 0 or more and sum to 1, not {self.weights.sum():g}")

    def scorer(self) -> evaluate.Scorer:
        return boosting.scorer_of(self.settings, self.info)

    def targets(self, member: Any, dataset: Any) -> np.ndarray:
        """In the target's own units."""
        target = torch.cat([dataset.__getitems__(some)["target"] for some in torch.arange(len(dataset)).split(4096)])
        return (metrics.value(target, member.info) if self.info.kind == "regression" else target).numpy()

    def split(self, part: str) -> list[Any] | None:
        """The members' data sets of a part. Raises UserError where they are not the same rows."""
        sets = [slice(None) if isinstance(member, Saved) else member.split(part) for member in self.members]
        if any(dataset is None for dataset in sets):
            return None
        truth = self.truth(sets)
        for member, dataset in zip(self.members, sets, strict=True):
            saved = isinstance(member, Saved)
            rows = len(member.values) if saved else len(dataset)
            if rows != len(truth):
                raise UserError(f"{member.path}: has {rows} {part} rows, {self.first.path} has {len(truth)}; runs that vote must have the same")
            if not saved and not np.allclose(self.targets(member, dataset), truth, rtol=1e-4, atol=1e-6):
                raise UserError(f"{member.path}: its {part} rows have other targets than those of {self.first.path}, or another order")
            if saved and member.ids.get("row", list(map(str, range(rows)))) != list(map(str, range(rows))):
                raise UserError(f"{member.path}: its rows are not numbered from 0 in order; it must predict all of the {part} part")
        return sets

    def truth(self, sets: list[Any]) -> np.ndarray:
        return self.targets(self.first, sets[self.members.index(self.first)])

    def read(self, source: Path, rows: int) -> Iterator[Any]:
        """A file to predict, in chunks, beside the same rows of saved predictions. Raises UserError where those are of others."""
        start = 0
        for chunks in zip(*(run.read(source, rows) for run in self.runs), strict=True):
            here, runs = slice(start, start := start + len(chunks[0].dataset)), iter(chunks)
            sets = [here if isinstance(member, Saved) else next(runs).dataset for member in self.members]
            for member in self.members:
                for name in member.ids.keys() & chunks[0].ids.keys() if isinstance(member, Saved) else ():
                    if member.ids[name][here] != [str(value) for value in chunks[0].ids[name]]:
                        raise UserError(f"{member.path}: its column {name!r} differs from {source}; it must predict the same rows in the same order")
            yield types.SimpleNamespace(dataset=sets, ids=chunks[0].ids, labelled=all(chunk.labelled for chunk in chunks))
        for member in self.members:
            if isinstance(member, Saved) and len(member.values) != start:
                raise UserError(f"{member.path}: has {len(member.values)} rows, {source} has {start}; it must predict the same rows")

    def score(self, sets: list[Any]) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
        scorer = self.scorer()
        predictions = self.predict(sets, False, scorer)
        return scorer.compute(), predictions, self.truth(sets)

    def predict(self, sets: list[Any], logits: bool, scorer: evaluate.Scorer | None) -> np.ndarray:
        """Probabilities (or logits) [n] or [n, classes], or values [n]."""
        parts = [member.predict(dataset, self.logit, None) for member, dataset in zip(self.members, sets, strict=True)]
        margins, predictions = self.mix(parts, self.weights)
        if scorer:
            dataset = sets[self.members.index(self.first)]
            weights = dataset.weights(torch.arange(len(dataset))) if hasattr(dataset, "weights") else None
            boosting.add_scores(scorer, predictions, torch.from_numpy(self.truth(sets)), weights)
        return margins if logits else predictions

    def mix(self, parts: Sequence[np.ndarray], weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Margins and predictions of the weighted average."""
        mixed = np.tensordot(weights, np.array(parts, np.float64), 1)
        if not self.logit:
            return boosting.margins(mixed, self.info), mixed
        logits = torch.from_numpy(mixed)
        return mixed, (logits.sigmoid() if mixed.ndim == 1 else logits.softmax(1)).numpy()

    def fit(self) -> None:
        """The convex weights with the smallest log loss or squared error on the validation part. Raises UserError."""
        from scipy import optimize

        for member in self.members:
            if isinstance(member, Saved):
                raise UserError(f"--fit-weights: {member.path} is a file, without a validation part; give its run folder, or --weights")
        sets = self.split("valid")
        truth = self.truth(sets)
        parts = []
        for member, dataset in zip(self.members, sets, strict=True):
            # Folds were trained on the validation rows: there, only the fold that left a row out may speak for it.
            held_out = member.held_out() if hasattr(member, "held_out") else None
            if held_out is None:
                parts.append(member.predict(dataset, self.logit, None))
            else:
                parts.append(boosting.margins(held_out, self.info) if self.logit else held_out)

        def loss(weights: np.ndarray) -> float:
            margins, predictions = self.mix(parts, weights)
            if not self.info.labels:
                return float(np.mean((predictions - truth) ** 2))
            if margins.ndim == 1:
                return float(np.mean(np.logaddexp(0, np.where(truth > 0.5, -margins, margins))))
            return float(-torch.from_numpy(margins).log_softmax(1).numpy()[np.arange(len(truth)), truth.astype(int)].mean())

        count = len(self.members)
        sum_to_one = {"type": "eq", "fun": lambda weights: weights.sum() - 1}
        found = optimize.minimize(loss, self.weights, method="SLSQP", bounds=[(0, 1)] * count, constraints=[sum_to_one], options={"ftol": 1e-10})
        weights = np.clip(np.round(found.x, 4), 0, 1)
        weights[weights.argmax()] += 1 - weights.sum()
        self.weights = np.round(weights, 4)
        for member, alone in zip(self.members, np.eye(count), strict=True):
            process.say(f"valid loss {loss(alone):.6g}  {member.path}")
        process.say(f"valid loss {loss(self.weights):.6g}  --weights {' '.join(f'{weight:g}' for weight in self.weights)}")

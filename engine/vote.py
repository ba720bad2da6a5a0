"""Soft voting: predictions of several runs for the same rows, averaged with weights."""

import filecmp
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from engine import boosting, evaluate, metrics, process
from engine.config import UserError
from engine.prediction_files import Saved, texts_of


class Vote:
    """Members that vote; to infer.py what Predictor is, over a list of data sets, one a member."""

    def __init__(self, members: Sequence[Any], weights: Sequence[float] | None, average: str | None):
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
        self.logit = average == "logit"
        if self.logit and not known.labels:
            raise UserError(f"--average logit: {self.path} predicts a number, which has no logits; leave it out")
        self.weights = np.array(weights or [1 / len(members)] * len(members))
        if len(self.weights) != len(members):
            raise UserError(f"--weights: {len(self.weights)} for {len(members)} runs; give one a run")
        if not (self.weights.min() >= 0 and abs(self.weights.sum() - 1) <= 1e-6):
            what = "one is negative" if self.weights.min() < 0 else f"they sum to {self.weights.sum():g}"
            raise UserError(f"--weights {' '.join(map(str, weights or []))}: must be 0 or more and sum to 1; {what}")

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
        truth, ids = self.targets(sets, self.first), {"row": range(len(sets[self.first]))}
        if any(isinstance(member, Saved) for member in self.members):
            ids |= ids_of(self.members[self.first], part)
        for place, member in enumerate(self.members):
            if isinstance(member, Saved):
                count, same = len(member.values), member.holds(ids, slice(None), len(truth))
            else:
                count, drawn = len(sets[place]), self.draws_alike(member, part)
                same = drawn and count == len(truth) and np.allclose(self.targets(sets, place), truth, rtol=1e-4, atol=1e-6)
            if not same:
                what = f"its {count} {part} rows are not the {len(truth)} of {self.path}, or in another order"
                raise UserError(f"{member.path}: {what}; runs that vote need the same files, or data.id to tell rows by")
        return sets

    def draws_alike(self, member: Any, part: str) -> bool:
        """Whether a run has the rows of the first one: of the same file, cut off it alike; or of another one with the same values of data.id."""
        mine, theirs = self.settings.data, member.settings.data
        name = part if getattr(mine, part, "") else "train"
        if cut_by(member.settings, part) != cut_by(self.settings, part):
            return False
        files = [getattr(data, name, "") for data in (mine, theirs)]
        if not any(files):  # sets that come with a package, or kinds of data with keys of their own
            return all(getattr(mine, key, "") == getattr(theirs, key, "") for key in ("name", "dataset", "file"))
        if all(files) and same_file(mine.path(files[0]), theirs.path(files[1])):
            return True
        if name != part or not all(files) or not mine.id or mine.id != theirs.id:
            return False
        ids = ids_of(self.members[self.first], part)
        return mine.id in ids and ids == ids_of(member, part)

    def read(self, source: Path, count: int) -> Iterator[Any]:
        """A file to predict, in chunks, beside the same rows of saved predictions. Raises UserError where rows are others."""
        saved, start = [member for member in self.members if isinstance(member, Saved)], 0

        def check(ids: dict[str, Any], rows: slice, count: int) -> None:
            for member in saved:
                if not member.holds(ids, rows, count):
                    what = f"its {len(member.values)} rows, by {list(member.ids)}, are not those of {source}"
                    raise UserError(f"{member.path}: {what}; it must predict the same rows in their order")

        for chunks in itertools.zip_longest(*(member.read(source, count) for member in self.members if member not in saved)):
            if None in chunks or any(not same_rows(chunk, chunks[0]) for chunk in chunks):
                raise UserError(f'{source}: the runs skip different rows of it; correct these, or set data.on_bad = "error" to see them')
            rows, runs, ids = slice(start, start := start + len(chunks[0].dataset)), iter(chunks), chunks[0].ids
            check(ids, rows, len(chunks[0].dataset))
            sets = [rows if member in saved else next(runs).dataset for member in self.members]
            unseen = {name: max(chunk.unseen.get(name, 0) for chunk in chunks) for name in set().union(*(chunk.unseen for chunk in chunks))}
            yield SimpleNamespace(dataset=sets, ids=ids, labelled=all(chunk.labelled for chunk in chunks), unseen=unseen)
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
            boosting.add_scores(scorer, predictions, torch.from_numpy(self.targets(sets, self.first)), self.weights_of(sets))
        return boosting.margins(predictions, self.info) if logits else predictions

    def weights_of(self, sets: list[Any]) -> torch.Tensor | None:
        """float [n]: what each row counts."""
        weights_of = getattr(sets[self.first], "weights", None)
        return weights_of(torch.arange(len(sets[self.first]))) if weights_of else None

    def mix(self, parts: list[np.ndarray], weights: np.ndarray) -> np.ndarray:
        mixed = np.tensordot(weights, np.array(parts, np.float64), 1)
        return boosting.probabilities(mixed) if self.logit else mixed

    def fit(self) -> None:
        """Find the convex weights with the smallest log loss, or squared error, on the validation part. Raises UserError."""
        from scipy.optimize import minimize

        for member in self.members:
            if isinstance(member, Saved):
                raise UserError(f"--fit-weights: {member.path} is a file, which has no validation part; give its run folder, or --weights")
        sets = self.split("valid")
        if sets is None:
            raise UserError("--fit-weights: the runs have no validation part; give --weights")
        truth, counts, parts = self.targets(sets, self.first), self.weights_of(sets), []
        for member, dataset in zip(self.members, sets, strict=True):
            # A fold's rows are judged by the boosters that were not trained on them.
            if isinstance(member, boosting.BoostPredictor) and len(member.boosters) > 1:
                parts.append(boosting.margins(member.held_out(), self.info) if self.logit else member.held_out())
            else:
                parts.append(member.predict(dataset, self.logit, None))

        def loss(weights: np.ndarray) -> float:
            mixed = self.mix(parts, weights)
            if not self.info.labels:
                return float(np.average((mixed - truth) ** 2, weights=counts))
            chosen = np.where(truth > 0.5, mixed, 1 - mixed) if mixed.ndim == 1 else mixed[np.arange(len(truth)), truth]
            return float(np.average(-np.log(np.clip(chosen, 1e-15, 1)), weights=counts))

        count, sums = len(parts), {"type": "eq", "fun": lambda weights: weights.sum() - 1}
        scale = loss(np.full(count, 1 / count)) or 1.0  # the solver's tolerance is absolute, dollars or millions
        bounds, wanted = [(0, 1)] * count, {"ftol": 1e-10}
        found = minimize(
            lambda weights: loss(weights) / scale, [1 / count] * count, method="SLSQP", bounds=bounds, constraints=[sums], options=wanted
        ).x
        found = np.round(np.clip(found, 0, 1), 4)
        found[found.argmax()] += 1 - found.sum()
        self.weights = np.round(found, 4)
        for member, alone in zip(self.members, np.eye(count), strict=True):
            process.say(f"valid loss {loss(alone):.6g}  {member.path}")
        process.say(f"valid loss {loss(self.weights):.6g}  --weights {' '.join(f'{weight:g}' for weight in self.weights)}")


def ids_of(run: Any, part: str) -> dict[str, list[str]]:
    """The id columns, as texts, of a part that is a file. Raises UserError for one that was cut off another."""
    data = run.settings.data
    if not getattr(data, part, ""):
        raise UserError(f"{run.path}: its {part} rows were cut off data.train, so a file of predictions cannot be of these; give its run")
    chunks = [chunk.ids for chunk in run.read(data.path(getattr(data, part)), 65_536)]
    return {name: texts_of([value for ids in chunks for value in ids[name]]) for name in chunks[0]}


def same_file(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve() or (one.is_file() and other.is_file() and filecmp.cmp(one, other, shallow=False))


def cut_by(settings: Any, part: str) -> dict[str, Any]:
    """What chose the rows of a part that was cut off the training file; {} of one with a file of its own."""
    data = settings.data
    shares = data.fractions() if hasattr(data, "fractions") else {}
    if part not in shares and not (part == "train" and shares):
        return {}
    keys = ["target", "group", "split_seed", *(["balance"] if part == "train" else [])]
    return shares | {key: getattr(data, key, None) for key in keys}


def same_rows(one: Any, other: Any) -> bool:
    """Of two chunks of a file, by their ids."""
    shared = one.ids.keys() & other.ids.keys()
    return len(one.dataset) == len(other.dataset) and all(one.ids[name] == other.ids[name] for name in shared)

"""Gradient boosting of a table's raw columns: LightGBM and XGBoost by their native APIs, and prediction from their files."""

import dataclasses
import functools
import importlib
import json
import operator
import re
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from engine import config, evaluate, folder, settings
from engine.config import UserError, suggestion
from engine.settings import Settings
from engine.tensors import sha256

Fold = tuple[np.ndarray, np.ndarray]
"""training and validation rows, ascending"""


@dataclasses.dataclass
class Data:
    """A data file's Table with the chosen columns in one matrix, for any number of folds and trials."""

    table: Any
    """info and preprocessing are of the chosen columns, the target in its own units; rows["folds"] are training and validation"""
    matrix: np.ndarray
    """float32 [n, features]: numbers, then categories as numbers from 0; NaN where missing or unseen in training"""
    names: list[str]
    balance: str
    """data.balance: class weights count in training alone"""
    binned: dict[str, Any] = dataclasses.field(default_factory=dict)
    """what a library has built of these rows"""

    def weights(self, rows: np.ndarray, training: bool = False) -> np.ndarray | None:
        weights = self.table.part_weights("train" if training else "valid", self.balance)
        return None if weights is None else weights.numpy()[rows]

    def mark(self, fold: Fold) -> str:
        """Of what a fold is made: another one where the files have changed."""
        mark = self.checksum
        for rows in fold:
            mark = zlib.crc32(rows, mark)
        return f"{mark:08x}"

    @functools.cached_property
    def checksum(self) -> int:
        return zlib.crc32(np.ascontiguousarray(self.table.target), zlib.crc32(np.ascontiguousarray(self.matrix)))


@dataclasses.dataclass
class Part:
    """Rows of Data as a data set: the matrix is its numbers."""

    data: Data
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, positions: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = self.rows[positions.numpy()]
        return {"numeric": torch.from_numpy(self.data.matrix[rows]), "target": torch.from_numpy(self.data.table.target[rows])}

    def weights(self, positions: torch.Tensor) -> torch.Tensor | None:
        weights = self.data.weights(self.rows[positions.numpy()])
        return None if weights is None else torch.from_numpy(weights)


def prepare(settings: Settings, table: Any = None) -> Data:
    """Choose boost.features of a data file's table, which is read where it is not given. Raises UserError."""
    data_file = config.module("data", settings.data.name)
    if not hasattr(data_file, "read"):
        raise UserError(f'data.name = "{settings.data.name}": has no columns to boost; use "table" or "bundled"')
    table = table or data_file.read(settings.data, settings.task.kind)
    # Kept with the table: the trials of a search share what is made here, and what the library bins.
    made = vars(table).setdefault("boosted", {})
    if (identity := getattr(settings.data, "id", "")) in ("row", "fold", "prediction"):
        raise UserError(f"data.id = {identity!r}: is what a column of the predictions is called; rename it in the file")
    key = tuple(settings.boost.features)
    if key not in made:
        made[key] = choose(settings, table)
    return made[key]


def choose(settings: Settings, table: Any) -> Data:
    learned, wanted = table.preprocessing, settings.boost.features
    known = learned["numeric"] + learned["categorical"]
    for name in wanted:
        if name not in known:
            raise UserError(f"boost.features = {name!r}: no such column among the features{suggestion(name, known)}")
    places = {key: [place for place, name in enumerate(learned[key]) if not wanted or name in wanted] for key in ("numeric", "categorical")}
    named = {key: [learned[key][place] for place in kept] for key, kept in places.items()}
    matrix = to_matrix(table.numeric[:, places["numeric"]] if wanted else table.numeric, table.categorical[:, places["categorical"]])
    # Trees need no scale: targets stay in their own units, here and where this preprocessing reads a new file.
    units = {"target_mean": 0.0, "target_std": 1.0}
    sizes = [table.info.categories[place] for place in places["categorical"]]
    info = dataclasses.replace(table.info, numeric=len(named["numeric"]), categories=sizes, **units)
    vocabularies = {name: learned["vocabularies"][name] for name in named["categorical"]}
    learned = {**learned, **named, **units, "vocabularies": vocabularies, "missing": []}
    rows = {**table.rows, "folds": np.sort(np.concatenate([table.rows["train"], table.rows["valid"]]))}
    chosen = dataclasses.replace(table, info=info, preprocessing=learned, rows=rows)
    return Data(chosen, matrix, named["numeric"] + named["categorical"], getattr(settings.data, "balance", "none"))


def to_matrix(numeric: np.ndarray, categorical: np.ndarray) -> np.ndarray:
    if not categorical.shape[1]:
        return numeric
    codes = categorical.astype(np.float32) - 1
    codes[codes < 0] = np.nan
    return np.concatenate([numeric, codes], axis=1, dtype=np.float32)


def cut(settings: Settings, data: Data) -> list[Fold]:
    """The folds. Raises UserError where they cannot be cut."""
    table, count, split = data.table, settings.boost.folds, settings.boost.split
    if not count:
        return [(table.rows["train"], table.rows["valid"])]
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, TimeSeriesSplit

    if data.balance == "undersample":
        raise UserError('data.balance = "undersample": would judge folds by rows that were dropped at will; use "class_weights", or boost.folds = 0')
    rows, shuffled = table.rows["folds"], {"shuffle": True, "random_state": getattr(settings.data, "split_seed", 0)}
    target, groups = table.target[rows], None if table.groups is None else table.groups[rows]
    if not table.info.labels:  # numbers are stratified by their ranks, in ten classes
        target = np.argsort(np.argsort(target, kind="stable")) * max(1, min(10, len(rows) // count)) // len(rows)
    if split == "auto":
        split = "stratified" if groups is None else "group"
    if split == "group" and groups is None:
        raise UserError('boost.split = "group": needs data.group, the column of which equal values stay in one fold')
    if split == "time":
        splitter, most, what = TimeSeriesSplit, len(rows) - 1, "rows after the first"
    elif split == "group":
        largest = np.unique(target, return_counts=True)[1].max()
        splitter, most, what = StratifiedGroupKFold, min(len(np.unique(groups)), largest), "groups, or rows of the largest class"
    else:
        splitter, most, what = StratifiedKFold, np.unique(target, return_counts=True)[1].min(), "rows of the smallest class"
    if count > most:
        raise UserError(f"boost.folds = {count}: there are only {most} {what}; choose at most as many")
    folds = splitter(count, **(shuffled if split != "time" else {})).split(rows, target, groups)
    return [(rows[fit], rows[held]) for fit, held in folds]


def margins(predictions: np.ndarray, info: Any) -> np.ndarray:
    """What a loss takes, float64: logits of probabilities [n] or [n, classes], or values [n]."""
    if not info.labels:
        return predictions.astype(np.float64)
    probabilities = np.clip(predictions.astype(np.float64), 1e-15, 1 - 1e-15)
    return np.log(probabilities) - (np.log1p(-probabilities) if predictions.ndim == 1 else 0)


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


def add_scores(scorer: evaluate.Scorer, predictions: np.ndarray, target: torch.Tensor, weights: torch.Tensor | None = None) -> None:
    """Count rows into a scorer by their probabilities or values. Raises UserError for what are no probabilities."""
    classes = (scorer.info.outputs,) if scorer.info.kind == "multiclass" else ()
    if scorer.info.labels and (predictions.shape[1:] != classes or predictions.min() < 0 or predictions.max() > 1 + 1e-6):
        raise UserError("boost.params.objective: predicts no probabilities of the classes; take another one, or none")
    target = target.long() if predictions.ndim == 2 else target.float()
    scorer.add(torch.from_numpy(margins(predictions, scorer.info)), {"target": target}, weights)


def score(scorer: evaluate.Scorer, part: Part, predictions: np.ndarray) -> dict[str, float]:
    """Scores of predicted rows."""
    every = torch.arange(len(part))
    add_scores(scorer, predictions, torch.from_numpy(part.data.table.target[part.rows]), part.weights(every))
    return scorer.compute()


class Library:
    """What the two have in common. Raises UserError where the package is missing."""

    package: str
    failure: str
    gpu: dict[str, str]
    a_column: tuple[str, ...] = ()
    objectives: dict[str, str]

    def __init__(self, info: Any, names: list[str]):
        try:
            self.module = importlib.import_module(self.package)
        except ImportError as error:
            raise UserError(f'boost.library = "{self.package}": cannot be imported ({error}); pip install {self.package}') from None
        plain = [re.sub(r"\W", "_", name) for name in names]  # neither takes every character in a column's name
        self.names = plain if len(set(plain)) == len(plain) else [f"{name}_{place}" for place, name in enumerate(plain)]
        self.info, self.error = info, operator.attrgetter(self.failure)(self.module)

    def params(self, settings: Settings, **own: Any) -> dict[str, Any]:
        if settings.boost.device == "gpu" and not torch.cuda.is_available():
            raise UserError('boost.device = "gpu": there is no GPU here; set it to "cpu"')
        classes = {"num_class": self.info.outputs} if self.info.kind == "multiclass" else {}
        values = {"objective": self.objectives[self.info.kind], "seed": settings.run.seed % 2**31, **classes, **own}
        values |= (self.gpu if settings.boost.device == "gpu" else {}) | settings.boost.params
        for key in self.a_column:
            if key in values and len(np.atleast_1d(values[key])) != len(self.names):  # LightGBM ends the process
                raise UserError(f"boost.params.{key} = {values[key]}: needs a value for each of the {len(self.names)} features")
        return values

    def refuse(self, unknown: list[str]) -> None:
        if unknown:
            raise UserError(f"boost.params.{unknown[0]}: {self.package} has no such parameter for this task; correct its name or take it out")

    def load(self, path: Path) -> Any:
        return self.module.Booster(model_file=path)


class LightGBM(Library):
    package, suffix, failure, gpu = "lightgbm", ".txt", "basic.LightGBMError", {"device_type": "gpu"}
    objectives = {kind: kind for kind in ("binary", "multiclass", "regression")}
    a_column = ("monotone_constraints", "mc", "monotone_constraint", "feature_contri", "feature_contrib", "fc", "fp", "feature_penalty")
    settled = re.compile("bin|seed|missing|sparse|bundle|min_data|min_child_s|min_samples|linear|pre_filter|device|force")
    """parameters that binned rows depend on"""

    def train(self, data: Data, fold: Fold, settings: Settings, watch: Any) -> tuple[Any, int]:
        """A booster that predicts with its best round, and that round's number from 1.

        After each round `watch(rounds done, metric, its validation value, -> its training value, -> validation predictions)`.
        """
        boost, target, said, kept, grown = settings.boost, data.table.target, [], {}, []
        # Left alone, it times two ways to sum and takes the faster: other last digits on another day.
        way = "force_row_wise" if len(self.names) <= 100 else "force_col_wise"
        forced = {} if {"force_col_wise", "force_row_wise"} & boost.params.keys() else {way: True}
        params = self.params(settings, verbosity=0, deterministic=True, **forced)
        self.module.register_logger(SimpleNamespace(note=said.append), "note", "note")
        key = repr((bool(boost.folds), {name: value for name, value in params.items() if self.settled.search(name)}))
        if key not in data.binned:
            rows, categories = data.table.rows["folds"] if boost.folds else fold[0], list(range(self.info.numeric, len(self.names)))
            options = {"feature_name": self.names, "categorical_feature": categories, "params": params}
            data.binned = {key: (rows, self.module.Dataset(data.matrix[rows], target[rows], weight=data.weights(rows, True), **options).construct())}
        rows, whole = data.binned[key]
        train = whole.subset(np.searchsorted(rows, fold[0])) if boost.folds else whole
        valid = whole.create_valid(data.matrix[fold[1]], target[fold[1]], data.weights(fold[1]))

        def keep(predictions: np.ndarray, _: Any) -> tuple[str, float, bool]:
            kept["predictions"] = predictions
            return "kept", 0.0, True

        def predicted(booster: Any) -> np.ndarray:
            booster.eval_valid(keep)  # as a metric of train(), keep() would be given predictions after each round
            return kept["predictions"]

        def after(env: Any) -> None:
            if said:  # also a line for each tree that could not be split
                self.refuse(re.findall(r"Unknown parameter: (\S+)", " ".join(said)))
                said.clear()
            if not env.evaluation_result_list:
                raise UserError(f"boost.params.metric = {params.get('metric')!r}: lightgbm measures nothing by it; name one of its metrics")
            metric, value = env.evaluation_result_list[0][1:3]
            grown.append(env.model.current_iteration())  # fewer than rounds where one could not be split: its tree is taken away
            watch(env.iteration + 1, metric, value, lambda: env.model.eval_train()[0][2], lambda: predicted(env.model))

        stop = [self.module.early_stopping(boost.patience, first_metric_only=True, verbose=False)] if boost.patience else []
        booster = self.module.train(params, train, boost.rounds, valid_sets=[valid], valid_names=["valid"], callbacks=[after, *stop])
        best = booster.best_iteration if booster.best_iteration > 0 else len(grown)
        booster.best_iteration = max(1, grown[best - 1])  # what it is written and predicts with
        return booster, best

    def predict(self, booster: Any, matrix: np.ndarray, margin: bool = False) -> np.ndarray:
        return booster.predict(matrix, raw_score=margin)

    def importances(self, booster: Any) -> tuple[np.ndarray, np.ndarray]:
        """Gain and splits [features]."""
        return booster.feature_importance("gain"), booster.feature_importance("split")

    def contributions(self, booster: Any, matrix: np.ndarray) -> np.ndarray:
        """Shapley contributions [n, (features + 1) x outputs]."""
        try:
            return booster.predict(matrix, pred_contrib=True)
        except self.error:  # linear trees have none
            return np.full((len(matrix), len(self.names) + 1), np.nan)


class XGBoost(Library):
    package, suffix, failure, gpu = "xgboost", ".ubj", "core.XGBoostError", {"device": "cuda"}
    objectives = {"binary": "binary:logistic", "multiclass": "multi:softprob", "regression": "reg:squarederror"}

    @property
    def columns(self) -> dict[str, Any]:
        types = ["q"] * self.info.numeric + ["c"] * len(self.info.categories)
        return {"feature_names": self.names, "feature_types": types, "enable_categorical": True}

    def train(self, data: Data, fold: Fold, settings: Settings, watch: Any) -> tuple[Any, int]:
        """As LightGBM's. Bins depend on a fold's training rows, so folds share none."""
        params, boost = self.params(settings), settings.boost
        if params.get("booster") == "dart" and boost.patience:
            raise UserError('boost.params.booster = "dart": later trees change earlier ones, so no round is the best; set boost.patience = 0')
        bins = {name: params[name] for name in params.keys() & {"max_bin"}}
        key = str((boost.folds, bins))
        if boost.folds or key not in data.binned:
            sets: list[Any] = [None]
            for rows, weights in zip(fold, (data.weights(fold[0], True), data.weights(fold[1])), strict=True):
                own = {"label": data.table.target[rows], "weight": weights, **self.columns}
                if boost.folds and self.info.categories and len(sets) > 1:
                    # By the bins of a fold that lacks a category its rows would count as another's.
                    sets.append(self.module.DMatrix(data.matrix[rows], **own))
                else:
                    sets.append(self.module.QuantileDMatrix(data.matrix[rows], ref=sets[-1], **bins, **own))
            data.binned = {key: sets[1:]}
        train, valid = data.binned[key]

        def after(model: Any, epoch: int, log: Any) -> bool:
            self.refuse(re.findall(r'Parameters: \{ "([^"]+)', " ".join(str(line.message) for line in caught)))
            if "valid" not in log:
                raise UserError(f"boost.params.eval_metric = {params.get('eval_metric')!r}: xgboost measures nothing by it; name one of its metrics")
            metric, values = next(iter(log["valid"].items()))
            # eval() says "[round]<tab>name:value<tab>name:value".
            watch(epoch + 1, metric, values[-1], lambda: float(model.eval(train).split("\t")[1].rpartition(":")[2]), lambda: model.predict(valid))
            return False

        calls = [self.module.callback.TrainingCallback()]
        calls[0].after_iteration = after
        if boost.patience:
            named = params.get("eval_metric")
            first = named[0] if isinstance(named, list) and named else named or None
            calls.append(self.module.callback.EarlyStopping(rounds=boost.patience, metric_name=first, data_name="valid"))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            booster = self.module.train(params, train, boost.rounds, evals=[(valid, "valid")], verbose_eval=False, callbacks=calls)
        best = booster.best_iteration + 1 if boost.patience else booster.num_boosted_rounds()
        return booster[:best], best

    def predict(self, booster: Any, matrix: np.ndarray, margin: bool = False, **more: bool) -> np.ndarray:
        return booster.predict(self.module.DMatrix(matrix, **self.columns), output_margin=margin, **more)

    def importances(self, booster: Any) -> tuple[np.ndarray, np.ndarray]:
        """As LightGBM's."""
        found = [booster.get_score(importance_type=kind) for kind in ("total_gain", "weight")]
        return tuple(np.array([scores.get(name, 0) for name in self.names]) for scores in found)

    def contributions(self, booster: Any, matrix: np.ndarray) -> np.ndarray:
        """As LightGBM's."""
        return self.predict(booster, matrix, pred_contribs=True)


LIBRARIES = {library.package: library for library in (LightGBM, XGBoost)}


def fold_file(run: Path, number: int, suffix: str) -> Path:
    return run / "folds" / f"fold{number}{suffix}"


class BoostPredictor:
    """The boosters of a run folder, averaged over folds; to infer.py what Predictor is."""

    def __init__(self, path: Path, overrides: list[str] | None = None, files: list[str] | None = None):
        self.path, self.settings = path, settings.parse([path / "config.toml", *(files or [])], overrides or [])
        self.info, self.preprocessing = folder.read_info(path), folder.read_preprocessing(path)
        names, boost = self.preprocessing["numeric"] + self.preprocessing["categorical"], self.settings.boost
        self.library = LIBRARIES[boost.library](self.info, names)
        models = [fold_file(path, number, self.library.suffix) for number in range(max(1, boost.folds))]
        for model in models:
            record = model.with_suffix(".json")
            if not model.exists() or not record.exists():
                raise UserError(f"{path}: the run has not ended, {model.name} of {len(models)} folds is missing; the same boost.py command goes on")
            if sha256(model) != json.loads(record.read_text())["sha256"]:
                raise UserError(f"{model}: is damaged; delete it with {record.name}, and the same boost.py command makes that fold again")
        self.boosters = [self.library.load(model) for model in models]

    def scorer(self) -> evaluate.Scorer:
        return scorer_of(self.settings, self.info)

    def split(self, part: str) -> Part | None:
        """A part of the run's own data; None where there is no such part."""
        data = prepare(self.settings)
        return Part(data, data.table.rows[part]) if part in data.table.rows else None

    def read(self, source: Path, rows: int) -> Iterator[Any]:
        """A file to predict, in chunks."""
        return config.module("data", self.settings.data.name).read_rows(source, self.settings.data, self.preprocessing, self.info, rows)

    def score(self, dataset: Any) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
        """Scores, predictions and targets of a labelled data set, in its order."""
        scorer = self.scorer()
        predictions = self.predict(dataset, False, scorer)
        return scorer.compute(), predictions, dataset.__getitems__(torch.arange(len(dataset)))["target"].numpy()

    def predict(self, dataset: Any, logits: bool, scorer: evaluate.Scorer | None) -> np.ndarray:
        """Probabilities (or margins) [n] or [n, classes], or values [n]: the mean over folds, in the rows' order."""
        positions = torch.arange(len(dataset))
        batch, weights_of = dataset.__getitems__(positions), getattr(dataset, "weights", lambda _: None)
        numeric = batch["numeric"].numpy() if "numeric" in batch else np.empty((len(dataset), 0), np.float32)
        matrix = to_matrix(numeric, batch["categorical"].numpy()) if "categorical" in batch else numeric
        if scorer:
            add_scores(scorer, self.average(matrix, False), batch["target"], weights_of(positions))
        return self.average(matrix, logits and bool(self.info.labels))

    def average(self, matrix: np.ndarray, margin: bool) -> np.ndarray:
        folds = [self.library.predict(booster, matrix, margin) for booster in self.boosters]
        return folds[0] if len(folds) == 1 else np.mean(folds, axis=0, dtype=np.float64)

    def held_out(self) -> np.ndarray:
        """Predictions of the validation part, of each row by the fold that was not trained on it. Raises UserError."""
        from pyarrow import parquet

        if not (self.path / "oof.parquet").exists():
            raise UserError(f"{self.path}: the run has not ended; the same boost.py command goes on")
        table, rows = parquet.read_table(self.path / "oof.parquet").to_pandas().set_index("row"), prepare(self.settings).table.rows["valid"]
        if len(missing := np.setdiff1d(rows, table.index)):
            raise UserError(f"{self.path}: {len(missing)} validation rows have no out-of-fold prediction; no weights can be fitted to them")
        predictions = table.loc[rows, [f"probability_{label}" for label in self.info.labels] or ["prediction"]].to_numpy()
        return predictions if self.info.kind == "multiclass" else predictions[:, -1]

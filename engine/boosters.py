"""LightGBM and XGBoost by their native APIs."""

import re
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np

from engine.boost_data import Data, Fold
from engine.boost_library import Library
from engine.config import UserError, suggestion
from engine.settings import Settings


class LightGBM(Library):
    package, suffix, failure, gpu = "lightgbm", ".txt", "basic.LightGBMError", {"device_type": "gpu"}
    objectives = {"binary": ("binary", "cross_entropy", "xentropy"), "multiclass": ("multiclass", "softmax"), "regression": ("regression",)}
    a_column = {"monotone_constraints", "mc", "monotone_constraint", "feature_contri", "feature_contrib", "fc", "fp", "feature_penalty"}
    settled = re.compile("bin|seed|missing|sparse|bundle|min_data|min_child_s|min_samples|linear|pre_filter|device|force")
    """parameters that binned rows depend on"""

    def train(self, data: Data, fold: Fold, settings: Settings, watch: Any) -> tuple[Any, int]:
        """A booster that predicts with its best round, and that round's number from 1.

        After each round `watch(rounds done, metric, its validation value, -> its training value, -> validation predictions)`.
        """
        boost, said, kept, grown = settings.boost, [], {}, []
        # Left alone, it times two ways to sum and takes the faster: other last digits on another day.
        way = "force_row_wise" if len(self.names) <= 100 else "force_col_wise"
        forced = {} if {"force_col_wise", "force_row_wise"} & boost.params.keys() else {way: True}
        params = self.params(settings, verbosity=0, deterministic=True, **forced)
        self.module.register_logger(SimpleNamespace(note=said.append), "note", "note")
        train, valid = self.bin(data, fold, params, boost.folds)
        if not watch.number:  # the other folds have the same parameters
            with self.checking():
                self.module.Booster(params, train)

        def keep(predictions: np.ndarray, _: Any) -> tuple[str, float, bool]:
            kept["predictions"] = predictions
            return "kept", 0.0, True

        def predicted(booster: Any) -> np.ndarray:
            booster.eval_valid(keep)  # as a metric of train(), keep() would be given predictions after each round
            return kept["predictions"]

        def after(env: Any) -> None:
            if said:  # also a line for each tree that could not be split
                self.refuse(re.findall(r"Unknown parameter: (\S+)", " ".join(said)))
                for first, second in re.findall(r"(\S+) is set=.*?, (\S+)=.*? will be ignored", " ".join(said)):
                    raise UserError(f"boost.params.{second}: lightgbm takes it for {first}, which is set too; take one of the two out")
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

    def bin(self, data: Data, fold: Fold, params: dict[str, Any], folds: int) -> tuple[Any, Any]:
        """Training and validation rows as the library takes them. Folds and trials share the bins, which are made of training and validation
        rows where there are folds."""
        key = repr((bool(folds), {name: value for name, value in params.items() if self.settled.search(name)}))
        if key not in data.binned:
            rows, categories = data.table.rows["folds"] if folds else fold[0], list(range(self.info.numeric, len(self.names)))
            options = {"feature_name": self.names, "categorical_feature": categories, "params": params}
            binned = self.module.Dataset(data.matrix[rows], data.table.target[rows], weight=data.weights(rows, True), **options)
            with self.checking():
                data.binned = {key: (rows, binned.construct())}
        rows, whole = data.binned[key]
        valid = whole.create_valid(data.matrix[fold[1]], data.table.target[fold[1]], data.weights(fold[1]))
        return whole.subset(np.searchsorted(rows, fold[0])) if folds else whole, valid

    def reason(self, error: Exception) -> str:
        return super().reason(error).replace(" in data file", ", where a number is needed")  # LightGBM reads a parameter as it reads a table

    def predict(self, booster: Any, matrix: np.ndarray, margin: bool = False) -> np.ndarray:
        return booster.predict(matrix, raw_score=margin)

    def importances(self, booster: Any) -> tuple[np.ndarray, np.ndarray]:
        """Gain and splits [features]."""
        return booster.feature_importance("gain"), booster.feature_importance("split")

    def contributions(self, booster: Any, matrix: np.ndarray) -> np.ndarray:
        """Shapley contributions [n, (features + 1) x outputs]. Raises the library's error for trees that have none."""
        return booster.predict(matrix, pred_contrib=True)


class XGBoost(Library):
    package, suffix, failure, gpu = "xgboost", ".ubj", "core.XGBoostError", {"device": "cuda"}
    objectives = {"binary": ("binary:logistic", "reg:logistic"), "multiclass": ("multi:softprob",), "regression": ("reg:squarederror",)}
    a_column = {"monotone_constraints"}

    @property
    def columns(self) -> dict[str, Any]:
        types = ["q"] * self.info.numeric + ["c"] * len(self.info.categories)
        return {"feature_names": self.names, "feature_types": types, "enable_categorical": True}

    def params(self, settings: Settings, **own: Any) -> dict[str, Any]:
        """With a table's names of columns as the library knows them."""
        values = super().params(settings, **own)
        if values.get("booster") == "gblinear":
            raise UserError('boost.params.booster = "gblinear": grows no trees; use "gbtree" or "dart"')
        if isinstance(limits := values.get("monotone_constraints"), dict):
            values["monotone_constraints"] = {self.feature("monotone_constraints", name): limit for name, limit in limits.items()}
        elif isinstance(limits, list):
            values["monotone_constraints"] = tuple(limits)
        if isinstance(groups := values.get("interaction_constraints"), list):
            if not all(isinstance(group, list) for group in groups):
                raise UserError(f'boost.params.interaction_constraints = {groups}: needs lists of features in a list, such as [["a", "b"], ["c"]]')
            values["interaction_constraints"] = [[self.feature("interaction_constraints", name) for name in group] for group in groups]
        return values

    def feature(self, key: str, name: str | int) -> str:
        """What the library calls a feature that is given by its name or place. Raises UserError."""
        if isinstance(name, int) and 0 <= name < len(self.names):
            return self.names[name]
        if not isinstance(name, str) or name not in self.named:
            raise UserError(f"boost.params.{key}: there is no feature {name!r}{suggestion(str(name), list(self.named))}")
        return self.named[name]

    def train(self, data: Data, fold: Fold, settings: Settings, watch: Any) -> tuple[Any, int]:
        """As LightGBM's."""
        params, boost, stops = self.params(settings), settings.boost, []
        train, valid = self.bin(data, fold, params, boost.folds)
        if not watch.number:
            with self.checking():
                self.module.Booster(params, [train, valid])

        def after(model: Any, epoch: int, log: Any) -> bool:
            self.refuse(re.findall(r'Parameters: \{ "([^"]+)', " ".join(str(line.message) for line in caught)))
            if "valid" not in log:
                raise UserError(f"boost.params.eval_metric = {params.get('eval_metric')!r}: xgboost measures nothing by it; name one of its metrics")
            metric, values = next(iter(log["valid"].items()))
            # eval() says "[round]<tab>name:value<tab>name:value".
            watch(epoch + 1, metric, values[-1], lambda: float(model.eval(train).split("\t")[1].rpartition(":")[2]), lambda: model.predict(valid))
            if boost.patience and not stops:  # made here, since only now it is known what the library calls the first metric
                stops.append(self.module.callback.EarlyStopping(rounds=boost.patience, metric_name=metric, data_name="valid"))
            return bool(stops) and stops[0].after_iteration(model, epoch, log)

        call = self.module.callback.TrainingCallback()
        call.after_iteration = after
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            booster = self.module.train(params, train, boost.rounds, evals=[(valid, "valid")], verbose_eval=False, callbacks=[call])
        best = booster.best_iteration + 1 if boost.patience else booster.num_boosted_rounds()
        return booster[:best], best

    def bin(self, data: Data, fold: Fold, params: dict[str, Any], folds: int) -> list[Any]:
        """Training and validation rows as the library takes them. Bins depend on the training rows: trials share them, folds do not."""
        bins = {name: params[name] for name in params.keys() & {"max_bin"}}
        # The other tree methods look at the values themselves.
        binned = self.module.QuantileDMatrix if params.get("tree_method", "auto") in ("auto", "hist") else self.module.DMatrix
        key, sets = str((bins, binned)), [None]
        if not folds and key in data.binned:
            return data.binned[key]
        for rows, weights in zip(fold, (data.weights(fold[0], True), data.weights(fold[1])), strict=True):
            own = {"label": data.table.target[rows], "weight": weights, **self.columns}
            # By the bins of a fold that lacks a category its rows would count as another's.
            plain = binned is self.module.DMatrix or (folds and self.info.categories and len(sets) > 1)
            with self.checking():
                sets.append(self.module.DMatrix(data.matrix[rows], **own) if plain else binned(data.matrix[rows], ref=sets[-1], **bins, **own))
        data.binned = {} if folds else {key: sets[1:]}
        return sets[1:]

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

"""Gradient boosting of one table, as one TOML says: LightGBM or XGBoost, on the validation part or over folds.

    python boost.py --config conf/adult_xgboost.toml
    python boost.py --config conf/adult.toml boost.library=xgboost boost.folds=5 boost.params.max_depth=8
    python boost.py --config conf/adult.toml --screen

The same command again continues at the fold where it stopped. What comes out is a run folder that infer.py takes.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine import boosting, folder, metrics, process, report, screen, tracking
from engine.boosting import BoostPredictor, Data, Fold, Part, fold_file
from engine.config import UserError
from engine.settings import Settings, command_line, parse

OnRound = Callable[[int, float], None]
EVERY = 20
"""rounds between looks at the training rows, and between calls of on_round"""
EXPLAINED = 1000
"""validation rows, over all folds, whose Shapley contributions are averaged"""


def boost(settings: Settings, splits: Any = None, on_round: OnRound | None = None, trial: bool = False) -> dict[str, Any]:
    """Boost each fold, on from where the run folder stands. Returns what result.json holds.

    `splits` is the data file's `read(settings.data, settings.task.kind)`: read and binned once, however often this is called.
    `on_round(round, score)` gets the validation score of task.best each EVERY rounds, counted on over folds, and may raise to
    stop. A `trial` of a search has no run folder and gives the validation scores alone. Raises UserError, Stopped.
    """
    if process.world_size() > 1:
        raise UserError("boost.py: is one process that uses all cores; start it by python, without a launcher")
    run = None if trial else tracking.run_folder(settings, "boost")
    # The run folder stays locked until this file is closed.
    with folder.claim(run, settings, "boost") if run else contextlib.nullcontext():
        if run and (run / "result.json").exists():
            process.say(f"{run}: finished; another run.dir or run.seed begins a new run")
            return folder.read_result(run)
        data = boosting.prepare(settings, splits)
        metrics.names(settings.task, data.table.info, None)
        library = boosting.library(settings, data.table.info, data.names)
        folds = boosting.cut(settings, data)
        if run:
            (run / "folds").mkdir(exist_ok=True)
            folder.write_inputs(run, data.table.info, data.table.preprocessing)
            for line in [f"run folder {run}", *data.table.notes, f"features: {', '.join(data.names)}"]:
                process.say(line)
        request, scores, steps = process.StopRequest(), [], []
        with request if run else contextlib.nullcontext():
            for number, fold in enumerate(folds):
                watch = Watch(number, settings, data, fold, on_round, request, run is None)
                if run and fold_file(run, number, ".json").exists():
                    process.say(f"{watch.title} is there already")
                    continue
                booster, step = fit(library, settings, data, fold, watch)
                if run:
                    keep(run, watch, library, booster, step)
                else:
                    scores.append(watch.score(library.predict(booster, data.matrix[fold[1]])))
                    steps.append(step)
        if run:
            return conclude(run, settings, data, folds)
        return {"best": over_folds(np.mean, scores), "step": round(np.mean(steps))}


class Watch:
    """What happens after each round of a fold: curves, the bar or a line, the question whether to go on."""

    def __init__(self, number: int, settings: Settings, data: Data, fold: Fold, on_round: OnRound | None, request: Any, silent: bool):
        from tqdm import tqdm

        self.number, self.settings, self.data, self.rows, self.on_round, self.request = number, settings, data, fold[1], on_round, request
        self.title = f"fold {number + 1} of {max(1, settings.boost.folds)}"
        self.metric, self.valid, self.train = "", [], {}
        hidden = silent or not sys.stderr.isatty()  # a bar on a terminal, plain lines elsewhere
        self.lines_every = 0 if silent or not hidden else 500
        self.bar = tqdm(total=settings.boost.rounds, desc=self.title, unit="round", disable=hidden, leave=False, mininterval=0.5)
        self.begun = time.perf_counter()

    def __call__(self, rounds: int, metric: str, value: float, train: Callable[[], float], predictions: Callable[[], np.ndarray]) -> None:
        self.metric = metric
        self.valid.append(value)
        self.bar.update()
        if self.request.asked:
            raise process.Stopped(f"stopped by a signal in {self.title}; the same command goes on from that fold's start")
        if rounds % EVERY == 0:
            self.train[rounds] = train()
            self.bar.set_postfix({metric: f"{value:.5g}"}, refresh=False)
            if self.on_round:
                best = metrics.best_rule(self.settings.task, self.data.table.info, None)[1]
                self.on_round(self.number * self.settings.boost.rounds + rounds, self.score(predictions())[best])
        if self.lines_every and rounds % self.lines_every == 0:
            process.say(f"{self.title}  round {rounds}  {metric} {value:.5g}")

    def score(self, predictions: np.ndarray) -> dict[str, float]:
        return boosting.score(self.settings, self.data, self.rows, predictions)


def fit(library: Any, settings: Settings, data: Data, fold: Fold, watch: Watch) -> tuple[Any, int]:
    """The booster of a fold and its best round. Raises UserError where the library refuses its parameters."""
    try:
        return library.train(data, fold, settings, watch)
    except library.error as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise UserError(f"boost.params = {settings.boost.params}: {settings.boost.library} refuses: {lines[0].split('] ')[-1]}") from None
    finally:
        watch.bar.close()


def keep(run: Path, watch: Watch, library: Any, booster: Any, step: int) -> None:
    """Write a fold's trees up to the best round in the library's own format, then what marks the fold as done."""
    path = fold_file(run, watch.number, library.suffix)
    aside = path.with_name(f".tmp-{path.name}")
    booster.save_model(aside)
    with open(aside, "rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)
    record = {"fold": watch.number, "best_round": step, "metric": watch.metric, "valid": watch.valid, "train": watch.train}
    record["clock"] = {"seconds": round(time.perf_counter() - watch.begun, 3)}
    folder.write_text(fold_file(run, watch.number, ".json"), json.dumps(record))
    process.say(
        f"{watch.title}  best at round {step} of {len(watch.valid)}: {watch.metric} {watch.valid[step - 1]:.6g}  {record['clock']['seconds']} s"
    )


def over_folds(function: Callable[[list[float]], Any], scores: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: float(function([fold[name] for fold in scores])) for name in scores[0]}


def conclude(run: Path, settings: Settings, data: Data, folds: list[Fold]) -> dict[str, Any]:
    """Out-of-fold predictions, scores, importances and pictures, all from the model files as infer.py reads them."""
    from infer import columns, write_tables

    predictor = BoostPredictor(run)
    records = [json.loads(fold_file(run, number, ".json").read_text()) for number in range(len(folds))]
    held = [predictor.library.predict(booster, data.matrix[rows]) for booster, (_, rows) in zip(predictor.boosters, folds, strict=True)]
    scores = [boosting.score(settings, data, rows, predictions) for (_, rows), predictions in zip(folds, held, strict=True)]

    rows = np.concatenate([rows for _, rows in folds])
    order = np.argsort(rows)
    numbers = np.repeat(np.arange(len(folds)), [len(rows) for _, rows in folds])
    ids = {settings.data.id: [data.table.ids[row] for row in rows[order]]} if data.table.ids else {}
    out_of_fold = columns(predictor, np.concatenate(held)[order], logits=False)
    write_tables(iter([ids | {"row": rows[order], "fold": numbers[order]} | out_of_fold]), run / "oof.parquet")

    result = {"best": over_folds(np.mean, scores), "folds": [], "spread": over_folds(np.std, scores)}
    for record, valid in zip(records, scores, strict=True):
        result["folds"].append({"fold": record["fold"], "best_round": record["best_round"], "valid": valid})
    predictions, target = np.concatenate(held), data.table.target[rows]
    if "test" in data.table.rows:
        result["test"], predictions, target = predictor.score(Part(data, data.table.rows["test"]))
    result["clock"] = {"seconds": round(sum(record["clock"]["seconds"] for record in records), 3)}
    picture = report.draw_predictions(data.table.info, predictions, target, run)
    draw_curves(records, run / "curves.png")
    importance(run, predictor, data, folds)
    folder.write_text(run / "result.json", json.dumps(result, indent=1))
    for part in ("best", "spread", "test"):
        if part in result:
            process.say(f"{'valid' if part == 'best' else part}: {report.scores_text(result[part])}")
    process.say(f"pictures {run}/curves.png, {run}/{picture}, {run}/importance.png\nmodels {run}/folds")
    return result


def importance(run: Path, predictor: BoostPredictor, data: Data, folds: list[Fold]) -> None:
    """importance.csv and .png: shares of gain, splits and mean |Shapley contribution| (Lundberg & Lee, 2017), the mean of folds."""
    generator, shares = np.random.default_rng(0), []
    for booster, (_, rows) in zip(predictor.boosters, folds, strict=True):
        some = np.sort(generator.permutation(rows)[: max(1, EXPLAINED // len(folds))])
        gain, split, contributions = predictor.library.importances(booster, data.matrix[some])
        shares.append([gain, split, np.abs(contributions[..., :-1]).mean(axis=(0, 1))])
    means = np.mean(shares, axis=0)
    order = np.argsort(-means[2], kind="stable")
    lines = [",".join([json.dumps(data.names[place], ensure_ascii=False), *(f"{value:.8g}" for value in means[:, place])]) for place in order]
    folder.write_text(run / "importance.csv", "\n".join(["feature,gain,split,shap", *lines]) + "\n")
    shown = order[:30][::-1]
    drawing, axis = report.figure(7, 1.5 + 0.35 * len(shown))
    for place, name in enumerate(("gain", "splits", "mean |SHAP|")):
        part = means[place] / max(means[place].sum(), 1e-30)
        axis.barh(np.arange(len(shown)) + 0.27 * (place - 1), part[shown], 0.25, label=name)
    axis.set_yticks(range(len(shown)), [data.names[place] for place in shown])
    axis.set(xlabel="share of all columns")
    axis.legend()
    drawing.savefig(run / "importance.png")


def draw_curves(records: list[dict[str, Any]], path: Path) -> None:
    drawing, axis = report.figure()
    for record in records:
        color, best = f"C{record['fold']}", record["best_round"]
        axis.plot(range(1, len(record["valid"]) + 1), record["valid"], color=color, label=f"fold {record['fold']}")
        axis.plot([int(step) for step in record["train"]], record["train"].values(), "--", color=color, lw=1)
        axis.plot(best, record["valid"][best - 1], "o", mfc="none", ms=12, color=color)
    axis.set(xlabel="round", ylabel=f"{records[0]['metric']} (dashed: training rows)")
    axis.grid(alpha=0.3)
    axis.legend()
    drawing.savefig(path)


def main() -> None:
    def add(parser: Any) -> None:
        parser.add_argument("--screen", action="store_true", help="test each column against the target instead; see boost.screen, boost.level")

    files, overrides, options = command_line(__doc__, add=add)
    settings = parse(files, overrides)
    screen.screen(settings) if options.screen else boost(settings)


if __name__ == "__main__":
    sys.exit(process.exit_status(main))

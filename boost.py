"""Gradient boosting of one table, as one TOML says: LightGBM or XGBoost, on the validation part or over folds.

    python boost.py --config conf/adult_xgboost.toml
    python boost.py --config conf/adult.toml boost.library=xgboost boost.folds=5 boost.params.max_depth=8
    python boost.py --config conf/adult.toml --screen

The same command again continues at the fold where it stopped. What comes out is a run folder that infer.py takes.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from engine import boost_data, boost_report, boosting, folder, metrics, page, pictures, process, report, screen, tracking
from engine.boost_data import Data, Fold, Part
from engine.boost_report import OnRound, Watch
from engine.boosters import LIBRARIES
from engine.boosting import BoostPredictor, fold_file, read_fold
from engine.config import UserError
from engine.prediction_files import columns, write_tables
from engine.settings import Settings, command_line, parse
from engine.tensors import sha256


def boost(settings: Settings, splits: Any = None, on_round: OnRound | None = None, trial: bool = False) -> dict[str, Any]:
    """Boost each fold, on from where the run folder stands. Returns what result.json holds.

    `splits` is the data file's `read(settings.data, settings.task.kind)`: read and binned once, however often this is called.
    `on_round(round, score)` gets the validation score of task.best each boost_report.EVERY rounds, counted on over folds, and may raise to
    stop. A `trial` of a search has no run folder and gives the validation scores alone. Raises UserError, Stopped.
    """
    if process.world_size() > 1:
        raise UserError("boost.py: is one process that uses all cores; start it by python, without a launcher")
    run = None if trial else tracking.run_folder(settings, "boost")
    # The run folder stays locked until this file is closed.
    with folder.claim(run, settings, "boost") if run else nullcontext(), tracking.Tracker(settings, run, "boost") as tracker:
        if run and tracking.ended(run):
            process.say(f"{run}: finished; another run.dir or run.seed begins a new run")
            return folder.read_result(run)
        data = boost_data.prepare(settings, splits)
        info, rounds = data.table.info, settings.boost.rounds
        metrics.names(settings.task, info, boosting.own_metrics(settings))
        library, folds, done = LIBRARIES[settings.boost.library](info, data.names), boost_data.cut(settings, data), 0
        library.params(settings)  # what is wrong with them is said before anything else
        if run:
            (run / "folds").mkdir(exist_ok=True)
            done = folds_done(run, library.suffix, data, folds)
            folder.write_inputs(run, info, data.table.preprocessing)
            chosen = [f"features: {', '.join(data.names)}"] if settings.boost.features else []
            for line in (f"run folder {run}", *data.table.notes, *chosen, f"folds done: {done} of {len(folds)}"):
                process.say(line)
        tracker.start(done * rounds, features=data.names)
        journal, request, scores, steps = report.Journal(run, "steps.jsonl", done * rounds), process.StopRequest(), [], []
        with request if run else nullcontext(), closing(journal):
            for number, fold in list(enumerate(folds))[done:]:
                watch = Watch(settings, Part(data, fold[1]), number, on_round, [journal.write, tracker.log] if run else [], request)
                booster, step = fit(library, settings, data, fold, watch)
                if run:
                    keep(run, watch, library, booster, step, data.mark(fold))
                else:
                    # Trees take as long to predict by as some of them took to grow: the last look may have been at just these.
                    predictions = watch.seen[1] if watch.seen[0] == step else library.predict(booster, data.matrix[fold[1]])
                    scores.append(boosting.score(boosting.scorer_of(settings, info), watch.part, predictions))
                    steps.append(step)
        return conclude(run, settings, data, folds, tracker) if run else {"best": over_folds(np.mean, scores), "step": round(np.mean(steps))}


def folds_done(run: Path, suffix: str, data: Data, folds: list[Fold]) -> int:
    """Raises UserError where they were made of other rows."""
    for number, fold in enumerate(folds):
        if not (record := read_fold(run, number, suffix)):
            return number
        if not data.made(record, fold):
            raise UserError(f"{run}: fold {number} was boosted on other data than these; set run.dir to another folder, or bring the files back")
    return len(folds)


def fit(library: Any, settings: Settings, data: Data, fold: Fold, watch: Watch) -> tuple[Any, int]:
    """The booster of a fold and its best round. Raises UserError where the library refuses its parameters."""
    try:
        return library.train(data, fold, settings, watch)
    except library.error as error:
        raise UserError(f"boost.params = {settings.boost.params}: {library.package} refuses: {library.reason(error)}") from None
    finally:
        watch.bar.close()


def keep(run: Path, watch: Watch, library: Any, booster: Any, step: int, mark: str) -> None:
    """Write a fold's trees up to the best round in the library's own format, then what marks the fold as done."""
    path, seconds = fold_file(run, watch.number, library.suffix), round(time.perf_counter() - watch.begun, 3)
    aside = path.with_name(f".tmp-{path.name}")
    booster.save_model(aside)
    with open(aside, "rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)
    record = {"fold": watch.number, "best_round": step, "sha256": sha256(path), "rows": mark}
    record |= {"metric": watch.metric, "valid": watch.valid, "train": watch.train}
    folder.write_text(fold_file(run, watch.number, ".json"), json.dumps(record | {"clock": {"seconds": seconds}}))
    boost = watch.settings.boost
    ended = "  (boost.rounds ended it, not boost.patience)" if len(watch.valid) == boost.rounds < step + boost.patience else ""
    process.say(f"{watch.title}  best at round {step} of {len(watch.valid)}: {watch.metric} {watch.valid[step - 1]:.6g}  {seconds} s{ended}")


def over_folds(function: Callable[[list[float]], Any], scores: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(function([fold[name] for fold in scores])) for name in scores[0]}


def conclude(run: Path, settings: Settings, data: Data, folds: list[Fold], tracker: tracking.Tracker) -> dict[str, Any]:
    """Out-of-fold predictions, scores, importances and pictures, all from the model files as infer.py reads them."""
    predictor, table, parts = BoostPredictor(run), data.table, [Part(data, held) for _, held in folds]
    predicted = [predictor.library.predict(booster, data.matrix[part.rows]) for booster, part in zip(predictor.boosters, parts, strict=True)]
    scorer = boosting.scorer_of(settings, table.info)
    scores = [boosting.score(scorer, part, some) for part, some in zip(parts, predicted, strict=True)]
    rows, numbers = np.concatenate([part.rows for part in parts]), np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    order = np.argsort(rows)
    ids = {settings.data.id: table.ids.take(rows[order])} if table.ids else {}
    out_of_fold = columns(table.info.labels, np.concatenate(predicted)[order], logits=False)
    write_tables(iter([ids | {"row": rows[order], "fold": numbers[order]} | out_of_fold]), run / "oof.parquet")

    done = zip(predictor.folds, scores, strict=True)
    rounds = [{"fold": record["fold"], "best_round": record["best_round"], "valid": valid} for record, valid in done]
    result = {"best": over_folds(np.mean, scores), "folds": rounds}
    if len(folds) > 1:
        result["spread"] = over_folds(lambda values: np.std(values, ddof=1), scores)  # NaN where a score is
    predictions, target = np.concatenate(predicted), table.target[rows]
    if "test" in table.rows:
        result["test"], predictions, target = predictor.score(Part(data, table.rows["test"]))
    result["clock"] = {"seconds": round(sum(record["clock"]["seconds"] for record in predictor.folds), 3)}
    boost_report.draw_rounds(predictor.folds, run / "curves.png")
    shown = [run / "curves.png", run / pictures.draw_predictions(table.info, predictions, target, run), run / "importance.png"]
    explained = boost_report.importance(run, predictor, parts)
    folder.write_text(run / "result.json", json.dumps(result, indent=1))
    tracker.conclude(len(folds) * settings.boost.rounds, {**result, "folds": len(folds)}, shown, ("features", *explained))
    page.write(run)
    said = {"best": f"valid, mean of {len(folds)} folds", "spread": "deviation over folds"} if len(folds) > 1 else {"best": "valid"}
    for part, name in (said | {"test": "test"}).items():
        if part in result:
            process.say(f"{name}: {report.scores_text(result[part])}")
    process.say(f"pictures {', '.join(map(str, shown))}, all on {run}/report.html\nmodels {run}/folds")
    return result


def main() -> None:
    text = "test each column against the target instead; see boost.screen and boost.level"
    files, overrides, options = command_line(__doc__, add=lambda parser: parser.add_argument("--screen", action="store_true", help=text))
    (screen.screen if options.screen else boost)(parse(files, overrides))


if __name__ == "__main__":
    sys.exit(process.exit_status(main))

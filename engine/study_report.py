"""What a study leaves: trials.csv, best.toml, pictures, its record in the trackers. And LightGBM's stepwise study."""

import contextlib
import functools
import importlib
import shlex
import warnings
from pathlib import Path
from typing import Any

from engine import boost_data, process, search, tracking
from engine.boosters import LIBRARIES
from engine.config import UserError
from engine.folder import write_text
from engine.settings import Settings, replaced
from engine.slots import Slots
from engine.study import open_study, rule

PICTURES = {
    "history": "plot_optimization_history",
    "importances": "plot_param_importances",
    "slices": "plot_slice",
    "parallel": "plot_parallel_coordinate",
}


def conclude(found: Slots, tracker: tracking.Tracker) -> None:
    """Write what there is so far, also of a study that was cut short."""
    settings, place, study = found.settings, found.place, found.study
    # One that failed with neither a worker nor a reason lost its slot to another.
    ran = [trial for trial in found.in_state() if trial.state.name != "FAIL" or {"worker", "reason"} & trial.user_attrs.keys()]
    trials = [trial for trial in ran if trial.state.is_finished()]
    table = rows(trials, settings)
    write_trials(table, place)
    if finished := [trial for trial in trials if trial.state.name == "COMPLETE"]:
        best = study.best_trial
        values = {key: search.chosen(settings, key, value) for key, value in best.params.items()}
        write_best(values, settings, place)
        print(f"best {best.value:.6g} in trial {best.number}: {values}", flush=True)
        draw(study, place, len(finished), list(settings.tune.space))
        tell(tracker, table, place, study, rule(settings)[1])
    say_where(settings, place, bool(finished))


def tell(tracker: tracking.Tracker, table: list[dict[str, Any]], place: Path, study: Any, score: str) -> None:
    for row in table:
        tracker.log({"step": row["number"]} | {key: value for key, value in row.items() if key != "number"})
    pictures = [place / f"{name}.png" for name in PICTURES if (place / f"{name}.png").exists()]
    cells, best = [list(map(str, row.values())) for row in table], study.best_trial
    tracker.conclude(table[-1]["number"], {"best": {score: best.value}, "step": best.number}, pictures, ("trials", list(table[0]), cells))


def say_where(settings: Settings, place: Path, best: bool) -> None:
    if best:
        script = "boost.py" if settings.tune.target == "boost" or settings.tune.method != "search" else "train.py"
        print(f"train with it: python {script} --config … --config {shlex.quote(str(place / 'best.toml'))}", flush=True)
    where = tracking.without_secrets(settings.tune.storage) or str(place / "study.journal")
    print(f"look at the study: optuna-dashboard {shlex.quote(where)}", flush=True)


def rows(trials: list[Any], settings: Settings) -> list[dict[str, Any]]:
    """A row a trial."""
    found = []
    for trial in trials:
        seconds = (trial.datetime_complete - trial.datetime_start).total_seconds() if trial.datetime_start else 0.0
        row = {"number": trial.number, "state": trial.state.name, "value": trial.value, "seconds": seconds, "steps": len(trial.intermediate_values)}
        row |= {key: search.chosen(settings, key, trial.params.get(key)) for key in settings.tune.space} or trial.params
        found.append(row | {"reason": trial.user_attrs.get("reason", "its worker died" if trial.state.name == "FAIL" else "")})
    return found


def write_trials(table: list[dict[str, Any]], place: Path) -> None:
    import pandas as pd

    write_text(place / "trials.csv", pd.DataFrame(table).to_csv(index=False))


def write_best(values: dict[str, Any], settings: Settings, place: Path) -> None:
    """Only what was tuned. A free table is replaced whole by a later file, so it stands here whole."""
    import tomli_w

    found: dict[str, dict[str, Any]] = {"run": {"tuned": True}}
    whole = replaced(settings, values).values()
    for key in values:
        section, name, *_ = key.split(".")
        found.setdefault(section, {})[name] = whole[section][name]
    write_text(place / "best.toml", tomli_w.dumps(found))


@functools.cache
def import_what_draws() -> None:
    """Ahead of time, while workers train: it takes two seconds."""
    for name in ("pandas", "matplotlib.pyplot", "optuna.visualization", "sklearn.ensemble", "plotly.graph_objects"):
        with contextlib.suppress(ImportError):  # of plotly, which is an extra
            importlib.import_module(name)


def draw(study: Any, place: Path, finished: int, keys: list[str]) -> None:
    """PNG by matplotlib; HTML that opens offline by plotly, where it is installed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from optuna import visualization

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna calls its pictures experimental, one by one
        for name, function in PICTURES.items():
            options = {"params": keys} if keys and name != "history" else {}
            # With one value, or values that are all the same, nothing can be said of importance.
            with contextlib.suppress(ValueError, RuntimeError, ZeroDivisionError):
                if name == "importances" and finished < 2:
                    continue
                axes = getattr(visualization.matplotlib, function)(study, **options)
                first = axes.ravel()[0] if hasattr(axes, "ravel") else axes
                first.figure.set_size_inches(max(8, 3 * getattr(axes, "size", 1)), 4.5)
                first.figure.savefig(place / f"{name}.png", dpi=110, bbox_inches="tight")
                plt.close(first.figure)
                if visualization.is_available():
                    getattr(visualization, function)(study, **options).write_html(place / f"{name}.html", include_plotlyjs=True)
    if not visualization.is_available():
        print("pictures as HTML: pip install plotly (requirements-extra.txt)", flush=True)


def stepwise(settings: Settings, place: Path) -> None:
    """LightGBM's parameters one after another by optuna-integration, each tried over K folds of the raw table."""
    import optuna
    from optuna.trial import TrialState

    try:
        from optuna_integration.lightgbm import LightGBMTunerCV
    except ImportError:
        raise UserError('tune.method = "lightgbm-stepwise": needs pip install optuna-integration (requirements-extra.txt)') from None
    import lightgbm
    import numpy as np

    if process.world_size() > 1:
        raise UserError('tune.method = "lightgbm-stepwise": is one process; start it by python')
    settings = replaced(settings, {"boost.library": "lightgbm", "boost.folds": settings.boost.folds or 5, "tune.target": "boost", "tune.space": {}})
    owner = process.lock(place)  # noqa: F841, it lasts as long as this name
    data = boost_data.prepare(settings)
    folds = boost_data.cut(settings, data)
    learned = np.unique(np.concatenate([part for fold in folds for part in fold]))
    library = LIBRARIES["lightgbm"](data.table.info, data.names)
    kind, score = data.table.info.kind, rule(settings)[1]
    usual = {"binary": "binary_logloss", "multiclass": "multi_logloss", "regression": "rmse"}[kind]
    known = {"auroc": "auc" if kind == "binary" else "auc_mu", "mae": "l1", "accuracy": "binary_error" if kind == "binary" else "multi_error"}
    params = {"metric": known.get(score, usual), **library.params(settings, verbosity=-1, deterministic=True, feature_pre_filter=False)}
    direction = "max" if params["metric"] in ("auc", "auc_mu", "average_precision", "map", "ndcg") else "min"
    settings = replaced(settings, {"task.best": f"{direction} {score}"})
    study = open_study(settings, place, settings.run.seed)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)

    def say(_: Any, trial: Any) -> None:
        print(f"best {study.best_value:.6g} {params['metric']}  done {trial.number + 1}  now {trial.params}", flush=True)

    options = {"feature_name": library.names, "categorical_feature": list(range(data.table.info.numeric, len(data.names)))}
    whole = lightgbm.Dataset(data.matrix[learned], data.table.target[learned], weight=data.weights(learned, True), **options)
    stop = [lightgbm.early_stopping(settings.boost.patience, verbose=False)] if settings.boost.patience else []
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    places = [tuple(np.searchsorted(learned, part) for part in fold) for fold in folds]
    how = {"callbacks": stop, "optuna_callbacks": [say], "show_progress_bar": False, "optuna_seed": settings.run.seed % 2**32}
    how |= {"time_budget": int(settings.tune.timeout)} if settings.tune.timeout else {}
    tuner = LightGBMTunerCV(params, whole, settings.boost.rounds, folds=places, study=study, **how)
    with tracking.Tracker(settings, place, "tune") as tracker:
        tracker.start()
        try:
            tuner.run()
        except lightgbm.basic.LightGBMError as error:
            raise UserError(f"boost.params = {settings.boost.params}: lightgbm refuses: {str(error).splitlines()[0]}") from None
        finally:
            trials = [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]
            write_trials(table := rows(trials, settings), place)
            if found := any(trial.state.name == "COMPLETE" for trial in trials):
                tuned = {name for trial in trials for name in trial.params}
                write_best({f"boost.params.{name}": value for name, value in tuner.best_params.items() if name in tuned}, settings, place)
                draw(study, place, 0, [])
                tell(tracker, table, place, study, params["metric"])
            say_where(settings, place, found)

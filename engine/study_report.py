"""What a study leaves: trials.csv, best.toml, pictures."""

from pathlib import Path
from typing import Any

from engine.folder import write_text
from engine.search import FREE
from engine.settings import Settings

PICTURES = {"history": "plot_optimization_history", "importances": "plot_param_importances", "slices": "plot_slice", "parallel": "plot_parallel_coordinate"}


def conclude(study: Any, settings: Settings, place: Path) -> None:
    """Write what there is so far, also of a study that was cut short."""
    from optuna.trial import TrialState

    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished() and "surplus" not in trial.user_attrs]
    write_trials(trials, settings, place)
    finished = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    failed = [trial for trial in trials if trial.state == TrialState.FAIL and "reason" in trial.user_attrs]
    if failed and not finished:
        print(f"no trial finished; the last failed with: {failed[-1].user_attrs['reason']}", flush=True)
    if finished:
        best = study.best_trial
        write_best(best.params, settings, place)
        print(f"best {best.value:.6g} in trial {best.number}: {best.params}", flush=True)
        print(f"train with it: python train.py --config … --config {place}/best.toml", flush=True)
        draw(study, place, len(finished))
    where = settings.tune.storage or (place / "study.journal")
    print(f"look at the study: optuna-dashboard {where}", flush=True)


def write_trials(trials: list[Any], settings: Settings, place: Path) -> None:
    import pandas as pd

    rows = []
    for trial in trials:
        seconds = (trial.datetime_complete - trial.datetime_start).total_seconds() if trial.datetime_start else 0.0
        row = {"number": trial.number, "state": trial.state.name, "value": trial.value, "seconds": seconds, "steps": len(trial.intermediate_values)}
        reason = trial.user_attrs.get("reason", "worker died" if trial.state.name == "FAIL" else "")
        rows.append(row | {key: trial.params.get(key) for key in settings.tune.space} | {"reason": reason})
    write_text(place / "trials.csv", pd.DataFrame(rows).to_csv(index=False))


def write_best(params: dict[str, Any], settings: Settings, place: Path) -> None:
    """Only what was tuned. A free table is replaced whole by a later file, so it stands here whole."""
    import tomli_w

    values: dict[str, dict[str, Any]] = {"run": {"tuned": True}}
    for key, value in params.items():
        wanted = settings.tune.space[key]
        if isinstance(wanted, list) and value not in wanted:
            value = wanted[value]  # choices that Optuna cannot hold are drawn by place
        section, _, name = key.partition(".")
        if key.startswith(FREE):
            values.setdefault("boost", {}).setdefault("params", dict(settings.boost.params))[key.removeprefix(FREE)] = value
        else:
            values.setdefault(section, {})[name] = value
    write_text(place / "best.toml", tomli_w.dumps(values))


def draw(study: Any, place: Path, finished: int) -> None:
    """PNG by matplotlib; HTML that opens offline by plotly, where it is installed."""
    import warnings

    import matplotlib

    matplotlib.use("Agg")
    from optuna import visualization

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna calls its pictures experimental, one by one
        for name, function in PICTURES.items():
            if name == "importances" and finished < 2:
                continue
            axes = getattr(visualization.matplotlib, function)(study)
            first = axes.ravel()[0] if hasattr(axes, "ravel") else axes
            first.figure.set_size_inches(max(7, 3 * getattr(axes, "size", 1)), 4.5)
            first.figure.savefig(place / f"{name}.png", dpi=110, bbox_inches="tight")
            if visualization.is_available():
                getattr(visualization, function)(study).write_html(place / f"{name}.html", include_plotlyjs=True)
    if not visualization.is_available():
        print("pictures as HTML: pip install plotly (requirements-extra.txt)", flush=True)

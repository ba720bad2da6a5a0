"""Boosted, deep and voted on the public tables, beside the published scores; and what boost.py adds to the library's own training.

    make bench-tables
    python benchmarks/tables.py --only california --recipes lightgbm xgboost
    python benchmarks/tables.py --only california --recipes tabm-full --seeds 0        an hour or more without a GPU
    python benchmarks/tables.py --recipes                                              the seconds alone

Each recipe of conf/ is trained with several seeds, by the scripts, into a folder of its own under --runs, where finished runs are taken
as they stand and others go on. The vote is of LightGBM over five folds of training and validation rows, XGBoost and TabM, its weights fitted
on validation rows; that without folds, like the published ensembles, has no model that was trained on these. Then boosting in boost.py and by
hand take turns: the same rows, folds, parameters and so the same trees. Lines of --results that were not asked for stay. Exit status 0 where
the bars hold, else 1.
"""

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

RECIPES = {
    "lightgbm-default": ("boost.py", "lightgbm_default"),
    "lightgbm": ("boost.py", "lightgbm"),
    "xgboost": ("boost.py", "xgboost"),
    "tabm": ("train.py", "tabm"),
    "tabm-full": ("train.py", "tabm_full"),
    "lightgbm-folds": ("boost.py", "lightgbm", "boost.folds=5"),
}
"""script, conf/<data>_<…>.toml, overrides"""
VOTES = {"vote": ["lightgbm-folds", "xgboost", "tabm"], "vote-without-folds": ["lightgbm", "xgboost", "tabm"]}
SCORES = {"adult": ("accuracy", 1), "california": ("rmse", -1)}
"""the score, and whether more of it is better"""
BARS = {
    "adult": {"lightgbm-default": 0.869, "boosted": 0.8735, "tabm": 0.867, "tabm-full": 0.8695, "vote": 0.8745},
    "california": {"lightgbm-default": (0.4495, 1e-4), "boosted": 0.433, "tabm": 0.44, "tabm-full": 0.43, "vote": 0.42},
}
"""at least or at most this, or this within a tolerance"""
BAR_SECONDS, BAR_MINUTES = 1.1, 30
PUBLISHED = {
    "lightgbm-default": ("tabr", "lightgbm_", "default2-evaluation"),
    "lightgbm": ("tabr", "lightgbm_", "2-evaluation"),
    "xgboost": ("tabr", "xgboost_", "2-evaluation"),
    "tabm": ("tabm", "tabm-mini-piecewiselinear", "0-evaluation"),
    "tabm-full": ("tabm", "tabm-mini-piecewiselinear", "0-evaluation"),
    "vote": ("tabm", "tabm-mini-piecewiselinear", "0-ensemble-5"),
    "vote-without-folds": ("tabm", "tabm-mini-piecewiselinear", "0-ensemble-5"),
}
"""rows of published_scores.csv: repository, model, run. Beside the votes stands the same authors' ensemble of five."""


def published(data: str, recipe: str) -> float | None:
    path = Path(os.environ.get("PLAINLOOP_DATA", "."), "published_scores.csv")
    if not path.exists() or recipe not in PUBLISHED:
        return None
    with open(path, newline="") as file:
        wanted = (*PUBLISHED[recipe][:1], data, *PUBLISHED[recipe][1:])
        found = [row for row in csv.DictReader(file) if (row["source_repo"], row["dataset"], row["model"], row["run"]) == wanted]
    return abs(float(found[0]["test_score_mean"])) if found else None


def train(data: str, recipe: str, seed: int, runs: Path) -> Path:
    """The finished run folder of a recipe."""
    script, config, *more = RECIPES[recipe]
    run = runs / f"{data}-{recipe}-seed{seed}"
    words = ["--config", f"conf/{data}_{config}.toml", f"run.dir={run}", f"run.seed={seed}", *more]
    ended = subprocess.run([sys.executable, script, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if ended.returncode:
        raise SystemExit(f"{script} {' '.join(words)}: exit status {ended.returncode}")
    return run


def outcome(run: Path) -> dict[str, Any]:
    """Scores of a run, and the seconds it trained over all its processes."""
    from engine.report import earlier_seconds, read_lines

    result = json.loads((run / "result.json").read_text())
    seconds = result["clock"]["seconds"]
    if lines := read_lines(run / "metrics.jsonl"):
        seconds = lines[-1]["clock"]["seconds"] + earlier_seconds(lines)
    return {"valid": result["best"], "test": result["test"], "seconds": seconds, "commits": commits([run])}


def commits(runs: list[Path]) -> list[str]:
    """Which made these runs; with a star where files were not committed."""
    records = [json.loads((run / "tracker.json").read_text()) for run in runs]
    return sorted({record["commit"][:7] + "*" * record["dirty"] for record in records})


def vote(runs: list[Path]) -> dict[str, Any]:
    import torch

    import infer
    from engine.vote import Vote

    members = Vote([infer.open_run(run, torch.device("cpu"), [], None) for run in runs], None, "probability")
    members.fit()
    tested = {"test": members.score(members.split("test"))[0], "weights": members.weights.tolist()}
    return tested | {"valid": {}, "seconds": 0.0, "commits": commits(runs)}


def scores(data: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A line a recipe: the test score over seeds, beside the published one."""
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in options.seeds:
        for recipe in options.recipes:
            found.setdefault(recipe, []).append(
                vote([train(data, voter, seed, options.runs) for voter in VOTES[recipe]])
                if recipe in VOTES
                else outcome(train(data, recipe, seed, options.runs))
            )
            print(f"{data} {recipe} seed {seed}: {found[recipe][-1]}", flush=True)
    score, lines = SCORES[data][0], []
    for recipe, outcomes in found.items():
        values = [outcome["test"][score] for outcome in outcomes]
        lines.append(
            {
                "data": data,
                "score": score,
                "recipe": recipe,
                "mean": statistics.fmean(values),
                "spread": statistics.stdev(values) if len(values) > 1 else None,
                "seeds": values,
                "published": published(data, recipe),
                "seconds": [outcome["seconds"] for outcome in outcomes],
                "valid_loss": None if recipe in VOTES else statistics.fmean(outcome["valid"]["loss"] for outcome in outcomes),
                "commits": sorted({commit for outcome in outcomes for commit in outcome["commits"]}),
            }
            | ({"weights": [outcome["weights"] for outcome in outcomes]} if recipe in VOTES else {})
        )
    return lines


def judge(lines: list[dict[str, Any]]) -> None:
    """Put bars beside scores. That of boosting is for the tuned recipe with the smaller validation loss: the test part has no say."""
    for line in lines:
        data, recipe, value = line["data"], line["recipe"], line["mean"]
        tuned = [other for other in lines if other["data"] == data and other["recipe"] in ("lightgbm", "xgboost")]
        bar = BARS[data].get("boosted" if tuned and line is min(tuned, key=lambda other: other["valid_loss"]) else recipe)
        holds = None if bar is None else abs(value - bar[0]) <= bar[1] if isinstance(bar, tuple) else SCORES[data][1] * (value - bar) >= 0
        if recipe == "tabm":
            holds = holds and max(line["seconds"]) <= 60 * BAR_MINUTES
        line |= {"bar": bar, "holds": holds}


def by_hand(library: str, settings: Any) -> tuple[float, list[int]]:
    """Seconds and best rounds of the library's own training of the folds, binned once where it can be."""
    from engine import boost_data
    from engine.boosters import LIBRARIES

    data = boost_data.prepare(settings)
    rows, target, boost = data.table.rows["folds"], data.table.target, settings.boost
    made = LIBRARIES[library](data.table.info, data.names)
    best, begun = [], time.perf_counter()
    if library == "lightgbm":
        import lightgbm

        wide = {"deterministic": True, "verbosity": -1, "force_row_wise": True}
        params, categories = made.params(settings, **wide), list(range(data.table.info.numeric, len(data.names)))
        whole = lightgbm.Dataset(data.matrix[rows], target[rows], categorical_feature=categories, params=params)
        for fold, held in boost_data.cut(settings, data):
            valid = whole.create_valid(data.matrix[held], target[held])
            stop = lightgbm.early_stopping(boost.patience, first_metric_only=True, verbose=False)
            part = whole.construct().subset(np.searchsorted(rows, fold))
            best.append(lightgbm.train(params, part, boost.rounds, valid_sets=[valid], callbacks=[stop]).best_iteration)
    else:
        import xgboost

        params = made.params(settings)
        bins = {name: params[name] for name in params.keys() & {"max_bin"}}
        for fold, held in boost_data.cut(settings, data):
            train_set = xgboost.QuantileDMatrix(data.matrix[fold], target[fold], **bins, **made.columns)
            # Where rows held out have categories that the others lack, the others' bins would do them wrong.
            binned = (xgboost.DMatrix, {}) if data.table.info.categories else (xgboost.QuantileDMatrix, {"ref": train_set, **bins})
            valid = binned[0](data.matrix[held], target[held], **binned[1], **made.columns)
            stop = {"early_stopping_rounds": boost.patience, "verbose_eval": False}
            best.append(xgboost.train(params, train_set, boost.rounds, evals=[(valid, "valid")], **stop).best_iteration + 1)
    return time.perf_counter() - begun, best


def in_boost(folder: str) -> tuple[float, list[int], float]:
    """Seconds of training and best rounds of boost(), and its seconds with reading, scores, Shapley values and pictures."""
    import contextlib
    import io

    from boost import boost
    from engine.settings import parse

    begun = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        result = boost(parse([folder + "/boost.toml"], [f"run.dir={folder}/run"]))
    return result["clock"]["seconds"], [fold["best_round"] for fold in result["folds"]], time.perf_counter() - begun


def overhead(data: str, library: str, options: argparse.Namespace) -> dict[str, Any]:
    from engine.config import dump_toml
    from engine.settings import parse

    pairs, whole = [], []
    for number in range(options.pairs + 1):
        with tempfile.TemporaryDirectory() as folder:
            words = [f"boost.rounds={options.rounds}", "boost.folds=3", "boost.patience=100"]
            settings = parse([ROOT / f"conf/{data}_{library}.toml"], words)
            Path(folder, "boost.toml").write_text(dump_toml(settings.values()))
            taken = {}
            for place in (0, 1) if number % 2 else (1, 0):
                taken[place] = in_boost(folder) if place else by_hand(library, settings)
            if taken[0][1] != taken[1][1]:
                raise SystemExit(f"{data} {library}: best rounds {taken[1][1]} by boost.py, {taken[0][1]} by hand; they do not do the same")
            pairs.append((taken[1][0], taken[0][0]))
            whole.append(taken[1][2])
    pairs, ratios = pairs[1:], [ours / theirs for ours, theirs in pairs[1:]]  # the first imports the libraries
    ratio = statistics.median_low(ratios)
    ours, theirs = pairs[ratios.index(ratio)]
    line = {"data": data, "library": library, "rounds": options.rounds, "folds": 3, "ratio": ratio, "ratios": ratios}
    print(f"{data} {library}: seconds beside by hand {ratio:.3f} ({' '.join(f'{one:.3f}' for one in ratios)})", flush=True)
    line |= {"boost_seconds": ours, "hand_seconds": theirs}
    return line | {"whole_seconds": statistics.median(whole[1:]), "bar": BAR_SECONDS, "holds": ratio <= BAR_SECONDS}


def verdict(holds: bool | None) -> str:
    return "" if holds is None else "holds" if holds else "FAILS"


def tables(scored: list[dict[str, Any]], timed: list[dict[str, Any]]) -> str:
    """The two tables, in Markdown."""
    rows = [["data", "recipe", "test score", "spread", "seeds", "published", "bar", "", "seconds a run", "command", "commit"]]
    for line in scored:
        bar = "" if line["bar"] is None else "{} ± {}".format(*line["bar"]) if isinstance(line["bar"], tuple) else f"{line['bar']:.4f}"
        numbers = [f"{line[key]:.4f}" if line[key] is not None else "" for key in ("mean", "spread", "published")]
        seconds = "" if line["recipe"] in VOTES else f"{statistics.fmean(line['seconds']):.0f}"
        numbers.insert(2, str(len(line["seeds"])))
        end = [bar, verdict(line["holds"]), seconds, line["command"], ", ".join(line["commits"])]
        rows.append([f"{line['data']}, {line['score']}", line["recipe"], *numbers, *end])
    text = markdown(rows)
    if timed:
        rows = [["data", "library", "boost.py, s", "by hand, s", "ratio", "bar", "", "with scores and pictures, s", "command", "commit"]]
        for line in timed:
            seconds = [f"{line[key]:.2f}" for key in ("boost_seconds", "hand_seconds")]
            end = [f"{line['ratio']:.3f}", f"{line['bar']:.2f}", verdict(line["holds"]), f"{line['whole_seconds']:.1f}"]
            end += [line["command"], *line["commits"]]
            rows.append([line["data"], line["library"], *seconds, *end])
        text += "\n" + markdown(rows)
    return text


def markdown(rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SCORES, default=list(SCORES), metavar="DATA", help=f"of {', '.join(SCORES)}")
    default = [name for name in RECIPES if not name.endswith(("-folds", "-full"))] + [*VOTES]
    parser.add_argument("--recipes", nargs="*", choices=[*RECIPES, *VOTES], default=default, metavar="RECIPE", help=f"of {', '.join(default)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pairs", type=int, default=11, help="turns of boost.py and by hand that count, one more comes first; -1 leaves them out")
    parser.add_argument("--rounds", type=int, default=300, help="boosting rounds of a turn's three folds")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/bench-tables", help="folder of the run folders")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results", help="folder of tables.json and tables.md")
    options = parser.parse_args()
    words, begun = list(sys.argv[1:]), time.perf_counter()
    for place in [place for place, word in enumerate(words) if word in ("--runs", "--results")][::-1]:  # where it is, is not what it is
        del words[place : place + 2]
    scored = [line for data in options.only for line in scores(data, options)]
    libraries = [name for name in ("lightgbm", "xgboost") if options.pairs > 0 and name in (options.recipes or RECIPES)]
    pairs = [(data, library) for data in options.only for library in libraries]
    timed = [overhead(data, library, options) for data, library in pairs]
    commit = subprocess.run(
        ["git", "describe", "--always", "--abbrev=7", "--exclude=*", "--dirty=*"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    made = {"command": " ".join(["python", "benchmarks/tables.py", *words]), "machine": f"{os.cpu_count()} cores, {processor()}"}
    place, kept = options.results / "tables.json", {"scores": [], "boosting": []}
    if place.exists():
        kept = json.loads(place.read_text())
    for part, names, lines in (("scores", ("data", "recipe"), scored), ("boosting", ("data", "library"), timed)):
        new = {tuple(line[name] for name in names): {"commits": [commit], **line, **made} for line in lines}
        kept[part] = [*({tuple(line[name] for name in names): line for line in kept[part]} | new).values()]
    judge(kept["scores"])
    print(text := tables(kept["scores"], kept["boosting"]))
    options.results.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(kept, indent=1) + "\n")
    place.with_suffix(".md").write_text(f"{text}\n{made['machine']}. This command took {time.perf_counter() - begun:.0f} s beside runs that stood.\n")
    asked = {(line["data"], line["recipe"]) for line in scored}
    lines = [line for line in kept["scores"] if (line["data"], line["recipe"]) in asked] + timed
    return 0 if all(line["holds"] is not False for line in lines) else 1


def processor() -> str:
    path = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in path.read_text().splitlines() if line.startswith("model name")] if path.exists() else []
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    sys.exit(main())

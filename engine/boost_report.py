"""What a boosted run shows: how each round goes, then the importances of its columns and its curves."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from engine import boosting, folder, metrics, pictures, process
from engine.boost_data import Part
from engine.boosting import BoostPredictor
from engine.settings import Settings

OnRound = Callable[[int, float], None]
Log = Callable[[dict[str, Any]], None]
EVERY = 20
"""rounds between looks at the training rows and calls of on_round: either costs more than some rounds"""
EXPLAINED, WORK = 1000, 20_000_000
"""validation rows, over all folds, whose Shapley contributions are averaged; fewer where rows x splits would be more than WORK, some
5 seconds: thousands of large trees took several times as long to explain as to grow"""


class Watch:
    """What happens after each round of a fold: curves, journal, the bar or a line, the question whether to go on."""

    def __init__(self, settings: Settings, part: Part, number: int, on_round: OnRound | None, logs: list[Log], request: process.StopRequest):
        """`logs` get a line each round. There are none in a trial, which is silent."""
        from tqdm import tqdm

        self.settings, self.part, self.number, self.on_round, self.logs, self.request = settings, part, number, on_round, logs, request
        self.metric, self.valid, self.train, self.begun = "", [], {}, time.perf_counter()
        self.seen: tuple[int, np.ndarray | None] = (0, None)  # the round of the last look at validation predictions, and these
        # Of the one score that decides, kept over the rounds: to make it anew takes longer than some rounds.
        self.decides = metrics.best_rule(settings.task, part.data.table.info, boosting.own_metrics(settings))[1]
        self.scorer = boosting.scorer_of(settings, part.data.table.info, [self.decides]) if on_round else None
        self.title = f"fold {number + 1} of {settings.boost.folds or 1}"
        silent = None if logs else True  # None: a bar on a terminal, plain lines elsewhere
        self.bar = tqdm(total=settings.boost.rounds, desc=self.title, unit="round", disable=silent, leave=False, mininterval=0.5)

    def __call__(self, rounds: int, metric: str, value: float, train: Callable[[], float], predictions: Callable[[], np.ndarray]) -> None:
        if rounds == 1:  # before hours are spent on what cannot be scored
            boosting.require_kind(predictions(), self.part.data.table.info)
        self.metric = metric
        self.valid.append(value)
        self.bar.update()
        if self.request.asked:
            raise process.Stopped(f"stopped by a signal in {self.title}; the same command goes on from that fold's start")
        step, line = self.number * self.settings.boost.rounds + rounds, {"fold": self.number, "round": rounds, "valid": {metric: value}}
        if self.logs and (rounds == 1 or rounds % EVERY == 0):
            self.train[rounds] = train()
            line["train"] = {metric: self.train[rounds]}
        for log in self.logs:
            log({"step": step, **line})
        if rounds % EVERY:
            return
        if self.on_round:
            self.seen = rounds, predictions()
            self.on_round(step, boosting.score(self.scorer, self.part, self.seen[1])[self.decides])
        self.bar.set_postfix({metric: f"{value:.5g}"}, refresh=False)
        if self.logs and self.bar.disable and rounds % 500 == 0:
            process.say(f"{self.title}  round {rounds}  {metric} {value:.5g}")


def importance(run: Path, predictor: BoostPredictor, parts: list[Part]) -> tuple[list[str], list[list[Any]]]:
    """importance.csv and .png: gain, splits and mean |Shapley contribution| (Lundberg & Lee, 2017), the mean of folds. Returns the table."""
    import pandas as pd

    generator, found, data, explained = np.random.default_rng(0), [], parts[0].data, 0
    for booster, part in zip(predictor.boosters, parts, strict=True):
        gain, split = predictor.library.importances(booster)
        count = min(EXPLAINED, WORK // max(1, int(split.sum()))) // len(parts)
        some = np.sort(generator.permutation(part.rows)[: max(20, count)])
        explained += len(some)
        try:
            shares = predictor.library.contributions(booster, data.matrix[some])
        except predictor.library.error:  # of linear trees there are none, nor of trees with several outputs
            shares = np.full((len(some), len(data.names) + 1), np.nan)
        found.append([gain, split, np.abs(shares.reshape(len(some), -1, len(data.names) + 1)[..., :-1]).mean(axis=(0, 1))])
    table = pd.DataFrame(np.mean(found, axis=0).T, data.names, ["gain", "split", "shap"]).rename_axis("feature")
    table = table.sort_values(["shap", "gain"], ascending=False)
    folder.write_text(run / "importance.csv", table.to_csv())
    shown = (table / table.sum()).set_axis(["gain", "splits", f"mean |SHAP| of {explained} rows"], axis=1).rename(pictures.short)[:30][::-1]
    drawing, axis = pictures.figure(7, 1.5 + 0.35 * len(shown))
    first = f"the first {len(shown)} of {len(table)} columns: " if len(shown) < len(table) else ""
    shown.plot.barh(ax=axis, width=0.8, xlabel=f"{first}share of all columns", ylabel="")
    axis.legend(reverse=True)
    drawing.savefig(run / "importance.png")
    return ["feature", *table], table.reset_index().to_numpy().tolist()


def draw_rounds(records: list[dict[str, Any]], path: Path) -> None:
    """Each fold's metric over rounds: validation, training dashed, a circle at the best."""
    drawing, axis = pictures.figure()
    for record in records:
        color, best, valid = f"C{record['fold']}", record["best_round"], record["valid"]
        axis.plot(range(1, len(valid) + 1), valid, color=color, label=f"fold {record['fold'] + 1}, best at {best}")
        axis.plot([int(step) for step in record["train"]], record["train"].values(), "--", marker=".", color=color, lw=1)
        axis.plot(best, valid[best - 1], "o", mfc="none", ms=12, color=color)
    axis.plot([], [], "--", marker=".", color="grey", lw=1, label="training rows")
    axis.set(xlabel="round", ylabel=records[0]["metric"])
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    axis.legend()
    drawing.savefig(path)

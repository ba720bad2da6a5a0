"""What a boosted run shows: the importances of its columns and its curves."""

from pathlib import Path
from typing import Any

import numpy as np

from engine import folder, pictures
from engine.boost_data import Part
from engine.boosting import BoostPredictor

EXPLAINED, WORK = 1000, 20_000_000
"""validation rows, over all folds, whose Shapley contributions are averaged; fewer where rows x splits would be more than WORK, some
5 seconds: thousands of large trees took several times as long to explain as to grow"""


def importance(run: Path, predictor: BoostPredictor, parts: list[Part]) -> tuple[list[str], list[list[Any]]]:
    """importance.csv and .png: gain, splits and mean |Shapley contribution| (Lundberg & Lee, 2017), the mean of folds. Returns the table."""
    import pandas as pd

    generator, found, data, explained = np.random.default_rng(0), [], parts[0].data, 0
    for booster, part in zip(predictor.boosters, parts, strict=True):
        gain, split = predictor.library.importances(booster)
        count = min(EXPLAINED, WORK // max(1, int(split.sum()))) // len(parts)
        some = np.sort(generator.permutation(part.rows)[: max(20, count)])
        explained += len(some)
        shares = predictor.library.contributions(booster, data.matrix[some])
        found.append([gain, split, np.abs(shares.reshape(len(some), -1, len(data.names) + 1)[..., :-1]).mean(axis=(0, 1))])
    table = pd.DataFrame(np.mean(found, axis=0).T, data.names, ["gain", "split", "shap"]).rename_axis("feature")
    table = table.sort_values(["shap", "gain"], ascending=False)
    folder.write_text(run / "importance.csv", table.to_csv())
    shown = (table / table.sum()).set_axis(["gain", "splits", f"mean |SHAP| of {explained} rows"], axis=1)[:30][::-1]
    drawing, axis = pictures.figure(7, 1.5 + 0.35 * len(shown))
    shown.plot.barh(ax=axis, width=0.8, xlabel="share of all columns", ylabel="")
    drawing.savefig(run / "importance.png")
    return ["feature", *table], table.reset_index().to_numpy().tolist()


def draw_rounds(records: list[dict[str, Any]], path: Path) -> None:
    """Each fold's metric over rounds: validation, training dashed, a circle at the best."""
    drawing, axis = pictures.figure()
    for record in records:
        color, best, valid = f"C{record['fold']}", record["best_round"], record["valid"]
        axis.plot(range(1, len(valid) + 1), valid, color=color, label=f"fold {record['fold']}, best at {best}")
        axis.plot([int(step) for step in record["train"]], record["train"].values(), "--", color=color, lw=1)
        axis.plot(best, valid[best - 1], "o", mfc="none", ms=12, color=color)
    axis.set(xlabel="round", ylabel=f"{records[0]['metric']} (dashed: training rows)")
    axis.grid(alpha=0.3)
    axis.legend()
    drawing.savefig(path)

"""Feature screening: one test a column against the target, corrected for their number, by SciPy."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from engine import boosting, folder, process, report, tracking
from engine.config import UserError, dump_toml
from engine.settings import Settings

Line = tuple[str, str, float, float, float]
"""column, test, statistic, p, corrected p"""


def screen(settings: Settings) -> list[str]:
    """Test the training rows' columns; screen.csv, .png and .toml in the run folder. Returns those that pass. Raises UserError."""
    from scipy import stats

    data, boost = boosting.prepare(settings), settings.boost
    run, rows = tracking.run_folder(settings, "boost"), data.table.rows["train"]
    with folder.claim(run, settings, "boost"):
        columns = enumerate(data.matrix[rows].T.astype(np.float64))
        tests = [
            test(column, place >= data.table.info.numeric, data.table.target[rows], bool(data.table.info.labels), boost.screen)
            for place, column in columns
        ]
        # Of Benjamini and Hochberg (1995): level is the share of columns that pass and should not.
        corrected = stats.false_discovery_control([p for *_, p in tests]).tolist()
        table = [(name, *found, p) for name, found, p in zip(data.names, tests, corrected, strict=True)]
        passed = [name for name, *_, p in table if p <= boost.level]
        table.sort(key=lambda line: (line[4], -abs(line[2])))
        text = [f"{json.dumps(name, ensure_ascii=False)},{kind},{value:.8g},{p:.8g},{q:.8g},{name in passed}" for name, kind, value, p, q in table]
        folder.write_text(run / "screen.csv", "\n".join(["feature,test,statistic,p,corrected_p,passes", *text]) + "\n")
        draw(table, boost.level, run / "screen.png")
        for name, kind, value, _, p in table:
            process.say(f"{name:<30} {kind:<14} {value:>12.5g}  corrected p {p:<9.3g} {'' if name in passed else 'dropped'}")
        if not passed:
            raise UserError(f"boost.level = {boost.level}: no column passes; raise it, or train without a screen")
        folder.write_text(run / "screen.toml", dump_toml({"boost": {"features": passed}}))
        process.say(f"{len(passed)} of {len(table)} columns pass: --config {run}/screen.toml\ntable {run}/screen.csv, picture {run}/screen.png")
    return passed


def test(column: np.ndarray, categorical: bool, target: np.ndarray, labels: bool, by: str) -> tuple[str, float, float]:
    """(name, statistic, p). A missing number is left out; a missing category is one of its own."""
    from scipy import stats

    if categorical:
        column = np.nan_to_num(column, nan=-1)
    else:
        known = ~np.isnan(column)
        column, target = column[known], target[known]
    if not categorical and not labels:
        name, function = {"rank": ("Spearman", stats.spearmanr), "mean": ("Pearson", stats.pearsonr)}[by]
        groups: list[Any] = [column, target]
    elif categorical and labels:
        name, function = "chi-squared", lambda *pair: stats.chi2_contingency(stats.contingency.crosstab(*pair).count)
        groups = [column, target]
    else:
        values, classes = (target, column) if categorical else (column, target)
        groups = [group for code in np.unique(classes) if len(group := values[classes == code]) > 1]
        name, function = {
            ("rank", True): ("Mann-Whitney", stats.mannwhitneyu),
            ("rank", False): ("Kruskal-Wallis", stats.kruskal),
            ("mean", True): ("t", lambda a, b: stats.ttest_ind(a, b, equal_var=False)),  # Welch's
            ("mean", False): ("ANOVA", stats.f_oneway),
        }[by, len(groups) == 2]
    if len(groups) < 2 or any(np.ptp(group) == 0 for group in groups[: 1 if name in ("Spearman", "Pearson") else 0]):
        return name, 0.0, 1.0
    found = function(*groups)
    return name, float(found.statistic), 1.0 if np.isnan(found.pvalue) else float(found.pvalue)


def draw(table: list[Line], level: float, path: Path) -> None:
    shown = table[:60][::-1]
    drawing, axis = report.figure(7, 1.5 + 0.25 * len(shown))
    # A p below what a float holds is drawn as that.
    heights = [-np.log10(max(p, 1e-300)) for *_, p in shown]
    axis.barh([name for name, *_ in shown], heights, color=["C0" if p <= level else "lightgrey" for *_, p in shown])
    axis.axvline(-np.log10(level), color="black", lw=1, label=f"level {level:g}")
    axis.set(xlabel="-log10 of the corrected p", xscale="symlog")
    axis.legend()
    drawing.savefig(path)

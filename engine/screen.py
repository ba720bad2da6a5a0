"""Feature screening: one test a column against the target, corrected for their number, by SciPy."""

from pathlib import Path
from typing import Any

import numpy as np

from engine import boost_data, folder, pictures, process, tracking
from engine.config import UserError, dump_toml
from engine.settings import Settings


def screen(settings: Settings) -> list[str]:
    """Test the training rows' columns; screen.csv, .png and .toml in the run folder. Returns those that pass. Raises UserError."""
    import pandas as pd
    from scipy import stats

    data, boost = boost_data.prepare(settings), settings.boost
    info, run, rows = data.table.info, tracking.run_folder(settings, "boost"), data.table.rows["train"]
    with folder.claim(run, settings, "boost"):
        columns = enumerate(data.matrix[rows].T.astype(np.float64))
        tests = [test(column, place >= info.numeric, data.table.target[rows], bool(info.labels), boost.screen) for place, column in columns]
        table = pd.DataFrame(tests, data.names, ["test", "statistic", "p"]).rename_axis("feature").reset_index()
        # Of Benjamini and Hochberg (1995): level is the share of columns that pass and should not.
        table["corrected_p"] = stats.false_discovery_control(table["p"])
        table["passes"] = table["corrected_p"] <= boost.level
        passed = table["feature"][table["passes"]].tolist()
        table = table.sort_values(["corrected_p", "statistic"], ascending=[True, False], key=abs)
        folder.write_text(run / "screen.csv", table.to_csv(index=False, float_format="%.8g"))
        draw(table, boost.level, run / "screen.png")
        process.say(f"each column alone, {len(rows):,} training rows; p corrected as by Benjamini and Hochberg, level {boost.level:g}")
        for name, kind, value, _, p, passes in table.itertuples(index=False, name=None):
            process.say(f"{pictures.short(name, 30):<30} {kind:<14} {value:>12.5g}  corrected p {p:<9.3g} {'' if passes else 'dropped'}")
        if not passed:
            raise UserError(f"boost.level = {boost.level}: no column passes; raise it, or train without a screen")
        folder.write_text(run / "screen.toml", dump_toml({"boost": {"features": passed}}))
        process.say(f"{len(passed)} of {len(table)} columns pass: --config {run}/screen.toml\ntable {run}/screen.csv, picture {run}/screen.png")
    return passed


def test(column: np.ndarray, categorical: bool, target: np.ndarray, labels: bool, by: str) -> tuple[str, float, float]:
    """(name, statistic, p). A missing number is left out; a missing category is one of its own."""
    from scipy import stats

    known = categorical | ~np.isnan(column)
    column, target = np.nan_to_num(column[known], nan=-1), target[known]
    groups: list[Any] = [column, target]
    if categorical and labels:
        name, function = "chi-squared", lambda *pair: stats.chi2_contingency(stats.contingency.crosstab(*pair).count)
    elif not categorical and not labels:
        name, function = {"rank": ("Spearman", stats.spearmanr), "mean": ("Pearson", stats.pearsonr)}[by]
    else:
        classes, values = groups if categorical else (target, column)
        groups = [group for code in np.unique(classes) if len(group := values[classes == code]) > 1]
        name, function = {
            ("rank", True): ("Mann-Whitney", stats.mannwhitneyu),
            ("rank", False): ("Kruskal-Wallis", stats.kruskal),
            ("mean", True): ("t", lambda a, b: stats.ttest_ind(a, b, equal_var=False)),  # Welch's
            ("mean", False): ("ANOVA", stats.f_oneway),
        }[by, len(groups) == 2]
    if len(groups) < 2 or np.ptp(column) == 0:
        return name, 0.0, 1.0
    found = function(*groups)
    return name, float(found.statistic), 1.0 if np.isnan(found.pvalue) else float(found.pvalue)


def draw(table: Any, level: float, path: Path) -> None:
    shown = table[:60][::-1]
    drawing, axis = pictures.figure(7, 1.5 + 0.25 * len(shown))
    # A p below what a float holds is drawn as that.
    places, colors = range(len(shown)), np.where(shown["passes"], "C0", "lightgrey")
    axis.barh(places, -np.log10(shown["corrected_p"].clip(1e-300)), color=colors, tick_label=shown["feature"].map(pictures.short))
    axis.axvline(-np.log10(level), color="black", lw=1, label=f"level {level:g}")
    axis.set_xlabel("-log10 of the corrected p, on a logarithmic scale from 1")
    axis.set_xscale("symlog", linthresh=1)
    ticks = [tick for tick in (0, 1, 3, 10, 30, 100, 300) if tick <= axis.get_xlim()[1]]
    axis.set_xticks(ticks, map(str, ticks))
    axis.set_xticks([], minor=True)
    axis.legend(loc="lower right")
    drawing.savefig(path)

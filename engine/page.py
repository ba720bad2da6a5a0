"""report.html, a run on one page that needs nothing beside it, and runs/index.html, all runs in one table.

Its command, `python -m engine.report runs/`, writes the index, and the pages that are missing or old.
"""

import base64
import html
import json
import os
import sys
import time
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli

from engine import report, tracking
from engine.config import UserError

STYLE = """
:root { color: #1f2430; font: 15px/1.5 system-ui, sans-serif }
body { max-width: 68rem; margin: 0 auto; padding: 2rem } body.wide { max-width: none; font-size: 14px }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere } h2 { font-size: 1.05rem; margin: 2.2rem 0 .6rem } h3 { font-size: .9rem; margin: 0 }
.dim, th, dt { color: #6b7280 } .late { color: #a15c00 } a { color: #1d5fbf; text-decoration: none }
pre { background: #f5f6f8; border-radius: 6px; padding: .7rem .9rem; white-space: pre-wrap; overflow-wrap: anywhere }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } .wide thead th { cursor: pointer }
th, td { text-align: left; padding: .32rem 1.1rem .32rem 0; border-bottom: 1px solid #eceef1; white-space: nowrap; font-weight: 400 }
td a { display: inline-block; max-width: 32rem; overflow: hidden; text-overflow: ellipsis; vertical-align: bottom }
img { max-width: 100%; max-height: 46rem } input { font: inherit; padding: .35rem .7rem; width: 20rem; margin: 1rem 0 }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .1rem 1.2rem; margin: 0 } dd { margin: 0; overflow-wrap: anywhere }
.settings { display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); gap: 1.4rem 2.5rem }
th[data-up="1"]::after { content: " \\2191" } th[data-up="0"]::after { content: " \\2193" }
"""
SORT = """
const body = document.querySelector("tbody"), heads = [...document.querySelectorAll("th")];
heads.forEach((head, place) => head.onclick = () => {
  const value = row => row.cells[place].textContent, number = [...body.rows].every(row => !isNaN(value(row)));
  const up = head.dataset.up ? head.dataset.up === "0" : !number;  // the highest number first
  heads.forEach(other => delete other.dataset.up);
  head.dataset.up = up ? "1" : "0";
  const order = (a, b) => number ? a - b : a.localeCompare(b, undefined, {numeric: true});
  const ordered = (a, b) => a === "" || b === "" ? (a === "") - (b === "") : up ? order(a, b) : order(b, a);
  body.append(...[...body.rows].sort((one, two) => ordered(value(one), value(two))));
});
document.querySelector("input").oninput = event => {
  const words = event.target.value.toLowerCase().split(/\\s+/);
  for (const row of body.rows) row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
};
"""
PARTS = {"best": "validation", "spread": "deviation over folds", "valid": "validation, exported", "test": "test"}


class Run:
    """A folder of train.py or boost.py as it lies there, finished or not."""

    def __init__(self, folder: Path):
        self.folder, self.name = folder, folder.resolve().name
        self.settings, self.record = tomli.loads((folder / "config.toml").read_text()), tracking.read_record(folder)
        self.result = json.loads((folder / "result.json").read_text()) if (folder / "result.json").exists() else {}
        self.lines = report.read_lines(folder / "metrics.jsonl")
        self.boosted = (folder / "folds").exists()
        self.model = self.settings["boost"]["library"] if self.boosted else self.settings["model"]["label"]
        self.strategy = ("boost" if self.boosted else self.settings["strategy"]["name"]) + (" tuned" if self.settings["run"].get("tuned") else "")
        self.data = self.settings["data"]["label"]
        self.scores = self.result.get("test") or self.result.get("valid") or self.result.get("best") or {}
        last = self.lines[-1] if self.lines else {"step": 0, "clock": {"seconds": 0.0}}
        self.step, seconds = self.result.get("step", last["step"]), self.result.get("clock", last["clock"]).get("seconds", 0.0)
        self.minutes = (seconds + report.earlier_seconds(self.lines)) / 60
        self.commit = self.record.get("commit", "")[:7] + ("*" if self.record.get("dirty") else "")
        self.curves = [[line[part]["loss"] for line in self.lines] for part in ("train", "valid")] if self.lines else []
        self.curves += [json.loads(path.read_text())["valid"] for path in sorted((folder / "folds").glob("fold*.json"))]


def text(value: Any) -> str:
    return html.escape(value if isinstance(value, str) else f"{value:.4g}" if isinstance(value, float) else json.dumps(value))


def document(title: str, body: Sequence[str], kind: str = "") -> str:
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{text(title)}</title><style>{STYLE}</style>'
    icon = '<link rel="icon" href="data:,">'  # else a browser asks for one
    return f'<!doctype html>\n<html lang="en"><head>{head}{icon}</head>\n<body class="{kind}">\n{"".join(body)}\n</body></html>\n'


def table(content: Any, **options: Any) -> str:
    import pandas as pd

    return pd.DataFrame(content).to_html(float_format="{:.4g}".format, na_rep="", border=0, **options)


def pairs(values: dict[str, Any]) -> str:
    return "<dl>" + "".join(f"<dt>{text(key)}</dt><dd>{text(value)}</dd>" for key, value in values.items() if value != "") + "</dl>\n"


def spark(curves: Sequence[Sequence[float]], width: int = 110, height: int = 26) -> str:
    """Small curves on one scale, the last in front."""
    finite, paths = [value for curve in curves for value in curve if abs(value) < float("inf")], []
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    for place, curve in enumerate(curves if high > low else ()):
        across = (width - 4) / max(1, len(curve) - 1)
        shown = [(step, value) for step, value in enumerate(curve) if low <= value <= high][:: 1 + len(curve) // width]
        points = " ".join(f"{2 + across * step:.1f},{2 + (height - 4) * (high - value) / (high - low):.1f}" for step, value in shown)
        color = "#1d5fbf" if place == len(curves) - 1 else "#b9c4d4"
        paths.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.3"/>')
    return f'<svg width="{width}" height="{height}">{"".join(paths)}</svg>'


def write(folder: Path, run: Run | None = None) -> None:
    """report.html of one run, from what lies in its folder, where that is not read already."""
    run = run or Run(folder)
    step = f"{'best at ' if run.result else ''}step {run.step:,}" if run.step else ""
    took = f"{run.minutes:.3g} minutes" if run.minutes >= 2 else f"{60 * run.minutes:.3g} s"
    facts = ["finished" if run.result else "unfinished", step, took, run.commit]
    body = [f'<p class="dim">{text(run.model)} · {text(run.data)} · {text(run.strategy)}</p><h1>{text(run.name)}</h1>']
    body.append(f'<p class="dim">{" · ".join(text(fact) for fact in facts if fact)}</p>')
    if run.result:
        body.append(f"<h2>Scores</h2>{table({title: run.result[part] for part, title in PARTS.items() if run.result.get(part)})}")
        source = [f"best/, exported from checkpoints/{source.name}" for source in folder.glob(f"checkpoints/*-step={run.step:08d}")]
        folds = "folds/, the average of all" if len(run.result.get("folds", [])) > 1 else "folds/"
        use = [*source, folds if run.boosted else "best/"][0]
        command = text(f"python infer.py {folder} --input new.csv --output predictions.csv")
        body.append(f"<h2>Checkpoint to use</h2><p><code>{text(use)}</code></p><pre>{command}</pre>")
    for picture in sorted(folder.glob("*.png"), key=lambda path: path.stat().st_mtime):
        data = base64.b64encode(picture.read_bytes()).decode()
        body.append(f'<h2>{text(picture.stem.capitalize())}</h2><img alt="{text(picture.stem)}" src="data:image/png;base64,{data}">\n')
    unused = {"tune", "model", "train", "optim", "strategy"} if run.boosted else {"tune", "boost"}
    sections = [f"<div><h3>{text(name)}</h3>{pairs(values)}</div>" for name, values in run.settings.items() if name not in unused]
    body.append(f'<h2>Settings</h2><div class="settings">{"".join(sections)}</div>')
    body.append(f"<h2>Origin</h2>{pairs(run.record)}")
    (folder / "report.html").write_text(document(f"{run.model} on {run.data}", body))


def index(root: Path, runs: Sequence[Run]) -> None:
    """index.html of all runs, the newest first: scores of the test part where there is one."""
    names, rows = list(dict.fromkeys(name for run in runs for name in run.scores)), []
    for run in runs:
        link, when = urllib.parse.quote(os.path.relpath(run.folder / "report.html", root)), (run.folder / "config.toml").stat().st_mtime
        name = f'<a href="{link}" title="{text(run.name)}">{text(run.name)}</a>' + ("" if run.result else ' <span class="late">unfinished</span>')
        row = {"model": text(run.model), "data": text(run.data), "strategy": text(run.strategy), "run": name, "curve": spark(run.curves)}
        row |= {name: run.scores.get(name) for name in names} | {"step": run.step or "", "minutes": run.minutes}
        rows.append(row | {"date": time.strftime("%Y-%m-%d %H:%M", time.localtime(when)), "commit": text(run.commit)})
    body = [f'<h1>{len(runs)} runs</h1><p class="dim">{text(str(root))}</p><input placeholder="filter by words, sort by a click on a head">']
    body.append(f"{table(rows, escape=False, index=False)}<script>{SORT}</script>")
    (root / "index.html").write_text(document(f"{len(runs)} run{'s' * (len(runs) != 1)}", body, "wide"))


def main() -> None:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        raise UserError("python -m engine.report: takes one folder of runs, such as runs/")
    root = Path(sys.argv[1])
    runs = []
    for path in sorted(root.rglob("config.toml"), key=lambda path: -path.stat().st_mtime):
        if any((path.parent / name).exists() for name in ("metrics.jsonl", "checkpoints", "folds")):
            try:
                runs.append(Run(path.parent))
            except (ValueError, LookupError) as error:  # a torn file: the others still have their table
                print(f"skipped {path.parent}: {error}", file=sys.stderr)
    for run in runs:
        page, parts = run.folder / "report.html", [run.folder / name for name in ("config.toml", "metrics.jsonl", "result.json", "tracker.json")]
        if not page.exists() or any(part.exists() and part.stat().st_mtime > page.stat().st_mtime for part in parts):
            write(run.folder, run)
    index(root, runs)
    print(root / "index.html")

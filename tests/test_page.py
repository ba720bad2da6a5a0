"""Reports: a page that needs nothing beside it, and the table of all runs, in a real browser where there is one."""

import base64
import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

import commands
import launch
from engine import page, report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--window-size=1500,900",
]  # fmt: skip


def look(folder: Path, file: Path, *flags: str) -> str:
    """What a browser makes of a page."""
    profile = folder / "browser"
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *flags, file.as_uri()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    shutil.rmtree(profile, ignore_errors=True)
    return ended.stdout


def after(folder: Path, file: Path, script: str) -> str:
    """The text of a page's title after a script that sets it."""
    probe = file.with_name("probe.html")
    probe.write_text(file.read_text().replace("</body>", f"<script>{script}</script></body>"))
    dom = look(folder, probe, "--dump-dom")
    probe.unlink()
    return html.unescape(re.search(r"<title>(.*?)</title>", dom, re.DOTALL)[1])


def altered(run: Path, name: str, test: dict | None, **labels: str) -> None:
    """A copy of a run under other labels and scores; without scores it has not ended."""
    target = run.with_name(name)
    shutil.copytree(run, target, symlinks=True)
    text = (target / "config.toml").read_text()
    for section, label in labels.items():
        text = re.sub(rf'(\[{section}\].*?label = )"[^"]*"', lambda found, label=label: found[1] + json.dumps(label), text, flags=re.DOTALL)
    (target / "config.toml").write_text(text)
    (target / "report.html").unlink()
    result = json.loads((target / "result.json").read_text())
    (target / "result.json").unlink()
    if test is not None:
        (target / "result.json").write_text(json.dumps(result | {"test": test}))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("pages") / "runs"
    words = ("--config", commands.ROOT / "conf" / "digits.toml", "train.epochs=3", "model.width=32")
    launch.run(*words, f"run.dir={root}/a", log=root.with_name("log"))
    launch.end_all()
    altered(root / "a", "b", {"rmse": 12.5, "loss": 9.0}, data="houses")
    altered(root / "a", "c", {"accuracy": 0.125, "loss": 10.0}, model="<script>alert(1)</script>")
    altered(root / "a", "d", None)
    assert command(root).stdout == f"{root}/index.html\n"
    return root


def command(*words: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "engine.report", *map(str, words)]
    return subprocess.run(command, cwd=commands.ROOT, env=commands.environment(), capture_output=True, text=True)


def test_a_report_needs_nothing_beside_it(root):
    text = (root / "a" / "report.html").read_text()
    assert not re.search(r"""(?:src|href)=["'](?!data:)|@import|url\(|https?:""", text)
    pictures = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', text)]
    assert pictures == [(root / "a" / f"{name}.png").read_bytes() for name in ("curves", "confusion")]


def test_a_report_has_scores_settings_and_the_checkpoint(root):
    text = (root / "a" / "report.html").read_text()
    result = json.loads((root / "a" / "result.json").read_text())
    for part in ("best", "test"):
        for name, value in result[part].items():
            assert f">{name}<" in text
            assert f">{value:.4g}<" in text
    (checkpoint,) = (root / "a").glob(f"checkpoints/*-step={result['step']:08d}")
    assert f"best/, exported from checkpoints/{checkpoint.name}" in text
    assert f"python infer.py {root}/a --input new.csv --output predictions.csv" in text
    assert "<dt>width</dt><dd>32</dd>" in text
    assert json.loads((root / "a" / "tracker.json").read_text())["commit"] in text


def test_pages_are_written_for_every_run_also_the_unfinished(root):
    assert "unfinished" in (root / "d" / "report.html").read_text()
    assert "<script>alert" not in (root / "c" / "report.html").read_text() + (root / "index.html").read_text()
    before = {path: path.stat().st_mtime_ns for path in root.glob("*/report.html")}
    assert len(before) == 4
    (root / "b" / "result.json").touch()
    command(root)
    assert [path.parent.name for path, when in before.items() if path.stat().st_mtime_ns != when] == ["b"]


def test_only_folders_have_an_index(tmp_path):
    for words in ((tmp_path / "nothing",), ()):
        ended = command(*words)
        assert ended.returncode == 2
        assert ended.stderr.startswith("error: python -m engine.report: takes one folder")
    assert command(tmp_path).returncode == 0
    assert "0 runs" in (tmp_path / "index.html").read_text()


def test_small_curves_bear_what_training_gives():
    assert page.spark([]) == page.spark([[1.0, 1.0]])
    drawn = page.spark([[float("nan"), 3.0, 2.0, float("inf"), 1.0], [2.0] * 1000])
    assert drawn.count("<polyline") == 2
    numbers = [float(number) for number in re.findall(r"[\d.]+", " ".join(re.findall(r'points="([^"]*)"', drawn)))]
    assert min(numbers) >= 0
    assert max(numbers) <= 110
    assert len(drawn) < 4000


@browser
def test_the_table_sorts_and_filters(root, tmp_path):
    names = '[...document.querySelectorAll("tbody tr")].filter(row => !row.hidden).map(row => row.cells[3].querySelector("a").textContent).join(" ")'
    head = '[...document.querySelectorAll("th")].find(head => head.textContent === "{}")'
    index = root / "index.html"
    best_first = after(tmp_path, index, f"{head.format('accuracy')}.click(); document.title = {names}").split()
    assert best_first[:2] == ["a", "c"]  # those without the score come last, either way
    worst_first = after(tmp_path, index, f"{head.format('accuracy')}.click(); {head.format('accuracy')}.click(); document.title = {names}").split()
    assert worst_first[:2] == ["c", "a"]
    assert after(tmp_path, index, f"{head.format('loss')}.click(); document.title = {names}").split()[:3] == ["c", "b", "a"]  # 10 is more than 9
    assert after(tmp_path, index, f"{head.format('run')}.click(); document.title = {names}") == "a b c d"
    typed = 'const input = document.querySelector("input"); input.value = "Houses ddp"; input.dispatchEvent(new Event("input"));'
    assert after(tmp_path, index, f"{typed} document.title = {names}") == "b"
    assert after(tmp_path, index, 'document.title = document.querySelectorAll("tbody polyline").length') == "8"


@browser
def test_links_lead_to_the_reports(root, tmp_path):
    links = after(tmp_path, root / "index.html", 'document.title = [...document.querySelectorAll("td a")].map(link => link.href).join(" ")').split()
    assert sorted(links) == [path.as_uri() for path in sorted(root.glob("*/report.html"))]


@browser
def test_a_report_fits_the_window_and_shows_its_pictures(root, tmp_path):
    file = root / "a" / "report.html"
    wide = "document.documentElement.scrollWidth <= window.innerWidth"
    loaded = "[...document.images].every(image => image.complete && image.naturalWidth > 300 && image.width > 200)"
    assert after(tmp_path, file, f"onload = () => document.title = [{wide}, {loaded}, document.images.length].join()") == "true,true,2"
    look(tmp_path, file, f"--screenshot={tmp_path}/page.png")
    picture = imread(tmp_path / "page.png")
    assert picture.shape[:2] == (900, 1500)
    assert len(np.unique((picture * 255).astype(int).reshape(-1, picture.shape[2]), axis=0)) > 50


def test_the_table_of_predictions_names_classes_and_values():
    class Info:
        labels = ["no", "yes"]

    columns, rows = report.prediction_table(Info, np.array([0.25, 0.875]), np.array([1, 1]))
    assert columns == ["row", "true", "predicted", "probability"]
    assert rows == [[0, "yes", "no", 0.75], [1, "yes", "yes", 0.875]]
    _, rows = report.prediction_table(Info, np.array([[0.75, 0.25]] * 5), np.zeros(5), most=2)
    assert rows == [[0, "no", "no", 0.75], [1, "no", "no", 0.75]]
    Info.labels = []
    assert report.prediction_table(Info, np.array([1.5]), np.array([2.0]))[1] == [[0, 2.0, 1.5]]

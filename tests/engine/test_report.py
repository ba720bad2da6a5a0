"""What a run says: journals without a line twice, rates, pictures."""

import json
import math
import types

import numpy as np
import pytest
from matplotlib.image import imread
from torch import nn

from engine import pictures, report

LINE = {"epoch": 1.5, "step": 3, "lr": 0.1, "train": {"loss": 0.5, "f1": 0.75}, "valid": {"loss": 0.25, "f1": 0.5}}
CLOCK = {"clock": {"seconds": 1.0, "samples_per_second": 12345.6}}


def written(run, steps, at=0):
    journal = report.Journal(run, "metrics.jsonl", at)
    for step in steps:
        journal.write({"step": step, "at": at})
    journal.close()
    return [line["step"] for line in report.read_lines(run / "metrics.jsonl")]


def test_a_journal_is_cut_back_to_the_step_from_which_a_run_goes_on(tmp_path):
    assert written(tmp_path, [2, 4, 6]) == [2, 4, 6]
    assert written(tmp_path, [], at=6) == [2, 4, 6]
    assert written(tmp_path, [5, 7], at=4) == [2, 4, 5, 7]
    assert written(tmp_path, [1], at=0) == [1]


def test_a_torn_last_line_is_left_out_and_not_glued_to_the_next(tmp_path):
    written(tmp_path, [2, 4])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "at')
    assert [line["step"] for line in report.read_lines(tmp_path / "metrics.jsonl")] == [2, 4]
    assert written(tmp_path, [8], at=6) == [2, 4, 8]


def test_a_journal_without_a_run_writes_nothing():
    journal = report.Journal(None, "metrics.jsonl", 0)
    journal.write(LINE)
    journal.close()


def test_another_rank_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    journal = report.Journal(tmp_path, "metrics.jsonl", 0)
    journal.write(LINE)
    journal.close()
    assert list(tmp_path.iterdir()) == []


def test_a_number_is_written_whole(tmp_path):
    journal = report.Journal(tmp_path, "metrics.jsonl", 0)
    journal.write({"step": 1, "loss": 1 / 3, "bad": math.nan})
    journal.close()
    (line,) = report.read_lines(tmp_path / "metrics.jsonl")
    assert line["loss"] == 1 / 3
    assert math.isnan(line["bad"])


def test_the_rate_leaves_pauses_out(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(report.time, "perf_counter", lambda: now[0])
    clock = report.Clock(10, 64)
    now[0] += 2
    with clock.paused():
        now[0] += 50
    assert clock.read(20).items() >= {"seconds": 52.0, "samples_per_second": 320.0, "step_seconds": 0.2}.items()
    clock.restart(20)
    now[0] += 1
    assert clock.read(21).items() >= {"seconds": 53.0, "samples_per_second": 64.0, "step_seconds": 1.0}.items()


def test_without_a_terminal_there_are_plain_lines(tmp_path, capsys):
    with report.Journals(tmp_path, 0, 10) as journals:
        journals.tick()
        journals.log({"step": 1, "loss": 0.5})
        journals.evaluation(LINE | CLOCK, True)
    said = capsys.readouterr()
    assert said.out == "epoch 1.5  step 3  |  train: loss 0.5  f1 0.75  |  valid: loss 0.25  f1 0.5  |  12,346 samples/s  * best\n"
    assert said.err == ""
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == LINE | CLOCK
    assert json.loads((tmp_path / "steps.jsonl").read_text()) == {"step": 1, "loss": 0.5}


@pytest.mark.parametrize(("value", "text"), [(0.123456, "0.1235"), (1e-7, "1e-07"), (54321.6, "54321.6"), (math.nan, "nan"), (-2e6, "-2e+06")])
def test_scores_are_short(value, text):
    assert report.scores_text({"mae": value}) == f"mae {text}"


def test_parameters_are_counted_by_block():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2).requires_grad_(False))
    lines = [line.split() for line in report.parameter_lines(model)]
    assert lines == [["parameters", "26"], ["0", "16"], ["2", "10", "(0", "trained)"]]


def is_picture(path):
    pixels = imread(path)
    return pixels.std() > 0.01 and min(pixels.shape[:2]) > 200


@pytest.mark.parametrize("score", ["f1", "loss"])
@pytest.mark.parametrize("values", [[0.5], [0.5, 0.75, 0.6], [math.nan, 0.5, 0.75], [math.nan, math.nan]])
def test_curves_are_drawn_also_of_one_evaluation_and_of_no_numbers(tmp_path, score, values):
    scores = [{"loss": value, "f1": value} for value in values]
    lines = [{"epoch": epoch, "step": epoch, "train": some, "valid": some} for epoch, some in enumerate(scores)]
    pictures.draw_curves(lines, score, 2, tmp_path / "curves.png")
    assert is_picture(tmp_path / "curves.png")


@pytest.mark.parametrize(
    ("kind", "labels", "predictions", "target", "name"),
    [
        ("binary", ["no", "yes"], [0.2, 0.9, 0.5], [0.0, 1.0, 1.0], "confusion.png"),
        ("multiclass", ["a", "b", "c"], [[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], [0, 2], "confusion.png"),
        ("multiclass", [str(number) for number in range(40)], np.eye(40), list(range(40)), "confusion.png"),
        ("regression", [], [1.0, 2.5, 2.0], [1.0, 2.0, 3.0], "residuals.png"),
        ("regression", [], [1.0], [2.0], "residuals.png"),
        ("regression", [], np.linspace(0, 1, 20_000), np.linspace(1, 2, 20_000), "residuals.png"),
    ],
)
def test_predictions_are_drawn_by_the_kind_of_task(tmp_path, kind, labels, predictions, target, name):
    info = types.SimpleNamespace(kind=kind, labels=labels)
    assert pictures.draw_predictions(info, np.array(predictions), np.array(target), tmp_path) == name
    assert is_picture(tmp_path / name)

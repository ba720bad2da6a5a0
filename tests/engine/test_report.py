"""What a run says: journals without a line twice, rates."""

import json
import math

import pytest
from torch import nn

from engine import report

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

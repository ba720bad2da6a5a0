"""Pictures: of every kind of task, also of one row or of no numbers."""

import math
import types

import numpy as np
import pytest
from matplotlib.image import imread

from engine import pictures


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

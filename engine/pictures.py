"""Pictures: curves, predictions beside the truth, and the empty figure that others draw on. matplotlib is imported when the first one is drawn."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

FONTS = ["Noto Sans CJK KR", "Noto Sans CJK JP", "Noto Sans CJK SC", "NanumGothic", "Malgun Gothic", "AppleGothic", "Arial Unicode MS"]
"""for the letters that the usual font lacks"""


def short(name: str, most: int = 40) -> str:
    """A label that leaves room for the picture."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def figure(width: float = 7, height: float = 4, columns: int = 1) -> tuple[Any, Any]:
    """A drawing and its axis, or the array of its axes."""
    import warnings

    from matplotlib import font_manager, rcParams
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rcParams["text.parse_math"] = False  # two "$" in a column's name are no formula
    here = {font.name for font in font_manager.fontManager.ttflist}
    rcParams["font.family"] = ["DejaVu Sans", *(name for name in FONTS if name in here)]
    warnings.filterwarnings("ignore", "Glyph", UserWarning)  # where none of these is installed, boxes stand for its letters
    drawing = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(drawing)  # no display, no global state
    return drawing, drawing.subplots(1, columns)


def draw_curves(lines: Sequence[dict[str, Any]], score: str, best: int, path: Path) -> None:
    """Loss and the score that decides, training beside validation, over epochs; a circle at the evaluation of step `best`."""
    names = ["loss"] if score == "loss" else ["loss", score]
    drawing, axes = figure(6 * len(names), 4, len(names))
    epochs = [line["epoch"] for line in lines]
    for axis, name in zip(np.atleast_1d(axes), names, strict=True):
        for split, style in (("train", "--"), ("valid", "-")):
            axis.plot(epochs, [line[split].get(name) for line in lines], style, marker=".", label=split)
        for line in (line for line in lines if line["step"] == best):
            axis.plot(line["epoch"], line["valid"][name], "o", mfc="none", ms=12, color="C1", label=f"exported {line['valid'][name]:.4g}")
        axis.set(xlabel="epoch", ylabel=name)
        axis.grid(alpha=0.3)
        axis.legend()
    drawing.savefig(path)


def confusion(predictions: np.ndarray, target: np.ndarray, labels: Sequence[str]) -> Any:
    """Rows are true classes, columns predicted ones; shades are shares of a row. `predictions` are class indices [n]."""
    count = len(labels)
    table = np.bincount(target * count + predictions, minlength=count * count).reshape(count, count)
    size = min(12.0, 2.5 + 0.5 * count)
    drawing, axis = figure(size + 1, size)
    image = axis.imshow(table / np.maximum(1, table.sum(1, keepdims=True)), cmap="Blues", vmin=0, vmax=1)
    drawing.colorbar(image, label="share of the true class")
    if count <= 25:
        for row, column in np.ndindex(table.shape):
            dark = table[row, column] > 0.5 * table[row].sum()
            axis.text(column, row, f"{table[row, column]:,}", ha="center", va="center", fontsize=8, color="white" if dark else "black")
        axis.set_xticks(range(count), map(short, labels), rotation=45, ha="right")
        axis.set_yticks(range(count), map(short, labels))
    axis.set(xlabel="predicted", ylabel="true")
    return drawing


def residuals(predictions: np.ndarray, target: np.ndarray) -> Any:
    """Predicted against true values, and how the errors spread; both [n], in the target's own units."""
    drawing, (left, right) = figure(11, 4.5, 2)
    shown = np.linspace(0, len(target) - 1, min(len(target), 5000)).astype(int)
    left.plot(target[shown], predictions[shown], ".", ms=3, alpha=0.4)
    ends = [min(target.min(), predictions.min()), max(target.max(), predictions.max())]
    left.plot(ends, ends, color="black", lw=1)
    left.set(xlabel="true", ylabel="predicted")
    errors = predictions - target
    right.hist(errors, bins=60 if np.ptp(errors) > 1e-9 * np.abs(errors).max() else 1)  # numpy refuses 60 of next to no width
    right.set(xlabel="predicted - true", ylabel="samples")
    left.grid(alpha=0.3)
    right.grid(alpha=0.3)
    return drawing


def draw_predictions(info: Any, predictions: np.ndarray, target: np.ndarray, run: Path) -> str:
    """confusion.png, residuals.png or predictions.png, by the kind of task. `predictions` are probabilities or values. Returns its name."""
    if info.kind == "binary" or (predictions.ndim == 2 and info.labels):
        classes = predictions > 0.5 if predictions.ndim == 1 else predictions.argmax(1)
        name, drawing = "confusion.png", confusion(classes.astype(int), target.astype(int), info.labels)
    elif info.kind == "regression":
        name, drawing = "residuals.png", residuals(predictions, target)
    else:  # a kind that a model brings: how its predictions spread
        name, (drawing, axis) = "predictions.png", figure()
        axis.hist(predictions.ravel(), bins=60)
        axis.set(xlabel="prediction", ylabel="samples")
    drawing.savefig(run / name, bbox_inches="tight")
    return name

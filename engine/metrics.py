"""Scores by name and kind of task. torchmetrics is imported when the first score is wanted: it costs two seconds."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from engine import process
from engine.config import UserError, suggestion


@dataclass(frozen=True)
class Kind:
    """What follows from the kind of a task. A model's file may bring its own: KINDS = {"rating": Kind(...)}."""

    loss: str
    metrics: tuple[str, ...]
    best: str
    predict: Callable[[torch.Tensor, Any], torch.Tensor]
    """(output, info) -> what metrics take: probabilities [n] or [n, classes], or values in the target's own units [n]"""


def value(output: torch.Tensor, info: Any) -> torch.Tensor:
    return output.double() * info.target_std + info.target_mean


KINDS = {
    "binary": Kind("bce", ("accuracy", "f1", "auroc"), "max accuracy", lambda output, info: output.float().sigmoid()),
    "multiclass": Kind(
        "cross_entropy", ("accuracy", "macro_accuracy", "macro_f1"), "max accuracy", lambda output, info: output.float().softmax(dim=-1)
    ),
    "regression": Kind("mse", ("rmse", "mae", "r2"), "min rmse", value),
}


def kind_of(name: str, model_file: Any) -> Kind:
    """Raises UserError for a kind that neither the model's file nor this one knows."""
    kinds = KINDS | getattr(model_file, "KINDS", {})
    if name not in kinds:
        raise UserError(f"task.kind = {name!r}: no such kind{suggestion(name, kinds)}")
    return kinds[name]


NAMED = {
    "binary": ["accuracy", "f1", "precision", "recall", "macro_accuracy", "macro_f1", "auroc", "average_precision"],
    "multiclass": ["accuracy", "macro_accuracy", "macro_f1", "auroc", "average_precision"],
    "regression": ["rmse", "mse", "mae", "r2", "pearson"],
}
CLASSES = {
    "accuracy": "Accuracy", "f1": "F1Score", "precision": "Precision", "recall": "Recall", "auroc": "AUROC", "average_precision": "AveragePrecision",
    "rmse": "MeanSquaredError", "mse": "MeanSquaredError", "mae": "MeanAbsoluteError", "r2": "R2Score", "pearson": "PearsonCorrCoef",
}  # fmt: skip
"""of torchmetrics, by a score's name without "macro_", which is the mean over classes"""


def best_rule(task: Any, info: Any, model_file: Any) -> tuple[str, str]:
    """("max" or "min", name of the score that decides)."""
    rule = kind_of(info.kind, model_file).best if task.best == "auto" else task.best
    return tuple(rule.split())


def names(task: Any, info: Any, model_file: Any) -> list[str]:
    """The scores of these settings, the one that task.best names among them. Raises UserError for an unknown name."""
    wanted = list(task.metrics or kind_of(info.kind, model_file).metrics)
    score = best_rule(task, info, model_file)[1]
    if score not in ("loss", *wanted):
        wanted.append(score)
    known = NAMED.get(info.kind, [])
    for name in wanted:
        if name not in known and not callable(getattr(model_file, name, None)):
            key = "task.best" if name == score and name not in task.metrics else "task.metrics"
            raise UserError(f"{key} = {name!r}: no metric of a {info.kind} task{suggestion(name, known)}")
    return wanted


def build(task: Any, info: Any, model_file: Any) -> dict[str, Any]:
    """Metrics by name, from the model's file (`name(info) -> torchmetrics.Metric`) or torchmetrics."""
    import torchmetrics

    built = {}
    for name in names(task, info, model_file):
        if callable(own := getattr(model_file, name, None)):
            metric = own(info)
        elif info.kind == "regression":
            metric = getattr(torchmetrics, CLASSES[name])(**({"squared": False} if name == "rmse" else {}))
        else:
            task_name, average = "multiclass" if name.startswith("macro_") else info.kind, "micro" if name == "accuracy" else "macro"
            make = getattr(torchmetrics, CLASSES[name.removeprefix("macro_")])
            metric = make(task=task_name, num_classes=max(2, len(info.labels)), average=average)
        # In double precision: a float's sum over a million samples is off in the fourth digit.
        built[name] = metric.set_dtype(torch.float64)
        built[name].dist_sync_fn = gathered
    return built


def gathered(state: torch.Tensor, group: Any = None) -> list[torch.Tensor]:
    """Every rank's state of a metric. A rank without a row has an empty one of another type, which ends torchmetrics' own way."""
    states = [other.to(state.device) for other in process.gather(state.cpu())]
    return [other for other in states if other.numel()] or [state]


def result(metric: Any) -> float:
    try:
        return float(metric.compute())
    except ValueError:  # too few rows, such as R2 of a single one
        return math.nan


def better(direction: str, score: float, best: float | None, min_delta: float = 0.0) -> bool:
    """Whether a score improves on the best one so far by more than min_delta."""
    if best is None:
        return True
    return score > best + min_delta if direction == "max" else score < best - min_delta


def update(metrics: dict[str, Any], predictions: torch.Tensor, target: torch.Tensor) -> None:
    for metric in metrics.values():
        # A macro average over two classes wants both columns.
        both = predictions.dim() == 1 and getattr(metric, "num_classes", None) == 2
        metric.update(torch.stack([1 - predictions, predictions], 1) if both else predictions, target)

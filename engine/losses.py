"""Losses by name. Each gives one value a sample: `loss(output, batch, progress, **options) -> [n]`.

The loop multiplies by batch["factor"] and sums, so the result does not depend on how a batch was cut over processes. A loss
that couples samples returns a scalar instead and is averaged over micro-batches, which then does depend on it.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from engine.config import UserError, suggestion
from engine.metrics import kind_of

Loss = Callable[..., torch.Tensor]


def cross_entropy(output: torch.Tensor, batch: dict, progress: Any, *, label_smoothing: float = 0.0) -> torch.Tensor:
    """Logits [n, classes] against batch["target"] [n] of class indices."""
    return F.cross_entropy(output.float(), batch["target"], reduction="none", label_smoothing=label_smoothing)


def bce(output: torch.Tensor, batch: dict, progress: Any, *, label_smoothing: float = 0.0) -> torch.Tensor:
    """Binary cross-entropy of logits [n] against batch["target"] [n] in {0., 1.}."""
    target = batch["target"]
    if label_smoothing:
        target = target * (1 - label_smoothing) + 0.5 * label_smoothing
    return F.binary_cross_entropy_with_logits(output.float(), target, reduction="none")


def mse(output: torch.Tensor, batch: dict, progress: Any) -> torch.Tensor:
    return F.mse_loss(output.float(), batch["target"], reduction="none")


def huber(output: torch.Tensor, batch: dict, progress: Any, *, delta: float = 1.0) -> torch.Tensor:
    """Quadratic up to `delta` standard deviations of the target, linear beyond."""
    return F.huber_loss(output.float(), batch["target"], reduction="none", delta=delta)


def l1(output: torch.Tensor, batch: dict, progress: Any) -> torch.Tensor:
    return F.l1_loss(output.float(), batch["target"], reduction="none")


NAMES = ["cross_entropy", "bce", "mse", "huber", "l1"]


def build(task: Any, info: Any, model_file: Any) -> Loss:
    """The loss of task.loss in the model's file, else here, with its options. Raises UserError."""
    name = kind_of(info.kind, model_file).loss if task.loss == "auto" else task.loss
    options = task.loss_options
    own = getattr(model_file, name, None)  # a module that the file imports is no loss
    if not callable(own) and name not in NAMES:
        raise UserError(f"task.loss = {name!r}: no such loss in {model_file.__name__} or engine/losses.py{suggestion(name, NAMES)}")
    function = own if callable(own) else globals()[name]
    known = [key for key, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY]
    for key in options:
        if key not in known:
            raise UserError(f"task.loss_options.{key}: {name} has no such option{suggestion(key, known)}")
    return functools.partial(function, **options)


def weighted(values: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The number to differentiate: a sum with the samples' factors, or a coupled loss as it is."""
    return values if values.dim() == 0 else torch.dot(values, factor)

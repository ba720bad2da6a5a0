"""Every sample once, on any number of processes, with plain PyTorch: what train.py and infer.py score with."""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from engine import losses, metrics, process

Batch = dict[str, Any]


def to_device(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    return {key: value.to(device, non_blocking=True) if torch.is_tensor(value) else value for key, value in batch.items()}


@torch.no_grad()
def outputs(
    model: nn.Module, dataset: Any, batch_size: int, device: torch.device, indices: torch.Tensor | None = None
) -> Iterator[tuple[int, torch.Tensor, Batch]]:
    """(place of the first row, output, batch) of this rank's share of the rows, in order.

    All ranks run the model equally often, since a forward under ZeRO-3 is a collective call: a rank that has no row left
    repeats one and drops the result.
    """
    indices = torch.arange(len(dataset)) if indices is None else indices
    stride = batch_size * process.world_size()
    was_training = model.training
    model.eval()
    for first in range(0, len(indices), stride):
        first += process.rank() * batch_size
        rows = indices[first : first + batch_size]
        batch = to_device(dataset.__getitems__(rows if len(rows) else indices[:1]), device)
        output = model(batch)
        if len(rows):
            batch["index"] = rows
            yield first, output, batch
    model.train(was_training)


class Scorer:
    """Loss and metrics of rows that come batch by batch, summed over processes at the end."""

    def __init__(self, task: Any, info: Any, model_file: Any, device: torch.device):
        self.info = info
        self.device = device
        self.kind = metrics.kind_of(info.kind, model_file)
        self.loss = losses.build(task, info, model_file)
        self.metrics = {name: metric.to(device) for name, metric in metrics.build(task, info, model_file).items()}
        self.reset()

    def reset(self) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for metric in self.metrics.values():
            metric.reset()

    def add(self, output: torch.Tensor, batch: Batch, weights: torch.Tensor | None, progress: Any = None) -> None:
        values = self.loss(output, batch, progress)
        weights = torch.ones(len(output)) if weights is None else weights
        weights = weights.to(self.device, torch.float64)
        values = values.double() if values.dim() else values.double().expand(len(output))
        self.sums += torch.stack([(values * weights).sum(), weights.sum()])
        target = batch["target"]
        target = metrics.value(target, self.info) if self.info.kind == "regression" else target.long()
        metrics.update(self.metrics, self.kind.predict(output, self.info), target)

    def compute(self) -> dict[str, float]:
        """Scores by name, the same on every rank."""
        if process.world_size() > 1:
            dist.all_reduce(self.sums)
        total, weight = self.sums.tolist()
        scores = {"loss": total / weight if weight else math.nan}
        for name, metric in self.metrics.items():
            # Of outputs that are no numbers torchmetrics would take the first class, or logits for probabilities.
            scores[name] = math.nan if math.isnan(total) else metrics.result(metric)
        self.reset()
        return scores


def evaluate(
    model: nn.Module, dataset: Any, scorer: Scorer, batch_size: int, indices: torch.Tensor | None = None, progress: Any = None
) -> dict[str, float]:
    """Scores of a data set, or of the rows with these indices."""
    weights_of = getattr(dataset, "weights", None)
    if (lengths := getattr(dataset, "lengths", None)) is not None:  # the order is free here, and padding costs
        indices = torch.arange(len(dataset)) if indices is None else indices
        indices = indices[lengths[indices].argsort(stable=True)]
    for _, output, batch in outputs(model, dataset, batch_size, scorer.device, indices):
        scorer.add(output, batch, weights_of(batch["index"]) if weights_of else None, progress)
    return scorer.compute()

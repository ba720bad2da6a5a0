"""Which samples come when, as a pure function of (seed, step): resuming costs no replay, and any number of processes
takes the same global batches.

Step s belongs to epoch s // steps_per_epoch; an epoch is a permutation seeded by (seed, epoch), cut into global batches; a
global batch is cut into micro-batches, rank by rank. The last batch of an epoch is filled with samples of weight zero.
"""

import hashlib
import math
import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from engine import process
from engine.settings import Plan

Slice = tuple[torch.Tensor, torch.Tensor]
WINDOW = 50  # batches among which samples of similar length meet: the larger, the less padding and the less chance


def seed_of(*parts: int | str) -> int:
    """A seed of 63 bits for (seed, step, micro-step, rank). A hash, since sums of them meet again."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_everything(*parts: int | str) -> None:
    """Seed torch's generators at ~5 us; `torch.manual_seed` costs ~300."""
    seed = seed_of(*parts)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed)


@dataclass(frozen=True)
class Order:
    """The order of one data set under one plan. `samples` may be less than the data set's length (train.overfit)."""

    dataset: Any
    samples: int
    batch_size: int
    plan: Plan
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.samples / self.batch_size)

    def permutation(self, epoch: int) -> torch.Tensor:
        """Indices of an epoch, [samples]: at random, or where the data set has `lengths`, int [len], in batches of similar length."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, "epoch", epoch))
        lengths = getattr(self.dataset, "lengths", None)
        permutation = torch.randperm(self.samples, generator=generator)
        return permutation if lengths is None else by_length(permutation, lengths, self.batch_size, generator)

    def batches(self, rank: int, first_step: int, last_step: int) -> Iterator[Slice]:
        """(positions [micro], loss factors [micro]) of every micro-step from first_step up to last_step.

        A factor is the sample's weight x (processes x accumulation) / (the weights of the whole global batch): the sum of
        factor x loss, averaged over ranks and micro-steps as DDP and DeepSpeed do, is the weighted mean of the global batch
        however it was cut.
        """
        epoch = -1
        full = torch.full((self.plan.micro,), 1.0 / self.plan.micro)
        weights_of = getattr(self.dataset, "weights", None)
        for step in range(first_step, last_step):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                offset = epoch * len(self.dataset)
                positions = self.permutation(epoch) + offset
            start = step % self.steps_per_epoch * self.batch_size
            batch = positions[start : start + self.batch_size]
            factors = None
            if weights_of is not None or len(batch) < self.batch_size:
                batch, factors = self.weighted(batch, weights_of, offset)
            for micro_step in range(self.plan.accumulation):
                # Ranks stand side by side within a micro-step, so that a filled batch's empty tail is shared among them.
                begin = (micro_step * self.plan.processes + rank) * self.plan.micro
                cut = slice(begin, begin + self.plan.micro)
                yield batch[cut], full if factors is None else factors[cut]

    def weighted(self, batch: torch.Tensor, weights_of: Any, offset: int) -> Slice:
        """The batch filled up to its full size, and its loss factors."""
        weights = weights_of(batch - offset) if weights_of else torch.ones(len(batch))
        missing = self.batch_size - len(batch)
        filled = torch.cat([batch, batch[:1].expand(missing)])
        total = float(weights.sum(dtype=torch.float64))
        scale = self.plan.processes * self.plan.accumulation / total if total else 0.0
        return filled, torch.cat([weights.float() * scale, torch.zeros(missing)])


def by_length(permutation: torch.Tensor, lengths: torch.Tensor, batch_size: int, generator: torch.Generator) -> torch.Tensor:
    """The permutation with each WINDOW batches of it sorted by length, then the batches shuffled. A short last batch stays the last."""
    windows = [window[lengths[window].argsort(stable=True)] for window in permutation.split(WINDOW * batch_size)]
    batches = torch.cat(windows).split(batch_size)
    whole = len(permutation) // batch_size
    return torch.cat([*(batches[place] for place in torch.randperm(whole, generator=generator).tolist()), *batches[whole:]])


class BatchSampler:
    """What a DataLoader takes: each item goes whole to `Factored.__getitems__`."""

    def __init__(self, order: Order, rank: int, first_step: int, last_step: int):
        self.arguments = (rank, first_step, last_step)
        self.order = order

    def __iter__(self) -> Iterator[Slice]:
        return self.order.batches(*self.arguments)


class Factored(Dataset):
    """A data set whose batches carry their loss factors, as batch["factor"]."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __getitems__(self, item: Slice) -> dict[str, torch.Tensor]:
        positions, factors = item
        batch = self.dataset.__getitems__(positions)
        batch["factor"] = factors
        return batch


def same(batch: Any) -> Any:
    return batch


def end_with_rank(_: int) -> None:
    """A reading process would outlive a killed rank for seconds, and with it the lock of the run folder.

    A signal to stop is the rank's to hear, which goes on to the end of its step: launchers send it to a rank's whole process group, and
    SLURM to every process. So a reader leaves the group, and lets pass the first one; the second is the rank's own, which ends its readers.
    """
    process.die_with_parent()
    os.setpgrp()
    for number in process.StopRequest.signals:
        signal.signal(number, lambda number, _: signal.signal(number, signal.SIG_DFL))


def loader(order: Order, rank: int, first_step: int, last_step: int, workers: int) -> Iterable[dict[str, torch.Tensor]]:
    """Batches of this rank, read in the loop itself or ahead by workers.

    The loader's own generator keeps it from drawing a seed of the global one. Without workers it would only cost 25 us a step.
    """
    dataset, sampler = Factored(order.dataset), BatchSampler(order, rank, first_step, last_step)
    if workers == 0:
        return map(dataset.__getitems__, sampler)
    how = {"num_workers": workers, "pin_memory": torch.cuda.is_available(), "generator": torch.Generator()}
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=same, worker_init_fn=end_with_rank, **how)

"""Rows of the training, validation and test parts: split by fraction, whole groups together, classes made equal."""

import numpy as np

from engine.config import UserError


def split_rows(
    classes: np.ndarray, groups: np.ndarray | None, fractions: dict[str, float], labels: list[str], seed: int
) -> dict[str, np.ndarray]:
    """Rows of "train" and of each named fraction, in ascending order.

    Every class (int64 [n]) gives the same share of its rows; where there are groups (int [n]) they stay whole instead.
    Raises UserError where a part would have no row, or a class has fewer rows than there are parts.
    """
    generator = np.random.default_rng(seed)
    shares = list(fractions.values())
    needed = len(shares) + 1
    if groups is not None:
        _, groups = np.unique(groups, return_inverse=True)
        parts = deal(np.bincount(groups), shares, generator)[groups]
    else:
        parts = np.zeros(len(classes), np.int8)
        for number, count in enumerate(np.bincount(classes)):
            if not count:
                continue
            if count < needed:
                rows = f"class {labels[number]!r} has only {count}" if labels else f"there are only {count}"
                raise UserError(f"data.train: {rows} row(s) to split into {needed} parts; remove the class or add rows to it")
            parts[classes == number] = deal(np.ones(count, np.int64), shares, generator)
    rows = {part: np.flatnonzero(parts == number) for number, part in enumerate(["train", *fractions])}
    for part, positions in rows.items():
        if not len(positions):
            what = "group" if groups is not None else "row"
            remedy = "change the fractions or data.split_seed, or give a file for each part"
            raise UserError(f"data.train: no {what} is left for {part}; {remedy}")
    return rows


def deal(sizes: np.ndarray, shares: list[float], generator: np.random.Generator) -> np.ndarray:
    """Part of each unit, 0 for training: shuffled end to end, a unit goes to the share in which its middle lies."""
    order = generator.permutation(len(sizes))
    middles = (np.cumsum(sizes[order]) - sizes[order] / 2) / sizes.sum()
    part = np.searchsorted(np.cumsum(shares), middles)
    parts = np.empty(len(sizes), np.int8)
    parts[order] = np.where(part == len(shares), 0, part + 1)
    return parts


def undersample(train: np.ndarray, target: np.ndarray, seed: int) -> np.ndarray:
    """As many training rows of every class as the smallest has, in ascending order."""
    generator = np.random.default_rng(seed)
    classes = target[train]
    smallest = np.bincount(classes).min()
    return np.sort(np.concatenate([generator.permutation(train[classes == c])[:smallest] for c in np.unique(classes)]))

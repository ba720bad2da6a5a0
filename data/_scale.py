"""Scales of numeric columns: learned from the training rows, kept as JSON, applied in place."""

from collections.abc import Iterator

import numpy as np
import torch

BLOCK = 65536
"""rows handled at a time, so that float64 copies stay small"""
MARGIN = 1e-7
"""scikit-learn's BOUNDS_THRESHOLD: how near to a bound counts as on it"""


def learn(numeric: np.ndarray, train: np.ndarray, transform: str, seed: int) -> dict[str, list]:
    """The scales of float32 [n, k] by its training rows: means and deviations, quantiles, or nothing for "none"."""
    if transform == "standard":
        return moments(numeric, train)
    if transform == "quantile":
        generator = np.random.default_rng(seed)
        return {"quantiles": [learn_quantiles(column(numeric, train, j), len(train), generator) for j in range(numeric.shape[1])]}
    return {}


def apply(numeric: np.ndarray, missing: list[int], scales: dict[str, list]) -> np.ndarray:
    """Scale float32 [n, k] in place; NaN becomes 0. Returns it with an indicator column for each of `missing`.

    The indicators cost a copy of the array; without them none is made.
    """
    indicators = np.isnan(numeric[:, missing])
    for block in blocks(numeric):
        if "mean" in scales:
            block[:] = (block - np.array(scales["mean"])) / np.array(scales["std"])
        for position, quantiles in enumerate(scales.get("quantiles", [])):
            block[:, position] = to_normal(block[:, position].astype(np.float64), np.array(quantiles))
        np.copyto(block, 0, where=np.isnan(block))
    return np.concatenate([numeric, indicators], axis=1, dtype=np.float32) if missing else numeric


def blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    return (array[start : start + BLOCK] for start in range(0, len(array), BLOCK))


def column(numeric: np.ndarray, train: np.ndarray, position: int) -> np.ndarray:
    values = numeric[train, position].astype(np.float64)
    return values[~np.isnan(values)]


def moments(numeric: np.ndarray, train: np.ndarray) -> dict[str, list]:
    """Mean and deviation (1 where there is none) of each column, in two passes: exact for columns far from zero."""
    count, total, squares = (np.zeros(numeric.shape[1]) for _ in range(3))
    for rows in blocks(train):
        block = numeric[rows].astype(np.float64)
        count += (~np.isnan(block)).sum(0)
        total += np.nansum(block, axis=0)
    for rows in blocks(train):
        squares += np.nansum((numeric[rows] - total / count) ** 2, axis=0)
    std = np.sqrt(squares / count)
    return {"mean": (total / count).tolist(), "std": np.where(std > 0, std, 1.0).tolist()}


def learn_quantiles(values: np.ndarray, rows: int, generator: np.random.Generator) -> list[float]:
    """As in the TabM papers (Gorishniy et al., 2024): a little noise spreads repeated values over the quantiles."""
    count = min(max(min(rows // 30, 1000), 10), rows)
    noisy = values + generator.normal(0, 1e-5 * values.std(), len(values))
    return np.percentile(noisy, np.linspace(0, 100, count)).tolist()


def to_normal(values: np.ndarray, quantiles: np.ndarray) -> np.ndarray:
    """float64 [n] by quantiles to a normal distribution, as scikit-learn's QuantileTransformer; NaN stays NaN."""
    references = np.linspace(0, 1, len(quantiles))
    # Upwards and downwards, since np.interp takes one end of repeated quantiles: the mean is their middle.
    upwards = np.interp(values, quantiles, references)
    downwards = -np.interp(-values, -quantiles[::-1], -references[::-1])
    shares = (upwards + downwards) / 2
    shares[values + MARGIN > quantiles[-1]] = 1
    shares[values - MARGIN < quantiles[0]] = 0
    margin = MARGIN - np.spacing(1)
    low, high = torch.special.ndtri(torch.tensor([margin, 1 - margin], dtype=torch.float64)).tolist()
    return torch.special.ndtri(torch.from_numpy(shares)).clamp(low, high).numpy()


def bin_edges(numeric: np.ndarray, train: np.ndarray) -> list[list[float]]:
    """257 quantiles of each scaled column: what piecewise-linear embeddings cut their bins from."""
    return [np.quantile(numeric[train, j], np.linspace(0, 1, 257)).tolist() for j in range(numeric.shape[1])]

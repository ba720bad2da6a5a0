"""Scales of numeric columns: learned from the training rows, kept as JSON, applied in place."""

import numpy as np
import torch

MARGIN = 1e-7  # scikit-learn's BOUNDS_THRESHOLD: how near to a bound counts as on it; here a share of ranges below 1, or they would vanish


def learn(numeric: np.ndarray, train: np.ndarray, transform: str, seed: int) -> dict[str, list]:
    """The scales of float32 [n, k] by its training rows: means and deviations, quantiles, or nothing for "none"."""
    generator = np.random.default_rng(seed)
    columns = (numeric[train, position].astype(np.float64) for position in range(numeric.shape[1]))
    known = (column[~np.isnan(column)] for column in columns)
    if transform == "standard":
        moments = [(float(values.mean()), float(values.std()) or 1.0) for values in known]
        return {"mean": [mean for mean, _ in moments], "std": [std for _, std in moments]}
    return {"quantiles": [learn_quantiles(values, len(train), generator) for values in known]} if transform == "quantile" else {}


def apply(numeric: np.ndarray, missing: list[int], scales: dict[str, list]) -> np.ndarray:
    """Scale float32 [n, k] in place; NaN becomes 0. Returns it, or a copy with an indicator column for each of `missing`."""
    indicators = np.isnan(numeric[:, missing])
    for block in np.split(numeric, range(65536, len(numeric), 65536)):  # so that float64 copies stay small
        if "mean" in scales:
            block[:] = (block - np.array(scales["mean"])) / np.array(scales["std"])
        for position, quantiles in enumerate(scales.get("quantiles", [])):
            block[:, position] = to_normal(block[:, position].astype(np.float64), np.array(quantiles))
        block[np.isnan(block)] = 0
    return np.concatenate([numeric, indicators], axis=1, dtype=np.float32) if missing else numeric


def learn_quantiles(values: np.ndarray, rows: int, generator: np.random.Generator) -> list[float]:
    """As in the TabM papers (Gorishniy et al., 2024): a little noise spreads repeated values over the quantiles."""
    count = min(max(min(rows // 30, 1000), 10), rows)
    noisy = values + generator.normal(0, 1e-5 * values.std(), len(values))
    return np.percentile(noisy, np.linspace(0, 100, count)).tolist()


def to_normal(values: np.ndarray, quantiles: np.ndarray) -> np.ndarray:
    """float64 [n] by quantiles to a normal distribution, as scikit-learn's QuantileTransformer; NaN stays NaN."""
    references = np.linspace(0, 1, len(quantiles))
    # Upwards and downwards, since np.interp takes one end of repeated quantiles: the mean is their middle.
    shares = (np.interp(values, quantiles, references) - np.interp(-values, -quantiles[::-1], -references[::-1])) / 2
    near = MARGIN * min(1, quantiles[-1] - quantiles[0])
    shares[values + near > quantiles[-1]] = 1
    shares[values - near < quantiles[0]] = 0
    margin = MARGIN - np.spacing(1)
    low, high = torch.special.ndtri(torch.tensor([margin, 1 - margin], dtype=torch.float64)).tolist()
    return torch.special.ndtri(torch.from_numpy(shares)).clamp(low, high).numpy()


def bin_edges(numeric: np.ndarray, train: np.ndarray) -> list[list[float]]:
    """257 quantiles of each scaled column: what piecewise-linear embeddings cut their bins from."""
    return [np.quantile(numeric[train, position], np.linspace(0, 1, 257)).tolist() for position in range(numeric.shape[1])]

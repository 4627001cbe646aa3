"""Intervals: how far a score may be off because the questions are a sample."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist

import numpy as np


def bootstrap_interval(
    values: Sequence[float],
    groups: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values`, fixed by the seed.

    With `groups` (one per value, e.g. the image of each question) whole groups are resampled: questions about one image
    stand or fall together, and treating them as independent makes the interval too narrow (evaluation §5).
    """
    values = np.asarray(values, np.float64)
    if values.size == 0:
        raise ValueError("An interval needs at least one value.")
    keys = np.arange(values.size) if groups is None else np.unique(list(map(str, groups)), return_inverse=True)[1]
    sums = np.bincount(keys, weights=values)  # [G]
    counts = np.bincount(keys).astype(np.float64)  # [G]
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for i in range(resamples):  # one resample at a time: the full split's [resamples, G] would be 100 MB and more
        drawn = np.bincount(rng.integers(0, sums.size, sums.size), minlength=sums.size)
        means[i] = drawn @ sums / (drawn @ counts)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def paired_interval(
    first: Sequence[float], second: Sequence[float], groups: Sequence[Hashable] | None = None, **options
) -> tuple[float, float]:
    """Bootstrap interval of mean(first) - mean(second) on the same questions, e.g. sighted minus blind.

    Pairing removes what both share (hard questions are hard for both); comparing two separate intervals does not.
    """
    difference = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    return bootstrap_interval(difference, groups, **options)


def wilson_interval(successes: float, count: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion: for independent questions, without resampling (Wilson 1927)."""
    if count <= 0:
        raise ValueError("An interval needs at least one value.")
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share = successes / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, centre - half), min(1.0, centre + half)

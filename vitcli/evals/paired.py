"""Two classifiers on the same images: how far apart they are, and whether that is chance."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Paired:
    """What the second gets right more often than the first.

    Attributes:
        images: on which both were measured.
        difference: of the accuracies, second minus first.
        low, high: 95 % interval of the difference, by resampling images.
        only_first, only_second: images that one alone has right.
        p_value: of McNemar's exact test, that both are equally good.
    """

    images: int
    difference: float
    low: float
    high: float
    only_first: int
    only_second: int
    p_value: float


def compare_paired(first: ArrayLike, second: ArrayLike, seed: int = 0) -> Paired:
    """Bootstrap and McNemar's test of two classifiers on the same images.

    Resampling pairs of outcomes needs only how many images one alone has right, so a resample is
    one draw from a multinomial, however many images there are.

    Args:
        first, second: (n,) booleans, whether image i is right.
        seed: of the resampling.

    Raises:
        ValueError: of different lengths, or empty.
    """
    from scipy.stats import binomtest

    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"outcomes of {a.shape} and {b.shape} images cannot be paired")
    n = len(a)
    worse, better = int((a & ~b).sum()), int((~a & b).sum())
    shares = [better / n, worse / n, (n - better - worse) / n]
    draws = np.random.default_rng(seed).multinomial(n, shares, size=RESAMPLES)
    differences = (draws[:, 0] - draws[:, 1]) / n
    tails = (1 - LEVEL) / 2
    low, high = np.quantile(differences, [tails, 1 - tails])
    apart = worse + better
    p_value = float(binomtest(better, apart).pvalue) if apart else 1.0
    return Paired(n, (better - worse) / n, float(low), float(high), worse, better, p_value)

"""Metrics of predicted numbers, with 95 % confidence intervals over images drawn at random."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitcli.evals.intervals import LEVEL, NUM_DRAWS, Interval, Intervals

Numbers = NDArray[np.float64]

MIN_IMAGES = 10  # with fewer images a bootstrap interval is far too narrow


@dataclass(frozen=True)
class RegressionMetrics:
    """Errors in the unit of the numbers, as scikit-learn computes them.

    Attributes:
        mae: mean absolute error.
        rmse: root of the mean squared error.
        r2: coefficient of determination, 1 at best; None if all numbers are equal.
    """

    images: int
    mae: float
    rmse: float
    r2: float | None

    def to_json(self) -> dict[str, Any]:
        """Values by their JSON keys."""
        return asdict(self)


@dataclass(frozen=True)
class PredictedNumbers:
    """(n,) true and (n,) predicted numbers, called `name`."""

    name: str
    targets: Numbers
    predicted: Numbers

    @property
    def errors(self) -> Numbers:
        """(n,) absolute errors."""
        return np.abs(self.predicted - self.targets)


def regression_metrics(targets: Numbers, predicted: Numbers) -> RegressionMetrics:
    """(n,) true and (n,) predicted numbers -> metrics."""
    mae, rmse, r2 = _figures(_sums(targets, predicted).mean(axis=0))
    return RegressionMetrics(
        len(targets), float(mae), float(rmse), float(r2) if np.isfinite(r2) else None
    )


def regression_intervals(targets: Numbers, predicted: Numbers, seed: int = 0) -> Intervals:
    """Bootstrap intervals of the metrics: BCa, which corrects bias and skewness (Efron, 1987)."""
    n = len(targets)
    if n < MIN_IMAGES:
        reason = f"{n} images, and an interval needs {MIN_IMAGES}"
        return Intervals(dict.fromkeys(NAMES), dict.fromkeys(NAMES, reason))
    sums, rng = _sums(targets, predicted), np.random.default_rng(seed)
    # How often each image is drawn, times its sums: far faster than a copy of the drawn rows.
    counts = (np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(NUM_DRAWS))
    drawn = np.stack([count @ sums / n for count in counts])
    whole, draws = _figures(sums.mean(axis=0)), _figures(drawn)
    without = _figures((sums.sum(axis=0) - sums) / (n - 1))
    of = {name: _bca(*parts) for name, *parts in zip(NAMES, whole, draws, without, strict=True)}
    reasons = {} if of["r2"] else {"r2": "all numbers are equal"}
    return Intervals(of, reasons, dict.fromkeys(NAMES, "bca"), NUM_DRAWS, seed)


def mae_difference_interval(first: Numbers, second: Numbers) -> Interval:
    """95 % interval of the mean of (n,) second - first absolute errors, by Student's t."""
    from scipy.stats import t

    change = second - first
    n, mean = len(change), float(change.mean())
    if n < 2:
        return -math.inf, math.inf
    half = float(t.ppf((1 + LEVEL) / 2, n - 1) * change.std(ddof=1) / math.sqrt(n))
    return mean - half, mean + half


NAMES = ("mae", "rmse", "r2")


def _sums(targets: Numbers, predicted: Numbers) -> Numbers:
    """(n, 4): of each image what the metrics are functions of the means of."""
    errors = predicted - targets
    centred = targets - targets.mean()  # so that large numbers lose no digits
    return np.stack([np.abs(errors), errors**2, centred, centred**2], axis=1)


def _figures(means: Numbers) -> tuple[Any, Any, Any]:
    """(…, 4) means of `_sums` -> MAE, RMSE and R2, each (…); R2 is NaN without variance."""
    absolute, squared, centred, square = np.moveaxis(means, -1, 0)
    variance = square - centred**2
    defined = variance > 1e-14 * square
    ratio = np.divide(squared, variance, out=np.full_like(squared, np.nan), where=defined)
    return absolute, np.sqrt(squared), 1 - ratio


def _bca(whole: Any, draws: Numbers, without: Numbers) -> Interval | None:
    """Bias-corrected and accelerated interval of one figure; None if it is not defined.

    Args:
        draws: the figure on each resample.
        without: the figure without each image.
    """
    from scipy.stats import norm, t

    n = len(without)
    draws, without = draws[np.isfinite(draws)], without[np.isfinite(without)]
    if not np.isfinite(whole) or not len(draws) or not len(without):
        return None
    below = (np.mean(draws < whole) + np.mean(draws <= whole)) / 2
    if not 0 < below < 1 or draws.min() == draws.max():
        return float(draws.min()), float(draws.max())
    bias, lean = norm.ppf(below), without.mean() - without
    spread = (lean**2).sum() ** 1.5
    acceleration = (lean**3).sum() / (6 * spread) if spread > 0 else 0.0
    # Wider for few images, whose resamples vary too little (Hesterberg, 2015, section 3.2).
    usual = math.sqrt(n / (n - 1)) * t.ppf([(1 - LEVEL) / 2, (1 + LEVEL) / 2], n - 1)
    z = bias + usual
    low, high = np.quantile(draws, norm.cdf(bias + z / (1 - acceleration * z)))
    return float(low), float(high)

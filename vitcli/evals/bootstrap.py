"""Confidence intervals by resampling images (percentile bootstrap; Efron, 1979)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitcli.evals.scoring import ECE_BINS, ImageScores, confidence_bins
from vitcli.progress import Quiet, Watcher

Floats = NDArray[np.floating[Any]]
Interval = tuple[float, float]

NUM_RESAMPLES = 2000
LEVEL = 0.95
BLOCK_COUNTS = 2**21  # image counts of the resamples that are in memory at a time
# Average precision sorts images by score, so its cost grows with images x classes x resamples.
MAX_RANKED = 3 * 10**8
MIN_RESAMPLES = 200


@dataclass(frozen=True)
class Intervals:
    """95 % percentile intervals.

    Attributes:
        of: name of a metric -> (low, high).
    """

    resamples: int
    seed: int
    of: Mapping[str, Interval]
    level: float = LEVEL

    def to_json(self) -> dict[str, Any]:
        """Plain values; each metric is a key."""
        drawn = {"level": self.level, "resamples": self.resamples, "seed": self.seed}
        return {**drawn, **{name: list(pair) for name, pair in self.of.items()}}


def resample_counts(n: int, num_resamples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Blocks (b, n): how often each of n images is drawn, for `num_resamples` resamples in all."""
    rng = np.random.default_rng(seed)
    per_block = max(1, BLOCK_COUNTS // n)
    for start in range(0, num_resamples, per_block):
        drawn = [rng.integers(0, n, n) for _ in range(min(per_block, num_resamples - start))]
        yield np.stack([np.bincount(d, minlength=n).astype(np.float64) for d in drawn])


def percentile_interval(values: Floats) -> Interval:
    """(R,) -> the interval that holds the central 95 % of the finite values."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return float("nan"), float("nan")
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(finite, [tail, 1 - tail])
    return float(low), float(high)


def single_label_intervals(
    scores: ImageScores,
    means: Mapping[str, NDArray[Any]],
    *,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
    watch: Watcher | None = None,
) -> Intervals:
    """Intervals of top-1, top-5, the calibration error and further means over images.

    Args:
        means: name -> (n,) value of each image; NaN for an image that the mean leaves out.
    """
    n = len(scores)
    means = {"top1": scores.correct, "top5": scores.top5_correct, **means}
    values = np.stack([np.asarray(v, dtype=np.float64) for v in means.values()], axis=1)
    finite = np.isfinite(values)
    gaps = np.zeros((n, ECE_BINS))
    gaps[np.arange(n), confidence_bins(scores.confidence)] = scores.correct - scores.confidence
    # Every metric here is made of sums over images. A resample is a row of counts, so all
    # resamples together are one matrix product, and no image is copied.
    summands = np.concatenate([np.where(finite, values, 0.0), finite, gaps], axis=1)
    blocks = []
    with (watch or Quiet()).progress("resamples", num_resamples) as bar:
        for counts in resample_counts(n, num_resamples, seed):
            blocks.append(counts @ summands)
            bar.advance(len(counts))
    sums = np.concatenate(blocks)  # (R, 2 * means + bins)
    number = len(means)
    with np.errstate(invalid="ignore"):  # a resample may miss every image that a mean counts
        ratios = sums[:, :number] / sums[:, number : 2 * number]
    of = {name: percentile_interval(ratios[:, i]) for i, name in enumerate(means)}
    # The calibration error is an absolute value: sampling noise makes it larger, in the data and
    # once more in each resample. Shift the resamples by that second bias, or the interval of a
    # well calibrated model lies above its own estimate.
    errors = np.abs(sums[:, 2 * number :]).sum(axis=1) / n
    estimate = np.abs(gaps.sum(axis=0)).sum() / n
    of["ece"] = percentile_interval(np.clip(errors - errors.mean() + estimate, 0.0, 1.0))
    return Intervals(num_resamples, seed, of)


class RankedScores:
    """Average precision under any weights of the images; the scores are sorted only once.

    Args:
        scores, targets: (n, K) scores, and targets of 0 and 1.
    """

    def __init__(self, scores: Floats, targets: NDArray[Any]) -> None:
        present = np.flatnonzero(targets.sum(axis=0))
        s, y = scores[:, present], targets[:, present].astype(np.float64)
        self.order = np.argsort(-s, axis=0, kind="stable")  # (n, P)
        self.hits = np.take_along_axis(y, self.order, axis=0)
        ranked = np.take_along_axis(s, self.order, axis=0)
        # Equal scores share one threshold (as in scikit-learn): each of them takes the precision
        # at the last of them.
        last = np.ones(ranked.shape, dtype=bool)
        last[:-1] = ranked[:-1] != ranked[1:]
        rows = np.where(last, np.arange(len(ranked))[:, None], len(ranked))
        self.ends = np.minimum.accumulate(rows[::-1], axis=0)[::-1]

    def mean_average_precision(self, counts: Floats) -> float:
        """(n,) weight of each image -> mean over the classes that have a weighted image."""
        w = counts[self.order]  # (n, P)
        found = np.cumsum(w * self.hits, axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            precision = np.take_along_axis(found / np.cumsum(w, axis=0), self.ends, axis=0)
            per_class = np.nansum(w * self.hits * precision, axis=0) / found[-1]
        return float(np.nanmean(per_class)) if np.isfinite(per_class).any() else float("nan")


def resampled_map(
    scores: Floats,
    targets: NDArray[Any],
    *,
    seed: int = 0,
    num_resamples: int | None = None,
    watch: Watcher | None = None,
) -> NDArray[np.float64]:
    """(R,) mean average precision of each resample; R is smaller for very large datasets.

    Two models on the same images get the same resamples for the same seed. The difference of
    their results is therefore a paired one.
    """
    ranked = RankedScores(scores, targets)
    n, classes = ranked.order.shape
    affordable = int(np.clip(MAX_RANKED // max(n * classes, 1), MIN_RESAMPLES, NUM_RESAMPLES))
    number = num_resamples or affordable
    drawn: list[float] = []
    with (watch or Quiet()).progress("resamples", number) as bar:
        for counts in resample_counts(n, number, seed):
            for row in counts:
                drawn.append(ranked.mean_average_precision(row))
                bar.advance()
    return np.array(drawn)

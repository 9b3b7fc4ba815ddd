"""How far a figure would move with other images: percentile intervals by resampling them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitcli.evals.calibration import ECE_BINS, bin_of
from vitcli.evals.scoring import Outcomes
from vitcli.progress import Quiet, Watcher

Floats = NDArray[np.floating[Any]]
Interval = tuple[float, float]

RESAMPLES = 2000
LEVEL = 0.95
COUNTS = 2**21  # numbers of a block of resamples
WORK = 3 * 10**8  # images times classes times resamples, where labels are ranked
FEWEST = 200


@dataclass(frozen=True)
class Intervals:
    """Percentile intervals (Efron, 1979): of each figure what lies between its tails' quantiles.

    The calibration error is no mean: chance alone makes it larger, in each resample once more, and
    of a well calibrated model the figure itself may lie below all of them. So its interval is moved
    by what the resamples' mean lies above the figure; it tells of the spread, not of the bias.

    Attributes:
        of: name of a figure -> (low, high).
    """

    resamples: int
    seed: int
    of: Mapping[str, Interval]
    level: float = LEVEL

    def to_json(self) -> dict[str, Any]:
        """Plain values; a figure's interval stands under its name."""
        drawn = {"level": self.level, "resamples": self.resamples, "seed": self.seed}
        return {**drawn, **{name: list(pair) for name, pair in self.of.items()}}


def resampled(n: int, number: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Blocks (b, n) of how often each of n images is drawn; `number` resamples in all."""
    rng = np.random.default_rng(seed)
    at_once = max(1, COUNTS // n)
    for start in range(0, number, at_once):
        drawn = [rng.integers(0, n, n) for _ in range(min(at_once, number - start))]
        yield np.stack([np.bincount(d, minlength=n).astype(np.float64) for d in drawn])


def percentiles(values: Floats) -> Interval:
    """(R,) -> what 95 % of them lie between; what is not a number does not count."""
    known = values[np.isfinite(values)]
    if not len(known):
        return float("nan"), float("nan")
    tails = (1 - LEVEL) / 2
    low, high = np.quantile(known, [tails, 1 - tails])
    return float(low), float(high)


def intervals(
    outcomes: Outcomes,
    shares: Mapping[str, Floats],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    watch: Watcher | None = None,
) -> Intervals:
    """Of top-1, top-5 and the calibration error, and of other shares of the same images.

    All of these are made of sums over images, so that a resample is a row of counts and all
    resamples together a product of matrices.

    Args:
        shares: name -> (n,) what each image adds to a mean over the images; NaN where one does not
            belong to it.
    """
    n = len(outcomes)
    means = {"top1": outcomes.correct, "top5": outcomes.in_five, **shares}
    values = np.stack([np.asarray(v, dtype=np.float64) for v in means.values()], axis=1)
    there = np.isfinite(values)
    gaps = np.zeros((n, ECE_BINS))
    gaps[np.arange(n), bin_of(outcomes.confidence)] = outcomes.correct - outcomes.confidence
    parts = np.concatenate([np.where(there, values, 0.0), there, gaps], axis=1)
    sums = []
    with (watch or Quiet()).progress("resamples", resamples) as bar:
        for counts in resampled(n, resamples, seed):
            sums.append(counts @ parts)
            bar.advance(len(counts))
    drawn = np.concatenate(sums)  # (R, 2 * figures + bins)
    number = len(means)
    with np.errstate(invalid="ignore"):
        ratios = drawn[:, :number] / drawn[:, number : 2 * number]
    of = {name: percentiles(ratios[:, i]) for i, name in enumerate(means)}
    errors = np.abs(drawn[:, 2 * number :]).sum(axis=1) / n
    figure = np.abs(gaps.sum(axis=0)).sum() / n
    of["ece"] = percentiles(np.clip(errors - errors.mean() + figure, 0.0, 1.0))
    return Intervals(resamples, seed, of)


class Ranked:
    """Average precision of each class under any weights of the images, sorted once.

    Args:
        scores, targets: (n, K), and ones and zeros.
    """

    def __init__(self, scores: Floats, targets: NDArray[Any]) -> None:
        present = np.flatnonzero(targets.sum(axis=0))
        s, y = scores[:, present], targets[:, present].astype(np.float64)
        self.order = np.argsort(-s, axis=0, kind="stable")  # (n, P)
        self.hits = np.take_along_axis(y, self.order, axis=0)
        ranked = np.take_along_axis(s, self.order, axis=0)
        # Equal scores are one threshold: all of them count from the last of them on.
        last = np.ones(ranked.shape, dtype=bool)
        last[:-1] = ranked[:-1] != ranked[1:]
        rows = np.where(last, np.arange(len(ranked))[:, None], len(ranked))
        self.ends = np.minimum.accumulate(rows[::-1], axis=0)[::-1]

    def mean_precision(self, counts: Floats) -> float:
        """(n,) how often each image counts -> the mean over the classes that some image has."""
        w = counts[self.order]  # (n, P)
        found = np.cumsum(w * self.hits, axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            precision = np.take_along_axis(found / np.cumsum(w, axis=0), self.ends, axis=0)
            each = np.nansum(w * self.hits * precision, axis=0) / found[-1]
        return float(np.nanmean(each)) if np.isfinite(each).any() else float("nan")


def map_draws(
    ranked: Ranked, *, seed: int = 0, resamples: int | None = None, watch: Watcher | None = None
) -> NDArray[np.float64]:
    """(R,) the mean average precision of so many resamples; fewer of them for very large sets.

    Two models ranked on the same images are drawn the same resamples for the same seed, so that
    their difference is a paired one.
    """
    n, classes = ranked.order.shape
    number = resamples or int(np.clip(WORK // max(n * classes, 1), FEWEST, RESAMPLES))
    drawn: list[float] = []
    with (watch or Quiet()).progress("resamples", number) as bar:
        for counts in resampled(n, number, seed):
            for row in counts:
                drawn.append(ranked.mean_precision(row))
                bar.advance()
    return np.array(drawn)

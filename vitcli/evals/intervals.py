"""95 % confidence intervals of the figures of an evaluation, over images drawn at random.

| figure | interval | source |
| --- | --- | --- |
| a proportion, such as an accuracy | Wilson's score interval | Wilson (1927) |
| a difference of two accuracies on the same images | adjusted Wald | Bonett and Price (2012) |
| precision, recall, F1 of a class | Wilson's, see `class_intervals` | Wilson (1927) |
| their averages over classes | score, see `mean_of_intervals` | Zou and Donner (2008) |
| ROC-AUC | jackknife over images, on the logit scale | DeLong et al. (1988) |
| mean average precision, micro F1 | the same | Efron and Stein (1981) |
| errors and R2 of numbers | BCa bootstrap, see `regression.py` | Efron (1987) |
| calibration error | simulated, see `calibration_error` | Roelofs et al. (2022) |

A percentile bootstrap fails for the proportions and the calibration error: an accuracy of 100 % has
no spread, and the other figures are biased upwards, in the data and once more in each resample.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitcli.evals.scoring import ECE_BINS, THRESHOLD, ImageScores, confidence_bins

Floats = NDArray[np.floating[Any]]
Interval = tuple[float, float]

NUM_DRAWS = 1000  # of the calibration error, for each size of the deviation
LEVEL = 0.95
QUANTILE = 1.959963984540054  # of the normal distribution, for LEVEL
# With fewer images of a class, the corrected average precision is still biased.
MIN_POSITIVES = 10


@dataclass(frozen=True)
class Intervals:
    """95 % intervals of the figures of an evaluation.

    Attributes:
        of: name of a figure -> (low, high), or None if there are too few images.
        reasons: name of a figure without an interval -> the reason.
        methods: name of a figure with an interval -> how the interval was computed.
        draws, seed: of the simulation for the calibration error.
    """

    of: Mapping[str, Interval | None]
    reasons: Mapping[str, str] = field(default_factory=dict)
    methods: Mapping[str, str] = field(default_factory=dict)
    draws: int = 0
    seed: int = 0
    level: float = LEVEL

    def to_json(self) -> dict[str, Any]:
        """Plain values; each figure is a key."""
        facts: dict[str, Any] = {"level": self.level, "resamples": self.draws, "seed": self.seed}
        facts |= {name: None if pair is None else list(pair) for name, pair in self.of.items()}
        missing = {name for name, pair in self.of.items() if pair is None}
        facts["methods"] = {k: v for k, v in self.methods.items() if k not in missing}
        return facts | ({"reasons": dict(self.reasons)} if self.reasons else {})

    def merged(self, others: "Intervals") -> "Intervals":
        """These and further intervals; draws and seed are those of `self`."""
        return replace(
            self,
            of={**self.of, **others.of},
            reasons={**self.reasons, **others.reasons},
            methods={**self.methods, **others.methods},
        )


def wilson_interval(share: float, n: float) -> Interval:
    """Wilson's score interval of a share in 0..1 of n images; NaN without images.

    `share` may also be a mean over several classifiers on the same n images. Their average has
    less variance than a single one, so the interval is then too wide rather than too narrow.
    """
    if not n or math.isnan(share):
        return math.nan, math.nan
    z2 = QUANTILE**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = QUANTILE / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # Exact at the ends: rounding must not exclude a share of 0 or 1.
    return (
        max(0.0, middle - half) if share > 0 else 0.0,
        min(1.0, middle + half) if share < 1 else 1.0,
    )


def paired_interval(n: int, only_first: int, only_second: int) -> Interval:
    """Interval of the second accuracy minus the first, from the images that only one gets right.

    Bonett and Price (2012), equation 9: one image is added to each of both counts. It is one of the
    two intervals that Fagerland, Lydersen and Laake (2014) recommend for paired proportions.
    """
    gain, loss = (only_second + 1) / (n + 2), (only_first + 1) / (n + 2)
    half = QUANTILE * math.sqrt((gain + loss - (gain - loss) ** 2) / (n + 2))
    return max(-1.0, gain - loss - half), min(1.0, gain - loss + half)


@dataclass(frozen=True)
class LeaveOneOut:
    """A figure on n images, and on each n - 1 of them: the jackknife.

    Attributes:
        whole: the figure on all images.
        without: (n,) the figure without image i.
    """

    whole: float
    without: NDArray[np.float64]

    @property
    def corrected(self) -> float:
        """The figure without its bias of order 1 / n (Quenouille, 1956)."""
        n = len(self.without)
        return float(n * self.whole - (n - 1) * self.without.mean())

    def __sub__(self, other: "LeaveOneOut") -> "LeaveOneOut":
        """The difference of two figures on the same images."""
        return LeaveOneOut(self.whole - other.whole, self.without - other.without)

    @property
    def variance(self) -> float:
        """Variance of the figure (Efron and Stein, 1981); 0 if no image makes a difference."""
        n = len(self.without)
        total = float(np.square(self.without - self.without.mean()).sum()) if n > 1 else 0.0
        return (n - 1) / n * total if total >= 1e-20 else 0.0  # below: rounding

    @property
    def method(self) -> str:
        """How `share_interval` computes the interval."""
        return "jackknife" if self.variance else "wilson"

    def margin(self) -> float:
        """Half the width of the 95 % interval."""
        from scipy.stats import t

        n, variance = len(self.without), self.variance
        if not variance:
            return 0.0
        squares = np.square(self.without - self.without.mean())
        total = float(squares.sum())
        # Few images carry most of the variance, namely those of a rare class. So the variance is
        # itself uncertain, and decides the degrees of freedom (Satterthwaite, 1946).
        spread = float(np.square(squares).sum()) - total**2 / n
        freedom = max(2 * total**2 / spread, 2.0) if spread > 0 else n - 1.0
        return float(t.ppf((1 + LEVEL) / 2, freedom) * math.sqrt(variance))

    def difference_interval(self) -> Interval:
        """Interval of a difference in -1..1."""
        margin = self.margin()
        if not margin:  # no image makes a difference, which does not prove that none ever does
            return paired_interval(len(self.without), 0, 0)
        return max(-1.0, self.corrected - margin), min(1.0, self.corrected + margin)

    def share_interval(self, labelled: float) -> Interval:
        """Interval of a figure in 0..1; it is symmetric on the logit scale.

        Args:
            labelled: number of images with a label. If no image changes the figure, as in a
                perfect ranking, the interval is that of a proportion of these images.
        """
        n, margin = len(self.without), self.margin()
        if not margin:
            return wilson_interval(self.whole, labelled)
        middle = float(np.clip(self.corrected, 0.5 / n, 1 - 0.5 / n))
        log_odds, margin = math.log(middle / (1 - middle)), margin / middle / (1 - middle)
        low, high = (1 / (1 + math.exp(-x)) for x in (log_odds - margin, log_odds + margin))
        return low, high


def mean_of_intervals(
    whole: LeaveOneOut, values: ArrayLike, limits: Sequence[Interval], counts: ArrayLike
) -> Interval:
    """Interval of the mean of K figures in 0..1 that have intervals; the wider end of two.

    * The distances of the K figures to their limits are added as squares (MOVER; Zou and Donner,
      2008). This holds for few classes, also if all images of a rare one are right, whose variance
      then looks like 0.
    * Wilson's interval for as many images as a simple proportion of the same variance has (Franco
      et al., 2019). This holds for many classes with few images each.

    Args:
        whole: the mean, with its jackknife.
        values, limits: (K,) the figures and their intervals.
        counts: (K,) images of each class; decide if no image makes a difference.
    """
    mean, number = whole.whole, len(limits)
    # Each end has its own distance: an interval of a share near 1 is not symmetric.
    lows, highs = np.array(limits).T
    distances = np.stack([np.asarray(values) - lows, highs - np.asarray(values)])
    below, above = np.sqrt(np.square(distances).sum(axis=1)) / number
    variance = whole.variance
    # The number of images whose simple share has the variance of the mean, if all K are equal.
    equal_variance = number**2 / float((1 / np.asarray(counts, dtype=np.float64)).sum())
    images = mean * (1 - mean) / variance if variance and 0 < mean < 1 else equal_variance
    low, high = wilson_interval(mean, images)
    return max(0.0, min(low, mean - float(below))), min(1.0, max(high, mean + float(above)))


def leave_out_micro_f1(
    probabilities: Floats, targets: NDArray[Any], thresholds: ArrayLike = THRESHOLD
) -> LeaveOneOut:
    """F1 of all decisions at a probability of 0.5, or at (K,) thresholds, without each image."""
    decided = probabilities >= np.asarray(thresholds)
    hits = 2.0 * (decided & (targets == 1)).sum(axis=1)
    total = (decided.sum(axis=1) + targets.sum(axis=1)).astype(np.float64)
    rest = total.sum() - total
    without = np.divide(hits.sum() - hits, rest, out=np.zeros(len(hits)), where=rest > 0)
    return LeaveOneOut(float(hits.sum() / total.sum()) if total.any() else 0.0, without)


@dataclass(frozen=True)
class CalibrationError:
    """The expected calibration error of n images, and what it says about unlimited images.

    The figure is a sum of absolute values, so sampling noise raises it: a perfectly calibrated
    model shows an error above 0 on every finite set (Kumar et al., 2019; Roelofs et al., 2022).

    Attributes:
        estimate: of these images.
        if_calibrated: mean of the estimate for a calibrated model with as many images and the same
            confidences.
        debiased: the error on unlimited images for which the mean of the estimate is this one.
        interval: 95 % interval of the error on unlimited images; it often excludes `estimate`. None
            if no simulated model shows such an estimate, which happens with very few images.
    """

    estimate: float
    if_calibrated: float
    debiased: float
    interval: Interval | None
    seed: int = 0

    def to_json(self) -> dict[str, float]:
        """Values by their JSON keys; `ece` and its interval are elsewhere."""
        return {"ece_if_calibrated": self.if_calibrated, "ece_debiased": self.debiased}


# Multiples of the fitted deviation at which the estimate is simulated.
SCALES = np.append(0.0, np.geomspace(0.08, 4.0, 23))


def calibration_error(confidence: Floats, correct: NDArray[Any], seed: int = 0) -> CalibrationError:
    """Simulate the calibration error of models from calibrated to worse than this one.

    A logistic curve (Platt, 1999) through the bins of the reliability diagram gives the way in
    which this model deviates. Models with 0 to 4 times this deviation are simulated. A size of the
    deviation is in the interval if the observed error is usual for it. The debiased error is the
    size for which the observed error is the mean, as in Roelofs et al. (2022), section 3.

    Args:
        confidence, correct: (n,) probability of the predicted class, and whether it is right.
    """
    n = len(confidence)
    place = confidence_bins(confidence)
    counts, said, right = (
        np.bincount(place, weights, ECE_BINS)
        for weights in (np.ones(n), confidence, np.asarray(correct, dtype=np.float64))
    )
    estimate = float(np.abs(said - right).sum() / n)
    if not math.isfinite(estimate):
        return CalibrationError(math.nan, math.nan, math.nan, (math.nan, math.nan), seed)
    used = counts > 0
    shares = counts[used] / n
    means, accuracy = said[used] / counts[used], right[used] / counts[used]
    gaps = _logistic_curve(means, accuracy, shares * n) - means
    size = float(shares @ np.abs(gaps))
    if size < 1e-6:  # no direction: any will do
        gaps, size = np.full_like(means, -1e-3), 1e-3
    sizes, below, averages, noise = [], [], [], 0.0
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(n, shares, NUM_DRAWS)
    for scale in SCALES * max(1.0, estimate / size / 2):
        truth = np.clip(means + scale * gaps, 0.0, 1.0)
        errors = np.abs(rng.binomial(drawn, truth) - drawn * means).sum(axis=1) / n
        sizes.append(float(shares @ np.abs(truth - means)))
        # Ties count half. They are frequent if only few images are wrong.
        tied = np.isclose(errors, estimate, rtol=0, atol=1e-12)
        below.append(float(((errors < estimate) & ~tied).mean() + tied.mean() / 2))
        averages.append(float(errors.mean()))
        noise = noise or float(errors.std())
    fine = np.linspace(0.0, sizes[-1], 1000)
    # The error cannot be below 0, so for sizes within the noise the interval becomes one-sided;
    # otherwise 0 would be in it too often (Feldman and Cousins, 1998).
    lower = (1 - LEVEL) / 2 * np.clip(fine / (2 * noise or 1.0), 0.0, 1.0)
    chance = np.interp(fine, sizes, below)
    inside = fine[(chance >= lower) & (chance <= lower + LEVEL)]
    interval = (float(inside[0]), float(inside[-1])) if len(inside) else None
    debiased = float(np.interp(estimate, averages, sizes)) if estimate > averages[0] else 0.0
    return CalibrationError(estimate, averages[0], debiased, interval, seed)


def _logistic_curve(means: Floats, accuracy: Floats, counts: Floats) -> NDArray[np.float64]:
    """(bins,) confidences -> (bins,) accuracies by a logistic regression on the log-odds."""
    clipped = np.clip(means, 1e-4, 1 - 1e-4)
    x = np.stack([np.ones_like(means), np.log(clipped / (1 - clipped))], axis=1)
    start = np.array([0.0, 1.0])  # the identity
    weights = start
    for _ in range(10):  # Newton's method; a little ridge keeps it finite if every image is right
        p = 1 / (1 + np.exp(-x @ weights))
        slope = x.T @ (counts * (accuracy - p)) - 0.5 * (weights - start)
        curvature = x.T @ ((counts * p * (1 - p))[:, None] * x) + 0.5 * np.eye(2)
        weights = weights + np.clip(np.linalg.solve(curvature, slope), -2, 2)
    return np.asarray(1 / (1 + np.exp(-x @ weights)))


def single_label_intervals(
    scores: ImageScores, means: Mapping[str, NDArray[Any]], error: CalibrationError
) -> Intervals:
    """Intervals of top-1, top-5, further proportions, and the calibration error.

    Args:
        means: name -> (n,) zeros and ones; NaN for an image that the proportion leaves out.
    """
    of: dict[str, Interval | None] = {}
    for name, values in {"top1": scores.correct, "top5": scores.top5_correct, **means}.items():
        known = np.asarray(values, dtype=np.float64)
        known = known[np.isfinite(known)]
        of[name] = wilson_interval(float(known.mean()) if len(known) else math.nan, len(known))
    methods = {**dict.fromkeys(of, "wilson"), "ece": "simulation"}
    of["ece"] = error.interval
    reasons = {} if error.interval else {"ece": "too few images to simulate such an error"}
    return Intervals(of, reasons, methods, NUM_DRAWS, error.seed)


def multi_label_intervals(
    probabilities: Floats,
    targets: NDArray[Any],
    leave_out: LeaveOneOut,
    names: Sequence[str],
    thresholds: ArrayLike = THRESHOLD,
) -> Intervals:
    """Intervals of mean average precision and micro F1."""
    of: dict[str, Interval | None] = {"map": None}
    labelled, micro_f1 = (
        int(targets.any(axis=1).sum()),
        leave_out_micro_f1(probabilities, targets, thresholds),
    )
    of["micro_f1"] = micro_f1.share_interval(labelled)
    positives = targets.sum(axis=0, dtype=np.int64)
    present = np.flatnonzero(positives).tolist()
    methods = {"map": leave_out.method, "micro_f1": micro_f1.method}
    if not present:
        return Intervals(of, {"map": "no image has a label"}, methods)
    rarest = min(present, key=lambda k: positives[k])
    if positives[rarest] < MIN_POSITIVES:
        return Intervals(
            of,
            {
                "map": f"the class {names[rarest]} has {positives[rarest]} images, "
                f"and an interval needs {MIN_POSITIVES} of each class"
            },
            methods,
        )
    return Intervals(of | {"map": leave_out.share_interval(labelled)}, methods=methods)

"""Paired comparison of two models on the same images."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from vitcli.evals.evaluate import Evaluation
from vitcli.evals.intervals import paired_interval
from vitcli.evals.regression import Numbers, mae_difference_interval
from vitcli.evals.scoring import MultiLabelMetrics


@dataclass(frozen=True)
class PairedAccuracy:
    """Difference of two accuracies on the same images.

    Attributes:
        images: number of images that both models were measured on.
        difference: accuracy of the second model minus that of the first.
        low, high: 95 % interval of the difference, see `paired_interval`.
        only_first, only_second: images that only one of the models gets right.
        p_value: of McNemar's exact test of equal accuracy.
    """

    images: int
    difference: float
    low: float
    high: float
    only_first: int
    only_second: int
    p_value: float


@dataclass(frozen=True)
class PairedMap:
    """Difference of two mean average precisions (second minus first) and its 95 % interval."""

    images: int
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedError:
    """Difference of two mean absolute errors (second minus first) and its 95 % interval.

    `p_value` is that of Student's paired test of equal errors.
    """

    images: int
    difference: float
    low: float
    high: float
    p_value: float
    metric: str = "mae"


Pair = PairedAccuracy | PairedMap | PairedError | str


def compare_errors(first: Numbers, second: Numbers) -> PairedError:
    """Compare (n,) absolute errors of two regressions on the same images."""
    from scipy.stats import ttest_rel

    low, high = mae_difference_interval(first, second)
    difference = float(second.mean() - first.mean())
    # Without spread the test divides by 0: equal changes of all images are certain, none are not.
    if len(first) < 2 or not np.ptp(second - first):
        p_value = 0.0 if len(first) > 1 and difference else 1.0
    else:
        p_value = float(ttest_rel(second, first).pvalue)
    return PairedError(len(first), difference, low, high, p_value)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of m tests, corrected so that all together err with a chance of 5 % (Holm, 1979)."""
    # The smallest p-value counts m times, the next one m - 1 times, and so on. None falls below
    # an earlier one, so that the order of the tests stays.
    m, adjusted, largest = len(p_values), [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(m), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (m - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def compare_paired(first: ArrayLike, second: ArrayLike) -> PairedAccuracy:
    """Compare two classifiers on the same images: interval and McNemar's exact test.

    Args:
        first, second: (n,) booleans, whether image i is classified correctly.
    """
    from scipy.stats import binomtest

    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"results of {a.shape} and {b.shape} images cannot be paired")
    n = len(a)
    only_first, only_second = int((a & ~b).sum()), int((~a & b).sum())
    low, high = paired_interval(n, only_first, only_second)
    # McNemar (1947): if both are equally good, each image on which they disagree is a fair coin.
    # The exact binomial test also holds for few such images, unlike the chi-squared form.
    disagree = only_first + only_second
    p_value = float(binomtest(only_second, disagree).pvalue) if disagree else 1.0
    difference = (only_second - only_first) / n
    return PairedAccuracy(n, difference, low, high, only_first, only_second, p_value)


@dataclass(frozen=True)
class ModelComparison:
    """Several models on the same data.

    Attributes:
        models: evaluation of each model, in the order of the command line.
        paired: for each model but the first, the comparison with the first, or why there is none.
    """

    data: str
    models: tuple[Evaluation, ...]
    paired: tuple[Pair, ...]

    @property
    def broken(self) -> tuple[str, ...]:
        """Images that could not be read for one of the models."""
        return tuple(dict.fromkeys(line for one in self.models for line in one.broken))

    def to_json(self) -> dict[str, Any]:
        """The object of `evaluate --json` with several models."""
        first, *others = self.models
        return {
            "data": self.data,
            "models": [one.to_json() for one in self.models],
            "paired": [
                {"model": other.model, "against": first.model, **pair_json(pair)}
                for other, pair in zip(others, self.paired, strict=True)
            ],
        }


def pair_json(pair: Pair) -> dict[str, Any]:
    """Plain values of a comparison, or the reason why there is none."""
    return {"reason": pair} if isinstance(pair, str) else asdict(pair)


def compare_models(data: str, models: Sequence[Evaluation]) -> ModelComparison:
    """Compare every model with the first one, image by image."""
    first, *others = models
    return ModelComparison(data, tuple(models), tuple(_compare(first, one) for one in others))


def _compare(first: Evaluation, second: Evaluation) -> Pair:
    if first.identity != second.identity:
        return "measured on other images"
    if first.details is not None and second.details is not None:
        # A file may be unreadable to one model only (another preprocessing): pair what both read.
        _, a, b = np.intersect1d(first.indices, second.indices, return_indices=True)
        return compare_paired(first.details.correct[a], second.details.correct[b])
    if first.numbers is not None and second.numbers is not None:
        _, a, b = np.intersect1d(first.indices, second.indices, return_indices=True)
        return compare_errors(first.numbers.errors[a], second.numbers.errors[b])
    one, two = first.metrics, second.metrics
    if not (isinstance(one, MultiLabelMetrics) and isinstance(two, MultiLabelMetrics)):
        return "measured in other ways"
    # The jackknife leaves out the same image in both models.
    if not np.array_equal(first.indices, second.indices):
        return "measured on other images"
    assert first.leave_out is not None and second.leave_out is not None
    if reason := second.intervals.reasons.get("map"):
        return reason
    low, high = (second.leave_out - first.leave_out).difference_interval()
    return PairedMap(len(first.indices), two.map - one.map, low, high)

"""Two classifiers on the same images: how far apart they are, and whether that is chance.

Several models on the same data, each against the first.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from vitcli.evals.bootstrap import Interval, percentiles
from vitcli.evals.evaluate import Evaluation
from vitcli.evals.multilabel import LabelsEvaluation

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


Either = Evaluation | LabelsEvaluation


@dataclass(frozen=True)
class PairedMap:
    """How far apart two mean average precisions are: second minus first, and its 95 % interval."""

    images: int
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Evaluations:
    """Several models.

    Attributes:
        models: the evaluation of each, in the order asked for.
        paired: of each but the first against the first; or the reason why not.
    """

    data: str
    models: tuple[Either, ...]
    paired: tuple[Paired | PairedMap | str, ...]

    @property
    def broken(self) -> tuple[str, ...]:
        """Images that one of the models could not be given."""
        return tuple(dict.fromkeys(line for one in self.models for line in one.broken))

    @property
    def exit_code(self) -> int:
        """3 when some images could not be read."""
        return 3 if self.broken else 0

    def to_json(self) -> dict[str, Any]:
        """The object of `evaluate --json` with several models."""
        first, *others = self.models
        return {
            "data": self.data,
            "models": [one.to_json() for one in self.models],
            "paired": [
                {
                    "model": other.model,
                    "against": first.model,
                    **({"reason": pair} if isinstance(pair, str) else asdict(pair)),
                }
                for other, pair in zip(others, self.paired, strict=True)
            ],
        }


def beside(data: str, models: Sequence[Either], seed: int) -> Evaluations:
    """Every model against the first, image by image; `seed` of the resampling."""
    first, *others = models
    return Evaluations(data, tuple(models), tuple(_pair(first, one, seed) for one in others))


def _pair(first: Either, second: Either, seed: int) -> Paired | PairedMap | str:
    if first.identity != second.identity:
        return "measured on other images"
    if isinstance(first, Evaluation) and isinstance(second, Evaluation):
        _, a, b = np.intersect1d(first.indices, second.indices, return_indices=True)
        return compare_paired(first.correct[a], second.correct[b], seed)
    if isinstance(first, LabelsEvaluation) and isinstance(second, LabelsEvaluation):
        if not np.array_equal(first.indices, second.indices):
            return "measured on other images"
        low, high = _difference(first, second)
        return PairedMap(len(first.indices), second.metrics.map - first.metrics.map, low, high)
    return "measured in other ways"


def _difference(first: LabelsEvaluation, second: LabelsEvaluation) -> Interval:
    """Both were drawn the same images, resample by resample."""
    return percentiles(second.draws - first.draws)

"""Several models on the same data, each against the first."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vitcli.evals.bootstrap import Interval, percentiles
from vitcli.evals.evaluation import Evaluation
from vitcli.evals.labels import LabelsEvaluation
from vitcli.evals.paired import Paired, compare_paired

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

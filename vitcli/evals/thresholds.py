"""A probability for each class of multi-label images from which on the class counts as predicted.

The thresholds are fitted on images that are not reported, see `calibration.py`, and are stored with
the weights. They are compared with probabilities after the temperature.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from vitcli.errors import VitcliError, counted, quoted
from vitcli.evals.intervals import MIN_POSITIVES
from vitcli.evals.ranking import Ranking
from vitcli.evals.scoring import THRESHOLD, Floats, multi_label_metrics, multi_label_per_class
from vitcli.progress import Watcher

RULES = ("f1", "recall", "precision")
HINT = "give `f1`, `recall=0.95` or `precision=0.9`"


@dataclass(frozen=True)
class ThresholdRule:
    """How a threshold is chosen.

    Attributes:
        name: `f1`: the best F1. `recall`: the highest threshold with that recall. `precision`: the
            lowest threshold with that precision.
        wanted: the recall or precision, in (0, 1]; None for `f1`.
    """

    name: Literal["f1", "recall", "precision"]
    wanted: float | None = None

    def __str__(self) -> str:
        return self.name if self.wanted is None else f"{self.name}={self.wanted:g}"

    @classmethod
    def parse(cls, text: str) -> "ThresholdRule":
        """`f1`, `recall=0.95` or `precision=0.9`; raises a VitcliError for anything else."""
        name, sign, number = text.partition("=")
        try:
            wanted = float(number) if sign else None
        except ValueError:
            wanted = -1.0
        valid = wanted is None if name == "f1" else wanted is not None and 0 < wanted <= 1
        if name not in RULES or not valid:
            raise VitcliError(f"`--thresholds` is `{text}`", HINT)
        return cls(cast(Literal["f1", "recall", "precision"], name), wanted)


@dataclass(frozen=True)
class FittedThresholds:
    """Thresholds that were fitted on images which are not reported.

    Attributes:
        rule: as on the command line.
        split: description of the images that they were fitted on.
        images: number of these images.
        macro_f1_before, micro_f1_before: of the reported images, under the previous thresholds.
        stored: weights file that holds the thresholds now.
    """

    rule: str
    split: str
    images: int
    macro_f1_before: float | None
    micro_f1_before: float
    stored: str


def fit_threshold(scores: Floats, targets: NDArray[Any], rule: ThresholdRule) -> float | None:
    """The threshold of one class, midway between two scores; None if no threshold does it.

    Args:
        scores, targets: (n,) probabilities, and 0 or 1.
    """
    # One sort gives recall and precision at every threshold.
    ranking = Ranking.of(scores, targets)
    if not ranking.positives:
        return None
    # Only the end of a group of equal scores can be a threshold.
    ends = np.unique(ranking.ends)  # ascending, so thresholds fall
    found = ranking.found[ends - 1]
    recall, precision = found / ranking.positives, found / ends
    if rule.name == "f1":
        # 2 TP / (2 TP + FP + FN): the denominator is all decisions plus all images of the class.
        at = int(np.argmax(2 * found / (ends + ranking.positives)))
    else:
        share = recall if rule.name == "recall" else precision
        assert rule.wanted is not None
        # 9 of 10 images are a recall of 0.9, whatever the division rounds to.
        reached = np.flatnonzero(share >= rule.wanted - 1e-12)
        if not len(reached):
            return None
        # The highest threshold has the best precision, the lowest one the best recall.
        at = int(reached[0 if rule.name == "recall" else -1])
    ranked = np.asarray(scores, dtype=np.float64)[ranking.order]
    last = ends[at] - 1
    # Midway: an image with nearly the same score is on the same side.
    below = ranked[last + 1] if last + 1 < len(ranked) else 0.0
    return float((ranked[last] + below) / 2)


def fit_thresholds(
    probabilities: Floats,
    targets: NDArray[Any],
    rule: ThresholdRule,
    names: Sequence[str],
    watch: Watcher,
) -> list[float]:
    """A threshold per class; 0.5, with a warning, for a class that no threshold fits.

    Args:
        probabilities, targets: (n, K) of images that are not reported.
    """
    found = [
        fit_threshold(probabilities[:, k], targets[:, k], rule) for k in range(targets.shape[1])
    ]
    if failed := [name for name, value in zip(names, found, strict=True) if value is None]:
        cause = "no image or no threshold with" if rule.wanted else "no image for"
        keeping = counted(len(failed), "classes keeps", "classes keep", len(names))
        watch.warn(
            f"{keeping} the threshold {THRESHOLD}, because there is {cause} `{rule}`: "
            f"{quoted(failed, 5)}"
        )
    # The best threshold for 3 images is that of these 3 images.
    positives = targets.sum(axis=0, dtype=np.int64)
    if rare := int(((positives > 0) & (positives < MIN_POSITIVES)).sum()):
        watch.warn(
            f"{counted(rare, 'classes has', 'classes have', len(names))} fewer than "
            f"{MIN_POSITIVES} images for the fit of a threshold, which is uncertain then"
        )
    return [THRESHOLD if value is None else value for value in found]


def decision_figures(
    probabilities: Floats, targets: NDArray[np.uint8], thresholds: NDArray[np.float64]
) -> tuple[float | None, float]:
    """Macro F1 over the classes with images (None without any), and micro F1, of the decisions."""
    metrics = multi_label_metrics(probabilities, targets, thresholds)
    names = [str(k) for k in range(targets.shape[1])]
    table = multi_label_per_class(probabilities, targets, metrics, names, thresholds)
    # The same classes as in `class_averages`, so that before and after can be compared.
    known = [row["f1"] for row in table.values() if row["f1"] is not None]
    return float(np.mean(known)) if known else None, metrics.micro_f1

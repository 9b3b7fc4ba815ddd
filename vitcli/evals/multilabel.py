"""Figures for images with any number of labels: average precision, F1 at one half."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Targets = NDArray[np.uint8]

THRESHOLD = 0.5


@dataclass(frozen=True)
class MultiLabelMetrics:
    """Of n images.

    Attributes:
        map: mean over the classes that some image has of their average precision.
        micro_f1: F1 of all n x K answers together, yes where a probability is 0.5 or more.
        per_class: (K,) average precision; NaN for a class that no image has.
        positives: (K,) how many images have each class.
        precision, recall, f1: (K,) of the answers where yes is a probability of 0.5 or more; 0
            where there is nothing to divide by.
    """

    images: int
    map: float
    micro_f1: float
    per_class: Floats
    positives: NDArray[np.int64]
    precision: Floats
    recall: Floats
    f1: Floats


def measure_labels(probabilities: Floats, targets: Targets) -> MultiLabelMetrics:
    """(n, K) probabilities and (n, K) ones and zeros -> all figures.

    Average precision is scikit-learn's: the mean of the precision at each threshold, weighted by
    the recall that it adds, without interpolation.
    """
    from sklearn.metrics import average_precision_score, precision_recall_fscore_support

    positives = targets.sum(axis=0, dtype=np.int64)
    precision = np.full(targets.shape[1], np.nan)
    for k in np.flatnonzero(positives):
        precision[k] = average_precision_score(targets[:, k], probabilities[:, k])
    yes = probabilities >= THRESHOLD
    each = precision_recall_fscore_support(targets, yes, average=None, zero_division=0)
    hits = int((yes & (targets == 1)).sum())
    answers = int(yes.sum()) + int(positives.sum())
    return MultiLabelMetrics(
        images=len(targets),
        map=float(np.nanmean(precision)) if positives.any() else float("nan"),
        micro_f1=2 * hits / answers if answers else 0.0,
        per_class=precision,
        positives=positives,
        precision=each[0],
        recall=each[1],
        f1=each[2],
    )

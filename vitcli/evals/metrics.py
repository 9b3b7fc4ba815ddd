"""Figures for a labelled set: accuracy, loss, calibration, confusion."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitcli.evals.calibration import calibration_error
from vitcli.evals.scoring import Outcomes, judge

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Metrics:
    """Of n images.

    Attributes:
        top1, top5: shares in 0..1; top5 is over min(5, K) classes.
        loss: mean cross-entropy in nats.
        ece: expected calibration error, 15 equal-width bins on the top label.
    """

    images: int
    top1: float
    top5: float
    loss: float
    ece: float


def measure(logits: Floats, labels: Ints) -> Metrics:
    """(n, K) logits and (n,) labels among the K -> all figures."""
    return summarise(judge(logits, labels))


def summarise(outcomes: Outcomes) -> Metrics:
    """What became of each image -> all figures."""
    return Metrics(
        images=len(outcomes),
        top1=float(outcomes.correct.mean()),
        top5=float(outcomes.in_five.mean()),
        loss=float(outcomes.loss.mean()),
        ece=calibration_error(outcomes.confidence, outcomes.correct),
    )


def confusion_matrix(labels: Ints, predicted: Ints, num_classes: int) -> Ints:
    """(n,) true and (n,) predicted classes -> (K, K) counts: rows true, columns predicted."""
    from sklearn.metrics import confusion_matrix as count

    return np.asarray(count(labels, predicted, labels=np.arange(num_classes)), dtype=np.int64)


def per_class(
    labels: Ints, predicted: Ints, names: tuple[str, ...]
) -> dict[str, dict[str, float | int]]:
    """Precision, recall, F1 and number of images for each class that the data has.

    `predicted` may lie beyond `names` where the model knows more. A class that was never
    predicted has precision 0.
    """
    from sklearn.metrics import precision_recall_fscore_support as score

    indices = np.unique(labels)
    figures = score(labels, predicted, labels=indices, zero_division=0)
    return {
        names[i]: {
            "precision": float(precision),
            "recall": float(recall),
            "f1": float(f1),
            "images": int(count),
        }
        for i, precision, recall, f1, count in zip(indices, *figures, strict=True)
    }

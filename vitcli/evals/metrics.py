"""Figures for a labelled set: accuracy, loss, calibration, confusion."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]

ECE_BINS = 15


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
    z = logits.astype(np.float64)
    rows = np.arange(len(z))
    top = z.max(axis=1, keepdims=True)
    log_p = z - top - np.log(np.exp(z - top).sum(axis=1, keepdims=True))  # (n, K)
    correct = z.argmax(axis=1) == labels
    # The true class is among the best five when fewer than five score higher.
    ahead = (z > z[rows, labels][:, None]).sum(axis=1)
    return Metrics(
        images=len(labels),
        top1=float(correct.mean()),
        top5=float((ahead < min(5, z.shape[1])).mean()),
        loss=float(-log_p[rows, labels].mean()),
        ece=calibration_error(np.exp(log_p.max(axis=1)), correct),
    )


def calibration_error(
    confidence: Floats, correct: NDArray[np.bool_], bins: int = ECE_BINS
) -> float:
    """Expected calibration error: the mean of |accuracy - confidence| over equal-width bins,
    weighted by their images (Guo et al., 2017). A bin holds its upper edge.
    """
    edges = np.linspace(0, 1, bins + 1)
    place = np.clip(np.digitize(confidence, edges[1:-1], right=True), 0, bins - 1)
    gap = np.zeros(bins)
    np.add.at(gap, place, correct.astype(np.float64) - confidence)
    return float(np.abs(gap).sum() / len(confidence))


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

"""Metrics of a classifier on labelled images.

Single-label images: `score_logits` reduces (n, K) logits to a few numbers per image
(`ImageScores`), and every metric is a mean of these over images. Multi-label images:
`multi_label_metrics` takes (n, K) probabilities.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
PerClass = dict[str, dict[str, Any]]

BLOCK_VALUES = 2**22  # logits that are converted to float64 at a time
NO_TARGET = -1  # fills up rows of a target table that have fewer right outputs than others
ECE_BINS = 15  # Guo et al. (2017), table 1
MIN_TOP5_CLASSES = 6  # with fewer classes top-5 accuracy is 100 % for any model
THRESHOLD = 0.5  # probability from which a multi-label class counts as predicted


@dataclass(frozen=True)
class ImageScores:
    """Numbers for each of n single-label images.

    Attributes:
        num_outputs: K, how many outputs the model has.
        predicted: (n,) output with the highest logit.
        confidence: (n,) probability of that output.
        correct: (n,) whether that output is a right one.
        top5_correct: (n,) probability that a right output is among the 5 highest, see
            `top_k_chance`; 0 or 1 unless logits are equal.
        loss: (n,) negative log-probability of the right outputs together, in nats.
    """

    num_outputs: int
    predicted: Ints
    confidence: NDArray[np.float64]
    correct: Bools
    top5_correct: NDArray[np.float64]
    loss: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.predicted)


def score_logits(logits: Floats, targets: ArrayLike, temperature: float = 1.0) -> ImageScores:
    """Score (n, K) logits of single-label images.

    Args:
        targets: (n,) right output of each image, or (n, M) if several outputs are right, see
            `pad_targets`. Each image needs at least one.
        temperature: the logits are divided by it before the softmax.
    """
    table = _target_table(targets)
    n, k = logits.shape
    predicted = np.empty(n, np.int64)
    confidence, top5, loss = np.empty(n), np.empty(n), np.empty(n)
    # float64: in float32 a confidence of 1 - 1e-9 is 1, and the loss of such an image is 0.
    for rows in row_blocks(n, k):
        z = logits[rows].astype(np.float64)
        predicted[rows] = z.argmax(axis=1)
        top5[rows] = top_k_chance(z, table[rows], 5)
        log_p = log_softmax(z / temperature)  # only here: a temperature changes no ranking
        confidence[rows] = np.exp(log_p.max(axis=1))
        loss[rows] = -_logsumexp(target_values(log_p, table[rows]))
    correct = (table == predicted[:, None]).any(axis=1)
    return ImageScores(k, predicted, confidence, correct, top5, loss)


def top_k_chance(z: NDArray[np.float64], targets: Ints, k: int) -> NDArray[np.float64]:
    """(n, K) logits, (n, M) right outputs -> (n,): the chance that one is among the k highest.

    Outputs with equal logits are in a random order, so that a sort which happens to favour the
    label gains nothing: of K equal logits the chance is k / K.
    """
    right = target_values(z, targets)  # (n, M)
    best = right.max(axis=1, keepdims=True)
    places = k - (z > best).sum(axis=1)  # left for the outputs that equal the best right one
    equal, right_equal = (z == best).sum(axis=1), (right == best).sum(axis=1)
    # Each place goes to one of the equal outputs that are left; the label misses all of them.
    missed = np.ones(len(z))
    for place in range(k):
        wrong = np.maximum(equal - right_equal - place, 0)
        missed *= np.where(place < places, wrong / np.maximum(equal - place, 1), 1.0)
    return np.asarray(1.0 - missed)


def restricted_argmax(logits: Floats, outputs: Sequence[int] | Ints) -> Ints:
    """(n, K) logits -> (n,) the output with the highest logit among `outputs`."""
    # Sorted: of equal logits argmax takes the first, as it does over all outputs.
    allowed = np.unique(np.asarray(outputs, dtype=np.int64))
    best = np.empty(len(logits), np.int64)
    for rows in row_blocks(*logits.shape):
        best[rows] = allowed[logits[rows][:, allowed].argmax(axis=1)]
    return best


def pad_targets(sets: Sequence[Sequence[int]]) -> Ints:
    """Lists of right outputs -> (n, M) table; shorter rows are filled with -1."""
    width = max((len(one) for one in sets), default=1)
    table = np.full((len(sets), max(width, 1)), NO_TARGET, dtype=np.int64)
    for row, one in zip(table, sets, strict=True):
        row[: len(one)] = one
    return table


def row_blocks(n: int, k: int) -> Iterator[slice]:
    """Slices of n rows of k values. They bound the memory of float64 copies."""
    rows = max(1, BLOCK_VALUES // max(k, 1))
    return (slice(start, min(start + rows, n)) for start in range(0, n, rows))


def target_values(values: Floats, targets: Ints) -> NDArray[np.float64]:
    """(n, K), (n, M) -> (n, M): the values at the targets, minus infinity at padding."""
    found = np.take_along_axis(values, np.maximum(targets, 0), axis=1)
    return np.where(targets == NO_TARGET, -np.inf, found)


def log_softmax(z: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, K) -> (n, K), in nats."""
    # Subtract the maximum first: exp of a large logit overflows.
    shifted = z - z.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def log_total(logits: Floats, temperature: float) -> NDArray[np.float64]:
    """(n, K) -> (n,): log of the sum of exp(logits / temperature), in float64."""
    total = np.empty(len(logits))
    for rows in row_blocks(*logits.shape):
        total[rows] = _logsumexp(logits[rows].astype(np.float64) / temperature)
    return total


def _target_table(targets: ArrayLike) -> Ints:
    table = np.asarray(targets, dtype=np.int64)
    return table[:, None] if table.ndim == 1 else table


def _logsumexp(log_p: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, M) -> (n,)."""
    if log_p.shape[1] == 1:  # exact: log(exp(x)) would round
        return log_p[:, 0]
    top = log_p.max(axis=1, keepdims=True)
    return np.asarray(top[:, 0] + np.log(np.exp(log_p - top).sum(axis=1)))


@dataclass(frozen=True)
class SingleLabelMetrics:
    """Metrics of single-label images.

    Attributes:
        top1, top5: accuracy in 0..1. Of K equal logits top5 counts 5 / K of a hit, and top1 counts
            the first one, which is the class that `predict` gives.
        top1_restricted: accuracy if only the classes of the data may be predicted.
        loss: mean cross-entropy in nats.
        ece: expected calibration error, see `expected_calibration_error`.
    """

    images: int
    top1: float
    top5: float
    top1_restricted: float
    loss: float
    ece: float

    def to_json(self) -> dict[str, Any]:
        """Values by their JSON keys."""
        return asdict(self)


def single_label_metrics(
    scores: ImageScores, restricted: Bools | None = None
) -> SingleLabelMetrics:
    """Average over images; `restricted` (n,) is correctness among the classes of the data."""
    top1 = float(scores.correct.mean())
    return SingleLabelMetrics(
        images=len(scores),
        top1=top1,
        top5=float(scores.top5_correct.mean()),
        top1_restricted=top1 if restricted is None else float(restricted.mean()),
        loss=float(scores.loss.mean()),
        ece=expected_calibration_error(scores.confidence, scores.correct),
    )


def confusion_matrix(labels: Ints, predicted: Ints, num_classes: int) -> Ints:
    """(n,) true and (n,) predicted classes -> (K, K) counts: rows true, columns predicted."""
    # NumPy, because an import of sklearn.metrics takes 2 s of a CPU at the end of each short run.
    known = (labels < num_classes) & (predicted < num_classes)
    cells = np.bincount(labels[known] * num_classes + predicted[known], minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)  # (K, K)


def single_label_per_class(labels: Ints, predicted: Ints, names: Sequence[str]) -> PerClass:
    """Precision, recall, F1 and number of images for each class that has images.

    `predicted` may be larger than every class number: the model predicts a class that the data do
    not have. The precision of a class that is never predicted is 0.
    """
    size = 1 + max(labels.max(initial=0), predicted.max(initial=0))
    images, chosen, hits = (
        np.bincount(values, minlength=size).tolist()
        for values in (labels, predicted, labels[labels == predicted])
    )
    return {
        names[k]: {
            "precision": hits[k] / max(chosen[k], 1),
            "recall": hits[k] / images[k],
            "f1": 2 * hits[k] / (images[k] + chosen[k]),
            "images": images[k],
        }
        for k in np.flatnonzero(images).tolist()  # a class without images has no recall
    }


@dataclass(frozen=True)
class MultiLabelMetrics:
    """Metrics of images with any number of labels.

    Attributes:
        map: mean average precision over the classes that have images.
        micro_f1: F1 of all n x K decisions, at a probability of 0.5 or at thresholds per class.
        loss: binary cross-entropy in nats, summed over classes, mean over images.
        average_precision: (K,) average precision; NaN for a class that has no image.
    """

    images: int
    map: float
    micro_f1: float
    loss: float
    average_precision: Floats = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Values by their JSON keys."""
        return {
            "images": self.images,
            "map": None if np.isnan(self.map) else self.map,  # no image has a label
            "micro_f1": self.micro_f1,
            "loss": self.loss,
        }


def multi_label_metrics(
    probabilities: Floats, targets: NDArray[np.uint8], thresholds: ArrayLike = THRESHOLD
) -> MultiLabelMetrics:
    """(n, K) probabilities and (n, K) targets of 0 and 1 -> metrics; (K,) thresholds.

    Average precision follows scikit-learn: the mean of the precision at each threshold, weighted
    by the recall that the threshold adds, without interpolation.
    """
    from sklearn.metrics import average_precision_score

    # Average precision is not defined without a positive; such a class is left out of the mean.
    positives = targets.sum(axis=0, dtype=np.int64)
    average_precision = np.full(targets.shape[1], np.nan)
    for k in np.flatnonzero(positives):
        average_precision[k] = average_precision_score(targets[:, k], probabilities[:, k])
    decided = probabilities >= np.asarray(thresholds)
    hits = int((decided & (targets == 1)).sum())
    # F1 = 2 TP / (2 TP + FP + FN), and the denominator is all decisions plus all positives.
    total = int(decided.sum()) + int(positives.sum())
    return MultiLabelMetrics(
        images=len(targets),
        map=float(np.nanmean(average_precision)) if positives.any() else float("nan"),
        micro_f1=2 * hits / total if total else 0.0,
        loss=multi_label_loss(probabilities, targets),
        average_precision=average_precision,
    )


def multi_label_loss(probabilities: Floats, targets: NDArray[np.uint8]) -> float:
    """Binary cross-entropy in nats, summed over classes, mean over images."""
    import torch

    # torch limits log(0) to -100, so that one certain mistake does not make the mean infinite.
    p, y = (torch.from_numpy(np.asarray(a, dtype=np.float64)) for a in (probabilities, targets))
    loss = torch.nn.functional.binary_cross_entropy(p, y, reduction="sum")
    return float(loss) / len(targets)


def multi_label_per_class(
    probabilities: Floats,
    targets: NDArray[np.uint8],
    metrics: MultiLabelMetrics,
    names: Sequence[str],
    thresholds: ArrayLike = THRESHOLD,
) -> PerClass:
    """Average precision, precision, recall, F1 at the thresholds, number of images, per class.

    Without an image of the class, all but the precision are None, and `undefined` says why.
    """
    from sklearn.metrics import precision_recall_fscore_support

    decided = probabilities >= np.asarray(thresholds)
    images = targets.sum(axis=0, dtype=np.int64)
    precision, recall, f1, _ = precision_recall_fscore_support(
        targets, decided, average=None, zero_division=0
    )
    return {
        name: {
            "average_precision": float(metrics.average_precision[k]) if images[k] else None,
            "precision": float(precision[k]),
            "recall": float(recall[k]) if images[k] else None,
            "f1": float(f1[k]) if images[k] else None,
            "images": int(images[k]),
            **({} if images[k] else {"undefined": "no image has this label"}),
        }
        for k, name in enumerate(names)
    }


@dataclass(frozen=True)
class ReliabilityBins:
    """Images grouped by confidence, in bins of equal width. A bin includes its upper edge.

    Attributes:
        edges: (bins + 1,) confidence at the edges.
        images: (bins,) number of images.
        confidence, accuracy: (bins,) means; NaN for an empty bin.
    """

    edges: Floats
    images: Ints
    confidence: Floats
    accuracy: Floats

    def to_json(self) -> list[dict[str, float | int]]:
        """One row for each bin that is not empty."""
        return [
            {
                "from": float(self.edges[i]),
                "to": float(self.edges[i + 1]),
                "images": int(self.images[i]),
                "confidence": float(self.confidence[i]),
                "accuracy": float(self.accuracy[i]),
            }
            for i in np.flatnonzero(self.images)
        ]


def confidence_bins(confidence: Floats, bins: int = ECE_BINS) -> Ints:
    """(n,) confidence in 0..1 -> (n,) bin numbers."""
    edges = np.linspace(0, 1, bins + 1)
    return np.clip(np.digitize(confidence, edges[1:-1], right=True), 0, bins - 1).astype(np.int64)


def expected_calibration_error(confidence: Floats, correct: Bools, bins: int = ECE_BINS) -> float:
    """Mean of |accuracy - confidence| over equal-width bins, weighted by their images.

    Guo et al. (2017), equation 3, on the predicted class.
    """
    # n_b / n * |accuracy_b - confidence_b| is |sum of (correct - confidence) in the bin| / n.
    gap = correct.astype(np.float64) - confidence
    sums = np.bincount(confidence_bins(confidence, bins), weights=gap, minlength=bins)
    return float(np.abs(sums).sum() / len(confidence))


def reliability_bins(confidence: Floats, correct: Bools, bins: int = ECE_BINS) -> ReliabilityBins:
    """Bins of the reliability diagram (Guo et al., 2017, figure 1)."""
    place = confidence_bins(confidence, bins)
    images = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):  # 0 / 0 in an empty bin is NaN on purpose
        means = [
            np.bincount(place, weights=values.astype(np.float64), minlength=bins) / images
            for values in (confidence, correct)
        ]
    return ReliabilityBins(np.linspace(0, 1, bins + 1), images.astype(np.int64), *means)

"""Figures for images with any number of labels: average precision, F1 at one half.

A model on images with any number of labels.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from vitcli.data.image_set import ImageSet
from vitcli.evals.bootstrap import Intervals, Ranked, map_draws, percentiles
from vitcli.evals.evaluate import Calibration
from vitcli.evals.features import Extracted
from vitcli.progress import Watcher
from vitcli.weights.loaded import LoadedModel

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


@dataclass(frozen=True)
class LabelsEvaluation:
    """Figures of images with any number of labels, over every readable image.

    Attributes:
        metrics: over the data's classes.
        loss: binary cross-entropy in nats, summed over the data's classes, mean over images.
        broken: images that could not be read.
        draws: (R,) the mean average precision of resampled images.
        identity, indices: of the set, and which of its images these are.
    """

    model: str
    data: str
    split: str
    metrics: MultiLabelMetrics
    loss: float
    classes: tuple[str, ...]
    broken: tuple[str, ...]
    temperature: float
    draws: NDArray[np.float64]
    seed: int
    indices: NDArray[np.int64]
    identity: str
    calibration: Calibration | None = None

    @property
    def exit_code(self) -> int:
        """3 when some images could not be read."""
        return 3 if self.broken else 0

    @property
    def intervals(self) -> Intervals:
        """Of the mean average precision."""
        return Intervals(len(self.draws), self.seed, {"map": percentiles(self.draws)})

    @property
    def per_class(self) -> dict[str, dict[str, float | int | None]]:
        """Class name -> average precision (None where no image has it), precision, recall and F1
        of the answers at one half, and number of images.
        """
        m = self.metrics
        return {
            name: {
                "average_precision": float(m.per_class[k]) if m.positives[k] else None,
                "precision": float(m.precision[k]),
                "recall": float(m.recall[k]),
                "f1": float(m.f1[k]),
                "images": int(m.positives[k]),
            }
            for k, name in enumerate(self.classes)
        }

    def to_json(self) -> dict[str, Any]:
        """The object of `evaluate --json`."""
        return {
            "model": self.model,
            "data": self.data,
            "split": self.split,
            "images": self.metrics.images,
            "map": self.metrics.map,
            "micro_f1": self.metrics.micro_f1,
            "loss": self.loss,
            "temperature": self.temperature,
            "intervals": self.intervals.to_json(),
            **({"calibration": asdict(self.calibration)} if self.calibration else {}),
            "per_class": self.per_class,
            "unreadable": list(self.broken),
        }


def evaluate_labels(
    net: LoadedModel,
    found: Extracted,
    known: NDArray[np.int64],
    images: ImageSet,
    *,
    model: str,
    data: str,
    identity: str,
    seed: int,
    watch: Watcher,
) -> LabelsEvaluation:
    """The figures of images with any number of labels.

    Args:
        known: (K,) which outputs of the model stand for the data's classes.
        identity: of the set, see `LabelsEvaluation`.
        seed: of the resampling.
    """
    if net.head_activation != "sigmoid":
        watch.warn(f"`{model}` was trained for one class an image: its shares compete")
    scores = net.probabilities(torch.from_numpy(found.outputs))[:, known].numpy()
    metrics = measure_labels(scores, found.labels)
    ranked = Ranked(scores, found.labels)
    return LabelsEvaluation(
        model=model,
        data=data,
        split=images.name,
        metrics=metrics,
        loss=labels_loss(net, found, known),
        classes=images.classes,
        broken=found.broken,
        temperature=net.temperature,
        draws=map_draws(ranked, seed=seed, watch=watch),
        seed=seed,
        indices=found.indices,
        identity=identity,
    )


def labels_loss(net: LoadedModel, found: Extracted, known: NDArray[np.int64]) -> float:
    """Binary cross-entropy in nats, summed over the data's classes, mean over images."""
    scores = net.probabilities(torch.from_numpy(found.outputs))[:, known]
    targets = torch.from_numpy(found.labels).double()
    loss = nn.functional.binary_cross_entropy(scores, targets, reduction="sum")
    return float(loss) / len(targets)

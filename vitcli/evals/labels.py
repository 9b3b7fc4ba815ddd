"""A model on images with any number of labels."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from vitcli.data.image_set import ImageSet
from vitcli.evals.bootstrap import Intervals, Ranked, map_draws, percentiles
from vitcli.evals.evaluation import Calibration
from vitcli.evals.features import Extracted
from vitcli.evals.multilabel import MultiLabelMetrics, measure_labels
from vitcli.progress import Watcher
from vitcli.vit import Model


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
    net: Model,
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


def labels_loss(net: Model, found: Extracted, known: NDArray[np.int64]) -> float:
    """Binary cross-entropy in nats, summed over the data's classes, mean over images."""
    scores = net.probabilities(torch.from_numpy(found.outputs))[:, known]
    targets = torch.from_numpy(found.labels).double()
    loss = nn.functional.binary_cross_entropy(scores, targets, reduction="sum")
    return float(loss) / len(targets)

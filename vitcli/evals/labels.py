"""A model on images with any number of labels."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from vitcli.data.sets import ImageSet
from vitcli.evals.features import Extracted
from vitcli.evals.multilabel import MultiLabelMetrics, measure_labels
from vitcli.vit import Model
from vitcli.watch import Watcher


@dataclass(frozen=True)
class LabelsEvaluation:
    """Figures of images with any number of labels, over every readable image.

    Attributes:
        metrics: over the data's classes.
        loss: binary cross-entropy in nats, summed over the data's classes, mean over images.
        broken: images that could not be read.
    """

    model: str
    data: str
    split: str
    metrics: MultiLabelMetrics
    loss: float
    classes: tuple[str, ...]
    broken: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """3 when some images could not be read."""
        return 3 if self.broken else 0

    @property
    def per_class(self) -> dict[str, dict[str, float | int | None]]:
        """Class name -> average precision (None where no image has it) and number of images."""
        figures = zip(self.classes, self.metrics.per_class, self.metrics.positives, strict=True)
        return {
            name: {"average_precision": float(ap) if count else None, "images": int(count)}
            for name, ap, count in figures
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
            "per_class": self.per_class,
            "unreadable": list(self.broken),
        }


def evaluate_labels(
    net: Model,
    found: Extracted,
    known: NDArray[np.int64],
    model: str,
    data: str,
    images: ImageSet,
    watch: Watcher,
) -> LabelsEvaluation:
    """The figures of images with any number of labels.

    Args:
        known: (K,) which outputs of the model stand for the data's classes.
    """
    if net.head_activation != "sigmoid":
        watch.warn(f"`{model}` was trained for one class an image: its shares compete")
    logits = torch.from_numpy(found.outputs)
    scores = net.probabilities(logits)[:, known]
    targets = torch.from_numpy(found.labels)
    loss = nn.functional.binary_cross_entropy(scores, targets.double(), reduction="sum")
    metrics = measure_labels(scores.numpy(), found.labels)
    per_image = float(loss) / metrics.images
    return LabelsEvaluation(
        model, data, images.name, metrics, per_image, images.classes, found.broken
    )

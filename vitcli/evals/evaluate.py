"""What `evaluate` finds of images that have one class each.

Which images of DATA a model is measured on.
"""

from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitcli.config.schema import Inference
from vitcli.data.image_set import ImageSet
from vitcli.data.source import Source, open_data
from vitcli.errors import VitcliError
from vitcli.evals.bootstrap import Intervals, intervals
from vitcli.evals.calibration import Reliability, reliability
from vitcli.evals.class_matching import Matching
from vitcli.evals.features import Extracted
from vitcli.evals.metrics import Metrics, confusion_matrix, per_class, summarise
from vitcli.evals.mistakes import Mistakes, find_mistakes
from vitcli.evals.scoring import NONE, Outcomes, best_among, filled_up, judge
from vitcli.progress import Watcher
from vitcli.run import Run
from vitcli.vit import Model

OTHER = "(another class)"


@dataclass(frozen=True)
class Calibration:
    """A temperature that was fitted on images which are not reported.

    Attributes:
        temperature: what the logits are divided by from now on.
        split: which images it was fitted on, in words.
        images: how many.
        loss_before, ece_before: of the reported images under the temperature before.
        stored: the weights file that carries it now.
    """

    temperature: float
    split: str
    images: int
    loss_before: float
    ece_before: float | None
    stored: str


@dataclass(frozen=True)
class Real:
    """Accuracy by all classes that people saw; images in which they saw none are skipped."""

    images: int
    skipped: int
    top1: float
    top5: float


@dataclass(frozen=True)
class Evaluation:
    """Figures over every readable image, each counted once.

    Attributes:
        metrics: over all classes that the model knows.
        top1_restricted: accuracy when only the data's classes can be answered.
        per_class: class name -> precision, recall, f1, images.
        confusion: (K, K) or (K, K + 1) counts, rows true; the last column of K + 1 is answers
            outside of the data's classes.
        broken: images that could not be read.
        correct, indices: (n,) whether an image is right, and which of the set it is.
        identity: of the set; two evaluations of the same one can be paired.
        words: name of a class -> what the model calls it, where that says more.
        uncalibrated: the bins before the calibration, where there was one.
        files: what was written: `confusion`, `confusion_picture`, `reliability`, `mistakes`.
    """

    model: str
    data: str
    split: str
    metrics: Metrics
    top1_restricted: float
    per_class: dict[str, dict[str, float | int]]
    classes: tuple[str, ...]
    confusion: NDArray[np.int64]
    broken: tuple[str, ...]
    temperature: float
    intervals: Intervals
    reliability: Reliability
    mistakes: Mistakes
    correct: NDArray[np.bool_]
    indices: NDArray[np.int64]
    identity: str
    words: dict[str, str]
    real: Real | None = None
    calibration: Calibration | None = None
    uncalibrated: Reliability | None = None
    files: dict[str, str] | None = None

    @property
    def exit_code(self) -> int:
        """3 when some images could not be read."""
        return 3 if self.broken else 0

    @property
    def confusion_file(self) -> str | None:
        """The CSV that holds the confusion matrix; a picture lies beside it."""
        return (self.files or {}).get("confusion")

    @property
    def columns(self) -> list[str]:
        """What the columns of `confusion` stand for."""
        return [*self.classes, OTHER][: self.confusion.shape[1]]

    def to_json(self) -> dict[str, Any]:
        """The object of `evaluate --json`."""
        files = self.files or {}
        return {
            "model": self.model,
            "data": self.data,
            "split": self.split,
            "images": self.metrics.images,
            "top1": self.metrics.top1,
            "top5": self.metrics.top5,
            "top1_restricted": self.top1_restricted,
            "loss": self.metrics.loss,
            "ece": self.metrics.ece,
            "temperature": self.temperature,
            "intervals": self.intervals.to_json(),
            **({"real": asdict(self.real)} if self.real else {}),
            **({"calibration": asdict(self.calibration)} if self.calibration else {}),
            "per_class": self.per_class,
            "reliability": self.reliability.to_json(),
            "worst": [one.to_json() for one in self.mistakes.worst],
            "confused": [pair.to_json() for pair in self.mistakes.confused],
            "confusion": files.get("confusion"),
            "confusion_picture": files.get("confusion_picture"),
            "reliability_picture": files.get("reliability"),
            "mistakes_picture": files.get("mistakes"),
            "unreadable": list(self.broken),
        }


def evaluate_images(
    net: Model,
    found: Extracted,
    matching: Matching,
    images: ImageSet,
    *,
    model: str,
    data: str,
    identity: str,
    real: NDArray[np.int64] | None,
    seed: int,
    watch: Watcher,
) -> Evaluation:
    """The figures of images that have one class each.

    Args:
        found: the logits; its labels point into `matching.classes`.
        real: (n, M) the right outputs by ReaL, -1 where there is none.
        identity: of the set, see `Evaluation`.
        seed: of the resampling.
    """
    answers = filled_up(matching.outputs)[found.labels]  # (n, M)
    outcomes = judge(found.outputs, answers, net.temperature)
    known = matching.known
    restricted = (best_among(found.outputs, known)[:, None] == answers).any(axis=1)
    # An output may stand for several classes; where one of them is the right one, it is that.
    predicted = np.where(outcomes.correct, found.labels, matching.class_of(outcomes.predicted))
    more = len(known) < outcomes.outputs
    number = len(matching.classes)
    shares: dict[str, Any] = {"top1_restricted": restricted}
    by_real = None
    if real is not None:
        by_real, shares["top1_real"] = _by_real(found, real)
    return Evaluation(
        model=model,
        data=data,
        split=images.name,
        metrics=summarise(outcomes),
        top1_restricted=float(restricted.mean()),
        per_class=per_class(found.labels, predicted, matching.classes),
        classes=matching.classes,
        confusion=confusion_matrix(found.labels, predicted, number + more)[:number],
        broken=found.broken,
        temperature=net.temperature,
        intervals=intervals(outcomes, shares, seed=seed, watch=watch),
        reliability=reliability(outcomes.confidence, outcomes.correct),
        mistakes=find_mistakes(
            outcomes,
            images,
            found.indices,
            found.labels,
            matching.classes,
            _names(net, matching, outcomes, predicted),
        ),
        correct=outcomes.correct,
        indices=found.indices,
        identity=identity,
        words=dict(zip(matching.classes, matching.words or (), strict=False)),
        real=by_real,
    )


def _by_real(found: Extracted, real: NDArray[np.int64]) -> tuple[Real, NDArray[np.float64]]:
    """Accuracies, and (n,) whether an image is right, NaN of those that have no label."""
    there = (real != NONE).any(axis=1)
    outcomes = judge(found.outputs[there], real[there])
    right = np.full(len(real), np.nan)
    right[there] = outcomes.correct
    top1, top5 = float(outcomes.correct.mean()), float(outcomes.in_five.mean())
    return Real(len(outcomes), int((~there).sum()), top1, top5), right


def _names(
    net: Model, matching: Matching, outcomes: Outcomes, predicted: NDArray[np.int64]
) -> list[str]:
    """(n,) what each image was taken for: a class of the data, else one of the model's."""
    labels = net.labels or tuple(str(i) for i in range(outcomes.outputs))
    known = len(matching.classes)
    return [
        matching.classes[label] if label < known else labels[output]
        for label, output in zip(predicted.tolist(), outcomes.predicted.tolist(), strict=True)
    ]


def choose_images(
    data: str, model: str, inference: Inference, watch: Watcher
) -> tuple[Source, ImageSet]:
    """The data's test images, else its validation images, else all of them.

    On a run that was trained on a part of the data: what the run had held out, split as the run's
    recipe says.
    """
    section = inference.data
    whole = open_data(section, data, whole=True, watch=watch, streams=True)
    if section.streaming:
        return whole, whole.split("test", "validation")
    run = Run(Path(model))
    if run.recipe_file.is_file():
        known = run.provenance().get("data", {}).get("fingerprint")
        for split in (section, run.data_section()):
            with suppress(VitcliError):  # the run's data may have other columns and splits
                source = open_data(split, data) if split is not None else whole
                if source.fingerprint == known:
                    return source, source.split("test", "validation", "train")
    if set(whole.splits) != {"train"}:
        return whole, whole.split("test", "validation")
    return whole, whole.split("train")

"""Evaluate one model on one labelled split: metrics, intervals, calibration, mistakes."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vitcli.data.image_set import ImageSet
from vitcli.evals.calibration import Calibration, Fit
from vitcli.evals.class_averages import (
    ClassAverages,
    multi_label_averages,
    single_label_averages,
)
from vitcli.evals.class_matching import ClassMatching
from vitcli.evals.features import Extracted
from vitcli.evals.intervals import (
    CalibrationError,
    Intervals,
    LeaveOneOut,
    calibration_error,
    multi_label_intervals,
    single_label_intervals,
)
from vitcli.evals.mistakes import NUM_WORST, Mistakes, find_mistakes
from vitcli.evals.real_labels import RealAccuracy, real_accuracy
from vitcli.evals.regression import (
    PredictedNumbers,
    RegressionMetrics,
    regression_intervals,
    regression_metrics,
)
from vitcli.evals.scoring import (
    THRESHOLD,
    Floats,
    ImageScores,
    MultiLabelMetrics,
    PerClass,
    ReliabilityBins,
    SingleLabelMetrics,
    confusion_matrix,
    expected_calibration_error,
    log_total,
    multi_label_loss,
    multi_label_metrics,
    multi_label_per_class,
    pad_targets,
    reliability_bins,
    restricted_argmax,
    score_logits,
    single_label_metrics,
    single_label_per_class,
)
from vitcli.evals.thresholds import FittedThresholds, decision_figures
from vitcli.progress import Watcher
from vitcli.weights.loaded import LoadedModel

OTHER_CLASS = "(another class)"


@dataclass(frozen=True)
class SingleLabelDetails:
    """What an evaluation of single-label images has besides metrics.

    Attributes:
        num_outputs: K, how many outputs the model has.
        correct: (n,) whether each image is classified correctly.
        confusion: (K, K) or (K, K + 1) counts, rows true; an extra last column counts predictions
            of classes that the data do not have.
        display_names: class name -> the model's name of it, where the data have only codes.
        uncalibrated: reliability under the previous temperature, after a calibration.
    """

    num_outputs: int
    correct: NDArray[np.bool_]
    confusion: NDArray[np.int64]
    reliability: ReliabilityBins
    mistakes: Mistakes
    display_names: dict[str, str]
    calibration_error: CalibrationError
    real: RealAccuracy | None = None
    uncalibrated: ReliabilityBins | None = None


@dataclass(frozen=True)
class Evaluation:
    """Results of one model on every readable image of a split, each image counted once.

    Attributes:
        per_class: class name -> precision, recall, F1, ROC-AUC, average precision, images.
        averages: figures averaged over classes; None for a regression.
        broken: descriptions of the images that could not be read.
        indices: (n,) images of the split that were measured.
        identity: identifies the split; evaluations with the same identity can be paired.
        details: None for multi-label images and for a regression.
        numbers: true and predicted numbers of a regression, else None.
        leave_out: mean average precision without each image; None for single-label images.
        worst: the images of a regression with the largest errors.
        files: files that are written: `confusion`, `confusion_picture`, `reliability`, `mistakes`.
    """

    model: str
    data: str
    split: str
    metrics: SingleLabelMetrics | MultiLabelMetrics | RegressionMetrics
    per_class: PerClass
    classes: tuple[str, ...]
    broken: tuple[str, ...]
    temperature: float
    intervals: Intervals
    indices: NDArray[np.int64]
    identity: str
    details: SingleLabelDetails | None = None
    averages: ClassAverages | None = None
    leave_out: LeaveOneOut | None = None
    calibration: Calibration | None = None
    thresholds: FittedThresholds | None = None
    numbers: PredictedNumbers | None = None
    worst: tuple[dict[str, Any], ...] = ()
    files: dict[str, str] = field(default_factory=dict)

    @property
    def confusion_columns(self) -> list[str]:
        """Names of the columns of `details.confusion`."""
        assert self.details is not None
        return [*self.classes, OTHER_CLASS][: self.details.confusion.shape[1]]

    def to_json(self) -> dict[str, Any]:
        """The object of `evaluate --json`."""
        details, files = self.details, self.files
        found: dict[str, Any] = {
            "model": self.model,
            "data": self.data,
            "split": self.split,
            **self.metrics.to_json(),
            **(self.averages.to_json() if self.averages is not None else {}),
            "temperature": self.temperature,
            "intervals": self.intervals.to_json(),
        }
        if self.numbers is not None:
            found["target"] = self.numbers.name
            found |= {"worst": list(self.worst), "scatter": files.get("scatter")}
            return found | {"unreadable": list(self.broken)}
        if details is not None:
            found |= details.calibration_error.to_json()
        if self.leave_out is not None:
            defined = np.isfinite(self.leave_out.corrected)
            found["map_debiased"] = self.leave_out.corrected if defined else None
        if details is not None and details.real is not None:
            found["real"] = asdict(details.real)
        if self.calibration is not None:
            found["calibration"] = asdict(self.calibration)
        if self.thresholds is not None:
            found["thresholds"] = asdict(self.thresholds)
        found["per_class"] = self.per_class
        if details is not None:
            found |= {
                "reliability": details.reliability.to_json(),
                "worst": [one.to_json() for one in details.mistakes.worst],
                "confused": [pair.to_json() for pair in details.mistakes.confused],
                "confusion": files.get("confusion"),
                "confusion_picture": files.get("confusion_picture"),
                "reliability_picture": files.get("reliability"),
                "mistakes_picture": files.get("mistakes"),
            }
        return found | {"unreadable": list(self.broken)}


def evaluate_numbers(
    net: LoadedModel,
    extracted: Extracted,
    images: ImageSet,
    *,
    model: str,
    data: str,
    identity: str,
    seed: int = 0,
) -> Evaluation:
    """The errors of a regression on a split; `extracted` holds the outputs of the network."""
    predicted = net.target_scale.restore(torch.from_numpy(extracted.outputs[:, 0])).numpy()
    name = net.labels[0] if net.labels else images.classes[0]
    numbers = PredictedNumbers(name, extracted.labels, predicted)
    largest = np.argsort(-numbers.errors, kind="stable")[:NUM_WORST].tolist()
    return Evaluation(
        model=model,
        data=data,
        split=images.name,
        metrics=regression_metrics(numbers.targets, predicted),
        per_class={},
        classes=images.classes,
        broken=extracted.broken,
        temperature=net.temperature,
        intervals=regression_intervals(numbers.targets, predicted, seed),
        indices=extracted.indices,
        identity=identity,
        numbers=numbers,
        worst=tuple(
            {
                "path": images.describe(int(extracted.indices[i])),
                "target": float(numbers.targets[i]),
                "value": float(predicted[i]),
            }
            for i in largest
        ),
    )


@dataclass(frozen=True)
class Evaluator:
    """Turns the logits of a model on a split into an `Evaluation`.

    Attributes:
        extracted: logits and labels; the labels index `matching.classes`.
        identity: see `Evaluation`.
        real: (n, M) right outputs by ReaL, -1 where there is none.
        fitted: what of `net` was fitted for this evaluation.
        seed: seed of the simulated calibration error.
    """

    net: LoadedModel
    extracted: Extracted
    matching: ClassMatching
    images: ImageSet
    model: str
    data: str
    identity: str
    real: NDArray[np.int64] | None
    fitted: Fit | None
    seed: int
    watch: Watcher

    def run(self) -> Evaluation:
        """Compute everything that does not need the disk."""
        parts = self._multi_label() if self.images.targets is not None else self._single_label()
        return Evaluation(
            model=self.model,
            data=self.data,
            split=self.images.name,
            classes=self.matching.classes,
            broken=self.extracted.broken,
            temperature=self.net.temperature,
            indices=self.extracted.indices,
            identity=self.identity,
            **parts,
        )

    def _single_label(self) -> dict[str, Any]:
        logits, labels, matching = self.extracted.outputs, self.extracted.labels, self.matching
        targets = pad_targets(matching.outputs)[labels]  # (n, M)
        scores = score_logits(logits, targets, self.net.temperature)
        # A model of 1,000 classes on data with 10 of them: top-1 counts a prediction of another
        # class as wrong; the restricted accuracy asks only which of the 10 scores highest.
        allowed = matching.all_outputs
        restricted = (restricted_argmax(logits, allowed)[:, None] == targets).any(axis=1)
        # One output may stand for several classes. If the image has one of them, count that one.
        other = matching.to_data_classes(scores.predicted)
        predicted = np.where(scores.correct, labels, other)
        num_classes = len(matching.classes)
        # The confusion matrix has one column more if the model can predict other classes.
        num_columns = num_classes + (len(allowed) < scores.num_outputs)
        means: dict[str, Any] = {"top1_restricted": restricted}
        real = None
        if self.real is not None:
            real, means["top1_real"] = real_accuracy(logits, self.real)
        # Score the reported images under the old temperature as well, so that the gain is measured
        # on images that the fit has not seen.
        calibration, uncalibrated = None, None
        if self.fitted is not None and self.fitted.temperature is not None:
            before = score_logits(logits, targets, self.fitted.temperature)
            ece_before = expected_calibration_error(before.confidence, before.correct)
            calibration = self._calibration(self.fitted, float(before.loss.mean()), ece_before)
            uncalibrated = reliability_bins(before.confidence, before.correct)
        names = self._predicted_names(scores, predicted)
        error = calibration_error(scores.confidence, scores.correct, self.seed)
        averages = single_label_averages(
            labels,
            predicted,
            matching.classes,
            partial(self._column, log_total(logits, self.net.temperature)),
            single_label_per_class(labels, predicted, matching.classes),
            binary=num_classes == scores.num_outputs == 2,
        )
        return {
            "metrics": single_label_metrics(scores, restricted),
            "averages": averages,
            "per_class": averages.per_class,
            "intervals": single_label_intervals(scores, means, error).merged(averages.intervals),
            "calibration": calibration,
            "details": SingleLabelDetails(
                num_outputs=scores.num_outputs,
                correct=scores.correct,
                confusion=confusion_matrix(labels, predicted, num_columns)[:num_classes],
                reliability=reliability_bins(scores.confidence, scores.correct),
                mistakes=find_mistakes(scores, self.images, self.extracted, matching, names),
                calibration_error=error,
                display_names=dict(
                    zip(matching.classes, matching.display_names or (), strict=False)
                ),
                real=real,
                uncalibrated=uncalibrated,
            ),
        }

    def _multi_label(self) -> dict[str, Any]:
        if self.net.head_activation != "sigmoid":
            self.watch.warn(
                f"`{self.model}` was trained on single-label images: its probabilities sum to 1, "
                "so only one class per image can be likely"
            )
        probabilities = self._probabilities(self.net.temperature)
        targets, names = self.extracted.labels, self.matching.classes
        thresholds = self._thresholds(self.net.thresholds)
        metrics = multi_label_metrics(probabilities, targets, thresholds)
        calibration = None
        if self.fitted is not None and self.fitted.temperature is not None:
            loss = multi_label_loss(self._probabilities(self.fitted.temperature), targets)
            calibration = self._calibration(self.fitted, loss, None)
        per_class = multi_label_per_class(probabilities, targets, metrics, names, thresholds)
        if self.net.thresholds is not None:
            for row, threshold in zip(per_class.values(), thresholds.tolist(), strict=True):
                row["threshold"] = threshold
        averages = multi_label_averages(
            targets,
            probabilities >= thresholds,
            names,
            lambda k: (probabilities[:, k], targets[:, k]),
            per_class,
        )
        leave_out = averages.leave_out  # `comparison` subtracts those of two models
        intervals = multi_label_intervals(probabilities, targets, leave_out, names, thresholds)
        return {
            "metrics": metrics,
            "averages": averages,
            "per_class": averages.per_class,
            "intervals": intervals.merged(averages.intervals),
            "leave_out": leave_out,
            "calibration": calibration,
            "thresholds": self._fitted_thresholds(),
        }

    def _fitted_thresholds(self) -> FittedThresholds | None:
        """The new thresholds, and the figures of the reported images under the previous ones."""
        fitted = self.fitted
        if fitted is None or fitted.rule is None:
            return None
        # The previous decisions used the previous temperature, if there is a new one.
        before = self.net.temperature if fitted.temperature is None else fitted.temperature
        macro_f1, micro_f1 = decision_figures(
            self._probabilities(before), self.extracted.labels, self._thresholds(fitted.thresholds)
        )
        return FittedThresholds(
            str(fitted.rule), fitted.split, fitted.images, macro_f1, micro_f1, str(fitted.file)
        )

    def _thresholds(self, stored: Sequence[float] | None) -> NDArray[np.float64]:
        """(K,) thresholds of the data's classes."""
        if stored is None:
            return np.full(len(self.matching.classes), THRESHOLD)
        return np.array(stored)[self.matching.first_outputs]

    def _column(self, totals: NDArray[np.float64], k: int) -> tuple[Floats, NDArray[np.bool_]]:
        """(n,) probabilities of class k, which may be several outputs, and (n,) its images."""
        logits = self.extracted.outputs[:, list(self.matching.outputs[k])].astype(np.float64)
        # Exponentials of log-probabilities: the column of one class, without an (n, K) table.
        p = np.exp(logits / self.net.temperature - totals[:, None]).sum(axis=1)
        return p, self.extracted.labels == k

    def _probabilities(self, temperature: float) -> NDArray[np.float64]:
        """(n, K) of the data's classes, by the activation that the head was trained with."""
        # A softmax head is normalised over all its outputs, before the data's classes are taken.
        z = torch.from_numpy(self.extracted.outputs).double() / temperature
        p = z.sigmoid() if self.net.head_activation == "sigmoid" else z.softmax(dim=1)
        return np.asarray(p[:, self.matching.first_outputs].numpy())

    def _calibration(self, fitted: Fit, loss: float, error: float | None) -> Calibration:
        return Calibration(
            temperature=self.net.temperature,
            split=fitted.split,
            images=fitted.images,
            loss_before=loss,
            ece_before=error,
            stored=str(fitted.file),
        )

    def _predicted_names(self, scores: ImageScores, predicted: NDArray[np.int64]) -> list[str]:
        """(n,) name of the predicted class: a class of the data, else one of the model."""
        labels = self.net.labels or tuple(str(i) for i in range(scores.num_outputs))
        classes = self.matching.classes
        return [
            classes[label] if label < len(classes) else labels[output]
            for label, output in zip(predicted.tolist(), scores.predicted.tolist(), strict=True)
        ]

"""Temperature scaling (Guo et al., 2017): fit a temperature, and store it with the weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitcli.data.image_set import ImageSet
from vitcli.data.source import Source
from vitcli.data.stratify import stratified_split
from vitcli.errors import VitcliError, counted
from vitcli.evals.class_matching import ClassMatching
from vitcli.evals.features import Extracted
from vitcli.evals.scoring import NO_TARGET, log_softmax, pad_targets, row_blocks, target_values
from vitcli.evals.thresholds import ThresholdRule
from vitcli.progress import Watcher
from vitcli.run import Run
from vitcli.weights.loaded import LoadedModel
from vitcli.weights.read import vitcli_weights_file
from vitcli.weights.store import read_header, save_model, update_header

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]

# Keys of the header of a weights file: the images of the fit.
TEMPERATURE_RECORD, THRESHOLDS_RECORD = "fitted_on", "thresholds_fitted_on"
MAX_TEMPERATURE = 1e4  # also limits the inverse
# Half: the fit has one parameter, but the reported metrics need images, too.
HELD_OUT_FRACTION = 0.5  # used for the fit if the data have no validation split


def fit_temperature(
    logits: Floats, targets: ArrayLike, activation: Literal["softmax", "sigmoid"] = "softmax"
) -> float:
    """Find the temperature T that minimises the cross-entropy of logits / T.

    Args:
        logits: (n, K).
        targets: for softmax (n,) right outputs or (n, M) as in `pad_targets`; for sigmoid (n, K)
            zeros and ones.
    """
    from scipy.optimize import brentq

    slope = _softmax_slope if activation == "softmax" else _sigmoid_slope
    of_inverse = slope(logits, np.asarray(targets))
    # The loss is convex in b = 1 / T, so its minimum is the root of the slope. Searching in log b
    # gives the same relative precision for every scale of logits.
    low, high = 1 / MAX_TEMPERATURE, MAX_TEMPERATURE
    # If the loss already rises at T = 10,000, the likeliest model ignores the logits.
    if of_inverse(low) >= 0:
        raise VitcliError(
            "no temperature makes these logits better than equal probabilities",
            "the logits carry no information about these images; check the class names and the "
            "preprocessing",
        )
    if of_inverse(high) <= 0:
        return 1 / high
    log_b = brentq(lambda x: of_inverse(float(np.exp(x))), np.log(low), np.log(high), xtol=1e-10)
    return float(np.exp(-log_b))


def _softmax_slope(logits: Floats, targets: NDArray[Any]) -> Callable[[float], float]:
    """d loss / d b: the mean logit under the model minus that of the right outputs."""
    right = targets.astype(np.int64)
    right = right[:, None] if right.ndim == 1 else right
    n, k = logits.shape
    # If every image is right, the loss falls for ever as T goes to 0. Platt (1999) aims at
    # (n + 1) / (n + 2) instead of 1, which keeps T finite.
    all_right = bool((right == logits.argmax(axis=1)[:, None]).any(axis=1).all())
    smoothing = 1 / (n + 2) if all_right else 0.0

    def slope(b: float) -> float:
        total = 0.0
        for rows in row_blocks(n, k):
            z = logits[rows].astype(np.float64)
            wanted = _right_logit(z, right[rows], b)
            if smoothing and k > 1:
                others = (z.sum(axis=1) - wanted) / (k - 1)
                wanted = (1 - smoothing) * wanted + smoothing * others
            total += float(((np.exp(log_softmax(b * z)) * z).sum(axis=1) - wanted).sum())
        return total / n

    return slope


def _sigmoid_slope(logits: Floats, targets: NDArray[Any]) -> Callable[[float], float]:
    y = targets.astype(np.float64)
    n, k = logits.shape
    if np.array_equal(logits > 0, y > 0.5):  # Platt's targets, as in `_softmax_slope`
        y = (y * n + 1) / (n + 2)

    def slope(b: float) -> float:
        total = 0.0
        for rows in row_blocks(n, k):
            z = logits[rows].astype(np.float64)
            p = 0.5 * (1 + np.tanh(0.5 * b * z))  # the sigmoid of b z, without overflow in exp
            total += float(((p - y[rows]) * z).sum())
        return total / n

    return slope


def _right_logit(z: NDArray[np.float64], right: Ints, b: float) -> NDArray[np.float64]:
    """(n, K), (n, M) -> (n,): mean logit of the right outputs, weighted by their probability."""
    if right.shape[1] == 1:
        return target_values(z, right)[:, 0]
    p = np.exp(log_softmax(target_values(b * z, right)))
    values = np.where(right == NO_TARGET, 0.0, target_values(z, right.clip(0)))
    return np.asarray((p * values).sum(axis=1))


def fit_score_temperature(scores: NDArray[np.float64], labels: ArrayLike) -> float:
    """Find the temperature of scores that are not logits, such as ridge regression scores.

    A few-shot classifier has few images and usually all of them right, so every target is
    Platt's (n + 1) / (n + 2). The temperature is at most the mean spread of the scores over the
    classes, so that scores without information do not become equal probabilities.
    """
    y = np.asarray(labels, dtype=np.int64)
    n, k = scores.shape
    # The rest of the probability is spread evenly over the wrong classes.
    targets = np.full((n, k), 1 / (n + 2) / max(k - 1, 1))
    targets[np.arange(n), y] = (n + 1) / (n + 2)
    spread = float(scores.std(axis=1).mean()) or 1.0

    def loss(log_t: float) -> float:
        z = scores / np.exp(log_t)
        z = z - z.max(axis=1, keepdims=True)
        return float(np.mean(np.log(np.exp(z).sum(axis=1)) - (targets * z).sum(axis=1)))

    # Golden-section search: the loss is convex in 1 / T, so it has one minimum in log T. The
    # search, unlike `fit_temperature`'s root, also ends well at the upper bound. 60 steps narrow
    # 7 units of log T to less than float64 resolves.
    low, high = float(np.log(spread) - 7), float(np.log(spread))
    ratio = (5**0.5 - 1) / 2
    for _ in range(60):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if loss(left) < loss(right):
            high = right
        else:
            low = left
    return float(np.exp((low + high) / 2))


@dataclass(frozen=True)
class Calibration:
    """A temperature that was fitted on images which are not reported.

    Attributes:
        split: description of the images it was fitted on.
        images: number of these images.
        loss_before, ece_before: metrics of the reported images under the previous temperature;
            `ece_before` is None for multi-label images.
        stored: weights file that holds the temperature now.
    """

    temperature: float
    split: str
    images: int
    loss_before: float
    ece_before: float | None
    stored: str


@dataclass(frozen=True)
class Fit:
    """What was fitted for this evaluation, on which images, and where it is stored.

    Attributes:
        temperature: the previous one; None if no new one was fitted.
        thresholds: the previous decision of each image and class is made with them; None is 0.5.
        rule: how the new thresholds were chosen; None if there are no new ones.
    """

    split: str
    images: int
    file: Path
    temperature: float | None = None
    thresholds: tuple[float, ...] | None = None
    rule: ThresholdRule | None = None


@dataclass(frozen=True)
class CalibrationSplit:
    """Disjoint images for the fit and for the report.

    Attributes:
        description: names the held-out images, for the reader.
        record: the same as plain values; stored with what is fitted.
    """

    held_out: ImageSet
    reported: ImageSet
    description: str
    record: dict[str, Any]


def split_for_calibration(
    source: Source, images: ImageSet, matching: ClassMatching, seed: int
) -> CalibrationSplit:
    """Hold out the validation images; if they are the reported ones, half of each class."""
    # Never take training images: a model is more confident about them than about new ones.
    validation = source.splits.get("validation")
    if validation is not None and images.name != "validation":
        held_out, reported = matching.select(validation), images
        description = "the validation images"
    else:
        labels, groups = images.labels, images.groups
        keep, aside = stratified_split(labels, HELD_OUT_FRACTION, seed, groups)
        if not len(aside):
            raise VitcliError(
                "cannot hold out images for the fit: "
                f"{counted(len(images), 'image is', 'images are')} too few",
                "use data with at least two images per class",
            )
        held_out, reported = images.subset(aside), images.subset(keep)
        description = f"half of the {images.name} images, drawn with seed {seed}"
    record = {
        "data": source.notation,
        "fingerprint": source.fingerprint,
        "split": held_out.name,
        "images": len(held_out),
    }
    return CalibrationSplit(held_out, reported, description, record)


def check_same_kind(net: LoadedModel, images: ImageSet, model: str) -> None:
    """Raise a VitcliError if the head is single-label and the images multi-label, or vice versa."""
    multi_label = images.targets is not None
    if multi_label == (net.head_activation == "sigmoid"):
        return
    trained, given = ("single-label", "multi-label")[:: 1 if multi_label else -1]
    raise VitcliError(
        f"`{model}` was trained on {trained} images, and these images are {given}; neither a "
        "temperature nor thresholds fit both",
        f"fit them on {trained} images",
    )


def warn_if_calibrated_on(model: str, source: Source, images: ImageSet, watch: Watcher) -> None:
    """Warn if the temperature or the thresholds were fitted on some of the reported images."""
    file = vitcli_weights_file(model)
    header = (read_header(file) or {}) if file is not None else {}
    for key, fitted, better in (
        (
            TEMPERATURE_RECORD,
            "temperature of `{}` was",
            "loss and calibration error are too good; `--calibrate`",
        ),
        (
            THRESHOLDS_RECORD,
            "thresholds of `{}` were",
            "precision, recall and F1 are too good; `--thresholds`",
        ),
    ):
        record = header.get(key)
        if not isinstance(record, dict):
            continue
        if (record.get("fingerprint"), record.get("split")) == (source.fingerprint, images.name):
            watch.warn(
                f"the {fitted.format(model)} fitted on {record.get('images')} of these images, "
                f"so {better} reports only the others"
            )


def calibrate(net: LoadedModel, held_out: Extracted, matching: ClassMatching) -> float:
    """Set `net.temperature` from the logits of held-out images; return the previous temperature."""
    from scipy.special import expit, logit

    previous = net.temperature
    thresholds = None if net.thresholds is None else np.array(net.thresholds)
    if held_out.labels.ndim == 2:
        # Sigmoids are independent: outputs for which there are no labels do not take part.
        logits = held_out.outputs[:, matching.first_outputs]
        net.temperature = fit_temperature(logits, held_out.labels, "sigmoid")
    else:
        # A softmax depends on every output, also on those of classes that the data lack.
        targets = pad_targets(matching.outputs)[held_out.labels]
        net.temperature = fit_temperature(held_out.outputs, targets)
    if thresholds is not None:
        # The same logits reach the thresholds as before, so the decisions stay the same.
        odds = logit(thresholds) * previous / net.temperature
        net.thresholds = tuple(expit(odds).tolist())
    return previous


def temperature_file(model: str, unchanged: bool, folder: Path) -> Path:
    """Choose the weights file that will hold the temperature or the thresholds.

    This is the model's own file if it has our format and was loaded `unchanged`, that is without
    settings that override its header. Otherwise it is a copy in `folder`.
    """
    own = vitcli_weights_file(model) if unchanged else None
    if own is not None:
        return own
    # With overriding settings, the file and the model are not the same: a temperature in the file
    # would be wrong for whoever loads it without these settings.
    copy = folder / "model.safetensors"
    header = (read_header(copy) or {}) if copy.is_file() else {}
    calibrated_copy = bool(header.get(TEMPERATURE_RECORD) or header.get(THRESHOLDS_RECORD))
    if copy.exists() and (not calibrated_copy or Run(folder).recipe_file.exists()):
        raise VitcliError(
            f"`{copy}` exists already; the calibrated copy of `{model}` would replace it",
            "choose another folder with `--out`",
        )
    return copy


def store_fit(
    net: LoadedModel,
    model: str,
    file: Path,
    record: Mapping[str, Any],
    *,
    temperature: bool,
    thresholds: bool,
) -> None:
    """Write what was fitted of `net`, which was loaded as `model`, into the weights file `file`.

    Args:
        record: the images of the fit.
        temperature, thresholds: which of them were fitted.
    """
    # The tensors of an own file stay as they are; only a copy is written as a whole.
    if vitcli_weights_file(model) != file:
        save_model(file, net)
    entries: dict[str, Any] = {}
    if temperature:
        entries = {"temperature": net.temperature, TEMPERATURE_RECORD: dict(record)}
    if net.thresholds is not None:  # a new temperature moves them
        entries["thresholds"] = list(net.thresholds)
    if thresholds:
        entries[THRESHOLDS_RECORD] = dict(record)
    update_header(file, entries)

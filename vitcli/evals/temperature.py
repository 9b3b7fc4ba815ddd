"""Fitting a model's temperature on images that are held out, and storing it with the weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitcli.data.image_set import ImageSet
from vitcli.data.source import Source
from vitcli.data.splits import stratified_split
from vitcli.errors import VitcliError
from vitcli.evals.calibration import (
    Reliability,
    calibration_error,
    fit_temperature,
    fit_temperature_labels,
    reliability,
)
from vitcli.evals.class_matching import Matching
from vitcli.evals.evaluate import Calibration
from vitcli.evals.features import Extracted
from vitcli.evals.multilabel import labels_loss
from vitcli.evals.scoring import filled_up, judge
from vitcli.progress import Watcher
from vitcli.run import Run
from vitcli.vit import Model
from vitcli.weights.read import own_file
from vitcli.weights.store import read_header, save_model, set_temperature

HELD_OUT = 0.5  # of the images, where the data has no validation images


@dataclass(frozen=True)
class HeldOut:
    """Images for the temperature, and those that are left to report; none is in both.

    Attributes:
        said: which images are held out, in words.
        fitted_on: the same as plain values, kept with the temperature.
    """

    held: ImageSet
    reported: ImageSet
    said: str
    fitted_on: dict[str, Any]


def check_kind(net: Model, images: ImageSet, model: str) -> None:
    """Raises a VitcliError where the head means other probabilities than the images ask for."""
    several = images.targets is not None
    if several == (net.head_activation == "sigmoid"):
        return
    trained, given = ("one class", "any number of labels")[:: 1 if several else -1]
    raise VitcliError(
        f"`{model}` was trained for {trained} an image, and these have {given}: no temperature is "
        "right for both",
        "calibrate it on images of the kind that it was trained on",
    )


def hold_out(source: Source, images: ImageSet, matching: Matching, seed: int) -> HeldOut:
    """The validation images, where others are reported; else half of each class, seeded.

    Never training images: a model is surer of these than of any others.

    Raises:
        VitcliError: too few images.
    """
    validation = source.splits.get("validation")
    if validation is not None and images.name != "validation":
        held = matching.select(validation)
        return HeldOut(held, images, "the validation images", _noted(source, held))
    keep, aside = stratified_split(images.labels, HELD_OUT, seed)
    if not len(aside):
        raise VitcliError(
            f"{len(images)} images are too few to hold some out for `--calibrate`",
            "it takes two of a class",
        )
    said = f"half of the {images.name} images, drawn with seed {seed}"
    held = images.subset(aside)
    return HeldOut(held, images.subset(keep), said, _noted(source, held))


def _noted(source: Source, held: ImageSet) -> dict[str, Any]:
    return {
        "data": source.notation,
        "fingerprint": source.fingerprint,
        "split": held.name,
        "images": len(held),
    }


def warn_of_fitted(model: str, source: Source, images: ImageSet, watch: Watcher) -> None:
    """Say so where images are reported on some of which the model's temperature was fitted."""
    file = own_file(model)
    on = (read_header(file) or {}).get("fitted_on") if file is not None else None
    if not isinstance(on, dict):
        return
    if (on.get("fingerprint"), on.get("split")) == (source.fingerprint, images.name):
        watch.warn(
            f"the temperature of `{model}` was fitted on {on.get('images')} of these images: loss "
            "and calibration error are better than on others; `--calibrate` reports the rest alone"
        )


@dataclass(frozen=True)
class Fitted:
    """A temperature that a model has from now on, and what it had before."""

    before: float
    parts: HeldOut
    images: int


def fit(net: Model, seen: Extracted, matching: Matching, parts: HeldOut) -> Fitted:
    """Set `net.temperature` by the logits of the images held out.

    Raises:
        VitcliError: no temperature makes them better than a guess.
    """
    before = net.temperature
    if seen.labels.ndim == 2:  # any number of labels
        known = matching.firsts
        net.temperature = fit_temperature_labels(seen.outputs[:, known], seen.labels)
    else:
        answers = filled_up(matching.outputs)[seen.labels]
        net.temperature = fit_temperature(seen.outputs, answers)
    return Fitted(before, parts, len(seen.labels))


def compared(
    net: Model, found: Extracted, matching: Matching, fitted: Fitted, stored: Path
) -> tuple[Calibration, Reliability | None]:
    """What the reported images were like under the temperature before."""
    after, net.temperature = net.temperature, fitted.before
    bins = error = None
    try:
        if found.labels.ndim == 2:
            loss = labels_loss(net, found, matching.firsts)
        else:
            answers = filled_up(matching.outputs)[found.labels]
            outcomes = judge(found.outputs, answers, fitted.before)
            loss = float(outcomes.loss.mean())
            error = calibration_error(outcomes.confidence, outcomes.correct)
            bins = reliability(outcomes.confidence, outcomes.correct)
    finally:
        net.temperature = after
    return Calibration(after, fitted.parts.said, fitted.images, loss, error, str(stored)), bins


def place_of(model: str, as_it_is: bool, folder: Path) -> Path:
    """Where a temperature is stored: in the weights file itself, or in a copy in `folder`.

    A copy where the file is not of ours, and where it was loaded otherwise than it says.

    Raises:
        VitcliError: other weights are there.
    """
    own = own_file(model) if as_it_is else None
    if own is not None:
        return own
    copy = folder / "model.safetensors"
    made_here = copy.is_file() and bool((read_header(copy) or {}).get("fitted_on"))
    if copy.exists() and (not made_here or Run(folder).recipe_file.exists()):
        raise VitcliError(
            f"`{copy}` exists already, and the calibrated copy of `{model}` would be there",
            "choose another place with `--out`",
        )
    return copy


def store(net: Model, model: str, place: Path, fitted_on: Mapping[str, Any]) -> None:
    """Note the temperature of `net`, which was loaded as `model`, at `place`.

    Raises:
        VitcliError: it cannot be written.
    """
    if own_file(model) != place:
        save_model(place, net)
    set_temperature(place, net.temperature, fitted_on)

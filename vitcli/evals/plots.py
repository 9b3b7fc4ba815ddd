"""The confusion matrix and the reliability diagram, as files.

The files of an evaluation: the confusion matrix, the reliability diagram, the mistakes.
"""

import csv
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitcli.data.image_set import ImageSet
from vitcli.evals.calibration import Reliability
from vitcli.evals.evaluate import Evaluation
from vitcli.evals.mistakes import mistakes_sheet
from vitcli.files import replacing

MOST_DRAWN = 100  # classes; a picture of more could not be read
MOST_COUNTED = 20  # classes whose counts are written into the picture


def write_confusion(
    csv_file: Path,
    picture: Path | None,
    classes: Sequence[str],
    columns: Sequence[str],
    confusion: NDArray[np.int64],
    words: Mapping[str, str] | None = None,
) -> None:
    """The counts as CSV, and where it is asked for as a picture: rows true, columns predicted.

    Args:
        words: what the picture has for a class's name, where that says little.

    Raises:
        VitcliError: they cannot be written.
    """
    said = words or {}
    with (
        replacing(csv_file) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["true \\ predicted", *columns])
        for name, row in zip(classes, confusion.tolist(), strict=True):
            writer.writerow([name, *row])
    if picture is None:
        return
    from matplotlib.figure import Figure

    side = max(4.0, 0.35 * len(columns) + 2)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    drawn = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(columns)), [said.get(n, n) for n in columns], rotation=90)
    axes.set_yticks(range(len(classes)), [said.get(n, n) for n in classes])
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(columns) <= MOST_COUNTED:
        for (i, j), count in np.ndenumerate(confusion):
            if count:
                colour = "white" if shares[i, j] > 0.5 else "black"
                axes.text(j, i, str(count), ha="center", va="center", color=colour, fontsize=7)
    figure.colorbar(drawn, ax=axes, label="share of the true class", shrink=0.7)
    _save(figure, picture)


def write_reliability(path: Path, diagrams: Sequence[tuple[str, Reliability, float]]) -> None:
    """Accuracy over confidence, and how many images have it; one column for each diagram.

    Args:
        diagrams: title, bins, expected calibration error.

    Raises:
        VitcliError: it cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(diagrams), 5.2), layout="constrained")
    grid = figure.subplots(2, len(diagrams), squeeze=False, sharex=True, height_ratios=(3, 1))
    for (upper, lower), (title, bins, error) in zip(grid.T, diagrams, strict=True):
        full = bins.images > 0
        left, width = bins.edges[:-1][full], np.diff(bins.edges)[full]
        accuracy, confidence = bins.accuracy[full], bins.confidence[full]
        upper.bar(left, accuracy, width, align="edge", color="#4878a8", edgecolor="white")
        upper.plot(confidence, accuracy, ".", color="black", markersize=4)
        upper.plot([0, 1], [0, 1], "--", color="grey", linewidth=1)
        upper.set_title(f"{title}: calibration error {error:.4f}", fontsize=10)
        upper.set_xlim(0, 1)
        upper.set_ylim(0, 1)
        upper.set_ylabel("accuracy")
        share = bins.images[full] / bins.images.sum()
        lower.bar(left, share, width, align="edge", color="#b0b0b0", edgecolor="white")
        lower.set_ylabel("share of images")
        lower.set_xlabel("confidence")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as temporary, warnings.catch_warnings(action="ignore"):
        # A script that the font does not have is a warning, and boxes in the picture.
        figure.savefig(temporary, format="png", dpi=120)


CONFUSION = "confusion.csv"


def files_of(result: Evaluation, folder: Path) -> dict[str, str]:
    """What there will be in `folder`: `confusion` …, as `Evaluation.files` has it."""
    names = {"confusion": CONFUSION, "reliability": "reliability.png"}
    if len(result.classes) <= MOST_DRAWN:
        names["confusion_picture"] = "confusion.png"
    if result.mistakes.worst:
        names["mistakes"] = "mistakes.png"
    return {key: str(folder / name) for key, name in names.items()}


def write_files(result: Evaluation, images: ImageSet) -> None:
    """Write `result.files`, whose folder is there.

    Raises:
        VitcliError: they cannot be written.
    """
    files = {key: Path(name) for key, name in (result.files or {}).items()}
    write_confusion(
        files["confusion"],
        files.get("confusion_picture"),
        result.classes,
        result.columns,
        result.confusion,
        result.words,
    )
    diagrams = [("calibrated", result.reliability, result.metrics.ece)]
    calibration = result.calibration
    if calibration is None:
        diagrams = [(result.split, result.reliability, result.metrics.ece)]
    elif result.uncalibrated is not None and calibration.ece_before is not None:
        diagrams.insert(0, ("before", result.uncalibrated, calibration.ece_before))
    write_reliability(files["reliability"], diagrams)
    if "mistakes" in files:
        sheet = mistakes_sheet(result.mistakes, images, result.words)
        with replacing(files["mistakes"]) as temporary:
            sheet.save(temporary, format="PNG")

"""Files of an evaluation: confusion matrix, reliability diagram, mistakes, or a scatter plot."""

import csv
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from vitcli.data.image_set import ImageSet
from vitcli.errors import printable
from vitcli.evals.evaluate import Evaluation
from vitcli.evals.mistakes import draw_mistakes
from vitcli.evals.regression import PredictedNumbers
from vitcli.evals.scoring import ReliabilityBins, SingleLabelMetrics
from vitcli.files import writing
from vitcli.pixels import PixelFormat

MAX_DRAWN_CLASSES = 100  # labels of a larger picture are not legible
MAX_COUNTED_CLASSES = 20  # up to here the picture also has the counts


def evaluation_files(result: Evaluation, folder: Path) -> dict[str, str]:
    """The value of `Evaluation.files`: paths in `folder` of the files that will be written."""
    if result.numbers is not None:
        return {"scatter": str(folder / "scatter.png")}
    if result.details is None:
        return {}
    names = {"confusion": "confusion.csv", "reliability": "reliability.png"}
    if len(result.classes) <= MAX_DRAWN_CLASSES:
        names["confusion_picture"] = "confusion.png"
    if result.details.mistakes.worst:
        names["mistakes"] = "mistakes.png"
    return {key: str(folder / name) for key, name in names.items()}


def write_evaluation_files(result: Evaluation, images: ImageSet, wanted: PixelFormat) -> None:
    """Write `result.files`; their folder exists. `wanted` are the pixels of the mistakes."""
    if result.numbers is not None:
        write_scatter(Path(result.files["scatter"]), result.numbers)
    details, metrics = result.details, result.metrics
    if details is None or not isinstance(metrics, SingleLabelMetrics):
        return
    files = {key: Path(name) for key, name in result.files.items()}
    write_confusion(
        files["confusion"],
        files.get("confusion_picture"),
        result.classes,
        result.confusion_columns,
        details.confusion,
        details.display_names,
    )
    diagrams = [(result.split, details.reliability, metrics.ece)]
    calibration = result.calibration
    if calibration is not None and calibration.ece_before is not None and details.uncalibrated:
        diagrams = [
            (f"{result.split}, before", details.uncalibrated, calibration.ece_before),
            (f"{result.split}, calibrated", details.reliability, metrics.ece),
        ]
    write_reliability(files["reliability"], diagrams)
    if "mistakes" in files:
        sheet = draw_mistakes(details.mistakes, images, wanted, details.display_names)
        with writing(files["mistakes"]) as temporary:
            sheet.save(temporary, format="PNG")


def write_confusion(
    csv_file: Path,
    picture: Path | None,
    classes: Sequence[str],
    columns: Sequence[str],
    confusion: NDArray[np.int64],
    display_names: Mapping[str, str] | None = None,
) -> None:
    """Write the counts as CSV and, if `picture` is given, as a picture.

    Rows are true classes, columns are predicted classes.

    Args:
        display_names: class name -> the name that the picture shows.
    """
    shown = {name: printable(text) for name, text in (display_names or {}).items()}
    shown = {name: shown.get(name, printable(name)) for name in {*columns, *classes}}
    with (
        writing(csv_file) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["true \\ predicted", *columns])
        for name, row in zip(classes, confusion.tolist(), strict=True):
            writer.writerow([name, *row])
    if picture is None:
        return
    from matplotlib.figure import Figure  # not pyplot: it keeps global state and needs a backend

    size = max(4.0, 0.35 * len(columns) + 2)
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    # Colour by share of the row, or a large class would outshine all others.
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    drawn = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(columns)), [shown[n] for n in columns], rotation=90)
    axes.set_yticks(range(len(classes)), [shown[n] for n in classes])
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(columns) <= MAX_COUNTED_CLASSES:
        for (i, j), count in np.ndenumerate(confusion):
            if count:
                colour = "white" if shares[i, j] > 0.5 else "black"
                axes.text(j, i, str(count), ha="center", va="center", color=colour, fontsize=7)
    figure.colorbar(drawn, ax=axes, label="share of the true class", shrink=0.7)
    with writing(picture) as temporary:
        save_figure(figure, temporary)


def write_scatter(path: Path, numbers: PredictedNumbers) -> None:
    """Draw predicted over true numbers, one point per image, with the line of equal numbers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(numbers.targets, numbers.predicted, ".", color="#4878a8", markersize=4, alpha=0.6)
    axes.axline((float(numbers.targets.mean()),) * 2, slope=1, color="grey", linestyle="--")
    axes.set_xlabel(f"true {numbers.name}")
    axes.set_ylabel(f"predicted {numbers.name}")
    with writing(path) as temporary:
        save_figure(figure, temporary)


def write_reliability(path: Path, diagrams: Sequence[tuple[str, ReliabilityBins, float]]) -> None:
    """Draw accuracy over confidence, and the share of images, one column per diagram.

    Args:
        diagrams: title, bins, expected calibration error.
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
        upper.plot([0, 1], [0, 1], "--", color="grey", linewidth=1)  # a calibrated model
        upper.set_title(f"{title}: calibration error {error:.4f}", fontsize=10)
        upper.set_xlim(0, 1)
        upper.set_ylim(0, 1)
        upper.set_ylabel("accuracy")
        share = bins.images[full] / bins.images.sum()
        # A bar may be far off the diagonal and hold two images: show how many each has.
        lower.bar(left, share, width, align="edge", color="#b0b0b0", edgecolor="white")
        lower.set_ylabel("share of images")
        lower.set_xlabel("confidence")
    with writing(path) as temporary:
        save_figure(figure, temporary)


def save_figure(figure: Any, file: Path | IO[bytes], dpi: int = 120) -> None:
    """Write a matplotlib figure as PNG with literal text: a name such as `$5` is not a formula."""
    from matplotlib.text import Text

    axes = [axis for panel in figure.axes for axis in (panel.xaxis, panel.yaxis)]
    # matplotlib writes the powers of ten of a logarithmic axis as formulas.
    powers = {
        label for a in axes if a.get_scale() == "log" for label in a.get_ticklabels(which="both")
    }
    for text in figure.findobj(Text):
        text.set_parse_math(text in powers)
    with warnings.catch_warnings(action="ignore"):
        # matplotlib warns of a script that its font lacks; such a class name becomes boxes.
        figure.savefig(file, format="png", dpi=dpi)

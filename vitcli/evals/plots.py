"""Files of an evaluation: confusion matrix, reliability diagram, mistakes, or a scatter plot."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitcli.data.image_set import ImageSet
from vitcli.errors import printable
from vitcli.evals.evaluate import Evaluation
from vitcli.evals.intervals import Interval, wilson_interval
from vitcli.evals.mistakes import draw_mistakes, write_mistakes
from vitcli.evals.regression import PredictedNumbers
from vitcli.evals.scoring import MultiLabelMetrics, ReliabilityBins, SingleLabelMetrics
from vitcli.files import writing
from vitcli.pixels import PixelFormat
from vitcli.report.charts import BLUE, GREY, LINE, new_figure, save_atomically
from vitcli.report.page import REPORT_FILE

MAX_DRAWN_CLASSES = 100  # labels of a larger picture are not legible
MAX_COUNTED_CLASSES = 20  # up to here the picture also has the counts

# Title, bins and expected calibration error of a diagram.
Diagram = tuple[str, ReliabilityBins, float]


def evaluation_files(result: Evaluation, folder: Path) -> dict[str, str]:
    """The value of `Evaluation.files`: paths in `folder` of the files that will be written."""
    names = {}
    if result.numbers is not None:
        names = {"scatter": "scatter.png", "mistakes_table": "mistakes.csv"}
    elif result.details is not None:
        names = {"confusion": "confusion.csv", "reliability": "reliability.png"}
        if len(result.classes) <= MAX_DRAWN_CLASSES:
            names["confusion_picture"] = "confusion.png"
        if result.details.mistakes.wrong:
            names |= {"mistakes": "mistakes.png", "mistakes_table": "mistakes.csv"}
    names["report"] = REPORT_FILE
    return {key: str(folder / name) for key, name in names.items()}


def write_evaluation_files(result: Evaluation, images: ImageSet, wanted: PixelFormat) -> None:
    """Write `result.files` except the report; their folder exists.

    Args:
        wanted: the pixels of the mistakes.
    """
    files = {key: Path(name) for key, name in result.files.items()}
    if result.numbers is not None:
        save_atomically(scatter_figure(result.numbers, describe_result(result)), files["scatter"])
        _write_errors(files["mistakes_table"], result, images)
    details = result.details
    if details is None:
        return
    title = describe_result(result)
    write_confusion(
        files["confusion"],
        files.get("confusion_picture"),
        result.classes,
        result.confusion_columns,
        details.confusion,
        details.display_names,
        title,
    )
    save_atomically(reliability_figure(reliability_diagrams(result), title), files["reliability"])
    if "mistakes" in files:
        write_mistakes(files["mistakes_table"], details.mistakes)
        sheet = draw_mistakes(details.mistakes, images, wanted, details.display_names, title)
        with writing(files["mistakes"]) as temporary:
            sheet.save(temporary, format="PNG")


def describe_result(result: Evaluation) -> str:
    """Model, data, the main figure and the number of images: the title of every picture."""
    metrics, where = result.metrics, f"{printable(result.model)} on {printable(result.data)}"
    if isinstance(metrics, SingleLabelMetrics):
        figure = f"accuracy {share_text(metrics.top1, result.intervals.of.get('top1'))}"
    elif isinstance(metrics, MultiLabelMetrics):
        figure = f"mean average precision {share_text(metrics.map)}"
    else:
        figure = f"mean absolute error {metrics.mae:.4g}"
    return f"{where}: {figure}, {metrics.images:,} {result.split} images"


def share_text(share: float, interval: Interval | None = None) -> str:
    """72.40 % (68.40 to 76.20), with the 95 % interval in parentheses."""
    text = f"{100 * share:.2f} %"
    return text if interval is None else f"{text} ({interval_text(interval)})"


def interval_text(interval: Sequence[float]) -> str:
    """68.40 to 76.20: an interval of shares, in percent."""
    return f"{100 * interval[0]:.2f} to {100 * interval[1]:.2f}"


def reliability_diagrams(result: Evaluation) -> list[Diagram]:
    """The diagrams of an evaluation: two after a calibration."""
    details, calibration = result.details, result.calibration
    assert details is not None
    ece = details.calibration_error.estimate
    if calibration is None or calibration.ece_before is None or details.uncalibrated is None:
        return [(result.split, details.reliability, ece)]
    return [
        (f"{result.split}, before", details.uncalibrated, calibration.ece_before),
        (f"{result.split}, calibrated", details.reliability, ece),
    ]


def write_confusion(
    csv_file: Path,
    picture: Path | None,
    classes: Sequence[str],
    columns: Sequence[str],
    confusion: NDArray[np.int64],
    display_names: Mapping[str, str] | None = None,
    title: str = "",
) -> None:
    """Write the counts as CSV and, if `picture` is given, as a picture.

    Rows are true classes, columns are predicted classes.

    Args:
        display_names: class name -> the name that the picture shows.
        title: text above the picture.
    """
    with (
        writing(csv_file) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["true \\ predicted", *columns])
        for name, row in zip(classes, confusion.tolist(), strict=True):
            writer.writerow([name, *row])
    if picture is not None:
        shown = {name: printable(text) for name, text in (display_names or {}).items()}
        rows, across = (
            [shown.get(name, printable(name)) for name in axis] for axis in (classes, columns)
        )
        save_atomically(_confusion_figure(confusion, rows, across, title), picture)


def row_shares(confusion: NDArray[np.int64]) -> NDArray[np.float64]:
    """The counts as shares of their row: a large class would outshine all others."""
    return np.asarray(confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1))


def _confusion_figure(
    confusion: NDArray[np.int64], rows: Sequence[str], columns: Sequence[str], title: str
) -> Any:
    size = max(4.0, 0.35 * len(columns) + 2)
    figure = new_figure(size, size)
    axes = figure.subplots()
    shares = row_shares(confusion)
    drawn = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(columns)), columns, rotation=90)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(columns) <= MAX_COUNTED_CLASSES:
        for (i, j), count in np.ndenumerate(confusion):
            if count:
                colour = "white" if shares[i, j] > 0.5 else "black"
                axes.text(j, i, str(count), ha="center", va="center", color=colour, fontsize=7)
    figure.colorbar(drawn, ax=axes, label="share of the true class", shrink=0.7)
    add_title(figure, title)
    return figure


def add_title(figure: Any, title: str) -> None:
    """Write the title above a figure, in lines that fit its width."""
    import textwrap

    letters = int(13 * figure.get_figwidth())  # of 10 points
    if title:
        figure.suptitle("\n".join(textwrap.wrap(title, letters)), fontsize=10)


def scatter_figure(numbers: PredictedNumbers, title: str = "") -> Any:
    """Predicted over true numbers, one point per image, with the line of equal numbers."""
    figure = new_figure(4.6, 4.6)
    axes = figure.subplots()
    axes.plot(numbers.targets, numbers.predicted, ".", color=BLUE, markersize=4, alpha=0.6)
    axes.axline((float(numbers.targets.mean()),) * 2, slope=1, color=GREY, linestyle="--")
    axes.set_xlabel(f"true {numbers.name}")
    axes.set_ylabel(f"predicted {numbers.name}")
    add_title(figure, title)
    return figure


def reliability_figure(diagrams: Sequence[Diagram], title: str = "") -> Any:
    """Accuracy over confidence with 95 % intervals, and the share of images; a column each."""
    figure = new_figure(4.4 * len(diagrams), 5.2)
    grid = figure.subplots(2, len(diagrams), squeeze=False, sharex=True, height_ratios=(3, 1))
    for (upper, lower), (name, bins, error) in zip(grid.T, diagrams, strict=True):
        full = bins.images > 0
        left, width = bins.edges[:-1][full], np.diff(bins.edges)[full]
        accuracy, confidence = bins.accuracy[full], bins.confidence[full]
        upper.bar(left, accuracy, width, align="edge", color=BLUE, alpha=0.45, linewidth=0)
        # A bar may be far off the diagonal and hold two images: show how little that says.
        pairs = zip(accuracy.tolist(), bins.images[full].tolist(), strict=True)
        low, high = np.array([wilson_interval(share, n) for share, n in pairs]).reshape(-1, 2).T
        upper.vlines(confidence, low, high, color="black", linewidth=1)
        upper.plot(confidence, accuracy, ".", color="black", markersize=5)
        upper.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1)  # a calibrated model
        upper.set_title(f"{name}: calibration error {error:.4f}", fontsize=10)
        upper.set_xlim(0, 1)
        upper.set_ylim(0, 1)
        upper.set_ylabel("accuracy (95 % interval)")
        share = bins.images[full] / bins.images.sum()
        lower.bar(left, share, width, align="edge", color=LINE, linewidth=0)
        lower.set_ylabel("images")
        lower.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        lower.set_xlabel("confidence")
    add_title(figure, title)
    return figure


def _write_errors(path: Path, result: Evaluation, images: ImageSet) -> None:
    """Write all images of a regression as CSV, the largest error first."""
    numbers = result.numbers
    assert numbers is not None
    with (
        writing(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["path", "target", "value", "error"])
        for row in np.argsort(-numbers.errors, kind="stable").tolist():
            values = (numbers.targets[row], numbers.predicted[row], numbers.errors[row])
            name = images.describe(int(result.indices[row]))
            writer.writerow([name, *(float(value) for value in values)])

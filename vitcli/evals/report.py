"""The report of an evaluation, and the sections that the report of a training run has as well."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitcli.data.image_set import ImageSet
from vitcli.decode import ImageError
from vitcli.errors import counted
from vitcli.evals.evaluate import Evaluation
from vitcli.evals.mistakes import Mistake, Mistakes
from vitcli.evals.plots import (
    Diagram,
    describe_result,
    interval_text,
    reliability_diagrams,
    reliability_figure,
    row_shares,
    scatter_figure,
)
from vitcli.evals.scoring import MIN_TOP5_CLASSES, PerClass
from vitcli.pixels import PixelFormat
from vitcli.report.charts import to_svg
from vitcli.report.page import (
    Block,
    Cell,
    Charts,
    Code,
    Facts,
    Gallery,
    Listed,
    Matrix,
    Page,
    PageSection,
    Paragraph,
    Picture,
    Table,
    Thumbnail,
    provenance_section,
    thumbnail,
)
from vitcli.run import Run, run_stem

MAX_MATRIX_CLASSES = 20  # a larger table is not legible
MAX_PAIRS, PAIR_EXAMPLES = 5, 6  # pairs of confused classes with thumbnails
WARNING = "warning: "  # at the start of a recorded line (`vitcli.progress`)
HEADLINE = {
    "accuracy": "accuracy",
    "top1": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "map": "mean average precision",
    "mae": "mean absolute error",
    "rmse": "root mean squared error",
    "r2": "R2",
    "top1_restricted": "accuracy among the data's classes",
    "top5": "top-5 accuracy",
    "micro_f1": "micro F1",
    "loss": "loss",
    "ece": "calibration error",
    "macro_f1": "macro F1",
    "roc_auc": "ROC-AUC",
    "ece_if_calibrated": "calibration error of a calibrated model",
    "ece_debiased": "calibration error without bias",
}
NO_SHARES = {"loss", "mae", "rmse", "r2", "images", "temperature"}  # all others are in 0..1


def evaluation_page(
    result: Evaluation, images: ImageSet, wanted: PixelFormat, notes: Sequence[str]
) -> Page:
    """The page of one evaluation.

    Args:
        images: the evaluated images.
        wanted: the pixels of thumbnails.
        notes: notes and warnings of the command, among them those about splits and copies.
    """
    facts = result.to_json()
    figures = _worth_showing(facts, None if result.details is None else result.details.num_outputs)
    # The interval of the calibration error is that of its value without bias, see `Calibration`.
    of = {key: pair for key, pair in result.intervals.of.items() if key != "ece"}
    page = Page(
        title=f"Evaluation of {run_stem(result.model)}",
        summary=f"{describe_result(result)}.",
        headline=headline_figures(figures, of),
        warnings=warnings_of(notes),
        sections=[
            PageSection("Figures", [figures_table(figures, of)]),
            _data_section(result, notes),
        ],
    )
    details = result.details
    if result.numbers is not None:
        chart = to_svg(scatter_figure(result.numbers), "scatter")
        caption = "Predicted over true numbers. On the dashed line they are equal."
        page.sections.append(PageSection("Predictions", [Picture(chart, caption)]))
        page.sections.append(_largest_errors(result))
    if details is not None:
        names = [details.display_names.get(name, name) for name in result.confusion_columns]
        shown = names[: len(result.classes)]
        reader = partial(images.read, mode=wanted)
        page.sections += [
            confusion_section(details.confusion, shown, names),
            calibration_section(reliability_diagrams(result), _calibration_text(result)),
            mistakes_section(details.mistakes, reader, details.display_names, "mistakes.csv"),
        ]
    if result.per_class:
        display = {} if details is None else details.display_names
        page.sections.append(class_section(result.per_class, display))
    run = Run(Path(result.model))
    if run.recipe_file.is_file():
        page.sections.append(recipe_section(run, "Recipe of the model"))
    page.sections.append(provenance_section())
    return page


def _worth_showing(facts: Mapping[str, Any], num_outputs: int | None) -> dict[str, Any]:
    """The numbers of `evaluate --json` that tell something: no repetition, no certain 100 %."""
    found = {key: value for key, value in facts.items() if isinstance(value, int | float)}
    del found["temperature"]  # no measurement; it is with the data
    if num_outputs is not None and num_outputs < MIN_TOP5_CLASSES:
        found.pop("top5", None)
    if found.get("top1_restricted") == found.get("top1"):
        found.pop("top1_restricted", None)
    return found


def headline_figures(
    figures: Mapping[str, Any], intervals: Mapping[str, Any], most: int = 4
) -> list[tuple[str, str, str]]:
    """The most important figures with their intervals, and the number of images."""
    found = []
    for key, name in HEADLINE.items():
        value = figures.get(key)
        if key == "map" and figures.keys() & {"accuracy", "top1"}:
            continue  # the main figure of images with several labels only
        if isinstance(value, int | float):
            interval = _interval_text(key, intervals.get(key))
            found.append(
                (name, value_text(key, value), f"95 % interval {interval}" if interval else "")
            )
    images = [("images", f"{int(figures['images']):,}", "")] if "images" in figures else []
    return found[:most] + images


def figures_table(figures: Mapping[str, Any], intervals: Mapping[str, Any]) -> Table:
    """All figures of an evaluation that are numbers, with their 95 % intervals."""
    rows = [
        [HEADLINE.get(key, key.replace("_", " ")), Cell(value_text(key, value), value),
         _interval_text(key, intervals.get(key)) or "-"]
        for key, value in figures.items()
        if isinstance(value, int | float)
    ]  # fmt: skip
    return Table(["figure", "value", "95 % interval"], rows)


def value_text(key: str, value: float) -> str:
    """A figure with its unit: a share in percent, an error or a number as it is."""
    if key == "images":
        return f"{value:,.0f}"
    if key == "loss" or key.startswith("ece"):
        return f"{value:.4f}"
    return f"{value:.4g}" if key in NO_SHARES else f"{100 * value:.2f} %"


def _interval_text(key: str, interval: Any) -> str:
    if interval is None:
        return ""
    if key in NO_SHARES:
        return f"{interval[0]:.4g} to {interval[1]:.4g}"
    return f"{interval_text(interval)} %"


def _data_section(result: Evaluation, notes: Sequence[str]) -> PageSection:
    rows = [
        ("data", result.data),
        ("split", f"{result.split}, {result.metrics.images:,} images"),
        ("classes", f"{len(result.classes):,}"),
        ("unreadable images", f"{len(result.broken):,}"),
        ("temperature", f"{result.temperature:.4g}"),
    ]
    return PageSection("Data and splits", [Facts(rows), *notes_blocks([*notes, *result.broken])])


def notes_blocks(notes: Sequence[str]) -> list[Block]:
    """The notes of a command without its warnings, each once."""
    lines = [line for line in dict.fromkeys(notes) if not line.startswith(WARNING)]
    return [Paragraph("Notes of the command:"), Listed(lines)] if lines else []


def warnings_of(notes: Sequence[str]) -> list[str]:
    """The warnings among the lines of a watcher, each once; a page shows them at its top."""
    found = [line.removeprefix(WARNING) for line in notes if line.startswith(WARNING)]
    return list(dict.fromkeys(found))


def confusion_section(
    confusion: NDArray[np.int64], rows: Sequence[str], columns: Sequence[str]
) -> PageSection:
    """The matrix; of many classes only those with the most mistakes."""
    text = "Rows are true classes, columns predicted classes. The shade is the share of the row."
    shares, k = row_shares(confusion), len(rows)
    chosen, across = np.arange(k), np.arange(len(columns))
    if k > MAX_MATRIX_CLASSES:
        wrong = confusion.copy()
        wrong[np.arange(k), np.arange(k)] = 0
        mistakes = wrong.sum(axis=1)
        mistakes += wrong.sum(axis=0)[:k]
        chosen = across = np.sort(np.argsort(-mistakes, kind="stable")[:MAX_MATRIX_CLASSES])
        inside = int(wrong[np.ix_(chosen, chosen)].sum())
        text += (
            f" The table has the {len(chosen)} of {k:,} classes that are confused most, with "
            f"{inside:,} of all {int(wrong.sum()):,} mistakes."
        )
    picked = np.ix_(chosen, across)
    table = Matrix(
        [rows[i] for i in chosen.tolist()],
        [columns[j] for j in across.tolist()],
        confusion[picked].tolist(),
        shares[picked].tolist(),
    )
    return PageSection("Confusion matrix", [Paragraph(text), table])


def calibration_section(diagrams: Sequence[Diagram], text: str) -> PageSection:
    """The reliability diagrams with the intervals of their bins."""
    pictures = [
        Picture(
            to_svg(reliability_figure([one]), f"reliability {i}"), f"reliability diagram, {one[0]}"
        )
        for i, one in enumerate(diagrams)
    ]
    legend = (
        "Bars are the accuracy of the images in each bin of confidence, lines their 95 % intervals "
        "(Wilson). A calibrated model is on the dashed diagonal."
    )
    return PageSection("Calibration", [Paragraph(f"{text} {legend}"), Charts(pictures)])


def _calibration_text(result: Evaluation) -> str:
    assert result.details is not None
    error, interval = result.details.calibration_error, result.intervals.of.get("ece")
    text = (
        f"The expected calibration error is {error.estimate:.4f}. A calibrated model shows "
        f"{error.if_calibrated:.4f} on as many images. Without this bias the error is "
        f"{error.debiased:.4f}"
    )
    if interval is None:
        return f"{text}; there are too few images for an interval."
    return f"{text}, with a 95 % interval from {interval[0]:.4f} to {interval[1]:.4f}."


def mistakes_section(
    mistakes: Mistakes, read: Any, display_names: Mapping[str, str], csv_file: str = ""
) -> PageSection:
    """The worst mistakes and the most confused pairs, with thumbnails.

    Args:
        read: index of an image -> the image.
        csv_file: the file with all mistakes.
    """
    if not mistakes.wrong:
        return PageSection("Mistakes", [Paragraph("There is no mistake.")])
    text = f"{counted(mistakes.count, 'image is', 'images are')} classified wrongly."
    if csv_file:
        text += f" `{csv_file}` lists all of them with their paths, to correct labels by."
    blocks: list[Block] = [Paragraph(text)]

    def name(one: str) -> str:
        return display_names.get(one, one)

    def thumbnails(some: Sequence[Mistake]) -> list[Thumbnail]:
        return [shown for one in some if (shown := _mistake_thumbnail(one, read, name))]

    title = "Worst mistakes: the label has the lowest probability"
    blocks.append(Gallery(title, thumbnails(mistakes.worst)))
    rows = [[name(p.true), name(p.predicted), p.images, p.of] for p in mistakes.confused]
    text = "Pairs of classes that are confused most often"
    if mistakes.num_pairs > len(rows):
        text += f", {len(rows)} of {mistakes.num_pairs:,}"
    blocks.append(Paragraph(f"{text}:"))
    blocks.append(Table(["label", "predicted", "images", "of"], rows))
    for pair in mistakes.confused[:MAX_PAIRS]:
        title = f"{name(pair.true)} predicted as {name(pair.predicted)}"
        title += f": {pair.images:,} of {pair.of:,} images"
        blocks.append(Gallery(title, thumbnails(pair.examples[:PAIR_EXAMPLES])))
    return PageSection("Mistakes", blocks)


def _mistake_thumbnail(one: Mistake, read: Any, name: Any) -> Thumbnail | None:
    try:
        image = read(one.index)
    except ImageError:  # removed since the evaluation
        return None
    lines = [
        f"label: {name(one.true)}",
        f"predicted: {name(one.predicted)}",
        f"{100 * one.probability:.1f} %, label {100 * one.true_probability:.1f} %",
    ]
    return thumbnail(image, lines, one.path)


def class_section(per_class: PerClass, display_names: Mapping[str, str]) -> PageSection:
    """A row for each class, with every figure that it has, and the interval of the figure."""
    every = dict.fromkeys(key for row in per_class.values() for key in row)
    keys = [key for key in every if not key.endswith("_interval")]
    rows = [
        [
            f"{name} ({display_names[name]})" if name in display_names else name,
            *(_class_cell(row.get(key), row.get(f"{key}_interval")) for key in keys),
        ]
        for name, row in per_class.items()
    ]
    head = ["class", *(key.replace("_", " ") for key in keys)]
    text = "A click on a column sorts by it. 95 % intervals are in parentheses."
    return PageSection("Classes", [Paragraph(text), Table(head, rows)])


def _class_cell(value: float | None, interval: Sequence[float] | None) -> Any:
    if value is None or interval is None:
        return value
    return Cell(f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})", value)


def _largest_errors(result: Evaluation) -> PageSection:
    rows = [
        [one["path"], one["target"], one["value"], abs(one["value"] - one["target"])]
        for one in result.worst
    ]
    table = Table(["image", "true", "predicted", "error"], rows)
    text = "`mistakes.csv` lists all images by falling error."
    return PageSection("Largest errors", [Paragraph(text), table])


def recipe_section(run: Run, title: str = "Recipe") -> PageSection:
    """The recipe of a run as it is stored."""
    text = run.recipe_file.read_text(encoding="utf-8", errors="backslashreplace")
    return PageSection(title, [Code(text.rstrip())], folded=True)

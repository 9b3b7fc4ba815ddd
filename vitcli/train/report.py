"""The pictures and the report of a training run: curves.png and report.html."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vitcli.data.image_set import ImageSet
from vitcli.data.source import Source
from vitcli.evals.intervals import wilson_interval
from vitcli.evals.mistakes import NUM_WORST, find_mistakes
from vitcli.evals.plots import add_title, scatter_figure, share_text
from vitcli.evals.regression import PredictedNumbers
from vitcli.evals.report import (
    calibration_section,
    class_section,
    confusion_section,
    figures_table,
    headline_figures,
    mistakes_section,
    notes_blocks,
    recipe_section,
    value_text,
    warnings_of,
)
from vitcli.evals.scoring import (
    ImageScores,
    confusion_matrix,
    expected_calibration_error,
    reliability_bins,
    single_label_per_class,
)
from vitcli.pixels import PixelFormat
from vitcli.report.charts import (
    BLUE,
    GREEN,
    GREY,
    LINE,
    ORANGE,
    new_figure,
    save_atomically,
    to_svg,
)
from vitcli.report.page import (
    Block,
    Charts,
    Facts,
    Page,
    PageSection,
    Paragraph,
    Picture,
    provenance_section,
)
from vitcli.run import Run
from vitcli.train.validate import Outcome

# The charts of a run.
PANELS = {
    "loss": ("train/loss", "validation/loss", "test/loss"),
    "accuracy": ("train/accuracy", "validation/accuracy", "test/accuracy"),
    "mean average precision": ("validation/map", "test/map"),
    "mean absolute error": ("train/mae", "validation/mae", "test/mae"),
    "R2": ("validation/r2", "test/r2"),
    "learning rate": ("lr",),
}
Records = Sequence[Mapping[str, Any]]  # of metrics.jsonl
COLOURS = {"train": BLUE, "validation": ORANGE, "test": GREEN, "lr": GREY}
SMOOTHED_SHARE = 20  # the window is 1 / 20 of the records
CURVES_CAPTION = (
    "Points are evaluations of all held-out images. The line of training is the mean of the steps "
    "since the last record, on augmented images and while the weights change."
)
SMOOTHED_CAPTION = "The faint line has every record, the strong line is smoothed."


@dataclass(frozen=True)
class HeldOut:
    """The predictions of the last evaluation of a run; `wanted` are the pixels of thumbnails."""

    images: ImageSet
    outcomes: Sequence[Outcome]
    wanted: PixelFormat


def draw_curves(run: Run, records: Records) -> None:
    """Plot the records of a run as curves.png; a panel without values is omitted."""
    panels = _panels(records)
    if not panels:
        return
    figure = new_figure(4.5 * len(panels), 3.6)
    for number, (title, names) in enumerate(panels.items(), start=1):
        _draw_panel(figure.add_subplot(1, len(panels), number), title, names, records)
    add_title(figure, _describe_last(run, records))
    save_atomically(figure, run.path / "curves.png")


def run_page(
    run: Run,
    records: Records,
    result: Mapping[str, Any],
    source: Source,
    held_out: HeldOut | None,
) -> Page:
    """The page of a training run.

    Args:
        records: those of the run.
        result: the content of result.json.
        held_out: None without held-out images, and for images with several labels.
    """
    known, figures = run.provenance(), result["figures"]
    measured = {result["figures"].get("split", "training"): figures}
    if result["validation"] is not None:
        measured = {"validation": result["validation"], **measured}
    split = next(reversed(measured))
    page = Page(
        title=f"{result['command']}: {run.path.name}",
        summary=(
            f"{result['model']} on {result['data']}: {result['steps']:,} steps, "
            f"{result['images']:,} images. The figures are those of the {split} images."
        ),
        headline=headline_figures(figures, _intervals(figures)),
        warnings=warnings_of(_logged(run.path / "log.txt")),
    )
    page.sections = [
        PageSection("Curves", _charts(records)),
        PageSection("Figures", _figure_blocks(measured, result)),
        _data_section(run, result, source, known),
    ]
    if held_out is not None and held_out.outcomes:
        wide = len(held_out.outcomes[0]) > 3
        page.sections += (_classifier_sections if wide else _number_sections)(held_out, split)
    page.sections += [recipe_section(run), provenance_section(known)]
    return page


def smooth(values: Sequence[float], width: int) -> list[float]:
    """(n,) values -> (n,) means of `width` neighbours, of fewer at both ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    # As many neighbours to the left as to the right, or the ends would lean inwards.
    reach = np.minimum(np.minimum(places, places[::-1]), width // 2)
    means = (sums[places + reach + 1] - sums[places - reach]) / (2 * reach + 1)
    return [float(mean) for mean in means]


def _panels(records: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    present = {name for record in records for name in record}
    found = {title: [n for n in names if n in present] for title, names in PANELS.items()}
    return {title: names for title, names in found.items() if names}


def _draw_panel(
    axes: Any, title: str, names: Sequence[str], records: Sequence[Mapping[str, Any]]
) -> None:
    """Draw the curves of a panel: training metrics raw and smoothed, evaluations as points."""
    for name in names:
        steps, values = zip(*((r["step"], r[name]) for r in records if name in r), strict=True)
        kind = name.partition("/")[0]
        style: dict[str, Any] = {"color": COLOURS[kind], "linewidth": 1.5}
        width = _window(len(values))
        if kind == "train" and width > 1:
            axes.plot(steps, values, label="train", **{**style, "alpha": 0.35, "linewidth": 1})
            label = f"train, smoothed over {width // 2 * 2 + 1} records"
            axes.plot(steps, smooth(values, width), label=label, **style)
        else:
            marker = "o" if kind in ("validation", "test") else None
            axes.plot(steps, values, label=kind, marker=marker, markersize=4, **style)
    axes.set_xlabel("step")
    axes.set_title(title, fontsize=11)
    axes.grid(color=LINE, alpha=0.4)
    if names != ["lr"]:
        axes.legend(frameon=False, fontsize=8)


def _charts(records: Records) -> list[Block]:
    pictures = []
    for title, names in _panels(records).items():
        figure = new_figure(4.5, 3.2)
        _draw_panel(figure.subplots(), title, names, records)
        pictures.append(Picture(to_svg(figure, title), f"{title} of the run"))
    count = sum("train/loss" in record for record in records)
    caption = f"{CURVES_CAPTION} {SMOOTHED_CAPTION}" if _window(count) > 1 else CURVES_CAPTION
    return [Paragraph(caption), Charts(pictures)] if pictures else []


def _window(count: int) -> int:
    """Number of records that the smoothed line averages; none if it is below 2."""
    return count // SMOOTHED_SHARE


def _describe_last(run: Run, records: Sequence[Mapping[str, Any]]) -> str:
    """The run and its last accuracy, the title of curves.png."""
    for split in ("test", "validation"):
        for record in reversed(records):
            if f"{split}/accuracy" in record:
                return f"{run.path}: {split} accuracy {share_text(record[f'{split}/accuracy'])}"
    return str(run.path)


def _intervals(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The 95 % intervals of the figures of an evaluation."""
    known = figures.get("intervals") or {}
    of: dict[str, Any] = {k: v for k, v in known.items() if isinstance(v, list)}
    if "accuracy" in figures and "images" in figures:
        of["accuracy"] = wilson_interval(figures["accuracy"], int(figures["images"]))
    return of


def _figure_blocks(
    measured: Mapping[str, Mapping[str, Any]], result: Mapping[str, Any]
) -> list[Block]:
    blocks: list[Block] = []
    for split, figures in measured.items():
        blocks.append(Paragraph(f"{split} images:"))
        blocks.append(figures_table(figures, _intervals(figures)))
    rows = [
        ("parameters", f"{result['parameters']:,}"),
        ("training time", f"{result['seconds']:,.0f} s"),
        ("speed", f"{result['images_per_second']:,.0f} images/s"),
    ]
    if best := result["best"]:
        value = value_text(best["metric"], best["value"])
        measured_on = f"{best['split']} {best['metric'].replace('_', ' ')} {value}"
        rows.append(("best weights", f"step {best['step']}: {measured_on}"))
    return [*blocks, Facts(rows)]


def _data_section(
    run: Run, result: Mapping[str, Any], source: Source, known: Mapping[str, Any]
) -> PageSection:
    """How the splits were made, what they have in common, and what could not be read."""
    data = {k: v for k, v in known.get("data", {}).items() if v is not None}
    counts = data.pop("images", None) or {}
    for hash_ in ("fingerprint", "content"):  # provenance.json has them, for a resume
        data.pop(hash_, None)
    rows = [
        ("data", data.pop("name", result["data"])),
        ("classes", f"{len(source.classes):,}"),
        ("splits", ", ".join(f"{count:,} {name}" for name, count in counts.items())),
        ("unreadable images", f"{len(result['broken']):,}"),
        *((key.replace("_", " "), value) for key, value in data.items()),
    ]
    broken = [f"{path}: {reason}" for path, reason in result["broken"].items()]
    notes = notes_blocks([*source.notes, *_logged(run.path / "log.txt"), *broken])
    return PageSection("Data and splits", [Facts([row for row in rows if row[1] != ""]), *notes])


def _logged(file: Path) -> list[str]:
    """The notes and warnings in log.txt, without their times."""
    try:
        lines = file.read_text(encoding="utf-8", errors="backslashreplace").splitlines()
    except OSError:
        return []
    return [line.partition(" ")[2] for line in lines]


def _classifier_sections(held_out: HeldOut, split: str) -> list[PageSection]:
    """Confusion, calibration, mistakes and classes, from the predictions of the last evaluation."""
    images, classes = held_out.images, held_out.images.classes
    columns = np.array(held_out.outcomes, dtype=np.float64).T
    indices, labels, predicted = columns[:3].astype(np.int64)
    confidence, correct = columns[3], labels == predicted
    with np.errstate(divide="ignore"):
        loss = -np.log(columns[4])
    # Accuracy among the five highest is not part of the predictions, and no section shows it.
    scores = ImageScores(len(classes), predicted, confidence, correct, correct * 1.0, loss)
    names = [classes[k] for k in predicted.tolist()]
    mistakes = find_mistakes(scores, images, indices, labels, classes, names, most=NUM_WORST)
    per_class = {
        name: row | {"recall_interval": wilson_interval(row["recall"], row["images"])}
        for name, row in single_label_per_class(labels, predicted, classes).items()
    }
    error = expected_calibration_error(confidence, correct)
    text = (
        f"The expected calibration error of the {split} images is {error:.4f}. "
        "`vitcli evaluate` gives its interval, and `--calibrate` fits a temperature."
    )
    return [
        confusion_section(confusion_matrix(labels, predicted, len(classes)), classes, classes),
        calibration_section([(split, reliability_bins(confidence, correct), error)], text),
        mistakes_section(mistakes, partial(images.read, mode=held_out.wanted), {}),
        class_section(per_class, {}),
    ]


def _number_sections(held_out: HeldOut, split: str) -> list[PageSection]:
    """The predicted numbers of a regression."""
    _, targets, predicted = np.array(held_out.outcomes, dtype=np.float64).T
    numbers = PredictedNumbers(held_out.images.classes[0], targets, predicted)
    caption = (
        f"Predicted over true numbers of the {split} images. On the dashed line they are equal."
    )
    return [
        PageSection("Predictions", [Picture(to_svg(scatter_figure(numbers), "scatter"), caption)])
    ]

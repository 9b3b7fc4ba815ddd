"""The mistakes of a classifier, and the classes that it confuses most often."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitcli.data.contact_sheet import SheetRow, draw_sheet
from vitcli.data.image_set import ImageSet
from vitcli.errors import printable
from vitcli.evals.scoring import ImageScores, Ints
from vitcli.files import writing
from vitcli.pixels import PixelFormat

NUM_WORST = 24  # images
NUM_PAIRS = 10  # pairs of classes
NUM_COLUMNS, IMAGE_SIZE = 8, 160  # of the sheet; pixels per side
CSV_COLUMNS = ("path", "label", "predicted", "probability", "label_probability")


@dataclass(frozen=True)
class Mistake:
    """One misclassified image; `index` is its index in the split."""

    path: str
    true: str
    predicted: str
    probability: float
    true_probability: float
    index: int

    def to_json(self) -> dict[str, Any]:
        """An element of `worst`."""
        return {key: value for key, value in asdict(self).items() if key != "index"}


@dataclass(frozen=True)
class ConfusedPair:
    """Images of one class that are predicted as another; `of` counts all images of the class."""

    true: str
    predicted: str
    images: int
    of: int
    examples: tuple[Mistake, ...] = field(default=(), repr=False)

    def to_json(self) -> dict[str, Any]:
        """An element of `confused`."""
        return {key: value for key, value in asdict(self).items() if key != "examples"}


@dataclass(frozen=True)
class Mistakes:
    """The misclassified images.

    Attributes:
        wrong: those that are described, by falling loss.
        confused: pairs of classes by falling count.
        count: number of all misclassified images.
    """

    wrong: tuple[Mistake, ...]
    confused: tuple[ConfusedPair, ...]
    count: int

    @property
    def worst(self) -> tuple[Mistake, ...]:
        """The first of `wrong`."""
        return self.wrong[:NUM_WORST]


def find_mistakes(
    scores: ImageScores,
    images: ImageSet,
    indices: Ints,
    labels: Ints,
    classes: Sequence[str],
    predicted: Sequence[str],
    *,
    most: int | None = None,
) -> Mistakes:
    """Collect the misclassified images.

    Args:
        most: describe only so many of `wrong`; None describes all.
        indices: (n,) index of each image in `images`.
        labels: (n,) its class.
        predicted: (n,) the names of the predictions.
    """
    wrong = np.flatnonzero(~scores.correct)
    # The loss of a wrong answer is high where the model was sure: these are mislabelled images, or
    # the errors that matter most.
    by_loss = wrong[np.argsort(-scores.loss[wrong], kind="stable")].tolist()

    def mistake(row: int) -> Mistake:
        return Mistake(
            path=images.describe(int(indices[row])),
            true=classes[int(labels[row])],
            predicted=predicted[row],
            probability=float(scores.confidence[row]),
            true_probability=float(np.exp(-scores.loss[row])),
            index=int(indices[row]),
        )

    pairs: dict[tuple[str, str], list[int]] = {}
    for row in by_loss:
        pairs.setdefault((classes[int(labels[row])], predicted[row]), []).append(row)
    # Python's sort is stable, so pairs of equal count keep the order of their worst image.
    largest = sorted(pairs.items(), key=lambda item: -len(item[1]))[:NUM_PAIRS]
    number = {classes[k]: int(count) for k, count in enumerate(np.bincount(labels))}
    confused = [
        ConfusedPair(true, name, len(rows), number[true], tuple(map(mistake, rows[:NUM_COLUMNS])))
        for (true, name), rows in largest
    ]
    return Mistakes(tuple(map(mistake, by_loss[:most])), tuple(confused), len(by_loss))


def write_mistakes(path: Path, mistakes: Mistakes) -> None:
    """Write all wrong images as CSV, the least probable label first, to correct labels by."""
    with (
        writing(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(CSV_COLUMNS)
        for one in mistakes.wrong:
            writer.writerow(
                [one.path, one.true, one.predicted, one.probability, one.true_probability]
            )


def draw_mistakes(
    mistakes: Mistakes,
    images: ImageSet,
    wanted: PixelFormat,
    display_names: Mapping[str, str],
    title: str,
) -> Image.Image:
    """Draw the images, each with its true class, its predicted class and the probability."""

    def caption(one: Mistake | ConfusedPair) -> str:
        true, predicted = (
            printable(display_names.get(name, name)) for name in (one.true, one.predicted)
        )
        return f"{true}\n-> {predicted}"

    def row(name: str, some: Sequence[Mistake]) -> SheetRow:
        captions = [f"{caption(one)}\n{100 * one.probability:.1f} %" for one in some]
        return SheetRow(name, [one.index for one in some], captions)

    rows = []
    for start in range(0, len(mistakes.worst), NUM_COLUMNS):
        first = "least probable\ntrue class" if start == 0 else ""
        rows.append(row(first, mistakes.worst[start : start + NUM_COLUMNS]))
    for pair in mistakes.confused:
        rows.append(row(f"{caption(pair)}\n{pair.images} of {pair.of} images", pair.examples))
    read = partial(images.read, mode=wanted)
    return draw_sheet(rows, read, columns=NUM_COLUMNS, side=IMAGE_SIZE, title=title)

"""The images that a classifier gets most wrong, and the classes that it takes for each other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitcli.data.contact_sheet import Row, draw_sheet
from vitcli.data.image_set import ImageSet
from vitcli.evals.scoring import Outcomes

Ints = NDArray[np.int64]

WORST = 24  # images
PAIRS = 10  # of classes
COLUMNS, SIDE = 8, 112  # of the sheet; pixels


@dataclass(frozen=True)
class Mistake:
    """An image that was taken for something else.

    Attributes:
        index: of the image in its set.
        probability: of the class that was predicted.
        true_probability: of the right one.
    """

    index: int
    path: str
    true: str
    predicted: str
    probability: float
    true_probability: float

    def to_json(self) -> dict[str, Any]:
        """A row of `worst`."""
        return {
            "path": self.path,
            "true": self.true,
            "predicted": self.predicted,
            "probability": self.probability,
            "true_probability": self.true_probability,
        }


@dataclass(frozen=True)
class Confused:
    """Images of one class that were taken for another, the surest mistake first."""

    true: str
    predicted: str
    images: int
    of: int
    examples: tuple[Mistake, ...]

    def to_json(self) -> dict[str, Any]:
        """A row of `confused`."""
        return {
            "true": self.true,
            "predicted": self.predicted,
            "images": self.images,
            "of": self.of,
        }


@dataclass(frozen=True)
class Mistakes:
    """`worst`: the largest losses of wrong answers; `confused`: the commonest pairs of classes."""

    worst: tuple[Mistake, ...]
    confused: tuple[Confused, ...]


def find_mistakes(
    outcomes: Outcomes,
    images: ImageSet,
    indices: Ints,
    labels: Ints,
    classes: Sequence[str],
    answers: Sequence[str],
) -> Mistakes:
    """What went most wrong.

    Args:
        indices, labels: (n,) which image of `images` each is, and its class.
        classes: names of the data's classes.
        answers: (n,) names of what was predicted.
    """
    wrong = np.flatnonzero(~outcomes.correct)
    by_loss = wrong[np.argsort(-outcomes.loss[wrong], kind="stable")]

    def mistake(row: int) -> Mistake:
        return Mistake(
            index=int(indices[row]),
            path=images.describe(int(indices[row])),
            true=classes[int(labels[row])],
            predicted=answers[row],
            probability=float(outcomes.confidence[row]),
            true_probability=float(np.exp(-outcomes.loss[row])),
        )

    pairs: dict[tuple[str, str], list[int]] = {}
    for row in by_loss.tolist():
        pairs.setdefault((classes[int(labels[row])], answers[row]), []).append(row)
    commonest = sorted(pairs.items(), key=lambda item: -len(item[1]))[:PAIRS]
    number = {classes[k]: int(count) for k, count in enumerate(np.bincount(labels))}
    confused = [
        Confused(true, said, len(rows), number[true], tuple(map(mistake, rows[:COLUMNS])))
        for (true, said), rows in commonest
    ]
    return Mistakes(tuple(mistake(int(row)) for row in by_loss[:WORST]), tuple(confused))


def mistakes_sheet(mistakes: Mistakes, images: ImageSet, words: Mapping[str, str]) -> Image.Image:
    """Both as pictures; under each the true class, what was said, and how surely.

    Args:
        words: what is written for the name of a class; itself where there is nothing.
    """

    def said(one: Mistake | Confused) -> str:
        return f"{words.get(one.true, one.true)}\n-> {words.get(one.predicted, one.predicted)}"

    def row(title: str, some: Sequence[Mistake]) -> Row:
        captions = [f"{said(one)}\n{100 * one.probability:.1f} %" for one in some]
        return Row(title, [one.index for one in some], captions)

    rows = []
    for start in range(0, len(mistakes.worst), COLUMNS):
        title = "least probable\ntrue class" if start == 0 else ""
        rows.append(row(title, mistakes.worst[start : start + COLUMNS]))
    for pair in mistakes.confused:
        rows.append(row(f"{said(pair)}\n{pair.images} of {pair.of} images", pair.examples))
    return draw_sheet(rows, images.read, columns=COLUMNS, side=SIDE)

"""Images with any number of labels: from cells such as `cat;dog` to ones and zeros."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitcli.data.assemble import has_label, label_names
from vitcli.errors import VitcliError

SEPARATOR = ";"
# A column of this name whose cells hold `;` has several labels without being asked.
PLURAL = "labels"

Integers = NDArray[np.int64]
Targets = NDArray[np.uint8]


def split_cell(cell: Any) -> list[Any]:
    """`cat; dog` -> cat and dog; nothing of an empty cell; a list stays."""
    if not has_label(cell):
        return []
    if isinstance(cell, list | tuple):
        return [label for label in cell if has_label(label)]
    if not isinstance(cell, str):
        return [cell]
    return [part for text in cell.split(SEPARATOR) if (part := text.strip())]


def is_multi_label(
    shown: str, column: str, cells: Sequence[Any], asked: bool | None, notes: list[str]
) -> bool:
    """Whether the cells of a label column hold several labels each; a note says why.

    A list says it by itself. `a;b` says it in a column called `labels`; in another, `;` may be a
    part of a class's name, and is one until `data.multi_label` is set.

    Raises:
        VitcliError: lists, where `data.multi_label` is set to false.
    """
    listed = sum(isinstance(cell, list) for cell in cells)
    if listed:
        if asked is False:
            raise VitcliError(
                f"`{shown}`: {listed:,} cells of `{column}` are lists of labels",
                "leave out `data.multi_label=false`",
            )
        notes.append(f"{shown}: `{column}` holds lists: an image has any number of labels")
        return True
    if asked is not None:
        return asked
    parted = sum(isinstance(cell, str) and SEPARATOR in cell for cell in cells)
    if not parted:
        return False
    if column.lower() == PLURAL:
        notes.append(
            f"{shown}: {parted:,} cells of `{column}` hold `{SEPARATOR}`: an image has any number "
            "of labels, none where the cell is empty (`--set data.multi_label=false`: each cell is "
            "one class)"
        )
        return True
    notes.append(
        f"{shown}: {parted:,} cells of `{column}` hold `{SEPARATOR}`, each taken as the name of "
        "one class; `--set data.multi_label=true` takes them as several labels"
    )
    return False


def several_labels(
    cells: Sequence[Any],
    number: Callable[[list[Any]], tuple[Sequence[str], Integers]] = label_names,
) -> tuple[Sequence[str], Integers, Targets]:
    """n cells -> (class names, (n,) the first label of each, (n, K) ones and zeros).

    Args:
        cells: each a list, `a;b`, one label, or empty.
        number: labels -> (class names, the number of each label).
    """
    parted = [split_cell(cell) for cell in cells]
    classes, flat = number([label for labels in parted for label in labels])
    lengths = np.array([len(labels) for labels in parted], dtype=np.int64)
    rows = np.repeat(np.arange(len(parted)), lengths)
    return classes, *ones_and_zeros(rows, flat, (len(parted), len(classes)))


def ones_and_zeros(
    rows: Integers, flat: Integers, shape: tuple[int, int]
) -> tuple[Integers, Targets]:
    """(n,) the first label of each image, -1 for none, and (n, K) ones and zeros.

    Args:
        rows: the image of each label, ascending.
        flat: the number of its class.
        shape: (n, K).
    """
    targets = np.zeros(shape, dtype=np.uint8)
    targets[rows, flat] = 1
    labels = np.full(shape[0], -1, dtype=np.int64)
    some, first = np.unique(rows, return_index=True)
    labels[some] = flat[first]
    return labels, targets

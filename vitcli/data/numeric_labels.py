"""Labels that are numbers: to predict them (regression), or to refuse them as classes."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from vitcli.data.image_set import ImageSet, Numbers
from vitcli.data.labels import label_text
from vitcli.errors import VitcliError, counted, printable

if TYPE_CHECKING:
    from vitcli.data.source import DataRequest, Source

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")
FAR_VALUE = 10.0  # times the width of the middle half
THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2},\d{3}")


def numeric_request(request: "DataRequest") -> "DataRequest":
    """The request for numbers, whose cells are never divided: `0,5` is a number.

    Raises:
        VitcliError: `[data]` asks for something that numbers do not have.
    """
    settings = request.settings
    if settings.streaming:
        raise VitcliError(
            "objective `mse` needs the mean of all training numbers, which a stream does not know",
            "remove `--streaming` or `data.streaming`",
        )
    if settings.multi_label or settings.label_separator is not None:
        raise VitcliError(
            "`data.multi_label` and `data.label_separator` are for several classes per image, and "
            "objective `mse` predicts one number",
            "remove them",
        )
    section = settings.model_copy(update={"multi_label": False})
    return replace(request, settings=section, numeric=True)


def with_numbers(shown: str, images: ImageSet, name: str) -> ImageSet:
    """The set with its labels as numbers, which are called `name`.

    Raises:
        VitcliError: a label is no number, or an image has several labels.
    """
    if images.values is not None:
        return images
    if images.targets is not None:
        raise VitcliError(
            f"`{shown}`: images have several labels, and objective `mse` predicts one number",
            "name a column with one number per image: `--set data.label_column=NAME`",
        )
    numbers = np.append(as_numbers(images.classes), np.nan)  # the last is for -1, no label
    values = numbers[images.labels]
    if words := np.flatnonzero(~np.isfinite(values) & (images.labels >= 0)).tolist():
        example = images.classes[images.labels[words[0]]]
        raise VitcliError(
            f"`{shown}`: {counted(len(words), 'labels', 'labels', len(images))} in `{name}` "
            f"{'is not a number' if len(words) == 1 else 'are not numbers'}, such as "
            f"`{printable(example)}`",
            "correct them, or name a column of numbers: `--set data.label_column=NAME`",
        )
    return images.with_values(name, values)


def refuse_numbers(shown: str, column: str, values: Iterable[Any]) -> None:
    """Raise if single labels are measurements (0.1, 0.25 …), as scikit-learn's `type_of_target`.

    Raises:
        VitcliError: all labels are numbers, and not all of them are whole.
    """
    names = {label_text(value) for value in values}
    several = ""
    if names and all(map(DECIMAL_COMMA.fullmatch, names)):
        numbers = [float(name.replace(",", ".")) for name in names]
        several = "; for several labels per cell: `--set data.label_separator=,`"
    elif all(map(NUMBER.fullmatch, names)):
        numbers = [float(name) for name in names]
    else:
        return
    if all(number.is_integer() for number in numbers):
        return
    fraction = min(name for name, number in zip(names, numbers, strict=True) if number % 1)
    raise VitcliError(
        f"`{shown}`: the labels in `{column}` are {len(names):,} different numbers such as "
        f"`{fraction}`, which is regression, and this is a classifier",
        "to predict the number: `vitcli finetune … --set objective.name=mse`; for classes, write "
        "`low` and `high` into the column, or name another: `--set data.label_column=NAME`"
        f"{several}",
    )


def as_numbers(names: Sequence[str]) -> Numbers:
    """(K,) the number of each label; NaN for one that is none.

    `0,5` is a number. `1,234` is none if all commas could divide thousands as well.
    """
    commas = {name for name in names if DECIMAL_COMMA.fullmatch(name)}
    if not all(map(THOUSANDS.fullmatch, commas)):
        names = [name.replace(",", ".") if name in commas else name for name in names]
    return np.array([float(name) if NUMBER.fullmatch(name) else np.nan for name in names])


def has_fractions(source: "Source") -> bool:
    """True if the labels are fractions, which a classifier takes as folder names only."""
    if source.multi_label or source.numeric or "CLASS" in source.layout:
        return False
    numbers = as_numbers(source.classes)
    return bool(np.isfinite(numbers).all() and (numbers % 1 != 0).any())


def label_values(source: "Source") -> Numbers | None:
    """(n,) the labels of all splits as numbers; None if they are words or several per image."""
    if source.multi_label or not source.classes:
        return None
    numbers = np.append(as_numbers(source.classes), np.nan)
    sets = source.splits.values()
    parts = [numbers[s.labels] if s.values is None else s.values for s in sets]
    values: Numbers = np.concatenate(parts)
    known = values[np.isfinite(values)]
    complete = source.numeric or len(known) == len(values)
    return known if complete and len(known) else None


def distribution(values: Numbers) -> dict[str, float]:
    """Count, mean, standard deviation and quartiles of (n,) numbers, for `check --json`."""
    quartiles = np.quantile(values, (0, 0.25, 0.5, 0.75, 1)).tolist()
    return {
        "images": len(values),
        "distinct": len(np.unique(values)),
        "mean": float(values.mean()),
        "std": float(values.std()),
        **dict(zip(("min", "q25", "median", "q75", "max"), quartiles, strict=True)),
    }


def far_values(values: Numbers) -> Numbers:
    """The numbers far outside the middle half, such as -999 for "unknown", ascending."""
    low, high = np.quantile(values, (0.25, 0.75))
    far = FAR_VALUE * float(high - low)
    return np.sort(values[(values < low - far) | (values > high + far)]) if far else values[:0]


def number_problems(values: Numbers) -> list[str]:
    """Sentences about numbers that cannot be learned or stand apart."""
    lines, far = [], far_values(values)
    if values.min() == values.max():
        lines.append(f"all numbers are {values[0]:.6g}, so there is nothing to learn")
    if len(far):
        found = counted(len(far), "number is", "numbers are")
        lines.append(
            f"{found} far from all others, such as {far[0]:.6g}; remove them if they mean `unknown`"
        )
    return lines

"""From the images of each split to a `Source`: classes by one order, splits made, a fingerprint."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from vitcli.data.sets import ImageSet, Integers, Request, Source
from vitcli.data.splits import divide
from vitcli.errors import VitcliError, printable


def make_source(
    request: Request, splits: Mapping[str, ImageSet], parts: Iterable[bytes], notes: Sequence[str]
) -> Source:
    """Align classes by name, split as asked, and check.

    Args:
        request: what the user asked for.
        splits: split name -> images; empty ones are dropped.
        parts: what tells this data from other, for the fingerprint; labels are added here.
        notes: what the user should know.

    Raises:
        VitcliError: no images; one class only; a class that training has not; splits that cannot
            be made.
    """
    notation = request.shown
    splits = {name: images for name, images in splits.items() if len(images)}
    if not splits:
        raise VitcliError(f"`{notation}` has no images", "give data with at least two classes")
    several = any(images.targets is not None for images in splits.values())
    if request.multi_label and not several:
        raise VitcliError(
            f"`{notation}` gives each image one class, and `data.multi_label` asks for several",
            "several labels are lists in parquet, JSON lines or shards, or `a;b` in a CSV file",
        )
    if several:
        splits = {name: _with_targets(images) for name, images in splits.items()}
    base = splits.get("train") or next(iter(splits.values()))
    aligned = _align(notation, base, splits)
    if request.labelled and not several and len(np.unique(base.labels)) < 2:
        only = base.classes[int(base.labels[0])]
        raise VitcliError(f"`{notation}` has only one class: `{only}`", _two_classes(request, only))
    if request.labelled and several and not base.class_counts().any():
        raise VitcliError(
            f"no image of `{notation}` has a label", "see to its label column, or name another"
        )
    divided = divide({name: images.labels for name, images in aligned.items()}, request)
    made = {}
    for name, (origin, indices) in divided.parts.items():
        whole = aligned[origin]
        made[name] = whole
        if indices is not None:
            made[name] = whole.subset(indices, name)
        elif name != origin:
            made[name] = whole.subset(np.arange(len(whole)), name)
    hashed = [*parts, *(name.encode() + s.labels.tobytes() for name, s in made.items())]
    hashed += [s._rows.tobytes() for s in made.values()]
    hashed += [s.targets.tobytes() for s in made.values() if s.targets is not None]
    record = {"images": {name: len(images) for name, images in made.items()}, **divided.record}
    told = (*notes, *divided.notes)
    return Source(notation, made, base.classes, fingerprint(hashed), told, record)


def _two_classes(request: Request, only: str) -> str:
    """What to do about a single class; archives often unpack into a folder of their own name."""
    inside = request.path / only
    if inside.is_dir() and any(entry.is_dir() for entry in inside.iterdir()):
        return f"if its sub-folders are the classes, give `{printable(inside)}`"
    return "a classifier needs at least two; put each class into a folder of its own"


def fingerprint(parts: Iterable[bytes]) -> str:
    """A short hash of the parts and of where one ends."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:16]


def _with_targets(images: ImageSet) -> ImageSet:
    """The same set with ones and zeros; a set whose images have one class each has a one there."""
    if images.targets is None:
        images.targets = np.zeros((len(images), len(images.classes)), dtype=np.uint8)
        images.targets[np.arange(len(images)), images.labels] = 1
    return images


def _align(notation: str, base: ImageSet, splits: Mapping[str, ImageSet]) -> dict[str, ImageSet]:
    """All splits over the classes of `base`."""
    aligned = {}
    known = set(base.classes)
    for name, images in splits.items():
        present = [images.classes[label] for label in np.flatnonzero(images.class_counts())]
        extra = [label for label in present if label not in known]
        if extra:
            raise VitcliError(
                f"`{notation}`: class `{extra[0]}` is in `{name}` but not in `{base.name}`"
                + (f", and so are {len(extra) - 1} others" if len(extra) > 1 else ""),
                f"give it training images, or take it out of `{name}`",
            )
        aligned[name] = (
            images if images.classes == base.classes else images.relabelled(base.classes)
        )
    return aligned


def has_label(cell: Any) -> bool:
    """Whether a cell says a class: it is not missing, blank or, as pandas fills gaps, NaN."""
    if isinstance(cell, str | bytes):
        return bool(cell.strip())
    return cell is not None and cell == cell  # NaN is unlike itself


def label_text(value: Any) -> str:
    r"""A label as a class name that can be stored: bytes that are not UTF-8 become `\xe9`.

    Whole numbers are written as such, also where a table with gaps has made them 1.0.
    """
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    text = str(value)
    if text.isascii():
        return text
    with suppress(UnicodeEncodeError):  # a surrogate that stands for no byte
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return text.encode("utf-8", "backslashreplace").decode()


def label_names(values: Sequence[Any]) -> tuple[tuple[str, ...], Integers]:
    """Labels of any kind -> (sorted class names, (n,) labels); whole numbers sort as numbers."""
    names = [label_text(value) for value in values]
    unique = sorted(set(names))
    if all(name.isdecimal() and str(int(name)) == name for name in unique):
        unique.sort(key=int)
    position = {name: label for label, name in enumerate(unique)}
    return tuple(unique), np.array([position[name] for name in names], dtype=np.int64)

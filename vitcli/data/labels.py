"""From the images of each split to a `Source`: classes by one order, splits made, a fingerprint.

Images with any number of labels: from cells such as `cat;dog` to ones and zeros.

Label columns of arrow tables -> class numbers.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitcli.data.image_set import ImageSet, Integers, Request, Source
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


SEPARATOR = ";"
# A column of this name whose cells hold `;` has several labels without being asked.
PLURAL = "labels"

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


def class_names(feature: Any) -> Sequence[str] | None:
    """The names that a `ClassLabel`, or a list of them, carries; None where there are none."""
    inner = getattr(feature, "feature", None)
    names: Sequence[str] | None = getattr(feature, "names", None) or getattr(inner, "names", None)
    return names


def several(column: Any, shown: str, name: str, asked: bool | None, notes: list[str]) -> Any:
    """The column as a `pyarrow.ListArray` of labels, where an image has several; else None.

    Args:
        column: a `pyarrow.ChunkedArray`: of lists, or of text such as `a;b`.
        shown, name: of file and column, for notes.
        asked: see `is_multi_label`.
    """
    import pyarrow.compute as pc
    import pyarrow.types as types

    kind = column.type
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        is_multi_label(shown, name, [[]], asked, notes)
        return column.combine_chunks()
    if not (types.is_string(kind) or types.is_large_string(kind)):
        return None
    parted = column.filter(pc.fill_null(pc.match_substring(column, SEPARATOR), False))
    if not is_multi_label(shown, name, parted.to_pylist(), asked, notes):
        return None
    return pc.split_pattern(column, SEPARATOR).combine_chunks()


def numbered_lists(
    shown: str, lists: Any, names: Sequence[str] | None
) -> tuple[tuple[str, ...], Integers, Targets]:
    """A `pyarrow.ListArray` of n cells -> (class names, (n,) first labels, (n, K) ones and zeros).

    Null, empty and -1 are no label, as in `numbered`.
    """
    import pyarrow.compute as pc
    import pyarrow.types as types

    rows = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False).astype(np.int64)
    flat = pc.list_flatten(lists)
    if types.is_string(flat.type) or types.is_large_string(flat.type):
        flat = pc.utf8_trim_whitespace(flat)
    kept, numbers, classes = numbered(shown, flat.dictionary_encode(), names)
    return classes, *ones_and_zeros(rows[kept], numbers, (len(lists), len(classes)))


def numbered(
    shown: str, values: Any, names: Sequence[str] | None
) -> tuple[Integers, Integers, tuple[str, ...]]:
    """Label cells -> (rows that have one, their numbers, class names); -1 and null mean none.

    Args:
        values: a `pyarrow.DictionaryArray`.
        names: of the classes, where the file tells them.
    """
    codes = values.indices.fill_null(-1).to_numpy().astype(np.int64)  # (n,) into the distinct ones
    distinct = values.dictionary.to_pylist()
    said = [has_label(value) and value != -1 for value in distinct]
    used = [c for c in np.unique(codes).tolist() if c >= 0 and said[c]]
    rows = np.flatnonzero(np.isin(codes, used))
    kept = [distinct[code] for code in used]
    if names is None or not all(isinstance(value, int) for value in kept):
        classes, found = label_names(kept)
    else:
        classes, found = tuple(str(name) for name in names), np.array(kept, dtype=np.int64)
        if found.size and not 0 <= found.min() <= found.max() < len(classes):
            fault = f"`{shown}` has label {found.max()}, but names {len(classes)} classes"
            raise VitcliError(fault, "write the file anew with `datasets` and a ClassLabel")
    number = np.zeros(len(distinct), dtype=np.int64)
    number[used] = found
    return rows, number[codes[rows]], classes

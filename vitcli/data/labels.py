"""Label cells of tables and shards to class names and class indices, one or several per image.

The first half takes Python values, the second half arrow columns. A multi-label image has a
multi-hot row of targets; its class index is that of its first label, or -1 if it has none.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitcli.data.image_set import Integers
from vitcli.errors import VitcliError

SEPARATOR = ";"
MULTI_LABEL_COLUMN = "labels"  # cells such as `cat;dog` in a column of this name are two labels

MultiHot = NDArray[np.uint8]


def has_label(cell: Any) -> bool:
    """False for a cell that is None, blank or NaN (pandas writes NaN into empty cells)."""
    if isinstance(cell, str | bytes):
        return bool(cell.strip())
    return cell is not None and cell == cell  # NaN is not equal to itself


def label_text(value: Any) -> str:
    r"""A label as a class name in valid UTF-8: other bytes become `\xe9`.

    A whole number is written as one, even if a table with empty cells has stored it as 1.0.
    """
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    text = str(value)
    if text.isascii():
        return text
    with suppress(UnicodeEncodeError):  # a lone surrogate that does not come from a byte
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return text.encode("utf-8", "backslashreplace").decode()


def sorted_classes(names: Iterable[str]) -> list[str]:
    """Class names sorted as text; if all are whole numbers, as numbers: `2` before `10`."""
    ordered = sorted(names)
    if all(name.isascii() and name.isdecimal() for name in ordered):
        ordered.sort(key=lambda name: (len(name.lstrip("0")), name.lstrip("0")))
    return ordered


def encode_labels(values: Sequence[Any]) -> tuple[tuple[str, ...], Integers]:
    """n labels -> (sorted class names, (n,) class indices); whole numbers sort as numbers."""
    names = [label_text(value) for value in values]
    unique = sorted_classes(set(names))
    index = {name: label for label, name in enumerate(unique)}
    return tuple(unique), np.array([index[name] for name in names], dtype=np.int64)


def split_labels(cell: Any) -> list[Any]:
    """`cat; dog` -> ["cat", "dog"]; a list stays a list; an empty cell gives no label."""
    if not has_label(cell):
        return []
    if isinstance(cell, list | tuple):
        return [label for label in cell if has_label(label)]
    if not isinstance(cell, str):
        return [cell]
    return [part for text in cell.split(SEPARATOR) if (part := text.strip())]


def is_multi_label(
    shown: str, column: str, cells: Sequence[Any], setting: bool | None, notes: list[str]
) -> bool:
    """Decide if the cells of a label column hold several labels each; add a note about it.

    Lists always do. Text with `;` does in a column named `labels`. In other columns `;` may be part
    of a class name, so it splits labels only if `data.multi_label` (`setting`) is true.

    Raises:
        VitcliError: the cells are lists, but `data.multi_label` is false.
    """
    lists = sum(isinstance(cell, list) for cell in cells)
    if lists:
        if setting is False:
            raise VitcliError(
                f"`{shown}`: {lists:,} cells of `{column}` are lists, but `data.multi_label` is "
                "false",
                "remove `data.multi_label=false`",
            )
        notes.append(f"{shown}: multi-label data, because `{column}` holds lists")
        return True
    if setting is not None:
        return setting
    separated = sum(isinstance(cell, str) and SEPARATOR in cell for cell in cells)
    if not separated:
        return False
    cells_hold = f"{shown}: {separated:,} cells of `{column}` contain `{SEPARATOR}`"
    if column.lower() == MULTI_LABEL_COLUMN:
        notes.append(
            f"{cells_hold}: multi-label data, and an empty cell is an image without labels "
            "(for one class per cell: `--set data.multi_label=false`)"
        )
        return True
    notes.append(
        f"{cells_hold}: each cell is one class name "
        "(for several labels per cell: `--set data.multi_label=true`)"
    )
    return False


def encode_multi_label(
    cells: Sequence[Any],
    encode: Callable[[list[Any]], tuple[Sequence[str], Integers]] = encode_labels,
) -> tuple[Sequence[str], Integers, MultiHot]:
    """n cells -> (class names, (n,) index of the first label, (n, K) multi-hot targets).

    Args:
        cells: each a list, `a;b`, one label, or empty.
        encode: all labels -> (class names, the class index of each label).
    """
    lists = [split_labels(cell) for cell in cells]
    classes, indices = encode([label for labels in lists for label in labels])
    lengths = np.array([len(labels) for labels in lists], dtype=np.int64)
    rows = np.repeat(np.arange(len(lists)), lengths)
    return classes, *multi_hot(rows, indices, (len(lists), len(classes)))


def multi_hot(
    rows: Integers, indices: Integers, shape: tuple[int, int]
) -> tuple[Integers, MultiHot]:
    """((n,) class index of each image's first label, -1 for none; (n, K) multi-hot targets).

    Args:
        rows: the image of each label, ascending.
        indices: the class index of each label.
        shape: (n, K).
    """
    targets = np.zeros(shape, dtype=np.uint8)
    targets[rows, indices] = 1
    labels = np.full(shape[0], -1, dtype=np.int64)
    labelled, first = np.unique(rows, return_index=True)
    labels[labelled] = indices[first]
    return labels, targets


def class_names(feature: Any) -> Sequence[str] | None:
    """The names in a `datasets.ClassLabel`, or in a list of them; None if there are none."""
    inner = getattr(feature, "feature", None)
    names: Sequence[str] | None = getattr(feature, "names", None) or getattr(inner, "names", None)
    return names


def arrow_label_lists(
    column: Any, shown: str, name: str, setting: bool | None, notes: list[str]
) -> Any:
    """A multi-label column as a `pyarrow.ListArray`; None if each image has one label.

    Args:
        column: a `pyarrow.ChunkedArray` of lists, or of text such as `a;b`.
        shown, name: file and column, for messages.
        setting: `data.multi_label`, see `is_multi_label`.
    """
    import pyarrow.compute as pc
    import pyarrow.types as types

    kind = column.type
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        is_multi_label(shown, name, [[]], setting, notes)
        return column.combine_chunks()
    if not (types.is_string(kind) or types.is_large_string(kind)):
        return None
    separated = column.filter(pc.fill_null(pc.match_substring(column, SEPARATOR), False))
    if not is_multi_label(shown, name, separated.to_pylist(), setting, notes):
        return None
    return pc.split_pattern(column, SEPARATOR).combine_chunks()


def encode_arrow_lists(
    shown: str, lists: Any, names: Sequence[str] | None
) -> tuple[tuple[str, ...], Integers, MultiHot]:
    """A `pyarrow.ListArray` of n cells -> the result of `encode_multi_label`.

    Null, empty and -1 are no labels, as in `encode_arrow`.
    """
    import pyarrow.compute as pc
    import pyarrow.types as types

    rows = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False).astype(np.int64)
    flat = pc.list_flatten(lists)
    if types.is_string(flat.type) or types.is_large_string(flat.type):
        flat = pc.utf8_trim_whitespace(flat)
    kept, indices, classes = encode_arrow(shown, flat.dictionary_encode(), names)
    return classes, *multi_hot(rows[kept], indices, (len(lists), len(classes)))


def encode_arrow(
    shown: str, values: Any, names: Sequence[str] | None
) -> tuple[Integers, Integers, tuple[str, ...]]:
    """Label cells -> (rows that have a label, their class indices, class names).

    Args:
        values: a `pyarrow.DictionaryArray`; null and -1 mean no label.
        names: class names, if the file holds them.
    """
    codes = values.indices.fill_null(-1).to_numpy().astype(np.int64)  # (n,) into the dictionary
    distinct = values.dictionary.to_pylist()
    is_label = [has_label(value) and value != -1 for value in distinct]
    used = [code for code in np.unique(codes).tolist() if code >= 0 and is_label[code]]
    rows = np.flatnonzero(np.isin(codes, used))
    labels = [distinct[code] for code in used]
    if names is None or not all(isinstance(label, int) for label in labels):
        classes, indices = encode_labels(labels)
    else:
        classes, indices = tuple(str(name) for name in names), np.array(labels, dtype=np.int64)
        if indices.size and not 0 <= indices.min() <= indices.max() < len(classes):
            raise VitcliError(
                f"`{shown}` has label {indices.max()}, but names only {len(classes)} classes",
                "write the file again with `datasets` and a matching ClassLabel",
            )
    index_of_code = np.zeros(len(distinct), dtype=np.int64)
    index_of_code[used] = indices
    return rows, index_of_code[codes[rows]], classes

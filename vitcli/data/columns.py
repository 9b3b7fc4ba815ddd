"""Label columns of arrow tables -> class numbers."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vitcli.data.assemble import has_label, label_names
from vitcli.data.multilabel import SEPARATOR, Targets, is_multi_label, ones_and_zeros
from vitcli.data.sets import Integers
from vitcli.errors import VitcliError


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

"""Label cells of tables and shards to class names and class indices, one or several per image.

The first half takes Python values, the second half arrow columns. A multi-label image has a
multi-hot row of targets; its class index is that of its first label, or -1 if it has none.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain, repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitcli.config.schema import DataSection
from vitcli.data.image_set import Integers
from vitcli.errors import VitcliError, counted, quoted

# Missing cells as pandas and NumPy (`nan`), Python (`None`), SQL and Excel write them. `NA` and
# `none` stay labels, because people write them.
MISSING = frozenset({"nan", "NaN", "NAN", "None", "null", "NULL", "<NA>", "#N/A"})
SEPARATORS = ("|", ";", ",", " ")  # between several labels of one cell, in order of preference
PLURAL_COLUMN = re.compile(
    r"(?:^|[\W_])(?:labels|tags|classes|categories|attributes|ids)$", re.IGNORECASE
)
BRACKETED = re.compile(r"\[.*\]|\{.*['\",].*\}|\(.*['\",].*\)", re.DOTALL)
QUOTED = re.compile(r"""'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)\"""")
CONTAIN = (("cell", "contains"), ("cells", "contain"))
MAX_SHOWN = 3  # examples in a note

MultiHot = NDArray[np.uint8]
Splitter = Callable[[Any], list[Any]]


def has_label(cell: Any) -> bool:
    """False for a cell that is None, blank, NaN or a text of MISSING."""
    if isinstance(cell, str | bytes):
        text = cell.decode("latin-1").strip() if isinstance(cell, bytes) else cell.strip()
        return bool(text) and text not in MISSING
    return cell is not None and cell == cell  # NaN is not equal to itself


def raw_text(value: Any) -> str:
    r"""A label as valid UTF-8: other bytes become `\xe9`, and the whole number 1.0 becomes `1`."""
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


def label_text(value: Any) -> str:
    """A label as a class name, without blanks around it, its letters composed (Unicode NFC)."""
    text = raw_text(value).strip()
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def sorted_classes(names: Iterable[str]) -> list[str]:
    """Class names sorted as text; if all are whole numbers, as numbers: `2` before `10`."""
    ordered = sorted(names)
    if all(name.isascii() and name.isdecimal() for name in ordered):
        ordered.sort(key=lambda name: (len(name.lstrip("0")), name.lstrip("0")))
    return ordered


def encode_labels(values: Sequence[Any]) -> tuple[tuple[str, ...], Integers]:
    """n labels -> (sorted class names, (n,) class indices); whole numbers sort as numbers.

    If all are whole numbers and some are written as `1.0`, the classes are `1`, `2` …
    """
    names = [label_text(value) for value in values]
    whole = _whole_numbers(set(names))
    names = [whole.get(name, name) for name in names]
    unique = sorted_classes(set(names))
    index = {name: label for label, name in enumerate(unique)}
    return tuple(unique), np.array([index[name] for name in names], dtype=np.int64)


def _whole_numbers(names: set[str]) -> dict[str, str]:
    """`1.0` -> `1` for each name, if all are whole numbers without leading zeros, else {}."""
    if not any("." in name for name in names):
        return {}
    whole = {name: name.partition(".")[0] for name in names}
    plain = all(re.fullmatch(r"-?(0|[1-9]\d*)(\.0*)?", name) for name in names)
    return whole if plain else {}


def merged_note(shown: str, values: Iterable[Any]) -> list[str]:
    """A note about labels that are equal up to blanks or encoding, or none."""
    written: dict[str, set[str]] = {}
    for raw in {raw_text(value) for value in values}:
        written.setdefault(label_text(raw), set()).add(raw)
    merged = {name: forms for name, forms in written.items() if len(forms) > 1}
    if not merged:
        return []
    extra = sum(len(forms) - 1 for forms in merged.values())
    names = quoted(sorted(merged), MAX_SHOWN)
    return [
        f"{shown}: merged {extra} spelling{'s' if extra > 1 else ''} of labels that differ only in "
        f"blanks or in the encoding of accents ({names})"
    ]


def tidy_notes(shown: str, values: Iterable[Any]) -> list[str]:
    """Notes about labels that are equal up to blanks (one class) or up to case (several)."""
    values = [value for value in values if has_label(value)]
    by_form: dict[str, list[str]] = {}
    for name in sorted(set(map(label_text, values))):
        by_form.setdefault(unicodedata.normalize("NFKC", name).casefold(), []).append(name)
    notes = merged_note(shown, values)
    if similar := [names for names in by_form.values() if len(names) > 1]:
        groups = "; ".join(quoted(names) for names in similar[:MAX_SHOWN])
        if (more := len(similar) - MAX_SHOWN) > 0:
            groups += f"; and {counted(more, 'more group', 'more groups')}"
        notes.append(
            f"{shown}: labels that differ only in case are different classes: {groups}; correct "
            "the table if they are one"
        )
    return notes


def missing_texts(cells: Iterable[Any]) -> str:
    """` (2 `NaN`, 1 `None`)` for cells with a text of MISSING, else nothing."""
    counts = Counter(
        cell.strip() for cell in cells if isinstance(cell, str) and cell.strip() in MISSING
    )
    found = ", ".join(f"{count:,} `{text}`" for text, count in sorted(counts.items()))
    return f" ({found})" if found else ""


def split_labels(cell: Any, separator: str = ";") -> list[Any]:
    """`cat; dog` -> ["cat", "dog"]; a list stays a list; an empty cell gives no label."""
    if not has_label(cell):
        return []
    if isinstance(cell, list | tuple):
        return [label for label in cell if has_label(label)]
    if not isinstance(cell, str):
        return [cell]
    return [part for text in cell.split(separator) if has_label(part := text.strip())]


def split_bracketed(cell: Any) -> list[Any]:
    """The labels of `['a', 'b']`, `["a", "b"]`, `['a' 'b']` (NumPy), `[1, 2]`, `{'a'}`, `[]`."""
    if not isinstance(cell, str) or not has_label(cell):
        return split_labels(cell)
    inside = cell.strip()[1:-1]
    if found := list(QUOTED.finditer(inside)):
        parts = [one[1] if one[1] is not None else one[2] for one in found]
        return [re.sub(r"\\(.)", r"\1", part) for part in parts if has_label(part)]
    parts = inside.split(",") if "," in inside else inside.split()
    return [text for part in parts if has_label(text := part.strip())]


def label_splitter(
    shown: str,
    column: str,
    cells: Iterable[Any],
    settings: DataSection,
    notes: list[str],
) -> Splitter | None:
    """The function from a cell to its labels if cells hold several; None if each holds one.

    Lists always do. A text cell does in these cases, and a note says so:

    1. `data.label_separator` is given.
    2. All cells are bracketed lists: `['a', 'b']`.
    3. The cells contain `|` or `;`, and the column is called `labels`, `tags` … or at least half of
       the parts occur in other cells too.
    4. The cells contain `,` (or blanks, only in a column called `labels`, `tags` …), and at least
       half of the parts are also whole cells, or few parts make many cells.

    `data.multi_label` overrules 2 to 4.

    Raises:
        VitcliError: the cells are lists, but `data.multi_label` is false.
    """
    setting, counts, lists = settings.multi_label, Counter[str](), 0
    for cell in cells:
        if isinstance(cell, list):
            lists += 1
        elif isinstance(cell, str) and has_label(cell):
            counts[cell] += 1
    if lists:
        if setting is False:
            one, more = f"cell of `{column}` is a list", f"cells of `{column}` are lists"
            raise VitcliError(
                f"`{shown}`: {counted(lists, one, more)}, but `data.multi_label` is false",
                "remove `data.multi_label=false`; objective `mse` takes one number per image",
            )
        notes.append(f"{shown}: multi-label data, because `{column}` holds lists")
        return split_labels
    if setting is False:
        return None
    if settings.label_separator is not None:
        return partial(split_labels, separator=settings.label_separator)
    if counts and all(BRACKETED.fullmatch(cell.strip()) for cell in counts):
        notes.append(f"{shown}: multi-label data, because `{column}` holds lists as text")
        return split_bracketed
    return _find_separator(shown, column, counts, setting, notes)


def _find_separator(
    shown: str, column: str, counts: Counter[str], setting: bool | None, notes: list[str]
) -> Splitter | None:
    """Rules 3 and 4 of `label_splitter`."""
    plural = setting or PLURAL_COLUMN.search(column) is not None
    containing = {
        s: sum(count for cell, count in counts.items() if s in cell.strip()) for s in SEPARATORS
    }

    def holding(mark: str) -> str:
        one, more = (f"{cells} of `{column}` {verb}" for cells, verb in CONTAIN)
        return f"{counted(containing[mark], one, more)} `{mark}`"

    for separator in SEPARATORS:
        if containing[separator] and _separates(counts, separator, plural):
            notes.append(
                f"{shown}: {holding(separator)}: "
                "multi-label data, and an empty cell is an image without labels (for one class "
                "per cell: `--set data.multi_label=false`)"
            )
            return partial(split_labels, separator=separator)
    present = next((s for s in SEPARATORS if containing[s] and (s != " " or plural)), None)
    if setting:
        return partial(split_labels, separator=(present or "").strip() or SEPARATORS[0])
    if present:
        way = "multi_label=true" if present != " " else "label_separator=' '"
        notes.append(
            f"{shown}: {holding(present)}: each cell is one class name (for several labels per "
            f"cell: `--set data.{way}`)"
        )
    return None


def _separates(counts: Counter[str], separator: str, plural: bool) -> bool:
    """Rules 3 and 4 of `label_splitter` for one separator."""
    if separator in "|;" and plural:
        return True
    if separator == " " and not plural:
        return False
    cells = {tuple(split_labels(cell, separator)) for cell in counts}
    occurs = Counter(part for parts in cells for part in set(parts))
    several = [parts for parts in cells if len(parts) > 1]
    divided = {part for parts in several for part in parts}
    alone = {parts[0] for parts in cells if len(parts) == 1}
    if separator in ", ":
        few = plural and 2 * len(divided) <= len(several)
        return bool(divided) and (few or 2 * len(divided & alone) >= len(divided))
    return bool(divided) and 2 * sum(occurs[part] > 1 for part in divided) >= len(divided)


def encode_multi_label(
    cells: Sequence[Any],
    encode: Callable[[list[Any]], tuple[Sequence[str], Integers]] = encode_labels,
    split: Splitter = split_labels,
) -> tuple[Sequence[str], Integers, MultiHot]:
    """n cells -> (class names, (n,) index of the first label, (n, K) multi-hot targets).

    Args:
        cells: each a list, text, one label, or empty.
        encode: all labels -> (class names, the class index of each label).
        split: a cell -> its labels.
    """
    lists = [split(cell) for cell in cells]
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
    column: Any, shown: str, name: str, settings: DataSection, notes: list[str]
) -> Any:
    """A multi-label column as a `pyarrow.ListArray`; None if each image has one label.

    Args:
        column: a `pyarrow.ChunkedArray` of lists, or of text such as `a;b`.
        shown, name: file and column, for messages.
        settings: see `label_splitter`.
    """
    import pyarrow as pa
    import pyarrow.types as types

    kind = column.type
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        label_splitter(shown, name, [[]], settings, notes)
        return column.combine_chunks()
    if not (types.is_string(kind) or types.is_large_string(kind)):
        return None
    values = column.dictionary_encode().unify_dictionaries().combine_chunks()
    cells = values.dictionary.to_pylist()
    counts = np.bincount(values.indices.drop_null().to_numpy(), minlength=len(cells))
    every = chain.from_iterable(map(repeat, cells, counts.tolist()))
    split = label_splitter(shown, name, every, settings, notes)
    if split is None:
        return None
    lists = pa.array([split(cell) for cell in cells], pa.list_(pa.string()))
    return lists.take(values.indices)


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
    shown: str, values: Any, names: Sequence[str] | None, missing: int | None = -1
) -> tuple[Integers, Integers, tuple[str, ...]]:
    """Label cells -> (rows that have a label, their class indices, class names).

    Args:
        values: a `pyarrow.DictionaryArray`; null and `missing` mean no label.
        names: class names, if the file holds them.
    """
    codes = values.indices.fill_null(-1).to_numpy().astype(np.int64)  # (n,) into the dictionary
    distinct = values.dictionary.to_pylist()
    is_label = [has_label(value) and (missing is None or value != missing) for value in distinct]
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


def spelling_variants(classes: Iterable[str]) -> list[list[str]]:
    """Groups of class names that differ only in case, spaces, `_` or `-`."""
    by_form: dict[str, list[str]] = {}
    for name in classes:
        form = "".join(c for c in name.casefold() if c.isalnum()) or name.strip()
        by_form.setdefault(form, []).append(name)
    return [names for names in by_form.values() if len(names) > 1]

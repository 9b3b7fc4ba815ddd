"""Which columns of a table hold the image, the labels, the split and the group."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from vitcli.config.schema import DataSection
from vitcli.data.labels import has_label, label_text
from vitcli.data.readers.table_text import TextTable, is_image_text
from vitcli.data.splits import GROUP_COLUMN
from vitcli.errors import VitcliError, printable, quoted, unknown

LABEL_COLUMNS = (
    "label", "labels", "class", "category", "target", "y", "class_name", "fine_label", "classes",
    "categories", "tags", "label_name", "category_name", "target_name", "class_label", "diagnosis",
    "breed", "species", "dx", "level", "finding_labels", "class_id", "label_id", "category_id",
    "attribute_ids",
)  # fmt: skip
IMAGE_COLUMNS = (
    "image", "img", "path", "file", "file_name", "filename", "filepath", "file_path",
    "image_path", "image_file", "image_bytes", "bytes", "png", "jpg",
)  # fmt: skip
# In a table, an identifier is a path too: `data.image_root` and `data.image_suffix` complete it.
TABLE_IMAGE_COLUMNS = (
    *IMAGE_COLUMNS, "img_path", "image_filename", "image_file_name", "image_name", "img_name",
    "photo", "picture", "image_url", "url", "image_index", "image_id", "img_id", "id_code", "id",
)  # fmt: skip
SPLIT_COLUMNS = (
    "split", "subset", "set", "partition", "data_split", "dataset", "usage", "phase", "train_test",
    "fold", "folds", "kfold",
)  # fmt: skip
# A column of yes and no -> the split of the rows that say yes.
SPLIT_FLAGS = {
    "is_test": "test",
    "is_valid": "validation",
    "is_validation": "validation",
    "is_val": "validation",
    "is_train": "train",
}
YES = frozenset({"true", "1", "1.0", "yes", "y", "t"})
NO = frozenset({"false", "0", "0.0", "no", "n", "f", ""})
# Columns that are mentioned in a note; a column called `group` is used.
GROUP_HINTS = (
    "group_id", "patient", "patient_id", "subject", "subject_id", "lesion_id", "video", "video_id",
    "person_id", "site",
)  # fmt: skip
INDEX_COLUMNS = ("", "unnamed:_0", "index", "#")  # row numbers, as pandas writes them
IGNORE = "none"  # as `data.split_column`


@dataclass(frozen=True)
class Columns:
    """The columns that are read.

    Attributes:
        image: the path.
        labels: one column; or several that say the same; or, if `one_hot`, one per class; or none.
        one_hot: True if each of `labels` is a class with cells 0 and 1.
        splits: columns that can name a split.
        group: rows with the same cell stay in the same split.
    """

    image: str
    labels: tuple[str, ...]
    one_hot: bool = False
    splits: tuple[str, ...] = ()
    group: str | None = None


def plain_name(name: Any) -> str:
    """`Image Index`, `ImageIndex`, `image-index` -> `image_index`."""
    text = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", str(name).strip())
    return re.sub(r"[\s.\-]+", "_", text).lower()


def plain_cell(value: Any) -> Any:
    """A cell that can be counted: the text of a list or of an object."""
    return str(value) if isinstance(value, list | dict) else value


def check_label(shown: str, image: str, label: Any) -> None:
    """Raise a VitcliError for an object of JSON, and for a list that holds objects or lists."""
    inside = label if isinstance(label, list) else ()
    if isinstance(label, dict) or any(isinstance(one, list | dict) for one in inside):
        raise VitcliError(
            f"`{shown}`: the label of `{printable(image)}` is `{printable(str(label))[:80]}`",
            "write a text, a number, or a list of these",
        )


def known_columns(columns: Sequence[str], usual: Sequence[str]) -> list[str]:
    """The columns with one of the usual names, in the order of these names."""
    by_name = {plain_name(name): name for name in reversed(columns)}
    return [by_name[name] for name in usual if name in by_name]


def find_column(
    shown: str, kind: str, given: str | None, columns: Sequence[str], usual: Sequence[str]
) -> str:
    """The column `given` by the user, else the first of the `usual` names.

    Raises:
        VitcliError: there is no such column, or it occurs twice; the error lists the columns.
    """
    present = quoted(columns)
    if given is not None:
        if columns.count(given) > 1:
            raise VitcliError(
                f"`{shown}` has {columns.count(given)} columns `{given}`", "rename one of them"
            )
        if given in columns:
            return given
        hint = unknown("column", given, columns).hint
        raise VitcliError(f"`{shown}` has no column `{given}` (it has {present})", hint)
    if known := known_columns(columns, usual):
        return find_column(shown, kind, known[0], columns, usual)
    raise VitcliError(
        f"`{shown}` has no {kind} column with a known name (it has {present})",
        f"name the column: `--set data.{kind}_column=NAME`",
    )


def choose_table_columns(
    shown: str,
    table: TextTable,
    head: Sequence[Mapping[Any, Any]],
    settings: DataSection,
    exists: Callable[[str], bool],
    notes: list[str],
    *,
    labelled: bool = True,
) -> Columns:
    """The columns of a table.

    Args:
        shown: the table, for messages.
        table: its header.
        head: its first rows.
        settings: columns that the user names.
        exists: tells whether a cell is the path of an image.
        notes: receives what was assumed.
        labelled: False accepts a table without labels.

    Raises:
        VitcliError: a column is missing or ambiguous.
    """
    image = _image_column(shown, table, head, settings, exists)
    splits = split_columns(shown, table.header, settings)
    group = group_column(shown, table.header, settings)
    if group in (image, settings.label_column) and settings.group_column is None:
        group = None
    hints = known_columns(table.header, GROUP_HINTS)
    used = {image, *splits, group, *hints, *known_columns(table.header, INDEX_COLUMNS)}
    rest = [name for name in table.header if name not in used]
    labels, one_hot = _label_columns(shown, table, head, settings, rest, notes, labelled)
    if len(labels) == 1:
        note_coarser(shown, labels[0], table.header, settings, notes)
    return Columns(image, labels, one_hot, tuple(s for s in splits if s not in labels), group)


def _image_column(
    shown: str,
    table: TextTable,
    head: Sequence[Mapping[Any, Any]],
    settings: DataSection,
    exists: Callable[[str], bool],
) -> str:
    """The column of paths; of several with known names the one whose images exist."""
    if not table.named and settings.image_column is None:
        first = head[0]
        return next((n for n in table.header if is_image_text(first.get(n, ""))), table.header[0])
    known = known_columns(table.header, TABLE_IMAGE_COLUMNS)
    if settings.image_column is not None or len(known) < 2:
        return find_column(shown, "image", settings.image_column, table.header, TABLE_IMAGE_COLUMNS)
    cells = {name: [str(row.get(name) or "") for row in head] for name in known}
    there = [name for name in known if any(exists(cell) for cell in cells[name] if cell.strip())]
    if len(there) > 1 and any(cells[name] != cells[there[0]] for name in there):
        raise VitcliError(
            f"`{shown}` has {len(there)} columns of images: {quoted(there)}",
            f"name one: `--set data.image_column={there[0]}`",
        )
    return find_column(shown, "image", (there or known)[0], table.header, ())


def split_columns(shown: str, header: Sequence[str], settings: DataSection) -> tuple[str, ...]:
    """The columns that can name a split: the one that is given, or those with a known name."""
    given = settings.split_column
    if given is None:
        return tuple(known_columns(header, (*SPLIT_COLUMNS, *SPLIT_FLAGS)))
    if given == IGNORE and given not in header:
        return ()
    return (find_column(shown, "split", given, header, ()),)


def group_column(shown: str, header: Sequence[str], settings: DataSection) -> str | None:
    """The column whose values must not be divided: the one that is given, or `group`."""
    if settings.group_column is not None:
        return find_column(shown, "group", settings.group_column, header, ())
    return next(iter(known_columns(header, (GROUP_COLUMN,))), None)


def group_number(cell: Any) -> int:
    """A number of the group, the same in every table; -1 for an empty cell."""
    if not has_label(cell):
        return -1
    return int.from_bytes(sha256(label_text(cell).encode()).digest()[:7], "little")


def _label_columns(
    shown: str,
    table: TextTable,
    head: Sequence[Mapping[Any, Any]],
    settings: DataSection,
    rest: list[str],
    notes: list[str],
    labelled: bool,
) -> tuple[tuple[str, ...], bool]:
    """(label columns, True if they are 0/1 columns)."""
    given = settings.label_column
    if given is not None:
        several = [name.strip() for name in given.split(",")]
        if given not in table.header and len(several) > 1:
            columns = tuple(find_column(shown, "label", n, table.header, ()) for n in several)
            return columns, True
        return (find_column(shown, "label", given, table.header, ()),), False
    if known := known_columns(rest, LABEL_COLUMNS):
        if len(known) == 1:
            find_column(shown, "label", known[0], table.header, ())
        return tuple(known), False
    if len(rest) == 1:
        if table.named:
            notes.append(f"{shown}: the labels are in column `{rest[0]}`")
        return (rest[0],), False
    flags = [n for n in rest if all(flag_value(row.get(n)) is not None for row in head)]
    if len(rest) > 1 and flags == rest:
        return tuple(rest), True
    if not labelled:
        return (), False
    hint = "name the column: `--set data.label_column=NAME`"
    if len(flags) > 1:
        hint += f"; name columns of 0 and 1, one per class: `--set data.label_column={flags[0]},"
        hint += f"{flags[1]}`"
    if not rest:
        raise VitcliError(
            f"`{shown}` has no labels (it has only {quoted(table.header)})",
            "add a column `label`; `vitcli predict` labels images without labels",
        )
    raise VitcliError(
        f"`{shown}` has no label column with a known name (it has {quoted(table.header)})", hint
    )


def note_coarser(
    shown: str, chosen: str, header: Sequence[str], settings: DataSection, notes: list[str]
) -> None:
    """Add a note if fine labels were chosen and there are coarse ones (as in CIFAR-100)."""
    coarse = chosen.replace("fine", "coarse")
    if settings.label_column is not None or coarse == chosen or coarse not in header:
        return
    line = (
        f"{shown}: the labels are those of `{chosen}`; `--set data.label_column={coarse}` takes "
        "the coarser ones"
    )
    if line not in notes:
        notes.append(line)


def flag_value(cell: Any) -> bool | None:
    """1, 1.0, True -> True; 0, -1, False -> False; anything else -> None."""
    text = str(cell).strip().lower()
    if text in ("1", "1.0", "true"):
        return True
    return False if text in ("0", "0.0", "-1", "-1.0", "false") else None


def label_of_columns(shown: str, columns: Sequence[str], cells: Iterable[tuple[Any, ...]]) -> str:
    """Of several columns with known names the first, if all of them say the same.

    Raises:
        VitcliError: they hold different labels.
    """
    distinct = {tuple(label_text(cell) for cell in row) for row in cells}
    sizes = [len({row[place] for row in distinct}) for place in range(len(columns))]
    if any(size != len(distinct) for size in sizes):
        found = ", ".join(
            f"`{name}` ({size:,} values)" for name, size in zip(columns, sizes, strict=True)
        )
        raise VitcliError(
            f"`{shown}` has {len(columns)} columns that can be the label: {found}",
            f"name one: `--set data.label_column={columns[0]}`",
        )
    return columns[0]

"""Tables that list labelled images: CSV, TSV and JSON lines.

The standard library parses them, because table libraries guess types. So labels stay as they are
written (`01`, `NA`), file names need not be UTF-8, and an error gives the line.
"""

import codecs
import csv
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from vitcli.data.image_set import FileStore, ImageSet
from vitcli.data.labels import (
    encode_labels,
    encode_multi_label,
    has_label,
    is_multi_label,
    label_text,
)
from vitcli.data.source import DataRequest, Source, make_source
from vitcli.errors import VitcliError, printable, unknown
from vitcli.files import parse_json
from vitcli.hub.datasets import SPLIT_ALIASES, SPLITS

LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "y", "class_name", "fine_label")
IMAGE_COLUMNS = (
    "image", "img", "path", "file", "file_name", "filename", "filepath", "file_path",
    "image_path", "image_file", "image_bytes", "bytes", "png", "jpg",
)  # fmt: skip
EXISTENCE_CHECKS = 50  # paths that are checked before the table is refused


def load_table(request: DataRequest) -> Source:
    """A table with one image per row: a path relative to the table, and a label.

    A column `split` with train, validation and test makes the splits. Lists of labels, or cells
    `a;b` in a column `labels`, make multi-label data (`is_multi_label`).

    Raises:
        VitcliError: the table cannot be read, a column is missing, or none of the images exist.
    """
    path, shown, settings = request.path, request.shown, request.settings
    rows = _read_json_lines(path) if path.suffix.lower() == ".jsonl" else _read_csv(path)
    first = next(rows, None)
    if first is None:
        raise VitcliError(f"`{shown}` has no rows", "write a header and one row per image")
    header = [name for name in first if name is not None]  # None holds cells beyond the header
    image_column = find_column(shown, "image", settings.image_column, header, IMAGE_COLUMNS)
    label_column = find_column(shown, "label", settings.label_column, header, LABEL_COLUMNS)
    split_column = next((name for name in header if name.lower() == "split"), None)
    table = TableColumns(image_column, label_column, split_column)
    for row in chain([first], rows):
        table.add(row)
    notes: list[str] = []
    split_names = table.split_names(shown, notes)
    multi_label = is_multi_label(shown, label_column, table.labels, settings.multi_label, notes)
    usable = (multi_label or has_label(label) for label in table.labels)
    kept = np.flatnonzero(np.fromiter(usable, dtype=bool, count=len(table.labels)))
    skipped = table.without_path + len(table.labels) - len(kept)
    if skipped:
        missing = "path" if multi_label else "path or label"
        notes.append(f"{shown}: skipped {skipped:,} rows without {missing}")
    if not len(kept):
        raise VitcliError(
            f"`{shown}`: no row has both `{image_column}` and `{label_column}`",
            "name other columns: `--set data.image_column=NAME --set data.label_column=NAME`",
        )
    store = FileStore(path.parent, (_path_bytes(table.paths[i]) for i in kept))
    if not any(store.content(row).exists() for row in range(min(len(store), EXISTENCE_CHECKS))):
        raise VitcliError(
            f"`{shown}`: `{printable(store.paths[0])}` and the next images do not exist",
            f"paths must be relative to the folder of the table, `{printable(path.parent)}`",
        )
    cells, targets = [table.labels[i] for i in kept], None
    if multi_label:
        classes, labels, targets = encode_multi_label(cells)
    else:
        classes, labels = encode_labels(cells)
    if escaped := sorted({label_text(text) for text in table.distinct if not _is_utf8(text)}):
        notes.append(
            f"{shown}: labels such as `{escaped[0]}` are not UTF-8; save the file as UTF-8"
        )
    splits = {}
    for name in SPLITS:
        in_split = (split_names[table.splits[i]] == name for i in kept)
        members = np.flatnonzero(np.fromiter(in_split, dtype=bool, count=len(kept)))
        part = None if targets is None else targets[members]
        splits[name] = ImageSet(name, classes, labels[members], store, members, part)
    paths = (store.paths[row] for row in range(len(store)))
    return make_source(request, splits, chain(paths, (name.encode() for name in classes)), notes)


class TableColumns:
    """The three columns that are used. Equal texts share one object, and rows are not kept."""

    def __init__(self, image_column: str, label_column: str, split_column: str | None) -> None:
        self.image_column, self.label_column = image_column, label_column
        self.split_column = split_column
        self.paths: list[str] = []
        self.labels: list[Any] = []
        self.splits: list[str] = []
        self.without_path = 0
        self.distinct: dict[str, str] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row, or count it if it has no path."""
        path, label = row.get(self.image_column), row.get(self.label_column)
        if not path:
            self.without_path += 1
            return
        if isinstance(label, str):
            label = self.distinct.setdefault(label, label)
        self.paths.append(str(path))
        self.labels.append(label)
        split = row.get(self.split_column) if self.split_column is not None else None
        split = str(split).strip().lower() if has_label(split) else "train"
        self.splits.append(self.distinct.setdefault(split, split))

    def split_names(self, shown: str, notes: list[str]) -> dict[str, str | None]:
        """Text in the split column -> train, validation, test, or None for rows to skip.

        If no text names a split, the column holds something else, such as a fold number.
        """
        counts = Counter(self.splits)
        names = {text: SPLIT_ALIASES.get(text) for text in counts}
        if not any(names.values()):
            notes.append(f"{shown}: ignored `{self.split_column}`, which names no split")
            return dict.fromkeys(names, "train")
        for text in (text for text, split in names.items() if split is None):
            rows = f"{counts[text]:,} row{'s' if counts[text] > 1 else ''}"
            notes.append(f"{shown}: skipped {rows} of split `{printable(text)}`")
        return names


def find_column(
    shown: str, kind: str, given: str | None, columns: Sequence[str], usual: Sequence[str]
) -> str:
    """The column `given` by the user, else the first of the `usual` names.

    Raises:
        VitcliError: there is no such column; the error lists the columns.
    """
    present = ", ".join(f"`{name}`" for name in columns)
    if given is not None:
        if given in columns:
            return given
        hint = unknown("column", given, columns).hint
        raise VitcliError(f"`{shown}` has no column `{given}` (it has {present})", hint)
    lower = {str(name).lower(): name for name in reversed(columns)}
    for name in usual:
        if name in lower:
            return lower[name]
    raise VitcliError(
        f"`{shown}` has no {kind} column with a known name (it has {present})",
        f"name the column: `--set data.{kind}_column=NAME`",
    )


def _is_utf8(text: str) -> bool:
    """False if the file reader escaped a byte of the text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _path_bytes(path: str) -> bytes:
    """A path as the system stores it; a lone surrogate comes from no byte and names no file."""
    try:
        return os.fsencode(path)
    except UnicodeEncodeError:
        return path.encode("utf-8", "backslashreplace")


def _read_csv(path: Path) -> Iterator[dict[str, Any]]:
    with _open_text(path) as file:
        header = file.readline()
        file.seek(0)
        delimiter = "\t" if path.suffix.lower() == ".tsv" or "\t" in header else ","
        if delimiter == "," and "," not in header and ";" in header:
            delimiter = ";"
        # If every comma of the header has a space behind it (`path, label`), so do the cells.
        spaced = header.count(delimiter) == header.count(f"{delimiter} ") > 0
        try:
            yield from csv.DictReader(file, delimiter=delimiter, skipinitialspace=spaced)
        except csv.Error as error:
            raise VitcliError(
                f"`{printable(path)}` is not a table: {error}",
                "write a header and one row per image, separated by commas",
            ) from None


def _read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with _open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
                fault = "is not a JSON object"
            except ValueError as error:
                row, fault = None, f"is not JSON: {error}"
            if not isinstance(row, dict):
                raise VitcliError(
                    f"line {number} of `{printable(path)}` {fault}",
                    'write one object per line, such as {"path": "a.jpg", "label": "cat"}',
                )
            yield row


def _open_text(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # Excel writes it
        # "utf-8-sig" drops a byte-order mark; "surrogateescape" keeps names that are not UTF-8.
        return path.open(
            encoding="utf-16" if utf16 else "utf-8-sig",
            errors="replace" if utf16 else "surrogateescape",
            newline="",
        )
    except OSError as error:
        raise VitcliError(
            f"cannot read `{printable(path)}`: {error.strerror}", "check the file permissions"
        ) from None

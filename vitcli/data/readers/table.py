"""Labelled lists of images: CSV, TSV and JSON-lines manifests.

They are read with the standard library, because a table reader guesses types: here labels stay as
they are written (`01`, `NA`), file names need not be UTF-8, and an error tells the line.
"""

import codecs
import csv
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from vitcli.data.image_set import FileStore, ImageSet, Request, Source
from vitcli.data.labels import (
    has_label,
    is_multi_label,
    label_names,
    label_text,
    make_source,
    several_labels,
)
from vitcli.data.splits import SPLITS, WORDS
from vitcli.errors import VitcliError, nearest, printable

LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "y", "class_name", "fine_label")
IMAGE_COLUMNS = (
    "image", "img", "path", "file", "file_name", "filename", "filepath", "file_path",
    "image_path", "image_file", "image_bytes", "bytes", "png", "jpg",
)  # fmt: skip
MISSING_PROBES = 50


def load_manifest(request: Request) -> Source:
    """A file with a row for each image: a path, relative to the file, and a label.

    A column `split` with train, validation and test is followed. Lists of labels, or cells `a;b`
    of a column called `labels`, give an image any number of them (`is_multi_label`).

    Raises:
        VitcliError: it cannot be read, a column is not there, none of the images exist.
    """
    path, shown = request.path, request.shown
    rows = _read_json_lines(path) if path.suffix.lower() == ".jsonl" else _read_csv(path)
    first = next(rows, None)
    if first is None:
        raise VitcliError(f"`{shown}` has no rows", "give a header and a row for each image")
    columns = [name for name in first if name is not None]  # None: more cells than headings
    images = find_column(shown, "image", request.image_column, columns, IMAGE_COLUMNS)
    labels = find_column(shown, "label", request.label_column, columns, LABEL_COLUMNS)
    table = Table(images, labels, next((c for c in columns if c.lower() == "split"), None))
    for row in chain([first], rows):
        table.add(row)
    notes: list[str] = []
    in_splits = table.known_splits(shown, notes)
    several = is_multi_label(shown, labels, table.labels, request.multi_label, notes)
    said = (several or has_label(label) for label in table.labels)
    good = np.flatnonzero(np.fromiter(said, dtype=bool, count=len(table.labels)))
    left_out = table.without_path + len(table.labels) - len(good)
    if left_out:
        missing = "path" if several else "path or label"
        notes.append(f"{shown}: {left_out:,} rows without {missing} left out")
    if not len(good):
        raise VitcliError(
            f"`{shown}` has no row with a path and a label",
            f"`{images}` or `{labels}` is empty in each; others: `--set data.label_column=NAME`",
        )
    store = FileStore(path.parent, (path_bytes(table.paths[i]) for i in good))
    if not any(store.content(row).exists() for row in range(min(len(store), MISSING_PROBES))):
        raise VitcliError(
            f"`{shown}`: `{printable(store.paths[0])}` does not exist, nor do the next ones",
            f"paths are relative to `{printable(path.parent)}`, where the file lies",
        )
    targets = None
    if several:
        classes, numbers, targets = several_labels([table.labels[i] for i in good])
    else:
        classes, numbers = label_names([table.labels[i] for i in good])
    if escaped := sorted({label_text(label) for label in table.known if not is_utf8(label)}):
        notes.append(f"{shown}: labels are not UTF-8, such as `{escaped[0]}`; save it as UTF-8")
    splits = {}
    for name in SPLITS:
        here = (in_splits[table.splits[i]] == name for i in good)
        chosen = np.flatnonzero(np.fromiter(here, dtype=bool, count=len(good)))
        mine = None if targets is None else targets[chosen]
        splits[name] = ImageSet(name, classes, numbers[chosen], store, chosen, mine)
    paths = (store.paths[row] for row in range(len(store)))
    return make_source(request, splits, chain(paths, (name.encode() for name in classes)), notes)


def is_utf8(text: str) -> bool:
    """Whether it was read without escaping a byte."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def path_bytes(path: str) -> bytes:
    """A path as the system has it; a surrogate that stands for no byte names no file."""
    try:
        return os.fsencode(path)
    except UnicodeEncodeError:
        return path.encode("utf-8", "backslashreplace")


class Table:
    """The three columns that are used; equal labels are one object, and rows are not kept."""

    def __init__(self, image_column: str, label_column: str, split_column: str | None) -> None:
        self.image_column, self.label_column = image_column, label_column
        self.split_column = split_column
        self.paths: list[str] = []
        self.labels: list[Any] = []
        self.splits: list[str] = []
        self.without_path = 0
        self.known: dict[str, str] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        """The next row; one without a path is counted."""
        path, label = row.get(self.image_column), row.get(self.label_column)
        if not path:
            self.without_path += 1
            return
        if isinstance(label, str):
            label = self.known.setdefault(label, label)
        self.paths.append(str(path))
        self.labels.append(label)
        split = row.get(self.split_column) if self.split_column is not None else None
        split = str(split).strip().lower() if has_label(split) else "train"
        self.splits.append(self.known.setdefault(split, split))

    def known_splits(self, shown: str, notes: list[str]) -> dict[str, str | None]:
        """What stands in the column of splits -> train, validation, test or None: left out.

        A column that names none of them, such as the number of a fold, is about something else.
        """
        counts = Counter(self.splits)
        said = {name: WORDS.get(name) for name in counts}
        if not any(said.values()):
            notes.append(f"{shown}: `{self.split_column}` names no split and is passed over")
            return dict.fromkeys(said, "train")
        for name in (name for name, split in said.items() if split is None):
            rows = f"{counts[name]:,} row{'s' if counts[name] > 1 else ''}"
            notes.append(f"{shown}: {rows} of split `{printable(name)}` left out")
        return said


def _read_csv(path: Path) -> Iterator[dict[str, Any]]:
    with _open_text(path) as file:
        header = file.readline()
        file.seek(0)
        delimiter = "\t" if path.suffix.lower() == ".tsv" or "\t" in header else ","
        if delimiter == "," and "," not in header and ";" in header:
            delimiter = ";"
        # `path, label`: where the headings have a space behind each comma, so have the cells.
        spaced = header.count(delimiter) == header.count(f"{delimiter} ") > 0
        try:
            yield from csv.DictReader(file, delimiter=delimiter, skipinitialspace=spaced)
        except csv.Error as error:
            fault = f"`{printable(path)}` is not a table: {error}"
            raise VitcliError(fault, "a header and a row for each image, commas between") from None


def _read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with _open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                fault = f"line {number} of `{printable(path)}` is not JSON: {error.msg}"
                raise VitcliError(fault, "one JSON object a line") from None
            if not isinstance(row, dict):
                fault = f"line {number} of `{printable(path)}` is not a JSON object"
                raise VitcliError(fault, 'a line reads {"path": "a.jpg", "label": "cat"}')
            yield row


def _open_text(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            wide = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # of Excel
        # A byte-order mark is dropped; file names that are not UTF-8 survive.
        return path.open(
            encoding="utf-16" if wide else "utf-8-sig",
            errors="replace" if wide else "surrogateescape",
            newline="",
        )
    except OSError as error:
        fault = f"cannot read `{printable(path)}`: {error.strerror}"
        raise VitcliError(fault, "see to its permissions") from None


def find_column(
    shown: str, kind: str, given: str | None, columns: Sequence[str], usual: Sequence[str]
) -> str:
    """The column that the user named, else the first of the usual names.

    Raises:
        VitcliError: it is not there; names the columns there are.
    """
    present = ", ".join(f"`{name}`" for name in columns)
    if given is not None:
        if given in columns:
            return given
        close = nearest(given, list(columns))
        hint = f"did you mean `{close}`?" if close else f"its columns are {present}"
        raise VitcliError(f"`{shown}` has no column `{given}` (there are {present})", hint)
    lower = {str(name).lower(): name for name in reversed(columns)}
    for name in usual:
        if name in lower:
            return lower[name]
    raise VitcliError(
        f"`{shown}` has no {kind} column that is known by its name (there are {present})",
        f"name it: `--set data.{kind}_column=NAME`",
    )

"""Labelled lists of images: CSV, TSV and JSON-lines manifests.

They are read with the standard library, because a table reader guesses types: here labels stay as
they are written (`01`, `NA`), file names need not be UTF-8, and an error tells the line.
"""

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitcli.data.decode import printable
from vitcli.data.folders import SPLIT_NAMES
from vitcli.data.sets import FileStore, ImageSet, Request, Source, label_names, make_source
from vitcli.errors import VitcliError, nearest

LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "y", "class_name", "fine_label")
IMAGE_COLUMNS = (
    "image", "img", "path", "file", "file_name", "filename", "filepath", "file_path",
    "image_path", "image_file", "image_bytes", "bytes", "png", "jpg",
)  # fmt: skip
MISSING_PROBES = 50


def load_manifest(request: Request) -> Source:
    """A file with a row for each image: a path, relative to the file, and a label.

    A column `split` with train, validation and test is followed.

    Raises:
        VitcliError: it cannot be read, a column is not there, none of the images exist.
    """
    path, shown = request.path, request.shown
    rows = _read_json_lines(path) if path.suffix.lower() == ".jsonl" else _read_csv(path)
    if not rows:
        raise VitcliError(f"`{shown}` has no rows", "give a header and a row for each image")
    columns = [name for name in rows[0] if name is not None]  # None: more cells than headings
    images = find_column(shown, "image", request.image_column, columns, IMAGE_COLUMNS)
    labels = find_column(shown, "label", request.label_column, columns, LABEL_COLUMNS)
    good = [row for row in rows if row.get(images) and row.get(labels) not in (None, "")]
    notes = []
    if len(good) < len(rows):
        notes.append(f"{shown}: {len(rows) - len(good):,} rows without path or label left out")
    if not good:
        raise VitcliError(
            f"`{shown}` has no row with a path and a label",
            f"`{images}` or `{labels}` is empty in each; others: `--set data.label_column=NAME`",
        )
    paths = [os.fsencode(str(row[images])) for row in good]
    store = FileStore(path.parent, paths)
    if not any(store.content(row).exists() for row in range(min(len(paths), MISSING_PROBES))):
        raise VitcliError(
            f"`{shown}`: `{printable(paths[0])}` does not exist, nor do the next ones",
            f"paths are relative to `{printable(path.parent)}`, where the file lies",
        )
    classes, numbers = label_names([row[labels] for row in good])
    where = [SPLIT_NAMES.get(str(row.get("split", "train")).lower(), "train") for row in good]
    splits = {}
    for name in ("train", "validation", "test"):
        chosen = np.array([i for i, split in enumerate(where) if split == name], dtype=np.int64)
        splits[name] = ImageSet(name, classes, numbers[chosen], store, chosen)
    parts = [*paths, *(name.encode() for name in classes)]
    return make_source(request, splits, parts, notes)


def _read_csv(path: Path) -> list[dict[str, Any]]:
    with _open_text(path) as file:
        header = file.readline()
        file.seek(0)
        delimiter = "\t" if path.suffix.lower() == ".tsv" or "\t" in header else ","
        if delimiter == "," and "," not in header and ";" in header:
            delimiter = ";"
        try:
            return list(csv.DictReader(file, delimiter=delimiter))
        except csv.Error as error:
            fault = f"`{printable(path)}` is not a table: {error}"
            raise VitcliError(fault, "a header and a row for each image, commas between") from None


def _read_json_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
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
            rows.append(row)
    return rows


def _open_text(path: Path) -> Any:
    try:
        # A byte-order mark is dropped; file names that are not UTF-8 survive.
        return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")
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

"""Labelled lists of images: CSV, TSV and JSON-lines manifests, parquet as `datasets` writes it."""

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitcli.data.decode import ImageInput, printable
from vitcli.data.folders import SPLIT_NAMES
from vitcli.data.sets import (
    FileStore,
    ImageSet,
    Integers,
    Request,
    Source,
    label_names,
    make_source,
)
from vitcli.errors import VitcliError, nearest

LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "y", "class_name", "fine_label")
IMAGE_COLUMNS = (
    "image", "img", "path", "file", "file_name", "filename", "filepath", "file_path",
    "image_path", "image_file", "image_bytes", "bytes", "png", "jpg",
)  # fmt: skip
FOOTER_TAIL = 8
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
    images = _find_column(shown, "image", request.image_column, columns, IMAGE_COLUMNS)
    labels = _find_column(shown, "label", request.label_column, columns, LABEL_COLUMNS)
    good = [row for row in rows if row.get(images) and row.get(labels) not in (None, "")]
    notes = []
    if len(good) < len(rows):
        notes.append(f"{shown}: {len(rows) - len(good):,} rows without path or label left out")
    if not good:
        raise VitcliError(f"`{shown}` has no row with a path and a label")
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
            raise VitcliError(f"`{printable(path)}` is not a table: {error}") from None


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
        raise VitcliError(f"cannot read `{printable(path)}`: {error.strerror}") from None


def _find_column(
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


class ParquetStore:
    """Images in parquet files, as bytes or as paths beside them."""

    def __init__(self, files: Sequence[tuple[Path, int]], column: Any) -> None:
        self.files = files
        self.column = column  # pyarrow.ChunkedArray

    def __len__(self) -> int:
        return len(self.column)

    def content(self, row: int) -> ImageInput:
        cell = self.column[row].as_py()
        if isinstance(cell, dict):
            inner = cell.get("bytes")
            cell = cell.get("path") if inner is None else inner
        if cell is None:
            return b""
        return self._file(row)[0].parent / cell if isinstance(cell, str) else cell

    def describe(self, row: int) -> str:
        file, start = self._file(row)
        return f"row {row - start} of {printable(file)}"

    def _file(self, row: int) -> tuple[Path, int]:
        """(the file that the row lies in, the number of its first row)."""
        start = 0
        for file, count in self.files:
            if row < start + count:
                return file, start
            start += count
        raise IndexError(row)


def load_parquet(request: Request) -> Source:
    """A parquet file, or a folder of them split by how their names begin.

    Raises:
        VitcliError: it cannot be read, a column is not there.
    """
    notes: list[str] = []
    splits: dict[str, ImageSet] = {}
    parts: list[bytes] = []
    for split, files in _parquet_files(request.path, notes).items():
        images = _read_split(split, files, request, notes)
        splits[split] = images
        parts += [_footer(file) for file in files]
        parts += [name.encode() for name in images.classes]
    return make_source(request, splits, parts, notes)


def parquet_files(folder: Path) -> list[Path]:
    """The parquet files in `folder`, or in its `data/` as the Hub lays them out."""
    inside = sorted(folder.glob("*.parquet"))
    return inside or sorted(folder.glob("data/*.parquet"))


def _parquet_files(path: Path, notes: list[str]) -> dict[str, list[Path]]:
    """Split -> files."""
    if path.is_file():
        return {_split_of(path) or "train": [path]}
    files = parquet_files(path)
    splits: dict[str, list[Path]] = {}
    for file in files:
        split = _split_of(file)
        if split is not None:
            splits.setdefault(split, []).append(file)
    if not splits:
        return {"train": files}
    left_out = len(files) - sum(map(len, splits.values()))
    if left_out:
        notes.append(f"{printable(path)}: {left_out} files named after no split left out")
    return {name: splits[name] for name in ("train", "validation", "test") if name in splits}


def _split_of(file: Path) -> str | None:
    name = file.stem.lower()
    starts = [start for start in sorted(SPLIT_NAMES, key=len) if name.startswith(start)]
    return SPLIT_NAMES[starts[-1]] if starts else None


def _read_split(split: str, files: Sequence[Path], request: Request, notes: list[str]) -> ImageSet:
    import pyarrow as pa
    import pyarrow.parquet as pq

    first = files[0]
    try:
        schema = pq.read_schema(first)
        images, labels = _parquet_columns(printable(first), schema, request)
        tables = [pq.read_table(file, columns=[images, labels]) for file in files]
        table = pa.concat_tables(tables, promote_options="default")
    except (OSError, pa.ArrowException) as error:
        raise VitcliError(
            f"cannot read `{printable(first)}` as parquet: {str(error).splitlines()[0]}",
            "write it anew with `datasets` or pandas",
        ) from None
    values = table.column(labels).to_pylist()
    names = _features(schema).get(labels, {}).get("names")
    store = ParquetStore(
        [(file, part.num_rows) for file, part in zip(files, tables, strict=True)],
        table.column(images),
    )
    rows, numbers, classes = _numbered(printable(first), values, names)
    if len(rows) < len(values):
        lost = len(values) - len(rows)
        notes.append(f"{printable(first)}: {lost:,} rows without a label left out")
    return ImageSet(split, classes, numbers, store, rows)


def _numbered(
    shown: str, values: Sequence[Any], names: Sequence[str] | None
) -> tuple[Integers, Integers, tuple[str, ...]]:
    """Label cells -> (rows that have one, their numbers, class names); -1 and null mean none."""
    labelled = [i for i, v in enumerate(values) if v is not None and v != "" and v != -1]
    rows = np.array(labelled, dtype=np.int64)
    kept = [values[i] for i in labelled]
    if names is None or not all(isinstance(value, int) for value in kept):
        classes, numbers = label_names(kept)
        return rows, numbers, classes
    numbers = np.array(kept, dtype=np.int64)
    if numbers.size and not 0 <= numbers.min() <= numbers.max() < len(names):
        fault = f"`{shown}` has label {numbers.max()}, but names {len(names)} classes"
        raise VitcliError(fault, "write the file anew with `datasets` and a ClassLabel")
    return rows, numbers, tuple(str(name) for name in names)


def _features(schema: Any) -> dict[str, Any]:
    """What `datasets` says about the columns, {} where it did not write the file."""
    metadata = (schema.metadata or {}).get(b"huggingface")
    try:
        found = json.loads(metadata)["info"]["features"] if metadata else {}
    except (ValueError, KeyError, TypeError):
        return {}
    return {name: value for name, value in found.items() if isinstance(value, dict)}


def _parquet_columns(shown: str, schema: Any, request: Request) -> tuple[str, str]:
    """(image column, label column): as named, else as `datasets` marks them, else as usual."""
    import pyarrow.types as types

    features = _features(schema)
    image_column, label_column = request.image_column, request.label_column
    marked = {kind: [n for n, f in features.items() if f.get("_type") == kind and n in schema.names]
              for kind in ("Image", "ClassLabel")}  # fmt: skip
    if image_column is None and not marked["Image"]:
        pictures = [f.name for f in schema if types.is_struct(f.type) or types.is_binary(f.type)]
        image_column = pictures[0] if len(pictures) == 1 else None
    if image_column is None and marked["Image"]:
        image_column = marked["Image"][0]
    if label_column is None and len(marked["ClassLabel"]) == 1:
        label_column = marked["ClassLabel"][0]
    return (
        _find_column(shown, "image", image_column, schema.names, IMAGE_COLUMNS),
        _find_column(shown, "label", label_column, schema.names, LABEL_COLUMNS),
    )


def _footer(file: Path) -> bytes:
    """Size and footer of a parquet file: column sizes and statistics, a cheap stand-in for it."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        opened.seek(max(0, size - FOOTER_TAIL))
        length = int.from_bytes(opened.read(4), "little")
        opened.seek(max(0, size - FOOTER_TAIL - length))
        return size.to_bytes(8, "little") + opened.read()

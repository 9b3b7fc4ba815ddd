"""Tables that list labelled images: CSV, TSV, text lists and JSON lines, one or several."""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from vitcli.config.schema import DataSection
from vitcli.data.image_set import FileStore, ImageSet, Integers
from vitcli.data.labels import (
    MultiHot,
    Splitter,
    encode_labels,
    encode_multi_label,
    has_label,
    label_splitter,
    label_text,
    missing_texts,
    split_labels,
    tidy_notes,
)
from vitcli.data.numeric_labels import refuse_numbers
from vitcli.data.readers.columns import (
    GROUP_HINTS,
    choose_table_columns,
    group_number,
    known_columns,
)
from vitcli.data.readers.folder import walk_images
from vitcli.data.readers.path_cells import PathCells
from vitcli.data.readers.split_cells import splits_of_rows
from vitcli.data.readers.table_rows import TableRows
from vitcli.data.readers.table_text import read_text_table
from vitcli.data.source import DataRequest, Source, make_source
from vitcli.data.splits import expand_braces, split_of
from vitcli.errors import VitcliError, counted, printable, quoted
from vitcli.hub.split_names import SPLITS, is_container, split_words

TABLE_SUFFIXES = (".csv", ".tsv", ".txt", ".jsonl")
FEW_ROWS = 10  # a table with fewer rows may have a class per row
HEAD_ROWS = 50  # rows that decide on columns; if none of their images exist, the table is refused


def table_files(notation: str | os.PathLike[str]) -> list[Path]:
    """The tables of a notation: `a.csv`, `{train,test}.csv`, `train.csv,test.csv`, or a folder.

    A folder is read by its tables if it has one for training (`train.csv`, `train_labels.csv` …),
    and if its images are not in class folders.
    """
    path = Path(notation)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in TABLE_SUFFIXES)
        named = [p for p in found if split_of(p) is not None and p.is_file()]
        training = any(split_of(p) == "train" for p in named)
        return named if training and not _has_class_folders(path) else []
    text = os.fspath(notation)
    names = expand_braces(text) if "{" in text else text.split(",")
    return [Path(name.strip()) for name in names]


def _has_class_folders(folder: Path) -> bool:
    """True for `CLASS/*.jpg` or `train/CLASS/*.jpg`; `train_images/` is not a class."""
    for path in walk_images(folder, strict=False):
        parents = path.split("/")[:-1]
        if not all(any(split_words(part)) or is_container(part) for part in parents):
            return True
    return False


def load_table(request: DataRequest) -> Source:
    """One table, or several: rows with a path relative to the table, and a label.

    A column `split` with train, validation and test makes the splits, or the names of several
    tables do. Cells with several labels make multi-label data (`label_splitter`).

    Raises:
        VitcliError: the table cannot be read, a column is missing, or none of the images exist.
    """
    files = table_files(request.notation)
    if missing := [file for file in files if not file.is_file()]:
        raise VitcliError(
            f"no such table: `{printable(missing[0])}`",
            "`{train,test}.csv` means `train.csv` and `test.csv`",
        )
    notes: list[str] = []
    if len(files) == 1:
        tables = [_read_rows(files[0], "train", request, notes)]
        _mention_test_table(files[0], request, notes)
    else:
        tables = _read_several(files, request, notes)
    return _assemble(request, tables, notes)


def _mention_test_table(path: Path, request: DataRequest, notes: list[str]) -> None:
    """Say that a `test.csv` beside `train.csv` is not read."""
    beside = path.with_name(re.sub("train", "test", path.name))
    if beside != path and beside.is_file() and not request.whole:
        both = path.with_name(re.sub("train", "{train,test}", path.name))
        notes.append(
            f"{printable(path)}: `{printable(beside.name)}` beside it is not read; to test on it, "
            f"give '{printable(both)}'"
        )


def _read_several(files: Sequence[Path], request: DataRequest, notes: list[str]) -> list[TableRows]:
    """The tables of several splits; notes mention those without labels, which are not used."""
    either = replace(request, labelled=False)
    tables = [
        _read_rows(file, split_of(file) or "train", either, notes, single=False) for file in files
    ]
    labelled = [table for table in tables if table.columns.labels]
    if not labelled:
        # The first reading again, which raises the error about missing labels if they are needed.
        return tables if not request.labelled else [_read_rows(files[0], "train", request, notes)]
    for table in tables:
        if not table.columns.labels:
            notes.append(
                f"{table.shown}: the table has no labels (it has {quoted(table.header)}), so it is "
                f"not the {table.default} split; `vitcli predict` labels its images"
            )
    return labelled


def _read_rows(
    path: Path, split: str, request: DataRequest, notes: list[str], *, single: bool = True
) -> TableRows:
    """All rows of a table; `single` is False if there are others.

    Raises:
        VitcliError: as `load_table`.
    """
    shown, settings = printable(path), request.settings
    to_path = PathCells(path, settings)
    table = read_text_table(path, notes, lambda cells: to_path.exists(cells[0]))
    head = list(islice(table.rows, HEAD_ROWS))
    if not head:
        raise VitcliError(f"`{shown}` has no rows", "write a header and one row per image")
    columns = choose_table_columns(
        shown, table, head, settings, to_path.exists, notes, labelled=request.labelled
    )
    rows = TableRows(path, table.header, columns, to_path, split)
    for row in chain(head, table.rows):
        rows.add(row)
    cells = [row.get(columns.image) for row in head if has_label(row.get(columns.image))]
    used = columns.labels or single  # several tables: one without labels is not used
    if used and cells and not any(map(to_path.exists, cells)):
        found = to_path.where(cells[0])
        raise VitcliError(
            f"`{shown}`: `{printable(to_path(cells[0]))}` and the next images do not exist in "
            f"`{printable(to_path.root)}`",
            f"add `{found}`"
            if found
            else "paths must be relative to the folder of the table, or to the folder in "
            "`--set data.image_root=FOLDER`; `--set data.image_suffix=.jpg` completes names",
        )
    return rows


def _assemble(request: DataRequest, tables: Sequence[TableRows], notes: list[str]) -> Source:
    """Labels, splits and groups of the rows of all tables."""
    shown, settings = request.shown, request.settings
    strict = request.labelled and not request.whole
    codes = [_split_codes(table, settings, notes, strict) for table in tables]
    cells, split = _labels_of(request, tables, notes)
    unlabelled = not tables[0].columns.labels  # accepted only where labels are not needed
    usable = (split is not None or unlabelled or has_label(label) for label in cells)
    is_kept = np.fromiter(usable, dtype=bool, count=len(cells))
    skipped = sum(table.without_path for table in tables) + int((~is_kept).sum())
    if skipped:
        missing = "path" if split else "path or label"
        rows = counted(skipped, "row", "rows")
        notes.append(f"{shown}: skipped {rows} without {missing}{missing_texts(cells)}")
    kept = np.flatnonzero(is_kept)
    if not len(kept):
        columns = tables[0].columns
        raise VitcliError(
            f"`{shown}`: no row has both `{columns.image}` and `{', '.join(columns.labels)}`",
            "name other columns: `--set data.image_column=NAME --set data.label_column=NAME`",
        )
    root, paths = _common_root(tables)
    split_codes, targets = np.concatenate(codes)[kept], None
    cells, paths = [cells[i] for i in kept], [paths[i] for i in kept]
    if split is not None:
        classes, labels, targets = encode_multi_label(cells, split=split)
    else:
        if request.numeric is False:
            refuse_numbers(shown, ", ".join(tables[0].columns.labels), set(cells))
        notes += tidy_notes(shown, set(cells))
        classes, labels = encode_labels(cells)
    if escaped := sorted({label_text(text) for text in set(map(str, cells)) if not _is_utf8(text)}):
        notes.append(
            f"{shown}: labels such as `{escaped[0]}` are not UTF-8; save the file as UTF-8"
        )
    groups = _group_codes(tables, kept)
    members = np.arange(len(kept))
    which = np.unique(np.fromiter(map(hash, paths), np.int64, len(paths)), return_inverse=True)[1]
    if len(members) > which.max() + 1:
        members = _merge_repeated(request, which, labels, targets, split_codes, paths, notes)
    store = FileStore(root, paths)
    doubtful = 0 if split or request.numeric else len(classes)
    _mention_doubts(shown, tables[0], store, doubtful, notes)
    splits = {}
    for code, name in enumerate(SPLITS):
        rows = members[split_codes[members] == code]
        part = None if targets is None else targets[rows]
        own = None if groups is None else groups[rows]
        splits[name] = ImageSet(name, classes, labels[rows], store, rows, part, own)
    _mention_groups(request, tables, splits, notes)
    parts = chain(paths, (name.encode() for name in classes))
    return make_source(request, splits, parts, notes, target=", ".join(tables[0].columns.labels))


def _split_codes(
    table: TableRows, settings: DataSection, notes: list[str], strict: bool
) -> Integers:
    """(n,) index into SPLITS of each row; -1 for rows to skip."""
    names: Mapping[Any, str | None] = {(): table.default}
    if table.columns.splits:
        names = splits_of_rows(
            table.shown,
            table.columns.splits,
            Counter(table.splits),
            settings,
            table.default,
            notes,
            strict=strict,
        )
    elif settings.test_fold is not None:
        raise VitcliError(
            f"`data.test_fold` is set, but `{table.shown}` has no column of folds",
            "name the column: `--set data.split_column=NAME`",
        )
    code_of = {row: -1 if name is None else SPLITS.index(name) for row, name in names.items()}
    return np.fromiter((code_of[row] for row in table.splits), np.int64, len(table.splits))


def _labels_of(
    request: DataRequest, tables: Sequence[TableRows], notes: list[str]
) -> tuple[list[Any], Splitter | None]:
    """(label cell of each row, the function that divides a cell; None for one label per cell)."""
    shown, settings = request.shown, request.settings
    columns = tables[0].columns
    if request.numeric and columns.one_hot:
        raise VitcliError(
            f"`{shown}` has {len(columns.labels)} columns of labels, {quoted(columns.labels, 3)}, "
            "and objective `mse` learns one number per image",
            f"name one column: `--set data.label_column={columns.labels[0]}`",
        )
    cells = [cell for table in tables for cell in table.label_cells()]
    if not columns.one_hot:
        name = ", ".join(columns.labels)
        return cells, label_splitter(shown, name, cells, settings, notes) if name else None
    several = sum(len(cell) != 1 for cell in cells)
    found = f"{shown}: {len(columns.labels)} columns of 0 and 1, {quoted(columns.labels, 3)}"
    if several == 0 and not settings.multi_label:
        notes.append(f"{found}, are the classes; each row has exactly one 1")
        return [cell[0] for cell in cells], None
    if settings.multi_label is False:
        raise VitcliError(
            f"`{shown}`: {counted(several, 'row does', 'rows do')} not have exactly one 1 in the "
            "columns "
            f"{quoted(columns.labels)}, but `data.multi_label` is false",
            "remove `data.multi_label=false`",
        )
    notes.append(f"{found}, are the classes of multi-label data")
    return cells, split_labels


def _common_root(tables: Sequence[TableRows]) -> tuple[Path, list[bytes]]:
    """(a folder, the paths of all rows relative to it)."""
    roots = {table.root for table in tables}
    if len(roots) == 1:
        return roots.pop(), [path for table in tables for path in table.paths]
    root = Path(os.path.commonpath([folder.absolute() for folder in roots]))
    inner = {folder: os.fsencode(folder.absolute().relative_to(root)) for folder in roots}
    paths = [os.path.join(inner[t.root], path) for t in tables for path in t.paths]  # noqa: PTH118
    return root, paths


def _group_codes(tables: Sequence[TableRows], kept: Integers) -> Integers | None:
    """(n,) the number of each kept row's group; -1 for an empty cell; None without groups."""
    if any(table.columns.group is None for table in tables):
        return None
    cells = [cell for table in tables for cell in table.groups]
    numbers = {cell: group_number(cell) for cell in set(cells)}
    return np.array([numbers[cells[i]] for i in kept], dtype=np.int64)


def _merge_repeated(
    request: DataRequest,
    which: Integers,
    labels: Integers,
    targets: MultiHot | None,
    split_codes: Integers,
    paths: Sequence[bytes],
    notes: list[str],
) -> Integers:
    """The rows that stay if paths repeat: of multi-label data one per image, with all its labels.

    Args:
        which: (n,) equal for equal paths.
        targets: changed in place.

    Raises:
        VitcliError: an image has two labels, and the data are not multi-label.
    """
    shown, n = request.shown, len(which)
    if targets is not None:
        key = which * (len(SPLITS) + 1) + split_codes
        _, first, group = np.unique(key, return_index=True, return_inverse=True)
        merged = np.zeros((len(first), targets.shape[1]), dtype=targets.dtype)
        np.maximum.at(merged, group, targets)
        targets[first] = merged
        if n > len(first):
            notes.append(f"{shown}: merged {n:,} rows into {len(first):,} images, by their paths")
        return np.sort(first)
    pairs = np.unique(np.stack([which, labels], axis=1), axis=0)
    images, counts = np.unique(pairs[:, 0], return_counts=True)
    conflicting = images[counts > 1]
    if not len(conflicting):
        return np.arange(n)
    example = printable(paths[int(np.flatnonzero(which == conflicting[0])[0])])
    fault = (
        f"{len(conflicting):,} image{'s have' if len(conflicting) > 1 else ' has'} rows with "
        f"different labels, such as `{example}`"
    )
    way = "for several labels per image: `--set data.multi_label=true`; else correct the table"
    if request.numeric:
        way = "write one number per image into the table"
    if request.labelled:
        raise VitcliError(f"`{shown}`: {fault}", way)
    notes.append(f"{shown}: {fault}; {way}")
    return np.arange(n)


def _mention_doubts(
    shown: str, table: TableRows, store: FileStore, classes: int, notes: list[str]
) -> None:
    """Say how many images do not exist, and that a column may not hold classes."""
    missing = np.flatnonzero(store.content_keys(np.arange(len(store))) < 0)
    if len(missing):
        notes.append(
            f"{shown}: {counted(len(missing), 'images does', 'images do', len(store))} not exist, "
            f"such as `{store.describe(int(missing[0]))}`"
        )
    if 2 * classes > len(store) and len(store) >= FEW_ROWS:
        notes.append(
            f"{shown}: `{', '.join(table.columns.labels)}` has {classes:,} different labels for "
            f"{len(store):,} images; check that it holds classes"
        )


def _mention_groups(
    request: DataRequest,
    tables: Sequence[TableRows],
    splits: Mapping[str, ImageSet],
    notes: list[str],
) -> None:
    """Say that a column such as `patient_id` exists if an automatic split ignores it."""
    hints = known_columns(tables[0].header, GROUP_HINTS)
    used = tables[0].columns
    hints = [name for name in hints if name not in (used.group, used.image, *used.labels)]
    automatic = [name for name, images in splits.items() if len(images)] == ["train"]
    if hints and used.group is None and automatic and not request.whole:
        notes.append(
            f"{request.shown}: images with the same `{hints[0]}` can be in train and test; to keep "
            f"them together: `--set data.group_column={hints[0]}`"
        )


def _is_utf8(text: str) -> bool:
    """False if the file reader escaped a byte of the text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

"""Parquet files as Hugging Face `datasets` writes them: one file, or a folder of them."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from vitcli.config.schema import DataSection
from vitcli.data.image_set import ImageSet, Integers, file_size
from vitcli.data.labels import (
    arrow_label_lists,
    class_names,
    encode_arrow,
    encode_arrow_lists,
    has_label,
    missing_texts,
    tidy_notes,
)
from vitcli.data.numeric_labels import refuse_numbers, with_numbers
from vitcli.data.readers.columns import (
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    find_column,
    group_column,
    group_number,
    note_coarser,
    plain_cell,
    split_columns,
)
from vitcli.data.readers.folder import walk_images
from vitcli.data.readers.parquet_table import (
    check_cells,
    read_footer,
    read_parquet_metadata,
    read_table,
    reading,
)
from vitcli.data.readers.path_cells import PathCells
from vitcli.data.readers.split_cells import splits_of_rows
from vitcli.data.source import DataRequest, Source, make_source
from vitcli.data.splits import files_with_suffix, in_split_order, split_of, splits_of
from vitcli.decode import ImageInput
from vitcli.errors import VitcliError, counted, printable
from vitcli.hub.datasets import LABEL_TABLES
from vitcli.hub.split_names import SPLITS


class ParquetStore:
    """Images in parquet files, as bytes or as paths relative to the file.

    Args:
        files: (file, number of rows) of each file.
        column: a `pyarrow.ChunkedArray` of the images of all files. To read a cell takes 5 to 15
            us, and 60 us through `datasets.Dataset`; many threads may read at once.
        settings: `image_root` and `image_suffix` of cells that are paths.
    """

    def __init__(
        self, files: Sequence[tuple[Path, int]], column: Any, settings: DataSection
    ) -> None:
        self.files = [file for file, _ in files]
        self.starts = list(accumulate((rows for _, rows in files), initial=0))
        self.column = column
        self._to_path = {file: PathCells(file, settings) for file, _ in files}

    def __len__(self) -> int:
        return len(self.column)

    def content(self, row: int) -> ImageInput:
        cell = self.column[row].as_py()
        if isinstance(cell, dict):
            inner = cell.get("bytes")
            cell = cell.get("path") if inner is None else inner
        if cell is None:
            return b""
        if not isinstance(cell, str):
            return cell
        to_path = self._to_path[self._file(row)[0]]
        return to_path.root / to_path(cell)

    def content_keys(self, rows: Integers) -> Integers:
        """The sizes of the images in bytes; -1 for an empty cell."""
        import pyarrow as pa
        import pyarrow.compute as pc

        cells = self.column
        if pa.types.is_struct(cells.type):
            if cells.type.get_field_index("bytes") < 0:
                return np.full(len(rows), -1)
            cells = pc.struct_field(cells, "bytes")
        if pa.types.is_null(cells.type):
            return np.full(len(rows), -1)
        if pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type):
            return np.fromiter((self._file_size(row) for row in rows), np.int64, len(rows))
        sizes = pc.fill_null(pc.binary_length(cells), -1).to_numpy().astype(np.int64)
        found: Integers = sizes[rows]
        return found

    def _file_size(self, row: int) -> int:
        content = self.content(row)
        return file_size(content) if isinstance(content, Path) else -1

    def describe(self, row: int) -> str:
        file, start = self._file(row)
        return f"row {row - start} of {printable(file)}"

    def file_name(self, row: int) -> str | None:
        cell = self.column[row]
        fields = cell.keys() if hasattr(cell, "keys") else None  # a struct has fields, a path none
        if fields is not None and "path" not in fields:
            return None
        name = (cell if fields is None else cell["path"]).as_py()
        return Path(name).name if isinstance(name, str) else None

    def _file(self, row: int) -> tuple[Path, int]:
        """(the file of a row, the number of its first row)."""
        number = bisect_right(self.starts, row) - 1
        return self.files[number], self.starts[number]


def load_parquet(request: DataRequest) -> Source:
    """A parquet file, or a folder of them that is split by the names of files or folders.

    Raises:
        VitcliError: a file cannot be read, or a column is missing.
    """
    notes: list[str] = []
    return read_parquet(request, parquet_splits(request.path, notes), notes)


def read_parquet(
    request: DataRequest, by_split: Mapping[str, Sequence[Path]], notes: list[str]
) -> Source:
    """The images of parquet files, given as split -> files; raises as `load_parquet`."""
    splits: dict[str, ImageSet] = {}
    parts: list[bytes] = []
    for split, files in by_split.items():
        read = _read_split(split, files, request, notes, divide=len(by_split) == 1)
        splits |= read
        parts += [read_footer(file) for file in files]
        parts += [name.encode() for name in next(iter(read.values())).classes]
    return make_source(request, splits, parts, notes)


def parquet_files(folder: Path) -> list[Path]:
    """The parquet files in `folder`, else in its `data/`, else in its `train/`, `test/`, …"""
    found = files_with_suffix(folder, ".parquet")
    images = [file for file in found if file.name.lower() not in LABEL_TABLES]
    # `metadata.parquet` beside images gives their labels: the folder is a folder of images.
    beside = len(images) < len(found) and next(walk_images(folder, strict=False), None)
    return images if beside else found


def parquet_splits(path: Path, notes: list[str]) -> dict[str, list[Path]]:
    """Split -> files."""
    if path.is_file():
        return {split_of(path) or "train": [path]}
    files = parquet_files(path)
    splits: dict[str, list[Path]] = {}
    for file, split in zip(files, splits_of(files, path), strict=True):
        if split is not None:
            splits.setdefault(split, []).append(file)
    if not splits:
        return {"train": files}
    skipped = len(files) - sum(map(len, splits.values()))
    if skipped:
        notes.append(f"{printable(path)}: skipped {skipped} files whose names give no split")
    return in_split_order(splits)


def _read_split(
    split: str, files: Sequence[Path], request: DataRequest, notes: list[str], *, divide: bool
) -> dict[str, ImageSet]:
    """Split -> images; several if `divide` is true and a column names the splits."""
    shown, settings = printable(files[0]), request.settings
    metadata = [read_parquet_metadata(file) for file in files]
    schema = metadata[0].schema.to_arrow_schema()
    features = features_of(schema)
    image_column, label_column = choose_columns(shown, schema, features, settings)
    note_coarser(request.shown, label_column, schema.names, settings, notes)
    group = group_column(shown, schema.names, settings)
    dividing = split_columns(shown, schema.names, settings) if divide else ()
    dividing = tuple(name for name in dividing if name != label_column)
    for file, part in zip(files, metadata, strict=True):
        present = part.schema.to_arrow_schema().names
        find_column(printable(file), "image", image_column, present, ())
        find_column(printable(file), "label", label_column, present, ())
    wanted = [image_column, label_column, *dividing, *([] if group is None else [group])]
    check_cells(files, metadata, image_column)
    table = read_table(files, list(dict.fromkeys(wanted)), notes)
    sizes = [(file, part.num_rows) for file, part in zip(files, metadata, strict=True)]
    columns = (image_column, label_column)
    images = images_of_table(split, table, sizes, columns, features, request, notes)
    if not divide:
        return {split: images}
    return divide_by_column(shown, images, table, label_column, request, notes)


def divide_by_column(
    shown: str,
    images: ImageSet,
    table: Any,
    label_column: str,
    request: DataRequest,
    notes: list[str],
) -> dict[str, ImageSet]:
    """The splits that a column of the table names; without such a column all images."""
    settings = request.settings
    columns = split_columns(shown, table.column_names, settings)
    columns = tuple(name for name in columns if name != label_column)
    if not columns:
        return {images.name: images}
    lists = [map(plain_cell, table.column(name).to_pylist()) for name in columns]
    cells = list(zip(*lists, strict=True))
    strict = request.labelled and not request.whole
    names = splits_of_rows(
        shown, columns, Counter(cells), settings, images.name, notes, strict=strict
    )
    own = np.array([str(names[cells[row]]) for row in images._rows])
    found = {name: np.flatnonzero(own == name) for name in SPLITS}
    return {name: images.subset(rows, name) for name, rows in found.items() if len(rows)}


def images_of_table(
    split: str,
    table: Any,
    files: Sequence[tuple[Path, int]],
    columns: tuple[str, str],
    features: Mapping[str, Any],
    request: DataRequest,
    notes: list[str],
) -> ImageSet:
    """The images of a `pyarrow.Table` that have a label, with their groups.

    Args:
        files: (file, number of rows) of each file of the table.
        columns: (image column, label column).
        features: column -> its `datasets` feature.
    """
    shown, settings = printable(files[0][0]), request.settings
    _check_image_type(shown, columns[0], table.column(columns[0]).type)
    store = ParquetStore(files, table.column(columns[0]), settings)
    names = class_names(features.get(columns[1]))
    images = _labelled(split, store, table.column(columns[1]), columns[1], names, request, notes)
    group = group_column(shown, table.column_names, settings)
    if group is not None and group not in columns:
        with reading(files[0][0]):
            images.groups = _group_numbers(table.column(group))[images._rows]
    return images


def _check_image_type(shown: str, column: str, kind: Any) -> None:
    """Raise a VitcliError unless a column can hold images: bytes, paths, or both in a struct."""
    import pyarrow.types as types

    def holds(kind: Any, *, paths: bool = True) -> bool:
        is_binary = types.is_binary(kind) or types.is_large_binary(kind)
        return is_binary or (paths and (types.is_string(kind) or types.is_large_string(kind)))

    fits = holds(kind)
    if types.is_struct(kind):
        parts = {field.name: field.type for field in kind if field.name in ("bytes", "path")}
        fits = bool(parts) and all(holds(p) or types.is_null(p) for p in parts.values())
    if not fits:
        raise VitcliError(
            f"`{shown}`: column `{printable(column)}` holds {printable(str(kind))[:80]}, not "
            "images",
            "name a column of bytes or of paths: `--set data.image_column=NAME`",
        )


def _labelled(
    split: str,
    store: ParquetStore,
    column: Any,
    label_column: str,
    names: Sequence[str] | None,
    request: DataRequest,
    notes: list[str],
) -> ImageSet:
    """The rows that have a label; `names` are class names, if the file holds them."""
    shown = printable(store.files[0])
    with reading(store.files[0]):
        lists = arrow_label_lists(column, shown, label_column, request.settings, notes)
        if lists is not None:
            classes, labels, targets = encode_arrow_lists(shown, lists, names)
            return ImageSet(split, classes, labels, store, targets=targets)
        values = column.dictionary_encode().unify_dictionaries().combine_chunks()
    distinct = values.dictionary.to_pylist()
    if names is None and request.numeric is False:
        refuse_numbers(shown, label_column, filter(has_label, distinct))
    notes += [] if names is not None or request.numeric else tidy_notes(shown, distinct)
    missing = None if request.numeric and names is None else -1  # -1 can be a measured number
    rows, labels, classes = encode_arrow(shown, values, names, missing)
    if left := len(values) - len(rows):
        skipped = counted(left, "row", "rows")
        notes.append(f"{shown}: skipped {skipped} without a label{missing_texts(distinct)}")
    images = ImageSet(split, classes, labels, store, rows)
    return with_numbers(shown, images, label_column) if request.numeric else images


def _group_numbers(column: Any) -> Integers:
    """(n,) a number of each cell, the same in every file; -1 for an empty cell."""
    values = column.dictionary_encode().unify_dictionaries().combine_chunks()
    numbers = [*map(group_number, values.dictionary.to_pylist()), -1]
    codes = values.indices.fill_null(-1).to_numpy().astype(np.int64)
    found: Integers = np.array(numbers, dtype=np.int64)[codes]  # -1 is the last entry
    return found


def features_of(schema: Any) -> dict[str, Any]:
    """The `datasets` feature of each column; {} if `datasets` does not understand the schema."""
    import datasets

    try:
        return dict(datasets.Features.from_arrow_schema(schema))
    except Exception:  # unknown types, or metadata that another program wrote
        return {}


def choose_columns(
    shown: str, schema: Any, features: dict[str, Any], settings: DataSection
) -> tuple[str, str]:
    """(image column, label column): from the settings, the feature types, or usual names."""
    import datasets
    import pyarrow.types as types

    image_column, label_column = settings.image_column, settings.label_column
    images = [n for n, feature in features.items() if isinstance(feature, datasets.Image)]
    classes = [n for n, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if image_column is None and images:
        image_column = images[0]
    elif image_column is None:
        cells = [f.name for f in schema if types.is_struct(f.type) or types.is_binary(f.type)]
        image_column = cells[0] if len(cells) == 1 else None
    if label_column is None and len(classes) == 1:
        label_column = classes[0]
    return (
        find_column(shown, "image", image_column, schema.names, IMAGE_COLUMNS),
        find_column(shown, "label", label_column, schema.names, LABEL_COLUMNS),
    )

"""Parquet files as Hugging Face `datasets` writes them: one file, or a folder of them."""

import warnings
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import Any

from vitcli.config.schema import DataSection
from vitcli.data.image_set import ImageSet
from vitcli.data.labels import arrow_label_lists, class_names, encode_arrow, encode_arrow_lists
from vitcli.data.readers.table import IMAGE_COLUMNS, LABEL_COLUMNS, find_column
from vitcli.data.source import DataRequest, Source, make_source
from vitcli.data.splits import files_with_suffix, in_split_order, split_of, splits_of
from vitcli.decode import ImageInput
from vitcli.errors import VitcliError, printable

FOOTER_TAIL = 8  # bytes: the length of the footer and the magic number


class ParquetStore:
    """Images in parquet files, as bytes or as paths relative to the file.

    Args:
        files: (file, number of rows) of each file.
        column: a `pyarrow.ChunkedArray` of the images of all files. To read a cell takes 5 to 15
            us, and 60 us through `datasets.Dataset`; many threads may read at once.
    """

    def __init__(self, files: Sequence[tuple[Path, int]], column: Any) -> None:
        self.files = [file for file, _ in files]
        self.starts = list(accumulate((rows for _, rows in files), initial=0))
        self.column = column

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
        images = _read_split(split, files, request, notes)
        splits[split] = images
        parts += [_footer(file) for file in files]
        parts += [name.encode() for name in images.classes]
    return make_source(request, splits, parts, notes)


def parquet_files(folder: Path) -> list[Path]:
    """The parquet files in `folder`, else in its `data/`, else in its `train/`, `test/`, …"""
    return files_with_suffix(folder, ".parquet")


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
    split: str, files: Sequence[Path], request: DataRequest, notes: list[str]
) -> ImageSet:
    shown = printable(files[0])
    metadata = [_metadata(file) for file in files]
    schema = metadata[0].schema.to_arrow_schema()
    features = features_of(schema)
    image_column, label_column = choose_columns(shown, schema, features, request.settings)
    for file, part in zip(files, metadata, strict=True):
        present = part.schema.to_arrow_schema().names
        find_column(printable(file), "image", image_column, present, ())
        find_column(printable(file), "label", label_column, present, ())
    table = _read_table(files, [image_column, label_column], notes)
    sizes = [(file, part.num_rows) for file, part in zip(files, metadata, strict=True)]
    return images_of_table(split, table, sizes, features, request, notes)


def images_of_table(
    split: str,
    table: Any,
    files: Sequence[tuple[Path, int]],
    features: Mapping[str, Any],
    request: DataRequest,
    notes: list[str],
) -> ImageSet:
    """The images of a `pyarrow.Table` with two columns: images and labels.

    Args:
        files: (file, number of rows) of each file of the table.
        features: column -> its `datasets` feature.
    """
    shown = printable(files[0][0])
    image_column, label_column = table.column_names
    store = ParquetStore(files, table.column(image_column))
    names = class_names(features.get(label_column))
    with _reading(files[0][0]):
        column = table.column(label_column)
        setting = request.settings.multi_label
        lists = arrow_label_lists(column, shown, label_column, setting, notes)
        if lists is not None:
            classes, labels, targets = encode_arrow_lists(shown, lists, names)
            return ImageSet(split, classes, labels, store, targets=targets)
        values = column.dictionary_encode().unify_dictionaries().combine_chunks()
    rows, labels, classes = encode_arrow(shown, values, names)
    if len(rows) < len(values):
        notes.append(f"{shown}: skipped {len(values) - len(rows):,} rows without a label")
    return ImageSet(split, classes, labels, store, rows)


def _read_table(files: Sequence[Path], columns: list[str], notes: list[str]) -> Any:
    """These columns of all files, concatenated.

    The columns are memory-mapped from the cache of `datasets`, which is written at the first read
    and after a change of a file. If that fails, they are read into memory, with a note.
    """
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets.data_files import DataFilesDict, DataFilesList

    # Given as lists, names with brackets or stars are not taken for patterns. The footer is part of
    # the cache key, because the modification times of two files can be equal.
    origins = [(str(file.stat().st_mtime_ns), sha256(_footer(file)).hexdigest()) for file in files]
    paths = [str(file.absolute()) for file in files]
    try:
        with _quiet():
            found = datasets.Dataset.from_parquet(
                DataFilesDict(train=DataFilesList(paths, origins)), split="train", columns=columns
            )
        pa.default_memory_pool().release_unused()  # the buffers that the cache was written from
        return found.data
    except Exception as error:  # no space, permission or locks; an unknown type
        reason = str(error.__cause__ or error) or type(error).__name__
        note = (
            f"`datasets` cannot cache the images ({printable(reason.splitlines()[0])}), so they "
            "stay in memory"
        )
        if note not in notes:
            notes.append(note)
    tables = []
    for file in files:
        with _reading(file), file.open("rb") as opened:
            tables.append(pq.read_table(opened, columns=columns))
    with _reading(files[0]):
        return pa.concat_tables(tables, promote_options="default")


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn errors of pyarrow into errors that name the file."""
    import pyarrow as pa

    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise VitcliError(
            f"cannot read `{printable(file)}` as parquet: {str(error).splitlines()[0]}",
            "write the file again with `datasets` or pandas",
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the bars, logs and warnings of `datasets`; its exceptions report failures."""
    import datasets

    level, bars = datasets.logging.get_verbosity(), datasets.is_progress_bar_enabled()
    with warnings.catch_warnings(action="ignore"):
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        datasets.disable_progress_bars()
        try:
            yield
        finally:
            datasets.logging.set_verbosity(level)
            if bars:
                datasets.enable_progress_bars()


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


def _metadata(file: Path) -> Any:
    """The `pyarrow.parquet.FileMetaData`; the file's name need not be UTF-8."""
    import pyarrow.parquet as pq

    with _reading(file), file.open("rb") as opened:
        return pq.read_metadata(opened)


def _footer(file: Path) -> bytes:
    """Size and footer (column sizes and statistics): a cheap fingerprint of a parquet file."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        opened.seek(max(0, size - FOOTER_TAIL))
        length = int.from_bytes(opened.read(4), "little")
        opened.seek(max(0, size - FOOTER_TAIL - length))
        return size.to_bytes(8, "little") + opened.read()

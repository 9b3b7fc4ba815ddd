"""Parquet as `datasets` writes it: one file, or a folder of them."""

import warnings
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import Any

from vitcli.data.image_set import ImageSet, Request, Source
from vitcli.data.labels import class_names, make_source, numbered, numbered_lists, several
from vitcli.data.readers.table import IMAGE_COLUMNS, LABEL_COLUMNS, find_column
from vitcli.data.splits import files_ending, in_split_order, split_of, splits_of
from vitcli.decode import ImageInput
from vitcli.errors import VitcliError, printable

FOOTER_TAIL = 8


class ParquetStore:
    """Images in parquet files, as bytes or as paths beside them.

    Args:
        files: the files, and how many rows each has.
        column: a `pyarrow.ChunkedArray` of their images. Reading a cell takes 5-15 us, of the
            `datasets.Dataset` it comes from 60; it may be done from many threads at once.
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
        fields = cell.keys() if hasattr(cell, "keys") else None  # of a struct; else a path
        if fields is not None and "path" not in fields:
            return None
        name = (cell if fields is None else cell["path"]).as_py()
        return Path(name).name if isinstance(name, str) else None

    def _file(self, row: int) -> tuple[Path, int]:
        """(the file that the row lies in, the number of its first row)."""
        number = bisect_right(self.starts, row) - 1
        return self.files[number], self.starts[number]


def load_parquet(request: Request) -> Source:
    """A parquet file, or a folder of them split by how their names begin.

    Raises:
        VitcliError: it cannot be read, a column is not there.
    """
    notes: list[str] = []
    return read_parquet(request, parquet_splits(request.path, notes), notes)


def read_parquet(
    request: Request, by_split: Mapping[str, Sequence[Path]], notes: list[str]
) -> Source:
    """The images of parquet files, split -> files.

    Raises:
        VitcliError: as `load_parquet`.
    """
    splits: dict[str, ImageSet] = {}
    parts: list[bytes] = []
    for split, files in by_split.items():
        images = _read_split(split, files, request, notes)
        splits[split] = images
        parts += [_footer(file) for file in files]
        parts += [name.encode() for name in images.classes]
    return make_source(request, splits, parts, notes)


def parquet_files(folder: Path) -> list[Path]:
    """The parquet files in `folder`; else in its `data/` or `train/`, `test/` …, as on the Hub."""
    return files_ending(folder, ".parquet")


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
    left_out = len(files) - sum(map(len, splits.values()))
    if left_out:
        notes.append(f"{printable(path)}: {left_out} files named after no split left out")
    return in_split_order(splits)


def _read_split(split: str, files: Sequence[Path], request: Request, notes: list[str]) -> ImageSet:
    shown = printable(files[0])
    about = [_metadata(file) for file in files]
    schema = about[0].schema.to_arrow_schema()
    features = features_of(schema)
    images, labels = choose_columns(shown, schema, features, request)
    for file, part in zip(files, about, strict=True):
        present = part.schema.to_arrow_schema().names
        find_column(printable(file), "image", images, present, ())
        find_column(printable(file), "label", labels, present, ())
    table = _read_table(files, [images, labels], notes)
    sizes = [(file, part.num_rows) for file, part in zip(files, about, strict=True)]
    store = ParquetStore(sizes, table.column(images))
    names = class_names(features.get(labels))
    with _reading(files[0]):
        column = table.column(labels)
        parted = several(column, shown, labels, request.multi_label, notes)
        if parted is not None:
            classes, first, targets = numbered_lists(shown, parted, names)
            return ImageSet(split, classes, first, store, targets=targets)
        values = column.dictionary_encode().unify_dictionaries().combine_chunks()
    rows, numbers, classes = numbered(shown, values, names)
    if len(rows) < len(values):
        notes.append(f"{shown}: {len(values) - len(rows):,} rows without a label left out")
    return ImageSet(split, classes, numbers, store, rows)


def _read_table(files: Sequence[Path], columns: list[str], notes: list[str]) -> Any:
    """These columns of all files, one after another.

    They are mapped into memory from the cache of `datasets`, which is written the first time and
    whenever a file has changed. Where that fails they are read into memory, with a note.
    """
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets.data_files import DataFilesDict, DataFilesList

    # Given as found, names with brackets or stars in them are not taken for patterns; and unlike
    # the time of change alone, the footer tells files apart that were written in one instant.
    marks = [(str(file.stat().st_mtime_ns), sha256(_footer(file)).hexdigest()) for file in files]
    paths = [str(file.absolute()) for file in files]
    try:
        with _quiet():
            found = datasets.Dataset.from_parquet(
                DataFilesDict(train=DataFilesList(paths, marks)), split="train", columns=columns
            )
        pa.default_memory_pool().release_unused()  # what the cache was written through
        return found.data
    except Exception as error:  # no space, no permission, no locks, a type it does not know
        reason = str(error.__cause__ or error) or type(error).__name__
        note = f"`datasets` cannot cache the images ({printable(reason.splitlines()[0])})"
        if (told := f"{note}: they are held in memory") not in notes:
            notes.append(told)
    tables = []
    for file in files:
        with _reading(file), file.open("rb") as opened:
            tables.append(pq.read_table(opened, columns=columns))
    with _reading(files[0]):
        return pa.concat_tables(tables, promote_options="default")


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Faults of pyarrow become errors that name the file."""
    import pyarrow as pa

    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise VitcliError(
            f"cannot read `{printable(file)}` as parquet: {str(error).splitlines()[0]}",
            "write it anew with `datasets` or pandas",
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """`datasets` without bars, logs and warnings: failures are told by the exception."""
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
    """What `datasets` says about the columns, {} where it cannot tell."""
    import datasets

    try:
        return dict(datasets.Features.from_arrow_schema(schema))
    except Exception:  # types that it does not know, or metadata of another make
        return {}


def choose_columns(
    shown: str, schema: Any, features: dict[str, Any], request: Request
) -> tuple[str, str]:
    """(image column, label column): as named, else as `datasets` marks them, else as usual."""
    import datasets
    import pyarrow.types as types

    image_column, label_column = request.image_column, request.label_column
    pictures = [n for n, feature in features.items() if isinstance(feature, datasets.Image)]
    classes = [n for n, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if image_column is None and pictures:
        image_column = pictures[0]
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
    """The `pyarrow.parquet.FileMetaData`, also of a file whose name is not UTF-8."""
    import pyarrow.parquet as pq

    with _reading(file), file.open("rb") as opened:
        return pq.read_metadata(opened)


def _footer(file: Path) -> bytes:
    """Size and footer of a parquet file: column sizes and statistics, a cheap stand-in for it."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        opened.seek(max(0, size - FOOTER_TAIL))
        length = int.from_bytes(opened.read(4), "little")
        opened.seek(max(0, size - FOOTER_TAIL - length))
        return size.to_bytes(8, "little") + opened.read()

"""The table of some parquet files: its size is checked, and then it is mapped from a cache."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil

from vitcli.errors import VitcliError, printable

FOOTER_TAIL = 8  # bytes: the length of the footer and the magic number
MAX_CELL_BYTES = 256 << 20  # 64 Mpx, the largest image, as 32-bit samples
MEMORY_FRACTION = 0.5  # of the free memory, for the row group that is being decoded
Metadata = Any  # pyarrow.parquet.FileMetaData


def check_cells(files: Sequence[Path], metadata: Sequence[Metadata], column: str) -> None:
    """Check that the row groups of an image column fit into memory, before one is decoded.

    Raises:
        VitcliError: a row group is too large, or its cells are.
    """
    limit = int(MEMORY_FRACTION * psutil.virtual_memory().available)
    for file, part in zip(files, metadata, strict=True):
        for group in range(part.num_row_groups):
            with reading(file):
                rows, size = _group_size(file, part, group, column, limit)
            if size > min(limit, max(1, rows) * MAX_CELL_BYTES):
                raise VitcliError(
                    f"`{printable(file)}`: {rows:,} rows of column `{printable(column)}` take "
                    f"{size / 1e9:.1f} GB of memory, and {limit / 1e9:.1f} GB may be used",
                    "write fewer rows to each row group (`row_group_size` in pandas and pyarrow), "
                    f"and images of at most {MAX_CELL_BYTES >> 20} MiB",
                )


def _group_size(
    file: Path, metadata: Metadata, group: int, column: str, limit: int
) -> tuple[int, int]:
    """(rows of a row group, decoded bytes of a column there)."""
    part = metadata.row_group(group)
    chunks = [part.column(number) for number in range(part.num_columns)]
    own = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] == column]
    return part.num_rows, sum(_decoded_bytes(file, group, chunk, limit) for chunk in own)


def _decoded_bytes(file: Path, group: int, chunk: Any, limit: int) -> int:
    """Bytes of the values of a column chunk, at most.

    A dictionary holds each distinct value once, so that a small chunk can be many large cells.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    size = int(chunk.total_uncompressed_size)
    if not chunk.has_dictionary_page or chunk.physical_type != "BYTE_ARRAY" or size > limit:
        return size
    # Most writers stop at a dictionary of 1 MB, so that this bound is enough for most files.
    page = chunk.data_page_offset - (chunk.dictionary_page_offset or 0)
    ratio = size / max(1, chunk.total_compressed_size)
    if size + page * ratio * chunk.num_values <= limit:
        return size
    with file.open("rb") as opened:
        name = chunk.path_in_schema
        part = pq.ParquetFile(opened, read_dictionary=[name]).read_row_group(group, columns=[name])
    values = part.column(0)
    while pa.types.is_struct(values.type):
        values = pc.struct_field(values, 0)
    parts = values.chunks if pa.types.is_dictionary(values.type) else []
    lengths = (pc.take(pc.binary_length(part.dictionary), part.indices) for part in parts)
    return max(size, sum(pc.sum(one).as_py() or 0 for one in lengths))


def read_table(files: Sequence[Path], columns: list[str], notes: list[str]) -> Any:
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
    origins = [
        (str(file.stat().st_mtime_ns), sha256(read_footer(file)).hexdigest()) for file in files
    ]
    paths = [str(file.absolute()) for file in files]
    try:
        with _quiet():
            found = datasets.Dataset.from_parquet(
                DataFilesDict(train=DataFilesList(paths, origins)), split="train", columns=columns
            )
        pa.default_memory_pool().release_unused()  # the buffers that the cache was written from
        found.data.table.validate(full=True)  # a wrong offset in a damaged cache is a crash
        return found.data
    except Exception as error:  # no space, permission or locks; an unknown type
        reason = str(error.__cause__ or error) or type(error).__name__
        failure = f"`datasets` cannot cache the images ({printable(reason.splitlines()[0])})"
        note = f"{failure}, so they stay in memory"
        if note not in notes:
            notes.append(note)
    needed = sum(
        part.row_group(group).total_byte_size
        for part in map(read_parquet_metadata, files)
        for group in range(part.num_row_groups)
    )
    if needed > MEMORY_FRACTION * (free := psutil.virtual_memory().available):
        raise VitcliError(
            f"{failure}, and they do not fit into memory: {needed / 1e9:.1f} GB, with "
            f"{free / 1e9:.1f} GB free",
            "free some space, or set HF_DATASETS_CACHE to a folder on a larger disk",
        )
    tables = []
    for file in files:
        with reading(file), file.open("rb") as opened:
            tables.append(pq.read_table(opened, columns=columns))
    with reading(files[0]):
        return pa.concat_tables(tables, promote_options="default")


@contextmanager
def reading(file: Path) -> Iterator[None]:
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


def read_parquet_metadata(file: Path) -> Any:
    """The `pyarrow.parquet.FileMetaData`; the file's name need not be UTF-8."""
    import pyarrow.parquet as pq

    with reading(file), file.open("rb") as opened:
        return pq.read_metadata(opened)


def read_footer(file: Path) -> bytes:
    """Size and footer (column sizes and statistics): a cheap fingerprint of a parquet file."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        opened.seek(max(0, size - FOOTER_TAIL))
        length = int.from_bytes(opened.read(4), "little")
        opened.seek(max(0, size - FOOTER_TAIL - length))
        return size.to_bytes(8, "little") + opened.read()

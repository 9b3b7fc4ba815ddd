"""Tables of features on disk, and the folder that holds them."""

import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vitcli.errors import VitcliError
from vitcli.files import write_text
from vitcli.hub.http import cache_folder
from vitcli.progress import Watcher

Ints = NDArray[np.int64]

MAX_CACHE_BYTES = 20 * 10**9  # a larger cache loses its least recently used tables
MAX_DISK_FRACTION = 0.9  # largest fraction of the free disk space that new rows may take
ROW_CHECK = np.dtype([("checksum", "<u4"), ("stamp", "<u4")])
# What a user types to do without the cache; training keeps half-precision features of a teacher.
SWITCHES = {False: "`--no-cache`", True: "`--set objective.teacher_cache=false`"}


class FeatureTable:
    """A (rows, dim) table in a folder. Any subset of the rows may be present.

    `rows.f32` is a sparse file of the whole table, `rows.sums` has a CRC-32 checksum and a stamp
    for each row, and `about.json` describes the table for a person. With `half` the file is
    `rows.bf16`, and `read` returns the bits of bfloat16 as int16, because NumPy has no such type.
    """

    def __init__(
        self, folder: Path, rows: int, dim: int, about: Mapping[str, Any], *, half: bool = False
    ) -> None:
        self.folder, self.rows, self.dim, self.about = folder, rows, dim, about
        self.file, self.dtype = ("rows.bf16", "<i2") if half else ("rows.f32", "<f4")
        off = SWITCHES[half]
        self.hint = f"disable the cache with {off}, or move it with the variable VITCLI_CACHE"

    def create(self) -> None:
        """Create the files that do not exist yet, and note the time of use."""
        with self._write_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            row = self.dim * np.dtype(self.dtype).itemsize
            for name, width in ((self.file, row), ("rows.sums", ROW_CHECK.itemsize)):
                # Append mode creates the file but never truncates one that has rows.
                with self._path(name).open("ab") as file:
                    if file.tell() != self.rows * width:
                        file.truncate(self.rows * width)
        if not (self.folder / "about.json").is_file():
            write_text(self.folder / "about.json", json.dumps(self.about, indent=2) + "\n")
        with suppress(OSError):
            os.utime(self.folder / "about.json")  # `evict` reads the time of the last use from it

    def find_valid(
        self, indices: Ints, stamps: NDArray[np.uint32]
    ) -> tuple[NDArray[np.bool_], int]:
        """Return (n,) True for intact rows with these stamps, and the number of damaged rows."""
        checks = np.fromfile(self._path("rows.sums"), dtype=ROW_CHECK)[indices]
        valid = (checks["stamp"] == stamps) & (stamps > 0)
        table, damaged = np.asarray(self._table()), 0  # rows of a plain array are faster to slice
        for place in np.flatnonzero(valid):
            # A checksum per row: one damaged row costs one image, not the table.
            if zlib.crc32(table[indices[place]].data) != checks["checksum"][place]:
                valid[place] = False
                damaged += 1
        return valid, damaged

    def write(self, indices: Ints, values: NDArray[np.float32], stamps: NDArray[np.uint32]) -> None:
        """Set the rows `indices` to `values` (n, dim)."""
        records = np.ascontiguousarray(values, dtype="<f4")
        if self.dtype == "<i2":
            records = torch.from_numpy(records).bfloat16().view(torch.int16).numpy()
        checks = np.empty(len(indices), dtype=ROW_CHECK)
        checks["checksum"] = [zlib.crc32(row.data) for row in records]
        checks["stamp"] = stamps
        # Values first: after a kill between both writes, the old checksum does not fit the new
        # row, and the row counts as missing.
        with self._write_errors():
            for name, part in ((self.file, records), ("rows.sums", checks)):
                with self._path(name).open("r+b") as file:
                    for first, last in _consecutive(indices):
                        file.seek(int(indices[first]) * part[0].nbytes)
                        file.write(part[first:last].tobytes())

    def read(self, indices: Ints) -> NDArray[Any]:
        """Return (n, dim): mapped from the disk if the indices are consecutive, else copied."""
        # Features of ImageNet-21k take tens of GB. A map reads only the rows that are used.
        table = self._table()
        if len(indices) and (np.diff(indices) == 1).all():
            return table[indices[0] : indices[-1] + 1]
        return np.asarray(table[indices])

    @contextmanager
    def locked(self, watch: Watcher) -> Iterator[None]:
        """Let one process at a time compute missing rows; the next process finds them there.

        No process evicts the table inside the block.
        """
        from filelock import FileLock, Timeout

        with self._write_errors():
            self.folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(_lock_file(self.folder))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            watch.note("waiting for another process that computes the same features")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise VitcliError(
                f"cannot write cached features to `{self.folder}`: {reason}",
                f"rows that are already cached stay valid; {self.hint}",
            ) from error

    def _table(self) -> NDArray[Any]:
        shape = self.rows, self.dim
        return np.memmap(self._path(self.file), dtype=self.dtype, mode="r", shape=shape)

    def _path(self, name: str) -> Path:
        return self.folder / name


def _consecutive(indices: Ints) -> Iterator[tuple[int, int]]:
    """Yield the (first, last + 1) positions of each run of consecutive numbers in `indices`."""
    breaks = [0, *(np.flatnonzero(np.diff(indices) != 1) + 1).tolist(), len(indices)]
    yield from pairwise(breaks)


def _lock_file(folder: Path) -> Path:
    """Return the lock of a table. It is next to its folder, because `evict` removes the folder."""
    return folder.with_name(f"{folder.name}.lock")


def feature_cache_folder() -> Path:
    """Return the folder of all feature tables."""
    return cache_folder() / "features"


def lack_of_space(folder: Path, size: int) -> str | None:
    """Return why `size` bytes cannot be written into `folder`, or None if they can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return str(error.strerror)
    if not os.access(folder, os.W_OK):
        return "the folder is not writable"
    return None if size <= MAX_DISK_FRACTION * free else f"{size / 1e9:.1f} GB do not fit"


def evict(used: Iterable[Path], max_bytes: int = MAX_CACHE_BYTES) -> int:
    """Remove least recently used tables until all take `max_bytes`; return the bytes they take.

    Tables in `used` and tables that another process computes stay.
    """
    from filelock import FileLock, Timeout

    tables = sorted(feature_cache_folder().glob("*/about.json"), key=_last_used)
    sizes = {path.parent: _disk_bytes(path.parent) for path in tables}
    total, protected = sum(sizes.values()), set(used)
    for folder, size in sizes.items():
        if total <= max_bytes:
            break
        if folder in protected:
            continue
        with suppress(OSError, Timeout), FileLock(_lock_file(folder)).acquire(timeout=0):
            shutil.rmtree(folder)
            total -= size
    return total


def _last_used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _disk_bytes(folder: Path) -> int:
    total = 0
    with suppress(OSError):  # another process evicts it
        for path in folder.iterdir():
            facts = path.stat()
            # Blocks, not the length: the tables are sparse files.
            total += getattr(facts, "st_blocks", -(-facts.st_size // 512)) * 512
    return total

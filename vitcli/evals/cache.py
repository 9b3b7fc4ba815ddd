"""Rows of numbers on disk, one for each image of a set, each with a checksum of its own.

What was computed stays, whichever images it was and wherever it broke off: a row counts as there
when its checksum is right, so that nothing has to be written in any order, or at once.
"""

import hashlib
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
from numpy.typing import NDArray

import vitcli.data
import vitcli.vit
from vitcli.data.image_set import ImageSet
from vitcli.errors import VitcliError
from vitcli.files import write_text
from vitcli.hub.http import cache_folder
from vitcli.progress import Watcher

Integers = NDArray[np.int64]

FORMAT = 1
MOST_BYTES = 20 * 10**9  # beyond which those that were not used for longest are removed
PROBES = 16  # images whose content tells two sets of equal names and sizes apart
FREE = 0.9  # share of the free disk that may be filled
ENTRY = np.dtype([("sum", "<u4"), ("stamp", "<u4")])
HINT = "`--no-cache` keeps none, VITCLI_CACHE keeps them elsewhere"


class Rows:
    """A table of (rows, dim) float32 in the folder `folder`, of which any rows may be there.

    `rows.f32` is as long as the whole and takes the disk of what was written; `rows.sums` has a
    checksum (CRC-32) and a stamp of each row; `about.json` says what it is.

    Args:
        folder: made if it is not there.
        rows: of the whole table.
        about: plain values for a person who looks into the folder.

    Raises:
        VitcliError: it cannot be made.
    """

    def __init__(self, folder: Path, rows: int, dim: int, about: Mapping[str, Any]) -> None:
        self.folder, self.rows, self.dim = folder, rows, dim
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)
            for name, width in (("rows.f32", dim * 4), ("rows.sums", ENTRY.itemsize)):
                with self._place(name).open("ab") as file:
                    if file.tell() != rows * width:
                        file.truncate(rows * width)
        if not (folder / "about.json").is_file():
            write_text(folder / "about.json", json.dumps(about, indent=2) + "\n")
        with suppress(OSError):
            os.utime(folder / "about.json")  # tells when it was last used

    def there(self, indices: Integers, stamps: NDArray[np.uint32]) -> tuple[NDArray[np.bool_], int]:
        """Which of these rows are there with these stamps and whole; how many are damaged."""
        entries = np.fromfile(self._place("rows.sums"), dtype=ENTRY)[indices]
        found = (entries["stamp"] == stamps) & (stamps > 0)
        table, damaged = np.asarray(self._table()), 0  # as a plain array, whose rows cost less
        for place in np.flatnonzero(found):
            if zlib.crc32(table[indices[place]].data) != entries["sum"][place]:
                found[place] = False
                damaged += 1
        return found, damaged

    def write(
        self, indices: Integers, values: NDArray[np.float32], stamps: NDArray[np.uint32]
    ) -> None:
        """Set the rows `indices` to `values` (n, dim).

        Raises:
            VitcliError: the disk is full, or may not be written to.
        """
        values = np.ascontiguousarray(values, dtype="<f4")
        entries = np.empty(len(indices), dtype=ENTRY)
        entries["sum"] = [zlib.crc32(row.data) for row in values]
        entries["stamp"] = stamps
        with self._writing():
            for name, records in (("rows.f32", values), ("rows.sums", entries)):
                with self._place(name).open("r+b") as file:
                    for first, last in _runs(indices):
                        file.seek(int(indices[first]) * records[0].nbytes)
                        file.write(records[first:last].tobytes())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise VitcliError(
                f"cannot keep features in `{self.folder}`: {reason}",
                f"what is there is kept; {HINT}",
            ) from error

    def read(self, indices: Integers) -> NDArray[np.float32]:
        """(n, dim): mapped from the disk where they follow each other, else in memory."""
        table = self._table()
        if len(indices) and (np.diff(indices) == 1).all():
            return table[indices[0] : indices[-1] + 1]
        return np.asarray(table[indices])

    @contextmanager
    def alone(self, watch: Watcher) -> Iterator[None]:
        """One process at a time works on the missing rows; the next finds them done."""
        from filelock import FileLock, Timeout

        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            watch.note("another process computes the same features: waiting for it")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _table(self) -> NDArray[np.float32]:
        shape = self.rows, self.dim
        return np.memmap(self._place("rows.f32"), dtype="<f4", mode="r", shape=shape)

    def _place(self, name: str) -> Path:
        return self.folder / name


def _runs(indices: Integers) -> Iterator[tuple[int, int]]:
    """Ascending indices -> (first, last + 1) places of those that follow each other."""
    breaks = [0, *(np.flatnonzero(np.diff(indices) != 1) + 1).tolist(), len(indices)]
    yield from pairwise(breaks)


def features_folder() -> Path:
    """Where the tables of features lie."""
    return cache_folder() / "features"


def room_for(folder: Path, size: int) -> str | None:
    """Why `size` bytes cannot be written into `folder`; None if they can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return str(error.strerror)
    if not os.access(folder, os.W_OK):
        return "it may not be written to"
    return None if size <= FREE * free else f"{size / 1e9:.1f} GB do not fit"


def trim(used: Iterable[Path], most: int = MOST_BYTES) -> int:
    """Remove tables until all take `most` bytes, the longest unused first; what they take then.

    Those in `used`, and those that a process works on, stay.
    """
    from filelock import FileLock, Timeout

    tables = sorted(features_folder().glob("*/about.json"), key=_last_used)
    sizes = {path.parent: _disk_bytes(path.parent) for path in tables}
    total, kept = sum(sizes.values()), set(used)
    for folder, size in sizes.items():
        if total <= most:
            break
        if folder in kept:
            continue
        with suppress(OSError, Timeout), FileLock(folder / ".lock").acquire(timeout=0):
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
    for path in folder.iterdir():
        with suppress(OSError):
            facts = path.stat()
            total += getattr(facts, "st_blocks", -(-facts.st_size // 512)) * 512
    return total


def table_name(facts: Mapping[str, Any]) -> str:
    """The folder of a table: a hash of all that decides what is in it."""
    values = json.dumps({"format": FORMAT, **facts}, sort_keys=True, default=str)
    return hashlib.sha256(values.encode()).hexdigest()[:32]


def code_hash() -> str:
    """Of the sources between a file and its features: another version may compute otherwise."""
    digest = hashlib.sha256()
    data = Path(vitcli.data.__path__[0])
    files = [*Path(vitcli.vit.__path__[0]).glob("*.py")]
    files += [data / name for name in ("decode.py", "transforms.py", "arrays.py", "stored.py")]
    for path in sorted(files):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def content_hash(images: ImageSet) -> str:
    """Of some images spread over the set, beside the fingerprint, which looks at no content."""
    digest = hashlib.sha256()
    for index in np.linspace(0, len(images) - 1, min(PROBES, len(images))).astype(int):
        with suppress(OSError):
            content: Any = images.content(int(index))
            if isinstance(content, Path):
                content = content.read_bytes()
            digest.update(content if isinstance(content, bytes) else content.tobytes())
        digest.update(b";")
    return digest.hexdigest()


def stamps_of(images: ImageSet, indices: Integers) -> NDArray[np.uint32]:
    """(n,): size and time of change of each image's file, as a hash; 1 where it has no own file."""
    stamps = np.ones(len(indices), dtype=np.uint32)
    for place, index in enumerate(indices):
        path = images.content(int(index))
        if not isinstance(path, Path):
            break
        try:
            facts = path.stat()
        except OSError:
            continue
        stamps[place] = zlib.crc32(f"{facts.st_size} {facts.st_mtime_ns}".encode()) | 1
    return stamps

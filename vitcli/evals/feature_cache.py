"""Rows of numbers on disk, one for each image of a set, each with a checksum of its own.

What was computed stays, whichever images it was and wherever it broke off: a row counts as there
when its checksum is right, so that nothing has to be written in any order, or at once.

Features that are computed once: what is in the cache is read, the rest is added to it.
"""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import vitcli.data
import vitcli.vit
from vitcli import distributed as launch
from vitcli.data.image_set import ImageSet
from vitcli.devices import pick_device, resolve_precision
from vitcli.errors import VitcliError
from vitcli.evals.features import (
    MAX_PIXEL_SIDE,
    Extracted,
    extract,
    extract_batches,
    no_image_readable,
    rank_and_world_size,
)
from vitcli.files import write_text
from vitcli.hub.http import cache_folder, size_text
from vitcli.progress import Bar, Quiet, Watcher
from vitcli.weights.hashing import model_hash
from vitcli.weights.load import require_preprocess
from vitcli.weights.loaded import LoadedModel

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
    package = Path(vitcli.__path__[0])
    names = ("decode.py", "preprocess.py", "data/image_set.py", "data/decoded_cache.py")
    files = [*(package / "vit").glob("*.py"), *(package / name for name in names)]
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


@dataclass
class Features:
    """The frozen features of one model on one set of data, for any images of it, once each.

    They are kept in the cache by weights, code, preprocessing, precision, device and data; rows of
    images whose file has changed, and damaged ones, are computed again. An extraction that broke
    off goes on where it stopped. Of several processes on this machine each adds its part; on
    several machines nothing is kept.

    Args:
        model: in eval mode; what `features` gives is what is kept.
        data: the fingerprint of the data.
        about: what a person who finds the table should know.
        keep: False neither reads nor writes a cache.
    """

    model: LoadedModel
    data: str
    about: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 128
    precision: str = "auto"
    keep: bool = True
    watch: Watcher = field(default_factory=Quiet)
    _weights: str | None = None
    _used: set[Path] = field(default_factory=set)
    _added: bool = False

    def of(
        self, images: ImageSet, indices: Integers, *, label: str, with_pixels: bool = False
    ) -> Extracted:
        """The features of the images `indices` (ascending) of a split, as `extract` gives them.

        `indices` of the result point into `images`.

        Raises:
            VitcliError: none of them can be read; the disk is full.
        """
        keep = self.keep and launch.local_world_size() == launch.world_size()
        dims = self.model.config.feature_dim, self._pixels() if with_pixels else 0
        if keep and rank_and_world_size()[0] == 0:
            needed = len(indices) * sum(dims) * 4
            if reason := room_for(features_folder(), needed):
                self.watch.warn(f"no features are kept in `{features_folder()}`: {reason}")
                keep = self.keep = False
        if not _agreed(keep):
            found = extract(
                self.model,
                images.subset(indices),
                batch_size=self.batch_size,
                precision=self.precision,
                with_pixels=with_pixels,
                watch=self.watch,
                label=label,
            )
            return replace(found, indices=indices[found.indices])
        tables = [self._table(images, "features", dims[0])]
        tables += [self._table(images, "pixels", dims[1])] if with_pixels else []
        return self._through(tables, images, indices, label)

    def _through(
        self, tables: list[Rows], images: ImageSet, indices: Integers, label: str
    ) -> Extracted:
        """Compute what is missing in the tables, then read them."""
        first, stamps = rank_and_world_size()[0] == 0, stamps_of(images, indices)
        broken: list[str] = []
        with tables[0].alone(self.watch) if first else nullcontext():
            missing = _agreed([self._missing(t, indices, stamps) for t in tables] if first else [])
            todo = missing[0]
            self._tell_found(len(indices), int(todo.sum()), label)
            with self.watch.progress(label, len(indices), int(len(indices) - todo.sum())) as bar:
                broken += self._add(tables, images, indices[todo], stamps[todo], "features", bar)
            if len(tables) > 1 and (rest := missing[1] & ~todo).any():
                with self.watch.progress(f"pixels of {label}", int(rest.sum())) as bar:
                    left = indices[rest], stamps[rest]
                    broken += self._add(tables[1:], images, *left, "pixels", bar)
            broken = _joined(broken)  # and by then all processes have written
        there = np.ones(len(indices), dtype=np.bool_)
        for table, lacked in zip(tables, missing, strict=True):
            there[lacked] &= table.there(indices[lacked], stamps[lacked])[0]
        told = tuple(dict.fromkeys(broken))
        if not there.any():
            raise no_image_readable(len(indices), broken)
        if lost := len(indices) - int(there.sum()) - len(told):
            raise VitcliError(
                f"{lost} rows that were written to `{tables[0].folder}` cannot be read back", HINT
            )
        self._added = self._added or bool(todo.any())
        kept = indices[there]
        return Extracted(
            tables[0].read(kept),
            images.labels[kept],
            kept,
            tables[1].read(kept) if len(tables) > 1 else None,
            told,
        )

    def _missing(self, table: Rows, indices: Integers, stamps: Any) -> NDArray[np.bool_]:
        there, damaged = table.there(indices, stamps)
        if damaged:
            self.watch.warn(
                f"{damaged} rows in `{table.folder}` are damaged, and computed once more"
            )
        return ~there

    def _add(
        self,
        tables: list[Rows],
        images: ImageSet,
        indices: Integers,
        stamps: NDArray[np.uint32],
        what: str,
        bar: Bar,
    ) -> list[str]:
        """Write the rows of the images `indices`; lines about those that cannot be read."""
        broken: list[str] = []
        if not len(indices):
            return broken
        for part in self._parts(images.subset(indices), what, len(tables) > 1):
            broken += part.broken
            if len(part.indices):
                where, marks = indices[part.indices], stamps[part.indices]
                for table, values in zip(tables, (part.outputs, part.pixels), strict=False):
                    assert values is not None
                    table.write(where, values, marks)
            bar.advance(len(part.indices) + len(part.broken))
        return broken

    def _parts(self, images: ImageSet, what: str, with_pixels: bool) -> Iterator[Extracted]:
        return extract_batches(
            self.model,
            images,
            output=what,
            batch_size=self.batch_size,
            precision=self.precision,
            with_pixels=with_pixels,
        )

    def _table(self, images: ImageSet, what: str, dim: int) -> Rows:
        preprocess, device = require_preprocess(self.model), pick_device()
        precision = "fp32" if self.precision == "auto" else self.precision
        if self._weights is None:
            self._weights = model_hash(self.model, head=False)
        facts = {
            "what": what,
            "code": code_hash(),
            "preprocess": preprocess.to_dict(),
            "data": self.data,
            "split": images.name,
            "images": len(images),
            "content": content_hash(images),
            "dim": dim,
        }
        if what == "features":
            facts |= {
                "weights": self._weights,
                "precision": resolve_precision(precision, device),
                "device": device.type,
            }
        folder = features_folder() / table_name(facts)
        self._used.add(folder)
        return Rows(folder, len(images), dim, {**self.about, **facts})

    def _pixels(self) -> int:
        """Numbers of one image in the raw-pixel baseline."""
        preprocess = require_preprocess(self.model)
        rows, columns = (min(side, MAX_PIXEL_SIDE) for side in preprocess.image_size)
        return preprocess.num_channels * rows * columns

    def _tell_found(self, count: int, missing: int, label: str) -> None:
        if missing < count:
            here = f"{count - missing:,} of {count:,}"
            self.watch.note(f"{label}: the features of {here} are here already")

    def tell_kept(self) -> None:
        """Where what was added to the cache lies; the longest unused goes where it is too much."""
        if self._added and rank_and_world_size()[0] == 0:
            total = size_text(trim(self._used))
            self.watch.note(f"features are kept in `{features_folder()}` ({total} in all); {HINT}")


def _agreed(value: Any) -> Any:
    """The value that process 0 has."""
    if rank_and_world_size()[1] == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box)
    return box[0]


def _joined(lines: list[str]) -> list[str]:
    """The lines of all processes, in their order."""
    number = rank_and_world_size()[1]
    if number == 1:
        return lines
    parts: list[Any] = [None] * number
    torch.distributed.all_gather_object(parts, lines)
    return [line for part in parts for line in part]

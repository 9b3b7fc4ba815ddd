"""Images that must stay in one split: exact copies, and members of one group such as a patient.

Copies have equal stored bytes. Only images with equal keys (the size of a file) are read: first a
part from the middle, and all of it if the parts are equal too. Nothing is decoded. Copies that were
scaled or recompressed are found by `vitcli check`, and by `vitcli/evals/near_copies.py`.
"""

import hashlib
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitcli.data.image_set import ImageSet, Integers
from vitcli.errors import counted, printable
from vitcli.progress import Watcher

Digests = NDArray[np.bytes_]  # (n,) of 16 bytes

PART_BYTES = 4096
THREADS = 8
BAR_IMAGES = 500
MAX_LEAK_READS = 200_000  # images; given splits of larger sets are compared by `vitcli check` only


def image_units(
    sets: Mapping[str, ImageSet], watch: Watcher, *, within: bool
) -> dict[str, Integers] | None:
    """Split -> (n,) numbers, equal for exact copies; None if the store cannot compare images.

    It is empty if a comparison of given splits would read more than MAX_LEAK_READS images.

    Args:
        sets: the images.
        watch: receives progress.
        within: find the copies within a split too, not only those in two splits.
    """
    keys = [images.content_keys() for images in sets.values()]
    if not keys or any(key is None for key in keys):
        return None
    every = np.concatenate([key for key in keys if key is not None])
    _, which, counts = np.unique(every, return_inverse=True, return_counts=True)
    shared = (counts[which] > 1) & (every >= 0)
    lengths = [len(images) for images in sets.values()]
    if not within:
        split = np.repeat(np.arange(len(sets)), lengths)
        first, last = np.full(len(counts), len(sets)), np.zeros(len(counts), dtype=np.int64)
        np.minimum.at(first, which, split)
        np.maximum.at(last, which, split)
        shared &= (first < last)[which]
        if shared.sum() > MAX_LEAK_READS:
            return {}
    starts = np.cumsum([0, *lengths])
    units = np.arange(len(every))
    rows = np.flatnonzero(shared)
    for whole in (False, True):
        digests = _read_all(list(sets.values()), starts, rows, whole, watch)
        rows, digests = rows[digests != b""], digests[digests != b""]
        rows, firsts = _repeated(rows, every[rows], digests)
    units[rows] = firsts
    return dict(zip(sets, np.split(units, starts[1:-1]), strict=True))


def _repeated(rows: Integers, keys: Integers, digests: Digests) -> tuple[Integers, Integers]:
    """The rows whose key and digest another row has too, and the first row of each."""
    table = np.zeros(len(rows), [("key", "<i8"), ("digest", digests.dtype)])
    table["key"], table["digest"] = keys, digests
    _, first, which, counts = np.unique(
        table, return_index=True, return_inverse=True, return_counts=True
    )
    repeated = counts[which] > 1
    return rows[repeated], rows[first[which[repeated]]]


def content_digest(place: tuple[ImageSet, int], *, whole: bool = True) -> bytes | None:
    """A hash of the stored bytes of an image, or of a part of them; None if it cannot be read."""
    images, index = place
    try:
        content = images.content(index)
        if isinstance(content, str | os.PathLike):
            return _file_digest(content, whole)
        stored = content if isinstance(content, bytes) else _pixels(content)
    except Exception:  # the image is reported where it is decoded
        return None
    return hashlib.sha256(stored if whole else _middle(stored)).digest()[:16]


def _pixels(picture: Any) -> bytes:
    content: bytes = picture.tobytes()
    return content


def _middle(content: bytes) -> bytes:
    start = max(0, (len(content) - PART_BYTES) // 2)
    return content[start : start + PART_BYTES]


def _file_digest(path: str | os.PathLike[str], whole: bool) -> bytes:
    if whole:
        with Path(path).open("rb", buffering=0) as file:
            return hashlib.file_digest(file, "sha256").digest()[:16]
    handle = os.open(path, os.O_RDONLY)  # a third of the time of `open`
    try:
        middle = max(0, (os.fstat(handle).st_size - PART_BYTES) // 2)
        return hashlib.sha256(os.pread(handle, PART_BYTES, middle)).digest()[:16]
    finally:
        os.close(handle)


def _read_all(
    owners: Sequence[ImageSet], starts: Integers, rows: Integers, whole: bool, watch: Watcher
) -> Digests:
    """(n,) the digest of each row, empty if it cannot be read.

    Files are read by threads, in few large tasks. The result is an array, because a list of bytes
    takes several times the memory.

    Args:
        starts: the first row of each image set, and the number of all rows.
    """
    digests = np.zeros(len(rows), "S16")

    def read(start: int) -> int:
        part = rows[start : start + BAR_IMAGES]
        owner = np.searchsorted(starts, part, side="right") - 1
        for place, (row, number) in enumerate(zip(part, owner, strict=True), start):
            at = owners[number], int(row - starts[number])
            digests[place] = content_digest(at, whole=whole) or b""
        return len(part)

    if not len(rows):
        return digests
    with (
        watch.progress("images of equal size, compared", len(rows)) as bar,
        ThreadPoolExecutor(THREADS) as threads,
    ):
        for count in threads.map(read, range(0, len(rows), BAR_IMAGES)):
            bar.advance(count)
    return digests


def join_groups(units: Integers, groups: Integers | None) -> Integers:
    """(n,) numbers, equal for images that share a unit or a group, or are linked by others.

    Args:
        units: (n,) equal for copies.
        groups: (n,) equal for members of a group; -1: in no group.
    """
    if groups is None or not (groups >= 0).any():
        return units
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n = len(units)
    _, copy = np.unique(units, return_inverse=True)
    grouped = np.flatnonzero(groups >= 0)
    _, group = np.unique(groups[grouped], return_inverse=True)
    # Nodes: the images, then the units, then the groups.
    first = np.concatenate([np.arange(n), grouped])
    second = np.concatenate([n + copy, n + copy.max() + 1 + group])
    size = int(second.max()) + 1
    graph = coo_array((np.ones(len(first), dtype=np.int8), (first, second)), shape=(size, size))
    found: Integers = connected_components(graph, directed=False)[1][:n].astype(np.int64)
    return found


def leak_notes(
    shown: str, units: Mapping[str, Integers], sets: Mapping[str, ImageSet]
) -> list[str]:
    """A note for each pair of given splits that share images or groups."""
    notes = []
    names = list(units)
    for place, first in enumerate(names):
        for later in names[place + 1 :]:
            leaked = np.flatnonzero(np.isin(units[later], units[first]))
            if len(leaked):
                example = printable(sets[later].describe(int(leaked[0])))
                one, more = (
                    f"{later} images {are}" for are in ("is an exact copy", "are exact copies")
                )
                notes.append(
                    f"{shown}: {counted(len(leaked), one, more, len(units[later]))} of {first} "
                    f"images, such as `{example}`: figures on {later} are unreliable; "
                    f"`vitcli check {shlex.quote(shown)}` lists them"
                )
            notes += _group_leak(shown, sets[first], sets[later])
    return notes


def _group_leak(shown: str, first: ImageSet, later: ImageSet) -> Iterable[str]:
    if first.groups is None or later.groups is None:
        return
    groups = np.unique(later.groups[later.groups >= 0])
    shared = np.isin(groups, first.groups)
    if shared.any():
        one, more = (f"groups of the {later.name} images {are}" for are in ("is", "are"))
        yield (
            f"{shown}: {counted(int(shared.sum()), one, more, len(groups))} also in {first.name}"
        )

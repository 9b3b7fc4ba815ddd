"""One pass over all images of a dataset, and near-duplicate detection, for `vitcli check`.

Perceptual hashes propose pairs and small thumbnails confirm them: a hash alone confuses images of
low contrast, and thumbnails of all pairs would take too long. Copies that are scaled, recompressed,
slightly recoloured or grey are found; cropped, mirrored and rotated copies are not.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitcli.data.image_set import ImageSet, Integers, Pixels
from vitcli.data.prefetch import Prefetcher, map_in_order
from vitcli.data.source import Source
from vitcli.decode import ImageError, open_image, read_image
from vitcli.pixels import PixelFormat, Window
from vitcli.progress import Quiet, Watcher

Hashes = NDArray[np.uint64]
Rows = NDArray[Any]  # of ROW

HASH_SIDE = 32  # px: side of the grey image that is hashed
THUMBNAIL_SIDE = 16  # px
FREQUENCIES = 8
MAX_BITS = 6  # two hashes that differ in more bits are of different images
BANDS = MAX_BITS + 1  # so two hashes that differ in MAX_BITS bits are equal in at least one band
MIN_CORRELATION = 0.99  # of two thumbnails
MAX_LEVEL = 40.0  # grey levels between the means of two thumbnails
FLAT_STD = 2.0  # grey levels; below this standard deviation a thumbnail has no structure
BLOCK = 2048
PART = 64  # images that one thread scans at a time
# One scanned image.
ROW = np.dtype(
    [
        ("state", "u1"),
        ("index", "<i8"),
        ("size", "<i8", 2),  # height and width in px
        ("digest", "S16"),
        ("hash", "<u8"),
        ("thumbnail", "u1", (THUMBNAIL_SIDE, THUMBNAIL_SIDE)),
    ]
)
READABLE, UNREADABLE = 1, 2  # states; 0: not scanned yet


def _cosines() -> NDArray[np.float32]:
    """(FREQUENCIES, HASH_SIDE): the low rows of the type-II discrete cosine transform."""
    place = np.arange(HASH_SIDE) + 0.5
    return np.cos(np.pi / HASH_SIDE * np.outer(np.arange(FREQUENCIES), place)).astype(np.float32)


COSINES = _cosines()
WEIGHTS = (np.uint64(1) << np.arange(FREQUENCIES**2, dtype=np.uint64)).astype(np.uint64)


def perceptual_hashes(grey: Pixels) -> Hashes:
    """(n, HASH_SIDE, HASH_SIDE) grey -> (n,): which low frequencies are above their median (pHash).

    The bit of the mean brightness is always 0, so that brighter copies have the same hash.
    """
    found = (COSINES @ grey.astype(np.float32) @ COSINES.T).reshape(len(grey), -1)  # (n, 64)
    bits = found > np.median(found[:, 1:], axis=1, keepdims=True)
    bits[:, 0] = False
    hashes: Hashes = bits @ WEIGHTS
    return hashes


def halved(grey: Pixels) -> Pixels:
    """(n, HASH_SIDE, HASH_SIDE) -> (n, THUMBNAIL_SIDE, THUMBNAIL_SIDE): means of 2x2."""
    step = HASH_SIDE // THUMBNAIL_SIDE
    means = grey.reshape(-1, THUMBNAIL_SIDE, step, THUMBNAIL_SIDE, step).mean(axis=(2, 4))
    return np.rint(means).astype(np.uint8)


def group_duplicates(hashes: Hashes, thumbnails: Pixels) -> Integers:
    """(n,) group numbers: equal for images that show the same.

    Args:
        hashes: (n,) from `perceptual_hashes`.
        thumbnails: (n, THUMBNAIL_SIDE, THUMBNAIL_SIDE).
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n = len(hashes)
    if n == 0:
        return np.zeros(0, dtype=np.int64)
    # Images with equal hashes are compared only with the first of them, because a thousand copies
    # would make a million pairs.
    distinct, first, which = np.unique(hashes, return_index=True, return_inverse=True)
    repeated = np.flatnonzero(first[which] != np.arange(n))
    pairs = [np.stack([first[which[repeated]], repeated], axis=1)]
    pairs += [first[found] for found in _near_pairs(distinct)]
    candidates = np.concatenate(pairs)  # (m, 2)
    chosen = candidates[_confirm(thumbnails, candidates)]
    ones = np.ones(len(chosen), dtype=np.int8)
    graph = coo_array((ones, (chosen[:, 0], chosen[:, 1])), shape=(n, n))
    groups: Integers = connected_components(graph, directed=False)[1].astype(np.int64)
    return groups


def _near_pairs(hashes: Hashes) -> Iterator[Integers]:
    """Pairs (m, 2) of different hashes at most MAX_BITS apart; a pair may occur more than once.

    Such hashes are equal in at least one of BANDS bands, so only hashes with an equal band are
    compared (multi-index hashing, Norouzi et al. 2012).
    """
    edges = np.linspace(0, FREQUENCIES**2, BANDS + 1).astype(int)
    for low, high in pairwise(edges):
        mask = np.uint64((1 << int(high - low)) - 1)
        keys = (hashes >> np.uint64(low)) & mask
        order = np.argsort(keys, kind="stable")
        cuts = np.flatnonzero(np.diff(keys[order])) + 1
        for bucket in np.split(order, cuts):
            yield from _near_within(hashes, bucket)


def _near_within(hashes: Hashes, bucket: Integers) -> Iterator[Integers]:
    for start in range(0, len(bucket), BLOCK):
        rows = bucket[start : start + BLOCK]
        columns = bucket[start:]
        if len(columns) < 2:
            continue
        apart = np.bitwise_count(hashes[rows][:, None] ^ hashes[columns][None])
        i, j = np.nonzero(np.triu(apart <= MAX_BITS, k=1))
        if len(i):
            yield np.stack([rows[i], columns[j]], axis=1)


def _confirm(thumbnails: Pixels, pairs: Integers) -> NDArray[np.bool_]:
    """(m,) True for pairs whose thumbnails are equal up to small changes."""
    result = np.empty(len(pairs), dtype=bool)
    for start in range(0, len(pairs), 65536):
        part = pairs[start : start + 65536]
        a, b = (
            thumbnails[part[:, side]].reshape(len(part), -1).astype(np.float32) for side in (0, 1)
        )
        level = np.abs(a.mean(axis=1) - b.mean(axis=1))
        spread = np.stack([a.std(axis=1), b.std(axis=1)])
        a -= a.mean(axis=1, keepdims=True)
        b -= b.mean(axis=1, keepdims=True)
        covariance = (a * b).mean(axis=1)
        correlation = covariance / np.maximum(spread.prod(axis=0), 1e-6)
        flat = (spread < FLAT_STD).all(axis=0)
        alike = np.where(flat, level < FLAT_STD, correlation >= MIN_CORRELATION)
        result[start : start + 65536] = alike & (level <= MAX_LEVEL)
    return result


@dataclass(frozen=True)
class DatasetScan:
    """The facts about all readable images, one row each, in the order of the splits.

    Attributes:
        splits: split names.
        split: (n,) index into `splits`.
        index: (n,) index of the image in its split.
        label: (n,) class index.
        size: (n, 2) height and width in pixels, upright.
        digest: (n,) hash of the stored bytes.
        hashes: (n,) perceptual hashes.
        thumbnails: (n, THUMBNAIL_SIDE, THUMBNAIL_SIDE) grey.
        unreadable: (name, reason) of the other images.
    """

    splits: tuple[str, ...]
    split: Integers
    index: Integers
    label: Integers
    size: Integers
    digest: Any
    hashes: Hashes
    thumbnails: Pixels
    unreadable: tuple[tuple[str, str], ...]

    def __len__(self) -> int:
        return len(self.split)

    def side_range(self, axis: int) -> dict[str, int] | None:
        """Minimum, median and maximum of the heights (0) or widths (1); None without images."""
        side = self.size[:, axis]
        if not len(side):
            return None
        return {"min": int(side.min()), "median": int(np.median(side)), "max": int(side.max())}


def repeated_rows(which: Integers) -> list[Integers]:
    """The rows of each number that occurs more than once, in the order of their first row."""
    order = np.argsort(which, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(which[order])) + 1)
    return sorted((g for g in groups if len(g) > 1), key=lambda g: int(g[0]))


def leaked_pairs(split: Integers, groups: Integers) -> Integers:
    """(m, 2) rows that show the same in two splits: the first of a group, and each later one.

    Args:
        split: (n,) numbers; -1: in no split.
        groups: (n,) from `group_duplicates`.
    """
    rows = np.argsort(split, kind="stable")
    rows = rows[split[rows] >= 0]
    _, first, which = np.unique(groups[rows], return_index=True, return_inverse=True)
    origin = rows[first[which]]
    later = split[rows] > split[origin]
    pairs: Integers = np.stack([origin[later], rows[later]], axis=1)
    return pairs[np.argsort(pairs[:, 0], kind="stable")]


def split_numbers(names: Iterable[tuple[str, str]], splits: Mapping[str, ImageSet]) -> Integers:
    """(n,) the place in `splits` of the split that holds each image; -1: none does.

    Args:
        names: (n,) split and name of each image. A table may name one file in two splits: its
            images are in the split of the same name.
    """
    found: dict[str, int] = {}
    own: dict[tuple[str, str], int] = {}
    for number, (split, images) in enumerate(splits.items()):
        for index in range(len(images)):
            name = images.describe(index)
            found.setdefault(name, number)
            own[split, name] = number
    numbers = [own.get((split, name), found.get(name, -1)) for split, name in names]
    return np.array(numbers, dtype=np.int64)


def scan_dataset(
    source: Source,
    *,
    window: Window | None = None,
    workers: int | None = None,
    watch: Watcher | None = None,
) -> DatasetScan:
    """Read every image of every split once.

    Args:
        source: the dataset.
        window: see `Preprocess`.
        workers: threads; None uses one per core.
        watch: receives progress.
    """
    watch, workers = watch or Quiet(), workers or os.cpu_count() or 1
    total = sum(len(images) for images in source.splits.values())
    rows, where, unreadable = [], [], []
    with watch.progress("images", total) as bar:
        for number, images in enumerate(source.splits.values()):
            for part, reasons in scan_images(images, np.arange(len(images)), window, workers):
                bar.advance(len(part))
                unreadable += [(images.describe(index), why) for index, why in reasons.items()]
                readable = part[part["state"] == READABLE]
                index = readable["index"]
                split = np.full(len(index), number)
                where.append(np.stack([split, index, images.labels[index]]))
                rows.append(readable)
    split, index, label = np.concatenate([np.zeros((3, 0), np.int64), *where], axis=1)
    found = np.concatenate([np.zeros(0, ROW), *rows])
    return DatasetScan(
        tuple(source.splits), split, index, label, found["size"], found["digest"], found["hash"],
        found["thumbnail"], tuple(unreadable),
    )  # fmt: skip


def scan_images(
    images: ImageSet,
    indices: Integers,
    window: Window | None = None,
    workers: int = 1,
    *,
    reduced: bool = False,
) -> Prefetcher[int, tuple[Rows, dict[int, str]]]:
    """Parts of `indices`, in order: an array of ROW each, and why images cannot be read.

    Args:
        reduced: decode JPEG files at a smaller scale if that is enough for the hash. It takes a
            fraction of the time, and finds less damage.
    """
    scan = partial(_scan_part, images, PixelFormat("RGB", window), reduced)
    parts = [indices[start : start + PART] for start in range(0, len(indices), PART)]
    return map_in_order(lambda number: scan(parts[number]), range(len(parts)), workers)


def _scan_part(
    images: ImageSet, wanted: PixelFormat, reduced: bool, indices: Integers
) -> tuple[Rows, dict[int, str]]:
    rows, reasons = np.zeros(len(indices), ROW), {}
    rows["index"], rows["state"] = indices, READABLE
    greys = np.zeros((len(indices), HASH_SIDE, HASH_SIDE), np.uint8)
    for place, index in enumerate(indices.tolist()):
        try:
            rows["size"][place], rows["digest"][place], greys[place] = _scan_image(
                images, wanted, reduced, index
            )
        except ImageError as error:
            rows["state"][place], reasons[index] = UNREADABLE, error.reason
    rows["hash"], rows["thumbnail"] = perceptual_hashes(greys), halved(greys)
    return rows, reasons


def _scan_image(
    images: ImageSet, wanted: PixelFormat, reduced: bool, index: int
) -> tuple[tuple[int, int], bytes, Pixels]:
    """(height and width, digest, (HASH_SIDE, HASH_SIDE) grey) of an image."""
    content, name = images.content(index), images.describe(index)
    if isinstance(content, str | os.PathLike):
        content = _read_file(Path(content), name)
    with open_image(content, wanted, name=name) as picture:
        width, height = picture.size
        at_least = (HASH_SIDE, HASH_SIDE) if reduced else None
        image = picture.part((0, 0, width, height), at_least)
    stored = bytes(content) if isinstance(content, bytes) else image.tobytes()
    grey = image.convert("L").resize((HASH_SIDE, HASH_SIDE), Image.Resampling.BOX)
    return (height, width), hashlib.sha256(stored).digest()[:16], np.asarray(grey)


def _read_file(path: Path, name: str) -> bytes:
    try:
        if path.is_file():
            return path.read_bytes()
    except OSError as error:
        raise ImageError(name, error.strerror or str(error)) from None
    read_image(path, name=name)  # raises the error for a folder, a pipe, a dangling link, nothing
    raise AssertionError("a path that is not a file cannot be read")

"""Which pictures show the same: perceptual hashes and small thumbnails, compared in bulk.

A hash alone confuses low-contrast pictures, a thumbnail alone is too slow for all pairs; so the
hash proposes and the thumbnail decides. Found are copies that were scaled, recompressed, slightly
recoloured or converted to grey; not found are crops, mirrored and turned copies.

One pass over all images of a source: size, contents and look of each, for `vitcli check`.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitcli.data.image_set import ImageSet, Integers, Pixels
from vitcli.data.prefetch import map_in_order
from vitcli.data.source import Source
from vitcli.decode import ImageError, ImageInput, read_image
from vitcli.progress import Quiet, Watcher

Hashes = NDArray[np.uint64]

SIDE = 32  # of the grey picture that is hashed
THUMB = 16  # of the thumbnail that is kept
FREQUENCIES = 8
MOST_BITS = 6  # hashes that differ in more are of different pictures
BANDS = MOST_BITS + 1  # then at least one band of two such hashes is equal
LEAST_CORRELATION = 0.99
MOST_LEVEL = 40.0  # grey levels between the means
FLAT = 2.0  # a standard deviation below this is a picture of nothing
BLOCK = 2048


def _cosines() -> NDArray[np.float32]:
    """(FREQUENCIES, SIDE) the low rows of the type-II discrete cosine transform."""
    place = np.arange(SIDE) + 0.5
    return np.cos(np.pi / SIDE * np.outer(np.arange(FREQUENCIES), place)).astype(np.float32)


COSINES = _cosines()
WEIGHTS = (np.uint64(1) << np.arange(FREQUENCIES**2, dtype=np.uint64)).astype(np.uint64)


def perceptual_hash(grey: Pixels) -> int:
    """(SIDE, SIDE) grey -> 64 bits: which low frequencies lie above the median of all (pHash).

    The bit of the mean brightness is 0, so that brighter copies hash alike.
    """
    found = (COSINES @ grey.astype(np.float32) @ COSINES.T).ravel()  # (64,)
    bits = found > np.median(found[1:])
    bits[0] = False
    return int(WEIGHTS[bits].sum(dtype=np.uint64))


def thumbnail(grey: Pixels) -> Pixels:
    """(SIDE, SIDE) -> (THUMB, THUMB): means of 2x2."""
    step = SIDE // THUMB
    means = grey.reshape(THUMB, step, THUMB, step).mean(axis=(1, 3))
    return np.rint(means).astype(np.uint8)


def same_pictures(hashes: Hashes, thumbs: Pixels) -> Integers:
    """The groups of pictures that show the same.

    Args:
        hashes: (n,) of `perceptual_hash`.
        thumbs: (n, THUMB, THUMB).

    Returns:
        (n,) a number for each group; a picture without a copy has one of its own.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n = len(hashes)
    if n == 0:
        return np.zeros(0, dtype=np.int64)
    # Equal hashes are compared with the first of them only: a thousand copies are not a million
    # pairs.
    distinct, first, which = np.unique(hashes, return_index=True, return_inverse=True)
    repeated = np.flatnonzero(first[which] != np.arange(n))
    pairs = [np.stack([first[which[repeated]], repeated], axis=1)]
    pairs += [first[found] for found in _near(distinct)]
    candidates = np.concatenate(pairs)  # (m, 2)
    chosen = candidates[_look_alike(thumbs, candidates)]
    ones = np.ones(len(chosen), dtype=np.int8)
    graph = coo_array((ones, (chosen[:, 0], chosen[:, 1])), shape=(n, n))
    groups: Integers = connected_components(graph, directed=False)[1].astype(np.int64)
    return groups


def _near(hashes: Hashes) -> Iterator[Integers]:
    """Pairs (m, 2) of different hashes at most MOST_BITS apart; a pair may come more than once.

    Of BANDS parts of a hash one is equal in such a pair, so only pairs within a part's value are
    looked at (multi-index hashing, Norouzi et al. 2012).
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
        i, j = np.nonzero(np.triu(apart <= MOST_BITS, k=1))
        if len(i):
            yield np.stack([rows[i], columns[j]], axis=1)


def _look_alike(thumbs: Pixels, pairs: Integers) -> NDArray[np.bool_]:
    """(m,) whether the thumbnails of each pair are the same up to small changes."""
    result = np.empty(len(pairs), dtype=bool)
    for start in range(0, len(pairs), 65536):
        part = pairs[start : start + 65536]
        a, b = (thumbs[part[:, side]].reshape(len(part), -1).astype(np.float32) for side in (0, 1))
        level = np.abs(a.mean(axis=1) - b.mean(axis=1))
        spread = np.stack([a.std(axis=1), b.std(axis=1)])
        a -= a.mean(axis=1, keepdims=True)
        b -= b.mean(axis=1, keepdims=True)
        covariance = (a * b).mean(axis=1)
        correlation = covariance / np.maximum(spread.prod(axis=0), 1e-6)
        flat = (spread < FLAT).all(axis=0)
        alike = np.where(flat, level < FLAT, correlation >= LEAST_CORRELATION)
        result[start : start + 65536] = alike & (level <= MOST_LEVEL)
    return result


@dataclass(frozen=True)
class Survey:
    """What was found, a row for each readable image; rows follow the splits in order.

    Attributes:
        splits: names of the splits, in the order of `split`.
        split: (n,) which split the image is of.
        index: (n,) its number there.
        label: (n,) its class.
        size: (n, 2) height and width in pixels, upright.
        digest: (n,) of the stored bytes; equal bytes, equal digests.
        look: (n,) perceptual hashes.
        thumbs: (n, THUMB, THUMB) grey.
        unreadable: (description, reason) of the rest.
    """

    splits: tuple[str, ...]
    split: Integers
    index: Integers
    label: Integers
    size: Integers
    digest: Any
    look: Hashes
    thumbs: Pixels
    unreadable: tuple[tuple[str, str], ...]

    def __len__(self) -> int:
        return len(self.split)


def survey(source: Source, *, workers: int | None = None, watch: Watcher | None = None) -> Survey:
    """Read every image of every split once.

    Args:
        source: the data.
        workers: threads; None takes one a core.
        watch: told the progress.
    """
    watch = watch or Quiet()
    total = sum(len(images) for images in source.splits.values())
    columns = Columns(total)
    workers = workers or os.cpu_count() or 1
    with watch.progress("images", total) as bar:
        for number, images in enumerate(source.splits.values()):
            looks = map_in_order(partial(look_at, images), range(len(images)), workers)
            for index, seen in enumerate(looks):
                columns.add(number, index, images, seen)
                bar.advance()
    return columns.survey(tuple(source.splits))


Seen = tuple[tuple[int, int], bytes, int, Pixels]


class Columns:
    """The survey while it grows; `n` is the most there can be."""

    def __init__(self, n: int) -> None:
        self.rows = 0
        self.where = np.empty((n, 3), dtype=np.int64)  # split, index, label
        self.size = np.empty((n, 2), dtype=np.int64)
        self.digest = np.empty(n, dtype="S16")
        self.look = np.empty(n, dtype=np.uint64)
        self.thumbs = np.empty((n, THUMB, THUMB), dtype=np.uint8)
        self.unreadable: list[tuple[str, str]] = []

    def add(self, split: int, index: int, images: ImageSet, seen: Seen | ImageError) -> None:
        """The next image, or why it is none."""
        if isinstance(seen, ImageError):
            self.unreadable.append((images.describe(index), seen.reason))
            return
        row = self.rows
        self.where[row] = split, index, images.labels[index]
        self.size[row], self.digest[row], self.look[row], self.thumbs[row] = seen
        self.rows += 1

    def survey(self, splits: tuple[str, ...]) -> Survey:
        """What was added."""
        n = self.rows
        split, index, label = self.where[:n].T
        return Survey(
            splits, split, index, label, self.size[:n], self.digest[:n], self.look[:n],
            self.thumbs[:n], tuple(self.unreadable),
        )  # fmt: skip


def look_at(images: ImageSet, index: int) -> Seen | ImageError:
    """(height and width, digest, perceptual hash, thumbnail) of one image, or the error."""
    try:
        content = images.content(index)
        name = images.describe(index)
        if isinstance(content, str | os.PathLike):
            with_bytes: ImageInput = _bytes_of(Path(content), name)
        else:
            with_bytes = content
        image = read_image(with_bytes, name=name)
        digest = hashlib.sha256(_stored(with_bytes, image)).digest()[:16]
        small = image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
        grey = np.asarray(small)
        return (image.height, image.width), digest, perceptual_hash(grey), thumbnail(grey)
    except ImageError as error:
        return error


def _bytes_of(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes() if path.is_file() else _no_file(path, name)
    except OSError as error:
        raise ImageError(name, error.strerror or str(error)) from None


def _no_file(path: Path, name: str) -> bytes:
    """The error that reading the path gives: a folder, a pipe, a dangling link, nothing."""
    read_image(path, name=name)
    raise AssertionError("what is not a file cannot be read")


def _stored(content: ImageInput, image: Image.Image) -> bytes:
    return bytes(content) if isinstance(content, bytes) else image.tobytes()

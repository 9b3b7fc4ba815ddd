"""`ImageSet`: the labelled images of one split, decoded on demand from a store.

An `ImageStore` holds the images: files, arrays, tar members, parquet cells or decoded pixels.
"""

import os
import threading
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitcli.decode import Box, ImageError, ImageInput, LazyImage, open_image, read_image
from vitcli.errors import printable
from vitcli.pixels import Mode, PixelFormat, Window, as_format

Integers = NDArray[np.int64]
Numbers = NDArray[np.float64]
Pixels = NDArray[np.uint8]


class BytesList:
    """A compact immutable list of byte strings: 8 bytes of overhead each, a list needs about 60."""

    def __init__(self, parts: Iterable[bytes]) -> None:
        joined = bytearray()
        ends = array("q", [0])
        for part in parts:
            joined += part
            ends.append(len(joined))
        self._joined = bytes(joined)
        self._ends = np.frombuffer(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, row: int) -> bytes:
        start, end = self._ends[row : row + 2]
        return self._joined[start:end]


class ArrayPicture:
    """Decoded pixels with the interface of `LazyImage`; a part is a slice of the array.

    Args:
        array: (Y, X) or (Y, X, 3) uint8, upright; never written to.
        name: for error messages.

    Attributes:
        size: (width, height).
    """

    def __init__(self, array: NDArray[np.uint8], name: str) -> None:
        self.array = array
        self.name = name
        self.mode: Mode = "L" if array.ndim == 2 else "RGB"
        self.size = (array.shape[1], array.shape[0])

    def whole(self) -> Image.Image:
        """A copy of the picture."""
        return Image.fromarray(self.array)

    def part(self, box: Box, at_least: tuple[int, int] | None = None) -> Image.Image:
        """A copy of `box` = (left, top, right, bottom), at full size whatever `at_least` says."""
        return Image.fromarray(self.pixels(box))

    def pixels(self, box: Box, at_least: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        """(Y, X) or (Y, X, 3): a copy of `box`."""
        left, top, right, bottom = box
        return np.array(self.array[top:bottom, left:right])


AnyPicture = LazyImage | ArrayPicture

CACHE_BYTES = 512 * 2**20  # a set whose decoded pixels fit is decoded once and stays in memory
PROBES = 8  # images that are opened to estimate the decoded size of a set


class ImageStore(Protocol):
    """Access to stored images by row."""

    def __len__(self) -> int: ...

    def content(self, row: int) -> ImageInput:
        """The input of `read_image`."""

    def describe(self, row: int) -> str:
        """The name of the image in errors and tables."""


class FileStore:
    """Image files below `root`; paths are bytes, because names need not be UTF-8."""

    def __init__(self, root: Path, paths: Iterable[bytes]) -> None:
        self.root = root
        self.paths = BytesList(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def content(self, row: int) -> Path:
        return self.root / os.fsdecode(self.paths[row])

    def describe(self, row: int) -> str:
        return printable(self.content(row))

    def file_name(self, row: int) -> str:
        return Path(os.fsdecode(self.paths[row])).name

    def content_keys(self, rows: Integers) -> Integers:
        """The sizes of the files; -1 for a file that does not exist."""
        start = os.fsencode(self.root) + b"/"  # `pathlib` would take most of the time
        paths = (self.paths[row] for row in rows)
        full = (path if path.startswith(b"/") else start + path for path in paths)
        return np.fromiter(map(file_size, full), np.int64, len(rows))


def file_size(path: Path | bytes) -> int:
    """Bytes; -1 if the file does not exist."""
    try:
        return os.stat(path).st_size  # noqa: PTH116
    except (OSError, ValueError):
        return -1


class ArrayStore:
    """Images in memory: (n, Y, X) grey or (n, Y, X, C), uint8; or grey uint16, int32, float32."""

    def __init__(self, name: str, images: NDArray[Any]) -> None:
        self.name = name
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def content(self, row: int) -> Image.Image:
        return Image.fromarray(self.images[row])

    def content_keys(self, rows: Integers) -> Integers:
        """Checksums."""
        sums = (zlib.crc32(self.images[row].tobytes()) for row in rows)
        return np.fromiter(sums, np.int64, len(rows))

    def describe(self, row: int) -> str:
        return f"image {row} of {self.name}"


class BatchSource(Protocol):
    """A training set that makes whole batches itself, such as `FormulaSet`."""

    kind: Literal["batches"]
    labels: Integers

    def __len__(self) -> int: ...

    def describe(self, index: int) -> str:
        """The name of the image in errors."""

    def batch(
        self, epochs: Integers, indices: Integers, image_size: tuple[int, int], seed: int
    ) -> tuple[Any, Any]:
        """(B,) epochs, (B,) indices -> (B, C, Y, X) uint8 images, (B,) labels."""


class Stream(Protocol):
    """A training set that is read from its start to its end, of unknown length: `StreamSet`."""

    kind: Literal["stream"]
    shards: tuple[Any, ...]

    def __len__(self) -> int:
        """Raise a VitcliError: the length is unknown."""

    def epoch(self, seed: Sequence[int], rank: int, world_size: int) -> Iterator[Any]:
        """The samples of this process, in an order that `seed` determines."""


class ImageSet:
    """The images and labels of one split; images are read on demand.

    Args:
        name: the split.
        classes: class names.
        labels: (n,) class indices; the first label of a multi-label image, -1 for no label.
        store: the images.
        rows: (n,) the rows of `store`; default: all.
        targets: (n, K) multi-hot targets of multi-label images, else None.
        groups: (n,) numbers; images with the same number stay in one split; -1: in no group.
        values: (n,) numbers to predict (regression), else None. The one class is their name.
    """

    kind: Literal["images"] = "images"

    def __init__(
        self,
        name: str,
        classes: Sequence[str],
        labels: Integers,
        store: ImageStore,
        rows: Integers | None = None,
        targets: Pixels | None = None,
        groups: Integers | None = None,
        values: Numbers | None = None,
    ) -> None:
        self.name = name
        self.classes = tuple(classes)
        self.labels = np.asarray(labels, dtype=np.int64)
        self.targets = targets
        self.groups = groups
        self.values = values
        self._store = store
        self._rows = np.arange(len(self.labels)) if rows is None else rows
        self._cache: list[Pixels | None] | None = None
        self._cached: PixelFormat | None = None  # set by the first read, which decides on the cache
        self._lock = threading.Lock()
        assert len(self._rows) == len(self.labels)
        assert targets is None or targets.shape == (len(self.labels), len(self.classes))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def rows(self) -> Integers:
        """(n,) the row of each image in its store."""
        return self._rows

    @property
    def is_decoded(self) -> bool:
        """True if the store holds decoded pixels, so that a cache in memory gains nothing."""
        return bool(getattr(self._store, "is_decoded", False))

    @property
    def stored_window(self) -> Window | None:
        """The window that decoded pixels were made with; None for other stores."""
        return getattr(self._store, "window", None)

    @property
    def decodes_each_epoch(self) -> bool:
        """True if every epoch decodes the images again; known after the first read."""
        in_memory = self.is_cached or isinstance(self._store, ArrayStore)
        return not in_memory and not self.is_decoded

    @property
    def is_cached(self) -> bool:
        """True if decoded images stay in memory; known after the first read."""
        return self._cache is not None

    def read(self, index: int, mode: Mode | PixelFormat = "RGB") -> Image.Image:
        """A copy of the image, upright, in `mode`; see `read_image`. Thread-safe.

        Raises:
            ImageError: the image cannot be read.
        """
        wanted = as_format(mode)
        cache = self._cache_for(wanted)
        if cache is None:
            return self._decode(index, wanted)
        return Image.fromarray(self._cached_pixels(index, wanted, cache))

    @contextmanager
    def open(self, index: int, mode: Mode | PixelFormat = "RGB") -> Iterator[AnyPicture]:
        """The image as a picture that decodes only the part and the scale that are needed.

        Raises:
            ImageError: the image cannot be read, now or when the picture is decoded.
        """
        wanted = as_format(mode)
        cache = self._cache_for(wanted)
        row = int(self._rows[index])
        if cache is not None:
            yield ArrayPicture(self._cached_pixels(index, wanted, cache), self.describe(index))
        elif wanted.mode == "RGB" and self.is_decoded:
            pixels: Any = self._store
            yield ArrayPicture(pixels.pixels(row), self._store.describe(row))
        else:
            content, name = self._store.content(row), self._store.describe(row)
            with open_image(content, wanted, name=name) as picture:
                yield picture

    def content(self, index: int) -> ImageInput:
        """The image as it is stored: a path, bytes or a picture."""
        return self._store.content(int(self._rows[index]))

    def describe(self, index: int) -> str:
        """The name of the image in errors and tables: a path, or `row 17 of train.parquet`."""
        return self._store.describe(int(self._rows[index]))

    @property
    def root(self) -> Path | None:
        """The folder of the image files; None if the images are stored in another way."""
        return self._store.root if isinstance(self._store, FileStore) else None

    def path_name(self, index: int) -> bytes:
        """The path of the image file below `root`; the row of an image that has no own file."""
        row = int(self._rows[index])
        return self._store.paths[row] if isinstance(self._store, FileStore) else b"row %d" % row

    def file_name(self, index: int) -> str | None:
        """The name of the image's file, or of the file it was made from; None if unknown."""
        named = getattr(self._store, "file_name", None)
        return None if named is None else named(int(self._rows[index]))

    def content_keys(self) -> Integers | None:
        """(n,) numbers of which those of equal images are equal; None if the store has none."""
        keys = getattr(self._store, "content_keys", None)
        found: Integers | None = None if keys is None else keys(self._rows)
        return found

    def subset(self, indices: Integers, name: str | None = None) -> "ImageSet":
        """The images at `indices`, in this order, with the same classes."""
        labels, rows = self.labels[indices], self._rows[indices]
        targets = None if self.targets is None else self.targets[indices]
        groups = None if self.groups is None else self.groups[indices]
        values = None if self.values is None else self.values[indices]
        return ImageSet(
            name or self.name, self.classes, labels, self._store, rows, targets, groups, values
        )

    def with_values(self, name: str, values: Numbers) -> "ImageSet":
        """The same images with a number each, called `name`, instead of a class."""
        labels = np.zeros(len(self), dtype=np.int64)
        return ImageSet(
            self.name, (name,), labels, self._store, self._rows, None, self.groups, values
        )

    def relabelled(self, classes: Sequence[str]) -> "ImageSet":
        """The same images with labels that index into `classes`, matched by name.

        Raises:
            KeyError: the class of an image is not in `classes`.
        """
        target = {name: label for label, name in enumerate(classes)}
        new_label = np.full(len(self.classes) + 1, -1)  # the last entry maps -1, no label, to -1
        present = np.flatnonzero(self.class_counts())
        new_label[present] = [target[self.classes[label]] for label in present]
        targets = None
        if self.targets is not None:
            targets = np.zeros((len(self), len(classes)), dtype=np.uint8)
            targets[:, new_label[present]] = self.targets[:, present]
        labels = new_label[self.labels]
        return ImageSet(
            self.name, classes, labels, self._store, self._rows, targets, self.groups, self.values
        )

    def class_counts(self) -> Integers:
        """(K,) images per class."""
        if self.targets is not None:
            return self.targets.sum(axis=0, dtype=np.int64)
        return np.bincount(self.labels, minlength=len(self.classes)).astype(np.int64)

    def label_name(self, index: int) -> str:
        """The class or the number of an image as text; several classes are joined by `; `."""
        if self.values is not None:
            return f"{self.values[index]:.12g}"
        if self.targets is None:
            return self.classes[int(self.labels[index])]
        names = [self.classes[label] for label in np.flatnonzero(self.targets[index])]
        return "; ".join(names) or "(none)"

    def _decode(self, index: int, wanted: PixelFormat) -> Image.Image:
        row = int(self._rows[index])
        return read_image(self._store.content(row), wanted, name=self._store.describe(row))

    def _cache_for(self, wanted: PixelFormat) -> list[Pixels | None] | None:
        """The cache of decoded pixels, with None for images not read yet; None without a cache."""
        return self._cache if self._cached == wanted else self._choose_cache(wanted)

    def _cached_pixels(self, index: int, wanted: PixelFormat, cache: list[Pixels | None]) -> Pixels:
        pixels = cache[index]
        if pixels is None:
            pixels = np.asarray(self._decode(index, wanted))
            cache[index] = pixels
        return pixels

    def _choose_cache(self, wanted: PixelFormat) -> list[Pixels | None] | None:
        """Decide at the first read if decoded pixels stay in memory; they have one format."""
        with self._lock:
            if self._cached is None:
                if not self.is_decoded and self._estimate_bytes(wanted) <= CACHE_BYTES:
                    self._cache = [None] * len(self)
                self._cached = wanted  # set last, because `_cache_for` reads it without the lock
            return self._cache if self._cached == wanted else None

    def _estimate_bytes(self, wanted: PixelFormat) -> float:
        """The decoded size of all images in bytes, estimated from a few of them."""
        sizes = []
        for index in np.linspace(0, len(self) - 1, min(PROBES, len(self))).astype(int):
            row = int(self._rows[index])
            try:
                with open_image(self._store.content(row), wanted) as picture:
                    sizes.append(picture.size[0] * picture.size[1] * len(wanted.mode))
            except ImageError:
                continue
        return float(np.mean(sizes)) * len(self) if sizes else 0.0

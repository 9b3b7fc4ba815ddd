"""A long list of short byte strings in two pieces of memory.

Pictures whose pixels lie decoded in memory or in a mapped file: a part of one is a slice.

What every source of images becomes: sets of readable images with labels, one for each split.
"""

import os
import threading
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitcli.decode import Box, ImageError, ImageInput, LazyImage, Mode, open_image, read_image
from vitcli.errors import VitcliError, printable
from vitcli.progress import Quiet, Watcher


class Packed:
    """What was given, by position, at its own length and 8 bytes each; a list takes 60 more."""

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
    """Decoded pixels, to take a part of: what `LazyImage` is for a file.

    Args:
        array: (Y, X) or (Y, X, 3) uint8, upright; it is only read.
        name: what errors call it.

    Attributes:
        size: (width, height).
    """

    def __init__(self, array: NDArray[np.uint8], name: str) -> None:
        self.array = array
        self.name = name
        self.mode: Mode = "L" if array.ndim == 2 else "RGB"
        self.size = (array.shape[1], array.shape[0])

    def whole(self) -> Image.Image:
        """The picture, as its own copy."""
        return Image.fromarray(self.array)

    def part(self, box: Box, at_least: tuple[int, int] | None = None) -> Image.Image:
        """What is in `box` = (left, top, right, bottom); there is one scale only."""
        return Image.fromarray(self.pixels(box))

    def pixels(self, box: Box, at_least: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        """(Y, X) or (Y, X, 3): what is in `box`, as its own copy."""
        left, top, right, bottom = box
        return np.array(self.array[top:bottom, left:right])


AnyPicture = LazyImage | ArrayPicture


Integers = NDArray[np.int64]
Pixels = NDArray[np.uint8]

# Sets whose decoded pictures fit in this many bytes are decoded once.
KEEP_BYTES = 512 * 2**20
PROBES = 8


@dataclass(frozen=True)
class Request:
    """What `load_data` was asked for; see there."""

    notation: str
    label_column: str | None = None
    image_column: str | None = None
    test_fraction: float = 0.2
    seed: int = 0
    labelled: bool = True
    multi_label: bool | None = None
    validation_fraction: float | None = None
    folds: int | None = None
    fold: int = 0
    train_split: str | None = None
    test_split: str | None = None
    watch: Watcher = field(default_factory=Quiet, compare=False)

    @property
    def path(self) -> Path:
        return Path(self.notation)

    @property
    def shown(self) -> str:
        """The notation as it can be printed."""
        return printable(self.notation)


class Store(Protocol):
    """Where the images of a set lie."""

    def __len__(self) -> int: ...

    def content(self, row: int) -> ImageInput:
        """What `read_image` reads."""

    def describe(self, row: int) -> str:
        """What errors call it."""


class FileStore:
    """Images in files: paths as bytes, because names need not be UTF-8, relative to `root`."""

    def __init__(self, root: Path, paths: Iterable[bytes]) -> None:
        self.root = root
        self.paths = Packed(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def content(self, row: int) -> Path:
        return self.root / os.fsdecode(self.paths[row])

    def describe(self, row: int) -> str:
        return printable(self.content(row))

    def file_name(self, row: int) -> str:
        return Path(os.fsdecode(self.paths[row])).name


class ArrayStore:
    """Images in memory, as pictures of equal size: (n, Y, X) grey or (n, Y, X, C), uint8."""

    def __init__(self, name: str, images: Pixels) -> None:
        self.name = name
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def content(self, row: int) -> Image.Image:
        return Image.fromarray(self.images[row])

    def describe(self, row: int) -> str:
        return f"image {row} of {self.name}"


class ImageSet:
    """One split: images that are read on demand, and their labels.

    Args:
        name: the split.
        classes: the names of the classes; `labels` points into them.
        labels: (n,) integers; of images with several labels the first, and -1 where there is none.
        store: the images.
        rows: (n,) which rows of `store` these are; all by default.
        targets: (n, K) ones and zeros where an image has any number of labels, else None.
    """

    def __init__(
        self,
        name: str,
        classes: Sequence[str],
        labels: Integers,
        store: Store,
        rows: Integers | None = None,
        targets: Pixels | None = None,
    ) -> None:
        self.name = name
        self.classes = tuple(classes)
        self.labels = np.asarray(labels, dtype=np.int64)
        self.targets = targets
        self._store = store
        self._rows = np.arange(len(self.labels)) if rows is None else rows
        self._kept: list[Pixels | None] | None = None
        self._kept_mode: Mode | None = None
        self._lock = threading.Lock()
        assert len(self._rows) == len(self.labels)
        assert targets is None or targets.shape == (len(self.labels), len(self.classes))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def ready(self) -> bool:
        """Whether the pixels lie decoded in a file, and nothing is gained by keeping copies."""
        return bool(getattr(self._store, "ready", False))

    @property
    def decodes(self) -> bool:
        """Whether every epoch decodes the images again; known after the first read."""
        return not self.keeps and not self.ready and not isinstance(self._store, ArrayStore)

    @property
    def keeps(self) -> bool:
        """Whether decoded images stay in memory; known after the first read."""
        return self._kept is not None

    def read(self, index: int, mode: Mode = "RGB") -> Image.Image:
        """The picture, upright, in `mode`; its own copy. Safe to call from many threads.

        Raises:
            ImageError: it cannot be read.
        """
        kept = self._keeping(mode)
        if kept is None:
            return self._decode(index, mode)
        return Image.fromarray(self._kept_pixels(index, mode, kept))

    @contextmanager
    def open(self, index: int, mode: Mode = "RGB") -> Iterator[AnyPicture]:
        """The picture as something to decode at the scale that is needed, inside a `with`.

        Raises:
            ImageError: it cannot be read; also when it is decoded.
        """
        kept = self._keeping(mode)
        row = int(self._rows[index])
        if kept is not None:
            yield ArrayPicture(self._kept_pixels(index, mode, kept), self.describe(index))
        elif mode == "RGB" and self.ready:
            pixels: Any = self._store
            yield ArrayPicture(pixels.pixels(row), self._store.describe(row))
        else:
            content, name = self._store.content(row), self._store.describe(row)
            with open_image(content, mode, name=name) as picture:
                yield picture

    def content(self, index: int) -> ImageInput:
        """What is stored, before anything is decoded: a path, bytes or a picture."""
        return self._store.content(int(self._rows[index]))

    def describe(self, index: int) -> str:
        """What errors and tables call the image: its path, or `row 17 of train.parquet`."""
        return self._store.describe(int(self._rows[index]))

    def file_name(self, index: int) -> str | None:
        """The name of the file that the image is, or once was; None where nobody has noted it."""
        named = getattr(self._store, "file_name", None)
        return None if named is None else named(int(self._rows[index]))

    def subset(self, indices: Integers, name: str | None = None) -> "ImageSet":
        """Some of the images, in the order given, under the same classes."""
        labels, rows = self.labels[indices], self._rows[indices]
        targets = None if self.targets is None else self.targets[indices]
        return ImageSet(name or self.name, self.classes, labels, self._store, rows, targets)

    def relabelled(self, classes: Sequence[str]) -> "ImageSet":
        """The same images with labels that point, by name, into other classes.

        Raises:
            KeyError: an image has a class that is not among them.
        """
        target = {name: label for label, name in enumerate(classes)}
        place = np.full(len(self.classes) + 1, -1)  # of -1, no label, as well: it is the last
        present = np.flatnonzero(self.class_counts())
        place[present] = [target[self.classes[label]] for label in present]
        targets = None
        if self.targets is not None:
            targets = np.zeros((len(self), len(classes)), dtype=np.uint8)
            targets[:, place[present]] = self.targets[:, present]
        return ImageSet(self.name, classes, place[self.labels], self._store, self._rows, targets)

    def class_counts(self) -> Integers:
        """(K,) how many images have each class."""
        if self.targets is not None:
            return self.targets.sum(axis=0, dtype=np.int64)
        return np.bincount(self.labels, minlength=len(self.classes)).astype(np.int64)

    def label_name(self, index: int) -> str:
        """The class of an image, or its classes, as text."""
        if self.targets is None:
            return self.classes[int(self.labels[index])]
        names = [self.classes[label] for label in np.flatnonzero(self.targets[index])]
        return "; ".join(names) or "(none)"

    def _decode(self, index: int, mode: Mode) -> Image.Image:
        row = int(self._rows[index])
        return read_image(self._store.content(row), mode, name=self._store.describe(row))

    def _keeping(self, mode: Mode) -> list[Pixels | None] | None:
        """The decoded pixels of every image, as far as they were read; None if none are kept."""
        return self._kept if self._kept_mode == mode else self._start_keeping(mode)

    def _kept_pixels(self, index: int, mode: Mode, kept: list[Pixels | None]) -> Pixels:
        pixels = kept[index]
        if pixels is None:
            pixels = np.asarray(self._decode(index, mode))
            kept[index] = pixels
        return pixels

    def _start_keeping(self, mode: Mode) -> list[Pixels | None] | None:
        """Decide, at the first read, whether decoded pixels stay in memory."""
        with self._lock:
            if self._kept_mode is None:
                if not self.ready and self._estimate_bytes(mode) <= KEEP_BYTES:
                    self._kept = [None] * len(self)
                self._kept_mode = mode  # last: `read` looks at it without the lock
            return self._kept if self._kept_mode == mode else None

    def _estimate_bytes(self, mode: Mode) -> float:
        """What all pictures decoded would take in bytes, from a few spread over the set."""
        sizes = []
        for index in np.linspace(0, len(self) - 1, min(PROBES, len(self))).astype(int):
            row = int(self._rows[index])
            try:
                with open_image(self._store.content(row), mode) as picture:
                    sizes.append(picture.size[0] * picture.size[1] * len(mode))
            except ImageError:
                continue
        return float(np.mean(sizes)) * len(self) if sizes else 0.0


@dataclass(frozen=True)
class Source:
    """What a DATA notation stands for.

    Args:
        notation: as the user wrote it.
        splits: "train", "validation", "test", as far as there are.
        classes: the names that the labels of every split point into.
        fingerprint: changes with names, sizes, labels and the split, not with the place.
        notes: a line each: what was split, left out or assumed.
        splitting: what was split and how, plain values for a run's record.
    """

    notation: str
    splits: Mapping[str, ImageSet]
    classes: tuple[str, ...]
    fingerprint: str
    notes: tuple[str, ...] = ()
    splitting: Mapping[str, Any] = field(default_factory=dict)

    @property
    def multi_label(self) -> bool:
        """Whether an image has any number of labels."""
        return any(images.targets is not None for images in self.splits.values())

    def split(self, *names: str) -> ImageSet:
        """The first of these splits that there is.

        Raises:
            VitcliError: there is none.
        """
        for name in names:
            if name in self.splits:
                return self.splits[name]
        raise VitcliError(
            f"`{self.notation}` has no {' or '.join(f'`{name}`' for name in names)} images",
            f"there are only {', '.join(f'`{name}`' for name in self.splits)} images",
        )

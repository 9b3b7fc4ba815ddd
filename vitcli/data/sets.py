"""What every source of images becomes: sets of readable images with labels, one for each split."""

import hashlib
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitcli.data.decode import ImageError, ImageInput, Mode, printable, read_image
from vitcli.errors import VitcliError

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

    def __init__(self, root: Path, paths: Sequence[bytes]) -> None:
        self.root = root
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def content(self, row: int) -> Path:
        return self.root / os.fsdecode(self.paths[row])

    def describe(self, row: int) -> str:
        return printable(self.content(row))


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
        labels: (n,) integers.
        store: the images.
        rows: (n,) which rows of `store` these are; all by default.
    """

    def __init__(
        self,
        name: str,
        classes: Sequence[str],
        labels: Integers,
        store: Store,
        rows: Integers | None = None,
    ) -> None:
        self.name = name
        self.classes = tuple(classes)
        self.labels = np.asarray(labels, dtype=np.int64)
        self._store = store
        self._rows = np.arange(len(self.labels)) if rows is None else rows
        self._kept: list[Pixels | None] | None = None
        self._kept_mode: Mode | None = None
        self._lock = threading.Lock()
        assert len(self._rows) == len(self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int, mode: Mode = "RGB") -> Image.Image:
        """The picture, upright, in `mode`; its own copy. Safe to call from many threads.

        Raises:
            ImageError: it cannot be read.
        """
        kept = self._kept if self._kept_mode == mode else self._start_keeping(mode)
        if kept is None:
            return self._decode(index, mode)
        pixels = kept[index]
        if pixels is None:
            pixels = np.asarray(self._decode(index, mode))
            kept[index] = pixels
        return Image.fromarray(pixels)

    def describe(self, index: int) -> str:
        """What errors and tables call the image: its path, or `row 17 of train.parquet`."""
        return self._store.describe(int(self._rows[index]))

    def subset(self, indices: Integers, name: str | None = None) -> "ImageSet":
        """Some of the images, in the order given, under the same classes."""
        labels, rows = self.labels[indices], self._rows[indices]
        return ImageSet(name or self.name, self.classes, labels, self._store, rows)

    def relabelled(self, classes: Sequence[str]) -> "ImageSet":
        """The same images with labels that point, by name, into other classes.

        Raises:
            KeyError: an image has a class that is not among them.
        """
        target = {name: label for label, name in enumerate(classes)}
        present = {int(label): target[self.classes[label]] for label in np.unique(self.labels)}
        labels = np.array([present[int(label)] for label in self.labels], dtype=np.int64)
        return ImageSet(self.name, classes, labels, self._store, self._rows)

    def _decode(self, index: int, mode: Mode) -> Image.Image:
        row = int(self._rows[index])
        return read_image(self._store.content(row), mode, name=self._store.describe(row))

    def _start_keeping(self, mode: Mode) -> list[Pixels | None] | None:
        """Decide, at the first read, whether decoded pixels stay in memory."""
        with self._lock:
            if self._kept_mode is None:
                if self._estimate_bytes(mode) <= KEEP_BYTES:
                    self._kept = [None] * len(self)
                self._kept_mode = mode  # last: `read` looks at it without the lock
            return self._kept if self._kept_mode == mode else None

    def _estimate_bytes(self, mode: Mode) -> float:
        """What all pictures decoded would take, from a few spread over the set."""
        sizes = []
        for index in np.linspace(0, len(self) - 1, min(PROBES, len(self))).astype(int):
            try:
                image = self._decode(int(index), mode)
            except ImageError:
                continue
            sizes.append(image.width * image.height * len(image.getbands()))
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
    """

    notation: str
    splits: Mapping[str, ImageSet]
    classes: tuple[str, ...]
    fingerprint: str
    notes: tuple[str, ...] = ()

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


def fingerprint(parts: Iterable[bytes]) -> str:
    """A short hash of the parts and of where one ends."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:16]


def stratified_split(labels: Integers, fraction: float, seed: int) -> tuple[Integers, Integers]:
    """(indices to keep, indices set aside): `fraction` of each class, at least one on each side.

    A class of a single image stays on the first side.
    """
    aside = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            continue
        count = min(max(round(len(members) * fraction), 1), len(members) - 1)
        rng = np.random.default_rng((seed, int(label)))
        aside.append(rng.permutation(members)[:count])
    chosen = np.sort(np.concatenate(aside)) if aside else np.array([], dtype=np.int64)
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def make_source(
    request: Request, splits: Mapping[str, ImageSet], parts: Iterable[bytes], notes: Sequence[str]
) -> Source:
    """Align classes by name, split where only training images are given, and check.

    Args:
        request: what the user asked for.
        splits: split name -> images; empty ones are dropped.
        parts: what tells this data from other, for the fingerprint; labels are added here.
        notes: what the user should know.

    Raises:
        VitcliError: no images; one class only; a class that training has not.
    """
    notation, fraction, seed = request.shown, request.test_fraction, request.seed
    notes = list(notes)
    splits = {name: images for name, images in splits.items() if len(images)}
    if not splits:
        raise VitcliError(f"`{notation}` has no images", "give data with at least two classes")
    base = splits.get("train") or next(iter(splits.values()))
    aligned = _align(notation, base, splits)
    if request.labelled and len(np.unique(base.labels)) < 2:
        only = base.classes[int(base.labels[0])]
        raise VitcliError(
            f"`{notation}` has only one class: `{only}`",
            "a classifier needs at least two; put each class into a folder of its own",
        )
    if set(aligned) == {"train"} and fraction > 0:
        keep, aside = stratified_split(base.labels, fraction, seed)
        aligned = {"train": base.subset(keep)}
        if len(aside):
            aligned["test"] = base.subset(aside, "test")
        notes.append(
            f"{notation}: no test images given, so {len(aside):,} of {len(base):,} are set aside "
            f"({fraction:.0%} of each class, seed {seed})"
        )
    hashed = [*parts, *(name.encode() + s.labels.tobytes() for name, s in aligned.items())]
    hashed += [s._rows.tobytes() for s in aligned.values()]
    return Source(notation, aligned, base.classes, fingerprint(hashed), tuple(notes))


def _align(notation: str, base: ImageSet, splits: Mapping[str, ImageSet]) -> dict[str, ImageSet]:
    """All splits over the classes of `base`."""
    aligned = {}
    for name, images in splits.items():
        present = [images.classes[int(label)] for label in np.unique(images.labels)]
        extra = [label for label in present if label not in base.classes]
        if extra:
            raise VitcliError(
                f"`{notation}`: class `{extra[0]}` is in `{name}` but not in `{base.name}`"
                + (f", and so are {len(extra) - 1} others" if len(extra) > 1 else ""),
                f"give it training images, or take it out of `{name}`",
            )
        aligned[name] = (
            images if images.classes == base.classes else images.relabelled(base.classes)
        )
    return aligned


def label_names(values: Sequence[Any]) -> tuple[tuple[str, ...], Integers]:
    """Labels of any kind -> (sorted class names, (n,) labels); whole numbers sort as numbers."""
    names = [str(value) for value in values]
    unique = sorted(set(names))
    if all(name.isdecimal() and str(int(name)) == name for name in unique):
        unique.sort(key=int)
    position = {name: label for label, name in enumerate(unique)}
    return tuple(unique), np.array([position[name] for name in names], dtype=np.int64)

"""One pass over all images of a source: size, contents and look of each, for `vitcli check`."""

import hashlib
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitcli.data.ahead import in_order
from vitcli.data.duplicates import SIDE, THUMB, Hashes, perceptual_hash, thumbnail
from vitcli.data.sets import ImageSet, Integers, Pixels, Source
from vitcli.decode import ImageError, ImageInput, read_image
from vitcli.progress import Quiet, Watcher


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
            looks = in_order(partial(look_at, images), range(len(images)), workers)
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

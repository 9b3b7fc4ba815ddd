"""Facts about a dataset that decide the default settings of a training run.

They come from the headers of a sample of the images, so they cost less than a second.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from vitcli.data.image_set import ImageSet
from vitcli.data.prefetch import default_workers, map_in_order
from vitcli.data.source import Source
from vitcli.data.streaming import StreamSet
from vitcli.decode import ImageError, ImageInput, open_image

MAX_HEADERS = 200  # images whose header is read
STREAM_HEADERS = 32  # of a stream, which is downloaded up to the last of them
SIDES = {"left", "right", "links", "rechts"}  # words of classes that a mirror image exchanges


@dataclass(frozen=True)
class DataFacts:
    """Facts about the training images.

    Attributes:
        images: their number; None for a stream.
        size: median height and width in px; None if no image can be read.
        classes: number of classes, or 1 for a regression.
        multi_label, numeric: see `Source`.
        may_flip: False if the class names say that a mirror image has another class.
        has_validation: True if there are validation images.
    """

    images: int | None
    size: tuple[int, int] | None
    classes: int
    multi_label: bool = False
    numeric: bool = False
    may_flip: bool = True
    has_validation: bool = False


def measure_data(source: Source) -> DataFacts:
    """The facts about the training images of `source`."""
    train: Any = source.splits["train"]
    sizes = _stream_sizes(train) if train.kind == "stream" else _sizes(train)
    height, width = np.median(np.array(sizes), axis=0).round().astype(int) if sizes else (0, 0)
    return DataFacts(
        images=None if train.kind == "stream" else len(train),
        size=(int(height), int(width)) if sizes else None,
        classes=len(source.classes),
        multi_label=source.multi_label,
        numeric=source.numeric,
        may_flip=may_flip(source.classes),
        has_validation="validation" in source.splits,
    )


def may_flip(classes: Iterable[str]) -> bool:
    """False for classes of characters, and for classes that differ by left and right.

    A mirrored digit or letter is another sign or none. One such class in two is enough: a flip that
    is missing costs little, and a wrong one teaches wrong labels.
    """
    names = [name.strip().casefold() for name in classes]
    signs = [name for name in names if len(name) == 1 or name.isdecimal()]
    sided = any(SIDES & set(re.split(r"[\W_]+", name)) for name in names)
    return not sided and 2 * len(signs) < max(1, len(names))


def _sizes(images: ImageSet) -> list[tuple[int, int]]:
    """(height, width) of a sample of the images."""
    indices = np.unique(np.linspace(0, len(images) - 1, min(MAX_HEADERS, len(images))).astype(int))
    found = map_in_order(partial(_size_of, images), indices.tolist(), default_workers() or 1)
    return [size for size in found if size is not None]


def _size_of(images: ImageSet, index: int) -> tuple[int, int] | None:
    try:
        return _header_size(images.content(index), images.describe(index))
    except ImageError:  # it is reported where it is decoded
        return None


def _stream_sizes(stream: StreamSet) -> list[tuple[int, int]]:
    found = []
    for sample in islice(stream.read(stream.shards[0]), STREAM_HEADERS):
        try:
            found.append(_header_size(sample.content, sample.name))
        except ImageError:
            continue
    return found


def _header_size(content: ImageInput, name: str) -> tuple[int, int]:
    with open_image(content, name=name) as picture:
        width, height = picture.size
    return height, width

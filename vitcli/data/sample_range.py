"""The samples of 16-bit, 32-bit and float images of a dataset, and the window for them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitcli.data.image_set import ImageSet
from vitcli.decode import ImageError, ImageInput, read_wide_samples
from vitcli.pixels import Window, choose_window
from vitcli.preprocess import Preprocess
from vitcli.progress import Watcher

MAX_IMAGES = 64  # images that are looked at, spread over the set
MAX_SAMPLES = 1 << 16  # samples of each image that are kept for percentiles
SMALL_FRACTION = 0.1  # of the range of the file: below, an image without a window looks black


@dataclass(frozen=True)
class SampleRange:
    """The wide samples of a set.

    Attributes:
        bits: bits of a sample in the file.
        low, high: the smallest and the largest finite sample that was seen.
        window: the window that suits them.
        num_images: images with wide samples among those that were looked at.
    """

    bits: int
    low: float
    high: float
    window: Window
    num_images: int

    @property
    def is_dark(self) -> bool:
        """True if the samples use less than a tenth of a file's 16 bits."""
        return self.bits == 16 and self.high < SMALL_FRACTION * 65535

    def describe(self) -> str:
        """`16-bit samples from 0 to 4095`."""
        return f"{self.bits}-bit samples from {self.low:g} to {self.high:g}"


def measure_samples(images: ImageSet) -> SampleRange | None:
    """Look at up to MAX_IMAGES images of a set or a stream; None if all have 8 bits."""
    found: list[NDArray[Any]] = []
    bits, low, high = 0, np.inf, -np.inf
    for content, name in _some(images):
        try:
            samples = read_wide_samples(content, name)
        except ImageError:  # the reader of the image reports it
            continue
        if samples is None:
            continue
        finite = samples[np.isfinite(samples)]
        if not finite.size:
            continue
        bits = max(bits, 8 * samples.dtype.itemsize)
        ends = np.array([finite.min(), finite.max()])
        low, high = min(low, float(ends[0])), max(high, float(ends[1]))
        found += [finite[:: max(1, finite.size // MAX_SAMPLES)], ends]
    if not found:
        return None
    return SampleRange(bits, low, high, choose_window(found), len(found) // 2)


def _some(images: Any) -> Iterator[tuple[ImageInput, str]]:
    """(content, name) of images spread over the set, or of the first images of a stream."""
    if hasattr(images, "epoch"):
        for sample in islice(images.read(images.shards[0]), MAX_IMAGES):
            yield sample.content, sample.name
    elif hasattr(images, "content") and not images.is_decoded:
        for index in np.linspace(0, len(images) - 1, min(MAX_IMAGES, len(images))).astype(int):
            yield images.content(int(index)), images.describe(int(index))


def with_window(preprocess: Preprocess, images: ImageSet, watch: Watcher) -> Preprocess:
    """`preprocess` with a window, if it has none and images of the training set need one.

    A note says which window was chosen, and how to set another.
    """
    if preprocess.window is not None:
        return preprocess
    if (stored := getattr(images, "stored_window", None)) is not None:
        return replace(preprocess, window=stored)  # for the original files in `predict`
    found = measure_samples(images)
    if found is None:
        return preprocess
    low, high = found.window
    watch.note(
        f"{found.describe()} in {found.num_images} images of {images.name}: {low:g} becomes black "
        f"and {high:g} white (change with `--set preprocess.window=[LOW,HIGH]`)"
    )
    return replace(preprocess, window=found.window)

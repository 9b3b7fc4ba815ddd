"""The training transform: random crop and flip, then the policies of the recipe.

The same (seed, epoch, index, view) gives the same pixels, in every process and thread. The result
is uint8; normalisation and mixing run on the device for the whole batch.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from math import exp, log, sqrt

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vitcli.config.schema import AugmentSection
from vitcli.data.augment.policies import (
    DEFAULTS,
    POLICIES,
    PRESETS,
    AugmentSettings,
    Pixels,
    Rng,
    change_colours,
    changes_colours,
    erase_rectangle,
)
from vitcli.data.image_set import AnyPicture, ArrayPicture
from vitcli.decode import Box, ImageInput, open_image
from vitcli.errors import VitcliError, unknown
from vitcli.preprocess import RESAMPLING, Preprocess, as_array

# The crop of Inception (Szegedy et al. 2014), which the ViT paper trains with: width / height.
MIN_RATIO, MAX_RATIO = 3 / 4, 4 / 3
CROP_ATTEMPTS = 10
TF_MAX_RATIO, TF_ATTEMPTS = 1.33, 100  # defaults of tf.image.sample_distorted_bounding_box
RESIZE_FACTOR = 7 / 6  # 448 px for 384, as the official code resizes before its crop
TORCH_FILTERS = {"bilinear", "bicubic"}  # torch resizes bytes like Pillow with these, and faster


def image_rng(seed: int, epoch: int, index: int, view: int = 0) -> Rng:
    """The generator of one view of one image in one epoch; no worker or process number enters."""
    # numpy pads entropy with zeros, so (seed, epoch, 0, 0) would repeat the stream of (seed,
    # epoch), which shuffles the epoch. `view + 1` keeps the two apart.
    words = (seed, epoch, index, view + 1)
    if max(words) < 2**32:  # the entropy that numpy would build from the tuple, in half the time
        return np.random.default_rng(np.array(words, dtype=np.uint32))
    return np.random.default_rng(words)


def inception_crop(
    image: AnyPicture, rng: Rng, preprocess: Preprocess, settings: AugmentSettings
) -> Pixels:
    """A random box of `min_area`..1 of the area and ratio 3/4..4/3, resized to the model's size.

    It follows torchvision's `RandomResizedCrop`. The box is drawn before anything is decoded, so
    that a large JPEG is decoded at the smallest scale at which the box still has the model's size.
    """
    inner = preprocess.inner_box(image.size)
    box = inception_box(size_of(inner), rng, settings.min_area)
    return resized_crop(image, shifted(box, inner), preprocess)


def tensorflow_crop(
    image: AnyPicture, rng: Rng, preprocess: Preprocess, settings: AugmentSettings
) -> Pixels:
    """The crop of TensorFlow, with which the official code trains; see `tensorflow_box`."""
    inner = preprocess.inner_box(image.size)
    box = tensorflow_box(size_of(inner), rng, settings.min_area)
    return resized_crop(image, shifted(box, inner), preprocess, reduce=False)


def resize_crop(
    image: AnyPicture, rng: Rng, preprocess: Preprocess, settings: AugmentSettings
) -> Pixels:
    """Squash the image to `resize_size`, and cut the model's size from a random place.

    Section 3.3 of BiT (Kolesnikov et al., 2020). It keeps most of the image, unlike an inception
    crop.
    """
    rows, columns = preprocess.image_size
    factor = settings.resize_size / min(rows, columns) if settings.resize_size else RESIZE_FACTOR
    larger = round(rows * factor), round(columns * factor)
    squash = replace(
        preprocess, image_size=larger, resize_mode="squash", resize_size=None, crop_fraction=1.0
    )
    resized = squash.fit(image.whole())
    top, left = (int(rng.integers(a - b + 1)) for a, b in zip(larger, (rows, columns), strict=True))
    return as_array(resized.crop((left, top, left + columns, top + rows)))


def resized_crop(
    image: AnyPicture, box: Box, preprocess: Preprocess, *, reduce: bool = True
) -> Pixels:
    """(C, Y, X): the part of the image in `box`, resized to the model's size.

    Args:
        reduce: decode a large JPEG at a smaller scale. This smooths, which TensorFlow does not.
    """
    rows, columns = preprocess.image_size
    at_least = (columns, rows) if reduce else None
    if preprocess.interpolation not in TORCH_FILTERS:
        part = image.part(box, at_least=at_least)
        return as_array(part.resize((columns, rows), RESAMPLING[preprocess.interpolation]))
    # Within two grey levels of Pillow in a fraction of the time (recipes/RESULTS.md), if torch sees
    # that the channels lie last in memory.
    pixels = torch.from_numpy(image.pixels(box, at_least=at_least))
    pixels = pixels[None, ..., None] if pixels.ndim == 2 else pixels[None]  # (1, Y, X, C)
    resized = F.interpolate(
        pixels.permute(0, 3, 1, 2),
        (rows, columns),
        mode=preprocess.interpolation,
        antialias=preprocess.antialias,
    )
    return resized[0].numpy()  # (C, Y, X)


def size_of(box: Box) -> tuple[int, int]:
    """(width, height) of a box."""
    return box[2] - box[0], box[3] - box[1]


def shifted(box: Box, inner: Box) -> Box:
    """A box in pixels of the part `inner`, in pixels of the whole image."""
    left, top = inner[:2]
    return box[0] + left, box[1] + top, box[2] + left, box[3] + top


def inception_box(size: tuple[int, int], rng: Rng, min_area: float) -> Box:
    """A random crop box for an image of (width, height) `size`."""
    width, height = size
    low, high = log(MIN_RATIO), log(MAX_RATIO)
    for _ in range(CROP_ATTEMPTS):
        area = width * height * (min_area + (1 - min_area) * rng.random())
        ratio = exp(low + (high - low) * rng.random())
        w, h = round(sqrt(area * ratio)), round(sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    # No box fits, for example in a very long image: take the largest central box.
    w = max(1, min(width, round(height * MAX_RATIO)))
    h = max(1, min(height, round(width / MIN_RATIO)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def tensorflow_box(size: tuple[int, int], rng: Rng, min_area: float) -> Box:
    """A random crop box as tf.image.sample_distorted_bounding_box draws it.

    It draws the ratio uniformly, and then the height uniformly among those that fit. So small boxes
    are more frequent than in `inception_box`: of a square image with `min_area` 0.05, the mean area
    is 0.375 instead of 0.464. Source: tensorflow/core/kernels/sample_distorted_bounding_box_op.cc.
    """
    width, height = size
    for _ in range(TF_ATTEMPTS):
        ratio = MIN_RATIO + (TF_MAX_RATIO - MIN_RATIO) * rng.random()
        lowest = round(sqrt(min_area * width * height / ratio))
        highest = min(height, round(sqrt(width * height / ratio)))
        if round(highest * ratio) > width:
            highest = int((width + 0.5) / ratio)
            highest -= round(highest * ratio) > width
        h = lowest + int(rng.integers(highest - lowest + 1)) if lowest < highest else highest
        w = round(h * ratio)
        if w * h < min_area * width * height:  # rounded to a box that is a pixel too small
            h += 1
            w = round(h * ratio)
        if 0 < w <= width and 0 < h <= height and w * h >= min_area * width * height:
            # TensorFlow never draws the last place.
            top = int(rng.integers(height - h)) if h < height else 0
            left = int(rng.integers(width - w)) if w < width else 0
            return left, top, left + w, top + h
    return 0, 0, width, height


def padded_crop(
    image: AnyPicture, rng: Rng, preprocess: Preprocess, settings: AugmentSettings
) -> Pixels:
    """The evaluation image, shifted by up to `crop_padding` px in each direction.

    What comes in at the border is `crop_fill`: black, or the image mirrored at its border.
    """
    if isinstance(image, ArrayPicture) and preprocess.keeps(image.size):
        fitted = image.array  # Pillow would copy it, and takes most of the time of small images
    else:
        fitted = np.asarray(preprocess.fit(image.whole()))
    reach = settings.crop_padding
    left, top = (int(shift) for shift in rng.integers(-reach, reach + 1, size=2))
    rows, columns = fitted.shape[:2]
    if settings.crop_fill == "reflect":
        # Two `take` need a third of the time of one index in both directions.
        moved = fitted.take(mirrored_places(rows, top), axis=0).take(
            mirrored_places(columns, left), axis=1
        )
    else:
        moved = np.zeros_like(fitted)
        moved[max(-top, 0) : rows - max(top, 0), max(-left, 0) : columns - max(left, 0)] = fitted[
            max(top, 0) : rows + min(top, 0), max(left, 0) : columns + min(left, 0)
        ]
    return moved[None] if moved.ndim == 2 else moved.transpose(2, 0, 1)  # (C, Y, X)


@cache
def mirrored_places(length: int, shift: int) -> NDArray[np.int64]:
    """(length,): the places of a shifted line in the line mirrored at both ends, without them."""
    places = np.abs(np.arange(length) + shift)
    return (length - 1) - np.abs((length - 1) - places)


def no_crop(
    image: AnyPicture, rng: Rng, preprocess: Preprocess, settings: AugmentSettings
) -> Pixels:
    """The evaluation image."""
    return as_array(preprocess.fit(image.whole()))


CROPS: dict[str, Callable[[AnyPicture, Rng, Preprocess, AugmentSettings], Pixels]] = {
    "inception": inception_crop,
    "inception_tf": tensorflow_crop,
    "resize": resize_crop,
    "pad": padded_crop,
    "none": no_crop,
}


def resolve_augment(section: AugmentSection) -> AugmentSettings:
    """The section with every open setting filled in: the recipe, then its preset, then defaults.

    Raises:
        VitcliError: the crop, the preset or the policy is unknown.
    """
    preset = section.preset or "none"
    if preset not in PRESETS:
        raise unknown("augment.preset", preset, PRESETS)
    values = {**DEFAULTS, **PRESETS[preset], **section.model_dump(exclude_none=True)}
    for key, known in (("policy", POLICIES), ("crop", CROPS)):
        if values[key] not in known:
            raise unknown(f"augment.{key}", values[key], known)
    for policy in POLICIES.values():
        values = {**policy.defaults, **values}
    return section.model_copy(update=values)


class TrainTransform:
    """An image -> a random view of it, (C, Y, X) uint8.

    Args:
        preprocess: its size, interpolation and channels are used.
        section: the `[augment]` section of the recipe.
    """

    def __init__(self, preprocess: Preprocess, section: AugmentSection) -> None:
        self.preprocess = preprocess
        self.settings = resolve_augment(section)
        self.changes_colours = changes_colours(self.settings)
        side, smallest = self.settings.resize_size, min(preprocess.image_size)
        if self.settings.crop == "resize" and side is not None and side < smallest:
            raise VitcliError(
                f"`augment.resize_size` = {side} is below the image size of {smallest} px",
                f"`--set augment.resize_size={round(RESIZE_FACTOR * smallest)}`, or remove it",
            )
        padding = self.settings.crop_padding
        if self.settings.crop == "pad" and padding >= smallest:
            raise VitcliError(
                f"`augment.crop_padding` = {padding} is not below the image size of {smallest} px, "
                "so that some crops would show nothing of the image",
                f"`--set augment.crop_padding={max(1, smallest // 8)}`, or remove it",
            )

    def __call__(self, image: ImageInput, rng: Rng) -> Tensor:
        """A path, file, bytes or Pillow image -> (C, Y, X) uint8."""
        with open_image(image, self.preprocess.pixel_format) as opened:
            return torch.from_numpy(np.ascontiguousarray(self.view(opened, rng)))

    def view(self, image: AnyPicture, rng: Rng) -> Pixels:
        """(C, Y, X): a random view of an opened image, which may not be decoded yet.

        Raises:
            ImageError: the image is damaged.
        """
        # Each step draws from the same generator, so a step that is switched off must not draw.
        pixels = CROPS[self.settings.crop](image, rng, self.preprocess, self.settings)
        if rng.random() < self.settings.flip_rate:
            # torch reverses the pixels of a batch several times as fast as numpy.
            pixels = torch.from_numpy(pixels)[None].flip(3)[0].numpy()
        if self.changes_colours:
            pixels = as_array(change_colours(as_image(pixels), rng, self.settings))
        if self.settings.erase_rate and rng.random() < self.settings.erase_rate:
            pixels = pixels.copy("K")  # keeps the channels last in memory
            erase_rectangle(pixels, rng)
        return pixels


def as_image(pixels: Pixels) -> Image.Image:
    """(C, Y, X) uint8 -> a Pillow image in mode L or RGB."""
    if len(pixels) == 1:
        return Image.fromarray(np.ascontiguousarray(pixels[0]))
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))

"""What training does to a picture: crop, flip, and what the recipe adds to them.

The same (seed, epoch, index) gives the same picture. It is still uint8; normalisation and mixing
happen on the device for the whole batch.
"""

from collections.abc import Callable
from math import exp, log, sqrt

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vitcli.config.schema import AugmentSection
from vitcli.data.augment.policies import Pixels, change, erase
from vitcli.data.augment.presets import Strength
from vitcli.data.image_set import AnyPicture
from vitcli.decode import Box, ImageInput, open_image
from vitcli.preprocess import RESAMPLING, Preprocess, as_array

# The ranges of Inception's crop (Szegedy et al. 2014), which the ViT paper trains with.
MIN_RATIO, MAX_RATIO = 3 / 4, 4 / 3
CROP_ATTEMPTS = 10
# What torch resizes as Pillow does, on bytes, and faster.
TORCH_FILTERS = {"bilinear", "bicubic"}


def image_rng(seed: int, epoch: int, index: int, view: int = 0) -> np.random.Generator:
    """The randomness of one view of one picture in one epoch, whoever makes it."""
    # View + 1, because numpy pads entropy with zeros: (seed, epoch) is the order of the epoch.
    words = (seed, epoch, index, view + 1)
    if max(words) < 2**32:  # the same entropy as numpy makes of each, in half the time
        return np.random.default_rng(np.array(words, dtype=np.uint32))
    return np.random.default_rng(words)


def inception_crop(
    picture: AnyPicture, rng: np.random.Generator, preprocess: Preprocess, section: AugmentSection
) -> Pixels:
    """A random part of `min_area`..1 of the area, of ratio 3/4..4/3, resized to the model's size.

    As torchvision's RandomResizedCrop. The part is drawn on the whole picture, before anything is
    decoded; a large JPEG is then decoded at the smallest of its scales at which the part still has
    the model's size.
    """
    box = inception_box(picture.size, rng, section.min_area)
    return resized_part(picture, box, preprocess)


def resized_part(picture: AnyPicture, box: Box, preprocess: Preprocess) -> Pixels:
    """(C, Y, X) of the model's size: the part `box` of the whole picture, cut out and resized."""
    rows, columns = preprocess.image_size
    if preprocess.interpolation not in TORCH_FILTERS:
        part = picture.part(box, at_least=(columns, rows))
        resampling = RESAMPLING[preprocess.interpolation]
        return as_array(part.resize((columns, rows), resampling))
    # Within one or two grey levels of Pillow's result, in a fraction of the time
    # (recipes/RESULTS.md), as long as torch is told that the channels lie side by side.
    pixels = torch.from_numpy(picture.pixels(box, at_least=(columns, rows)))
    pixels = pixels[None, ..., None] if pixels.ndim == 2 else pixels[None]  # (1, Y, X, C)
    resized = F.interpolate(
        pixels.permute(0, 3, 1, 2),
        (rows, columns),
        mode=preprocess.interpolation,
        antialias=preprocess.antialias,
    )
    return resized[0].numpy()  # (C, Y, X)


def inception_box(size: tuple[int, int], rng: np.random.Generator, min_area: float) -> Box:
    """(left, top, right, bottom) of a random crop of a picture of (width, height)."""
    width, height = size
    low, high = log(MIN_RATIO), log(MAX_RATIO)
    for _ in range(CROP_ATTEMPTS):
        area = width * height * (min_area + (1 - min_area) * rng.random())
        ratio = exp(low + (high - low) * rng.random())
        w, h = round(sqrt(area * ratio)), round(sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    # Nothing fitted, as in a very long picture: the largest central part of an allowed ratio.
    w = max(1, min(width, round(height * MAX_RATIO)))
    h = max(1, min(height, round(width / MIN_RATIO)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def padded_crop(
    picture: AnyPicture, rng: np.random.Generator, preprocess: Preprocess, section: AugmentSection
) -> Pixels:
    """The evaluation picture, shifted by up to `crop_padding` pixels each way over black."""
    fitted = preprocess.fit(picture.whole())
    reach = section.crop_padding
    left, top = (int(shift) for shift in rng.integers(-reach, reach + 1, size=2))
    return as_array(fitted.crop((left, top, left + fitted.width, top + fitted.height)))


def no_crop(
    picture: AnyPicture, rng: np.random.Generator, preprocess: Preprocess, section: AugmentSection
) -> Pixels:
    """The evaluation picture."""
    return as_array(preprocess.fit(picture.whole()))


Crop = Callable[[AnyPicture, np.random.Generator, Preprocess, AugmentSection], Pixels]
CROPS: dict[str, Crop] = {"inception": inception_crop, "pad": padded_crop, "none": no_crop}


class TrainTransform:
    """A picture -> a random view of it, uint8.

    Args:
        preprocess: says size, interpolation and channels.
        section: says what is done.
    """

    def __init__(self, preprocess: Preprocess, section: AugmentSection) -> None:
        self.preprocess = preprocess
        self.section = section
        self.strength = Strength.of(section)
        self._crop = CROPS[section.crop]

    def __call__(self, image: ImageInput, rng: np.random.Generator) -> Tensor:
        """A path, file, bytes or picture -> (C, Y, X) uint8."""
        with open_image(image, self.preprocess.mode) as picture:
            return torch.from_numpy(np.ascontiguousarray(self.view(picture, rng)))

    def view(self, picture: AnyPicture, rng: np.random.Generator) -> Pixels:
        """The same as an array, from a picture that may not be decoded yet.

        Raises:
            ImageError: it is damaged.
        """
        pixels = self._crop(picture, rng, self.preprocess, self.section)  # (C, Y, X)
        if rng.random() < self.section.flip_rate:
            # Torch copies pixels backwards several times as fast as numpy, given as a batch.
            pixels = torch.from_numpy(pixels)[None].flip(3)[0].numpy()
        if self.strength.changes_colours:
            pixels = as_array(change(as_image(pixels), rng, self.strength))
        if self.strength.erase_rate and rng.random() < self.strength.erase_rate:
            pixels = pixels.copy("K")
            erase(pixels, rng)
        return pixels


def as_image(pixels: Pixels) -> Image.Image:
    """(C, Y, X) uint8 -> a picture in L or RGB."""
    if len(pixels) == 1:
        return Image.fromarray(np.ascontiguousarray(pixels[0]))
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))

"""What training does to a picture: random crop and flip.

The same (seed, epoch, index) gives the same picture. It is still uint8; normalisation happens on
the device for the whole batch.
"""

from collections.abc import Callable
from math import exp, log, sqrt

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitcli.config import AugmentSection
from vitcli.data.transforms import RESAMPLING, Preprocess, channels_first

# The ranges of Inception's crop (Szegedy et al. 2014), which the ViT paper trains with.
MIN_RATIO, MAX_RATIO = 3 / 4, 4 / 3
CROP_ATTEMPTS = 10


def image_rng(seed: int, epoch: int, index: int, view: int = 0) -> np.random.Generator:
    """The randomness of one view of one picture in one epoch, whoever makes it."""
    # View + 1, because numpy pads entropy with zeros: (seed, epoch) is the order of the epoch.
    return np.random.default_rng((seed, epoch, index, view + 1))


def inception_crop(
    image: Image.Image, rng: np.random.Generator, preprocess: Preprocess, section: AugmentSection
) -> Image.Image:
    """A random part of `min_area`..1 of the area, of ratio 3/4..4/3, resized to the model's size.

    As torchvision's RandomResizedCrop, but Pillow's filter sees the pixels beside the crop too.
    """
    box = inception_box(image.size, rng, section.min_area)
    rows, columns = preprocess.image_size
    return image.resize((columns, rows), RESAMPLING[preprocess.interpolation], box=box)


def inception_box(
    size: tuple[int, int], rng: np.random.Generator, min_area: float
) -> tuple[int, int, int, int]:
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
    image: Image.Image, rng: np.random.Generator, preprocess: Preprocess, section: AugmentSection
) -> Image.Image:
    """The evaluation picture, shifted by up to `crop_padding` pixels each way over black."""
    fitted = preprocess.fit(image)
    reach = section.crop_padding
    left, top = (int(shift) for shift in rng.integers(-reach, reach + 1, size=2))
    return fitted.crop((left, top, left + fitted.width, top + fitted.height))


def no_crop(
    image: Image.Image, rng: np.random.Generator, preprocess: Preprocess, section: AugmentSection
) -> Image.Image:
    """The evaluation picture."""
    return preprocess.fit(image)


Crop = Callable[[Image.Image, np.random.Generator, Preprocess, AugmentSection], Image.Image]
CROPS: dict[str, Crop] = {"inception": inception_crop, "pad": padded_crop, "none": no_crop}


class TrainTransform:
    """A picture -> a random view of it, uint8.

    Args:
        preprocess: says size, interpolation and channels.
        section: says which crop and how often to flip.
    """

    def __init__(self, preprocess: Preprocess, section: AugmentSection) -> None:
        self.preprocess = preprocess
        self.section = section
        self._crop = CROPS[section.crop]

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        """A picture in the mode of `preprocess` -> (C, Y, X) uint8."""
        return torch.from_numpy(channels_first(self.view(image, rng)))

    def view(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The same as a Pillow picture of the model's size."""
        view = self._crop(image, rng, self.preprocess, self.section)
        if rng.random() < self.section.flip_rate:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return view

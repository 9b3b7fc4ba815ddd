"""Random changes of a picture of the model's size: which operations, how strong, how often.

Each takes its randomness from a generator that is handed in, so that (seed, epoch, index) says what
comes out.
"""

from collections.abc import Callable
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitcli.data.augment import operations as ops
from vitcli.data.augment.presets import Strength

Pixels = NDArray[np.uint8]

# Random erasing (Zhong et al. 2020): shares of the area, and of height to width.
ERASE_AREA = (0.02, 0.4)
ERASE_RATIO = (0.3, 1 / 0.3)
ERASE_ATTEMPTS = 100
BLUR_RADIUS = (0.1, 2.0)  # 3-Augment's, in pixels


def draw(
    table: dict[str, ops.Choice], level: float, image: Image.Image, rng: np.random.Generator
) -> Image.Image:
    """One operation of `table`, all as likely, at `level`."""
    choice = list(table.values())[int(rng.integers(len(table)))]
    number = choice.number(level, (image.height, image.width))
    if choice.signed and rng.random() < 0.5:
        number = -number
    if choice.placed:
        x, y = int(rng.integers(image.width)), int(rng.integers(image.height))
        return choice.op(image, number, x, y)
    return choice.op(image, number)


def randaugment(image: Image.Image, rng: np.random.Generator, strength: Strength) -> Image.Image:
    """`num_ops` operations one after another at one magnitude (Cubuk et al. 2020), as in AugReg."""
    for _ in range(strength.num_ops):
        image = draw(ops.RANDAUGMENT, strength.magnitude, image, rng)
    return image


def trivial_augment(
    image: Image.Image, rng: np.random.Generator, strength: Strength
) -> Image.Image:
    """One operation at a random level: TrivialAugmentWide (Müller and Hutter 2021)."""
    return draw(ops.TRIVIAL, float(rng.integers(ops.TRIVIAL_LEVELS)), image, rng)


def three_augment(image: Image.Image, rng: np.random.Generator, strength: Strength) -> Image.Image:
    """Grey, solarized from 128 on, or blurred: one of the three (DeiT III, section 3)."""
    which = int(rng.integers(3))
    if which == 0:
        return ops.grey(image)
    if which == 1:
        return ops.solarize(image, 128)
    return ops.blur(image, float(rng.uniform(*BLUR_RADIUS)))


def no_policy(image: Image.Image, rng: np.random.Generator, strength: Strength) -> Image.Image:
    """The picture itself."""
    return image


POLICIES: dict[str, Callable[[Image.Image, np.random.Generator, Strength], Image.Image]] = {
    "none": no_policy,
    "randaugment": randaugment,
    "trivial": trivial_augment,
    "3-augment": three_augment,
}


def jitter(image: Image.Image, rng: np.random.Generator, strength: Strength) -> Image.Image:
    """Brightness, contrast and saturation times 1 - s .. 1 + s (not below 0), hue by -h .. h.

    In random order, as torchvision's ColorJitter; what has no strength is left out.
    """
    steps: list[tuple[Callable[[Image.Image, float], Image.Image], float, float]] = [
        (op, max(0.0, 1 - reach), 1 + reach)
        for op, reach in (
            (ops.brightness, strength.brightness),
            (ops.contrast, strength.contrast),
            (ops.color, strength.saturation),
        )
        if reach
    ]
    if strength.hue:
        steps.append((ops.shift_hue, -strength.hue, strength.hue))
    for number in rng.permutation(len(steps)):
        op, low, high = steps[number]
        image = op(image, float(rng.uniform(low, high)))
    return image


def erase(pixels: Pixels, rng: np.random.Generator) -> None:
    """(C, Y, X): overwrite a random rectangle with random values (Zhong et al. 2020, algorithm 1).

    Its area is uniform in 0.02..0.4 of the picture's, height / width uniform in 0.3..3.3; what is
    as large as the picture is drawn again. Its place is uniform, as in the authors' code.
    """
    channels, rows, columns = pixels.shape
    for _ in range(ERASE_ATTEMPTS):
        area = rng.uniform(*ERASE_AREA) * rows * columns
        ratio = rng.uniform(*ERASE_RATIO)
        height, width = round(sqrt(area * ratio)), round(sqrt(area / ratio))
        if 0 < height < rows and 0 < width < columns:
            top, left = int(rng.integers(rows - height + 1)), int(rng.integers(columns - width + 1))
            values: Any = rng.integers(0, 256, (channels, height, width), dtype=np.uint8)
            pixels[:, top : top + height, left : left + width] = values
            return


def change(image: Image.Image, rng: np.random.Generator, strength: Strength) -> Image.Image:
    """Everything above that works on Pillow's pictures, in its order."""
    image = POLICIES[strength.policy](image, rng, strength)
    image = jitter(image, rng, strength)
    if strength.grey_rate and rng.random() < strength.grey_rate:
        image = ops.grey(image)
    return image

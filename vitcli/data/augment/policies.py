"""Random changes of an image that already has the model's size, and how a recipe names them.

`POLICIES` and `PRESETS` are the only lists of their names. Every function takes its generator, so
that the result is a function of (seed, epoch, index).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitcli.data.augment import operations as ops

Pixels = NDArray[np.uint8]
Rng = np.random.Generator
# An `AugmentSection` in which no setting is None. mypy cannot express that without a second
# declaration of every setting, so the alias is Any.
AugmentSettings = Any

# Random erasing (Zhong et al. 2020): area as a fraction of the image, and height / width.
ERASE_AREA = (0.02, 0.4)
ERASE_RATIO = (0.3, 1 / 0.3)
ERASE_ATTEMPTS = 100
BLUR_RADIUS = (0.1, 2.0)  # of 3-Augment, in px


def apply_random_operation(
    operations: Mapping[str, ops.Operation], level: float, image: Image.Image, rng: Rng
) -> Image.Image:
    """Apply one of `operations`, each with the same probability, at `level`."""
    # The order of the draws (operation, sign, position) is fixed: another order changes the images.
    operation = list(operations.values())[int(rng.integers(len(operations)))]
    value = operation.value(level, (image.height, image.width))
    if operation.signed and rng.random() < 0.5:
        value = -value
    if operation.at_position:
        x, y = int(rng.integers(image.width)), int(rng.integers(image.height))
        return operation.function(image, value, x, y)
    return operation.function(image, value)


def no_policy(image: Image.Image, rng: Rng, settings: AugmentSettings) -> Image.Image:
    """Return the image unchanged."""
    return image


def randaugment(image: Image.Image, rng: Rng, settings: AugmentSettings) -> Image.Image:
    """`num_ops` operations in a row at one magnitude (Cubuk et al. 2020), as in AugReg."""
    for _ in range(settings.num_ops):
        image = apply_random_operation(ops.RANDAUGMENT, settings.magnitude, image, rng)
    return image


def trivial_augment(image: Image.Image, rng: Rng, settings: AugmentSettings) -> Image.Image:
    """One operation at a random level: TrivialAugmentWide (Müller and Hutter 2021)."""
    level = float(rng.integers(ops.TRIVIAL_LEVELS))
    return apply_random_operation(ops.TRIVIAL_AUGMENT, level, image, rng)


def three_augment(image: Image.Image, rng: Rng, settings: AugmentSettings) -> Image.Image:
    """One of greyscale, solarize at 128 and Gaussian blur (DeiT III, section 3)."""
    choice = int(rng.integers(3))
    if choice == 0:
        return ops.grey(image)
    if choice == 1:
        return ops.solarize(image, 128)
    return ops.blur(image, float(rng.uniform(*BLUR_RADIUS)))


@dataclass(frozen=True)
class Policy:
    """A policy, and the defaults of the settings in `[augment]` that only this policy has."""

    apply: Callable[[Image.Image, Rng, AugmentSettings], Image.Image]
    defaults: Mapping[str, float] = field(default_factory=dict)


POLICIES: dict[str, Policy] = {
    "none": Policy(no_policy),
    "randaugment": Policy(randaugment, {"num_ops": 2, "magnitude": 10.0}),
    "trivial": Policy(trivial_augment),
    "3-augment": Policy(three_augment),
}

# The values of the settings that neither the recipe nor the preset gives: nothing is changed.
DEFAULTS: dict[str, Any] = {
    "policy": "none",
    "brightness": 0.0,
    "contrast": 0.0,
    "saturation": 0.0,
    "hue": 0.0,
    "grey_rate": 0.0,
    "erase_rate": 0.0,
    "mixup_alpha": 0.0,
    "cutmix_alpha": 0.0,
    "mix_rate": 1.0,
    "cutmix_rate": 0.5,
}
# "How to train your ViT?" (Steiner et al. 2022, https://arxiv.org/abs/2106.10270), section 3.3,
# with the values of big_vision/configs/vit_i1k.py: RandAugment (layers, magnitude), mixup's alpha.
# `light1` does change images: at magnitude 0 colours fade, posterize leaves one bit, and so on.
PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    "light1": {"policy": "randaugment", "num_ops": 2, "magnitude": 0.0},
    "light2": {"policy": "randaugment", "num_ops": 2, "magnitude": 10.0, "mixup_alpha": 0.2},
    "medium1": {"policy": "randaugment", "num_ops": 2, "magnitude": 15.0, "mixup_alpha": 0.2},
    "medium2": {"policy": "randaugment", "num_ops": 2, "magnitude": 15.0, "mixup_alpha": 0.5},
    "strong1": {"policy": "randaugment", "num_ops": 2, "magnitude": 20.0, "mixup_alpha": 0.5},
    "strong2": {"policy": "randaugment", "num_ops": 2, "magnitude": 20.0, "mixup_alpha": 0.8},
    # "DeiT III" (Touvron et al. 2022, https://arxiv.org/abs/2204.07118), section 3.
    "3-augment": {"policy": "3-augment", "brightness": 0.3, "contrast": 0.3, "saturation": 0.3},
}


def changes_colours(settings: AugmentSettings) -> bool:
    """The cropped image meets a policy, colour jitter or greyscale."""
    names = ("brightness", "contrast", "saturation", "hue", "grey_rate")
    return settings.policy != "none" or any(getattr(settings, name) for name in names)


def changes_pixels(settings: AugmentSettings) -> bool:
    """The cropped image is changed before mixing."""
    return changes_colours(settings) or settings.erase_rate > 0


def change_colours(image: Image.Image, rng: Rng, settings: AugmentSettings) -> Image.Image:
    """Apply the policy, colour jitter and random greyscale, in this order."""
    image = POLICIES[settings.policy].apply(image, rng, settings)
    image = jitter_colours(image, rng, settings)
    if settings.grey_rate and rng.random() < settings.grey_rate:
        image = ops.grey(image)
    return image


def jitter_colours(image: Image.Image, rng: Rng, settings: AugmentSettings) -> Image.Image:
    """Brightness, contrast and saturation by uniform factors in 1 - x .. 1 + x, hue by -x .. x.

    The order is random, as in torchvision's `ColorJitter`. A setting of 0 is skipped.
    """
    steps: list[tuple[Callable[[Image.Image, float], Image.Image], float, float]] = [
        (function, max(0.0, 1 - reach), 1 + reach)
        for function, reach in (
            (ops.brightness, settings.brightness),
            (ops.contrast, settings.contrast),
            (ops.color, settings.saturation),
        )
        if reach
    ]
    if settings.hue:
        steps.append((ops.shift_hue, -settings.hue, settings.hue))
    for number in rng.permutation(len(steps)):
        function, low, high = steps[number]
        image = function(image, float(rng.uniform(low, high)))
    return image


def erase_rectangle(pixels: Pixels, rng: Rng) -> None:
    """(C, Y, X): overwrite a random rectangle with noise (Zhong et al. 2020, algorithm 1).

    Its area is uniform in 0.02..0.4 of the image, height / width uniform in 0.3..3.3. A rectangle
    that does not fit is drawn again. Its position is uniform, as in the authors' code.
    """
    channels, rows, columns = pixels.shape
    for _ in range(ERASE_ATTEMPTS):
        area = rng.uniform(*ERASE_AREA) * rows * columns
        ratio = rng.uniform(*ERASE_RATIO)
        height, width = round(sqrt(area * ratio)), round(sqrt(area / ratio))
        if 0 < height < rows and 0 < width < columns:
            top, left = int(rng.integers(rows - height + 1)), int(rng.integers(columns - width + 1))
            noise: Any = rng.integers(0, 256, (channels, height, width), dtype=np.uint8)
            pixels[:, top : top + height, left : left + width] = noise
            return

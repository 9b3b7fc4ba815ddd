"""Image operations of one value each, and the lists from which RandAugment and TrivialAugment draw.

Sources: Pillow's ImageOps, ImageEnhance and affine transforms for the operations of AutoAugment
(Cubuk et al. 2019); big_vision/pp/autoaugment.py for RandAugment's scale, which AugReg trained
with; Müller and Hutter 2021, table 1 ("Wide") for TrivialAugment. Geometric operations sample the
nearest pixel, as both do.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from PIL import Image, ImageEnhance, ImageFilter, ImageOps

# Fill colour of the uncovered area: grey in AugReg, black in TrivialAugment.
GREY, BLACK = 128, 0
# AugReg gives shifts and cutouts in pixels of this image side; here they scale with the side.
AUGREG_SIDE = 224


def identity(image: Image.Image, value: float = 0.0) -> Image.Image:
    """Return the image unchanged."""
    return image


def autocontrast(image: Image.Image, value: float = 0.0) -> Image.Image:
    """Stretch each channel to the range 0..255."""
    return ImageOps.autocontrast(image)


def equalize(image: Image.Image, value: float = 0.0) -> Image.Image:
    """Equalise the histogram of each channel."""
    return ImageOps.equalize(image)


def invert(image: Image.Image, value: float = 0.0) -> Image.Image:
    """255 - x."""
    return ImageOps.invert(image)


def posterize(image: Image.Image, bits: float) -> Image.Image:
    """Keep the highest `bits` of each value, at least one, as in big_vision."""
    return ImageOps.posterize(image, min(8, max(1, int(bits))))


def solarize(image: Image.Image, threshold: float) -> Image.Image:
    """255 - x where x >= `threshold`."""
    table = [x if x < threshold else 255 - x for x in range(256)]
    return image.point(table * len(image.getbands()))


def solarize_add(image: Image.Image, addition: float) -> Image.Image:
    """min(255, x + `addition`) where x < 128."""
    table = [min(255, x + int(addition)) if x < 128 else x for x in range(256)]
    return image.point(table * len(image.getbands()))


def color(image: Image.Image, factor: float) -> Image.Image:
    """Saturation: 0 is greyscale, 1 is the image."""
    return ImageEnhance.Color(image).enhance(factor)


def contrast(image: Image.Image, factor: float) -> Image.Image:
    """Contrast: 0 is the mean grey, 1 is the image.

    big_vision uses the number of pixels / 256 instead of the mean grey that AutoAugment defines.
    """
    return ImageEnhance.Contrast(image).enhance(factor)


def brightness(image: Image.Image, factor: float) -> Image.Image:
    """Brightness: min(255, `factor` * x)."""
    return ImageEnhance.Brightness(image).enhance(factor)


def sharpness(image: Image.Image, factor: float) -> Image.Image:
    """Sharpness: 0 is the smoothed image, 1 is the image."""
    return ImageEnhance.Sharpness(image).enhance(factor)


def rotate(image: Image.Image, degrees: float, fill: int = BLACK) -> Image.Image:
    """Rotate about the centre, counterclockwise for positive angles."""
    return image.rotate(degrees, Image.Resampling.NEAREST, fillcolor=_colour(image, fill))


def shear_x(image: Image.Image, slope: float, fill: int = BLACK) -> Image.Image:
    """Shift each row by `slope` px more than the row above."""
    return _affine(image, (1, slope, 0, 0, 1, 0), fill)


def shear_y(image: Image.Image, slope: float, fill: int = BLACK) -> Image.Image:
    """Shift each column by `slope` px more than the column to its left."""
    return _affine(image, (1, 0, 0, slope, 1, 0), fill)


def translate_x(image: Image.Image, pixels: float, fill: int = BLACK) -> Image.Image:
    """Shift to the left by a whole number of pixels."""
    return _affine(image, (1, 0, int(pixels), 0, 1, 0), fill)


def translate_y(image: Image.Image, pixels: float, fill: int = BLACK) -> Image.Image:
    """Shift up by a whole number of pixels."""
    return _affine(image, (1, 0, 0, 0, 1, int(pixels)), fill)


def cutout(image: Image.Image, reach: float, x: int, y: int, fill: int = GREY) -> Image.Image:
    """Fill a square of side 2 * `reach` px around (x, y) (DeVries and Taylor 2017)."""
    reach = int(reach)
    result = image.copy()
    result.paste(_colour(image, fill), (x - reach, y - reach, x + reach, y + reach))
    return result


def grey(image: Image.Image) -> Image.Image:
    """Greyscale (ITU-R 601-2), in the mode of the image."""
    return image.convert("L").convert(image.mode)


def blur(image: Image.Image, radius: float) -> Image.Image:
    """Gaussian blur with a standard deviation of `radius` px (Pillow's approximation)."""
    return image.filter(ImageFilter.GaussianBlur(radius))


def shift_hue(image: Image.Image, turn: float) -> Image.Image:
    """Rotate the hue by `turn` of the full circle; a greyscale image stays unchanged."""
    if image.mode != "RGB":
        return image
    h, s, v = image.convert("HSV").split()
    step = round(turn * 255)
    h = h.point([(x + step) % 256 for x in range(256)])
    return Image.merge("HSV", (h, s, v)).convert("RGB")


def _affine(image: Image.Image, matrix: tuple[float, ...], fill: int) -> Image.Image:
    """The result at (x, y) is the pixel at (a x + b y + c, d x + e y + f)."""
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        matrix,
        Image.Resampling.NEAREST,
        fillcolor=_colour(image, fill),
    )


def _colour(image: Image.Image, level: int) -> tuple[int, ...] | int:
    return level if image.mode == "L" else (level,) * len(image.getbands())


def around_one(function: Callable[[Image.Image, float], Image.Image]) -> Callable[..., Image.Image]:
    """The operation with the factor 1 + value."""
    return lambda image, value: function(image, 1 + value)


class Operation(NamedTuple):
    """An operation that a policy may draw.

    Attributes:
        function: takes the image and its value, and the (x, y) of a random pixel if `at_position`.
        value: (level, (height, width) of the image) -> the value.
        signed: the value is negated with probability 0.5.
    """

    function: Callable[..., Image.Image]
    value: Callable[[float, tuple[int, int]], float] = lambda level, size: 0.0
    signed: bool = False
    at_position: bool = False


def _proportional(most: float, level_of_most: int) -> Callable[[float, tuple[int, int]], float]:
    """`most` at the level `level_of_most`, in proportion at other levels."""
    return lambda level, size: level / level_of_most * most


def _relative_to_side(
    most: float, axis: int | None = None
) -> Callable[[float, tuple[int, int]], float]:
    """`most` px at level 10 for a side of 224 px; `axis` picks the side, None the shorter one."""
    return lambda level, size: (
        level / 10 * most * (min(size) if axis is None else size[axis]) / AUGREG_SIDE
    )


def _enhance(level: float, size: tuple[int, int]) -> float:
    return level / 10 * 1.8 + 0.1


# AutoAugment ends at level 10, AugReg goes up to 20. Solarize has no effect from level 10 on, and
# posterize has none at level 20.
RANDAUGMENT: dict[str, Operation] = {
    "autocontrast": Operation(autocontrast),
    "equalize": Operation(equalize),
    "invert": Operation(invert),
    "rotate": Operation(partial(rotate, fill=GREY), _proportional(30, 10), signed=True),
    "posterize": Operation(posterize, _proportional(4, 10)),
    "solarize": Operation(solarize, lambda level, size: int(level / 10 * 256)),
    "color": Operation(color, _enhance),
    "contrast": Operation(contrast, _enhance),
    "brightness": Operation(brightness, _enhance),
    "sharpness": Operation(sharpness, _enhance),
    "shear_x": Operation(partial(shear_x, fill=GREY), _proportional(0.3, 10), signed=True),
    "shear_y": Operation(partial(shear_y, fill=GREY), _proportional(0.3, 10), signed=True),
    "translate_x": Operation(
        partial(translate_x, fill=GREY), _relative_to_side(100, 1), signed=True
    ),
    "translate_y": Operation(
        partial(translate_y, fill=GREY), _relative_to_side(100, 0), signed=True
    ),
    "cutout": Operation(cutout, _relative_to_side(40), at_position=True),
    "solarize_add": Operation(solarize_add, _proportional(110, 10)),
}

# Uniform levels 0..30. Shifts are in px and do not scale with the image.
TRIVIAL_LEVELS = 31
TRIVIAL_AUGMENT: dict[str, Operation] = {
    "identity": Operation(identity),
    "autocontrast": Operation(autocontrast),
    "equalize": Operation(equalize),
    "rotate": Operation(rotate, _proportional(135, 30), signed=True),
    "posterize": Operation(posterize, lambda level, size: 8 - round(level / 5)),
    "solarize": Operation(solarize, lambda level, size: 255 - level * 8.5),
    "color": Operation(around_one(color), _proportional(0.99, 30), signed=True),
    "contrast": Operation(around_one(contrast), _proportional(0.99, 30), signed=True),
    "brightness": Operation(around_one(brightness), _proportional(0.99, 30), signed=True),
    "sharpness": Operation(around_one(sharpness), _proportional(0.99, 30), signed=True),
    "shear_x": Operation(shear_x, _proportional(0.99, 30), signed=True),
    "shear_y": Operation(shear_y, _proportional(0.99, 30), signed=True),
    "translate_x": Operation(translate_x, _proportional(32, 30), signed=True),
    "translate_y": Operation(translate_y, _proportional(32, 30), signed=True),
}

"""Operations on one picture, each a function of the picture and one number; and what RandAugment
and TrivialAugment draw from.

Sources: the operations of AutoAugment (Cubuk et al. 2019) as Pillow's ImageOps, ImageEnhance and
affine transforms define them; the scale of RandAugment from big_vision/pp/autoaugment.py, which
AugReg trained with; the space of TrivialAugment from table 1 ("Wide") of Müller and Hutter 2021.
Where pixels move, nearest neighbours are taken, as in both.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from PIL import Image, ImageEnhance, ImageFilter, ImageOps

# What is not covered after a shift: AugReg's grey; TrivialAugment leaves black.
GREY, BLACK = 128, 0
# The shifts and holes of AugReg are in pixels of this side; here they keep their share of a side.
AUGREG_SIDE = 224


def same(image: Image.Image, value: float = 0.0) -> Image.Image:
    """The picture itself."""
    return image


def autocontrast(image: Image.Image, value: float = 0.0) -> Image.Image:
    """Each channel stretched, so that its darkest becomes 0 and its brightest 255."""
    return ImageOps.autocontrast(image)


def equalize(image: Image.Image, value: float = 0.0) -> Image.Image:
    """Each channel's histogram made flat."""
    return ImageOps.equalize(image)


def invert(image: Image.Image, value: float = 0.0) -> Image.Image:
    """255 - x."""
    return ImageOps.invert(image)


def posterize(image: Image.Image, bits: float) -> Image.Image:
    """Only the highest `bits` of each value, at least one (TensorFlow shifts no further)."""
    return ImageOps.posterize(image, min(8, max(1, int(bits))))


def solarize(image: Image.Image, threshold: float) -> Image.Image:
    """255 - x from `threshold` on; above 255 nothing changes."""
    table = [x if x < threshold else 255 - x for x in range(256)]
    return image.point(table * len(image.getbands()))


def solarize_add(image: Image.Image, addition: float) -> Image.Image:
    """x + `addition`, at most 255, where x < 128."""
    table = [min(255, x + int(addition)) if x < 128 else x for x in range(256)]
    return image.point(table * len(image.getbands()))


def color(image: Image.Image, factor: float) -> Image.Image:
    """From grey (0) over the picture (1) beyond it."""
    return ImageEnhance.Color(image).enhance(factor)


def contrast(image: Image.Image, factor: float) -> Image.Image:
    """From the mean grey (0) over the picture (1) beyond it.

    big_vision has the number of pixels / 256 where AutoAugment means the mean grey.
    """
    return ImageEnhance.Contrast(image).enhance(factor)


def brightness(image: Image.Image, factor: float) -> Image.Image:
    """`factor` x, at most 255."""
    return ImageEnhance.Brightness(image).enhance(factor)


def sharpness(image: Image.Image, factor: float) -> Image.Image:
    """From the smoothed picture (0) over the picture (1) beyond it."""
    return ImageEnhance.Sharpness(image).enhance(factor)


def rotate(image: Image.Image, degrees: float, fill: int = BLACK) -> Image.Image:
    """About the centre, counterclockwise for positive angles."""
    return image.rotate(degrees, Image.Resampling.NEAREST, fillcolor=_colour(image, fill))


def shear_x(image: Image.Image, slope: float, fill: int = BLACK) -> Image.Image:
    """Rows slide by `slope` pixels a row against the first."""
    return _affine(image, (1, slope, 0, 0, 1, 0), fill)


def shear_y(image: Image.Image, slope: float, fill: int = BLACK) -> Image.Image:
    """Columns slide by `slope` pixels a column against the first."""
    return _affine(image, (1, 0, 0, slope, 1, 0), fill)


def translate_x(image: Image.Image, pixels: float, fill: int = BLACK) -> Image.Image:
    """What was at column x + `pixels`, a whole number, comes to column x."""
    return _affine(image, (1, 0, int(pixels), 0, 1, 0), fill)


def translate_y(image: Image.Image, pixels: float, fill: int = BLACK) -> Image.Image:
    """What was at row y + `pixels`, a whole number, comes to row y."""
    return _affine(image, (1, 0, 0, 0, 1, int(pixels)), fill)


def cutout(image: Image.Image, reach: float, x: int, y: int, fill: int = GREY) -> Image.Image:
    """A square of side 2 `reach` about (x, y), filled (DeVries and Taylor 2017)."""
    reach = int(reach)
    result = image.copy()
    result.paste(_colour(image, fill), (x - reach, y - reach, x + reach, y + reach))
    return result


def grey(image: Image.Image) -> Image.Image:
    """Without colour (ITU-R 601-2), in the picture's own mode."""
    return image.convert("L").convert(image.mode)


def blur(image: Image.Image, radius: float) -> Image.Image:
    """Gaussian of standard deviation `radius` pixels, as Pillow approaches it."""
    return image.filter(ImageFilter.GaussianBlur(radius))


def shift_hue(image: Image.Image, turn: float) -> Image.Image:
    """The colour circle turned by `turn` of a round; a picture without colour stays."""
    if image.mode != "RGB":
        return image
    h, s, v = image.convert("HSV").split()
    step = round(turn * 255)
    h = h.point([(x + step) % 256 for x in range(256)])
    return Image.merge("HSV", (h, s, v)).convert("RGB")


def _affine(image: Image.Image, matrix: tuple[float, ...], fill: int) -> Image.Image:
    """The pixel at (x, y) becomes that at (a x + b y + c, d x + e y + f)."""
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        matrix,
        Image.Resampling.NEAREST,
        fillcolor=_colour(image, fill),
    )


def _colour(image: Image.Image, level: int) -> tuple[int, ...] | int:
    return level if image.mode == "L" else (level,) * len(image.getbands())


def about_one(op: Callable[[Image.Image, float], Image.Image]) -> Callable[..., Image.Image]:
    """The enhancement by 1 + value."""
    return lambda image, value: op(image, 1 + value)


class Choice(NamedTuple):
    """An operation that a policy may draw.

    Attributes:
        op: of a picture and its number; where `placed`, of the (x, y) of a random pixel too.
        number: from the level and the picture's (height, width).
        signed: whether the number is negated half of the time.
    """

    op: Callable[..., Image.Image]
    number: Callable[[float, tuple[int, int]], float] = lambda level, side: 0.0
    signed: bool = False
    placed: bool = False


def _share(most: float, axis: int | None = None) -> Callable[[float, tuple[int, int]], float]:
    """`most` pixels of 224 at level 10, of the side that `axis` names, or of the shorter one."""
    return lambda level, side: (
        level / 10 * most * (min(side) if axis is None else side[axis]) / AUGREG_SIDE
    )


def _times(most: float, levels: int) -> Callable[[float, tuple[int, int]], float]:
    """`most` at the level `levels`, in proportion below and above."""
    return lambda level, side: level / levels * most


def _enhance(level: float, side: tuple[int, int]) -> float:
    return level / 10 * 1.8 + 0.1


# AutoAugment ends at level 10, AugReg goes up to 20: from 10 on solarize, and at 20 posterize,
# change nothing any more.
RANDAUGMENT: dict[str, Choice] = {
    "autocontrast": Choice(autocontrast),
    "equalize": Choice(equalize),
    "invert": Choice(invert),
    "rotate": Choice(partial(rotate, fill=GREY), _times(30, 10), signed=True),
    "posterize": Choice(posterize, _times(4, 10)),
    "solarize": Choice(solarize, lambda level, side: int(level / 10 * 256)),
    "color": Choice(color, _enhance),
    "contrast": Choice(contrast, _enhance),
    "brightness": Choice(brightness, _enhance),
    "sharpness": Choice(sharpness, _enhance),
    "shear_x": Choice(partial(shear_x, fill=GREY), _times(0.3, 10), signed=True),
    "shear_y": Choice(partial(shear_y, fill=GREY), _times(0.3, 10), signed=True),
    "translate_x": Choice(partial(translate_x, fill=GREY), _share(100, 1), signed=True),
    "translate_y": Choice(partial(translate_y, fill=GREY), _share(100, 0), signed=True),
    "cutout": Choice(cutout, _share(40), placed=True),
    "solarize_add": Choice(solarize_add, _times(110, 10)),
}

# Levels 0..30, one as likely as another; the shifts are in pixels, whatever the side.
TRIVIAL_LEVELS = 31
TRIVIAL: dict[str, Choice] = {
    "identity": Choice(same),
    "autocontrast": Choice(autocontrast),
    "equalize": Choice(equalize),
    "rotate": Choice(rotate, _times(135, 30), signed=True),
    "posterize": Choice(posterize, lambda level, side: 8 - round(level / 5)),
    "solarize": Choice(solarize, lambda level, side: 255 - level * 8.5),
    "color": Choice(about_one(color), _times(0.99, 30), signed=True),
    "contrast": Choice(about_one(contrast), _times(0.99, 30), signed=True),
    "brightness": Choice(about_one(brightness), _times(0.99, 30), signed=True),
    "sharpness": Choice(about_one(sharpness), _times(0.99, 30), signed=True),
    "shear_x": Choice(shear_x, _times(0.99, 30), signed=True),
    "shear_y": Choice(shear_y, _times(0.99, 30), signed=True),
    "translate_x": Choice(translate_x, _times(32, 30), signed=True),
    "translate_y": Choice(translate_y, _times(32, 30), signed=True),
}

"""Operations on a picture: each against its formula in plain numpy, and the scales they come at."""

import numpy as np
import pytest
from PIL import Image

from vitcli.data.augment import operations as ops

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (24, 32, 3), dtype=np.uint8)
DULL = (NOISE // 3 + 60).astype(np.uint8)  # values 60..145, so that stretching shows


def apply(op, array, *numbers, **named):
    mode = "L" if array.ndim == 2 else "RGB"
    result = op(Image.fromarray(array), *numbers, **named)
    assert result.mode == mode and result.size == (array.shape[1], array.shape[0])
    return np.asarray(result).astype(np.float64)


def luma(array):
    """ITU-R 601-2."""
    return array @ np.array([0.299, 0.587, 0.114])


PICTURES = pytest.mark.parametrize("picture", [NOISE, DULL, DULL[..., 0]], ids=["rgb", "dull", "L"])


@PICTURES
def test_pointwise(picture):
    x = picture.astype(np.float64)
    assert (apply(ops.identity, picture) == x).all()
    assert (apply(ops.invert, picture) == 255 - x).all()
    for bits in (1, 3, 8):
        step = 2 ** (8 - bits)
        assert (apply(ops.posterize, picture, bits) == x // step * step).all()
    assert (apply(ops.posterize, picture, 0) == x // 128 * 128).all()  # one bit is left
    for threshold in (0, 100, 128.5, 256, 400):
        assert (
            apply(ops.solarize, picture, threshold) == np.where(x < threshold, x, 255 - x)
        ).all()
    added = np.where(x < 128, np.minimum(x + 110, 255), x)
    assert (apply(ops.solarize_add, picture, 110.7) == added).all()


@PICTURES
def test_autocontrast_stretches_each_channel(picture):
    x = picture.astype(np.float64)
    low, high = x.min((0, 1)), x.max((0, 1))
    assert np.abs(apply(ops.autocontrast, picture) - (x - low) * 255 / (high - low)).max() <= 1


@PICTURES
def test_equalize_makes_ranks_of_values(picture):
    x = picture.reshape(*picture.shape[:2], -1)
    result = apply(ops.equalize, picture).reshape(x.shape)
    for channel in range(x.shape[2]):
        values = x[..., channel]
        below = np.array([(values < v).sum() for v in range(256)])[values]
        step = (values.size - (values == values.max()).sum()) // 255
        assert (result[..., channel] == np.minimum((below + step // 2) // step, 255)).all()


@pytest.mark.parametrize("factor", [0.0, 0.1, 0.7, 1.0, 1.9, 2.8])
def test_enhancements_lie_between_or_beyond_two_pictures(factor):
    x = DULL.astype(np.float64)
    grey = np.rint(luma(x))
    pairs = {
        ops.brightness: np.zeros_like(x),
        ops.color: np.repeat(grey[..., None], 3, -1),
        ops.contrast: np.full_like(x, int(grey.mean() + 0.5)),
    }
    for op, other in pairs.items():
        wanted = (other + factor * (x - other)).clip(0, 255)
        assert np.abs(apply(op, DULL, factor) - wanted).max() <= max(1, factor) + 0.5, op


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.9])
def test_sharpness_is_against_the_smoothed_picture(factor):
    x = NOISE.astype(np.float64)
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    smooth = x.copy()
    smooth[1:-1, 1:-1] = sum(
        kernel[i, j] * x[i : i + 22, j : j + 30] for i in range(3) for j in range(3)
    )
    wanted = (smooth + factor * (x - smooth)).clip(0, 255)
    assert np.abs(apply(ops.sharpness, NOISE, factor) - wanted).max() <= max(1, factor) + 0.5


@PICTURES
def test_translation(picture):
    for pixels in (3, -5, 100):
        shifted = np.full(picture.shape, 128.0)
        width = picture.shape[1]
        for column in range(width):
            if 0 <= column + pixels < width:
                shifted[:, column] = picture[:, column + pixels]
        assert (apply(ops.translate_x, picture, pixels, fill=128) == shifted).all()
        turned = np.ascontiguousarray(picture.swapaxes(0, 1))
        result = apply(ops.translate_y, turned, pixels, fill=128)
        assert (result.swapaxes(0, 1) == shifted).all()


@PICTURES
def test_shears_slide_whole_rows_and_columns(picture):
    for slope in (0.3, -0.25):
        result = apply(ops.shear_x, picture, slope, fill=7)
        for row in range(len(picture)):
            for column in range(picture.shape[1]):
                source = int(np.floor(column + 0.5 + slope * (row + 0.5)))
                inside = column + 0.5 + slope * (row + 0.5) >= 0 and source < picture.shape[1]
                assert (result[row, column] == (picture[row, source] if inside else 7)).all()
        turned = np.ascontiguousarray(picture.swapaxes(0, 1))
        assert (apply(ops.shear_y, turned, slope, fill=7).swapaxes(0, 1) == result).all()


def test_rotation():
    square = NOISE[:, :24]
    assert (apply(ops.rotate, square, 0.0) == square).all()
    assert (apply(ops.rotate, square, 90.0) == np.rot90(square)).all()
    result = apply(ops.rotate, np.full((64, 64, 3), 200, np.uint8), 30.0, fill=128)
    assert (result[0, 0] == 128).all() and (result[32, 32] == 200).all()
    # Two unit squares about one centre, one turned by a, share 2 / (1 + sin a + cos a).
    kept = (result == 200).all(-1).mean()
    assert abs(kept - 2 / (1 + np.sin(np.pi / 6) + np.cos(np.pi / 6))) < 0.02


def test_cutout_is_a_square_about_its_point():
    for x, y in ((10, 12), (0, 0), (31, 23)):
        result = apply(ops.cutout, NOISE, 4.9, x, y)
        wanted = NOISE.copy()
        wanted[max(0, y - 4) : y + 4, max(0, x - 4) : x + 4] = 128
        assert (result == wanted).all()


def test_grey_and_hue():
    assert np.abs(apply(ops.grey, NOISE) - luma(NOISE)[..., None]).max() <= 1
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 200
    assert np.abs(apply(ops.shift_hue, red, 1 / 3)[0, 0] - [0, 200, 0]).max() <= 6
    assert np.abs(apply(ops.shift_hue, red, -1 / 3)[0, 0] - [0, 0, 200]).max() <= 6
    assert np.abs(apply(ops.shift_hue, red, 0.5)[0, 0] - [0, 200, 200]).max() <= 6
    assert (apply(ops.shift_hue, NOISE[..., 0], 0.3) == NOISE[..., 0]).all()


@pytest.mark.parametrize("radius", [0.5, 1.0, 2.0])
def test_blur_has_the_variance_of_its_radius(radius):
    line = np.zeros((41, 41), np.uint8)
    line[20] = 255
    spread = apply(ops.blur, line, radius)[:, 20]
    share = spread / spread.sum()
    variance = (share * (np.arange(41) - 20) ** 2).sum()
    assert abs(variance - radius**2) < 0.25 * radius**2 + 0.1


def numbers(table, level, side=(224, 224)):
    return {name: operation.value(level, side) for name, operation in table.items()}


def test_the_scale_of_augreg():
    """big_vision/pp/autoaugment.py at levels 0, 10 and 15."""
    assert len(ops.RANDAUGMENT) == 16
    ten = numbers(ops.RANDAUGMENT, 10)
    expected = {"rotate": 30, "posterize": 4, "solarize": 256, "solarize_add": 110, "cutout": 40}
    expected |= dict.fromkeys(("color", "contrast", "brightness", "sharpness"), 1.9)
    expected |= {"shear_x": 0.3, "shear_y": 0.3, "translate_x": 100, "translate_y": 100}
    expected |= dict.fromkeys(("autocontrast", "equalize", "invert"), 0)
    assert ten == pytest.approx(expected)
    zero = numbers(ops.RANDAUGMENT, 0)
    assert zero["color"] == pytest.approx(0.1) and zero["rotate"] == zero["solarize"] == 0
    more = numbers(ops.RANDAUGMENT, 15)
    assert more["color"] == pytest.approx(2.8) and more["translate_x"] == pytest.approx(150)
    small = numbers(ops.RANDAUGMENT, 10, side=(32, 64))
    assert small["translate_x"] == pytest.approx(100 * 64 / 224)
    assert small["translate_y"] == pytest.approx(100 * 32 / 224)
    signed = {name for name, operation in ops.RANDAUGMENT.items() if operation.signed}
    assert signed == {"rotate", "shear_x", "shear_y", "translate_x", "translate_y"}


def test_the_space_of_trivial_augment_wide():
    """Müller and Hutter 2021, table 1."""
    assert len(ops.TRIVIAL_AUGMENT) == 14
    least, most = numbers(ops.TRIVIAL_AUGMENT, 0), numbers(ops.TRIVIAL_AUGMENT, 30)
    ends = {"rotate": 135, "shear_x": 0.99, "shear_y": 0.99, "translate_x": 32, "translate_y": 32}
    ends |= dict.fromkeys(("color", "contrast", "brightness", "sharpness"), 0.99)
    for name, end in ends.items():
        assert least[name] == 0 and most[name] == pytest.approx(end)
        assert ops.TRIVIAL_AUGMENT[name].signed
    assert (least["posterize"], most["posterize"]) == (8, 2)
    assert (least["solarize"], most["solarize"]) == (255, 0)
    bright = apply(ops.TRIVIAL_AUGMENT["brightness"].function, DULL, 0.5)
    assert np.abs(bright - np.minimum(DULL * 1.5, 255)).max() <= 1.5


@pytest.mark.parametrize(
    "table", [ops.RANDAUGMENT, ops.TRIVIAL_AUGMENT], ids=["randaugment", "trivial"]
)
@pytest.mark.parametrize("size", [(1, 1), (5, 3), (32, 24)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_every_operation_takes_every_size_level_and_mode(table, size, mode):
    image = Image.fromarray(NOISE).resize(size).convert(mode)
    for operation in table.values():
        for level in (0, 7, 20, 30):
            number = operation.value(level, size[::-1])
            for sign in (1, -1) if operation.signed else (1,):
                place = (0, 0) if operation.at_position else ()
                result = operation.function(image, sign * number, *place)
                assert result.size == size and result.mode == mode

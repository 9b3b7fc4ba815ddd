"""Test-time views: what the model is shown of an image."""

import numpy as np
import pytest
import torch
from PIL import Image

from vitcli.data.augment.test_time import TTATransform
from vitcli.errors import VitcliError
from vitcli.preprocess import Preprocess


@pytest.fixture
def picture():
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))


def resized(picture, size):
    return torch.from_numpy(np.array(picture.resize(size, Image.Resampling.BICUBIC))).permute(
        2, 0, 1
    )


def test_one_view_is_the_transform(picture):
    preprocess = Preprocess(image_size=(16, 16), crop_fraction=0.8)
    views = TTATransform(preprocess)
    assert views.count == 1
    pixels = views.pixels(picture)
    assert torch.equal(pixels[0], preprocess.pixels(picture))
    assert len(views.views(pixels[None])) == 1


def test_the_mirror_image(picture):
    preprocess = Preprocess(image_size=(16, 24), crop_fraction=0.8)
    views = TTATransform(preprocess, "flip")
    plain, mirrored = views.views(views.pixels(picture)[None])
    assert views.count == 2 and torch.equal(plain[0], preprocess.pixels(picture))
    assert torch.equal(mirrored[0], torch.from_numpy(plain[0].numpy()[..., ::-1].copy()))


def test_small_shifts(picture):
    """By one pixel of 32, mirrored at the border; each view is followed by its mirror image."""
    preprocess = Preprocess(image_size=(32, 64), resize_mode="squash")
    views = TTATransform(preprocess, "shifts")
    shown = views.views(views.pixels(picture)[None])
    plain = preprocess.pixels(picture)
    padded = np.pad(plain.numpy(), ((0, 0), (1, 1), (2, 2)), mode="reflect")
    wanted = [plain.numpy(), padded[:, 2:, 4:], padded[:, :-2, :-4]]
    assert views.count == len(shown) == 6
    for view, mirrored, pixels in zip(shown[::2], shown[1::2], wanted, strict=True):
        assert np.array_equal(view[0], pixels)
        assert torch.equal(mirrored, view.flip(-1))


@pytest.mark.parametrize(("kind", "count"), [("crops:5", 5), ("crops:10", 10)])
def test_middle_and_corners(kind, count, picture):
    preprocess = Preprocess(image_size=(16, 16), crop_fraction=0.8)  # 20 x 30 before the crop
    views = TTATransform(preprocess, kind)
    shown = views.views(views.pixels(picture)[None])
    assert views.count == len(shown) == count
    whole = resized(picture, (30, 20))
    step = count // 5
    expected = [whole[:, y : y + 16, x : x + 16] for y, x in ((0, 0), (0, 14), (4, 0), (4, 14))]
    assert torch.equal(shown[0][0], preprocess.pixels(picture))
    for view, corner in zip(shown[step::step], expected, strict=True):
        assert torch.equal(view[0], corner)
    if count == 10:
        assert all(torch.equal(shown[i + 1], shown[i].flip(-1)) for i in range(0, 10, 2))


def test_the_settings_that_leave_nothing_to_crop(picture):
    for settings in ({"resize_mode": "pad"}, {"resize_mode": "squash"}):
        with pytest.raises(VitcliError, match="all crops are the same"):
            TTATransform(Preprocess(image_size=(16, 16), **settings), "crops:5")
    squashed = TTATransform(Preprocess((16, 16), resize_mode="squash", resize_size=20), "crops:5")
    assert torch.equal(squashed.pixels(picture)[4], resized(picture, (20, 20))[:, 4:, 4:])
    for kind in ("crops:3", "crops", "rotate", ""):
        with pytest.raises(VitcliError, match="unknown `--tta` value") as error:
            TTATransform(Preprocess((16, 16)), kind)
        assert "crops:10" in error.value.hint

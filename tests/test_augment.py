"""Augmentation: the statistics of each operation against its definition, and its seeds."""

import numpy as np
import pytest
import torch
from PIL import Image

from vitcli.config import AugmentSection
from vitcli.data.augment import CROPS, TrainTransform, image_rng, inception_box
from vitcli.data.loader import epoch_order
from vitcli.data.transforms import Preprocess

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8))


def section(**settings):
    return AugmentSection(**({"flip_rate": 0.0} | settings))


def test_the_boxes_of_the_inception_crop():
    """Area uniform in 0.05..1 of the picture, log of the ratio uniform in 3/4..4/3."""
    rng = np.random.default_rng(0)
    # Much larger than any crop of it is square, so that few draws are refused.
    boxes = np.array([inception_box((1000, 1000), rng, 0.05) for _ in range(4000)])
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (boxes >= 0).all() and (boxes <= 1000).all()
    ratios = widths / heights
    assert 0.74 < ratios.min() < 0.76 and 1.32 < ratios.max() < 1.35
    assert abs(np.log(ratios).mean()) < 0.01
    areas = widths * heights / 1e6
    small = areas[areas < 0.7]  # below 3/4 every ratio fits, so none is refused
    assert 0.049 < areas.min() < 0.06
    for share in (0.25, 0.5, 0.75):
        assert abs(np.quantile(small, share) - (0.05 + 0.65 * share)) < 0.02
    free = 1000 - widths > 100
    assert abs((boxes[free, 0] / (1000 - widths[free])).mean() - 0.5) < 0.02


def test_a_long_picture_gets_the_central_crop():
    rng = np.random.default_rng(0)
    assert inception_box((3000, 8), rng, 0.9) == (1494, 0, 1505, 8)  # 8 * 4/3, rounded
    assert inception_box((1, 1), rng, 0.05) == (0, 0, 1, 1)


def test_the_crop_shows_its_box():
    """On a ramp a resized box is again a ramp, from the box's left edge to its right one."""
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (256, 1)))
    transform = TrainTransform(Preprocess((32, 32), num_channels=1), section(min_area=0.3))
    for seed in range(20):
        left, _, right, _ = inception_box((256, 256), np.random.default_rng(seed), 0.3)
        wanted = left + (np.arange(32) + 0.5) * (right - left) / 32 - 0.5
        view = transform(ramp, np.random.default_rng(seed))[0].numpy()
        assert np.abs(view[:, 2:-2] - wanted[2:-2]).max() <= 1


def test_the_padded_crop_is_a_shift_over_black():
    transform = TrainTransform(Preprocess((40, 56)), section(crop="pad", crop_padding=4))
    padded = np.pad(np.asarray(NOISE), ((4, 4), (4, 4), (0, 0))).transpose(2, 0, 1)
    seen = set()
    for i in range(400):
        view = transform(NOISE, np.random.default_rng(i)).numpy()
        found = [
            (y, x)
            for y in range(9)
            for x in range(9)
            if (padded[:, y : y + 40, x : x + 56] == view).all()
        ]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) > 75  # of 81


def test_no_crop_is_the_evaluation_picture():
    preprocess = Preprocess((24, 24), crop_fraction=0.875)
    transform = TrainTransform(preprocess, section(crop="none"))
    assert torch.equal(transform(NOISE, np.random.default_rng(0)), preprocess.pixels(NOISE))


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_flips_come_at_their_rate(rate):
    preprocess = Preprocess((40, 56))
    transform = TrainTransform(preprocess, section(crop="none", flip_rate=rate))
    plain = preprocess.pixels(NOISE)
    flipped = 0
    for i in range(300):
        view = transform(NOISE, np.random.default_rng(i))
        assert torch.equal(view, plain) or torch.equal(view, plain.flip(2))
        flipped += torch.equal(view, plain.flip(2))
    assert abs(flipped / 300 - rate) < 0.1


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_crop_gives_the_models_size(crop, channels):
    preprocess = Preprocess((24, 32), num_channels=channels)
    transform = TrainTransform(preprocess, section(crop=crop))
    for size in ((1, 1), (300, 4), (4, 300), (32, 24)):
        view = transform(Image.new(preprocess.mode, size), np.random.default_rng(0))
        assert view.shape == (channels, 24, 32) and view.dtype == torch.uint8


def test_randomness_is_of_seed_epoch_index_and_view():
    draws = {
        key: image_rng(*key).integers(2**62)
        for key in [(s, e, i, v) for s in (0, 1) for e in (0, 1) for i in (0, 1) for v in (0, 1)]
    }
    assert len(set(draws.values())) == 16
    assert all(image_rng(*key).integers(2**62) == value for key, value in draws.items())


def test_the_first_picture_does_not_share_the_epochs_randomness():
    """numpy fills short seeds with zeros, so (seed, epoch) and (seed, epoch, 0, 0) are the same."""
    order = image_rng(0, 0, 0).permutation(100)
    assert (order != epoch_order(100, 0, 0)).any()

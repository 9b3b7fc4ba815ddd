"""Augmentation: the statistics of each operation against its definition, and its seeds."""

import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from vitcli.config.schema import AugmentSection
from vitcli.data import image_set as sets
from vitcli.data.augment.transform import (
    CROPS,
    TrainTransform,
    image_rng,
    inception_box,
    resolve_augment,
    tensorflow_box,
)
from vitcli.data.image_set import ArrayPicture, ImageSet
from vitcli.data.loader import TrainLoader
from vitcli.data.sampler import epoch_order
from vitcli.decode import open_image, read_image
from vitcli.errors import VitcliError
from vitcli.preprocess import RESAMPLING, Preprocess, as_array

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8))


def section(**settings):
    return AugmentSection(**({"flip_rate": 0.0} | settings))


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1, 2**32, 2**70])
def test_the_randomness_of_a_picture_is_numpys_of_its_numbers(seed):
    plain = np.random.default_rng((seed, 3, 41, 2))
    assert (image_rng(seed, 3, 41, 1).random(8) == plain.random(8)).all()


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
    assert stats.kstest(small, stats.uniform(0.05, 0.65).cdf).pvalue > 0.01
    logs = np.log(ratios[areas < 0.7])
    low, high = np.log(3 / 4), np.log(4 / 3)
    assert stats.kstest(logs, stats.uniform(low, high - low).cdf).pvalue > 0.01
    free = 1000 - widths > 100
    assert abs((boxes[free, 0] / (1000 - widths[free])).mean() - 0.5) < 0.02


def expected_area(low=0.05, ratios=(0.75, 1.33), number=4001):
    """Mean area and share below a quarter, of height uniform among those that fit, by integration.

    In a square image of side 1 a box of ratio r has heights from sqrt(low / r) to min(1, 1 / r).
    """
    means, shares = [], []
    for r in np.linspace(*ratios, number):
        a, b = np.sqrt(low / r), min(1.0, 1.0 / r)
        means.append(r * (b**3 - a**3) / 3 / (b - a))
        shares.append((np.sqrt(0.25 / r) - a) / (b - a))
    return np.mean(means), np.mean(shares)


def test_the_boxes_of_tensorflow_are_smaller():
    rng = np.random.default_rng(0)
    boxes = np.array([tensorflow_box((1000, 1000), rng, 0.05) for _ in range(40_000)])
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (boxes >= 0).all() and (boxes <= 1000).all()
    areas, ratios = widths * heights / 1e6, widths / heights
    assert areas.min() >= 0.05 and ratios.min() > 0.745 and ratios.max() < 1.335
    assert stats.kstest(ratios, stats.uniform(0.75, 0.58).cdf).pvalue > 0.001
    mean, share = expected_area()
    assert abs(mean - 0.375) < 0.001 and abs(share - 0.397) < 0.01  # measured in TensorFlow
    assert abs(areas.mean() - mean) < 0.004 and abs((areas < 0.25).mean() - share) < 0.008


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (30, 4), (4, 300), (640, 480), (7, 7)])
def test_tensorflow_boxes_fit_images_of_any_shape(size):
    rng = np.random.default_rng(1)
    for _ in range(300):
        left, top, right, bottom = tensorflow_box(size, rng, 0.05)
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
        whole = (left, top, right, bottom) == (0, 0, *size)
        assert whole or (right - left) * (bottom - top) >= 0.05 * size[0] * size[1]


def test_the_tensorflow_crop_does_not_smooth():
    """Without antialiasing each output pixel is bilinear between its nearest input pixels."""
    preprocess = Preprocess((8, 8), interpolation="bilinear", antialias=False)
    transform = TrainTransform(preprocess, section(crop="inception_tf"))
    view = transform(NOISE, np.random.default_rng(3)).numpy()
    left, top, right, bottom = tensorflow_box(NOISE.size, np.random.default_rng(3), 0.05)
    part = np.asarray(NOISE)[top:bottom, left:right].astype(float)
    for row, column in itertools.product(range(8), range(8)):
        # tf.image.resize: half-pixel centres, clamped at the border.
        y = np.clip((row + 0.5) * part.shape[0] / 8 - 0.5, 0, part.shape[0] - 1)
        x = np.clip((column + 0.5) * part.shape[1] / 8 - 0.5, 0, part.shape[1] - 1)
        y0, x0 = int(y), int(x)
        y1, x1 = min(y0 + 1, part.shape[0] - 1), min(x0 + 1, part.shape[1] - 1)
        upper = part[y0, x0] * (1 - x + x0) + part[y0, x1] * (x - x0)
        lower = part[y1, x0] * (1 - x + x0) + part[y1, x1] * (x - x0)
        value = upper * (1 - y + y0) + lower * (y - y0)
        assert np.abs(view[:, row, column] - value).max() <= 1.0


def test_the_resize_crop_is_a_random_part_of_the_squashed_image():
    preprocess = Preprocess((24, 36), interpolation="bilinear")
    larger = np.asarray(NOISE.resize((42, 28), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    transform, places = TrainTransform(preprocess, section(crop="resize")), set()
    for seed in range(200):
        view = transform(NOISE, np.random.default_rng(seed)).numpy()
        for top, left in itertools.product(range(5), range(7)):
            if (view == larger[:, top : top + 24, left : left + 36]).all():
                places.add((top, left))
                break
        else:
            raise AssertionError(f"seed {seed}: not a part of the resized image")
    assert len(places) == 35  # every place of 5 x 7 occurs
    whole = TrainTransform(preprocess, section(crop="resize", resize_size=24))
    assert whole(NOISE, np.random.default_rng(0)).shape == (3, 24, 36)
    with pytest.raises(VitcliError, match=r"`augment\.resize_size` = 20 is below"):
        TrainTransform(preprocess, section(crop="resize", resize_size=20))


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


@pytest.mark.parametrize(("fill", "mode"), [("black", "constant"), ("reflect", "reflect")])
def test_the_padded_crop_is_a_shift(fill, mode):
    settings = section(crop="pad", crop_padding=4, crop_fill=fill)
    transform = TrainTransform(Preprocess((40, 56)), settings)
    padded = np.pad(np.asarray(NOISE), ((4, 4), (4, 4), (0, 0)), mode=mode).transpose(2, 0, 1)
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


EVERYTHING = AugmentSection(
    preset="strong2",
    brightness=0.4,
    hue=0.1,
    grey_rate=0.3,
    erase_rate=0.5,
    cutmix_alpha=1.0,
    repeats=2,
)


def photographs(n=14):
    """`n` JPEGs of different sizes, large enough that some are decoded at a smaller scale."""
    rng = np.random.default_rng(0)
    for i in range(n):
        small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        file = io.BytesIO()
        small.resize((160 + 40 * i, 120 + 30 * i), Image.Resampling.BICUBIC).save(file, "JPEG")
        yield file.getvalue()


class Files:
    def __init__(self):
        self.files = list(photographs())

    def __len__(self):
        return len(self.files)

    def content(self, row):
        return self.files[row]

    def describe(self, row):
        return f"photograph {row}"


def batches(section, **settings):
    preprocess = Preprocess((32, 40), interpolation="bilinear")
    images = ImageSet("train", "ab", np.arange(14) % 2, Files())
    loader = TrainLoader(
        images,
        TrainTransform(preprocess, section),
        **{"batch_size": 8, "seed": 3, "repeats": section.repeats, **settings},
        augment=resolve_augment(section),
    )
    return list(loader.batches(16, 4))


def mixed(batch):
    images = batch.images.float()
    return images if batch.mix is None else batch.mix.images(images)


@pytest.mark.parametrize("keep", [0, 1 << 40], ids=["read each time", "kept in memory"])
@pytest.mark.parametrize("settings", [{"workers": 1}, {"workers": 3}, {"workers": 3, "parts": 2}])
def test_who_makes_a_picture_changes_nothing(keep, settings, monkeypatch):
    """Everything on at once: 0, 1 and 3 threads, one process or two."""
    monkeypatch.setattr(sets, "CACHE_BYTES", keep)
    wanted = batches(EVERYTHING, workers=0)
    ranks = settings.pop("parts", 1)
    made = [batches(EVERYTHING, **settings, rank=r, world_size=ranks) for r in range(ranks)]
    for batch, *parts in zip(wanted, *made, strict=True):
        for name in ("images", "labels", "indices", "epochs"):
            joined = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(getattr(batch, name), joined)
        assert torch.equal(torch.cat([mixed(part) for part in parts]), mixed(batch))
    assert any(not torch.equal(mixed(b), b.images.float()) for b in wanted)


def test_each_image_of_a_batch_comes_so_often():
    for batch in batches(EVERYTHING, workers=0):
        first, again = batch.indices[:4], batch.indices[4:]
        assert torch.equal(first, again) and len(set(first.tolist())) == 4
        assert not torch.equal(batch.images[:4], batch.images[4:])
    plain = AugmentSection(flip_rate=0.5)
    once = torch.cat([b.indices for b in batches(plain, workers=0, batch_size=4)])
    twice = AugmentSection(flip_rate=0.5, repeats=2)
    found = torch.cat([b.indices[:4] for b in batches(twice, workers=0, batch_size=8)])
    # Batch 2 of 8 places shows images 8..11 of the stream: half as many images are used up.
    order = np.concatenate([epoch_order(14, 3, epoch) for epoch in range(3)])
    assert found.tolist() == order[8:24].tolist() and once.tolist() == order[16:32].tolist()


def test_pictures_do_not_depend_on_what_they_are_mixed_with():
    """Switching mixing on leaves the pictures before it as they were."""
    plain = AugmentSection(preset="light1")
    for with_mix, without in zip(
        batches(AugmentSection(preset="light1", mixup_alpha=0.8), workers=0),
        batches(plain, workers=0),
        strict=True,
    ):
        assert torch.equal(with_mix.images, without.images)
        assert without.mix is None and with_mix.mix is not None


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos", "nearest"])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_crop_is_pillows_crop_resized(interpolation, channels):
    """Where nothing is left out of the file: within two grey levels, one of them mostly."""
    preprocess = Preprocess((32, 40), interpolation=interpolation, num_channels=channels)
    photo = Image.open(io.BytesIO(list(photographs())[3])).convert(preprocess.mode)
    transform = TrainTransform(preprocess, section())
    for seed in range(12):
        box = inception_box(photo.size, np.random.default_rng(seed), 0.05)
        wanted = np.asarray(photo.crop(box).resize((40, 32), RESAMPLING[interpolation]))
        found = transform(photo, np.random.default_rng(seed)).numpy()
        found = found[0] if channels == 1 else found.transpose(1, 2, 0)
        difference = np.abs(found.astype(int) - wanted.astype(int))
        assert difference.max() <= 2 and difference.mean() < 0.2


def test_the_same_crop_whether_a_file_is_read_whole_or_not():
    preprocess = Preprocess((32, 40), interpolation="bilinear")
    transform = TrainTransform(preprocess, section(flip_rate=0.5))
    file = list(photographs())[-1]  # 680 x 510
    for seed in range(20):
        with open_image(file) as picture:
            quick = transform.view(picture, np.random.default_rng(seed)).astype(float)
        whole = transform(read_image(file), np.random.default_rng(seed)).numpy().astype(float)
        other = transform(read_image(file), np.random.default_rng(seed + 1)).numpy()
        # Up to half a pixel apart, on slopes of up to 24 grey levels a pixel.
        assert np.abs(quick - whole).mean() < 6
        assert np.abs(quick - other).mean() > 15  # the comparison can tell


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(32, 40), (30, 44)])
def test_stored_pixels_are_shifted_as_pillow_crops(channels, size):
    """Of the model's size or not: bit for bit, and the stored pixels stay as they are."""
    preprocess = Preprocess((32, 40), num_channels=channels)
    transform = TrainTransform(preprocess, section(crop="pad", crop_padding=31, flip_rate=0.0))
    shape = size if channels == 1 else (*size, 3)
    stored = np.random.default_rng(0).integers(1, 256, shape, dtype=np.uint8)
    stored.flags.writeable = False
    before = stored.copy()
    fitted = preprocess.fit(Image.fromarray(stored))
    for seed in range(20):
        left, top = np.random.default_rng(seed).integers(-31, 32, size=2).tolist()
        wanted = as_array(fitted.crop((left, top, left + 40, top + 32)))
        found = transform.view(ArrayPicture(stored, "stored"), np.random.default_rng(seed))
        assert found.shape == (channels, 32, 40) and np.array_equal(found, wanted)
    assert np.array_equal(stored, before)


def test_a_padding_that_hides_the_image_is_refused():
    for size, padding in (((32, 48), 32), ((224, 224), 8000)):
        with pytest.raises(VitcliError, match=r"crop_padding` = \d+ is not below the image size"):
            TrainTransform(Preprocess(size), section(crop="pad", crop_padding=padding))
    TrainTransform(Preprocess((32, 48)), section(crop="pad", crop_padding=31))
    TrainTransform(Preprocess((32, 32)), section(crop="none", crop_padding=8000))

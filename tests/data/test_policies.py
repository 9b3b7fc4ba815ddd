"""Random changes: which operation how often, how strong, and what erasing covers."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from vitcli.config.schema import AugmentSection
from vitcli.data.augment import operations as ops
from vitcli.data.augment.mixing import mixes_pairs
from vitcli.data.augment.policies import (
    PRESETS,
    change_colours,
    changes_pixels,
    erase_rectangle,
    jitter_colours,
)
from vitcli.data.augment.transform import resolve_augment
from vitcli.errors import VitcliError

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8))


def resolved(**settings):
    return resolve_augment(AugmentSection(**settings))


def watched(table, seen):
    """The table with operations that only note their names and numbers."""

    def noting(name):
        def op(image, number, *place):
            seen.append((name, number, place))
            return image

        return op

    return {name: operation._replace(function=noting(name)) for name, operation in table.items()}


def test_randaugment_draws_all_alike_at_one_magnitude(monkeypatch):
    seen = []
    monkeypatch.setattr(ops, "RANDAUGMENT", watched(ops.RANDAUGMENT, seen))
    rng = np.random.default_rng(0)
    for _ in range(4000):
        change_colours(NOISE, rng, resolved(policy="randaugment", num_ops=2, magnitude=10.0))
    assert len(seen) == 8000
    assert stats.chisquare(list(Counter(name for name, _, _ in seen).values())).pvalue > 0.01
    angles = Counter(number for name, number, _ in seen if name == "rotate")
    assert (
        set(angles) == {30.0, -30.0} and stats.binomtest(angles[30.0], angles.total()).pvalue > 0.01
    )
    assert {number for name, number, _ in seen if name == "color"} == {0.1 + 1.8}
    x, y = np.array([place for name, _, place in seen if name == "cutout"]).T
    assert set(x) == set(range(32)) and set(y) == set(range(24))


def test_trivial_draws_one_at_any_level(monkeypatch):
    seen = []
    monkeypatch.setattr(ops, "TRIVIAL_AUGMENT", watched(ops.TRIVIAL_AUGMENT, seen))
    rng = np.random.default_rng(0)
    for _ in range(9000):
        change_colours(NOISE, rng, resolved(policy="trivial"))
    assert len(seen) == 9000
    assert stats.chisquare(list(Counter(name for name, _, _ in seen).values())).pvalue > 0.01
    shears = np.array([number for name, number, _ in seen if name == "shear_x"])
    levels = np.rint(np.abs(shears) / 0.99 * 30).astype(int)
    assert stats.chisquare(np.bincount(levels, minlength=31)).pvalue > 0.01
    assert stats.binomtest(int((shears > 0).sum()), int((shears != 0).sum())).pvalue > 0.01


def test_three_augment_is_one_of_three(monkeypatch):
    seen = Counter()
    radii = []
    real = ops.blur

    def blur(image, radius):
        radii.append(radius)
        return real(image, radius)

    monkeypatch.setattr(ops, "blur", blur)
    rng = np.random.default_rng(0)
    grey = np.asarray(ops.grey(NOISE))
    solar = np.asarray(NOISE)
    solar = np.where(solar < 128, solar, 255 - solar)
    for _ in range(600):
        result = np.asarray(change_colours(NOISE, rng, resolved(policy="3-augment")))
        seen[
            "grey" if (result == grey).all() else "solar" if (result == solar).all() else "blur"
        ] += 1
    assert seen["blur"] == len(radii) and stats.chisquare(list(seen.values())).pvalue > 0.01
    assert stats.kstest(radii, stats.uniform(0.1, 1.9).cdf).pvalue > 0.01


def test_jitter_factors_are_uniform_and_in_random_order(monkeypatch):
    seen = []
    for name in ("brightness", "contrast", "color", "shift_hue"):

        def op(image, number, name=name):
            seen.append((name, number))
            return image

        monkeypatch.setattr(ops, name, op)
    rng = np.random.default_rng(0)
    how = resolved(brightness=0.4, contrast=1.5, saturation=0.3, hue=0.1)
    for _ in range(1500):
        jitter_colours(NOISE, rng, how)
    ranges = {
        "brightness": (0.6, 0.8),
        "contrast": (0, 2.5),
        "color": (0.7, 0.6),
        "shift_hue": (-0.1, 0.2),
    }
    for name, (low, width) in ranges.items():
        values = [number for other, number in seen if other == name]
        assert len(values) == 1500
        assert stats.kstest(values, stats.uniform(low, width).cdf).pvalue > 0.01
    orders = Counter(tuple(name for name, _ in seen[i : i + 4]) for i in range(0, 6000, 4))
    assert len(orders) == 24 and stats.chisquare(list(orders.values())).pvalue > 0.01


def test_what_has_no_strength_is_left_out():
    rng = np.random.default_rng(0)
    assert (np.asarray(change_colours(NOISE, rng, resolved())) == np.asarray(NOISE)).all()
    assert not changes_pixels(resolved()) and not changes_pixels(resolved(preset="none"))
    dark = jitter_colours(NOISE, np.random.default_rng(1), resolved(brightness=0.5))
    ratio = np.asarray(dark).mean() / np.asarray(NOISE).mean()
    assert 0.5 <= ratio <= 1.5 and ratio != 1


def test_grey_comes_at_its_rate():
    rng = np.random.default_rng(0)
    results = [np.asarray(change_colours(NOISE, rng, resolved(grey_rate=0.2))) for _ in range(500)]
    grey = sum((r == r[..., :1]).all() for r in results)
    assert stats.binomtest(int(grey), 500, 0.2).pvalue > 0.01


def test_erased_areas_and_ratios():
    """Zhong et al. 2020: area uniform in 0.02..0.4, height / width uniform in 0.3..3.33."""
    rng = np.random.default_rng(0)
    areas, ratios, lefts = [], [], []
    for _ in range(1500):
        pixels = np.full((1, 400, 400), -1, dtype=np.int16)
        erase_rectangle(pixels, rng)
        rows, columns = (
            np.nonzero((pixels[0] >= 0).any(1))[0],
            np.nonzero((pixels[0] >= 0).any(0))[0],
        )
        height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        erased = pixels[0, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert (erased >= 0).all() and (pixels >= 0).sum() == height * width
        areas.append(height * width / 160000)
        ratios.append(height / width)
        lefts.append(columns[0] / (400 - width))
    areas, ratios = np.array(areas), np.array(ratios)
    # Below 0.3 every ratio fits into a square, so none is refused.
    small = areas < 0.3
    assert stats.kstest(areas[small], stats.uniform(0.02, 0.28).cdf).pvalue > 0.01
    assert stats.kstest(ratios[small], stats.uniform(0.3, 1 / 0.3 - 0.3).cdf).pvalue > 0.01
    assert areas.max() < 0.41
    assert stats.kstest(lefts, stats.uniform(0, 1).cdf).pvalue > 0.001


def test_erased_pixels_are_noise_over_the_whole_range():
    pixels = np.zeros((3, 200, 200), dtype=np.uint8)
    erase_rectangle(pixels, np.random.default_rng(3))
    values = pixels[pixels > 0]
    assert len(values) > 500
    assert (
        stats.kstest(
            values + np.random.default_rng(0).random(len(values)), stats.uniform(1, 255).cdf
        ).pvalue
        > 0.01
    )
    tiny = np.zeros((3, 1, 1), dtype=np.uint8)
    erase_rectangle(tiny, np.random.default_rng(0))  # nothing fits, nothing happens
    assert (tiny == 0).all()


def test_the_levels_of_augreg():
    """Steiner et al. 2022, as big_vision/configs/vit_i1k.py: (layers, magnitude), mixup."""
    expected = {
        "light1": (2, 0, 0.0),
        "light2": (2, 10, 0.2),
        "medium1": (2, 15, 0.2),
        "medium2": (2, 15, 0.5),
        "strong1": (2, 20, 0.5),
        "strong2": (2, 20, 0.8),
    }
    assert set(PRESETS) == {"none", "3-augment", *expected}
    for name, values in expected.items():
        found = resolved(preset=name)
        assert found.policy == "randaugment"
        assert (found.num_ops, found.magnitude, found.mixup_alpha) == values
    assert resolved(preset="none").model_copy(update={"preset": None}) == resolved()


def test_what_is_given_goes_over_the_preset():
    found = resolved(preset="medium1", magnitude=5.0, mixup_alpha=0.0, erase_rate=0.25)
    assert (found.magnitude, found.mixup_alpha, found.erase_rate) == (5.0, 0.0, 0.25)
    assert found.num_ops == 2 and not mixes_pairs(found)


@pytest.mark.parametrize(
    "settings",
    [{"preset": 3}, {"magnitude": 31.0}, {"hue": 0.6}, {"policy": 1}, {"repeats": 0}],
)
def test_settings_are_checked(settings):
    from vitcli.config.recipe import check
    from vitcli.config.schema import Recipe

    recipe = {"command": "pretrain", "train": {"steps": 1}, "augment": settings}
    with pytest.raises(VitcliError, match=f"augment.{next(iter(settings))}"):
        check(Recipe, recipe, "test")


@pytest.mark.parametrize(
    ("settings", "words", "hint"),
    [
        ({"preset": "medium3"}, "augment.preset `medium3`", "`strong2`"),
        ({"policy": "rand-augment"}, "augment.policy `rand-augment`", "did you mean `randaugment`"),
        ({"crop": "random"}, "augment.crop `random`", "`inception`"),
    ],
)
def test_an_unknown_name_is_an_error_with_the_list_of_the_registry(settings, words, hint):
    with pytest.raises(VitcliError, match=words) as caught:
        resolved(**settings)
    assert hint in caught.value.hint


def test_every_augment_setting_has_a_value_without_a_preset():
    # The default of `resize_size` depends on the model's size.
    assert None not in resolved().model_dump(exclude={"preset", "resize_size"}).values()

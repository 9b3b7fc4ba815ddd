"""Perceptual hashes against the definition, groups against brute force, copies of photographs."""

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy.fft import dctn
from support.pictures import photographs

from vitcli.data.scan import (
    HASH_SIDE,
    MAX_BITS,
    MIN_CORRELATION,
    group_duplicates,
    halved,
    perceptual_hashes,
)


def grey(image):
    return np.asarray(image.convert("L").resize((HASH_SIDE, HASH_SIDE), Image.Resampling.BOX))


def groups_of(images):
    small = np.stack([grey(image) for image in images])
    return group_duplicates(perceptual_hashes(small), halved(small))


def test_the_hash_is_that_of_scipys_cosine_transform():
    rng = np.random.default_rng(0)
    for _ in range(20):
        picture = rng.integers(0, 256, (HASH_SIDE, HASH_SIDE), dtype=np.uint8)
        low = dctn(picture.astype(float), type=2)[:8, :8].ravel()
        above = low > np.median(low[1:])
        above[0] = False
        assert perceptual_hashes(picture[None])[0] == sum(
            1 << i for i in np.flatnonzero(above).tolist()
        )


def test_groups_are_those_of_all_pairs():
    rng = np.random.default_rng(1)
    hashes = rng.integers(0, 2**63, 40, dtype=np.uint64)
    for i in range(20, 40):  # some within reach of an earlier one, some just beyond
        flips = rng.choice(63, size=int(rng.integers(0, 10)), replace=False)
        hashes[i] = hashes[i - 20] ^ np.uint64(sum(1 << int(b) for b in flips))
    thumbs = np.tile(rng.integers(0, 256, (1, 16, 16), dtype=np.uint8), (40, 1, 1))
    found = group_duplicates(hashes, thumbs)
    near = np.array([[(int(a) ^ int(b)).bit_count() <= MAX_BITS for a in hashes] for b in hashes])
    reach = np.linalg.matrix_power(near.astype(float), 40) > 0
    assert ((found[:, None] == found[None]) == reach).all()
    assert 20 < len(set(found.tolist())) < 40  # both kinds were there


def test_the_thumbnail_decides():
    hashes = np.zeros(3, dtype=np.uint64)
    rng = np.random.default_rng(2)
    first, other = rng.integers(0, 256, (2, 16, 16), dtype=np.uint8)
    found = group_duplicates(hashes, np.stack([first, other, first]))
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize("change", ["jpeg", "half", "brighter", "grey", "squashed"])
def test_a_changed_copy_is_found_and_another_picture_is_not(change):
    def changed(image):
        if change == "jpeg":
            file = io.BytesIO()
            image.save(file, "JPEG", quality=40)
            return Image.open(file)
        if change == "brighter":
            return ImageEnhance.Brightness(image).enhance(1.1)
        if change == "grey":
            return image.convert("L")
        return image.resize((48, 48) if change == "half" else (96, 70), Image.Resampling.BILINEAR)

    originals = list(photographs(12))
    found = groups_of([*originals, *map(changed, originals)])
    assert (found[:12] == found[12:]).all()
    assert len(set(found.tolist())) == 12
    assert MIN_CORRELATION > 0.95


def test_thousands_of_blank_pictures_are_one_group_and_no_millions_of_pairs():
    hashes = np.zeros(20_000, dtype=np.uint64)
    thumbs = np.full((20_000, 16, 16), 255, dtype=np.uint8)
    assert len(set(group_duplicates(hashes, thumbs).tolist())) == 1


def test_nothing_has_no_groups():
    assert group_duplicates(np.zeros(0, np.uint64), np.zeros((0, 16, 16), np.uint8)).shape == (0,)

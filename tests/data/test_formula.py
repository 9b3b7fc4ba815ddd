"""Pictures from formulas: pure functions of their number, whoever draws them."""

import time

import numpy as np
import pytest
import torch

from vitcli.config.schema import DataSection
from vitcli.data.formula.dataset import NUM_TEST, NUM_TRAIN, FormulaSet, load_formula
from vitcli.data.formula.shapes import (
    CLASSES,
    TEXTURES,
    Affine,
    KeyedUniform,
    Texture,
    contour_table,
    curve_table,
    distance_to_curve,
    hash_keys,
    inside_contour,
)
from vitcli.data.source import DataRequest

SIZE = (32, 32)


def zeros(count: int) -> np.ndarray:
    return np.zeros(count, dtype=np.int64)


def draw(indices, *, epoch=0, size=SIZE, seed=0, data_seed=0):
    indices = np.asarray(indices, dtype=np.int64)
    return FormulaSet(seed=data_seed).batch(zeros(len(indices)) + epoch, indices, size, seed)


def test_an_image_is_the_same_in_any_company():
    """More than a chunk, in another order, and alone: pictures to the bit."""
    indices = np.arange(77) * 12_345 % NUM_TRAIN
    images, labels = draw(indices)
    order = np.random.default_rng(0).permutation(77)
    shuffled, shuffled_labels = draw(indices[order])
    assert torch.equal(images[order], shuffled)
    assert torch.equal(labels[order], shuffled_labels)
    for k in range(0, 77, 7):
        alone, label = draw(indices[k : k + 1])
        assert torch.equal(alone, images[[k]])
        assert label == labels[k]


def test_views_depend_on_seed_and_epoch_and_scenes_on_the_set():
    base = draw([5, 6])[0]
    assert torch.equal(base, draw([5, 6])[0])
    others = [
        draw([5, 6], epoch=1)[0],
        draw([5, 6], seed=1)[0],
        draw([5, 6], data_seed=1)[0],
        draw([7, 8])[0],
    ]
    for other in others:
        assert not torch.equal(base, other)


@pytest.mark.parametrize("size", [(4, 6), (32, 32), (24, 40), (97, 33)])
def test_any_size(size):
    images, labels = draw(np.arange(40), size=size)
    assert images.shape == (40, 3, *size) and images.dtype == torch.uint8
    assert labels.shape == (40,) and labels.dtype == torch.int64


def test_a_larger_picture_shows_the_same_scene():
    """Formulas have no resolution: a picture of 64 px, reduced, is nearly the one of 32 px."""
    small = draw(np.arange(32))[0].float()
    large = torch.nn.functional.avg_pool2d(draw(np.arange(32), size=(64, 64))[0].float(), 2)
    assert (small - large).abs().mean() < 4
    assert (small - large.roll(1, 0)).abs().mean() > 30


def test_classes_come_in_turn():
    assert torch.equal(draw(np.arange(512))[1], torch.arange(512) % len(CLASSES))


def test_hardly_any_picture_is_empty_or_like_another():
    images = draw(np.arange(256))[0].float()
    assert (images.flatten(1).std(dim=1) > 3).float().mean() > 0.98
    assert len({image.numpy().tobytes() for image in images}) == 256


def test_the_set_reads_like_any_other():
    images = FormulaSet("test", seed=3, size=130, image_size=(20, 30))
    assert len(images) == 130 and len(images.classes) == 64 == len(set(images.classes))
    assert np.bincount(images.labels).tolist() == [3] * 2 + [2] * 62
    picture = images.read(7)
    assert picture.size == (30, 20) and picture.mode == "RGB"
    assert images.read(7, "L").mode == "L"
    assert picture.tobytes() == images.read(7).tobytes() != images.read(8).tobytes()
    assert images.describe(7) == "formula 7 of seed 3"


def test_a_subset_keeps_its_pictures():
    whole = FormulaSet(size=1000, image_size=(16, 16))
    part = whole.subset(np.array([900, 77, 3])).subset(np.array([2, 0]), "few")
    assert (len(part), part.name, whole.name) == (2, "few", "train")
    assert part.labels.tolist() == [3, 900 % 64] and len(whole) == 1000
    for index, scene in enumerate((3, 900)):
        assert part.read(index).tobytes() == whole.read(scene).tobytes()
        assert part.describe(index) == whole.describe(scene) == f"formula {scene} of seed 0"
    drawn = part.batch(zeros(2), np.array([0, 1]), SIZE, seed=5)
    theirs = whole.batch(zeros(2), np.array([3, 900]), SIZE, seed=5)
    assert torch.equal(drawn[0], theirs[0]) and torch.equal(drawn[1], theirs[1])


def test_the_source_has_two_splits_without_a_scene_in_common():
    source = load_formula(DataRequest("builtin:formula"))
    train, test = source.splits["train"], source.splits["test"]
    assert (len(train), len(test)) == (NUM_TRAIN, NUM_TEST)
    assert train.read(0).tobytes() != test.read(0).tobytes()
    assert source.fingerprint == load_formula(DataRequest("builtin:formula")).fingerprint
    assert (
        source.fingerprint
        != load_formula(DataRequest("builtin:formula", DataSection(split_seed=1))).fingerprint
    )


def test_numbers_are_uniform_and_random_access():
    keys = hash_keys(1, np.arange(20_000))
    d = KeyedUniform(keys)
    first, rest = d.uniform(), d.uniforms(3)
    assert abs(first.mean() - 0.5) < 0.01 and abs(first.std() - 12**-0.5) < 0.01
    assert first.min() >= 0 and first.max() < 1
    assert abs(np.corrcoef(np.column_stack([first, rest]).T) - np.eye(4)).max() < 0.03
    assert np.array_equal(KeyedUniform(keys[77:78]).uniforms(4)[0], np.append(first[77], rest[77]))
    assert len(np.unique(hash_keys(0, np.arange(1000), 0))) == 1000
    assert hash_keys(1, 2) != hash_keys(2, 1)


def test_distance_to_a_curve_is_the_distance_to_its_nearest_point():
    x, y = np.meshgrid(np.linspace(-1, 1, 9, dtype=np.float32), np.float32([-0.5, 0.25, 1.0]))
    points = np.float32([[[-0.5, -0.5], [0.5, 0.0], [0.0, 0.75]]])
    t = np.linspace(0, 1, 20_001)[:, None]
    corners = points[0].astype(np.float64)
    dense = np.concatenate(
        [corners[i] * (1 - t) + corners[i + 1] * t for i in range(len(corners) - 1)]
    )
    true = np.hypot(x[..., None] - dense[:, 0], y[..., None] - dense[:, 1]).min(axis=-1)
    np.testing.assert_allclose(distance_to_curve(x[None], y[None], points)[0], true, atol=1e-4)


def test_a_contour_is_its_fourier_series():
    angle = np.linspace(-3, 3, 50, dtype=np.float32)
    coefficients = contour_table()[:1]
    n = np.arange(1, coefficients.shape[2] + 1)[:, None]
    a, b = coefficients[0, 0][:, None], coefficients[0, 1][:, None]
    radius = 0.85 + (a * np.cos(n * angle) + b * np.sin(n * angle)).sum(axis=0)
    x, y = (radius * np.cos(angle))[None, None], (radius * np.sin(angle))[None, None]
    np.testing.assert_allclose(inside_contour(x, y, coefficients), 0, atol=1e-5)
    assert (inside_contour(x * 0.9, y * 0.9, coefficients) > 0).all()


def test_a_texture_is_a_sum_of_waves():
    kind = np.arange(len(TEXTURES))
    texture = Texture.sample(KeyedUniform(hash_keys(9, kind)), kind)
    turn = np.float32([0.3] * len(kind))
    view = Affine.from_scale_and_angle(turn, turn + 1, turn + 0.5, np.stack([turn, -turn], axis=-1))
    x, y = np.linspace(-1, 1, 7, dtype=np.float32), np.linspace(-1, 1, 5, dtype=np.float32)
    field = texture.evaluate(view, x, y, np.zeros(len(kind), dtype=np.float32))
    p, q = view.map_grid(x, y)
    kx, ky = (texture.vectors[..., i, None, None] for i in (0, 1))
    inside = kx * p[:, None] + ky * q[:, None] + texture.phases[..., None, None]
    waves = (texture.amplitudes[..., None, None] * np.cos(inside)).sum(axis=1)
    true = np.clip(0.5 + texture.contrast[:, None, None] * waves, 0, 1)
    np.testing.assert_allclose(field, true, atol=1e-4)
    assert (field[0] == 0.5).all()


def test_maps_compose_and_invert():
    d = KeyedUniform(hash_keys(4, np.arange(6)))
    maps = [
        Affine.from_scale_and_angle(
            d.uniform(-3, 3), d.uniform(0.5, 2), d.uniform(0.5, 2), d.uniforms(2)
        )
        for _ in (0, 1)
    ]
    x, y = np.float32([0.0, 0.5, -1.0]), np.float32([0.25])
    back = maps[0].inverse().compose(maps[0])
    np.testing.assert_allclose(back.map_grid(x, y)[0], np.broadcast_to(x, (6, 1, 3)), atol=1e-5)
    both = maps[1].compose(maps[0])
    for k in range(6):
        a, b = (np.vstack([np.c_[m.matrix[k], m.shift[k]], [0, 0, 1]]) for m in maps)
        c = np.vstack([np.c_[both.matrix[k], both.shift[k]], [0, 0, 1]])
        np.testing.assert_allclose(c, b @ a, atol=1e-5)


def test_shapes_fill_their_frame():
    curves = curve_table()
    assert np.abs(curves).max() <= 1 and (np.abs(curves).max(axis=(1, 2)) > 0.5).all()
    assert np.linalg.norm(contour_table(), axis=1).sum(axis=1).max() < 0.85


def test_fast_enough_to_be_drawn_while_training():
    """2,700 pictures a second and core of 32 px were measured; training eats a few hundred."""
    draw(np.arange(64))
    start = time.thread_time()
    draw(np.arange(256))
    assert 256 / (time.thread_time() - start) > 500

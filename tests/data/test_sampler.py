"""Class samplers: the expected frequencies, no state, and the same for any number of processes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import train_tiny, weights

from vitcli.config.schema import AugmentSection
from vitcli.data.augment.transform import TrainTransform
from vitcli.data.image_set import ArrayStore, ImageSet
from vitcli.data.loader import TrainLoader
from vitcli.data.sampler import POWERS, ClassSampler, make_sampler
from vitcli.errors import VitcliError
from vitcli.preprocess import Preprocess
from vitcli.train.loop import Loop
from vitcli.train.signals import Stopped

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=8)


def labels_of(sizes, seed):
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))


@settings(deadline=None, max_examples=40)
@given(SIZES, st.sampled_from(sorted(POWERS)), st.integers(0, 2**32 - 1), st.integers(1, 7))
def test_classes_and_images_have_the_frequencies_that_they_should(sizes, name, seed, epochs):
    labels = labels_of(sizes, seed)
    n, counts = len(labels), np.array(sizes)
    sampler = ClassSampler(labels, seed, POWERS[name])
    rounds, indices = sampler(0, n * epochs)
    share = np.ones(len(sizes)) if name == "class_balanced" else np.sqrt(counts)
    drawn = np.bincount(labels[indices], minlength=len(sizes))
    assert np.abs(drawn - n * epochs * share / share.sum()).max() < 1 + 1e-9
    shown = np.bincount(indices, minlength=n)
    for label in range(len(sizes)):  # within a class, no image is ahead of another by two
        assert np.ptp(shown[labels == label]) <= 1
    # The round counts the earlier showings, so that no image is augmented twice in the same way.
    assert len({*zip(rounds.tolist(), indices.tolist(), strict=True)}) == n * epochs
    for index in range(n):
        assert sorted(rounds[indices == index]) == list(range(shown[index]))


@settings(deadline=None, max_examples=30)
@given(SIZES, st.sampled_from(sorted(POWERS)), st.integers(0, 99), st.data())
def test_a_position_depends_on_nothing_before_it(sizes, name, seed, data):
    labels = labels_of(sizes, seed)
    whole = np.stack(ClassSampler(labels, seed, POWERS[name])(0, 4 * len(labels)))
    start = data.draw(st.integers(0, 3 * len(labels)))
    count = data.draw(st.integers(1, len(labels)))
    fresh = np.stack(ClassSampler(labels, seed, POWERS[name])(start, count))
    assert (fresh == whole[:, start : start + count]).all()


def test_equal_classes_are_drawn_as_without_a_sampler():
    """Each image once per epoch, in the order of another stream."""
    labels = np.arange(30) % 3
    rounds, indices = ClassSampler(labels, 0, 0.0)(30, 30)
    assert sorted(indices.tolist()) == list(range(30)) and set(rounds.tolist()) == {1}
    orders = {tuple(ClassSampler(labels, s, 0.0)(30 * e, 30)[1]) for s in (0, 1) for e in (0, 1)}
    assert len(orders) == 4


@pytest.mark.parametrize("repeats", [1, 2])
def test_processes_and_threads_make_the_same_batches(repeats):
    pixels = np.random.default_rng(0).integers(0, 256, (23, 9, 9, 3), dtype=np.uint8)
    labels = np.array([0] * 18 + [1] * 4 + [2])
    images = ImageSet("train", ("a", "b", "c"), labels, ArrayStore("memory", pixels))

    def batches(workers=0, **more):
        transform = TrainTransform(Preprocess((6, 8)), AugmentSection(flip_rate=0.5))
        loader = TrainLoader(
            images, transform, batch_size=8, seed=1, workers=workers, repeats=repeats,
            sampler="class_balanced", **more,
        )  # fmt: skip
        return [(b.indices.numpy(), b.images.numpy()) for b in loader.batches(16, 6)]

    whole = batches()
    halves = [batches(rank=rank, world_size=2) for rank in range(2)]
    for i, (indices, pictures) in enumerate(whole):
        assert (np.concatenate([half[i][0] for half in halves]) == indices).all()
        assert (np.concatenate([half[i][1] for half in halves]) == pictures).all()
    threaded = batches(workers=3)
    assert all(
        (a == b).all() and (c == d).all() for (a, c), (b, d) in zip(whole, threaded, strict=True)
    )
    # The one image of the smallest class comes often, and not twice with the same crop.
    shown = np.concatenate([p[i == 22] for i, p in whole])
    assert len(np.unique(shown, axis=0)) > len(shown) / 2 > 4


@pytest.mark.parametrize("name", sorted(POWERS))
def test_a_resume_is_exact(tmp_path, name):
    # 23 steps of 64 images are more than an epoch; a round of a small class goes on in the next.
    settings = {"data": {"sampler": name}, "train": {"steps": 24, "batch_size": 64}}
    train_tiny(tmp_path / "whole", **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "_stop_request", lambda run, _: 15 if run.state.step == 12 else None)
        with pytest.raises(Stopped):
            train_tiny(tmp_path / "parts", **settings)
    train_tiny(tmp_path / "parts", resume=True, **settings)
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts")


def test_the_order_without_a_sampler_is_the_shuffled_one():
    images = ImageSet("train", ("a",), np.zeros(9, np.int64), ArrayStore("m", np.zeros((9, 2, 2))))
    epochs, indices = make_sampler("shuffle", images, 5)(9, 9)
    assert (indices == np.random.default_rng((5, 1)).permutation(9)).all() and (epochs == 1).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"data": {"streaming": True}}, "a stream is read in its own order"),
        ({"data": {"name": "builtin:formula"}, "model": {"image_size": 32}}, "classes of one size"),
        ({"objective": {"class_weights": "balanced"}}, "not both"),
        ({"objective": {"logit_adjustment": 1.0}}, "not both"),
    ],
)
def test_a_sampler_that_does_not_fit_is_one_error(tmp_path, settings, words):
    data = {"sampler": "class_balanced", **settings.get("data", {})}
    with pytest.raises(VitcliError, match=words):
        train_tiny(tmp_path / "run", **{**settings, "data": data})
    assert not (tmp_path / "run").exists()

"""NumPy archives in the layouts of MedMNIST and Keras."""

import numpy as np
import pytest

from vitcli.data.source import load_data
from vitcli.errors import VitcliError


def images(n, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def save(path, **arrays):
    np.savez_compressed(path, **arrays)
    return str(path)


def pixels(part):
    return np.stack([np.asarray(part.read(i)) for i in range(len(part))])


def test_medmnist(tmp_path):
    """`*_labels` are (n, 1); grey images become RGB."""
    arrays = {}
    for number, split in enumerate(("train", "val", "test")):
        arrays[f"{split}_images"] = images(6, 28, 28, seed=number)
        arrays[f"{split}_labels"] = np.array([[11], [2], [0], [2], [11], [0]], dtype=np.uint8)
    data = load_data(save(tmp_path / "x.npz", **arrays))
    assert data.classes == ("0", "2", "11")
    assert list(data.splits) == ["train", "validation", "test"]
    for split, name in (("train", "train"), ("val", "validation"), ("test", "test")):
        assert data.splits[name].labels.tolist() == [2, 1, 0, 1, 2, 0]
        expected = np.repeat(arrays[f"{split}_images"][..., None], 3, axis=3)
        assert (pixels(data.splits[name]) == expected).all()


@pytest.mark.parametrize(
    "keys", [("x_train", "y_train", "x_test", "y_test"), ("trainX", "trainY", "X_test", "test_y")]
)
def test_keras(tmp_path, keys):
    arrays = [
        images(4, 8, 9, 3),
        np.array([0, 1, 1, 0]),
        images(2, 8, 9, 3, seed=1),
        np.array([1, 0]),
    ]
    data = load_data(save(tmp_path / "x.npz", **dict(zip(keys, arrays, strict=True))))
    assert {name: len(s) for name, s in data.splits.items()} == {"train": 4, "test": 2}
    assert (pixels(data.splits["test"]) == arrays[2]).all()
    assert data.splits["test"].labels.tolist() == [1, 0]


def test_names_and_channels_first(tmp_path):
    first = images(3, 3, 8, 9)
    path = save(
        tmp_path / "x.npz", images=first, labels=np.array([2, 0, 2]),
        class_names=np.array(["ant", "bee", "cat"]),
    )  # fmt: skip
    data = load_data(path, whole=True)
    assert data.classes == ("ant", "bee", "cat")
    assert [data.splits["train"].label_name(i) for i in range(3)] == ["cat", "ant", "cat"]
    assert (pixels(data.splits["train"]) == first.transpose(0, 2, 3, 1)).all()
    other = load_data(save(tmp_path / "y.npz", x=first, y=np.array(["b", "a", "b"])), whole=True)
    assert other.classes == ("a", "b")


def test_one_hot_and_several_labels(tmp_path):
    path = save(tmp_path / "x.npz", images=images(3, 8, 8), labels=np.eye(4)[[3, 0, 1]])
    data = load_data(path, whole=True)
    assert not data.multi_label
    assert data.splits["train"].labels.tolist() == [3, 0, 1]
    several = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]], dtype=np.uint8)
    data = load_data(save(tmp_path / "y.npz", images=images(3, 8, 8), labels=several), whole=True)
    assert data.multi_label and (data.splits["train"].targets == several).all()


@pytest.mark.parametrize(
    ("dtype", "factor", "white"),
    [(np.float32, 1 / 255, "1"), (np.float64, 1, "255"), (int, 1, "255")],
)
def test_other_types_are_scaled_by_the_range_of_all_splits(tmp_path, dtype, factor, white):
    train, test = images(4, 8, 8), images(2, 8, 8) // 128  # a dark split
    train[0, 0, 0] = 255
    arrays = {"x_train": train * factor, "x_test": test * factor}
    arrays = {key: value.astype(dtype) for key, value in arrays.items()}
    data = load_data(
        save(tmp_path / "x.npz", **arrays, y_train=[0, 1, 0, 1], y_test=[0, 1]), whole=True
    )
    assert (pixels(data.splits["train"])[..., 0] == train).all()
    assert (pixels(data.splits["test"])[..., 0] == test).all()
    assert f"{white} is taken as white" in data.notes[0]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"kernel": np.zeros(3)}, "no arrays of images with their labels; it has `kernel`"),
        ({"train_images": images(3, 8, 8)}, "no arrays of images with their labels"),
        ({"images": images(3, 8, 8), "labels": np.arange(2)}, "3 train images, but 2 labels"),
        ({"images": images(3, 8, 8, 8), "labels": np.arange(3)}, "have the shape 3 x 8 x 8 x 8"),
        ({"images": images(3, 8, 8, 3) - 100.0, "labels": np.arange(3)}, "with values from -"),
        ({"images": images(3, 8, 8), "labels": np.arange(3) / 2}, "are fractions, such as 0.5"),
        ({"images": images(3, 8, 8), "labels": np.full((3, 2), 7)}, "have the shape 3 x 2"),
        ({"images": images(3, 8, 8), "labels": np.zeros(3, int)}, "only one class: `0`"),
        ({"images": images(3, 8, 8), "labels": np.array([0, 1, None])}, "holds Python objects"),
        ({"images": images(2, 8, 8), "x": images(2, 8, 8), "y": [0, 1]}, "two arrays"),
    ],
)  # fmt: skip
def test_arrays_that_cannot_be_used(tmp_path, arrays, message):
    with pytest.raises(VitcliError, match=message) as caught:
        load_data(save(tmp_path / "x.npz", **arrays))
    assert caught.value.hint


def test_a_file_that_is_no_archive(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"no")
    with pytest.raises(VitcliError, match="cannot read"):
        load_data(str(tmp_path / "x.npz"))

"""Copies and groups never straddle a split; data without any are divided as before."""

import hashlib
import json
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image
from support.watching import Told

from vitcli.data import copies
from vitcli.data.source import load_data
from vitcli.data.stratify import fold_of, spread_slice, stratified_split
from vitcli.errors import VitcliError


def grouped_labels(seed):
    """(labels, groups): some hundred images in groups of one to twelve, most of one class."""
    rng = np.random.default_rng(seed)
    n, classes = int(rng.integers(20, 400)), int(rng.integers(2, 7))
    groups = np.repeat(np.arange(n), rng.integers(1, int(rng.integers(2, 13)), n))[:n]
    main = rng.integers(0, classes, n)[groups]
    labels = np.where(rng.random(n) < 0.9, main, rng.integers(0, classes, n))
    order = rng.permutation(n)
    return labels[order], rng.permutation(n)[groups[order]]


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5])
def test_a_split_divides_no_group_and_leaves_every_class(seed, fraction):
    labels, groups = grouped_labels(seed)
    keep, aside = stratified_split(labels, fraction, seed, groups)
    assert np.array_equal(np.sort(np.concatenate([keep, aside])), np.arange(len(labels)))
    assert not np.intersect1d(groups[keep], groups[aside]).size
    assert np.array_equal(np.unique(labels[keep]), np.unique(labels))
    if fraction == 0.2 and np.bincount(groups).max() * 10 < len(labels):
        assert abs(len(aside) / len(labels) - fraction) < 0.1


@pytest.mark.parametrize("seed", range(20))
def test_folds_and_slices_divide_no_group(seed):
    labels, groups = grouped_labels(seed)
    folds = [fold_of(labels, 4, fold, seed, groups) for fold in range(4)]
    assert np.array_equal(np.sort(np.concatenate([f[1] for f in folds])), np.arange(len(labels)))
    for keep, aside in folds:
        assert not np.intersect1d(groups[keep], groups[aside]).size
    n = len(labels)
    cuts = [0, n // 3, n // 2, n]
    parts = [spread_slice(labels, seed, a, b, groups) for a, b in pairwise(cuts)]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(n))


@pytest.mark.parametrize("seed", range(20))
def test_groups_of_one_change_nothing(seed):
    labels = grouped_labels(seed)[0]
    alone = np.random.default_rng(seed).permutation(len(labels))
    for fraction in (0.1, 0.2, 0.9):
        plain, grouped = (stratified_split(labels, fraction, seed, g) for g in (None, alone))
        assert np.array_equal(plain[1], grouped[1])
    plain, grouped = (fold_of(labels, 3, 1, seed, g) for g in (None, alone))
    assert np.array_equal(plain[1], grouped[1])


def test_images_in_no_group_are_single():
    labels = np.arange(40) % 2
    plain = stratified_split(labels, 0.2, 0)[1]
    assert np.array_equal(stratified_split(labels, 0.2, 0, np.full(40, -1))[1], plain)


def test_the_split_of_data_without_copies_has_the_bits_of_the_first_version():
    """Written out here: a permutation per class, seeded by (seed, class), cut at the fraction."""
    labels = np.random.default_rng(0).integers(0, 5, 300)
    wanted = []
    for label in range(5):
        members = np.flatnonzero(labels == label)
        count = round(len(members) * 0.2)
        wanted += np.random.default_rng((7, label)).permutation(members)[:count].tolist()
    assert stratified_split(labels, 0.2, 7)[1].tolist() == sorted(wanted)


def picture(path, number, side=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), (number, 0, 0)).save(path)


def digests(images):
    paths = [images.content(i) for i in range(len(images))]
    return {hashlib.md5(path.read_bytes()).hexdigest() for path in paths}


def with_copies(root):
    """Two classes of 20 images, each three times under other names."""
    for label in "ab":
        for i in range(20):
            for again in range(3):
                picture(root / label / f"{again} {i}.png", 2 * i + (label == "b"))
    return str(root)


@pytest.mark.parametrize(
    "settings",
    [{}, {"folds": 4, "fold": 1}, {"validation_fraction": 0.2}, {"test_split": "train[:20%]"}],
)
def test_copies_of_a_folder_stay_together(tmp_path, settings):
    data = load_data(with_copies(tmp_path), **settings)
    found = [digests(images) for images in data.splits.values()]
    assert len(found) > 1
    assert sum(map(len, found)) == len(set.union(*found)) == 40
    assert any("80 images are exact copies of other images" in note for note in data.notes)


@pytest.mark.parametrize("kind", ["table", "parquet"])
def test_copies_of_other_data_stay_together(tmp_path, kind):
    with_copies(tmp_path)
    files = sorted(tmp_path.glob("*/*.png"))
    if kind == "table":
        rows = [f"{p.relative_to(tmp_path)},{p.parent.name}" for p in files]
        path = tmp_path / "x.csv"
        path.write_text("path,label\n" + "\n".join([*rows, *rows]))
    else:
        import datasets

        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
        )
        rows = [
            {"image": {"bytes": p.read_bytes(), "path": None}, "label": p.parent.name}
            for p in files
        ]
        path = tmp_path / "x.parquet"
        datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    data = load_data(path)
    levels = [
        {images.read(i).getpixel((0, 0)) for i in range(len(images))}
        for images in data.splits.values()
    ]
    assert [len(part) for part in levels] == [32, 8] and not set.intersection(*levels)
    copies_found = 200 if kind == "table" else 80
    assert any(f"{copies_found} images are exact copies" in note for note in data.notes)


def test_a_class_of_one_image_stays_in_train(tmp_path):
    for i in range(10):
        picture(tmp_path / "a" / f"{i}.png", 7)
        picture(tmp_path / "b" / f"{i}.png", 10 * i)
    data = load_data(str(tmp_path))
    assert np.bincount(data.splits["test"].labels).tolist() == [0, 2]
    assert any("1 of 2 classes has no test images" in note for note in data.notes)


def test_classes_of_one_image_each_are_divided_with_a_note(tmp_path):
    """Nothing else could be held out: drawings in one colour, for a quick trial."""
    for i in range(10):
        picture(tmp_path / "a" / f"{i}.png", 7)
        picture(tmp_path / "b" / f"{i}.png", 8)
    data = load_data(str(tmp_path))
    assert {k: len(s) for k, s in data.splits.items()} == {"train": 16, "test": 4}
    assert any("accuracy on test means nothing" in note for note in data.notes)


def test_equal_sizes_are_not_enough(tmp_path):
    for i in range(40):
        path = tmp_path / "ab"[i % 2] / f"{i}.ppm"
        picture(path, i)
    sizes = {path.stat().st_size for path in tmp_path.glob("*/*")}
    assert len(sizes) == 1
    data = load_data(str(tmp_path))
    assert not any("copies" in note for note in data.notes)


def test_large_files_that_are_equal_in_the_middle(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (120, 120, 3), dtype=np.uint8)
    for i in range(20):
        pixels[0, 0] = i
        folder = tmp_path / "ab"[i % 2]
        folder.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{i}.ppm")
    assert not any("copies" in note for note in load_data(str(tmp_path)).notes)


def test_given_splits_that_share_images(tmp_path):
    for split, numbers in (("train", range(12)), ("val", range(12, 16)), ("test", range(9, 17))):
        for i in numbers:
            picture(tmp_path / split / "ab"[i % 2] / f"{split}{i}.png", i)
    watch = Told()
    load_data(str(tmp_path)).tell(watch)
    notes = watch.warnings  # loud, because figures on these images are too high
    assert any("3 of 8 test images are exact copies of train images" in note for note in notes)
    assert any("4 of 8 test images are exact copies of validation images" in note for note in notes)
    assert {k: len(s) for k, s in load_data(str(tmp_path)).splits.items()} == {
        "train": 12,
        "validation": 4,
        "test": 8,
    }


def test_a_comparison_that_would_take_long_is_left_to_check(tmp_path, monkeypatch):
    monkeypatch.setattr(copies, "MAX_LEAK_READS", 10)
    for split, numbers in (("train", range(12)), ("test", range(9, 17))):
        for i in numbers:
            picture(tmp_path / split / "ab"[i % 2] / f"{split}{i}.ppm", i)
    (note,) = load_data(str(tmp_path)).notes
    assert f"`vitcli check {tmp_path}` does" in note


def test_arrays_that_share_images(tmp_path):
    pixels = np.arange(24, dtype=np.uint8)[:, None, None] * np.ones((1, 8, 8), dtype=np.uint8)
    labels = np.arange(24) % 2
    arrays = {"train_images": pixels[:16], "train_labels": labels[:16]}
    arrays |= {"test_images": pixels[13:], "test_labels": labels[13:]}
    np.savez(tmp_path / "x.npz", **arrays)
    notes = load_data(tmp_path / "x.npz").notes
    assert any("3 of 11 test images are exact copies of train images" in note for note in notes)


def test_only_files_that_share_a_size_are_read(tmp_path, monkeypatch):
    for i in range(20):
        picture(tmp_path / "ab"[i % 2] / f"{i}.ppm", i, side=8 + i)
    (tmp_path / "a/copy.ppm").write_bytes((tmp_path / "a/0.ppm").read_bytes())
    read = []
    real = copies._file_digest
    monkeypatch.setattr(
        copies, "_file_digest", lambda p, whole: read.append(p.name) or real(p, whole)
    )
    load_data(str(tmp_path))
    assert sorted(set(read)) == ["0.ppm", "copy.ppm"]
    read.clear()
    load_data(str(tmp_path), whole=True)
    assert not read


def table_of_patients(root, column):
    """30 patients with four images each; the class is the patient's."""
    rows = [f"path,label,{column}"]
    for i in range(120):
        picture(root / f"{i}.png", i)
        rows.append(f"{i}.png,{'sick' if i // 4 % 3 else 'well'},p{i // 4}")
    (root / "x.csv").write_text("\n".join(rows))
    return str(root / "x.csv")


def patients(images):
    return {int(images.content(i).stem) // 4 for i in range(len(images))}


@pytest.mark.parametrize("column", ["patient_id", "group"])
def test_groups_stay_together(tmp_path, column):
    path = table_of_patients(tmp_path, column)
    settings = {} if column == "group" else {"group_column": column}
    data = load_data(path, **settings)
    assert {k: len(s) for k, s in data.splits.items()} == {"train": 96, "test": 24}
    assert not patients(data.splits["train"]) & patients(data.splits["test"])
    assert np.bincount(data.splits["test"].labels).tolist() == [16, 8]
    assert any(
        f"with the same `{column}` stay in the same split (30 groups)" in n for n in data.notes
    )
    plain = load_data(path).notes
    hint = "data.group_column=patient_id"
    assert any(hint in note for note in plain) == (column == "patient_id")


def test_groups_of_parquet(tmp_path):
    import datasets

    table_of_patients(tmp_path, "patient")
    rows = [
        {
            "image": {"bytes": (tmp_path / f"{i}.png").read_bytes(), "path": f"{i}.png"},
            "label": i % 2,
            "patient": f"p{i // 4}",
        }
        for i in range(120)
    ]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["a", "b"]),
            "patient": datasets.Value("string"),
        }
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "x.parquet")
    data = load_data(tmp_path / "x.parquet", group_column="patient")
    found = [{int(s.file_name(i)[:-4]) // 4 for i in range(len(s))} for s in data.splits.values()]
    assert len(found[1]) == 6 and not found[0] & found[1]


def test_copies_join_groups(tmp_path):
    """p0 and p1 share an image, so their eight images are one unit."""
    path = table_of_patients(tmp_path, "group")
    (tmp_path / "4.png").write_bytes((tmp_path / "0.png").read_bytes())
    for seed in range(8):
        data = load_data(path, split_seed=seed)
        for images in data.splits.values():
            assert len({0, 1} & patients(images)) != 1


def test_groups_in_given_splits(tmp_path):
    rows = [f"{i}.png,{'ab'[i % 2]},p{i // 4},{'test' if i > 16 else 'train'}" for i in range(24)]
    for i in range(24):
        picture(tmp_path / f"{i}.png", i)
    (tmp_path / "x.csv").write_text("path,label,group,split\n" + "\n".join(rows))
    notes = load_data(str(tmp_path / "x.csv")).notes
    assert any("1 of 2 groups of the test images is also in train" in note for note in notes)


@pytest.mark.parametrize("notation", ["builtin:digits", "folder", "table"])
def test_a_group_column_that_does_not_exist(tmp_path, notation):
    for i in range(8):
        picture(tmp_path / "ab"[i % 2] / f"{i}.png", i)
    rows = [json.dumps({"path": f"{'ab'[i % 2]}/{i}.png", "label": i % 2}) for i in range(8)]
    (tmp_path / "x.jsonl").write_text("\n".join(rows))
    where = {"folder": str(tmp_path), "table": str(tmp_path / "x.jsonl")}.get(notation, notation)
    with pytest.raises(VitcliError, match=r"has no column `who`|has no columns"):
        load_data(where, group_column="who")

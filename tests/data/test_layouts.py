"""Folder layouts as people have them: the images and classes of each, and the notes."""

import os

import numpy as np
import pytest
from PIL import Image

from vitcli.data.readers.folder import walk_images
from vitcli.data.source import load_data
from vitcli.errors import VitcliError

CATS_AND_DOGS = ("cat/1.png", "cat/2.png", "dog/1.png")


def under(*folders):
    return [f"{folder}/{path}" for folder in folders for path in CATS_AND_DOGS]


def build(root, paths):
    """The tree; a path without an image suffix becomes a text file, one with a slash a folder."""
    for number, path in enumerate(paths):
        file = root / path
        if path.endswith("/"):
            file.mkdir(parents=True)
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix in (".png", ".jpg"):
            Image.new("L", (3, 2), number % 250).save(file)
        else:
            file.write_text("x")
    return root


def content(data, root):
    """Split -> class -> paths below `root`."""
    found = {}
    for split, images in data.splits.items():
        classes = found.setdefault(split, {})
        for i in range(len(images)):
            path = os.path.relpath(images.describe(i), root)
            classes.setdefault(images.label_name(i), set()).add(path)
    return found


def classes_of(folder, names=("cat", "dog")):
    """Class -> the images that `under(folder)` has made of it."""
    chosen = under(folder) if folder else list(CATS_AND_DOGS)
    start = f"{folder}/" if folder else ""
    return {name: {p for p in chosen if p.startswith(f"{start}{name}/")} for name in names}


def splits_of(**folders):
    return {split: classes_of(folder) for split, folder in folders.items()}


FLAT = {"train": classes_of("")}

# name: (paths, expected content, words of a note)
LAYOUTS = {
    "plain": (CATS_AND_DOGS, FLAT, ()),
    "iNaturalist": (
        under("train_mini", "val"), splits_of(train="train_mini", validation="val"), (),
    ),
    "a class train beside another": (
        ["train_station/1.png", "train_station/2.png", "cat/1.png", "cat/2.png"],
        {
            "train": {
                "train_station": {"train_station/1.png", "train_station/2.png"},
                "cat": {"cat/1.png", "cat/2.png"},
            }
        },
        (),
    ),
    # System folders and files
    "Synology": (
        [*CATS_AND_DOGS, "@eaDir/x/1.png", "cat/@eaDir/1.png/SYNOPHOTO_THUMB_M.jpg"],
        FLAT,
        ("`@eaDir (2)`",),
    ),
    "system folders": (
        [
            *CATS_AND_DOGS, "$RECYCLE.BIN/1.png", "System Volume Information/1.png",
            "__MACOSX/cat/._1.png", ".ipynb_checkpoints/1.png", ".git/1.png", "lost+found/1.png",
            "#recycle/1.png", ".thumbnails/1.png", ".Trash-1000/files/1.png", "@Recycle/1.png",
        ],
        FLAT,
        ("skipped system folders and hidden files", "`$RECYCLE.BIN`", "and 5 more"),
    ),
    "system files": (
        [
            *CATS_AND_DOGS, "cat/Thumbs.db", "cat/._1.png", "cat/._2.png", ".DS_Store",
            "dog/.DS_Store",
        ],
        FLAT,
        ("`.DS_Store (2)`, `._* (2)`, `Thumbs.db`",),
    ),
    # Outputs of commands
    "runs": (
        [
            *CATS_AND_DOGS, "runs/finetune/recipe.toml", "runs/finetune/curves.png",
            "runs/finetune-evaluate/confusion.csv", "runs/finetune-evaluate/mistakes.png",
            "runs/bench.png",
        ],
        FLAT,
        ("skipped folders that are not data: `runs/`",),
    ),
    "a run elsewhere": (
        [
            *CATS_AND_DOGS, "first/recipe.toml", "first/curves.png",
            "look/inspect.json", "look/1.png",
        ],
        FLAT,
        ("not data: `first/`, `look/`",),
    ),
    "a class that is called runs": (
        ["runs/1.png", "walks/1.png"],
        {"train": {"runs": {"runs/1.png"}, "walks": {"walks/1.png"}}},
        (),
    ),
    # Splits
    "Intel scenes": (
        [*under("seg_train/seg_train", "seg_test/seg_test"), "seg_pred/seg_pred/1.png"],
        splits_of(train="seg_train/seg_train", test="seg_test/seg_test"),
        ("not splits: `seg_pred`",),
    ),
    "archive": (
        under("archive/train", "archive/test"),
        splits_of(train="archive/train", test="archive/test"),
        ("the data are in `archive/`",),
    ),
    "two wrappers": (
        under("chest_xray/chest_xray/train", "chest_xray/chest_xray/val"),
        splits_of(train="chest_xray/chest_xray/train", validation="chest_xray/chest_xray/val"),
        ("the data are in `chest_xray/chest_xray/`",),
    ),
    "fruits": (
        [*under("fruits-360/Training", "fruits-360/Test"), "fruits-360/papers/1.png"],
        splits_of(train="fruits-360/Training", test="fruits-360/Test"),
        ("not splits: `papers`",),
    ),
    "Training, Testing": (
        under("Training", "Testing"), splits_of(train="Training", test="Testing"), (),
    ),
    "train_set": (
        under("train_set", "test-images", "valid"),
        splits_of(train="train_set", validation="valid", test="test-images"),
        (),
    ),
    "trainset": (
        under("trainset", "testset", "ValSet"),
        splits_of(train="trainset", validation="ValSet", test="testset"),
        (),
    ),
    "training_set/training_set": (
        under("training_set/training_set", "test_set/test_set"),
        splits_of(train="training_set/training_set", test="test_set/test_set"),
        (),
    ),
    "train2017": (
        under("train2017", "val2017"), splits_of(train="train2017", validation="val2017"), (),
    ),
    "Train Images": (
        under("Train Images", "TestImages"),
        splits_of(train="Train Images", test="TestImages"),
        (),
    ),
    "prefixes": (
        under("asl_alphabet_train/asl_alphabet_train", "asl_alphabet_valid/asl_alphabet_valid"),
        splits_of(
            train="asl_alphabet_train/asl_alphabet_train",
            validation="asl_alphabet_valid/asl_alphabet_valid",
        ),
        (),
    ),
    "test images without classes": (
        [*under("asl_train/asl_train"), "asl_test/asl_test/A_test.png", "asl_test/asl_test/B.png"],
        splits_of(train="asl_train/asl_train"),
        ("skipped 2 images outside class folders",),
    ),
    "images/train": (
        [*under("images/train", "images/test"), "labels/train/1.txt", "annotations/1.xml"],
        splits_of(train="images/train", test="images/test"),
        ("the data are in `images/`", "without images: `annotations`, `labels/train`"),
    ),
    "train/images": (
        under("train/images", "test/images"),
        splits_of(train="train/images", test="test/images"),
        (),
    ),
    "splits in classes": (
        ["cat/train/1.png", "cat/test/2.png", "dog/train/1.png", "dog/test/1.png"],
        {
            "train": {"cat": {"cat/train/1.png"}, "dog": {"dog/train/1.png"}},
            "test": {"cat": {"cat/test/2.png"}, "dog": {"dog/test/1.png"}},
        },
        ("splits are folders in each class: CLASS/SPLIT/*",),
    ),
    "parts of a split": (
        ["train_1/cat/1.png", "train_2/cat/2.png", "train_2/dog/1.png", "test/dog/1.png"],
        {
            "train": {
                "cat": {"train_1/cat/1.png", "train_2/cat/2.png"}, "dog": {"train_2/dog/1.png"},
            },
            "test": {"dog": {"test/dog/1.png"}},
        },
        (),
    ),
    "val and dev": (
        under("train", "val", "validation"),
        splits_of(train="train", validation="validation"),
        ("skipped `val`, because `validation` is the validation split",),
    ),
    "vehicles": (
        ["train/1.png", "car/1.png", "test drive/1.png"],
        {"train": {n: {f"{n}/1.png"} for n in ("train", "car", "test drive")}},
        (),
    ),
    "classes with words of splits": (
        ["bullet train/1.png", "test tube/1.png", "valid/1.png", "invalid/1.png"],
        {
            "train": {
                n: {f"{n}/1.png"} for n in ("bullet train", "test tube", "valid", "invalid")
            }
        },
        (),
    ),
    "one class in test": (
        [*under("train"), "test/cat/1.png"],
        {"train": classes_of("train"), "test": {"cat": {"test/cat/1.png"}}},
        (),
    ),
    "a copy of the class folders": (
        [*CATS_AND_DOGS, *under("cell_images")],
        FLAT,
        ("skipped `cell_images/`, which repeats the class folders beside it",),
    ),
    "one of several folders holds the splits": (
        [*under("data/train", "data/test"), "docs/1.png"],
        splits_of(train="data/train", test="data/test"),
        ("the data are in `data/`; skipped `docs`",),
    ),
    "a logo beside a wrapper": (
        [*under("Garbage classification/Garbage classification"), "logo.png"],
        {"train": classes_of("Garbage classification/Garbage classification")},
        ("skipped 1 image beside `Garbage classification/`",),
    ),
    "a dataset and a testset": (
        [*under("simpsons_dataset"), "kaggle_simpson_testset/kaggle_simpson_testset/1.png"],
        {"train": classes_of("simpsons_dataset")},
        (
            "`simpsons_dataset` is the train split, because `kaggle_simpson_testset` beside it",
            "skipped 1 image outside class folders",
        ),
    ),
    "folds": (
        ["fold1/cat/1.png", "fold1/dog/1.png", "fold2/cat/1.png", "fold2/dog/1.png"],
        {
            "train": {
                "cat": {"fold1/cat/1.png", "fold2/cat/1.png"},
                "dog": {"fold1/dog/1.png", "fold2/dog/1.png"},
            }
        },
        ("`fold1`, `fold2` are parts; the classes are the folders in them: `cat`, `dog`",),
    ),
    "Tiny ImageNet": (
        ["train/n01/images/1.png", "train/n02/images/1.png", "val/images/1.png", "val/val.txt"],
        {"train": {n: {f"train/{n}/images/1.png"} for n in ("n01", "n02")}},
        ("skipped 1 image outside class folders",),
    ),
    "ILSVRC": (
        under("ILSVRC/Data/CLS-LOC/train", "ILSVRC/Data/CLS-LOC/val"),
        splits_of(train="ILSVRC/Data/CLS-LOC/train", validation="ILSVRC/Data/CLS-LOC/val"),
        ("the data are in `ILSVRC/Data/CLS-LOC/`",),
    ),
    "Caltech": (
        [*under("101_ObjectCategories"), "Annotations/cat/1.mat"],
        {"train": classes_of("101_ObjectCategories")},
        ("the data are in `101_ObjectCategories/`",),
    ),
    # Masks
    "CLASS/images, CLASS/masks": (
        ["COVID/images/1.png", "COVID/masks/1.png", "Normal/images/1.png", "Normal/masks/1.png"],
        {"train": {"COVID": {"COVID/images/1.png"}, "Normal": {"Normal/images/1.png"}}},
        ("skipped masks: `COVID/masks/`, `Normal/masks/`",),
    ),
    "images/CLASS, masks/CLASS": (
        under("images", "masks"), {"train": classes_of("images")}, ("skipped masks: `masks/`",),
    ),
    "images/CLASS, labels/CLASS": (
        under("images", "labels"), {"train": classes_of("images")}, ("skipped masks: `labels/`",),
    ),
    "train/images, train/masks": (
        under("train/images", "train/masks", "test/images", "test/masks"),
        splits_of(train="train/images", test="test/images"),
        ("skipped masks: `test/masks/`, `train/masks/`",),
    ),
    "train_masks": (
        under("train_images", "train_masks", "test_images"),
        splits_of(train="train_images", test="test_images"),
        ("skipped masks: `train_masks/`",),
    ),
    "MVTec": (
        ["train/good/0.png", "train/bent/0.png", "test/bent/0.png", "ground_truth/bent/0_mask.png"],
        {
            "train": {"good": {"train/good/0.png"}, "bent": {"train/bent/0.png"}},
            "test": {"bent": {"test/bent/0.png"}},
        },
        ("skipped masks: `ground_truth/`",),
    ),
    "fish": (
        ["Sprat/Sprat/1.png", "Sprat/Sprat GT/1.png", "Trout/Trout/1.png", "Trout/Trout GT/1.png"],
        {"train": {"Sprat": {"Sprat/Sprat/1.png"}, "Trout": {"Trout/Trout/1.png"}}},
        ("skipped masks: `Sprat/Sprat GT/`",),
    ),
    "mask files": (
        ["benign/b (1).png", "benign/b (1)_mask.png", "benign/b (1)_mask_1.png", "normal/1.png"],
        {"train": {"benign": {"benign/b (1).png"}, "normal": {"normal/1.png"}}},
        ("skipped 2 mask files beside their images, such as `benign/b (1)_mask.png`",),
    ),
    "masks beside their images": (
        ["cat/1.png", "cat/masks/1.png", "dog/1.png"],
        {"train": {"cat": {"cat/1.png"}, "dog": {"dog/1.png"}}},
        ("skipped masks: `cat/masks/`",),
    ),
    "masks on faces": (
        ["mask/1.png", "no_mask/1.png", "mask_worn_wrong/1.png"],
        {"train": {n: {f"{n}/1.png"} for n in ("mask", "no_mask", "mask_worn_wrong")}},
        (),
    ),
    # Hierarchies
    "a taxonomy": (
        ["animals/cat/1.png", "animals/dog/1.png", "vehicles/car/1.png", "vehicles/bus/1.png"],
        {
            "train": {
                "cat": {"animals/cat/1.png"}, "dog": {"animals/dog/1.png"},
                "car": {"vehicles/car/1.png"}, "bus": {"vehicles/bus/1.png"},
            }
        },
        ("the classes are the 4 innermost folders, such as `animals/cat`", "class_level=top"),
    ),
    "years": (
        ["cat/2019/1.png", "cat/2020/1.png", "dog/2019/1.png", "dog/2020/1.png"],
        {
            "train": {
                "cat": {"cat/2019/1.png", "cat/2020/1.png"},
                "dog": {"dog/2019/1.png", "dog/2020/1.png"},
            }
        },
        ("the classes are the 2 top folders, which have subfolders such as `cat/2019`",),
    ),
    "patients": (
        ["benign/p01/1.png", "benign/p02/1.png", "malignant/p03/1.png", "malignant/p04/1.png"],
        {
            "train": {
                "benign": {"benign/p01/1.png", "benign/p02/1.png"},
                "malignant": {"malignant/p03/1.png", "malignant/p04/1.png"},
            }
        },
        ("class_level=leaf",),
    ),
    "the same subfolders in each": (
        ["a/cat/1.png", "a/dog/1.png", "b/cat/1.png", "b/dog/1.png"],
        {"train": {"a": {"a/cat/1.png", "a/dog/1.png"}, "b": {"b/cat/1.png", "b/dog/1.png"}}},
        ("the classes are the 2 top folders",),
    ),
    "a folder in each class": (
        ["cat/images/1.png", "dog/images/1.png"],
        {"train": {"cat": {"cat/images/1.png"}, "dog": {"dog/images/1.png"}}},
        (),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name, tmp_path):
    paths, expected, words = LAYOUTS[name]
    root = build(tmp_path / "photos", paths)
    data = load_data(str(root), whole=True)
    assert content(data, root) == expected
    first = next(iter(expected.values()))
    assert data.classes == tuple(sorted(first))
    for word in words:
        assert any(word in note for note in data.notes), data.notes
    if not words:
        assert not data.notes
    assert data.layout


COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"  # as Linux and as macOS write it


@pytest.mark.parametrize("level", ["auto", "leaf"])
def test_two_encodings_of_an_accent_are_one_class(tmp_path, level):
    """Unicode NFC and NFD are canonically equivalent (UAX 15)."""
    paths = [
        f"train/{COMPOSED}/1.png", f"train/{DECOMPOSED}/2.png", "train/bar/3.png",
        f"test/{DECOMPOSED}/4.png", "test/bar/5.png",
    ]  # fmt: skip
    root = build(tmp_path / "photos", paths)
    data = load_data(str(root), whole=True, class_level=level)
    assert data.classes == ("bar", COMPOSED)
    assert content(data, root) == {
        "train": {COMPOSED: {paths[0], paths[1]}, "bar": {paths[2]}},
        "test": {COMPOSED: {paths[3]}, "bar": {paths[4]}},
    }
    (note,) = data.notes
    assert f"in the encoding of accents (`{COMPOSED}`)" in note


def test_two_encodings_of_an_accent_around_the_splits(tmp_path):
    paths = [
        f"{COMPOSED}/train/1.png", f"{COMPOSED}/test/2.png", f"{DECOMPOSED}/train/3.png",
        f"{DECOMPOSED}/test/4.png", "bar/train/5.png", "bar/test/6.png",
    ]  # fmt: skip
    root = build(tmp_path / "photos", paths)
    data = load_data(str(root), whole=True)
    assert content(data, root) == {
        "train": {COMPOSED: {paths[0], paths[2]}, "bar": {paths[4]}},
        "test": {COMPOSED: {paths[1], paths[3]}, "bar": {paths[5]}},
    }
    assert any("in the encoding of accents" in note for note in data.notes)


def test_a_class_that_is_only_in_another_encoding_in_test(tmp_path):
    """The only folder of `test/` is a class, not a wrapper of the data."""
    paths = [f"train/{COMPOSED}/1.png", "train/bar/2.png", f"test/{DECOMPOSED}/data/3.png"]
    root = build(tmp_path / "photos", paths)
    data = load_data(str(root), whole=True)
    assert content(data, root)["test"] == {COMPOSED: {paths[2]}}


@pytest.mark.parametrize(
    ("level", "classes"),
    [
        ("top", {"a": 3, "b": 2}),
        ("leaf", {"cat": 3, "dog": 1, "emu": 1}),
        ("path", {"a/cat": 2, "a/dog": 1, "b/cat": 1, "b/emu": 1}),
    ],
)
def test_levels_of_classes(tmp_path, level, classes):
    paths = ["a/cat/1.png", "a/cat/2.png", "a/dog/1.png", "b/cat/images/1.png", "b/emu/1.png"]
    root = build(tmp_path, [f"{split}/{path}" for split in ("train", "test") for path in paths])
    data = load_data(str(root), class_level=level)
    assert data.classes == tuple(classes)
    for images in data.splits.values():
        assert dict(zip(data.classes, images.class_counts().tolist(), strict=True)) == classes
    assert any("`cat`, are one class" in note for note in data.notes) is (level == "leaf")


def test_numbered_classes_are_in_the_order_of_the_numbers(tmp_path):
    root = build(tmp_path, [f"{number}/1.png" for number in range(12)])
    data = load_data(str(root), whole=True)
    assert data.classes == tuple(str(number) for number in range(12))
    names = [data.splits["train"].describe(i) for i in range(12)]
    assert [name.split("/")[-2] for name in names] == list(data.classes)


def test_the_hint_of_a_deep_class_names_the_folder_with_several(tmp_path):
    build(tmp_path, ["v1/slides/breast/benign/p1/1.png", "v1/slides/breast/malignant/p2/1.png"])
    with pytest.raises(VitcliError, match="only one class: `v1`") as caught:
        load_data(str(tmp_path))
    assert f"`{tmp_path}/v1/slides/breast`" in str(caught.value.hint)


def test_splits_in_only_some_classes(tmp_path):
    root = build(tmp_path, ["cat/train/1.png", "cat/test/2.png", "dog/1.png"])
    with pytest.raises(VitcliError, match="class `cat` has folders for splits, `dog` has none"):
        load_data(str(root))


# Tables in folders


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n")


@pytest.mark.parametrize("name", ["metadata.csv", "labels.csv", "metadata.jsonl"])
@pytest.mark.parametrize("folder", ["", "images/"])
def test_a_table_in_the_folder_gives_the_labels(tmp_path, name, folder):
    build(tmp_path, [f"{folder}{i}.png" for i in range(3)])
    rows = [(f"{folder}0.png", "cat"), (f"{folder}1.png", "dog")]
    lines = ["file_name,label", *map(",".join, rows)]
    if name.endswith("jsonl"):
        lines = [f'{{"file_name": "{path}", "label": "{label}"}}' for path, label in rows]
    write(tmp_path / name, *lines)
    data = load_data(str(tmp_path), whole=True)
    assert content(data, tmp_path) == {
        "train": {"cat": {f"{folder}0.png"}, "dog": {f"{folder}1.png"}}
    }
    assert f"`{name}` gives the labels of 2 of the 3 images" in data.notes[0]
    assert data.notation == str(tmp_path)


def test_a_table_in_each_split(tmp_path):
    build(tmp_path, [f"{split}/{i}.png" for split in ("train", "test") for i in range(3)])
    write(tmp_path / "train/metadata.csv", "file_name,label", "0.png,cat", "1.png,dog", "2.png,cat")
    write(tmp_path / "test/metadata.csv", "file_name,label", "0.png,dog", "1.png,dog", "2.png,dog")
    data = load_data(str(tmp_path))
    assert content(data, tmp_path) == {
        "train": {"cat": {"train/0.png", "train/2.png"}, "dog": {"train/1.png"}},
        "test": {"dog": {f"test/{i}.png" for i in range(3)}},
    }
    assert "`test/metadata.csv`, `train/metadata.csv` gives the labels" in data.notes[0]


def test_a_split_without_a_table(tmp_path):
    build(tmp_path, ["train/1.png", "train/2.png", "val/3.png"])
    write(tmp_path / "train/labels.csv", "image,label", "1.png,cat", "2.png,dog")
    data = load_data(str(tmp_path), whole=True)
    assert list(data.splits) == ["train"]
    assert "there is no table for `validation`, which is not used" in data.notes[0]


def test_one_table_for_folders_of_splits(tmp_path):
    """The folders are the splits, so no test image is among the training images."""
    build(tmp_path, [f"{split}/{i}.png" for split in ("train", "test") for i in range(4)])
    rows = [f"{s}/{i}.png,{'cat' if i % 2 else 'dog'}" for s in ("train", "test") for i in range(4)]
    write(tmp_path / "metadata.csv", "file_name,label", *rows)
    for options in ({}, {"labelled": False, "whole": True}):
        found = content(load_data(str(tmp_path), **options), tmp_path)
        assert found == {
            s: {"dog": {f"{s}/0.png", f"{s}/2.png"}, "cat": {f"{s}/1.png", f"{s}/3.png"}}
            for s in ("train", "test")
        }


def test_a_table_beside_splits_with_classes(tmp_path):
    build(tmp_path, under("train", "test"))
    write(tmp_path / "labels.csv", "path,label", "train/cat/1.png,a", "test/dog/1.png,b")
    data = load_data(str(tmp_path))
    assert content(data, tmp_path) == splits_of(train="train", test="test")
    assert "`labels.csv` is not used, because the folders give splits and classes" in data.notes[0]


def test_a_table_in_a_class_folder(tmp_path):
    build(tmp_path, CATS_AND_DOGS)
    write(tmp_path / "cat/labels.csv", "path,label", "1.png,a", "2.png,b")
    data = load_data(str(tmp_path), whole=True)
    assert content(data, tmp_path) == FLAT
    assert any("skipped tables in class folders: `cat/labels.csv`" in note for note in data.notes)


TINY_IMAGENET = [f"train/{c}/images/{c}_{i}.png" for c in ("n01", "n02") for i in range(3)]
LISTED = {
    "Tiny ImageNet": (
        [*TINY_IMAGENET, *(f"val/images/val_{i}.png" for i in range(4))],
        "val/val_annotations.txt",
        [f"val_{i}.png\tn0{1 + i % 2}\t0\t32\t44\t62" for i in range(4)],
    ),
    "ImageNet": (
        [*TINY_IMAGENET, *(f"val/ILSVRC2012_val_{i}.png" for i in range(4))],
        "LOC_val_solution.csv",
        ["ImageId,PredictionString"]
        + [f"ILSVRC2012_val_{i},n0{1 + i % 2} 1 2 3 4 n0{1 + i % 2} 5 6 7 8" for i in range(4)],
    ),
    "GTSRB": (
        [
            *(f"Final_Training/Images/{c:05}/{i}.png" for c in (1, 2) for i in range(3)),
            *(f"Final_Test/Images/0000{i}.png" for i in range(4)),
        ],
        "Final_Test/Images/GT-final_test.csv",
        ["Filename;Width;Roi.X1;ClassId"] + [f"0000{i}.png;1;2;{1 + i % 2}" for i in range(4)],
    ),
}


@pytest.mark.parametrize("name", LISTED)
def test_a_table_labels_a_split_without_class_folders(tmp_path, name):
    paths, table, lines = LISTED[name]
    build(tmp_path, paths)
    write(tmp_path / table, *lines)
    data = load_data(str(tmp_path))
    held_out = data.split("validation", "test")
    rows = sorted((held_out.file_name(i), int(held_out.labels[i])) for i in range(4))
    assert [label for _, label in rows] == [0, 1, 0, 1]
    assert len(data.splits) == 2 and len(data.splits["train"]) == 6
    assert any(f"`{table}` gives the labels of the 4" in note for note in data.notes)
    # A table that lists only some of the images, or other classes, is not used.
    write(tmp_path / table, *lines[:-1])
    assert "train" in load_data(str(tmp_path)).splits
    assert not any("gives the labels" in note for note in load_data(str(tmp_path)).notes)


@pytest.mark.parametrize("name", ["meta/train.txt", "train_test_split.txt", "TrainImages.txt"])
def test_a_list_of_splits_beside_class_folders_is_mentioned(tmp_path, name):
    """Food-101, CUB-200, MIT Indoor: a seeded split is not the one of the publications."""
    build(tmp_path, [f"images/{path}" for path in CATS_AND_DOGS])
    write(tmp_path / name, "cat/1")
    notes = load_data(str(tmp_path), whole=True).notes
    assert any(f"`{name}` may list the splits of this dataset" in note for note in notes)


def test_folders_of_patients_beside_tables(tmp_path):
    """CheXpert: the folders are patients, and the tables hold the labels; the hint works."""
    paths = {
        split: [f"{split}/patient{split}{i}/study1/view{i}.png" for i in range(4)]
        for split in ("train", "valid")
    }
    build(tmp_path, [path for split in paths.values() for path in split])
    for split, images in paths.items():
        rows = [f"{path},{'ab'[i % 2]}" for i, path in enumerate(images)]
        write(tmp_path / f"{split}.csv", "Path,label", *rows)
    with pytest.raises(VitcliError, match="is in `validation` but not in `train`") as caught:
        load_data(str(tmp_path))
    given = caught.value.hint.partition("give them: `")[2].rstrip("`")
    data = load_data(given)
    assert {name: len(images) for name, images in data.splits.items()} == {
        "train": 4,
        "validation": 4,
    }
    assert data.classes == ("a", "b")


def test_a_table_of_captions_leaves_the_class_folders(tmp_path):
    build(tmp_path, CATS_AND_DOGS)
    write(tmp_path / "metadata.csv", "file_name,text", "cat/1.png,a cat on a mat")
    for labelled in (True, False):
        data = load_data(str(tmp_path), whole=True, labelled=labelled)
        assert content(data, tmp_path) == FLAT
        assert any("`metadata.csv` is not used, because" in note for note in data.notes)


def test_another_table_is_named_where_the_folder_has_no_classes(tmp_path):
    build(tmp_path, ["images/1.png", "images/2.png"])
    write(tmp_path / "photos.csv", "id,label", "1,a")
    with pytest.raises(VitcliError, match=r"images/?` has 2 images but no class folders") as caught:
        load_data(str(tmp_path))
    assert f"`{tmp_path}/photos.csv` holds the labels" in str(caught.value.hint)


def test_numbered_parts_beside_a_table(tmp_path):
    build(tmp_path / "x", ["images_001/1.png", "images_002/2.png", "Data_Entry.csv"])
    with pytest.raises(VitcliError, match=r"are numbered parts, such as `images_001`") as caught:
        load_data(str(tmp_path / "x"))
    assert "Data_Entry.csv` holds the labels" in str(caught.value.hint)
    build(tmp_path / "y", ["class_1/1.png", "class_2/2.png", "Data_Entry.csv"])
    assert load_data(str(tmp_path / "y"), whole=True).classes == ("class_1", "class_2")


def test_the_hint_says_what_was_skipped(tmp_path):
    root = build(tmp_path, [".git/1.png", "scans/1.svs", "scans/2.svs"])
    with pytest.raises(VitcliError, match="has no images") as caught:
        load_data(str(root))
    for words in ("hidden files: `.git`", "not images: 2 .svs", "expected `CLASS/*.jpg`"):
        assert words in str(caught.value.hint)


# Links, homes and empty folders


def test_links_that_lead_back(tmp_path):
    root = build(tmp_path / "photos", CATS_AND_DOGS)
    (root / "cat/all").symlink_to(root)
    (root / "self").symlink_to("self")
    (root / "kitty").symlink_to("cat")
    data = load_data(str(root), whole=True)
    assert data.classes == ("cat", "dog", "kitty")
    assert np.bincount(data.splits["train"].labels).tolist() == [2, 1, 2]
    assert any("links to a folder above them: `cat/all/`" in note for note in data.notes)
    assert len(list(walk_images(root))) == 5
    build(tmp_path, ["other/1.png"])
    (root / "dog/up").symlink_to(tmp_path)
    assert len(list(walk_images(root))) == 5


def test_a_link_to_itself_as_data(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(VitcliError, match="is a link to `loop`, which does not lead") as caught:
        load_data(str(tmp_path / "loop"))
    assert caught.value.hint


def test_a_home_folder(tmp_path, monkeypatch):
    build(tmp_path / "photos", CATS_AND_DOGS)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_data("~/photos").classes == ("cat", "dog")
    with pytest.raises(VitcliError, match="`~nouser0/photos`: there is no user"):
        load_data("~nouser0/photos")


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([], "has no images"),
        (["cat/", "dog/"], "has no images"),
        ([".git/1.png", "@eaDir/2.png"], "has no images"),
        (["readme.txt"], "has no images"),
        (["test/1.png"], r"test/?` has 1 image but no class folders"),
        (["train/images/1.png"], r"train/images/?` has 1 image but no class folders"),
        (["cat/1.png"], "only one class: `cat`"),
        (["train/cat/1.png", "test/cat/1.png"], "only one class: `cat`"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, paths, message):
    root = build(tmp_path / "photos", paths) if paths else tmp_path
    with pytest.raises(VitcliError, match=message) as caught:
        load_data(str(root))
    assert caught.value.hint

"""Splits: by share, by fold, by slice; what they promise of any labels."""

import json
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.tiny import tiny_recipe

from vitcli.commands import evaluate
from vitcli.config.recipe import check
from vitcli.config.schema import DataSection, Recipe
from vitcli.data.readers.parquet import parquet_splits
from vitcli.data.readers.tar import shard_splits
from vitcli.data.source import load_data
from vitcli.data.splits import parse_slice, split_images
from vitcli.data.stratify import fold_of, spread_order, stratified_split
from vitcli.errors import VitcliError
from vitcli.hub.datasets import choose_files
from vitcli.hub.split_names import file_splits
from vitcli.progress import Quiet
from vitcli.train.resolve import random_model
from vitcli.train.session import train


def random_labels(seed):
    """Some hundred images of some classes, from one image to half of all; -1 is none."""
    rng = np.random.default_rng(seed)
    n, classes = int(rng.integers(5, 400)), int(rng.integers(1, 12))
    return rng.choice(classes, n, p=rng.dirichlet(np.full(classes, 0.5))) - int(rng.integers(2))


@pytest.mark.parametrize("seed", range(30))
def test_any_cut_of_the_order_has_each_class_in_its_share(seed):
    labels = random_labels(seed)
    n = len(labels)
    order = spread_order(labels, seed)
    assert np.array_equal(np.sort(order), np.arange(n))
    rng = np.random.default_rng(seed)
    first, last = sorted(rng.integers(0, n + 1, 2))
    for label in np.unique(labels):
        share = (labels == label).mean() * (last - first)
        # One at each end for this class, and as much for where the cuts themselves fall.
        assert abs((labels[order[first:last]] == label).sum() - share) <= 3


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("folds", [2, 3, 5])
def test_folds_are_disjoint_and_together_everything(seed, folds):
    labels = random_labels(seed)
    held = []
    for fold in range(folds):
        keep, aside = fold_of(labels, folds, fold, seed)
        assert np.array_equal(np.union1d(keep, aside), np.arange(len(labels)))
        assert not len(np.intersect1d(keep, aside))
        held.append(aside)
    joined = np.concatenate(held)
    assert np.array_equal(np.sort(joined), np.arange(len(labels)))
    sizes = [len(part) for part in held]
    assert max(sizes) - min(sizes) <= 1
    for label in np.unique(labels):
        counts = [(labels[part] == label).sum() for part in held]
        assert max(counts) - min(counts) <= 3


def test_folds_follow_the_seed_alone():
    labels = random_labels(3)
    one, again, other = (fold_of(labels, 5, 2, seed)[1] for seed in (0, 0, 1))
    assert np.array_equal(one, again) and not np.array_equal(one, other)


def test_a_share_of_images_without_a_label():
    labels = np.array([-1] * 10 + [0] * 10)
    _, aside = stratified_split(labels, 0.2, 0)
    assert [(labels[aside] == label).sum() for label in (-1, 0)] == [2, 2]


@pytest.mark.parametrize(
    ("text", "name", "n", "bounds"),
    [
        ("train", "train", 7, (0, 7)),
        ("train[:98%]", "train", 200, (0, 196)),
        ("train[98%:]", "train", 200, (196, 200)),
        ("test[10:20]", "test", 15, (10, 15)),
        (" val[10%:50%] ", "val", 10, (1, 5)),
    ],
)
def test_slices_are_written_as_the_papers_code_writes_them(text, name, n, bounds):
    cut = parse_slice(text)
    assert (cut.name, cut.bounds(n)) == (name, bounds)


@pytest.mark.parametrize("text", ["train[", "train[:-5]", "[1:2]", "train[a:b]", ""])
def test_slices_that_are_none(text):
    with pytest.raises(VitcliError, match="is not a split or a slice of a split"):
        parse_slice(text)


@pytest.mark.parametrize("n", [10, 99, 1000])
@pytest.mark.parametrize("percent", [1, 10, 33, 98])
def test_two_slices_at_one_place_share_nothing_and_leave_nothing(n, percent):
    first, second = (parse_slice(s).bounds(n) for s in (f"a[:{percent}%]", f"a[{percent}%:]"))
    assert first[0] == 0 and first[1] == second[0] and second[1] == n


@pytest.fixture
def photos(tmp_path):
    """20 cats and 10 dogs to train on, 4 and 2 to test."""
    for split, many in (("train", 10), ("test", 2)):
        for name, count in (("cat", 2 * many), ("dog", many)):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                colour = (10 * i, 90 * (name == "dog"), 90 * (split == "test"))
                Image.new("RGB", (8, 8), colour).save(folder / f"{i}.png")
    return str(tmp_path / "photos")


def names(images):
    return [images.describe(i) for i in range(len(images))]


def test_folds_of_data_with_a_test_split(photos):
    seen = []
    for fold in range(5):
        data = load_data(photos, folds=5, fold=fold)
        assert list(data.splits) == ["train", "validation", "test"]
        assert [len(s) for s in data.splits.values()] == [24, 6, 6]
        assert data.splitting["fold"] == fold and data.splitting["folds"] == 5
        assert f"fold {fold} of 5" in data.notes[-1]
        seen += names(data.splits["validation"])
        assert not set(names(data.splits["train"])) & set(names(data.splits["validation"]))
    assert sorted(seen) == sorted(names(load_data(photos).splits["train"]))


def test_a_fold_of_data_without_a_test_split_is_the_test_set(photos):
    data = load_data(f"{photos}/train", folds=3, fold=1)
    assert {k: len(s) for k, s in data.splits.items()} == {"train": 20, "test": 10}
    assert data.fingerprint != load_data(f"{photos}/train", folds=3, fold=2).fingerprint


def test_a_validation_share(photos):
    data = load_data(photos, validation_fraction=0.1)
    assert {k: len(s) for k, s in data.splits.items()} == {
        "train": 27,
        "validation": 3,
        "test": 6,
    }
    assert np.bincount(data.splits["validation"].labels).tolist() == [2, 1]
    assert "3 of 30 training images are held out for validation" in data.notes[-1]
    both = load_data(f"{photos}/train", validation_fraction=0.1)
    assert {k: len(s) for k, s in both.splits.items()} == {"train": 21, "validation": 3, "test": 6}
    parts = [set(names(images)) for images in both.splits.values()]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 30


def test_named_slices(photos):
    data = load_data(photos, train_split="train[:90%]", test_split="train[90%:]")
    assert {k: len(s) for k, s in data.splits.items()} == {"train": 27, "test": 3}
    assert set(np.bincount(data.splits["test"].labels)) <= {1, 2}
    assert data.splitting["train_split"] == "train[:90%]"
    whole = load_data(photos, train_split="test", test_split="train")
    assert {k: len(s) for k, s in whole.splits.items()} == {"train": 6, "test": 30}
    assert [s.name for s in whole.splits.values()] == ["train", "test"]
    kept = load_data(photos, train_split="train[:50%]")
    assert {k: len(s) for k, s in kept.splits.items()} == {"train": 15, "test": 6}
    rest = load_data(photos, test_split="train[80%:]")
    assert {k: len(s) for k, s in rest.splits.items()} == {"train": 24, "test": 6}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"train_split": "trian"}, "has no split `trian`"),
        ({"train_split": "train[:60%]", "test_split": "train[50%:]"}, "share images"),
        ({"train_split": "train[:0%]"}, "selects none of the 30 images"),
        ({"folds": 31}, "30 training images, too few for 31 folds"),
    ],
)
def test_splits_that_cannot_be_made(photos, settings, said):
    with pytest.raises(VitcliError, match=said):
        load_data(photos, **settings)


def test_what_has_validation_images_gets_no_more(photos, tmp_path):
    (tmp_path / "photos/test").rename(tmp_path / "photos/val")
    for settings in ({"folds": 2}, {"validation_fraction": 0.5}):
        with pytest.raises(VitcliError, match="validation images"):
            load_data(photos, **settings)
    (tmp_path / "photos/train").rename(tmp_path / "photos/test")
    shutil.rmtree(tmp_path / "photos/val")
    with pytest.raises(VitcliError, match="no training images"):
        load_data(photos, folds=2)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"fold": 1}, "`fold` needs `folds`, the number of folds"),
        ({"folds": 5, "fold": 5}, "0 to 4"),
        ({"folds": 5, "validation_fraction": 0.1}, "not both"),
        ({"folds": 1}, "greater than or equal to 2"),
    ],
)
def test_settings_that_contradict_each_other(data, said):
    with pytest.raises(VitcliError, match=said):
        check(Recipe, {"command": "pretrain", "train": {"steps": 1}, "data": data}, "x")


def test_a_run_records_its_fold_and_evaluate_finds_it(photos, tmp_path):
    recipe = tiny_recipe(
        data={"name": f"{photos}/train", "folds": 5, "fold": 3, "split_seed": 1},
        train={"steps": 1, "batch_size": 4},
    )
    train(
        recipe,
        lambda source: random_model(recipe, source),
        out=tmp_path / "run",
        resume=False,
        watch=Quiet(),
    )
    record = json.loads((tmp_path / "run/provenance.json").read_text())["data"]
    assert (record["folds"], record["fold"], record["seed"]) == (5, 3, 1)
    assert record["images"] == {"train": 24, "test": 6}
    # Without a word about folds: what this run has never seen.
    assert evaluate.run(f"{photos}/train", model=str(tmp_path / "run")).metrics.images == 6


def test_nothing_is_divided_that_was_not_asked_for():
    labels = {"train": np.array([0, 1]), "test": np.array([0])}
    done = split_images(labels, DataSection(), "x")
    assert done.parts == {"train": ("train", None), "test": ("test", None)}
    assert not done.notes and not done.record


# train, validation and test as people spell them: names of folders, or of files.
FOLDER_SPELLINGS = [
    ("train", "val", "test"),
    ("Training", "Validation", "Testing"),
    ("train_set", "val_set", "test_set"),
    ("TrainSet", "ValSet", "TestSet"),
    ("trainset", "valset", "testset"),
    ("seg_train", "seg_val", "seg_test"),
    ("train2017", "val2017", "test2017"),
    ("train_images", "valid_images", "test_images"),
    ("Train Data", "Dev Data", "Eval Data"),
    ("training", "dev", "evaluation"),
]
FILE_SPELLINGS = [
    *FOLDER_SPELLINGS,
    ("train-00000-of-00004", "validation-00000-of-00001", "test-00000-of-00001"),
    ("train-00003", "dev-00000", "eval-00001"),
    ("imagenet-train-000", "imagenet-val-000", "imagenet-test-000"),
    ("trainval", "dev", "test"),
    ("TRAIN", "VALID", "TEST"),
]
NAMES = ("train", "validation", "test")


def files_of(root, spelling, place, suffix):
    """Split -> its only file, made empty."""
    files = {}
    for name, spelled in zip(NAMES, spelling, strict=True):
        files[name] = root / (place.format(spelled) + suffix)
        files[name].parent.mkdir(parents=True, exist_ok=True)
        files[name].touch()
    return files


def found_in(root, files, suffix):
    """Split -> files by each way that reads files of this kind: local, and on the Hub."""
    local = {".tar": shard_splits, ".parquet": lambda path: parquet_splits(Path(path), [])}[suffix]
    paths = [file.relative_to(root).as_posix() for file in files]
    hub = choose_files(paths, [], None, (), "hf:org/x").splits
    return local(str(root)), {name: [root / path for path in hub[name]] for name in hub}


@pytest.mark.parametrize("suffix", [".tar", ".parquet"])
@pytest.mark.parametrize(
    ("spelling", "place"),
    [
        *product(FOLDER_SPELLINGS, ["{0}/00000", "data/{0}/00000", "{0}/{0}/00000"]),
        *product(FILE_SPELLINGS, ["{0}", "data/{0}"]),
    ],
)
def test_folders_and_names_of_shards_and_parquet_are_splits_in_every_spelling(
    tmp_path, spelling, place, suffix
):
    files = files_of(tmp_path, spelling, place, suffix)
    for found in found_in(tmp_path, files.values(), suffix):
        assert found == {name: [file] for name, file in files.items()}


@pytest.mark.parametrize(
    "names", [("valley-000", "valley-001"), ("device-1", "tested-2"), ("trains", "contests")]
)
def test_words_that_only_begin_like_a_split_are_none(names):
    assert file_splits(names) == [None, None]


@pytest.mark.parametrize("braces", ["{test,train}/0.tar", "{train,test}/0.tar"])
def test_folders_in_braces_are_splits_in_any_order(tmp_path, braces):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "0.tar").touch()
    assert shard_splits(f"{tmp_path}/{braces}") == {
        split: [tmp_path / split / "0.tar"] for split in ("train", "test")
    }


def test_a_list_that_tells_the_splits_apart_is_none_of_them():
    assert file_splits(["train_test_split", "images"]) == [None, None]

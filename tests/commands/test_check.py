"""`vitcli check` on folders with faults that the test has put there."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from support.pages import check_page
from support.pictures import photographs
from support.watching import Told

from vitcli.cli.main import run as vitcli
from vitcli.commands import check
from vitcli.errors import VitcliError
from vitcli.evals.near_copies import warn_of_copies
from vitcli.train import resolve
from vitcli.train.defaults import MachineFacts


@pytest.fixture
def faulty(tmp_path):
    """Two classes in train and test, with one of every fault."""
    root = tmp_path / "photos"
    pictures = list(photographs(40))
    for split, label, first, count in (
        ("train", "cat", 0, 12),
        ("train", "dog", 12, 6),
        ("train", "Dog ", 18, 6),
        ("test", "cat", 24, 4),
        ("test", "dog", 28, 4),
    ):
        folder = root / split / label
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(first, first + count):
            pictures[i].save(folder / f"{i}.png")
    pictures[0].resize((60, 60)).save(root / "test/cat/leak.jpg", quality=80)
    pictures[12].save(root / "train/cat/12 again.png")  # with another label
    (root / "train/dog/13 copy.png").write_bytes((root / "train/dog/13.png").read_bytes())
    pictures[35].resize((10, 40)).save(root / "train/cat/thin.png")
    (root / "train/dog/cut.png").write_bytes((root / "train/dog/14.png").read_bytes()[:300])
    return root


def names(group):
    return sorted(path.rsplit("photos/")[-1] for path in group)


def test_every_fault_is_found_and_nothing_else(faulty):
    found = check.run(str(faulty)).to_json()
    assert found["images"] == 32 + 5
    assert found["splits"] == {"train": 28, "test": 9}
    assert found["classes"]["cat"] == {"train": 14, "test": 5}
    assert [names(group) for group in found["leaks"]["train -> test"]] == [
        ["test/cat/leak.jpg", "train/cat/0.png"]
    ]
    assert [names(group) for group in found["exact_duplicates"]] == [
        ["train/cat/12 again.png", "train/dog/12.png"],
        ["train/dog/13 copy.png", "train/dog/13.png"],
    ]
    assert [names(group) for group in found["near_duplicates"]] == [
        ["test/cat/leak.jpg", "train/cat/0.png"]
    ]
    (conflict,) = found["label_conflicts"]
    assert {row["label"] for row in conflict} == {"cat", "dog"}
    assert found["label_variants"] == [["Dog", "dog"]]
    assert [names([p]) for p in found["tiny"]] == [["train/cat/thin.png"]]
    assert [names([p]) for p in found["odd_aspect"]] == [["train/cat/thin.png"]]
    (broken,) = found["unreadable"]
    assert broken["path"].endswith("cut.png")
    assert "cut off" in broken["reason"]
    text = "\n".join(found["problems"])
    for words in (
        "1 test image is also in train (train -> test)",
        "1 image cannot be read",
        "1 group of images that look the same has different labels",
        "2 images are exact copies of others",
        "`Dog`, `dog`",
    ):
        assert words in text


def test_every_copy_is_named(tmp_path):
    for i, picture in enumerate(photographs(4)):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        picture.save(tmp_path / "ab"[i % 2] / f"{i}.png")
    for i in range(8):
        (tmp_path / f"a/copy {i}.png").write_bytes((tmp_path / "a/0.png").read_bytes())
    (group,) = check.run(str(tmp_path)).to_json()["exact_duplicates"]
    assert len(group) == 9


def test_clean_data_has_no_problems(tmp_path):
    for i, picture in enumerate(photographs(12)):
        folder = tmp_path / "photos" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{i}.png")
    assert check.run(str(tmp_path / "photos")).problems() == []


def test_imbalance_and_small_classes_are_told(tmp_path):
    for i, picture in enumerate(photographs(44)):
        folder = tmp_path / "photos" / ("few" if i < 4 else "many")
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{i}.png")
    found = check.run(str(tmp_path / "photos"))
    assert found.imbalance == 10
    (line,) = [line for line in found.problems() if "10 times" in line]
    assert "(`many` 40, `few` 4)" in line and "`--set objective.logit_adjustment=1`" in line
    assert found.to_json()["suggested_setting"] == "objective.logit_adjustment=1"
    assert any("1 class has fewer than 5 images: `few`" in line for line in found.problems())


def test_the_command_line(faulty, tmp_path, capfd):
    sheet = tmp_path / "samples.png"
    assert vitcli(["check", str(faulty), "--out", str(sheet), "--json"]) == 3
    out, err = capfd.readouterr()
    assert json.loads(out)["sheet"] == str(sheet)
    assert "cut.png" in err
    with Image.open(sheet) as picture:
        assert picture.height == 30 + 3 * 112  # the title, and a row for each class
        assert len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 1000
    assert vitcli(["check", str(faulty)]) == 3
    out, _ = capfd.readouterr()
    assert "1 test image is also in train" in out
    assert "pretrain uses" in out
    (conflict,) = [line for line in out.splitlines() if "different labels: " in line]
    assert "12 again.png (cat) = " in conflict and "12.png (dog)" in conflict


def test_data_with_one_class_or_without_labels_is_looked_at_too(tmp_path):
    for i, picture in enumerate(photographs(3)):
        picture.save(tmp_path / f"{i}.png")
    assert check.run(str(tmp_path)).to_json()["images"] == 3


def test_a_sheet_must_be_a_png(faulty):
    with pytest.raises(VitcliError, match=r"is not a \.png file"):
        check.run(str(faulty), out=faulty / "x.jpg")


def test_a_folder_gets_a_report_with_every_fault(faulty, tmp_path):
    out = tmp_path / "check"
    found = check.run(str(faulty), out=out).to_json()
    assert found["report"] == str(out / "report.html") and found["sheet"] == str(
        out / "samples.png"
    )
    assert {path.name for path in out.iterdir()} == {"report.html", "samples.png"}
    text = (out / "report.html").read_text()
    page = check_page(text)
    assert page.headings == [
        "Problems", "Data and splits", "Leaks between splits",
        "Images that look the same, with different labels", "Exact copies",
        "Images that look the same", "Unreadable images", "Odd sizes", "Classes",
        "Samples of the classes", "Provenance",
    ]  # fmt: skip
    for words in ("leak.jpg", "12 again.png", "13 copy.png", "cut off", "thin.png"):
        assert words in page.text
    for line in found["problems"]:
        assert line.replace("`", "") in " ".join(page.text.split())
    assert page.tags["img"] >= 2 + 2 + 4 + 2 + 3 * 6


def test_a_report_that_fails_is_a_warning(faulty, tmp_path, monkeypatch):
    watch = Told()
    monkeypatch.setattr(check, "dataset_page", lambda *_: 1 / 0)
    result = check.run(str(faulty), out=tmp_path / "check", watch=watch)
    assert result.problems() and not (tmp_path / "check/report.html").exists()
    assert any("report.html` is not written: ZeroDivisionError" in line for line in watch.lines)


def test_real_sets(shared):
    """Photographs of flowers hold one picture twice; CIFAR-10's known leak is found."""
    flowers = check.run(str(shared / "data/flower_photos")).to_json()
    assert [len(group) for group in flowers["exact_duplicates"]] == [2]
    assert flowers["leaks"] == {}


def small(folder, *paths):
    for number, path in enumerate(paths):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (20, 20), 40 * number).save(folder / path)
    return str(folder)


def test_what_training_makes_of_the_data(tmp_path):
    """The layout, the splits that a run would make, what is skipped and what a run would refuse."""
    paths = [f"archive/{name}/{i}.png" for name in ("cat", "dog") for i in range(5)]
    data = small(tmp_path / "photos", *paths, "archive/@eaDir/1.png")
    found = check.run(data).to_json()
    assert found["layout"] == "archive/CLASS/*"
    assert found["splits"] == {"train": 10} and found["classes"]["cat"] == {"train": 5}
    assert found["training"]["splits"] == {"train": 8, "test": 2}
    assert found["training"]["classes"] == 2
    assert any("2 of 10 images are held out for testing" in n for n in found["training"]["notes"])
    assert any("`@eaDir`" in note for note in found["notes"])
    settings = {"data": {"test_fraction": 0.4}}
    assert check.run(data, settings=settings).to_json()["training"]["splits"] == {
        "train": 6,
        "test": 4,
    }


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("side", [32, 100, 300])
def test_the_sizes_are_those_of_pretrain(tmp_path, monkeypatch, device, side):
    for i, picture in enumerate(photographs(4)):
        (tmp_path / "photos" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        picture.resize((side, side)).save(tmp_path / f"photos/{'ab'[i % 2]}/{i}.png")
    for module in (check, resolve):
        monkeypatch.setattr(module, "this_machine", lambda: MachineFacts(device, 2))
    data = str(tmp_path / "photos")
    model = resolve.pretrain_recipe(data, None, None, Told()).recipe.model
    found = check.run(data).to_json()["suggested"]
    assert found["image_size"] == model.image_size
    assert found["patch_size"] == int(model.name.rpartition("/")[2])
    assert found["tokens"] == (model.image_size // found["patch_size"]) ** 2


@pytest.fixture
def untidy(tmp_path):
    """Near copies with other labels, without splits; 2 unreadable images, and a missing one."""
    pictures = list(photographs(30))
    rows = ["path,label"]
    for i, picture in enumerate([*pictures, *pictures[:20]]):
        picture.resize((90 + i, 90 + i)).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{['cat', 'dog'][(i + (i >= 30)) % 2]}")
    for i in (28, 29):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    (tmp_path / "labels.csv").write_text("\n".join([*rows, "gone.png,cat"]))
    return str(tmp_path / "labels.csv")


def test_leaks_in_the_splits_that_training_makes(untidy, tmp_path):
    result = check.run(untidy, out=tmp_path / "check")
    made, pairs = result.training.splits, result.leaks["train -> test"]
    held = {made["test"].describe(i) for i in range(len(made["test"]))}
    number = {result.name(row): i for i, group in enumerate(result.duplicates) for row in group}
    trained = {number.get(made["train"].describe(i)) for i in range(len(made["train"]))}
    expected = {name for name in held if number.get(name, -1) in trained}
    assert {result.name(later) for _, later in pairs} == expected and expected
    assert all(result.name(first) not in held for first, _ in pairs)
    line = f"{len(pairs)} test image"
    assert any(text.startswith(line) and "(train -> test)" in text for text in result.problems())
    page = " ".join(check_page((tmp_path / "check/report.html").read_text()).text.split())
    assert "No image is in two splits" not in page
    told = Told()
    warn_of_copies(result.training, told, cached=False)
    [warning] = [text for text in told.warnings if "look" in text]
    assert f"{len(pairs)} of {len(held)} test images look" in warning
    assert "unreliable" in warning and "too high" not in warning
    # Its count of conflicts is that of `check` within the training images.
    within = re.search(r"in (\d+) groups look the same and have different", warning)[1]
    assert any(f"({within} of them within the training images)" in t for t in result.problems())


def test_a_copy_in_given_splits_is_told_once(faulty):
    """The validation images that training would hold out too are searched, but not twice."""
    result = check.run(str(faulty), settings={"data": {"validation_fraction": 0.3}})
    later = [pair[1] for pairs in result.leaks.values() for pair in pairs]
    assert "train -> test" in result.leaks and len(later) == len(set(later))
    assert "validation" in result.training.splits


def test_unreadable_images_and_a_missing_validation_split_are_said(untidy, capfd):
    found = check.run(untidy).to_json()
    assert sum(found["training"]["unreadable"].values()) == 3
    assert vitcli(["check", untidy]) == 3
    out, err = capfd.readouterr()
    out = " ".join(out.split())
    counts = ", ".join(
        f"{n} {name} ({found['training']['unreadable'][name]} unreadable)"
        for name, n in found["training"]["splits"].items()
    )
    assert f"training uses {counts}; too few images for validation" in out
    assert "images 51, no split" in out
    assert "1 of 51 images does not exist" in err


def test_more_groups_than_shown_are_counted(untidy, capfd):
    groups = len(check.run(untidy).near_duplicates)
    vitcli(["check", untidy])
    out, _ = capfd.readouterr()
    assert f"near duplicates: and {groups - 3} more groups of images; `--out check/` shows" in out


def test_what_stops_training_has_its_remedy(tmp_path, capfd):
    nested = small(tmp_path / "nested", *(f"all/{c}/{i}.png" for c in "ab" for i in range(3)))
    small(tmp_path / "nested", "all/c.png")
    flat = small(tmp_path / "flat", "1.png", "2.png")
    for data in (nested, flat):
        result = check.run(data, settings={"data": {"class_level": "top"}})
        assert result.training.hint and result.training.hint in result.problems()[0]
    capfd.readouterr()
    assert vitcli(["check", flat]) == 0
    assert "class" not in {line.split()[0] for line in capfd.readouterr()[0].splitlines() if line}


def test_images_without_a_label_are_no_class(tmp_path):
    data = small(tmp_path / "photos", *(f"train/{c}/{i}.png" for c in "ab" for i in range(5)))
    small(tmp_path / "photos", "test/1.png", "test/2.png")
    found = check.run(data)
    assert list(found.to_json()["classes"]) == ["a", "b"]
    assert found.to_json()["splits"] == {"train": 10, "test": 2}
    assert found.imbalance == 1 and found.to_json()["suggested_setting"] is None
    lines = found.problems()
    assert "2 images have no label" in lines
    assert not any("fewer than" in line for line in lines)


def test_what_training_refuses_is_a_problem(tmp_path):
    data = small(tmp_path / "other", "train/a/1.png", "train/b/1.png", "test/c/1.png")
    found = check.run(data).to_json()
    assert found["classes"] == {
        "a": {"train": 1, "test": 0}, "b": {"train": 1, "test": 0}, "c": {"train": 0, "test": 1},
    }  # fmt: skip
    assert "training stops: " in found["problems"][0]
    assert "class `c` is in `test` but not in `train`" in found["training"]["error"]
    assert found["training"]["hint"]
    assert vitcli(["check", data]) == 0  # all images can be read
    for paths in (("a/1.png", "a/2.png"), ("1.png", "2.png")):
        data = small(tmp_path / f"x{len(paths[0])}", *paths)
        assert check.run(data).problems()[0].startswith("training stops: ")


def test_a_folder_of_broken_images(tmp_path, capfd):
    for name in ("a/1.jpg", "b/1.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"no image")
    assert vitcli(["check", str(tmp_path)]) == 3
    out, _ = capfd.readouterr()
    assert "no image can be read" in out


def test_what_training_makes_of_a_table(tmp_path):
    """Spellings, missing labels, folds, copies and groups are reported before a training run."""
    pictures = list(photographs(12))
    rows = ["path,label,fold,patient"]
    for i, picture in enumerate([*pictures, pictures[0]]):
        picture.save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{['cat', 'cat ', 'dog', 'NaN'][i % 4]},{i % 3},p{i // 2}")
    (tmp_path / "x.csv").write_text("\n".join(rows))
    path = str(tmp_path / "x.csv")
    found = check.run(path).to_json()
    notes = "\n".join(found["notes"])
    assert "skipped 3 rows without path or label (3 `NaN`)" in notes
    assert "merged 1 spelling" in notes and "holds 3 folds, `0` to `2`" in notes
    assert "column `fold` holds 3 folds" in found["training"]["error"]
    assert any("training stops" in line for line in found["problems"])
    made = check.run(path, settings={"data": {"test_fold": 0}}).to_json()["training"]
    assert made["splits"] == {"train": 6, "test": 4}
    assert any("fold `0` of column `fold`" in note for note in made["notes"])
    settings = {"split_column": "none", "group_column": "patient"}
    made = check.run(path, settings={"data": settings}).to_json()["training"]
    notes = "\n".join(made["notes"])
    assert sum(made["splits"].values()) == 10 and made["classes"] == 2
    assert "1 image is an exact copy of other images" in notes
    assert "images with the same `patient` stay in the same split" in notes

"""Near copies before training and evaluation: the numbers of `check`, the cache, the time limit."""

import io
import os
import re
import shutil
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from support.pictures import photographs
from support.tiny import train_tiny
from support.watching import Told
from typer.testing import CliRunner

from vitcli.cli.app import app
from vitcli.commands import check, evaluate, fewshot
from vitcli.data.source import load_data
from vitcli.evals import near_copies
from vitcli.evals.near_copies import warn_of_copies

TRAIN, TEST = 12, 6  # images per class of `photos`


def smaller(picture):
    """A recompressed copy of half the size."""
    file = io.BytesIO()
    picture.resize((48, 48), Image.Resampling.BILINEAR).save(file, "JPEG", quality=70)
    return Image.open(file)


@pytest.fixture
def photos(here, monkeypatch):
    """Two classes; 3 test images are near copies, and 2 train images have both labels."""
    monkeypatch.setenv("VITCLI_CACHE", str(here / "cache"))
    pictures = list(photographs(2 * (TRAIN + TEST)))
    for label in ("cat", "dog"):
        for split, count in (("train", TRAIN), ("test", TEST)):
            folder = here / "photos" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                pictures.pop().save(folder / f"{i}.png")
    for i in range(3):
        with Image.open(f"photos/train/cat/{i}.png") as picture:
            smaller(picture).save(f"photos/test/cat/{i}.png")
    for i in (4, 5):
        with Image.open(f"photos/train/cat/{i}.png") as picture:
            smaller(picture).save(f"photos/train/dog/{i}.png")
    return "photos"


def told_of(source, **options):
    told = Told()
    found = warn_of_copies(source, told, **options)
    return found, told


def forbid_reading(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("an image was read again")

    monkeypatch.setattr(near_copies, "scan_images", fail)


def test_the_numbers_are_those_of_check(photos):
    found, told = told_of(load_data(photos))
    [line] = told.warnings
    known = check.run(photos)
    pairs, groups = known.leaks["train -> test"], known.conflicts
    assert (len(pairs), len(groups), sum(map(len, groups))) == (3, 2, 4)
    assert f"{len(pairs)} of {2 * TEST} test images look the same as train images" in line
    assert f"{sum(map(len, groups))} train images in {len(groups)} groups" in line
    assert {known.name(row) for row in pairs[0]} <= set(line.split("`"))
    assert "`vitcli check photos` lists them" in line and "(cat)" in line and "(dog)" in line
    assert found.warnings == found.notes[-1:] == (line,)


def test_labels_are_left_out_for_objectives_that_use_none(photos):
    assert "different labels" not in told_of(load_data(photos), labels=False)[1].warnings[0]


def test_nothing_is_said_about_clean_data(photos):
    shutil.rmtree("photos/test/cat")
    shutil.rmtree("photos/train/dog")
    source = load_data(photos, labelled=False)
    found, told = told_of(source)
    assert not told.lines and found is source


def test_exact_copies_are_told_once_by_the_data_themselves(photos):
    shutil.rmtree("photos/test/cat")
    shutil.rmtree("photos/train/dog")
    shutil.copytree("photos/train/cat", "photos/test/cat")
    shutil.rmtree("photos/test/dog")
    told = told_of(load_data(photos, labelled=False))[1]  # such data are not compared byte by byte
    assert f"{TRAIN} of {TRAIN} test images look the same" in told.warnings[0]
    assert f"({TRAIN} exact copies)" in told.warnings[0]
    Path("photos/train/dog").mkdir()
    Image.new("RGB", (96, 96)).save("photos/train/dog/0.png")
    source = load_data(photos)
    assert f"{TRAIN} of {TRAIN} test images are exact copies" in source.warnings[0]
    assert not told_of(source)[1].warnings


def test_a_second_command_reads_no_image(photos, monkeypatch):
    first = told_of(load_data(photos))[1].warnings
    with monkeypatch.context() as patch:
        forbid_reading(patch)
        assert told_of(load_data(photos))[1].warnings == first
        with pytest.raises(AssertionError, match="read again"):
            told_of(load_data(photos), cached=False)
    # An image that changes is noticed, though its name and size stay.
    path = Path("photos/test/cat/0.png")
    Image.open("photos/test/cat/5.png").save(path)
    os.utime(path, (1, 1))
    assert "2 of 12 test images" in told_of(load_data(photos))[1].warnings[0]


def test_a_damaged_cache_is_made_again(photos):
    first = told_of(load_data(photos))[1].warnings
    files = sorted(Path("cache/features").glob("*/hashes.npz"))
    assert len(files) == 2
    content = bytearray(files[0].read_bytes())
    content[len(content) // 2] ^= 1
    files[0].write_bytes(content)
    files[1].write_bytes(b"")
    assert told_of(load_data(photos))[1].warnings == first


def test_a_cache_that_cannot_be_written_costs_a_warning(photos, monkeypatch):
    Path("file").write_text("")
    monkeypatch.setenv("VITCLI_CACHE", "file")
    warnings = told_of(load_data(photos))[1].warnings
    assert "not cached" in warnings[0] and "3 of 12 test images" in warnings[-1]


def test_a_large_set_is_compared_in_parts(photos, monkeypatch):
    """Each command looks at one more part; together they find what one command finds."""
    monkeypatch.setattr("vitcli.data.scan.PART", 5)
    whole = told_of(load_data(photos), cached=False)[1].warnings
    counts = []
    for _ in range(20):
        now = iter([0.0, 0.0, 2.0, 2.0, 2.0])  # the time is over after a part
        with monkeypatch.context() as patch:
            patch.setattr(near_copies.time, "monotonic", lambda now=now: next(now, 2.0))
            told = told_of(load_data(photos), seconds=1.0)[1]
        if not told.notes:
            break
        [note] = told.notes
        assert "of 36 images are compared so far, 1 s per command" in note
        counts.append(int(note.split(": ")[1].split(" of ")[0]))
    assert counts == sorted(set(counts)) and counts[0] < 12 and len(counts) > 2
    assert told.warnings == whole


def test_too_many_images_are_left_to_check(photos, monkeypatch):
    monkeypatch.setattr(near_copies, "MAX_COMPARED", 35)
    forbid_reading(monkeypatch)
    told = told_of(load_data(photos))[1]
    assert told.notes == [
        "photos: 36 images are not compared at the start; `vitcli check photos` does it"
    ]


@pytest.mark.parametrize("data", ["builtin:digits", "builtin:formula"])
def test_built_in_data_are_not_looked_at(data, monkeypatch):
    forbid_reading(monkeypatch)
    source = load_data(data)
    assert told_of(source)[0] is source


def test_built_in_digits_have_no_copies():
    assert not check.run("builtin:digits").duplicates


def test_training_warns_once_and_a_resume_does_not(photos, monkeypatch):
    settings = {"data": {"name": photos}, "train": {"steps": 2, "batch_size": 4}}
    told = Told()
    train_tiny("run", watch=told, **settings)
    assert sum("look the same" in line for line in told.warnings) == 1
    assert "look the same" in Path("run/log.txt").read_text()
    again = Told()
    settings["train"] |= {"steps": 4}
    train_tiny("run", watch=again, resume=True, **settings)
    assert not any("look the same" in line for line in again.lines)


def test_images_that_the_model_was_trained_on_in_other_data(photos):
    train_tiny("run", data={"name": photos}, train={"steps": 2, "batch_size": 4})
    for label in ("cat", "dog"):
        Path("new", label).mkdir(parents=True)
        for i in range(4):
            origin = "train" if label == "cat" and i < 2 else "test"
            with Image.open(f"photos/{origin}/{label}/{i}.png") as picture:
                picture.resize((64, 64), Image.Resampling.BILINEAR).save(f"new/{label}/{i}.jpg")
    # 2 are of train; 1 of the others was a near copy of a train image before.
    told = Told()
    evaluate.run("new", model="run", watch=told)
    [line] = [line for line in told.warnings if "look the same" in line]
    assert "3 of 8 test images look the same as images that `run` was trained on" in line
    told = Told()
    evaluate.run("new", model="run", watch=told, check=False)
    assert not any("look the same" in line for line in told.lines)


def test_evaluate_and_fewshot_warn_of_their_data(photos):
    train_tiny("run", data={"name": "builtin:digits"}, train={"steps": 2})
    told = Told()
    fewshot.run(photos, model="run", settings={"fewshot": {"shots": [1]}}, watch=told)
    assert sum("look the same" in line for line in told.warnings) == 1
    assert not any("look the same" in line for line in told.notes)


@pytest.mark.parametrize("command", ["pretrain", "finetune", "fewshot", "evaluate"])
def test_no_check(command, monkeypatch):
    """The switch reaches the function of each command."""
    given = {}
    monkeypatch.setattr(
        f"vitcli.commands.{command}.run", lambda *_, **options: given.update(options) or 1 / 0
    )
    for switch, wanted in (([], True), (["--no-check"], False)):
        CliRunner().invoke(app, [command, "photos", *switch])
        assert given["check"] is wanted


def test_the_messy_folder(shared, tmp_path):
    """Turned, recoloured and converted copies of one photograph in both splits."""
    with tarfile.open(shared / "data" / "messy.tar.xz") as archive:
        archive.extractall(tmp_path, filter="fully_trusted")
    known = check.run(str(tmp_path / "messy" / "odd"))
    groups = {known.name(row): group for row, group in enumerate(known.groups.tolist())}
    source = load_data(tmp_path / "messy" / "odd")
    train, test = (
        [groups.get(images.describe(i)) for i in range(len(images))]
        for images in (source.splits["train"], source.splits["test"])
    )
    expected = sum(group in train for group in test if group is not None)
    line = told_of(source, cached=False)[1].warnings[0]
    found = int(re.search(r": (\d+) of \d+ test images look the same as train", line)[1])
    assert expected > 3
    assert abs(found - expected) <= 1  # files are decoded at a reduced scale here

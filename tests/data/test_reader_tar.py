"""WebDataset shards: the same pictures as in loose files, in any order, and damage is told."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.pictures import photographs

from vitcli.data.loader import TrainLoader
from vitcli.data.source import load_data
from vitcli.data.splits import expand_braces
from vitcli.data.streaming import read_tar_samples
from vitcli.decode import ImageError
from vitcli.errors import VitcliError


def jpeg(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.getvalue()


def write(path, members):
    with tarfile.open(path, "w") as shard:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    """Three training shards of four samples and a test shard, labels 0..2 in `.cls`."""
    contents = [jpeg(p) for p in photographs(16, size=40)]
    for number in range(4):
        name = f"train-{number:03}.tar" if number < 3 else "test-000.tar"
        members = []
        for i in range(4 * number, 4 * number + 4):
            members += [(f"{i:04}.jpg", contents[i]), (f"{i:04}.cls", str(i % 3).encode())]
        write(tmp_path / name, members)
    return tmp_path, contents


@pytest.mark.parametrize(
    ("notation", "names"),
    [
        ("x-{000..002}.tar", ["x-000.tar", "x-001.tar", "x-002.tar"]),
        ("x-{8..10}.tar", ["x-8.tar", "x-9.tar", "x-10.tar"]),
        ("{a,b}-{1..2}.tar", ["a-1.tar", "a-2.tar", "b-1.tar", "b-2.tar"]),
        ("x-{2..0}.tar", ["x-0.tar", "x-1.tar", "x-2.tar"]),
        ("plain.tar", ["plain.tar"]),
    ],
)
def test_braces(notation, names):
    assert list(expand_braces(notation)) == names


def test_pictures_and_labels_are_those_that_went_in(shards):
    folder, contents = shards
    source = load_data(str(folder))
    assert {name: len(images) for name, images in source.splits.items()} == {"train": 12, "test": 4}
    assert source.classes == ("0", "1", "2")
    for split, first in (("train", 0), ("test", 12)):
        images = source.splits[split]
        assert images.labels.tolist() == [(first + i) % 3 for i in range(len(images))]
        for i in np.random.default_rng(0).permutation(len(images)):
            with Image.open(io.BytesIO(contents[first + i])) as expected:
                assert images.read(int(i)).tobytes() == expected.convert("RGB").tobytes()
    assert source.splits["train"].describe(5) == f"{folder}/train-001.tar:0005.jpg"


def test_a_brace_notation_and_a_single_shard(shards):
    folder, _ = shards
    whole = load_data(f"{folder}/train-{{000..002}}.tar", whole=True)
    assert {name: len(images) for name, images in whole.splits.items()} == {"train": 12}
    one = load_data(f"{folder}/train-001.tar", whole=True)
    assert len(one.splits["train"]) == 4
    with pytest.raises(VitcliError, match=r"train-003.tar` and 1 more of 5"):
        load_data(f"{folder}/train-{{000..004}}.tar")


def test_batches_are_those_of_the_same_files_loose(shards, tmp_path):
    """Order, augmentation and so resuming do not depend on where the bytes lie."""
    from vitcli.config.schema import AugmentSection
    from vitcli.data.augment.transform import TrainTransform
    from vitcli.preprocess import Preprocess

    folder, contents = shards
    rows = ["path,label,split"]
    for i, content in enumerate(contents[:12]):
        (tmp_path / f"loose{i}.jpg").write_bytes(content)
        rows.append(f"loose{i}.jpg,{i % 3},train")
    (tmp_path / "loose.csv").write_text("\n".join(rows))
    transform = TrainTransform(Preprocess((16, 16)), AugmentSection())
    found = []
    for data in (f"{folder}/train-{{000..002}}.tar", str(tmp_path / "loose.csv")):
        images = load_data(data, whole=True).splits["train"]
        loader = TrainLoader(images, transform, batch_size=6, seed=3, workers=2)
        found.append(torch.cat([batch.images for batch in loader.batches(6, 3)]))
    assert torch.equal(*found)


def test_labels_in_json_names_beside_and_unlabelled_samples(tmp_path):
    content = [jpeg(p) for p in photographs(5, size=20)]
    members = []
    for i in range(4):
        described = {"width": 20, "kind": ["cat", "dog"][i % 2]}
        members += [(f"d/{i}.json", json.dumps(described).encode()), (f"d/{i}.jpg", content[i])]
    members += [("d/4.jpg", content[4]), ("d/5.cls", b"1"), ("README.md", b"words")]
    write(tmp_path / "x.tar", members)
    with pytest.raises(VitcliError, match="no sample with an image and a label"):
        load_data(str(tmp_path / "x.tar"))
    source = load_data(str(tmp_path / "x.tar"), label_column="kind", whole=True)
    assert source.classes == ("cat", "dog")
    assert source.splits["train"].labels.tolist() == [0, 1, 0, 1]
    assert any("1 sample without a label" in note for note in source.notes)
    numbered = [(f"{i}.jpg", content[i]) for i in range(2)] + [("0.cls", b"0")]
    pairs = sorted([*numbered, ("1.cls", b"1")])
    write(tmp_path / "y.tar", pairs)
    (tmp_path / "classes.txt").write_text("tench\ngoldfish\nshark\n")
    source = load_data(str(tmp_path / "y.tar"), whole=True)
    assert source.classes == ("tench", "goldfish", "shark")


def test_a_shard_that_is_cut_off_is_read_up_to_there(shards):
    folder, _ = shards
    path = folder / "train-001.tar"
    path.write_bytes(path.read_bytes()[:5000])
    source = load_data(str(folder))
    assert 8 < len(source.splits["train"]) < 12
    assert any("train-001.tar is truncated" in note for note in source.notes)
    images = source.splits["train"]
    for i in range(len(images)):
        try:
            images.read(i)
        except ImageError as error:  # the last one before the cut, at most
            assert "train-001.tar" in error.name


def test_compressed_and_other_files_are_refused(tmp_path):
    write(tmp_path / "x.tar", [("0.jpg", b"x")])
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress((tmp_path / "x.tar").read_bytes()))
    (tmp_path / "z.tar").write_bytes(gzip.compress((tmp_path / "x.tar").read_bytes()))
    (tmp_path / "w.tar").write_bytes(b"words, and no tar file" * 100)
    for name in ("x.tar.gz", "z.tar", "w.tar"):
        with pytest.raises(VitcliError) as caught:
            load_data(str(tmp_path / name))
        assert "tar file" in caught.value.message
        assert "gunzip" in str(caught.value.hint)
        assert "extract it or make a .zip" in str(caught.value.hint)


def test_class_folders_in_a_tar_file(tmp_path):
    members = [(f"{c}/{i}.jpg", b"x") for c in ("cat", "dog") for i in range(2)]
    write(tmp_path / "x.tar", members)
    with pytest.raises(VitcliError) as caught:
        load_data(str(tmp_path / "x.tar"))
    assert "extract it or make a .zip" in str(caught.value.hint)


@pytest.mark.parametrize("form", ["train/{}.tar", "set-train-{}.tar", "data/train-{}.tar"])
def test_splits_by_folder_or_by_a_word_in_the_name(shards, tmp_path, form):
    folder, _ = shards
    place = tmp_path / "other"
    for number, split in enumerate(("train", "train", "train", "test")):
        file = place / form.format(number).replace("train", split)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes((folder / f"{split}-{number % 3:03}.tar").read_bytes())
    (place / ".cache").mkdir()
    (place / "logs").mkdir()
    data = load_data(str(place))
    assert {name: len(s) for name, s in data.splits.items()} == {"train": 12, "test": 4}


def test_an_empty_shard_is_named(tmp_path):
    (tmp_path / "x.tar").touch()
    with pytest.raises(VitcliError, match=r"x\.tar` is empty"):
        load_data(str(tmp_path / "x.tar"))


def test_a_folder_of_class_folders_is_no_set_of_shards(tmp_path):
    for i, picture in enumerate(photographs(4, size=20)):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        picture.save(tmp_path / "ab"[i % 2] / f"{i}.png")
    write(tmp_path / "backup.tar", [("x.txt", b"x")])
    assert load_data(str(tmp_path)).classes == ("a", "b")


def dotted_members():
    """Names with versions, beside plain names, several images per key, and an image in a note."""
    content = [jpeg(p) for p in photographs(7, size=20)]
    names = ["a.v1", "a.v2", "b", "1.2.840.1", "1.2.840.2"]
    members = []
    for i, name in enumerate(names):
        members += [(f"d/{name}.jpg", content[i]), (f"d/{name}.cls", f"{i % 2}".encode())]
    # `left` and `right` are two images of one sample, as webdataset reads it.
    members += [("c.left.jpg", content[5]), ("c.right.jpg", content[6]), ("c.cls", b"1")]
    return members, {f"d/{name}": i % 2 for i, name in enumerate(names)} | {"c": 1}


def test_names_with_dots(tmp_path):
    members, expected = dotted_members()
    write(tmp_path / "x.tar", members)
    data = load_data(str(tmp_path / "x.tar"), whole=True)
    images = data.splits["train"]
    found = {
        images.describe(i).partition(":")[2]: int(images.labels[i]) for i in range(len(images))
    }
    first = {"c": "c.left"}
    assert found == {f"{first.get(key, key)}.jpg": label for key, label in expected.items()}
    by_name = dict(members)
    for i in range(len(images)):
        name = images.describe(i).partition(":")[2]
        assert images.content(i) == by_name[name]
    (note,) = [note for note in data.notes if "last dot" in note]
    assert "4 sample names end at the last dot, such as `d/a.v1`" in note


def test_a_stream_reads_names_with_dots_alike(tmp_path):
    members, expected = dotted_members()
    write(tmp_path / "x.tar", members)
    with (tmp_path / "x.tar").open("rb") as file:
        samples = list(read_tar_samples(file, (None, None)))
    assert {key: int(label) for _, label, key in samples} == expected
    assert [content for content, _, _ in samples] == [
        content for name, content in members if name.endswith("jpg") and name != "c.right.jpg"
    ]


def test_a_metadata_file_of_a_mask_is_no_label(tmp_path):
    """The key ends at the first dot as long as a member `KEY.cls` or `KEY.json` is there."""
    content = [jpeg(p) for p in photographs(4, size=20)]
    members = []
    for i in range(2):
        mask = [(f"{i}.seg.json", b'{"label": "mask"}'), (f"{i}.seg.png", content[2 + i])]
        members += [*mask, (f"{i}.cls", b"%d" % i), (f"{i}.jpg", content[i])]
    write(tmp_path / "x.tar", members)
    data = load_data(str(tmp_path / "x.tar"), whole=True)
    assert len(data.splits["train"]) == 2 and data.classes == ("0", "1")


def test_a_pattern_without_files_asks_for_some_of_them(tmp_path, monkeypatch):
    asked, real = [], Path.is_file

    def is_file(path):
        asked.append(path)
        return real(path)

    monkeypatch.setattr(Path, "is_file", is_file)
    with pytest.raises(VitcliError, match=r"x-0\.tar` and at least 999 more of 100000"):
        load_data(f"{tmp_path}/x-{{0..99999}}.tar")
    assert len(asked) < 2000

"""`hf:` data sets from a Hub on loopback: what is chosen, fetched, kept and told."""

import io
import json
import os
import tarfile

import datasets
import numpy as np
import pandas
import pytest
from huggingface_hub import constants
from PIL import Image
from support.flipping import flip, flips
from support.watching import Told

from vitcli.cli.main import run
from vitcli.data.source import load_data
from vitcli.errors import VitcliError
from vitcli.hub import repository
from vitcli.hub.datasets import choose_files, find_dataset, parse_dataset
from vitcli.hub.repository import fetch_file
from vitcli.hub.verified import VerifiedFiles


def png(level):
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (level, level, level)).save(buffer, "PNG")
    return buffer.getvalue()


def parquet(path, levels, labels, names=("cat", "dog")):
    path.parent.mkdir(parents=True, exist_ok=True)
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=list(names))}
    )
    rows = {"img": [{"bytes": png(v), "path": None} for v in levels], "label": list(labels)}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


def two_splits(folder):
    parquet(folder / "train-00000-of-00002.parquet", [1, 2, 3], [0, 1, 0])
    parquet(folder / "train-00001-of-00002.parquet", [4, 5, 6], [1, 1, 0])
    parquet(folder / "test-00000-of-00001.parquet", [7, 8], [1, 0])


def levels(images):
    return [images.read(i, "L").getpixel((0, 0)) for i in range(len(images))]


def resolved(hub):
    """Names of the files that were asked for."""
    return {r.path.rpartition("/")[2] for r in hub.asked() if "/resolve/" in r.path}


@pytest.fixture
def pets(loopback):
    """The data set `org/pets`, in the layout that `push_to_hub` writes."""
    two_splits(loopback.root / "datasets/org/pets/data")
    (loopback.root / "datasets/org/pets/README.md").write_text("# Pets\n")
    return loopback


def test_a_parquet_repository(pets):
    data = load_data("hf:org/pets")
    assert data.classes == ("cat", "dog") and data.notation == "hf:org/pets"
    assert levels(data.splits["train"]) == [1, 2, 3, 4, 5, 6]
    assert levels(data.splits["test"]) == [7, 8]
    assert data.splits["train"].labels.tolist() == [0, 1, 0, 1, 1, 0]
    commit = pets.commit("org/pets", kind="datasets")
    assert f"hf:org/pets: commit {commit}, 3 parquet files" in data.notes
    assert data.splitting["commit"] == commit
    again = load_data("hf:org/pets")
    assert again.fingerprint == data.fingerprint
    assert sum(r.path.endswith(".parquet") for r in pets.asked()) == 3  # each once


def test_a_name_without_an_owner(loopback):
    two_splits(loopback.root / "datasets/cifar10/plain_text")
    assert len(load_data("hf:cifar10").splits["train"]) == 6
    assert len(load_data("hf:cifar10:plain_text").splits["test"]) == 2


def test_configurations_and_revisions(pets):
    root = pets.root / "datasets/org/two"
    two_splits(root / "small")
    parquet(root / "large/train.parquet", range(10), [0, 1] * 5)
    with pytest.raises(VitcliError, match=r"has 2 configurations: `large`, `small`") as caught:
        load_data("hf:org/two")
    assert "hf:…:large" in caught.value.hint
    data = load_data("hf:org/two:small")
    assert len(data.splits["train"]) == 6 and data.splitting["config"] == "small"
    assert "configuration `small`" in data.notes[0]
    assert "train.parquet" not in resolved(pets)
    with pytest.raises(VitcliError, match=r"no configuration `medium`"):
        load_data("hf:org/two:medium")
    parquet(pets.root / "datasets/org/two@v1/train.parquet", [1, 2], [0, 1])
    assert levels(load_data("hf:org/two@v1", whole=True).splits["train"]) == [1, 2]
    with pytest.raises(VitcliError, match=r"no revision `v2`"):
        load_data("hf:org/two@v2")


def test_the_card_decides(pets):
    root = pets.root / "datasets/org/card"
    parquet(root / "a/x.parquet", [1, 2], [0, 1])
    parquet(root / "a/y.parquet", [3], [0])
    parquet(root / "b/z.parquet", [4, 5], [0, 1])
    (root / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: first\n  data_files:\n"
        "  - split: train\n    path: a/x*\n  - split: test\n    path: [a/y.parquet]\n"
        "- config_name: second\n  default: true\n  data_files: b/*.parquet\n---\ntext\n"
    )
    assert levels(load_data("hf:org/card", whole=True).splits["train"]) == [4, 5]
    first = load_data("hf:org/card:first")
    assert [levels(s) for s in first.splits.values()] == [[1, 2], [3]]


def test_other_splits_are_left_until_asked_for(pets):
    root = pets.root / "datasets/org/odd"
    parquet(root / "data/train-0.parquet", [1, 2], [0, 1])
    (root / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - split: train\n    path: data/train-*\n"
        "  - split: hidden\n    path: data/hidden-*\n---\n"
    )
    parquet(root / "data/hidden-0.parquet", [3, 4], [0, 1])
    data = load_data("hf:org/odd", whole=True)
    assert list(data.splits) == ["train"] and "`hidden` not read" in data.notes[1]
    data = load_data("hf:org/odd", test_split="hidden")
    assert [levels(s) for s in data.splits.values()] == [[1, 2], [3, 4]]


def test_the_hubs_own_parquet_stands_in_for_a_script(pets):
    root = pets.root / "datasets/org/scripted"
    root.mkdir()
    (root / "scripted.py").write_text("raise SystemExit('this must never run')")
    (root / "images.zip").write_bytes(b"PK")
    with pytest.raises(VitcliError, match=r"a script, which vitcli never executes"):
        load_data("hf:org/scripted")
    converted = pets.root / "datasets/org/scripted@refs%2Fconvert%2Fparquet"
    parquet(converted / "default/train/0000.parquet", [1, 2], [0, 1])
    parquet(converted / "default/test/0000.parquet", [3], [1])
    data = load_data("hf:org/scripted")
    assert [levels(s) for s in data.splits.values()] == [[1, 2], [3]]
    assert "made by the Hub" in data.notes[0]
    assert "scripted.py" not in resolved(pets)
    (converted / "default/test").rename(converted / "default/partial-test")
    with pytest.raises(VitcliError, match=r"a script, which vitcli never executes"):
        load_data("hf:org/scripted")  # a part of the data is not the data


def test_shards(pets):
    root = pets.root / "datasets/org/shards"
    (root / "train").mkdir(parents=True)
    for split, number in (("train", 0), ("train", 1), ("test", 2)):
        (root / split).mkdir(exist_ok=True)
        with tarfile.open(root / split / f"{number:05}.tar", "w") as shard:
            for i in range(2):
                for ending, content in (("png", png(10 * number + i)), ("cls", b"%d" % i)):
                    member = tarfile.TarInfo(f"{number}{i}.{ending}")
                    member.size = len(content)
                    shard.addfile(member, io.BytesIO(content))
    (root / "classes.txt").write_text("cat\ndog\n")
    data = load_data("hf:org/shards")
    assert {k: levels(s) for k, s in data.splits.items()} == {
        "train": [0, 1, 10, 11],
        "test": [20, 21],
    }
    assert data.splits["train"].labels.tolist() == [0, 1, 0, 1] and data.classes == ("cat", "dog")


def test_class_folders(pets):
    root = pets.root / "datasets/org/folders"
    for split, name, level in (("train", "cat", 1), ("train", "dog", 2), ("test", "dog", 3)):
        (root / split / name).mkdir(parents=True)
        (root / split / name / "0.png").write_bytes(png(level))
    (root / "LICENSE").write_text("free")
    data = load_data("hf:org/folders")
    assert [levels(s) for s in data.splits.values()] == [[1, 2], [3]]
    assert data.notation == "hf:org/folders" and "3 images" in data.notes[0]
    assert "LICENSE" not in resolved(pets)


def cached_file(hub, name):
    return next((hub.home / "hub").glob(f"datasets--*/snapshots/*/{name}"))


@pytest.mark.parametrize("name", ["README.md", "data/test-00000-of-00001.parquet"])
def test_each_flipped_bit_in_the_cache_is_downloaded_again(pets, name):
    load_data("hf:org/pets")
    repo_files, _ = find_dataset("hf:org/pets")
    path = cached_file(pets, name)
    content = path.read_bytes()

    def check(position):
        told = Told()
        with VerifiedFiles(repo_files.repository.folder) as verified:
            assert fetch_file(repo_files, name, told, verified=verified) == path
        assert path.read_bytes() == content and "is damaged in the cache" in told.warnings[0]

    flips(path, check, places=25)


def test_a_damaged_image_in_the_cache_is_downloaded_again(pets):
    for label, level in (("cat", 5), ("dog", 6)):
        (pets.root / f"datasets/org/folders/{label}").mkdir(parents=True)
        (pets.root / f"datasets/org/folders/{label}/0.png").write_bytes(png(level))
    load_data("hf:org/folders")
    cached_file(pets, "dog/0.png").write_bytes(png(9))
    told = Told()
    assert levels(load_data("hf:org/folders", whole=True, watch=told).splits["train"]) == [5, 6]
    assert len(told.warnings) == 1 and "`dog/0.png` of `hf:org/folders` is damaged" in told.lines[0]


def test_files_that_have_not_changed_are_hashed_once(pets, monkeypatch):
    hashed = []
    real = repository._checksum_matches

    def matches(files, path):
        hashed.append(path)
        return real(files, path)

    monkeypatch.setattr(repository, "_checksum_matches", matches)

    def now():
        hashed.clear()
        load_data("hf:org/pets")
        return [path for path in hashed if path.endswith(".parquet")]

    assert len(now()) == 3 and now() == []
    touched = cached_file(pets, "data/test-*")
    os.utime(touched, ns=(1, 1))
    assert now() == ["data/test-00000-of-00001.parquet"] and now() == []
    for record in (pets.home / "vitcli/verified").iterdir():
        record.write_text('{"a": [')
    assert len(now()) == 3


def test_without_links_the_list_of_the_files_tells_the_checksum(pets, monkeypatch):
    load_data("hf:org/pets")
    for path in (pets.home / "hub").glob("datasets--*/snapshots/*/**/*"):
        if path.is_symlink():
            path.resolve().replace(path)
    path = cached_file(pets, "data/test-*")
    content = path.read_bytes()
    flip(path, 100)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(VitcliError, match=r"is not in the cache, and HF_HUB_OFFLINE"):
        load_data("hf:org/pets")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    load_data("hf:org/pets")
    assert path.read_bytes() == content


def described(data):
    """Split -> (level, class) of each image: what an image folder is read as."""
    return {
        split: sorted(zip(levels(images), map(images.label_name, range(len(images))), strict=True))
        for split, images in data.splits.items()
    }


LABELLED = [
    (f"{split}/{i}.png", "cat" if i % 2 else "dog") for split in ("train", "test") for i in range(4)
]


@pytest.mark.parametrize(
    "layout", ["one table", "a table for each split", "beside the images", "in data/"]
)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_folder_with_a_table_is_read_as_on_the_disk(pets, layout, suffix):
    """`datasets` calls it `imagefolder`: `metadata.csv` with `file_name` and the labels."""
    root = pets.root / "datasets/org/tabled"
    tables = {
        "one table": {"": LABELLED},
        "beside the images": {"": [(name.replace("/", "-"), label) for name, label in LABELLED]},
        "in data/": {"data/": LABELLED},
        "a table for each split": {
            f"{split}/": [(f"{i}.png", "cat" if i % 2 else "dog") for i in range(4)]
            for split in ("train", "test")
        },
    }[layout]
    for folder, rows in tables.items():
        for number, (name, _) in enumerate(rows):
            (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (root / folder / name).write_bytes(png(number + 100 * folder.startswith("test")))
        frame = pandas.DataFrame(rows, columns=["file_name", "label"])
        table = root / folder / f"metadata{suffix}"
        write = {".csv": frame.to_csv, ".parquet": frame.to_parquet}
        if suffix == ".jsonl":
            frame.to_json(table, orient="records", lines=True)
        else:
            write[suffix](table, index=False)
    (root / "README.md").write_text("# Pets\n")
    data, local = load_data("hf:org/tabled"), load_data(str(root))
    assert described(data) == described(local)
    assert sum(map(len, data.splits.values())) == 8 and set(data.splits) == {"train", "test"}
    if layout != "beside the images":
        assert [len(images) for images in data.splits.values()] == [4, 4]
        assert described(data)["train"] == [(0, "dog"), (1, "cat"), (2, "dog"), (3, "cat")]


def test_tables_that_name_the_splits_are_read_as_on_the_disk(pets):
    root = pets.root / "datasets/org/lists"
    (root / "images").mkdir(parents=True)
    for number in range(6):
        (root / f"images/{number}.png").write_bytes(png(number))
    rows = [f"images/{number}.png,{'cat' if number % 2 else 'dog'}\n" for number in range(6)]
    (root / "train.csv").write_text("path,label\n" + "".join(rows[:4]))
    (root / "test.csv").write_text("path,label\n" + "".join(rows[4:]))
    data = load_data("hf:org/lists")
    assert described(data) == described(load_data(str(root)))
    assert described(data)["test"] == [(4, "dog"), (5, "cat")]


def test_without_the_hub_what_was_fetched_serves(pets, monkeypatch):
    before = load_data("hf:org/pets")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    after = load_data("hf:org/pets")
    assert after.fingerprint == before.fingerprint
    assert "from the cache: HF_HUB_OFFLINE is set" in after.notes[0]
    with pytest.raises(VitcliError, match=r"not in the cache, and HF_HUB_OFFLINE") as caught:
        load_data("hf:org/other")
    assert "unset HF_HUB_OFFLINE" in caught.value.hint
    blobs = pets.home / "hub/datasets--org--pets/snapshots"
    next(blobs.rglob("test-*")).unlink()
    with pytest.raises(VitcliError, match=r"`data/test-00000.* is not in the cache, and HF_HUB"):
        load_data("hf:org/pets")


def test_who_may_read(pets):
    pets.gated.add("org/pets")
    with pytest.raises(VitcliError, match=r"is gated") as caught:
        load_data("hf:org/pets")
    assert f"{pets.url}/datasets/org/pets" in caught.value.hint
    with pytest.raises(VitcliError, match=r"the Hub has no dataset `org/nothing`"):
        load_data("hf:org/nothing")


@pytest.mark.parametrize(
    ("notation", "name", "revision", "config"),
    [
        ("hf:cifar10", "cifar10", "main", None),
        ("hf:org/name:config", "org/name", "main", "config"),
        ("hf:org/name@v1.0", "org/name", "v1.0", None),
        ("hf:org/name:a-b@refs/pr/3", "org/name", "refs/pr/3", "a-b"),
    ],
)
def test_notations(notation, name, revision, config):
    repository, found = parse_dataset(notation)
    assert (repository.repo_id, repository.revision, found) == (name, revision, config)


@pytest.mark.parametrize("notation", ["hf:", "hf:a/b/c", "hf:a/b:", "hf:a/b@../x", "hf:a b"])
def test_notations_that_name_nothing(notation):
    with pytest.raises(VitcliError):
        parse_dataset(notation)


LAYOUTS = {
    # What repositories on the Hub look like: files -> split -> how many of them are read.
    "push_to_hub": (["data/train-00000-of-00001-ab12.parquet", "data/test-00000-of-00001.parquet"]),
    "config folders": ["plain_text/train-00000.parquet", "plain_text/test-00000.parquet"],
    "split folders": ["train/0.parquet", "train/1.parquet", "val/0.parquet"],
    "converted": ["default/train/0000.parquet", "default/validation/0000.parquet"],
    "one file": ["pictures.parquet"],
    "dev": ["data/dev-0.parquet", "data/train-0.parquet"],
    "a word in a word": ["trainers-0.parquet", "trainers-1.parquet"],
}
EXPECTED = {
    "push_to_hub": {"train": 1, "test": 1},
    "config folders": {"train": 1, "test": 1},
    "split folders": {"train": 2, "validation": 1},
    "converted": {"train": 1, "validation": 1},
    "one file": {"train": 1},
    "dev": {"train": 1, "validation": 1},
    "a word in a word": {"train": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits_are_read_off_the_names(layout):
    plan = choose_files(LAYOUTS[layout], [], None, (), "hf:x")
    assert plan.kind == "parquet"
    assert {name: len(files) for name, files in plan.splits.items()} == EXPECTED[layout]


def test_the_command_takes_it(pets, capfd):
    status, (out, err) = run(["check", "hf:org/pets", "--json"]), capfd.readouterr()
    assert status == 0, err
    found = json.loads(out)
    assert found["splits"] == {"train": 6, "test": 2}
    assert np.sum([n for c in found["classes"].values() for n in c.values()]) == 8
    status, (_, err) = run(["check", "hf:org/nothing"]), capfd.readouterr()
    assert status == 2 and "error: the Hub has no dataset" in err
    assert err.count("hint:") == 1

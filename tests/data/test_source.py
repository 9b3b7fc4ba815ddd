"""Sources: what each way of writing DATA becomes, and one clear error for each thing wrong."""

import json
import os
import tarfile
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitcli.data import image_set as sets
from vitcli.data.image_set import ArrayStore, BytesList, ImageSet
from vitcli.data.labels import encode_labels
from vitcli.data.readers import DATA_HELP, READERS, import_function
from vitcli.data.source import load_data
from vitcli.data.stratify import stratified_split
from vitcli.decode import ImageError
from vitcli.errors import VitcliError

ROOT = Path(__file__).parents[2]


def paint(path, level=0, size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, level, level)).save(path)


def photos(root, classes=("cat", "dog"), count=5, inside=""):
    for number, name in enumerate(classes):
        for i in range(count):
            paint(root / inside / name / f"{i}.png", 10 * i + number, (6 + len(inside), 4))
    return root


def level(images, index):
    return images.read(index, "L").getpixel((0, 0))


# Folders


def test_one_folder_is_split_by_class_and_seed(tmp_path):
    photos(tmp_path, ("a", "b", "c"), 10)
    data = load_data(str(tmp_path), test_fraction=0.3)
    assert data.classes == ("a", "b", "c")
    for name, count in (("train", 7), ("test", 3)):
        assert np.bincount(data.splits[name].labels).tolist() == [count] * 3
    paths = [s.describe(i) for s in data.splits.values() for i in range(len(s))]
    assert len(set(paths)) == 30
    again, other = (load_data(str(tmp_path), test_fraction=0.3, split_seed=seed) for seed in (0, 1))
    names = [[s.splits["test"].describe(i) for i in range(9)] for s in (data, again, other)]
    assert names[0] == names[1] != names[2]
    assert data.fingerprint == again.fingerprint != other.fingerprint
    assert "9 of 30 images are held out for testing (30% of each class, seed 0)" in data.notes[-1]
    assert list(load_data(str(tmp_path), whole=True).splits) == ["train"]


def test_train_and_test_folders_are_taken_as_they_are(tmp_path):
    photos(tmp_path, ("cat", "dog"), 3, "train")
    photos(tmp_path, ("dog",), 2, "test")
    photos(tmp_path, ("dog", "cat"), 1, "val")
    data = load_data(str(tmp_path))
    assert {name: len(s) for name, s in data.splits.items()} == {
        "train": 6,
        "validation": 2,
        "test": 2,
    }
    assert data.splits["test"].labels.tolist() == [1, 1]  # by name, though its only class
    assert [s.name for s in data.splits.values()] == ["train", "validation", "test"]
    assert not data.notes
    assert data.split("test") is data.splits["test"]
    with pytest.raises(VitcliError, match="no `other` images"):
        data.split("other")


def test_a_folder_of_train_only_is_split(tmp_path):
    photos(tmp_path, count=5, inside="train")
    paint(tmp_path / "extra/0.png")
    data = load_data(str(tmp_path))
    assert {name: len(s) for name, s in data.splits.items()} == {"train": 8, "test": 2}
    assert "skipped folders that are not splits: `extra`" in data.notes[0]


def test_a_test_folder_alone_is_a_test_set(tmp_path):
    data = load_data(str(photos(tmp_path, inside="test")))
    assert {name: len(s) for name, s in data.splits.items()} == {"test": 10}


def test_a_class_may_be_called_test(tmp_path):
    assert load_data(str(photos(tmp_path, ("test", "real")))).classes == ("real", "test")


def test_a_class_may_be_called_train_beside_others(tmp_path):
    data = load_data(str(photos(tmp_path, ("train", "car", "test"))))
    assert data.classes == ("car", "test", "train")


def test_splits_of_other_names(tmp_path):
    for split in ("Train", "dev", "eval", "extra"):
        photos(tmp_path, inside=split)
    data = load_data(str(tmp_path))
    assert {name: len(s) for name, s in data.splits.items()} == {
        "train": 10,
        "validation": 10,
        "test": 10,
    }
    assert "skipped folders that are not splits: `extra`" in data.notes[0]
    photos(tmp_path, inside="validation", count=3)  # the plain name goes before the other
    assert len(load_data(str(tmp_path)).splits["validation"]) == 6


def test_pictures_right_in_train_are_no_training_set(tmp_path):
    photos(tmp_path, ("train", "test"))
    with pytest.raises(VitcliError, match="train` has 5 images but no class folders"):
        load_data(str(tmp_path))


def test_a_single_class_with_subfolders_is_named(tmp_path):
    photos(tmp_path, inside="animals")
    with pytest.raises(VitcliError, match="only one class: `animals`") as caught:
        load_data(str(tmp_path))
    assert f"`{tmp_path}/animals`" in str(caught.value.hint)


def test_what_lies_around_is_left_out(tmp_path):
    photos(tmp_path)
    for name in (".hidden.png", "._0.png", "Thumbs.db", "notes.txt", "deep/er/nested.JPG"):
        (tmp_path / "cat" / name).parent.mkdir(parents=True, exist_ok=True)
        paint(tmp_path / "cat/x.png")
        (tmp_path / "cat" / name).write_bytes((tmp_path / "cat/x.png").read_bytes())
    (tmp_path / "empty").mkdir()
    photos(tmp_path, (".git", "__MACOSX"), 1)
    paint(tmp_path / "loose.png")
    data = load_data(str(tmp_path), whole=True)
    assert data.classes == ("cat", "dog")
    assert np.bincount(data.splits["train"].labels).tolist() == [7, 5]  # nested and x
    notes = "\n".join(data.notes)
    assert "skipped `empty`, a folder without images" in notes
    assert "system folders and hidden files: `._*`, `.git`, `.hidden.png`, `Thumbs.db`" in notes
    assert "not images: 1 .txt" in notes
    assert "skipped 1 image outside class folders" in notes


def test_links(tmp_path):
    photos(tmp_path)
    (tmp_path / "cat/link.png").symlink_to(tmp_path / "dog/0.png")
    (tmp_path / "cat/round").symlink_to(tmp_path / "cat")
    (tmp_path / "dog/dangling.png").symlink_to("nowhere.png")
    images = load_data(str(tmp_path), whole=True).splits["train"]
    assert np.bincount(images.labels).tolist() == [6, 6]
    broken = [i for i in range(12) if images.describe(i).endswith("dangling.png")]
    with pytest.raises(ImageError, match=r"link to `nowhere\.png`, which does not exist"):
        images.read(broken[0])


def test_odd_names_survive(shared, tmp_path):
    with tarfile.open(shared / "data/messy.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    data = load_data(str(tmp_path / "messy/odd"), whole=True)
    images = data.splits["train"]
    assert data.classes == ("ants", "bees", "pizza slice ü")
    names = [images.describe(i) for i in range(len(images))]
    assert all(name.isprintable() for name in names)
    for ending in (r"latin1_\xe9.jpg", r"new\nline.jpg", "emoji🐜.jpg", "a" * 200 + ".jpg"):
        index = next(i for i, name in enumerate(names) if name.endswith(ending))
        assert images.read(index).size == (500, 333)
    json.dumps(names).encode()
    assert sum(name.endswith("nested.jpg") for name in names) == 1


def test_a_class_name_that_is_not_utf8(tmp_path):
    photos(tmp_path, ("cat", os.fsdecode(b"caf\xe9")), 2)
    assert load_data(str(tmp_path)).classes == (r"caf\xe9", "cat")


def test_the_fingerprint_follows_content_and_not_the_place(tmp_path):
    one, two = (photos(tmp_path / name) for name in ("one", "two"))
    first = load_data(str(one)).fingerprint
    assert load_data(str(two)).fingerprint == first
    paint(two / "cat/0.png", size=(50, 50))
    assert load_data(str(two)).fingerprint != first
    (two / "cat/0.png").unlink()
    (two / "cat/new.png").write_bytes((one / "cat/0.png").read_bytes())
    assert load_data(str(two)).fingerprint != first


def test_the_folder_of_unlabelled_images_of_cvat_is_told(tmp_path):
    for name in ("cat", "dog", "no_label"):
        paint(tmp_path / name / "a.png")
    data = load_data(str(tmp_path), whole=True)
    assert "no_label" in data.classes
    assert any("`no_label` is read as a class" in note for note in data.notes)


def test_pictures_without_classes_serve_where_no_labels_are_needed(tmp_path):
    paint(tmp_path / "a.png")
    paint(tmp_path / "b.png")
    with pytest.raises(VitcliError, match="2 images but no class folders"):
        load_data(str(tmp_path))
    data = load_data(str(tmp_path), labelled=False, whole=True)
    assert len(data.splits["train"]) == 2


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda root: root.mkdir(exist_ok=True), "has no images"),
        (lambda root: photos(root, ("cat",)), "only one class: `cat`"),
        (
            lambda root: (photos(root, inside="train"), photos(root, ("emu",), 1, "test")),
            "class `emu` is in `test` but not in `train`",
        ),
    ],
)
def test_folders_that_are_no_data(tmp_path, make, words):
    make(tmp_path)
    with pytest.raises(VitcliError, match=words) as caught:
        load_data(str(tmp_path))
    assert caught.value.hint


# Manifests


def manifest(root, text, name="labels.csv"):
    photos(root)
    (root / name).write_text(text, encoding="utf-8")
    return str(root / name)


ROWS = [("cat/0.png", "cat"), ("cat/1.png", "cat"), ("dog/0.png", "dog"), ("dog/1.png", "dog")]


@pytest.mark.parametrize("name,separator", [("a.csv", ","), ("a.csv", ";"), ("a.tsv", "\t")])
def test_tables_of_paths(tmp_path, name, separator):
    lines = [("\ufefffile", "label"), *ROWS]
    path = manifest(tmp_path, "\n".join(separator.join(row) for row in lines), name)
    data = load_data(Path(path), test_fraction=0.5)
    assert data.classes == ("cat", "dog")
    assert [len(s) for s in data.splits.values()] == [2, 2]
    levels = {level(s, i) for s in data.splits.values() for i in range(2)}
    assert levels == {0, 10, 1, 11}


def test_json_lines_with_splits_and_numbers(tmp_path):
    rows = [
        {"image": path, "class": 10 if label == "dog" else 9, "split": split}
        for (path, label), split in zip(ROWS, ["train", "test", "train", "val"], strict=True)
    ]
    path = manifest(tmp_path, "\n".join(map(json.dumps, rows)) + "\n\n", "a.jsonl")
    data = load_data(path)
    assert data.classes == ("9", "10")
    assert {k: v.labels.tolist() for k, v in data.splits.items()} == {
        "train": [0, 1],
        "validation": [1],
        "test": [0],
    }


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_labels_stay_as_they_are_written(tmp_path, name):
    rows = [(path, label) for (path, _), label in zip(ROWS, ("01", "NA", "1", "1.0"), strict=True)]
    text = "path,label\n" + "\n".join(map(",".join, rows))
    if name == "a.jsonl":
        text = "\n".join(json.dumps({"path": path, "label": label}) for path, label in rows)
    data = load_data(manifest(tmp_path, text, name), whole=True)
    assert data.classes == ("01", "1", "1.0", "NA")
    assert data.splits["train"].labels.tolist() == [0, 3, 1, 2]


def test_a_path_that_is_not_utf8(tmp_path):
    paint(tmp_path / os.fsdecode(b"caf\xe9.png"), 7)
    paint(tmp_path / "tea.png", 8)
    (tmp_path / "a.csv").write_bytes(b"path,label\ncaf\xe9.png,a\ntea.png,b\n")
    images = load_data(str(tmp_path / "a.csv"), whole=True).splits["train"]
    assert [level(images, i) for i in range(2)] == [7, 8]
    assert images.describe(0).endswith(r"caf\xe9.png")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "path,label\ncat/0.png,caf\xe9\ndog/0.png,tea\n".encode("latin-1")),
        (
            "a.jsonl",
            rb'{"path": "cat/0.png", "label": "\ud800"}'
            b"\n"
            rb'{"path": "\ud800.png", "label": "tea"}',
        ),
    ],
)
def test_labels_that_are_not_utf8(tmp_path, name, content):
    photos(tmp_path)
    (tmp_path / name).write_bytes(content)
    data = load_data(str(tmp_path / name), whole=True)
    first = r"caf\xe9" if name == "a.csv" else r"\ud800"
    assert data.classes == (first, "tea")
    assert f"labels such as `{first}`" in data.notes[0]


def test_a_table_as_excel_writes_it(tmp_path):
    photos(tmp_path)
    text = "path\tlabel\n" + "\n".join(map("\t".join, ROWS))
    (tmp_path / "a.csv").write_bytes(text.encode("utf-16"))
    assert load_data(str(tmp_path / "a.csv")).classes == ("cat", "dog")


def test_a_space_behind_each_comma(tmp_path):
    data = load_data(manifest(tmp_path, "path, label\n" + "\n".join(map(", ".join, ROWS))))
    assert data.classes == ("cat", "dog")


@pytest.mark.parametrize("column", ["split", "Split"])
def test_a_column_of_splits(tmp_path, column):
    names = ["Train", "", " TEST", "holdout"]
    rows = [",".join((*row, split)) for row, split in zip(ROWS, names, strict=True)]
    data = load_data(manifest(tmp_path, f"path,label,{column}\n" + "\n".join(rows)), labelled=False)
    assert {name: len(s) for name, s in data.splits.items()} == {"train": 2, "test": 1}
    assert "skipped 1 row of split `holdout`" in data.notes[0]


def test_a_column_that_only_sounds_like_splits(tmp_path):
    rows = [",".join((*row, str(fold))) for fold, row in enumerate(ROWS)]
    path = manifest(tmp_path, "path,label,split\n" + "\n".join(rows))
    data = load_data(path, whole=True)
    assert len(data.splits["train"]) == 4
    assert "ignored `split`, which names no split" in data.notes[0]


def test_gaps_as_tables_fill_them_are_no_classes(tmp_path):
    labels = [0, 1.0, float("nan"), " "]
    rows = [
        json.dumps({"path": path, "label": label})
        for (path, _), label in zip(ROWS, labels, strict=True)
    ]
    data = load_data(manifest(tmp_path, "\n".join(rows), "a.jsonl"))
    assert data.classes == ("0", "1")
    assert "skipped 2 rows without path or label" in data.notes[0]


def test_columns_of_any_name(tmp_path):
    text = "a,b\n" + "\n".join(",".join(row) for row in ROWS)
    path = manifest(tmp_path, text)
    with pytest.raises(VitcliError, match=r"no image column with a known name.*`a`, `b`") as caught:
        load_data(path)
    assert "data.image_column" in str(caught.value.hint)
    assert load_data(path, image_column="a", label_column="b").classes == ("cat", "dog")
    with pytest.raises(VitcliError, match=r"no column `bb`.*`a`, `b`") as caught:
        load_data(path, image_column="a", label_column="bb")
    assert "`b`" in str(caught.value.hint)


def test_rows_that_say_nothing_are_counted(tmp_path):
    text = "path,label\n,cat,and more\ncat/2.png,\n" + "\n".join(",".join(row) for row in ROWS)
    data = load_data(manifest(tmp_path, text), whole=True)
    assert len(data.splits["train"]) == 4
    assert "skipped 2 rows without path or label" in data.notes[0]


@pytest.mark.parametrize(
    "name,text,words",
    [
        ("a.csv", "", "has no rows"),
        ("a.csv", "path,label\nx/y.png,cat\n", "`x/y.png` and the next images do not exist"),
        ("a.jsonl", '{"path": "a.png", "label": 1}\nnope', "line 2 of .* is not JSON"),
        ("a.jsonl", "[1]", "line 1 of .* is not a JSON object"),
    ],
)
def test_manifests_that_cannot_be_used(tmp_path, name, text, words):
    with pytest.raises(VitcliError, match=words) as caught:
        load_data(manifest(tmp_path, text, name))
    assert caught.value.hint


# Built in, and notations


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    data = load_data("builtin:digits")
    train, test = data.splits["train"], data.splits["test"]
    theirs = load_digits()
    rows = {"train": [], "test": []}
    for name, images in data.splits.items():
        for index in range(len(images)):
            row = int(images.describe(index).split()[1])  # "image 1446 of builtin:digits"
            grey = np.asarray(images.read(index, "L")) / 255 * 16
            assert np.abs(grey - theirs.images[row]).max() < 0.04
            assert images.labels[index] == theirs.target[row]
            rows[name].append(row)
    assert sorted(rows["train"] + rows["test"]) == list(range(1797))
    shares = np.bincount(test.labels) / np.bincount(theirs.target)
    assert (len(train), len(test)) == (1438, 359) and np.abs(shares - 0.2).max() < 0.01
    assert train.read(0).mode == "RGB"
    assert data.notes == (
        "builtin:digits: a fixed, stratified fifth of the images is the test split "
        "(1,438 train, 359 test)",
    )
    assert load_data("builtin:digits", split_seed=1).fingerprint == data.fingerprint


@pytest.mark.parametrize(
    "notation,words",
    [
        ("nowhere", "no such file or folder: `nowhere`"),
        ("nowhere.csv", "no such file: `nowhere.csv`"),
        ("builtin:digit", "unknown dataset `builtin:digit`"),
        ("x" * 5000, "cannot read .*: File name too long"),
    ],
)
def test_notations_that_mean_nothing(notation, words):
    with pytest.raises(VitcliError, match=words.replace("{", r"\{")) as caught:
        load_data(notation)
    assert "builtin:digits" in str(caught.value.hint) or "too long" in words


def test_a_path_that_does_not_exist_gets_a_short_hint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flowers").mkdir()
    (tmp_path / "flowers/labels.csv").touch()
    hints = {
        "flower/": "did you mean `flowers/`?",
        "flowers/lables.csv": "did you mean `flowers/labels.csv`?",
        "data=flowers": "DATA has no `data=`: write `flowers`",
    }
    for notation, hint in hints.items():
        with pytest.raises(VitcliError) as caught:
            load_data(notation)
        assert caught.value.hint == hint
    with pytest.raises(VitcliError) as caught:
        load_data("nowhere")
    assert len(caught.value.hint) < 300 and "docs/how-to/data.md" in caught.value.hint


def test_a_picture_is_no_data(tmp_path):
    paint(tmp_path / "a.png")
    with pytest.raises(VitcliError, match=r"unsupported data format: `.*a\.png`"):
        load_data(str(tmp_path / "a.png"))


def test_the_registry_of_readers_is_complete():
    builtin = {"builtin:digits", "builtin:formula"}
    files = {"table", "parquet", "shards", "zip", "arrays"}
    assert set(READERS) == {"folder", "decoded", "saved", "hf:"} | files | builtin
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    documented = "".join(page.read_text(encoding="utf-8") for page in pages)
    for reader in READERS.values():
        assert callable(import_function(reader.load))
        assert reader.accepts is None or callable(import_function(reader.accepts))
        assert f"`{reader.example}`" in DATA_HELP
        assert f"`{reader.example}" in documented, f"the table of DATA lacks `{reader.example}`"


# Sets


def test_the_split_takes_from_every_class():
    labels = np.repeat([0, 1, 2, 3], [1, 2, 10, 100])
    keep, aside = stratified_split(labels, 0.2, 0)
    assert np.bincount(labels[keep]).tolist() == [1, 1, 8, 80]
    assert np.bincount(labels[aside], minlength=4).tolist() == [0, 1, 2, 20]
    assert (np.sort(np.concatenate([keep, aside])) == np.arange(113)).all()
    keep, aside = stratified_split(labels, 0.99, 0)
    assert np.bincount(labels[keep]).tolist() == [1, 1, 1, 1]


def test_numbers_sort_as_numbers():
    assert encode_labels([10, 9, 10])[0] == ("9", "10")
    assert encode_labels(["10", "9"])[0] == ("9", "10")
    assert encode_labels(["01", "1", "a"])[0] == ("01", "1", "a")


class Counting(ArrayStore):
    def __init__(self, images):
        super().__init__("counted", images)
        self.count = 0
        self.lock = threading.Lock()

    def content(self, row):
        with self.lock:
            self.count += 1
        return super().content(row)


def test_small_sets_are_decoded_once(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 4, 5, 3), dtype=np.uint8)
    store = Counting(pixels)
    images = ImageSet("train", ["a"], np.zeros(20, dtype=np.int64), store)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            read = list(pool.map(lambda i: np.asarray(images.read(i)), range(20)))
            assert (np.stack(read) == pixels).all()
    after = store.count
    assert 20 <= after <= 20 + sets.PROBES
    images.read(0).putpixel((0, 0), (1, 2, 3))  # a copy: the next reader sees the original
    assert (np.asarray(images.read(0)) == pixels[0]).all()
    assert store.count == after
    assert images.read(3, "L").mode == "L"
    monkeypatch.setattr(sets, "CACHE_BYTES", 100)
    store = Counting(pixels)
    large = ImageSet("train", ["a"], np.zeros(20, dtype=np.int64), store)
    for _ in range(2):
        [large.read(i) for i in range(20)]
    assert store.count == 40 + sets.PROBES


def test_subsets_keep_their_images():
    pixels = np.arange(6, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2), dtype=np.uint8)
    images = ImageSet("train", ["a", "b"], np.array([0, 1] * 3), ArrayStore("x", pixels))
    part = images.subset(np.array([5, 2]), "test").subset(np.array([1]))
    assert (len(part), part.name, level(part, 0), part.labels.tolist()) == (1, "test", 2, [0])
    assert part.describe(0) == "image 2 of x"


def test_empty_text_is_not_the_current_folder(tmp_path, monkeypatch):
    photos(tmp_path, ("cat", "dog"), 2)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VitcliError, match="DATA is an empty string") as caught:
        load_data("")
    assert "the current folder is `.`" in caught.value.hint


@pytest.mark.parametrize("seed", range(5))
def test_packed_strings_are_a_list_of_them(seed):
    rng = np.random.default_rng(seed)
    parts = [rng.bytes(int(rng.integers(0, 40))) for _ in range(int(rng.integers(0, 50)))]
    packed = BytesList(iter(parts))
    assert [packed[i] for i in range(len(packed))] == parts


def test_a_table_takes_little_memory(tmp_path):
    """Its rows as dictionaries would take 500 bytes each."""
    paint(tmp_path / "0.png")
    n = 20_000
    rows = "".join(f"{i}.png,class_{i % 10},a note of no use number {i}\n" for i in range(n))
    (tmp_path / "x.csv").write_text(f"path,label,note\n{rows}")
    load_data(tmp_path / "x.csv")  # what is imported once
    tracemalloc.start()
    data = load_data(tmp_path / "x.csv", whole=True)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(data.splits["train"]) == n
    assert peak / n < 330 and kept / n < 60

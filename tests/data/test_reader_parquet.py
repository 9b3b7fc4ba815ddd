"""Parquet: what the files say, through the cache of `datasets` and past it."""

import io
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import datasets
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vitcli.data.readers import parquet, parquet_table
from vitcli.data.source import load_data
from vitcli.errors import VitcliError


def level(images, index):
    return images.read(index, "L").getpixel((0, 0))


def levels(images):
    return [level(images, index) for index in range(len(images))]


def png(level):
    file = io.BytesIO()
    Image.new("L", (3, 2), level).save(file, "PNG")
    return file.getvalue()


def write_parquet(path, levels, labels, names=None, **columns):
    """As `datasets` writes it when `names` are given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": png(value), "path": f"{value}.png"} for value in levels]
    table = pa.table({"image": cells, "label": labels, **columns})
    if names is not None:
        features = {
            "image": {"_type": "Image"},
            "label": {"_type": "ClassLabel", "names": names},
        }
        info = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": info})
    pq.write_table(table, path)
    return str(path)


def test_parquet_as_datasets_writes_it(shared):
    folder = shared / "data/flower_photos"
    data = load_data(str(folder))
    assert {name: len(s) for name, s in data.splits.items()} == {"train": 400, "test": 150}
    theirs = datasets.Features.from_arrow_schema(pq.read_schema(folder / "test.parquet"))
    assert list(data.classes) == theirs["label"].names
    rows = pq.read_table(folder / "test.parquet").slice(20, 3).to_pylist()
    for i, row in enumerate(rows, start=20):
        cell = theirs["image"].decode_example(row["image"])
        assert (np.asarray(data.splits["test"].read(i)) == np.asarray(cell.convert("RGB"))).all()
        assert data.splits["test"].labels[i] == row["label"]
    assert data.splits["test"].describe(20) == f"row 20 of {folder}/test.parquet"


def test_every_shared_set_is_read(shared):
    sets_found = sorted(path.parent for path in shared.glob("data/*/test.parquet"))
    assert len(sets_found) == 6
    for folder in sets_found:
        data = load_data(str(folder))
        assert data.splits["test"].read(0).mode == "RGB"
        assert (data.splits["test"].labels < len(data.classes)).all()


def test_parquet_in_several_files_and_a_data_folder(tmp_path):
    names = ["x", "y"]
    for part in range(2):
        levels = [20 * part, 20 * part + 1]
        write_parquet(tmp_path / f"data/train-0000{part}-of-00002.parquet", levels, [0, 1], names)
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", [7], [0], ["y", "x"])
    data = load_data(str(tmp_path))
    assert [level(data.splits["train"], i) for i in range(4)] == [0, 1, 20, 21]
    assert data.splits["train"].describe(3).startswith("row 1 of ")
    assert data.splits["train"].describe(3).endswith("train-00001-of-00002.parquet")
    assert data.splits["test"].labels.tolist() == [1]  # `y`, whatever its number there


@pytest.mark.parametrize("form", ["{}/0000.parquet", "my-set-{}.parquet"])
def test_splits_by_folder_or_by_a_word_in_the_name(tmp_path, form):
    for number, split in enumerate(("train", "test", "validation")):
        file = tmp_path / form.format(split)
        file.parent.mkdir(exist_ok=True)
        write_parquet(file, [number, number], [0, 1])
    data = load_data(str(tmp_path))
    assert {n: level(s, 0) for n, s in data.splits.items()} == {
        "train": 0,
        "validation": 2,
        "test": 1,
    }


def test_parquet_with_plain_columns(tmp_path):
    cells = [png(level) for level in range(6)]
    table = pa.table({"picture": cells, "kind": ["b", "a"] * 3, "weight": [0.5] * 6})
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(
        VitcliError, match=r"no label column with a known name.*`picture`, `kind`, `weight`"
    ):
        load_data(str(tmp_path / "x.parquet"))
    data = load_data(str(tmp_path / "x.parquet"), label_column="kind", whole=True)
    assert data.splits["train"].labels.tolist() == [1, 0] * 3
    assert level(data.splits["train"], 5) == 5


def test_parquet_with_paths_beside_it(tmp_path):
    for value in (3, 4):
        (tmp_path / f"{value}.png").write_bytes(png(value))
    table = pa.table({"path": ["4.png", "3.png"], "label": ["a", "b"]})
    pq.write_table(table, tmp_path / "y.parquet")
    data = load_data(str(tmp_path / "y.parquet"), whole=True)
    assert levels(data.splits["train"]) == [4, 3]


def test_parquet_rows_without_a_label_are_left_out(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", [0, 1, 2, 3], [0, -1, None, 1], ["x", "y"])
    data = load_data(path, whole=True)
    assert [level(data.splits["train"], i) for i in range(2)] == [0, 3]
    assert "skipped 2 rows without a label" in data.notes[0]


def test_coarse_labels_beside_the_fine_ones_are_named(tmp_path):
    """As in CIFAR-100."""
    for split in ("train", "test"):
        cells = [{"bytes": png(value), "path": None} for value in range(4)]
        columns = {"fine_label": list("abcd"), "coarse_label": list("xxyy")}
        pq.write_table(pa.table({"image": cells, **columns}), tmp_path / f"{split}.parquet")
    data = load_data(tmp_path)
    assert data.classes == tuple("abcd")
    [note] = [note for note in data.notes if "coarse" in note]
    assert "labels are those of `fine_label`; `--set data.label_column=coarse_label`" in note
    other = load_data(tmp_path, label_column="coarse_label")
    assert other.classes == ("x", "y") and not any("fine" in note for note in other.notes)


def test_a_test_file_alone_is_a_test_set(tmp_path):
    path = write_parquet(tmp_path / "test.parquet", [0, 1], [0, 1])
    assert list(load_data(path).splits) == ["test"]


def test_a_broken_parquet_file(tmp_path):
    (tmp_path / "x.parquet").write_bytes(pickle.dumps([1]) * 50)
    with pytest.raises(VitcliError, match="as parquet"):
        load_data(str(tmp_path / "x.parquet"))


@pytest.mark.parametrize("file", ["train-0.parquet", "train-1.parquet"])
def test_the_file_at_fault_is_named(tmp_path, file):
    for part in range(2):
        write_parquet(tmp_path / f"train-{part}.parquet", range(99), [0, 1, 2] * 33)
    whole = bytearray((tmp_path / file).read_bytes())
    whole[10:200] = bytes(190)
    (tmp_path / file).write_bytes(whole)
    with pytest.raises(VitcliError, match=f"{file}` as parquet"):
        load_data(str(tmp_path))
    pq.write_table(pa.table({"image": [png(1)], "lable": [1]}), tmp_path / file)
    with pytest.raises(VitcliError, match=rf"`.*{file}` has no column|no label column"):
        load_data(str(tmp_path))


@pytest.mark.parametrize(
    "cells,classes,labels",
    [
        (["b", "a", None, "", "b"], ("a", "b"), [1, 0, 1]),
        ([10, 9, -1, None, 10], ("9", "10"), [1, 0, 1]),
        (pa.array(["b", "a", None, "b"]).dictionary_encode(), ("a", "b"), [1, 0, 1]),
        ([True, False, True], ("False", "True"), [1, 0, 1]),
        ([1.0, float("nan"), 0.0, None], ("0", "1"), [1, 0]),  # as pandas keeps gaps
        ([b"b", b"a"], ("a", "b"), [1, 0]),
    ],
)
def test_labels_of_any_type(tmp_path, cells, classes, labels):
    path = write_parquet(tmp_path / "x.parquet", range(len(cells)), cells)
    data = load_data(path, whole=True)
    assert data.classes == classes
    assert data.splits["train"].labels.tolist() == labels


def test_labels_that_are_none(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", [0, 1], [{"name": "a"}, {"name": "b"}])
    with pytest.raises(VitcliError, match=r"as parquet: .*struct"):
        load_data(path)
    path = write_parquet(tmp_path / "y.parquet", [0, 1], [0, 5], ["x", "y"])
    with pytest.raises(VitcliError, match="has label 5, but names only 2 classes"):
        load_data(path)


def test_a_changed_file_is_read_anew(tmp_path):
    """Also one of the same size, written in the same instant as far as the clock can tell."""
    path = tmp_path / "x.parquet"
    write_parquet(path, [1, 2], [0, 1])
    before = path.stat()
    data = load_data(str(path), whole=True)
    old = data.splits["train"]
    assert levels(old) == [1, 2]
    write_parquet(tmp_path / "new", [3, 4], [1, 0])
    (tmp_path / "new").replace(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    new = load_data(str(path), whole=True)
    assert levels(new.splits["train"]) == [3, 4]
    assert new.splits["train"].labels.tolist() == [1, 0]
    assert new.fingerprint != data.fingerprint


def arrow_files():
    return sorted(datasets.config.HF_DATASETS_CACHE.glob("parquet/*/*/*/*.arrow"))


def test_images_are_mapped_from_the_cache_which_is_written_once(shared):
    def images():
        return load_data(str(shared / "data/cifar10_small")).splits["train"]

    images()
    before = {file: file.stat().st_mtime_ns for file in arrow_files()}
    allocated = pa.total_allocated_bytes()
    again = images()
    assert pa.total_allocated_bytes() - allocated < 2**16 < again._store.column.nbytes
    assert before and before == {file: file.stat().st_mtime_ns for file in arrow_files()}


def test_without_a_cache_images_are_held_in_memory(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file/cache")
    for split, shown in (("train", [1, 2]), ("test", [3, 4])):
        write_parquet(tmp_path / f"{split}.parquet", shown, [0, 1], ["x", "y"])
    data = load_data(str(tmp_path))
    assert levels(data.splits["train"]) == [1, 2]
    (note,) = data.notes  # once, not for each split
    assert "cannot cache the images" in note and "Not a directory" in note and "in memory" in note


@pytest.mark.parametrize(
    "name", ["a[b]*?.parquet", ".x.parquet", "a::b.parquet", os.fsdecode(b"caf\xe9.parquet")]
)
def test_names_that_are_patterns_urls_or_not_text(tmp_path, name):
    write_parquet(tmp_path / "x", [1, 2], [0, 1])
    (tmp_path / "x").rename(tmp_path / name)
    assert levels(load_data(str(tmp_path / name), whole=True).splits["train"]) == [1, 2]


def test_nothing_is_told_but_by_us(tmp_path, capfd):
    """No bars, logs or warnings of `datasets`, and its settings are as they were."""
    path = write_parquet(tmp_path / "x.parquet", range(50), [0, 1] * 25)
    level, bars = datasets.logging.get_verbosity(), datasets.is_progress_bar_enabled()
    load_data(path)
    (tmp_path / "y.parquet").write_bytes((tmp_path / "x.parquet").read_bytes()[:-200] + b"PAR1")
    with pytest.raises(VitcliError):
        load_data(str(tmp_path / "y.parquet"))
    assert capfd.readouterr() == ("", "")
    assert (level, bars) == (datasets.logging.get_verbosity(), datasets.is_progress_bar_enabled())


def test_rows_are_read_from_many_threads(shared):
    store = load_data(str(shared / "data/cifar10_small")).splits["train"]._store
    rows = np.random.default_rng(0).permutation(len(store))[:500].tolist()
    alone = [store.content(row) for row in rows]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(4):
            assert list(pool.map(store.content, rows)) == alone


def huge_cells(path, size, rows, **how):
    cells = pa.array([bytes(size)] * rows)
    if how.pop("struct", False):
        cells = pa.StructArray.from_arrays([cells, pa.array(["x"] * rows)], ["bytes", "path"])
    table = pa.table({"image": cells, "label": ["a", "b"] * (rows // 2)})
    pq.write_table(table, path, compression="zstd", **how)
    return path


@pytest.mark.parametrize(
    "how",
    [
        {"use_dictionary": False},
        {"dictionary_pagesize_limit": 1 << 30},
        {"dictionary_pagesize_limit": 1 << 30, "struct": True},
    ],
)
def test_cells_that_do_not_fit_into_memory_are_not_decoded(tmp_path, monkeypatch, how):
    path = huge_cells(tmp_path / "x.parquet", 4 << 20, 20, **how)  # 80 MB in a few kB
    assert path.stat().st_size < 100_000
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100 << 20))
    monkeypatch.setattr(parquet, "read_table", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(VitcliError, match=r"20 rows of column `image` take 0\.1 GB") as error:
        load_data(str(path))
    assert "row_group_size" in error.value.hint


def test_one_cell_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_table, "MAX_CELL_BYTES", 1 << 20)
    with pytest.raises(VitcliError, match="2 rows of column `image` take"):
        load_data(str(huge_cells(tmp_path / "x.parquet", 2 << 20, 2, use_dictionary=False)))


def test_repeated_images_are_measured_and_read(tmp_path, monkeypatch):
    picture = png(5)
    table = pa.table({"image": [picture] * 64, "label": ["a", "b"] * 32})
    pq.write_table(table, tmp_path / "x.parquet")
    memory = 2 * (64 * len(picture) + 4096)  # less than the first bound
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=memory))
    assert len(load_data(str(tmp_path / "x.parquet"), whole=True).splits["train"]) == 64


def test_images_that_fit_neither_the_disk_nor_memory(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(datasets.Dataset, "from_parquet", full)
    path = huge_cells(tmp_path / "x.parquet", 1 << 20, 2, use_dictionary=False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 20))
    with pytest.raises(VitcliError, match=r"No space left.*do not fit into memory") as error:
        parquet_table.read_table([path], ["image", "label"], [])
    assert "HF_DATASETS_CACHE" in error.value.hint

"""Folders of `save_to_disk`: the images and labels that `datasets` itself reads from them."""

import json

import datasets
import numpy as np
import pytest
from PIL import Image

from vitcli.data.source import load_data
from vitcli.errors import VitcliError

datasets.disable_progress_bars()


def dataset(labels, start=0, names=("ant", "bee", "cat")):
    images = [Image.new("L", (3, 2), start + i) for i in range(len(labels))]
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))}
    rows = {"image": images, "label": list(labels)}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def pairs(images):
    return [
        (images.read(i, "L").getpixel((0, 0)), images.label_name(i)) for i in range(len(images))
    ]


def test_splits_and_shards(tmp_path):
    made = datasets.DatasetDict(
        {"train": dataset([2, 0, 1, 2, 0]), "validation": dataset([1], 50), "extra": dataset([0])}
    )
    made.save_to_disk(tmp_path / "x", num_shards={"train": 2, "validation": 1, "extra": 1})
    data = load_data(str(tmp_path / "x"))
    assert data.classes == ("ant", "bee", "cat")
    for name in ("train", "validation"):
        known = datasets.load_from_disk(str(tmp_path / "x"))[name]
        expected = [
            (np.asarray(row["image"])[0, 0], known.features["label"].int2str(row["label"]))
            for row in known
        ]
        assert pairs(data.splits[name]) == expected
    assert any("skipped splits with other names: `extra`" in note for note in data.notes)
    assert "data-00001-of-00002.arrow" in data.splits["train"].describe(4)


def test_one_dataset_with_selected_rows(tmp_path):
    dataset([2, 0, 1, 0]).select([3, 0]).save_to_disk(tmp_path / "x")
    data = load_data(str(tmp_path / "x"), whole=True)
    assert pairs(data.splits["train"]) == [(3, "ant"), (0, "cat")]
    other = dataset([2, 0, 1, 0]).select([3, 1])
    other.save_to_disk(tmp_path / "y")
    assert (
        load_data(str(tmp_path / "y"), whole=True, labelled=False).fingerprint != data.fingerprint
    )


def test_damage(tmp_path):
    dataset([0, 1]).save_to_disk(tmp_path / "x")
    (arrow,) = (tmp_path / "x").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:100])
    with pytest.raises(VitcliError, match=r"cannot read .*\.arrow") as caught:
        load_data(str(tmp_path / "x"))
    assert "save_to_disk" in str(caught.value.hint)
    (tmp_path / "x/state.json").write_text("{")
    with pytest.raises(VitcliError, match=r"cannot read .*state\.json"):
        load_data(str(tmp_path / "x"))


def test_names_stay_inside_of_the_folder(tmp_path):
    for name in ("x", "other"):
        dataset([0, 1], 100 * (name == "other")).save_to_disk(tmp_path / name)
    state = json.loads((tmp_path / "x/state.json").read_text())
    state["_data_files"] = [{"filename": "../other/data-00000-of-00001.arrow"}]
    (tmp_path / "x/state.json").write_text(json.dumps(state))
    images = load_data(str(tmp_path / "x"), whole=True).splits["train"]
    assert pairs(images) == [(0, "ant"), (1, "bee")]


def test_columns_that_are_missing(tmp_path):
    dataset([0, 1]).remove_columns("label").save_to_disk(tmp_path / "x")
    with pytest.raises(VitcliError, match="no label column"):
        load_data(str(tmp_path / "x"))


def break_offsets(file, count):
    """Point a text of an arrow file far outside of it."""
    offsets = np.arange(count + 1, dtype="<i4").tobytes()  # of texts of one letter
    content = file.read_bytes()
    assert offsets in content
    wrong = np.array([0, *[1 << 30] * count], dtype="<i4").tobytes()
    file.write_bytes(content.replace(offsets, wrong))


def test_a_damaged_offset_is_no_crash(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    images = [Image.new("L", (3, 2), i) for i in range(11)]
    made = datasets.Dataset.from_dict(
        {"image": images, "label": [*"abababababa"]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")}),
    )
    made.save_to_disk(tmp_path / "x")
    break_offsets(next((tmp_path / "x").glob("*.arrow")), 11)
    with pytest.raises(VitcliError, match=r"cannot read .*\.arrow`"):
        load_data(str(tmp_path / "x"))
    made.to_parquet(tmp_path / "x.parquet")
    before = load_data(str(tmp_path / "x.parquet"), whole=True)
    break_offsets(next((tmp_path / "cache").rglob("*.arrow")), 11)
    after = load_data(str(tmp_path / "x.parquet"), whole=True)
    assert pairs(after.splits["train"]) == pairs(before.splits["train"])
    assert any("`datasets` cannot cache the images" in note for note in after.notes)

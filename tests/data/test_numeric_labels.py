"""Labels that are numbers: every reader gives them, and what is no number is refused in words."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vitcli.config.schema import DataSection
from vitcli.data.source import open_data
from vitcli.errors import VitcliError

VALUES = [-1.0, 0.5, 2.25, -1.0, 1e-3, 31.0, 7.5, 100.0]


def picture(i):
    return np.random.default_rng(i).integers(0, 255, (8, 8), dtype=np.uint8)


def png(i):
    content = io.BytesIO()
    Image.fromarray(picture(i)).save(content, "PNG")
    return content.getvalue()


def write_images(folder, count=8):
    folder.mkdir(exist_ok=True)
    for i in range(count):
        (folder / f"{i}.png").write_bytes(png(i))


def write_table(folder, cells, name="t.csv", header="path,age", separator=","):
    write_images(folder, len(cells))
    rows = [f"{i}.png{separator}{cell}" for i, cell in enumerate(cells)]
    (folder / name).write_text("\n".join([header, *rows]) + "\n")
    return str(folder / name)


def numbers(data, **settings):
    return open_data(DataSection(**settings), data, whole=True, numeric=True)


def csv(folder):
    return write_table(folder, VALUES), "age"


def tsv(folder):
    text = [f"{value}".replace(".", ",") for value in VALUES]
    return write_table(folder, text, "t.tsv", "path\tage", "\t"), "age"


def jsonl(folder):
    write_images(folder)
    rows = [json.dumps({"path": f"{i}.png", "age": v}) for i, v in enumerate(VALUES)]
    (folder / "t.jsonl").write_text("\n".join(rows))
    return str(folder / "t.jsonl"), "age"


def metadata(folder):
    write_table(folder, VALUES, "metadata.csv", "file_name,label")
    return str(folder), "label"


def parquet(folder):
    images = [{"bytes": png(i), "path": None} for i in range(len(VALUES))]
    pq.write_table(pa.table({"image": images, "label": VALUES}), folder / "train.parquet")
    return str(folder / "train.parquet"), "label"


def tar(folder):
    with tarfile.open(folder / "train-0.tar", "w") as shard:
        for i, value in enumerate(VALUES):
            for ending, data in (("png", png(i)), ("json", json.dumps(value).encode())):
                member = tarfile.TarInfo(f"{i:03}.{ending}")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
    return str(folder / "train-0.tar"), "value"


def npz(folder):
    images = np.stack([picture(i) for i in range(len(VALUES))])
    np.savez(folder / "a.npz", train_images=images, train_labels=np.array(VALUES)[:, None])
    return str(folder / "a.npz"), "value"


@pytest.mark.parametrize("write", [csv, tsv, jsonl, metadata, parquet, tar, npz])
def test_every_reader_gives_the_numbers(tmp_path, write):
    data, name = write(tmp_path)
    source = numbers(data)
    images = source.splits["train"]
    assert source.classes == (name,) and source.numeric and not source.multi_label
    order = np.argsort(images.rows)
    assert images.values[order].tolist() == VALUES
    for i in range(3):  # the number belongs to its image
        row = int(images.rows[i])
        assert np.array_equal(np.asarray(images.read(i, "L")), picture(row))


def test_whole_numbers_and_folder_names_are_numbers_if_asked_for(tmp_path):
    source = numbers(write_table(tmp_path, [31, 7, 31, 100]))
    assert source.splits["train"].values.tolist() == [31, 7, 31, 100]
    digits = open_data(DataSection(), "builtin:digits", numeric=True)
    plain = open_data(DataSection(), "builtin:digits")
    names = np.array([float(name) for name in plain.classes])
    assert np.array_equal(digits.splits["test"].values, names[plain.splits["test"].labels])
    assert digits.fingerprint != plain.fingerprint


def test_the_splits_keep_each_number_with_its_image(tmp_path):
    data = write_table(tmp_path, np.arange(40) / 8)
    source = open_data(DataSection(validation_fraction=0.2), data, numeric=True)
    assert set(source.splits) == {"train", "validation", "test"}
    for images in source.splits.values():
        assert np.array_equal(images.values, images.rows / 8)
    assert not any("class" in note for note in source.notes)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["0.5", "young", "2", "old"], "2 of 4 labels in `age` are not numbers, such as `young`"),
        (["0.5", "inf", "2"], "1 of 3 labels in `age` is not a number, such as `inf`"),
        (["0.5", "1e999", "2"], "not a number, such as `1e999`"),
        (['"1,234"', "17", "18"], "not a number, such as `1,234`"),  # a thousand, or 1.234
    ],
)
def test_what_is_no_number_is_named(tmp_path, cells, message):
    with pytest.raises(VitcliError, match=message) as error:
        numbers(write_table(tmp_path, cells))
    assert "--set data.label_column=NAME" in error.value.hint


def test_missing_numbers_are_skipped_with_a_note(tmp_path):
    source = numbers(write_table(tmp_path, ["0.5", "NaN", "", "2"]))
    assert source.splits["train"].values.tolist() == [0.5, 2.0]
    assert any("skipped 2 rows" in note and "1 `NaN`" in note for note in source.notes)


def test_one_image_with_two_numbers_is_refused(tmp_path):
    write_images(tmp_path, 2)
    (tmp_path / "t.csv").write_text("path,age\n0.png,1.5\n0.png,2.5\n1.png,3\n")
    with pytest.raises(VitcliError, match="different labels") as error:
        numbers(str(tmp_path / "t.csv"))
    assert error.value.hint == "write one number per image into the table"


def test_several_columns_and_lists_are_refused(tmp_path):
    data = write_table(tmp_path, ["0.5,3", "0.7,4"], header="path,x,y")
    with pytest.raises(VitcliError, match="2 columns of labels") as error:
        numbers(data, label_column="x,y")
    assert error.value.hint == "name one column: `--set data.label_column=x`"
    images = [{"bytes": png(i), "path": None} for i in range(2)]
    file = tmp_path / "lists.parquet"
    pq.write_table(pa.table({"image": images, "label": [[0.5, 1.0], [2.0, 3.0]]}), file)
    with pytest.raises(VitcliError, match="lists") as error:
        numbers(str(file))
    assert "one number per image" in error.value.hint


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"streaming": True}, "which a stream does not know"),
        ({"multi_label": True}, "predicts one number"),
        ({"label_separator": "|"}, "predicts one number"),
    ],
)
def test_settings_that_numbers_do_not_have(tmp_path, settings, message):
    with pytest.raises(VitcliError, match=message):
        numbers(write_table(tmp_path, VALUES), **settings)


def test_generated_classes_are_no_numbers():
    with pytest.raises(VitcliError, match="generates classes"):
        open_data(DataSection(), "builtin:formula", numeric=True)


@pytest.mark.parametrize("write", [csv, tsv, parquet, npz])
def test_a_classifier_refuses_fractions_and_names_the_setting(tmp_path, write):
    with pytest.raises(VitcliError) as error:
        open_data(DataSection(), write(tmp_path)[0])
    assert "--set objective.name=mse" in error.value.hint

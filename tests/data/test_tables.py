"""Tables as people write them: the exact images, labels and splits, or one clear error."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from vitcli.data.source import load_data
from vitcli.errors import VitcliError

CATS_AND_DOGS = {"cat/0.png": "cat", "cat/1.png": "cat", "dog/0.png": "dog", "dog/1.png": "dog"}


def paint(path, level):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (level % 256, level // 256, 0)).save(path)


def write(folder, text, name="labels.csv", images=CATS_AND_DOGS, encoding="utf-8"):
    """A table, and its images with a level that is their number."""
    folder.mkdir(parents=True, exist_ok=True)
    for level, path in enumerate(images):
        paint(folder / path, level)
    (folder / name).write_text(text.replace("@", str(folder)), encoding=encoding)
    return str(folder / name)


def levels(images):
    """{number of the image: its label, or the set of its labels}."""
    found = {}
    for i in range(len(images)):
        red, green, _ = images.read(i).getpixel((0, 0))
        label = images.classes[images.labels[i]]
        if images.targets is not None:
            label = {images.classes[k] for k in np.flatnonzero(images.targets[i])}
        assert red + 256 * green not in found
        found[red + 256 * green] = label
    return found


def whole(path, **settings):
    return levels(load_data(path, whole=True, **settings).splits["train"])


ROWS = "".join(f"{path},{label}\n" for path, label in CATS_AND_DOGS.items())
EXPECTED = dict(enumerate(CATS_AND_DOGS.values()))
DIALECTS = {
    "comma": "path,label\n" + ROWS,
    "semicolon": "path;label\n" + ROWS.replace(",", ";"),
    "tab": "path\tlabel\n" + ROWS.replace(",", "\t"),
    "pipe": "path|label\n" + ROWS.replace(",", "|"),
    "byte-order mark": "\ufeffpath,label\n" + ROWS,
    "carriage returns": ("path,label\n" + ROWS).replace("\n", "\r\n"),
    "comments": "# made by a tool\n# version 2\npath,label\n#cat/2.png,cat\n" + ROWS,
    "separator of Excel": "sep=;\npath;label\n" + ROWS.replace(",", ";"),
    "no header": ROWS,
    "no header, label first": "".join(",".join(r.split(",")[::-1]) + "\n" for r in ROWS.split()),
    "quotes": '"path","label"\n' + re.sub(r"(.+),(.+)", r'"\1","\2"', ROWS),
    "single quotes": "'path','label'\n" + re.sub(r"(.+),(.+)", r"'\1','\2'", ROWS),
    "quotes and blanks": "path, label\n" + re.sub(r"(.+),(.+)", r'\1, "\2"', ROWS),
    "blanks": " path , label\n" + ROWS.replace(",", "  ,").replace("\n", "  \n"),
    "blank lines": "\n\npath,label\n\n" + ROWS.replace("\n", "\n\n"),
    "index of pandas": ",path,label\n" + "".join(f"{i},{r}\n" for i, r in enumerate(ROWS.split())),
    "index called #": "#,path,label\n" + "".join(f"{i},{r}\n" for i, r in enumerate(ROWS.split())),
    "other columns": "id,label,size,file_name\n"
    + "".join(f"{i},{v},7,{k}\n" for i, (k, v) in enumerate(CATS_AND_DOGS.items())),
    "names of columns in capitals": "Image Index,Finding Labels\n" + ROWS,
    "names in camel case": "ImageId;ClassId\n" + ROWS.replace(",", ";"),
    "label in the only other column": "Image,Id\n" + ROWS,
    "backslashes": "path,label\n" + ROWS.replace("/", "\\"),
    "dots": "path,label\n" + re.sub("^", "./", ROWS, flags=re.M)[:-2],
    "absolute": "path,label\n" + re.sub(r"(.+),", r"@/\1,", ROWS),
    "file URLs": "path,label\n" + re.sub(r"(.+),", r"file://@/\1,", ROWS),
    "list with blanks": ROWS.replace(",", " "),
    "list with wide blanks": ROWS.replace(",", "   "),
    "list with tabs": ROWS.replace(",", "\t"),
    "list with a header": "path label\n" + ROWS.replace(",", " "),
    "list with several columns": "path label size\n" + ROWS.replace(",", " ").replace("\n", " 7\n"),
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", ["labels.csv", "list.txt"])
def test_dialects(tmp_path, dialect, name):
    path = write(tmp_path, DIALECTS[dialect], name)
    data = load_data(path, whole=True)
    assert levels(data.splits["train"]) == EXPECTED
    assert data.classes == ("cat", "dog")


def test_comments_and_missing_headers_are_mentioned(tmp_path):
    notes = load_data(write(tmp_path, DIALECTS["comments"])).notes
    assert any("skipped 3 lines that start with `#`" in note for note in notes)
    notes = load_data(write(tmp_path, DIALECTS["no header"])).notes
    assert any("the first line is data" in note for note in notes)


def test_a_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "pictures", "")
    path = write(
        tmp_path / "tables", "path,label\n" + re.sub("(.+),", r"~/pictures/\1,", ROWS), images=[]
    )
    assert whole(path) == EXPECTED


def test_names_with_blanks_and_labels_with_blanks(tmp_path):
    images = ("my cat 1.png", "my cat 2.png", "dog.png")
    text = "my cat 1.png red fox\nmy cat 2.png 3\ndog.png red fox\n"
    assert whole(write(tmp_path, text, "list.txt", images)) == {0: "red fox", 1: "3", 2: "red fox"}


@pytest.mark.parametrize("header", ["id,breed", "id_code,diagnosis", "image_id,dx"])
def test_identifiers_with_a_root_and_a_suffix(tmp_path, header):
    images = {f"train_images/{name}.bmp": None for name in ("ab12", "cd34.5", "ef56")}
    path = write(tmp_path, f"{header}\nab12,x\ncd34.5,y\nef56,x\n", "train.csv", images)
    wanted = "--set data.image_root=.*train_images --set data.image_suffix=.bmp"
    with pytest.raises(VitcliError, match="`ab12` and the next images do not exist") as caught:
        load_data(path)
    assert re.search(wanted, caught.value.hint)
    settings = {"image_root": str(tmp_path / "train_images"), "image_suffix": ".bmp"}
    assert whole(path, **settings) == {0: "x", 1: "y", 2: "x"}
    settings = {"image_root": "train_images", "image_suffix": "bmp"}  # beside the table
    assert whole(path, **settings) == {0: "x", 1: "y", 2: "x"}
    with pytest.raises(VitcliError, match="`nowhere` is not a folder"):
        load_data(path, image_root="nowhere")


def test_paths_of_another_machine(tmp_path):
    text = "path,label\n/home/ann/cat/0.png,cat\nC:\\data\\dog\\0.png,dog\n"
    path = write(tmp_path, text)
    assert whole(path, image_root=str(tmp_path)) == {0: "cat", 2: "dog"}


def test_urls_are_refused_with_the_way_out(tmp_path):
    text = "url,label\nhttps://x.org/a/0.png?w=1,cat\nhttps://x.org/b/1%20b.png,dog\n"
    path = write(tmp_path, text, images=("in/0.png", "in/1 b.png"))
    with pytest.raises(VitcliError, match=r"lists URLs such as `https://x\.org/a/0\.png") as caught:
        load_data(path)
    assert "data.image_root" in caught.value.hint
    assert whole(path, image_root=str(tmp_path / "in")) == {0: "cat", 1: "dog"}


@pytest.mark.parametrize(
    ("text", "words", "hint"),
    [
        (
            "path,thing,other\n" + ROWS.replace("\n", ",1\n"),
            "no label column.*`thing`, `other`",
            "",
        ),
        (
            "path,diagnosis,target\ncat/0.png,a,x\ncat/1.png,b,x\n",
            r"2 columns that can be the label: `target` \(1 values\), `diagnosis` \(2 values\)",
            "data.label_column=target",
        ),
        ("path,label,label\ncat/0.png,a,x\n", "has 2 columns `label`", "rename"),
        ("path\ncat/0.png\n", "has no labels", "predict"),
        ('path,label\ncat/0.png,"cat\ndog/0.png,dog\n', "line 3 of .* is not a row", "quote"),
        ("path,label\ncat/0.png,cat,dog\n", "more cells than the header", "quote"),
        ("cat/0.png,cat,brown\n", "no label column", "label_column"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path, text, words, hint):
    with pytest.raises(VitcliError, match=words) as caught:
        load_data(write(tmp_path, text))
    assert hint in caught.value.hint


def test_two_columns_that_say_the_same_are_one(tmp_path):
    text = "path,class_name,label\ncat/0.png,cat,0\ncat/1.png,cat,0\ndog/0.png,dog,1\n"
    assert whole(write(tmp_path, text)) == {0: "0", 1: "0", 2: "1"}


def test_of_several_path_columns_the_one_that_exists(tmp_path):
    rows = "".join(
        f"{i},{p.rpartition('/')[2]},{p},{v}\n" for i, (p, v) in enumerate(CATS_AND_DOGS.items())
    )
    assert whole(write(tmp_path, "id,image,path,label\n" + rows)) == EXPECTED
    both = "image,path,label\ncat/0.png,dog/0.png,a\ncat/1.png,dog/1.png,b\n"
    with pytest.raises(VitcliError, match="2 columns of images: `image`, `path`"):
        load_data(write(tmp_path, both))
    assert whole(write(tmp_path, both), image_column="path") == {2: "a", 3: "b"}


def test_images_that_do_not_exist_are_counted(tmp_path):
    path = write(tmp_path, "path,label\n" + ROWS + "cat/7.png,cat\n")
    notes = load_data(path, whole=True).notes
    assert any("1 of 5 images does not exist, such as" in note for note in notes)


def test_a_column_that_holds_no_classes(tmp_path):
    path = labelled(tmp_path, [str(20 + i) for i in range(12)])
    notes = load_data(path, whole=True).notes
    assert any("`label` has 12 different labels for 12 images" in note for note in notes)


# Labels


def labelled(folder, cells, column="label", name="labels.csv"):
    """One image per cell."""
    images = [f"{i}.png" for i in range(len(cells))]
    if name.endswith(".jsonl"):
        rows = [
            json.dumps({"path": p, column: cell}) for p, cell in zip(images, cells, strict=True)
        ]
    else:
        quoted = ['"' + cell.replace('"', '""') + '"' for cell in cells]
        rows = [f"path,{column}", *map(",".join, zip(images, quoted, strict=True))]
    return write(folder, "\n".join(rows) + "\n", name, images)


@pytest.mark.parametrize(
    ("cells", "classes", "note"),
    [
        (["cat ", "cat", " cat\t", "dog"], ("cat", "dog"), "merged 2 spellings .*`cat`"),
        (["Cat", "cat", "dog"], ("Cat", "cat", "dog"), "only in case .*: `Cat`, `cat`"),
        (["caf\u00e9", "cafe\u0301", "tea"], ("caf\u00e9", "tea"), "merged 1 spelling .*accents"),
        (["01", "1", "02"], ("01", "1", "02"), None),
        (["10", "9", "9"], ("9", "10"), None),
        (["2.0", "1.0", "10.0", "1"], ("1", "2", "10"), None),
        (["1.0", "a"], ("1.0", "a"), None),
        (["NA", "none", "-"], ("-", "NA", "none"), None),
        (["v1.5", "v2.5"], ("v1.5", "v2.5"), None),
    ],
)
def test_spellings_of_labels(tmp_path, cells, classes, note):
    data = load_data(labelled(tmp_path, cells), whole=True)
    assert data.classes == classes
    found = levels(data.splits["train"])
    assert sorted(found) == list(range(len(cells)))
    if note is None:
        assert not data.notes
    else:
        assert re.search(note, data.notes[-1])


@pytest.mark.parametrize("name", ["labels.csv", "labels.jsonl"])
def test_missing_labels_are_no_class(tmp_path, name):
    cells = ["cat", "NaN", "dog", "nan", "None", "", " ", "<NA>", "NULL"]
    data = load_data(labelled(tmp_path, cells, name=name), whole=True)
    assert levels(data.splits["train"]) == {0: "cat", 2: "dog"}
    assert "skipped 7 rows without path or label" in data.notes[0]
    for part in ("1 `NaN`", "1 `nan`", "1 `None`", "1 `<NA>`", "1 `NULL`"):
        assert part in data.notes[0]


@pytest.mark.parametrize(
    "cells",
    [
        [f"{i / 40:.3f}" for i in range(40)],
        ["0", "1", "0.5"],
        ["1e-3", "2", "3"],
        [f"0,{i:02}" for i in range(1, 40)],
        [-1.5, 2.5, 3],
    ],
)
def test_measurements_are_not_classes(tmp_path, cells):
    name = "labels.csv" if isinstance(cells[0], str) else "labels.jsonl"
    with pytest.raises(VitcliError, match=rf"{len(cells)} different numbers.*regression") as caught:
        load_data(labelled(tmp_path, cells, name=name))
    assert "classes" in caught.value.hint


# Splits


SPLIT_CELLS = ["train", "test", "train", "val"]
SPLIT_COLUMNS = {
    "split": SPLIT_CELLS,
    "Subset": ["TRAIN", "Test", "training", "valid"],
    "set": ["train_set", "testing", "Training Set", "validation"],
    "partition": ["train", "tst", "", "dev"],
    "Usage": ["Training", "PrivateTest", "Training", "PublicTest"],
    "fold": SPLIT_CELLS,
    "is_test,is_valid": ["0,0", "1,0", "0,0", "0,1"],
    "data_split": ["trainval", "test", "train", "val"],
}


@pytest.mark.parametrize("column", SPLIT_COLUMNS)
def test_columns_that_mean_a_split(tmp_path, column):
    rows = zip(CATS_AND_DOGS.items(), SPLIT_COLUMNS[column], strict=True)
    text = f"path,label,{column}\n" + "".join(f"{p},{v},{cell}\n" for (p, v), cell in rows)
    data = load_data(write(tmp_path, text), labelled=False)
    found = {name: levels(images) for name, images in data.splits.items()}
    assert found == {
        "train": {0: "cat", 2: "dog"},
        "validation": {3: "dog"},
        "test": {1: "cat"},
    }
    assert f"`{column.split(',')[0]}`" in data.notes[-1] and "the splits" in data.notes[-1]


@pytest.mark.parametrize("cells", [["False", "True"], ["0", "1"], ["no", "yes"]])
@pytest.mark.parametrize(("column", "name"), [("is_valid", "validation"), ("is_test", "test")])
def test_flags(tmp_path, cells, column, name):
    rows = zip(CATS_AND_DOGS.items(), cells * 2, strict=True)
    text = f"path,label,{column}\n" + "".join(f"{p},{v},{cell}\n" for (p, v), cell in rows)
    data = load_data(write(tmp_path, text))
    assert {k: levels(s) for k, s in data.splits.items()} == {
        "train": {0: "cat", 2: "dog"},
        name: {1: "cat", 3: "dog"},
    }


@pytest.mark.parametrize(
    "cells",
    [["0", "1", "2", "1"], ["0.0", "1.0", "2.0", "1.0"], ["fold0", "fold1", "fold2", "fold1"]],
)
def test_folds_need_a_choice(tmp_path, cells):
    rows = zip(CATS_AND_DOGS.items(), cells, strict=True)
    path = write(tmp_path, "path,label,fold\n" + "".join(f"{p},{v},{c}\n" for (p, v), c in rows))
    with pytest.raises(VitcliError, match="column `fold` holds 3 folds") as caught:
        load_data(path)
    assert "data.test_fold=" in caught.value.hint and "split_column=none" in caught.value.hint
    data = load_data(path, test_fold=1)
    assert {k: levels(s) for k, s in data.splits.items()} == {
        "train": {0: "cat", 2: "dog"},
        "test": {1: "cat", 3: "dog"},
    }
    assert "fold `1` of column `fold` is the test split: 2 of 4 rows" in data.notes[-1]
    assert "holds 3 folds" not in "".join(load_data(path, split_column="none").notes)
    assert len(load_data(path, whole=True).splits["train"]) == 4
    with pytest.raises(VitcliError, match="no fold `7`"):
        load_data(path, test_fold=7)


def test_a_flag_for_training_only(tmp_path):
    rows = zip(CATS_AND_DOGS.items(), ["yes", "no"] * 2, strict=True)
    text = "path,label,is_train\n" + "".join(f"{p},{v},{cell}\n" for (p, v), cell in rows)
    data = load_data(write(tmp_path, text))
    assert {k: levels(s) for k, s in data.splits.items()} == {
        "train": {0: "cat", 2: "dog"},
        "test": {1: "cat", 3: "dog"},
    }


def test_any_column_can_hold_the_folds(tmp_path):
    text = "path,label,site\ncat/0.png,cat,A\ncat/1.png,cat,B\ndog/0.png,dog,A\ndog/1.png,dog,B\n"
    data = load_data(write(tmp_path, text), split_column="site", test_fold="B")
    assert {k: levels(s) for k, s in data.splits.items()} == {
        "train": {0: "cat", 2: "dog"},
        "test": {1: "cat", 3: "dog"},
    }


def test_columns_that_name_different_splits(tmp_path):
    text = "path,label,split,subset\n" + ROWS.replace("\n", ",train,test\n")
    with pytest.raises(VitcliError, match="name different splits: `split`, `subset`") as caught:
        load_data(write(tmp_path, text))
    assert "data.split_column=split" in caught.value.hint
    text = "path,label,split,dataset\n" + ROWS.replace("\n", ",train,animals\n")
    assert len(load_data(write(tmp_path, text), whole=True).splits["train"]) == 4


# Several tables


TEST_ROWS = "path,label\ntest/0.png,dog\ntest/1.png,cat\n"


@pytest.mark.parametrize("notation", ["", "{train,test}.csv", "train.csv,test.csv"])
def test_two_tables(tmp_path, notation):
    images = [*CATS_AND_DOGS, "test/0.png", "test/1.png"]
    images = [p.replace("cat/", "train/a").replace("dog/", "train/b") for p in images]
    rows = ROWS.replace("cat/", "train/a").replace("dog/", "train/b")
    write(tmp_path, "path,label\n" + rows, "train.csv", images)
    write(tmp_path, TEST_ROWS, "test.csv", [])
    write(tmp_path, "id,label\n1,0\n", "sample_submission.csv", [])
    data = load_data(
        ",".join(f"{tmp_path}/{part}" for part in notation.split(","))
        if "," in notation and "{" not in notation
        else f"{tmp_path}/{notation}"
    )
    assert {k: levels(s) for k, s in data.splits.items()} == {
        "train": EXPECTED,
        "test": {4: "dog", 5: "cat"},
    }
    alone = load_data(f"{tmp_path}/train.csv")
    assert any("`test.csv` beside it is not read" in note for note in alone.notes)


def test_a_test_table_without_labels(tmp_path):
    write(tmp_path, "path,label\n" + ROWS, "train.csv")
    write(tmp_path, "path\ncat/0.png\n", "test.csv", [])
    data = load_data(f"{tmp_path}/{{train,test}}.csv")
    assert sorted({**levels(data.splits["train"]), **levels(data.splits["test"])}) == [0, 1, 2, 3]
    assert any("test.csv: the table has no labels" in note for note in data.notes)
    data = load_data(f"{tmp_path}/{{train,test}}.csv", labelled=False, whole=True)
    assert levels(data.splits["train"]) == EXPECTED
    assert whole(f"{tmp_path}/test.csv", labelled=False) == {0: ""}
    with pytest.raises(VitcliError, match="has no labels"):
        load_data(f"{tmp_path}/test.csv")


def test_the_images_of_a_table_without_labels_are_not_looked_for(tmp_path):
    images = {f"train_images/{name}.png": None for name in "abcd"}
    write(tmp_path, "id_code,diagnosis\na,0\nb,1\nc,0\nd,1\n", "train.csv", images)
    write(tmp_path, "id_code\nx\n", "test.csv", ["test_images/x.png"])
    settings = {"image_root": "train_images", "image_suffix": ".png"}
    assert whole(str(tmp_path), **settings) == {0: "0", 1: "1", 2: "0", 3: "1"}


def test_class_folders_go_before_a_table_beside_them(tmp_path):
    write(tmp_path, "path,label\ncat/0.png,x\ndog/0.png,y\n", "train.csv")
    assert load_data(str(tmp_path), whole=True).classes == ("cat", "dog")


# Several labels


SEVERAL = [{"a"}, {"a", "b"}, {"b"}, {"c", "b"}, {"c"}, {"a", "b", "c"}]


def joined(separator):
    return [separator.join(sorted(labels)) for labels in SEVERAL]


@pytest.mark.parametrize(
    ("cells", "column"),
    [
        (joined("|"), "label"),
        (joined(";"), "label"),
        (joined(","), "label"),
        (joined(", "), "label"),
        (joined(" "), "labels"),
        (joined("|"), "Finding Labels"),
        ([str(sorted(labels)) for labels in SEVERAL], "label"),
        ([json.dumps(sorted(labels)) for labels in SEVERAL], "label"),
        ([str(np.array(sorted(labels))) for labels in SEVERAL], "label"),
        ([str(tuple(sorted(labels))) for labels in SEVERAL], "label"),
        ([f"[{', '.join(sorted(labels))}]" for labels in SEVERAL], "label"),
    ],
)
def test_several_labels_in_a_cell(tmp_path, cells, column):
    data = load_data(labelled(tmp_path, cells, column), whole=True)
    assert levels(data.splits["train"]) == dict(enumerate(SEVERAL))
    assert data.classes == ("a", "b", "c")
    assert "multi-label data" in data.notes[0]


@pytest.mark.parametrize(
    ("cells", "column"),
    [
        (["tench, Tinca tinca", "goldfish, Carassius auratus", "shark, man-eater"], "label"),
        (["golden retriever", "labrador retriever", "golden eagle"], "labels"),
        (["yes|no", "perhaps"], "label"),
        (["(unknown)", "(other)", "cat"], "label"),
        (["[a]", "b"], "label"),
    ],
)
def test_one_label_in_a_cell(tmp_path, cells, column):
    data = load_data(labelled(tmp_path, cells, column), whole=True)
    assert levels(data.splits["train"]) == dict(enumerate(cells))


def test_settings_decide(tmp_path):
    path = labelled(tmp_path, ["x/y", "x", "y z"])
    found = whole(path, label_separator="/")
    assert found == {0: {"x", "y"}, 1: {"x"}, 2: {"y z"}}
    path = labelled(tmp_path, ["fox, red", "wolf, grey", "bear, brown"])
    assert whole(path, multi_label=True)[0] == {"fox", "red"}
    path = labelled(tmp_path, joined("|"))
    assert whole(path, multi_label=False)[1] == "a|b"


def test_one_image_in_several_rows(tmp_path):
    text = "path,label\ncat/0.png,a\ncat/0.png,b\ndog/0.png,b\ncat/1.png,a\n"
    path = write(tmp_path, text)
    with pytest.raises(
        VitcliError, match=r"1 image has rows with different labels.*`cat/0\.png`"
    ) as caught:
        load_data(path)
    assert "data.multi_label=true" in caught.value.hint
    assert whole(path, multi_label=True) == {0: {"a", "b"}, 1: {"a"}, 2: {"b"}}
    data = load_data(path, whole=True, labelled=False)
    assert any("1 image has rows with different labels" in note for note in data.notes)


ONE_HOT = "image,MEL,NV,BCC\ncat/0.png,1.0,0.0,0.0\ncat/1.png,0.0,1.0,0.0\ndog/0.png,0.0,0.0,1.0\n"


def test_one_hot_columns(tmp_path):
    data = load_data(write(tmp_path, ONE_HOT), whole=True)
    assert levels(data.splits["train"]) == {0: "MEL", 1: "NV", 2: "BCC"}
    assert "each row has exactly one 1" in data.notes[0]
    assert whole(write(tmp_path, ONE_HOT), multi_label=True)[0] == {"MEL"}


@pytest.mark.parametrize(("one", "zero"), [("1", "0"), ("True", "False"), ("1", "-1")])
def test_columns_of_several_labels(tmp_path, one, zero):
    rows = [
        (p, "a" in s, "b" in s, "c" in s)
        for p, s in zip(CATS_AND_DOGS, [*SEVERAL[:3], set()], strict=True)
    ]
    text = "path,a,b,c\n" + "".join(
        ",".join([p, *(one if f else zero for f in flags)]) + "\n" for p, *flags in rows
    )
    data = load_data(write(tmp_path, text), whole=True)
    assert levels(data.splits["train"]) == {0: {"a"}, 1: {"a", "b"}, 2: {"b"}, 3: set()}
    assert "multi-label data" in data.notes[0]
    with pytest.raises(VitcliError, match="2 rows do not have exactly one 1"):
        load_data(write(tmp_path, text), multi_label=False)


def test_columns_of_zeros_and_ones_beside_others(tmp_path):
    text = "path,age,a,b\ncat/0.png,31,1,0\ncat/1.png,40,0,1\ndog/0.png,50,1,1\n"
    with pytest.raises(VitcliError, match="no label column") as caught:
        load_data(write(tmp_path, text))
    assert "data.label_column=a,b" in caught.value.hint
    assert whole(write(tmp_path, text), label_column="a,b") == {0: {"a"}, 1: {"b"}, 2: {"a", "b"}}
    text = "cat/0.png 1 0\ncat/1.png 0 1\ndog/0.png 1 1\n"
    assert whole(write(tmp_path, text, "list.txt"))[2] == {"column_2", "column_3"}

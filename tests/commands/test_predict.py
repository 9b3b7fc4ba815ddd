import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from vitcli.cli.main import run as command_line
from vitcli.commands import predict
from vitcli.data.image_paths import find_images
from vitcli.data.image_set import FileStore, ImageSet
from vitcli.data.split_record import SplitRecord, image_keys
from vitcli.errors import VitcliError
from vitcli.preprocess import Preprocess
from vitcli.weights.loaded import create_model
from vitcli.weights.store import save_model

NAMES = ("ant", "bée", "cat", "dog", "eel", "fox", "gnu")


@pytest.fixture
def model(here):
    net = create_model("Pico/8", num_classes=7, image_size=16, depth=1)
    torch.nn.init.normal_(net.network.head.weight)
    net.preprocess, net.labels, net.head_trained = Preprocess(image_size=(16, 16)), NAMES, True
    save_model("m.safetensors", net)
    return net


@pytest.fixture
def pictures(here):
    rng = np.random.default_rng(0)
    (here / "p/deep").mkdir(parents=True)
    for name in ("b.png", "a.jpg", "deep/c.png", ".hidden.png"):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(here / "p" / name)
    (here / "p/notes.txt").write_text("x")
    return here / "p"


def test_rows(model, pictures):
    paths = ["p/b.png", "p/a.jpg", "p/deep/c.png"]
    rows = list(predict.run(paths, model="m.safetensors", top=3, batch_size=2))
    assert [row["path"] for row in rows] == paths
    for path, row in zip(paths, rows, strict=True):
        with torch.no_grad():
            shares = model(model.preprocess(path)[None]).double().softmax(1)[0]
        best = shares.argsort(descending=True)[:3].tolist()
        assert [t["label"] for t in row["top"]] == [NAMES[i] for i in best]
        assert row["probability"] == pytest.approx(float(shares[best[0]]), abs=1e-5)
        assert list(row) == ["path", "label", "probability", "top", "error"]
        assert row["label"] == row["top"][0]["label"] and row["error"] is None
        assert json.loads(json.dumps(row)) == row


def test_folders_and_globs_in_order(model, pictures):
    found = list(find_images(["p", "p/*.png", "p/**/*.png"]))
    assert found[:3] == ["p/a.jpg", "p/b.png", "p/deep/c.png"]
    assert found[3:] == ["p/b.png", "p/b.png", "p/deep/c.png"]
    (pictures / "x[1].png").write_bytes((pictures / "b.png").read_bytes())
    assert list(find_images(["p/x[1].png"])) == ["p/x[1].png"]  # a name, not a glob


def test_what_cannot_be_read_gets_a_row(model, pictures):
    (pictures / "bad.png").write_bytes(b"no image")
    (pictures / "gone.png").symlink_to("nowhere")
    result = predict.run(["p", "missing.jpg"], model="m.safetensors")
    rows = {row["path"]: row for row in result}
    assert result.failed == 3 and len(rows) == 6
    for name in ("p/bad.png", "p/gone.png", "missing.jpg"):
        row = rows[name]
        assert row["label"] is None and row["probability"] is None and row["top"] == []
        assert row["error"]
    assert rows["p/a.jpg"]["label"] in NAMES


@pytest.mark.parametrize("name", ["labels.csv", "x.parquet", "y.JSONL"])
def test_a_table_is_no_image(name, model, pictures):
    Path(name).write_text("path,label\np/a.jpg,ant\n")
    with pytest.raises(VitcliError, match="is a dataset") as error:
        predict.run([name], model="m.safetensors")
    assert f"vitcli evaluate {name}" in error.value.hint
    # Among images it is one more file that cannot be read.
    result = predict.run([name, "p/a.jpg"], model="m.safetensors")
    assert [row["error"] is None for row in result] == [False, True]


def test_a_folder_of_parquet_is_data(model, here):
    (here / "set").mkdir()
    (here / "set/test.parquet").write_bytes(b"")
    with pytest.raises(VitcliError, match="no images in `set`") as error:
        predict.run(["set"], model="m.safetensors")
    assert "vitcli evaluate set" in error.value.hint


def test_probabilities_of_all_classes(model, pictures):
    (row,) = predict.predict("p/b.png", model=model, top=99)
    assert len(row["top"]) == 7
    assert sum(t["probability"] for t in row["top"]) == pytest.approx(1, abs=1e-12)


def test_nothing_there(model, here):
    for paths in (["no.jpg", "x/*.png"], []):
        with pytest.raises(VitcliError, match=r"no such image|no images given"):
            predict.run(paths, model="m.safetensors")
    (here / "empty").mkdir()
    with pytest.raises(VitcliError, match="no images in `empty`"):
        predict.run(["empty"], model="m.safetensors")


def test_a_model_without_a_trained_head(model, pictures):
    model.head_trained = False
    save_model("m.safetensors", model)
    with pytest.raises(VitcliError, match="no trained head") as error:
        predict.run(["p"], model="m.safetensors")
    assert "fewshot" in error.value.hint and "finetune" in error.value.hint
    with pytest.raises(VitcliError, match="no trained head"):
        predict.run(["p"], model="Ti/16")
    with pytest.raises(VitcliError, match="no run with a trained head"):
        predict.run(["p"])


def test_numbers_that_are_none(model, pictures):
    with torch.no_grad():
        model.network.head.weight[0] = float("nan")
    save_model("nan.safetensors", model)
    with pytest.raises(VitcliError, match=r"outputs of `nan\.safetensors` are not finite"):
        list(predict.run(["p"], model="nan.safetensors", csv_file=Path("t.csv")))
    assert not Path("t.csv").exists()


def test_images_in_memory(model, pictures):
    path = "p/b.png"
    with Image.open(path) as opened:
        array = np.array(opened)
        tensor = torch.from_numpy(array).permute(2, 0, 1)
        expected = predict.predict(path, model)[0]
        with Path(path).open("rb") as file:
            rows = predict.predict(
                [opened, Path(path).read_bytes(), file, array, tensor / 255, "p", "no.png"], model
            )
    paths = [path, None, path, None, None, "p/a.jpg", "p/b.png", "p/deep/c.png", "no.png"]
    assert [row["path"] for row in rows] == paths
    for row in [*rows[:5], rows[6]]:
        assert row["label"] == expected["label"] and row["error"] is None
        # Logits of about 10 are rounded differently in a batch of another size.
        assert row["probability"] == pytest.approx(expected["probability"], abs=1e-5)
    assert "does not exist" in rows[-1]["error"]
    single = [row["label"] for row in predict.predict(array, model)]
    batch = [row["label"] for row in predict.predict(np.stack([array, array]), model)]
    assert single * 2 == batch == [expected["label"]] * 2
    broken = predict.predict([np.full((8, 8), np.nan)], model)[0]
    assert broken["label"] is None and "its values are nan" in broken["error"]


def test_tables(model, pictures):
    odd = os.fsdecode(b'p/\xff, "q"\n.png')
    Path(odd).write_bytes((pictures / "b.png").read_bytes())
    (pictures / "bad.png").write_bytes(b"no image")
    run = predict.run(
        ["p"], model="m.safetensors", csv_file=Path("t.csv"), parquet_file=Path("t.parquet")
    )
    rows = list(run)
    json.dumps(rows)
    with Path("t.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    stored = pq.read_table("t.parquet").to_pylist()
    assert len(table) == len(stored) == len(rows) == 5
    for row, text, kept in zip(rows, table, stored, strict=True):
        assert text["path"] == kept["path"] and kept["label"] == row["label"]
        assert text["label"] == (row["label"] or "") and kept["top"] == row["top"]
        assert kept["probability"] == row["probability"]
        assert json.loads(text["top"]) == row["top"]
        for number, one in enumerate(row["top"][1:], 2):
            assert text[f"label_{number}"] == one["label"]
            assert float(text[f"probability_{number}"]) == one["probability"]
        assert row["top"] or not (text["label_2"] or text["probability_2"])
    assert "label_2" not in stored[0] and "label_6" not in table[0]
    assert any(r"\xff" in text["path"] for text in table)
    assert sorted(p.name for p in Path().iterdir()) == ["m.safetensors", "p", "t.csv", "t.parquet"]


def test_a_table_that_is_not_finished_is_not_left(model, pictures):
    rows = iter(predict.run(["p"], model="m.safetensors", csv_file=Path("t.csv")))
    next(rows)
    del rows
    import gc

    gc.collect()
    assert [p.name for p in Path().glob("*t.csv*")] == ["t.csv.part"]  # for `--resume`
    with pytest.raises(VitcliError, match="cannot write"):
        list(predict.run(["p"], model="m.safetensors", csv_file=Path("no/t.csv")))


def test_names_from_a_file_or_numbers(model, pictures):
    model.labels = None
    save_model("m.safetensors", model)
    (row,) = predict.predict(["p/b.png"], model="m.safetensors")
    assert row["label"].isdigit()
    (row,) = predict.run(["p/b.png"], model="m.safetensors", labels=list("abcdefg"))
    assert row["label"] in "abcdefg"


def test_light_imports():
    """A cold start does not wait for what training and tables need."""
    code = "import sys, vitcli.commands.predict; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"datasets", "accelerate", "sklearn", "scipy", "pandas", "pyarrow", "matplotlib"}
    heavy |= {
        "transformers",
        "huggingface_hub",
        "jinja2",
        "sympy",
        "torch._dynamo",
        "torch._inductor",
    }
    assert not heavy & set(done.stdout.split())


def test_imports_cause_no_full_garbage_collection():
    """The command line raises the threshold before it imports torch, and only the third one."""
    code = (
        "import gc; from vitcli.cli import main; before = gc.get_threshold(); "
        "main._collect_rarely(); assert gc.get_threshold()[:2] == before[:2]; "
        "import vitcli.commands.predict; print(gc.get_stats()[2]['collections'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0"]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"csv_file": "new.xlsx"}, "--csv new.csv"),
        ({"csv_file": "new.jsonl"}, "--csv new.csv"),
        ({"jsonl_file": "new.CSV"}, "--jsonl new.jsonl"),
        ({"parquet_file": "new.csv"}, "--parquet new.parquet"),
    ],
)
def test_a_name_of_another_format_is_refused(given, named):
    with pytest.raises(VitcliError, match="the name ends in") as caught:
        predict.run(["p"], **{name: Path(path) for name, path in given.items()})
    assert named in caught.value.hint


def test_the_last_line_counts_and_says_that_a_file_was_replaced(model, pictures, capfd):
    (pictures / "bad.png").write_bytes(b"no image")
    assert command_line(["predict", "p", "-m", "m.safetensors", "--csv", "t.csv"]) == 3
    assert "4 images, 1 unreadable, written to t.csv\n" in capfd.readouterr().err
    assert command_line(["predict", "p/b.png", "-m", "m.safetensors", "--csv", "t.csv"]) == 0
    assert capfd.readouterr().err.endswith("1 image, 0 unreadable, written to t.csv (replaced)\n")


def test_a_prediction_of_training_images_says_so(model, pictures, capfd):
    root = Path("p").resolve()
    names = ["a.jpg", "b.png"]
    trained = ImageSet("train", ("ant",), np.zeros(2, int), FileStore(root, map(str.encode, names)))
    model.split_record = SplitRecord({"train": image_keys(trained)})
    save_model("m.safetensors", model)
    assert command_line(["predict", "p", "-m", "m.safetensors"]) == 0
    assert "2 of 3 images are training images of `m.safetensors`" in capfd.readouterr().err
    (pictures / names[0]).unlink()
    Image.new("RGB", (9, 9), "pink").save(pictures / names[1])  # another image under this name
    assert command_line(["predict", "p", "-m", "m.safetensors"]) == 0
    assert "training images" not in capfd.readouterr().err


def test_a_line_fits_into_a_terminal(monkeypatch):
    from rich.console import Console

    from vitcli.cli import console
    from vitcli.cli.show.prediction import show_prediction

    top = [{"label": f"class {n}", "probability": 0.2} for n in range(5)]
    row = {"path": "a.png", "label": "class 0", "probability": 0.2, "top": top, "error": None}
    for width, last in ((80, "class 3 20.0 % …"), (200, "class 4 20.0 %"), (10, "20.0 % …")):
        screen = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
        monkeypatch.setattr(console, "out", screen)
        show_prediction(row)
        line = screen.file.getvalue().rstrip("\n")
        assert line.endswith(last) and "class 0 20.0 %" in line
        assert len(line) <= max(width, len("a.png  class 0 20.0 % …"))


def test_tables_of_any_name_and_not_in_the_place_of_a_folder(model, pictures):
    with pytest.raises(VitcliError, match="`p` is a folder"):
        predict.run(["p"], model=model, csv_file=Path("p"))
    tables = [Path(os.fsdecode(b"caf\xe9" + ending)) for ending in (b".csv", b".parquet")]
    rows = predict.run(["p"], model=model, csv_file=tables[0], parquet_file=tables[1])
    assert len(list(rows)) == 3 and all(table.stat().st_size for table in tables)

"""Any damage to a file that is read: one error in words, or the file is still readable.

`VITCLI_EXAMPLES=2000 pytest tests/test_damaged_files.py` runs more examples, at random.
"""

import csv
import json
import os
import shutil
import tarfile
import tempfile
import warnings
import zlib
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.mutations import HOSTILE, damaged_bytes, damaged_json, damaged_text, json_text
from support.writing import written_paths

from vitcli.cli.main import OS_HINTS
from vitcli.commands import compare, patchify, predict, suite
from vitcli.config.recipe import load_recipe, recipe_path
from vitcli.config.schema import DataSection
from vitcli.data.source import open_data
from vitcli.errors import VitcliError
from vitcli.evals.class_matching import read_class_map
from vitcli.evals.real_labels import read_real_labels
from vitcli.evals.suite_file import load_suite
from vitcli.files import unseal
from vitcli.hub.models import shard_names
from vitcli.preprocess import Preprocess
from vitcli.run import Run
from vitcli.train.checkpoint import load_checkpoint, save_checkpoint
from vitcli.train.resuming import reopen_run
from vitcli.weights.load import load_model
from vitcli.weights.loaded import create_model
from vitcli.weights.store import read_split_record, save_model

EXAMPLES = int(os.environ.get("VITCLI_EXAMPLES", "30"))
MANY = EXAMPLES > 30
hostile = settings(
    max_examples=EXAMPLES,
    deadline=10_000,  # ms: no hang
    derandomize=not MANY,
    database=None,
    suppress_health_check=list(HealthCheck),
)
MAX_GROWTH = 1 << 20  # KiB


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    """An empty current folder and an empty home, which stay empty."""
    folders = [tmp_path_factory.mktemp(name) for name in ("current", "home")]
    monkeypatch.chdir(folders[0])
    monkeypatch.setenv("HOME", str(folders[1]))
    yield
    assert not [path for folder in folders for path in folder.iterdir()]


@contextmanager
def one_error(folder: Path):
    """Allow a VitcliError, and an OSError that the command line words; watch memory and files."""
    before = _listing(folder)
    start = _reset_peak()
    with only_writes(), warnings.catch_warnings(action="ignore"):
        try:
            yield
        except VitcliError as error:
            assert error.message
        except OSError as error:
            assert error.errno in OS_HINTS, error
    assert _peak() - start < MAX_GROWTH
    assert _listing(folder) == before  # nothing is written


@contextmanager
def only_writes(*outputs: Path):
    """Allow no writing outside of `outputs`, the caches and the temporary folder.

    The folders of the tests are in the temporary folder too, so only its own entries count.
    """
    caches = [os.environ[name] for name in ("VITCLI_CACHE", "HF_DATASETS_CACHE")]
    allowed = [os.path.realpath(path) for path in (*caches, *outputs)]
    with written_paths() as written:
        yield
    for path in written - {os.devnull}:
        temporary = Path(path).parent == Path(tempfile.gettempdir()).resolve()
        compiled = "__pycache__" in path  # by the first import of a module
        assert temporary or compiled or any(f"{path}/".startswith(f"{a}/") for a in allowed), path


def _listing(folder: Path):
    """The files of a test and the entries beside its folder, where `../x` would be."""
    facts = {p: (p.lstat().st_size, p.lstat().st_mtime_ns) for p in folder.rglob("*")}
    return facts, set(folder.parent.iterdir())


def _reset_peak() -> int:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    """Peak memory in KiB since `_reset_peak`; 0 where the system does not say."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1])
    return 0


def picture(number=0) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def read_everything(path: Path, **section) -> None:
    """Open the data and read the first images of each split."""
    source = open_data(DataSection(**section), str(path))
    for images in source.splits.values():
        for index in range(min(3, len(images))):
            with suppress(VitcliError):
                images.read(index)
            images.describe(index)


@pytest.fixture(scope="module")
def net():
    net = create_model("Pico/8", num_classes=3, image_size=16, depth=1)
    torch.nn.init.normal_(net.network.head.weight)
    net.preprocess, net.labels, net.head_trained = Preprocess((16, 16)), tuple("abc"), True
    return net


@pytest.fixture(scope="module")
def files(net, tmp_path_factory) -> Path:
    """A folder with one valid file of each kind."""
    folder = tmp_path_factory.mktemp("valid")
    save_model(folder / "model.safetensors", net)
    torch.save({"model": net.state_dict(), "epoch": 3}, folder / "w.pth")
    torch.save(net.state_dict(), folder / "old.pth", _use_new_zipfile_serialization=False)
    names = [f"{label}{number}" for label in "ab" for number in range(4)]
    for number, name in enumerate(names):
        picture(number).save(folder / f"{name}.png")
    contents = [(folder / f"{name}.png").read_bytes() for name in names]
    labels = [name[0] for name in names]
    pq.write_table(pa.table({"image": contents, "label": labels}), folder / "x.parquet")
    with tarfile.open(folder / "x.tar", "w") as shard:
        for name, label in zip(names, labels, strict=True):
            (folder / f"{name}.json").write_text(json.dumps({"label": label}))
            shard.add(folder / f"{name}.png", f"{name}.png")
            shard.add(folder / f"{name}.json", f"{name}.json")
    with (folder / "x.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("path", "label"), *((f"{n}.png", k) for n, k in zip(names, labels, strict=True))]
        )
    rows = [{"path": f"{n}.png", "label": k} for n, k in zip(names, labels, strict=True)]
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    images = np.stack([np.asarray(picture(i)) for i in range(8)])
    np.savez(
        folder / "x.npz", train_images=images, train_labels=np.arange(8) % 2,
        test_images=images, test_labels=np.arange(8) % 2,
    )  # fmt: skip
    shutil.make_archive(str(folder / "x"), "zip", _class_folders(folder / "classes", names))
    patchify.run(str(folder / "classes"), out=folder / "stored")
    saved = datasets.Dataset.from_dict({"image": contents, "label": labels})
    datasets.DatasetDict(train=saved).save_to_disk(folder / "saved")
    return folder


def _class_folders(folder: Path, names) -> Path:
    for name in names:
        (folder / name[0]).mkdir(parents=True, exist_ok=True)
        shutil.copy(folder.parent / f"{name}.png", folder / name[0])
    return folder


def damage(file, path, read):
    """Call `read` with damaged copies of `file` at `path`."""

    @hostile
    @given(damaged_bytes(file.read_bytes()))
    def check(damaged):
        path.write_bytes(damaged)
        with one_error(path.parent):
            read(path)

    check()


@pytest.mark.parametrize("name", ["model.safetensors", "w.pth", "old.pth"])
def test_weights(files, tmp_path, name):
    damage(files / name, tmp_path / name, partial(load_model, num_heads=2))


def test_the_header_of_a_weights_file(files, tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = load_file(files / "model.safetensors")
    with safe_open(files / "model.safetensors", "pt") as file:
        header = json.loads(file.metadata()["vitcli"])
    header |= {"temperature": 1.5, "position_resize": "bicubic", "split": {"kind": "x"}}

    @hostile
    @given(damaged_json(header))
    def check(damaged):
        save_file(tensors, path, {"vitcli": damaged})
        with one_error(tmp_path):
            load_model(path)

    check()


def test_the_config_beside_weights(files, tmp_path):
    shutil.copy(files / "model.safetensors", tmp_path / "model.safetensors")
    save_file(load_file(files / "model.safetensors"), tmp_path / "model.safetensors")
    config = {
        "architecture": "vit_tiny_patch16_224", "num_classes": 3, "num_features": 128,
        "model_args": {"img_size": 16, "patch_size": 8, "num_heads": 2, "global_pool": "token"},
        "pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "crop_pct": 0.9,
                           "input_size": [3, 16, 16], "interpolation": "bicubic",
                           "label_names": ["a", "b", "c"]},
    }  # fmt: skip

    @hostile
    @given(damaged_json(config))
    def check(damaged):
        (tmp_path / "config.json").write_text(damaged)
        with one_error(tmp_path):
            load_model(tmp_path)

    check()


@pytest.mark.parametrize("name", ["x.parquet", "x.tar", "x.npz", "x.zip"])
def test_datasets_of_one_file(files, tmp_path, name):
    damage(files / name, tmp_path / name, read_everything)


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl"])
def test_tables(files, tmp_path, name):
    whole, path = (files / name).read_text(), tmp_path / name
    for image in files.glob("*.png"):
        shutil.copy(image, tmp_path)

    @hostile
    @given(damaged_text(whole))
    def check(damaged):
        path.write_bytes(damaged)
        with one_error(tmp_path):
            read_everything(path)

    check()


TYPES = {
    "int": pa.array(range(8)),
    "float": pa.array([float("nan")] * 8),
    "list": pa.array([[1, 2]] * 8),
    "text": pa.array([f"{k}{n}.png" for k in "ab" for n in range(4)]),
    "strange text": pa.array(
        ["\0", "../x", "~nouser/x", "a" * 5000, "http://[::1/x", "", "/", "x"]
    ),
    "struct": pa.array([{"bytes": 5, "path": 3.0}] * 8),
    "struct of text": pa.array([{"bytes": None, "path": "x.png"}] * 8),
    "empty struct": pa.array([{"other": 1}] * 8),
    "time": pa.array([0] * 8, pa.timestamp("s")),
    "bool": pa.array([True, False] * 4),
    "null": pa.nulls(8),
    "decimal": pa.array([1] * 8, pa.decimal128(30, 2)),
    "dictionary": pa.array(["a", "b"] * 4).dictionary_encode(),
    "list of structs": pa.array([[{"a": 1}]] * 8),
    "map": pa.array([[("a", 1)]] * 8, pa.map_(pa.string(), pa.int32())),
    "bytes": pa.array([b"\xff\xfe"] * 8),
}


@pytest.mark.parametrize("kind", TYPES)
def test_columns_of_any_type(files, tmp_path, kind):
    good = pq.read_table(files / "x.parquet")
    for column in ("image", "label", "split", "group"):
        table = good.set_column(0, column, TYPES[kind]) if column == "image" else good
        table = good.set_column(1, column, TYPES[kind]) if column == "label" else table
        table = table.append_column(column, TYPES[kind]) if column in ("split", "group") else table
        pq.write_table(table, tmp_path / "x.parquet")
        with one_error(tmp_path):
            read_everything(tmp_path / "x.parquet")


def test_values_of_json_lines_and_of_shards(files, tmp_path):
    for image in files.glob("*.png"):
        shutil.copy(image, tmp_path)
    for column in ("path", "label", "split", "group"):
        for value in HOSTILE:
            rows = [{"path": f"{k}{n}.png", "label": k} for k in "ab" for n in range(4)]
            rows[1][column] = value
            text = "".join(json_text(row) + "\n" for row in rows)
            (tmp_path / "x.jsonl").write_text(text)
            with one_error(tmp_path):
                read_everything(tmp_path / "x.jsonl")
    for value in HOSTILE:
        with tarfile.open(tmp_path / "x.tar", "w") as shard:
            for number, name in enumerate(("a0", "a1", "b0", "b1")):
                described = {"label": name[0]} if number else {"label": value}
                (tmp_path / "l.json").write_text(json_text(described))
                shard.add(files / f"{name}.png", f"{name}.png")
                shard.add(tmp_path / "l.json", f"{name}.json")
        with one_error(tmp_path):
            read_everything(tmp_path / "x.tar")


def test_stored_sets(files, tmp_path):
    folder = tmp_path / "stored"
    described = json.loads((files / "stored/stored.json").read_text())
    parts = [p.name for p in (files / "stored").iterdir() if p.name != "stored.json"]

    @hostile
    @given(st.data())
    def check(data):
        shutil.copytree(files / "stored", folder, dirs_exist_ok=True)
        name = data.draw(st.sampled_from([*parts, "stored.json", "stored.json"]))
        if name == "stored.json":
            # Without a checksum, as earlier versions wrote it: the checks of the types remain.
            values = described if data.draw(st.booleans()) else unseal(described)
            (folder / name).write_text(data.draw(damaged_json(values)))
        else:
            (folder / name).write_bytes(data.draw(damaged_bytes((folder / name).read_bytes())))
        with one_error(tmp_path):
            read_everything(folder)

    check()


def test_folders_of_save_to_disk(files, tmp_path):
    folder = tmp_path / "saved"
    parts = [p.relative_to(files / "saved") for p in (files / "saved").rglob("*") if p.is_file()]

    @hostile
    @given(st.data())
    def check(data):
        shutil.copytree(files / "saved", folder, dirs_exist_ok=True)
        name = data.draw(st.sampled_from(parts))
        whole = (folder / name).read_bytes()
        if name.suffix == ".json":
            damaged = data.draw(damaged_json(json.loads(whole))).encode()
        else:
            damaged = data.draw(damaged_bytes(whole))
        (folder / name).write_bytes(damaged)
        with one_error(tmp_path):
            read_everything(folder)

    check()


SUITE = '[[tasks]]\nname = "a"\ndata = "builtin:digits"\nrecipe = "finetune_digits"\n'


def read_suite_record(path):
    suite._start_or_continue(path.parent, load_suite("shapes")[0], "m", {})


def read_record_beside(path):
    return read_split_record(path.with_name("m"))


JSON_FILES = {
    "class_map.json": ({"cat": "tabby", "dog": [1, "poodle"]}, read_class_map),
    "real.json": ([[1, 2], [3], []], read_real_labels),
    "model.safetensors.index.json": ({"weight_map": {"a": "x.safetensors"}}, shard_names),
    suite.RECORD: ({"suite": {}, "model": "m", "settings": {}}, read_suite_record),
    "m.split.json": (
        {"weights": f"7-{zlib.crc32(b'weights'):08x}", "split": {"train": "A" * 64}},
        read_record_beside,
    ),
}


@pytest.mark.parametrize("name", JSON_FILES)
def test_json_files(tmp_path, name):
    value, read = JSON_FILES[name]
    (tmp_path / "m").write_bytes(b"weights")

    @hostile
    @given(damaged_json(value) | damaged_text(json.dumps(value)))
    def check(damaged):
        content = damaged if isinstance(damaged, bytes) else damaged.encode()
        (tmp_path / name).write_bytes(content)
        with one_error(tmp_path):
            read(tmp_path / name)

    check()


def test_recipes_and_suites(tmp_path):
    recipe = recipe_path("pretrain_formula").read_text()

    @hostile
    @given(damaged_text(recipe), damaged_text(SUITE))
    def check(damaged, other):
        (tmp_path / "x.toml").write_bytes(damaged)
        with one_error(tmp_path):
            load_recipe(str(tmp_path / "x.toml"))
        (tmp_path / "x.toml").write_bytes(other)
        with one_error(tmp_path):
            load_suite(str(tmp_path / "x.toml"))

    check()


def test_checkpoints(tmp_path):
    from train.test_checkpoint import advance, state

    whole, fresh = state(), state(seed=9)
    advance(whole, 1)
    good = save_checkpoint(tmp_path / "good", whole, keep=2)
    values = json.loads((good / "state.json").read_text())
    plain = {key: value for key, value in unseal(values).items() if key != "files"}
    path = tmp_path / "bad" / good.name

    @hostile
    @given(st.data())
    def check(data):
        shutil.copytree(good, path, dirs_exist_ok=True)
        name = data.draw(st.sampled_from(sorted(p.name for p in good.iterdir())))
        if data.draw(st.booleans()):  # as earlier versions wrote it, without checksums
            (path / "state.json").write_text(json.dumps(plain))
        if name == "state.json":
            chosen = plain if data.draw(st.booleans()) else values
            (path / name).write_text(data.draw(damaged_json(chosen)))
        else:
            (path / name).write_bytes(data.draw(damaged_bytes((good / name).read_bytes())))
        with one_error(tmp_path):
            load_checkpoint(path, fresh)

    check()


def test_resume_logs(files, tmp_path):
    shutil.copy(files / "model.safetensors", tmp_path)
    for name in ("a0.png", "a1.png", "b0.png"):
        shutil.copy(files / name, tmp_path)
    images = [str(tmp_path / name) for name in ("a0.png", "a1.png", "b0.png")]
    model = load_model(tmp_path / "model.safetensors")
    output = tmp_path / "t.csv"

    def rows(resume):
        return predict.run(images, model=model, csv_file=output, resume=resume, batch_size=1)

    half = iter(rows(False))
    next(half), next(half)
    del half
    whole = (tmp_path / "t.csv.part").read_text()
    # Without the checksums, as earlier versions wrote it: the checks of the types remain.
    lines = [json.loads(line.partition(" ")[2]) for line in whole.splitlines()]

    @hostile
    @given(st.data())
    def check(data):
        if data.draw(st.booleans()):
            damaged = data.draw(damaged_text(whole))
        else:
            place = data.draw(st.integers(0, len(lines) - 1))
            texts = [json.dumps(line) for line in lines]
            texts[place] = data.draw(damaged_json(lines[place]))
            damaged = "".join(f"{text}\n" for text in texts).encode()
        (tmp_path / "t.csv.part").write_bytes(damaged)
        output.unlink(missing_ok=True)
        with (
            warnings.catch_warnings(action="ignore"),
            suppress(VitcliError),
            only_writes(tmp_path),
        ):
            list(rows(True))
        assert {p.name for p in tmp_path.iterdir()} <= {
            "model.safetensors", "a0.png", "a1.png", "b0.png", "t.csv", "t.csv.part",
        }  # fmt: skip

    check()


def test_the_records_of_a_run(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    recipe = recipe_path("pretrain_formula").read_text()
    values = {
        "provenance.json": {"steps": 4, "data": {"fingerprint": "a", "content": {"x": 1}},
                            "threads": 1},
        "result.json": {"command": "pretrain", "figures": {"accuracy": 0.5, "split": "test"},
                        "split": "test", "shots": {"5": {"accuracy": {"mean": 1.0}}}},
        "metrics.jsonl": {"step": 1, "train/loss": 1.0, "seconds": 1.0},
        ".holder.json": {"host": "a", "process": 1},
    }  # fmt: skip

    @hostile
    @given(st.data())
    def check(data):
        (run / "recipe.toml").write_text(recipe)
        for name, value in values.items():
            (run / name).write_text(json.dumps(value) + "\n")
        name = data.draw(st.sampled_from(list(values)))
        (run / name).write_bytes(data.draw(damaged_json(values[name])).encode() + b"\n")
        opened = Run(run)
        for read in (
            opened.records, opened.provenance, opened.result, opened.data_section,
            lambda: reopen_run(run, opened.recipe()),
            lambda: compare.run([run, run]),
            lambda: read_split_record(run / "model.safetensors"),
        ):  # fmt: skip
            with one_error(tmp_path):
                read()

    check()

"""`data.streaming`: every image once an epoch, mixed by a seed, from here, the Hub or the web."""

import io
import json
import tarfile
import tracemalloc

import datasets
import numpy as np
import pytest
from PIL import Image
from support.hub_server import Fault
from support.tiny import tiny_recipe, train_recipe, write_tiny

from vitcli.cli.main import run
from vitcli.commands import evaluate, plan
from vitcli.config.recipe import check
from vitcli.config.schema import AugmentSection, DataSection, Recipe
from vitcli.data.augment.transform import TrainTransform
from vitcli.data.loader import TrainLoader
from vitcli.data.source import DataRequest, open_data
from vitcli.data.streaming import Shard, StreamSample, StreamSet, open_stream
from vitcli.errors import VitcliError
from vitcli.preprocess import Preprocess
from vitcli.progress import Quiet

NAMES = ("cat", "dog", "owl")


def png(level):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (level, level, level)).save(buffer, "PNG")
    return buffer.getvalue()


def parquet(path, levels):
    """The class of a level is its remainder by three."""
    path.parent.mkdir(parents=True, exist_ok=True)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))}
    )
    rows = {
        "image": [{"bytes": png(v), "path": None} for v in levels],
        "label": [v % 3 for v in levels],
    }
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


def tar(path, levels, broken=()):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as shard:
        for v in levels:
            content = b"broken" if v in broken else png(v)
            # The label before the image, as some write it.
            for ending, data in (("cls", str(v % 3).encode()), ("seg", b"?"), ("png", content)):
                member = tarfile.TarInfo(f"{v:04}.{ending}")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path):
    """60 images in 4 tar files, and their class names beside them."""
    for i in range(4):
        tar(tmp_path / f"data/train-{i}.tar", range(15 * i, 15 * i + 15))
    tar(tmp_path / "data/test-0.tar", [100, 101, 102])
    (tmp_path / "data/classes.txt").write_text("\n".join(NAMES))
    return str(tmp_path / "data")


def stream(notation, buffer=16, **settings):
    section = DataSection(streaming=True, shuffle_buffer=buffer, **settings)
    return open_stream(DataRequest(notation, section))


def levels(samples):
    found = []
    for sample in samples:
        with Image.open(io.BytesIO(sample.content)) as image:
            found.append(image.getpixel((0, 0))[0])
        assert sample.label == found[-1] % 3
    return found


def loader(images, batch_size=10, **settings):
    transform = TrainTransform(Preprocess((8, 8)), AugmentSection(crop="none", flip_rate=0.0))
    return TrainLoader(images, transform, batch_size=batch_size, seed=0, **settings)


def test_an_epoch_has_every_image_once(shards):
    source = stream(shards)
    images = source.splits["train"]
    assert source.classes == NAMES and "a stream of 4 files" in source.notes[0]
    first, again, other = (levels(images.epoch((0, 0, e), 0, 1)) for e in (0, 0, 1))
    assert sorted(first) == list(range(60))
    assert first == again != other and first != sorted(first)
    # The images to test on are read as any others.
    assert [source.splits["test"].read(i).getpixel((0, 0))[0] for i in range(3)] == [100, 101, 102]


def test_processes_share_the_shards(shards):
    images = stream(shards).splits["train"]
    parts = [levels(images.epoch((0, 0, 0), rank, 2)) for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == list(range(60))
    assert len(parts[0]) == len(parts[1]) == 30
    with pytest.raises(VitcliError, match="4 files for 5 processes"):
        loader(images, world_size=5)


def test_a_buffer_of_all_mixes_all(shards):
    """Where an image comes has nothing to do with where it lay."""
    images = stream(shards, buffer=1000).splits["train"]
    ranks = []
    for e in range(30):
        order = levels(images.epoch((0, 0, e), 0, 1))
        ranks.append(np.corrcoef(order, np.arange(60))[0, 1])
    assert abs(np.mean(ranks)) < 3 / np.sqrt(30 * 60)


def test_memory_is_that_of_the_buffer():
    """A thousand images of 100 kB pass through; sixteen are held."""

    def rows(file, columns):
        for i in range(1000):
            yield bytes([i % 256]) * 100_000, "a", f"row {i}"

    images = StreamSet(["a"], [Shard("x", "x.tar")], (None, None), 16)
    images.read = lambda shard: (StreamSample(c, 0, n) for c, _, n in rows(None, None))
    tracemalloc.start()
    assert sum(1 for _ in images.epoch((0,), 0, 1)) == 1000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30 * 100_000


def test_batches(shards):
    images = stream(shards).splits["train"]
    threads = [[*loader(images, workers=w).batches(0, 8)] for w in (1, 3)]
    for batch, same in zip(*threads, strict=True):
        assert (batch.images == same.images).all() and (batch.labels == same.labels).all()
    values = [int(v) for b in threads[0] for v in b.images[:, 0, 0, 0]]
    assert sorted(values[:60]) == list(range(60))
    assert [int(v) % 3 for v in values] == [int(v) for b in threads[0] for v in b.labels]
    assert {int(e) for b in threads[0][6:] for e in b.epochs} == {1}
    later = next(iter(loader(images).batches(20, 1)))
    assert not (later.images == threads[0][2].images).all()  # another stream, and said so


def test_broken_images_are_passed_over(tmp_path):
    tar(tmp_path / "train-0.tar", range(12), broken=(3, 7))
    (tmp_path / "classes.txt").write_text("\n".join(NAMES))
    images = stream(str(tmp_path / "train-0.tar")).splits["train"]
    made = loader(images, batch_size=5)
    seen = {int(v) for b in made.batches(0, 4) for v in b.images[:, 0, 0, 0]}
    assert seen == set(range(12)) - {3, 7}
    assert sorted(name.split()[0] for name in made.broken) == ["0003", "0007"]
    with pytest.raises(VitcliError, match=r"0003|0007"):
        [*loader(images, batch_size=5, strict=True).batches(0, 4)]
    tar(tmp_path / "none-0.tar", range(3), broken=range(3))
    images = stream(str(tmp_path / "none-0.tar")).splits["train"]
    with pytest.raises(VitcliError, match="no labelled image that can be read"):
        [*loader(images, batch_size=2).batches(0, 1)]


def test_classes_must_be_known(tmp_path):
    tar(tmp_path / "train-0.tar", range(6))
    with pytest.raises(VitcliError, match="does not contain its class names"):
        stream(str(tmp_path / "train-0.tar"))
    (tmp_path / "names").write_text("cat\ndog\n")
    source = stream(str(tmp_path / "train-0.tar"), 4, classes=str(tmp_path / "names"))
    with pytest.raises(VitcliError, match="label `2`, which is not one of the 2 classes"):
        [*source.splits["train"].epoch((0,), 0, 1)]


def test_a_shard_that_ends_early(tmp_path):
    tar(tmp_path / "train-0.tar", range(6))
    content = (tmp_path / "train-0.tar").read_bytes()
    (tmp_path / "train-0.tar").write_bytes(content[: len(content) // 2 + 700])
    (tmp_path / "classes.txt").write_text("\n".join(NAMES))
    images = stream(str(tmp_path / "train-0.tar")).splits["train"]
    with pytest.raises(VitcliError, match=r"reading .*train-0\.tar` failed") as caught:
        [*images.epoch((0,), 0, 1)]
    assert "--resume" in caught.value.hint


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_from_the_hub_nothing_of_train_is_kept(loopback, kind):
    root = loopback.root / "datasets/org/big"
    write = parquet if kind == "parquet" else tar
    for i in range(3):
        write(root / f"data/train-{i}.{kind}", range(10 * i, 10 * i + 10))
    write(root / f"data/test-0.{kind}", [100, 101])
    (root / "classes.txt").write_text("\n".join(NAMES))
    source = stream("hf:org/big")
    assert sorted(levels(source.splits["train"].epoch((0, 0, 0), 0, 1))) == list(range(30))
    assert len(source.splits["test"]) == 2 and source.classes == NAMES
    kept = {p.name for p in (loopback.home / "hub").rglob("*") if "snapshots" in p.parts}
    assert f"test-0.{kind}" in kept and not any(name.startswith("train") for name in kept)
    assert source.splitting["commit"] == loopback.commit("org/big", kind="datasets")


def test_from_any_server(loopback):
    for i in range(2):
        tar(loopback.root / f"files/x-{i:03}.tar", range(5 * i, 5 * i + 5))
    names = loopback.root / "names"
    names.write_text("\n".join(NAMES))
    address = loopback.url + "/files/x-{000..001}.tar"
    source = stream(address, 4, classes=str(names))
    images = source.splits["train"]
    assert sorted(levels(images.epoch((0,), 0, 1))) == list(range(10))
    loopback.faults["x-001.tar"] = [Fault(status=404)]
    with pytest.raises(VitcliError, match=r"there is no file at `http.*x-001\.tar`"):
        [*images.epoch((0,), 0, 1)]


@pytest.mark.parametrize("drip", ["headers", "body"])
@pytest.mark.parametrize("place", ["web", "hub"])
def test_a_slow_server_ends_the_stream(loopback, monkeypatch, place, drip):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    tar(loopback.root / "files/x-0.tar", range(9))
    tar(loopback.root / "datasets/org/big/train-0.tar", range(9))
    names = loopback.root / "names"
    names.write_text("\n".join(NAMES))
    notation = "hf:org/big" if place == "hub" else loopback.url + "/files/x-0.tar"
    images = stream(notation, 4, classes=str(names)).splits["train"]
    loopback.faults[".tar"] += [Fault(drip=drip)] * 9
    with pytest.raises(VitcliError, match=r"does not send its answer within|is too slow"):
        [*images.epoch((0,), 0, 1)]


def test_a_run_on_a_stream(shards, tmp_path):
    class Heard(Quiet):
        lines = ()

        def warn(self, message):
            self.lines += (message,)

    recipe = tiny_recipe(
        data={"name": shards, "streaming": True, "shuffle_buffer": 20},
        train={"steps": 4, "batch_size": 12, "checkpoint_steps": 2},
    )
    heard = Heard()

    def go(resume):
        return train_recipe(tmp_path / "run", recipe, resume, heard)

    result = go(False)
    assert result.figures["images"] == 3
    assert any("continues with another order of the images" in x for x in heard.lines)
    record = json.loads((tmp_path / "run/provenance.json").read_text())["data"]
    assert record["streaming"] is True and record["resume"] == "approximate"
    (tmp_path / "run/result.json").unlink()
    for path in sorted((tmp_path / "run/checkpoints").iterdir())[1:]:
        path.unlink() if path.is_file() else None
    assert go(True).steps == 4
    found = evaluate.run(
        shards, model=str(tmp_path / "run"), settings={"data": {"streaming": True}}
    )
    assert found.metrics.images == 3


def test_a_run_on_a_stream_is_planned(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "PROBE_SECONDS", 0.2)
    stream_settings = {"data": {"streaming": True}, "train": {"steps": 10}}
    recipe = str(write_tiny(tmp_path / "tiny.toml"))
    request = {"command": "pretrain", "settings": stream_settings, "compare": False}
    facts = plan.run(recipe, shards, **request).to_json()
    assert facts["steps"] == 10 and facts["measured"]
    stream_settings["train"] = {"epochs": 2.0}
    with pytest.raises(VitcliError, match="number of images in a stream is unknown"):
        plan.run(recipe, shards, **request)


def test_what_a_stream_cannot_do(shards, capfd):
    section = DataSection(name=shards, streaming=True)
    with pytest.raises(VitcliError, match="needs random access"):
        open_data(section)
    for refused in ({"folds": 2}, {"test_fold": 0}):
        with pytest.raises(VitcliError, match="no folds"):
            open_data(DataSection(name=shards, streaming=True, **refused), streams=True)
    with pytest.raises(VitcliError, match="is unknown"):
        len(stream(shards).splits["train"])
    with pytest.raises(VitcliError, match="set `streaming` too"):
        check(Recipe, {"command": "pretrain", "train": {"steps": 1}, "data": {"classes": "x"}}, "x")
    assert run(["check", shards, "--set", "data.streaming=true"]) == 2
    assert "`data.streaming` has none" in capfd.readouterr().err

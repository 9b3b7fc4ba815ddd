"""Sets that are decoded once: same pictures, whole or going on, and nothing damaged unnoticed."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from support.pictures import photographs

from vitcli.cli.main import run as vitcli
from vitcli.data.decoded_cache import write_decoded
from vitcli.data.loader import TrainLoader, eval_batches
from vitcli.data.readers.decoded import INDEX, PLAN
from vitcli.data.source import load_data
from vitcli.decode import ImageError, read_image
from vitcli.errors import VitcliError
from vitcli.files import unseal
from vitcli.preprocess import Preprocess


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "photos"
    for i, picture in enumerate(photographs(24)):
        folder = root / ("train" if i < 16 else "test") / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        size = [(96, 96), (120, 60), (30, 40)][i % 3]
        picture.resize(size).save(folder / f"{i:02}.png")
    (root / "train/a/broken.png").write_bytes(b"\x89PNG no more")
    return root


def stored(photos, out, side=48):
    source = load_data(str(photos))
    return source, write_decoded(source, out, side=side)


def test_the_pictures_are_the_originals_shrunk_to_the_shorter_side(photos, tmp_path):
    source, result = stored(photos, tmp_path / "s")
    found = load_data(str(tmp_path / "s"))
    assert result.images == {"train": 16, "test": 8}
    assert len(result.broken) == 1
    assert "broken.png: " in result.broken[0]
    assert found.classes == source.classes == ("a", "b")
    for split in ("train", "test"):
        kept, original = found.splits[split], source.splits[split]
        good = [i for i in range(len(original)) if "broken" not in original.describe(i)]
        assert kept.labels.tolist() == original.labels[good].tolist()
        for i, j in enumerate(good):
            image, full = kept.read(i), original.read(j)
            assert min(image.size) == min(48, *full.size)
            shape = tuple(max(1, 48 * n // min(full.size)) for n in full.size)
            expected = full.resize(shape, Image.Resampling.BICUBIC) if min(full.size) > 48 else full
            assert image.tobytes() == expected.tobytes()
            assert kept.read(i, "L").tobytes() == expected.convert("L").tobytes()


def test_evaluation_sees_the_same_pixels_as_in_the_originals(photos, tmp_path):
    source, _ = stored(photos, tmp_path / "s")
    preprocess = Preprocess((42, 42), "crop", crop_fraction=0.875, interpolation="bicubic")
    assert preprocess.image_size[0] / 0.875 == 48
    images = [
        torch.cat([b.images for b in eval_batches(s.splits["test"], preprocess, batch_size=4)])
        for s in (source, load_data(str(tmp_path / "s")))
    ]
    assert torch.equal(*images)


def test_training_reads_it_with_any_number_of_workers(photos, tmp_path):
    from vitcli.config.schema import AugmentSection
    from vitcli.data.augment.transform import TrainTransform

    stored(photos, tmp_path / "s")
    images = load_data(str(tmp_path / "s")).splits["train"]
    transform = TrainTransform(Preprocess((32, 32)), AugmentSection())
    found = []
    for workers in (0, 1, 3):
        loader = TrainLoader(images, transform, batch_size=8, seed=0, workers=workers)
        found.append(torch.cat([batch.images for batch in loader.batches(0, 4)]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_stopped_at_any_byte_it_goes_on_to_the_same_bytes(photos, tmp_path):
    source, _ = stored(photos, tmp_path / "whole")
    names = ["train.pixels", "train.index", "test.pixels", "test.index", "stored.json"]
    whole = {name: (tmp_path / "whole" / name).read_bytes() for name in names}
    rng = np.random.default_rng(0)
    for attempt in range(12):
        out = tmp_path / f"cut{attempt}"
        out.mkdir()
        plan = unseal(json.loads(whole["stored.json"]))
        digests = plan.pop("index")
        assert set(digests) == {"train", "test"}
        (out / "storing.json").write_text(json.dumps(plan))
        for name in names[: 2 if attempt % 2 else 4]:  # lost at any place, in either file
            (out / name).write_bytes(whole[name][: rng.integers(0, len(whole[name]) + 1)])
        with pytest.raises(VitcliError, match="is an unfinished decoded dataset"):
            load_data(str(out))
        write_decoded(source, out, side=48)
        assert {name: (out / name).read_bytes() for name in names} == whole
        assert not (out / "storing.json").exists()


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on(tmp_path):
    root = tmp_path / "photos"
    for i, picture in enumerate(photographs(60, size=128)):
        folder = root / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture.resize((1000, 1000)).save(folder / f"{i:02}.jpg")
    out = tmp_path / "s"
    command = [sys.executable, "-m", "vitcli", "patchify", str(root), "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    index = out / "train.index"
    until = time.monotonic() + 60
    while not (out / "train.pixels").exists() or (out / "train.pixels").stat().st_size < 1:
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "stored.json").exists()
    assert index.exists()
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["images"] == {"train": 60}
    assert len(load_data(str(out), whole=True).splits["train"]) == 60


@pytest.mark.parametrize("what", ["pixel", "index", "cut", "json", "newer", "lost"])
def test_damage_is_told(photos, tmp_path, what):
    out = tmp_path / "s"
    stored(photos, out)
    if what == "pixel":
        content = bytearray((out / "test.pixels").read_bytes())
        content[5] ^= 1
        (out / "test.pixels").write_bytes(content)
        images = load_data(str(out)).splits["test"]
        with pytest.raises(ImageError, match="have changed"):
            images.read(0)
        assert images.read(1).mode == "RGB"
        return
    if what == "index":
        content = bytearray((out / "train.index").read_bytes())
        content[INDEX.itemsize + 16] ^= 1  # a label
        (out / "train.index").write_bytes(content)
    elif what == "cut":
        os.truncate(out / "train.pixels", 100)
    elif what == "lost":
        (out / "train.pixels").unlink()
    else:
        described = json.loads((out / "stored.json").read_text())
        described["format"] = 99
        text = json.dumps(described) if what == "newer" else "{"
        (out / "stored.json").write_text(text)
    words = {"index": "damaged", "cut": "truncated", "lost": "cannot read", "json": "damaged"}
    with pytest.raises(VitcliError, match=words.get(what, "newer")):
        load_data(str(out))


@pytest.mark.parametrize("value", [None, [], {}, "x", 1.5, True, -1, [5], [[1]], {"../x": 1}])
def test_a_description_of_the_wrong_type(photos, tmp_path, value):
    stored(photos, tmp_path / "s")
    file = tmp_path / "s/stored.json"
    described = unseal(json.loads(file.read_text()))  # as earlier versions wrote it
    for key in described:
        file.write_text(json.dumps({**described, key: value}))
        with suppress(VitcliError):  # a text is another valid source
            load_data(str(tmp_path / "s"))
    for text in (json.dumps(value), "[" * 100_000):
        file.write_text(text)
        with pytest.raises(VitcliError, match="is damaged"):
            load_data(str(tmp_path / "s"))


def test_what_is_stored_is_not_stored_again(photos, tmp_path):
    source, told = stored(photos, tmp_path / "s")
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "s").iterdir()}
    assert write_decoded(source, tmp_path / "s", side=48) == told
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "s").iterdir()} == before


def test_what_a_kill_after_the_last_write_leaves_is_removed(photos, tmp_path):
    out = tmp_path / "s"
    stored(photos, out)
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    for name in (".lock", "train.originals", PLAN, ".stored.json.0123456789ab.tmp"):
        (out / name).write_text("{}")
    stored(photos, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole


def test_two_processes_do_not_write_into_one_set(photos, tmp_path):
    source, _ = stored(photos, tmp_path / "s")
    (tmp_path / "s/stored.json").rename(tmp_path / "s/described.json")
    plan = json.loads((tmp_path / "s/described.json").read_text())
    plan = {key: value for key, value in unseal(plan).items() if key != "index"}
    (tmp_path / "s/storing.json").write_text(json.dumps(plan))
    with FileLock(tmp_path / "s/.lock"), pytest.raises(VitcliError, match="another process"):
        write_decoded(source, tmp_path / "s", side=48)
    write_decoded(source, tmp_path / "s", side=48)
    assert not (tmp_path / "s/.lock").exists()


def test_another_set_is_not_mixed_in(photos, tmp_path):
    source, _ = stored(photos, tmp_path / "s")
    with pytest.raises(VitcliError, match="holds another decoded dataset"):
        write_decoded(source, tmp_path / "s", side=32)
    (tmp_path / "s" / "stored.json").rename(tmp_path / "s" / "storing.json")
    with pytest.raises(VitcliError, match="holds an unfinished dataset"):
        write_decoded(source, tmp_path / "s", side=32)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(VitcliError, match="not empty"):
        write_decoded(source, tmp_path / "full", side=32)


def test_the_command_line_and_a_run_on_it(photos, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (photos / "train/a/broken.png").unlink()
    assert vitcli(["patchify", str(photos), "--image-size", "32", "--out", "set", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["stored_bytes"] > 1000
    run = ["pretrain", "set", "--recipe", "pretrain", "--steps", "1", "--batch-size", "4"]
    small = ["--set", "model.name=Pico/8", "--set", "model.image_size=32"]
    assert vitcli([*run, *small, "--out", "r"]) == 0
    assert vitcli(["fewshot", "set", "--model", "r", "--shots", "2"]) == 0
    assert "decoded from" in capfd.readouterr().err


def test_decoded_pixels_are_not_copied_into_memory(photos, tmp_path):
    source, _ = stored(photos, tmp_path / "s")
    images = load_data(str(tmp_path / "s")).splits["train"]
    original = source.splits["train"]
    for i in range(4):
        with images.open(i) as picture:
            assert picture.part((1, 2, 20, 30)).tobytes() == (
                images.read(i).crop((1, 2, 20, 30)).tobytes()
            )
        assert images.read(i).size == picture.size
    original.read(0)
    assert original.is_cached and not images.is_cached
    assert not original.decodes_each_epoch and not images.decodes_each_epoch


def test_the_pictures_are_views_of_the_file(photos, tmp_path):
    stored(photos, tmp_path / "s")
    images = load_data(str(tmp_path / "s")).splits["train"]
    picture = images.read(0)
    picture.putpixel((0, 0), (1, 2, 3))  # must not reach the file
    assert images.read(0).getpixel((0, 0)) != (1, 2, 3)
    assert read_image(images.content(1)).size == images.read(1).size

"""`patchify DATA --out FOLDER`: damage is noticed in a finished store, and mended before that."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from support.flipping import flips
from support.watching import Told

from vitcli.data import decoded_cache
from vitcli.data.decoded_cache import write_decoded
from vitcli.data.source import load_data
from vitcli.errors import VitcliError


def draw(path, seed):
    """An uncompressed picture: all have the same size in bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def killed(tmp_path, monkeypatch):
    """(the images, a store of them that was killed after 7 of 12 images)."""
    for number in range(12):
        draw(tmp_path / f"photos/train/{'ab'[number % 2]}/{number}.bmp", number)
    source = load_data(str(tmp_path / "photos"), whole=True, labelled=False)
    original, count = decoded_cache.PixelWriter.add, iter(range(100))

    def add(writer, *values):
        if next(count) == 7:
            raise KeyboardInterrupt
        original(writer, *values)

    with monkeypatch.context() as patch:
        patch.setattr(decoded_cache.PixelWriter, "add", add)
        with pytest.raises(KeyboardInterrupt):
            write_decoded(source, tmp_path / "part", side=6, workers=1)
    return source, tmp_path / "part"


def content(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


def test_an_original_that_was_edited_is_stored_again(killed, tmp_path):
    source, part = killed
    path = tmp_path / "photos/train/a/4.bmp"
    facts = path.stat()
    draw(path, 99)  # as many bytes, and the same time
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    told = Told()
    write_decoded(source, part, side=6, workers=1, watch=told)
    write_decoded(source, tmp_path / "whole", side=6, workers=1)
    assert content(part) == content(tmp_path / "whole")
    assert "original has changed" in told.warnings[0]


@pytest.mark.parametrize("name", ["train.pixels", "train.index", "train.originals"])
def test_each_flipped_bit_of_an_unfinished_store_is_made_again(killed, tmp_path, name):
    source, part = killed
    write_decoded(source, tmp_path / "whole", side=6, workers=1)
    expected = content(tmp_path / "whole")

    def check(position):
        shutil.copytree(part, tmp_path / "copy")
        told = Told()
        write_decoded(source, tmp_path / "copy", side=6, workers=1, watch=told)
        assert content(tmp_path / "copy") == expected, position
        # A last row that claims more pixels than there are looks like one that a kill has cut off.
        assert told.warnings or name == "train.index"
        shutil.rmtree(tmp_path / "copy")

    flips(part / name, check, places=17)


@pytest.fixture
def finished(tmp_path):
    """A finished store of 8 images with several labels each, in two splits."""
    rows = ["path,labels,split"]
    for number in range(8):
        draw(tmp_path / f"{number}.bmp", number)
        rows.append(f"{number}.bmp,{'a;b' if number % 3 else 'c'},{['train', 'test'][number % 2]}")
    (tmp_path / "x.csv").write_text("\n".join(rows) + "\n")
    write_decoded(load_data(str(tmp_path / "x.csv")), tmp_path / "s", side=6, workers=1)
    return tmp_path / "s"


def everything(folder):
    source = load_data(str(folder))
    splits = {
        name: (
            [images.read(i).tobytes() for i in range(len(images))],
            images.labels.tolist(),
            images.targets.tolist(),
        )
        for name, images in source.splits.items()
    }
    return source.classes, source.fingerprint, source.splitting, splits


NAMES = [
    f"{split}.{kind}" for split in ("train", "test") for kind in ("pixels", "index", "targets")
]


@pytest.mark.parametrize("name", ["stored.json", *NAMES])
def test_each_flipped_bit_of_a_finished_store_is_noticed(finished, name):
    assert {path.name for path in finished.iterdir()} == {"stored.json", *NAMES}
    expected, noticed = everything(finished), []

    def check(position):
        try:
            assert everything(finished) == expected, position
        except VitcliError as error:
            noticed.append(error)

    flips(finished / name, check)
    assert len(noticed) == 50 or name == "stored.json"  # in JSON, spaces mean nothing
    assert len(noticed) > 40


def test_a_store_of_an_earlier_version_has_fewer_checksums(finished):
    expected, file = everything(finished), finished / "stored.json"
    values = json.loads(file.read_text())
    del values["checksum"], values["targets"]
    file.write_text(json.dumps(values))
    assert everything(finished) == expected


def test_a_damaged_description_is_not_complete(finished, tmp_path):
    file = finished / "stored.json"
    file.write_text(file.read_text().replace("6", "7", 1))
    with pytest.raises(VitcliError, match=r"stored\.json` is damaged"):
        write_decoded(load_data(str(tmp_path / "x.csv")), finished, side=6, workers=1)

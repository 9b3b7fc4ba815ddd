"""Zip archives: the same dataset as the extracted folder, and nothing leaves the archive."""

import io
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from zipfile import ZIP_BZIP2, ZIP_DEFLATED, ZIP_STORED, ZipFile

import numpy as np
import pytest
from PIL import Image

from vitcli.data.source import load_data
from vitcli.decode import ImageError
from vitcli.errors import VitcliError


def png(level, size=(5, 4)):
    file = io.BytesIO()
    Image.new("L", size, level).save(file, "PNG")
    return file.getvalue()


PATHS = [
    "archive/train/cat/1.png", "archive/train/cat/sub/2.png", "archive/train/dog/1.png",
    "archive/test/dog/1.png", "archive/train/10.png", "archive/train/é/1.png",
]  # fmt: skip
EXTRA = ["__MACOSX/archive/train/cat/._1.png", "archive/.DS_Store", "archive/notes.txt"]


@pytest.fixture(params=[ZIP_STORED, ZIP_DEFLATED])
def archive(tmp_path, request):
    with ZipFile(tmp_path / "photos.zip", "w", request.param) as file:
        for number, path in enumerate([*reversed(PATHS), *EXTRA]):
            file.writestr(path, png(10 * number) if path.endswith("png") else b"x")
    return tmp_path / "photos.zip"


def contents(data):
    return {
        (split, images.label_name(i), images.file_name(i)): np.asarray(images.read(i)).tobytes()
        for split, images in data.splits.items()
        for i in range(len(images))
    }


def test_an_archive_is_the_folder_that_it_extracts_to(archive, tmp_path):
    with ZipFile(archive) as file:
        file.extractall(tmp_path / "photos")
    zipped, folder = load_data(str(archive)), load_data(str(tmp_path / "photos"))
    assert zipped.classes == folder.classes == ("cat", "dog", "é")
    assert zipped.layout == folder.layout
    assert contents(zipped) == contents(folder) and len(contents(zipped)) == 5
    assert zipped.fingerprint == folder.fingerprint
    for word in ("`.DS_Store`, `__MACOSX`", "1 .txt", "1 image outside class folders"):
        assert any(word in note for note in zipped.notes)


def test_images_are_read_by_threads_and_other_processes(archive):
    images = load_data(str(archive)).splits["train"]
    expected = [images.content(i) for i in range(4)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(images.content, [0, 1, 2, 3] * 50)) == expected * 50
    store = pickle.loads(pickle.dumps(images._store))
    assert [store.content(i) for i in range(4)] == expected


def test_paths_that_lead_outside(tmp_path):
    with ZipFile(tmp_path / "x.zip", "w") as file:
        for path in ("../../evil/1.png", "/etc/evil/1.png", "C:/evil/1.png", "a/../../b/1.png"):
            file.writestr(path, png(1))
        for path in ("a/1.png", "b\\1.png"):
            file.writestr(path, png(2))
    before = sorted(tmp_path.iterdir())
    data = load_data(str(tmp_path / "x.zip"), whole=True)
    assert data.classes == ("a", "b") and len(data.splits["train"]) == 2
    assert any("skipped paths that lead outside of it" in note for note in data.notes)
    assert sorted(tmp_path.iterdir()) == before


def test_damage_is_an_error_of_the_image(tmp_path):
    path = tmp_path / "x.zip"
    with ZipFile(path, "w", ZIP_STORED) as file:
        file.writestr("a/1.png", png(1))
        file.writestr("b/1.png", png(2))
    content = bytearray(path.read_bytes())
    content[60] ^= 255
    path.write_bytes(content)
    images = load_data(str(path), whole=True).splits["train"]
    with pytest.raises(ImageError, match="checksum is wrong") as caught:
        images.read(0)
    assert "x.zip:a/1.png" in str(caught.value)
    assert images.read(1).size == (5, 4)


def test_an_image_that_unpacks_to_more_than_it_says(tmp_path):
    path = tmp_path / "x.zip"
    with ZipFile(path, "w", ZIP_DEFLATED) as file:
        file.writestr("a/1.png", bytes(10_000_000))
        file.writestr("b/1.png", png(2))
    content = path.read_bytes()
    assert content.count((10_000_000).to_bytes(4, "little")) == 2
    path.write_bytes(
        content.replace((10_000_000).to_bytes(4, "little"), (100).to_bytes(4, "little"))
    )
    images = load_data(str(path), whole=True).splits["train"]
    with pytest.raises(ImageError, match="checksum"):
        images.read(0)


def test_archives_that_cannot_be_read(tmp_path):
    (tmp_path / "no.zip").write_bytes(b"PK\x03\x04 but no more")
    with pytest.raises(VitcliError, match="is not a zip archive, or it is damaged"):
        load_data(str(tmp_path / "no.zip"))
    with ZipFile(tmp_path / "bz.zip", "w", ZIP_BZIP2) as file:
        file.writestr("a/1.png", png(1))
    with pytest.raises(VitcliError, match="compressed by method 12"):
        load_data(str(tmp_path / "bz.zip"))
    with ZipFile(tmp_path / "empty.zip", "w"):
        pass
    with pytest.raises(VitcliError, match="has no images"):
        load_data(str(tmp_path / "empty.zip"))
    content = bytearray((tmp_path / "bz.zip").read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # the bit of encryption
    (tmp_path / "locked.zip").write_bytes(content)
    with pytest.raises(VitcliError, match="is encrypted"):
        load_data(str(tmp_path / "locked.zip"))


def test_a_zip_of_another_program(tmp_path):
    """A prefix before the archive and extra fields of members move the content."""
    code = "import sys, zipfile; zipfile.main(['-c', 'x.zip', 'photos'])"
    for name in ("photos/a/1.png", "photos/b/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(7))
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    (tmp_path / "y.zip").write_bytes(b"a prefix" + (tmp_path / "x.zip").read_bytes())
    for name in ("x.zip", "y.zip"):
        images = load_data(str(tmp_path / name), whole=True).splits["train"]
        assert [images.read(i, "L").getpixel((0, 0)) for i in range(2)] == [7, 7]

"""Which images a command line means, in which order, and how much is held of them."""

import io
import os
import sys
from pathlib import Path

import pytest

from vitcli.data import image_paths as listing
from vitcli.data.image_paths import ImagePaths, find_images, read_path_list
from vitcli.data.readers.folder import image_files, walk_images
from vitcli.decode import ImageError, read_image
from vitcli.errors import VitcliError


@pytest.fixture
def tree(here):
    for name in ("a/b/c.png", "a/b.png", "a/z.png", "a.b/c.jpg", "a.jpg", "ab.jpg", "Ä/é.png"):
        (here / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "p" / name).write_bytes(b"x")
    (here / "p/.hidden.png").write_bytes(b"x")
    (here / "p/notes.txt").write_text("x")
    return here / "p"


def test_folders_in_the_order_of_whole_paths(tree):
    odd = tree / os.fsdecode(b"a\xff")
    odd.mkdir()
    (odd / "1.png").write_bytes(b"x")
    found = list(walk_images(tree))
    below = [str(p.relative_to(tree)) for p in tree.rglob("*") if p.suffix in (".png", ".jpg")]
    assert found == sorted((p for p in below if ".hidden" not in p), key=os.fsencode)
    assert len(found) == 8
    assert image_files(tree)[1] == {".txt": 1}
    assert list(find_images(["p"])) == [f"p/{name}" for name in found]
    assert next(iter(find_images(["p/"]))) == f"p/{found[0]}"


def test_files_of_a_folder_that_are_no_images_by_name_are_told(tree):
    (tree / "a/photo").write_bytes(b"x")
    files = find_images(["p", "p/a.jpg", "p/ab*"])
    for _ in range(2):  # a second iteration, which counts in the background, adds nothing
        images = list(files)
    assert "p/a/photo" not in images
    assert list(files.skipped) == ["p"]
    assert (
        "p: skipped files that are not images: 1 .txt, 1 no suffix; `--from" in files.skipped["p"]
    )


def test_circles_are_walked_once_and_links_to_nowhere_listed(tree):
    (tree / "a/again").symlink_to("..")
    (tree / "gone.png").symlink_to("nowhere")
    found = list(walk_images(tree))
    assert len(found) == len(set(found)) == 8 and "gone.png" in found


def test_folders_are_not_listed_whole(tree, monkeypatch):
    scanned = []
    scandir = os.scandir
    monkeypatch.setattr(
        os, "scandir", lambda path: scanned.append(Path(path).name) or scandir(path)
    )
    paths = iter(find_images(["p"]))
    scanned.clear()
    assert next(paths) == "p/a.b/c.jpg" and scanned == ["p", "a.b"]
    assert sum(1 for _ in paths) == 6 and scanned == ["p", "a.b", "a", "b", "Ä"]


def test_a_folder_that_may_not_be_read_is_one_that_is_reported(tree, monkeypatch):
    scandir = os.scandir

    def closed(path):
        if Path(path).name == "a":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    monkeypatch.setattr(os, "access", lambda *_: False)
    found = list(find_images(["p"]))
    assert found == ["p/a.b/c.jpg", "p/a.jpg", "p/a/", "p/ab.jpg", "p/Ä/é.png"]
    with pytest.raises(ImageError, match="a folder without read permission"):
        read_image("p/a/")
    with pytest.raises(PermissionError):
        image_files(tree)  # a class that is not there would be no class


def test_totals():
    assert ImagePaths(["a.jpg", "no/b.jpg"]).total == 2
    assert ImagePaths(["."]).total is None and ImagePaths(["a.jpg"], "list").total is None


@pytest.mark.parametrize(
    ("content", "paths"),
    [
        (b"a.jpg\nb c.jpg \n\nd.jpg", ["a.jpg", "b c.jpg ", "d.jpg"]),
        (b"\xef\xbb\xbfa.jpg\r\nb.jpg\r\n", ["a.jpg", "b.jpg"]),
        (b"a\nb.jpg\0\xff.jpg\0", ["a\nb.jpg", os.fsdecode(b"\xff.jpg")]),
        (b"only.jpg", ["only.jpg"]),
        (b"\n\n", []),
        (b"", []),
    ],
)
def test_lists_of_paths(content, paths, monkeypatch):
    assert list(read_path_list(io.BytesIO(content))) == paths
    monkeypatch.setattr(listing, "READ_BYTES", 16)  # paths that lie across two reads
    assert list(read_path_list(io.BytesIO(content))) == paths


def test_a_list_is_read_as_it_comes():
    class Endless(io.RawIOBase):
        taken = 0

        def read1(self, size):
            self.taken += 1
            return b"x.jpg\n" * 100

    stream = Endless()
    paths = read_path_list(stream)
    assert [next(paths) for _ in range(150)] == ["x.jpg"] * 150
    assert stream.taken == 2


class Stdin:
    def __init__(self, content):
        self.buffer = io.BytesIO(content)


def test_a_list_in_a_file_and_on_stdin(tree, monkeypatch):
    Path("list").write_text("missing.jpg\np/ab.jpg\np/a\n")
    expected = ["p/a.jpg", "missing.jpg", "p/ab.jpg", "p/a/b.png", "p/a/b/c.png", "p/a/z.png"]
    found = find_images(["p/a.jpg"], "list")
    assert found.repeatable and list(found) == list(found) == expected
    monkeypatch.setattr(sys, "stdin", Stdin(Path("list").read_bytes()))
    found = find_images(["p/a.jpg"], "-")
    assert not found.repeatable and list(found) == expected


@pytest.mark.parametrize("source", ["list", "-"])
def test_lists_without_images(source, here, monkeypatch):
    for content, message in (
        ("\n", "lists no images"),
        ("x.jpg\ny.jpg\n", "no such image: `x.jpg`"),
    ):
        Path("list").write_text(content)
        monkeypatch.setattr(sys, "stdin", Stdin(content.encode()))
        with pytest.raises(VitcliError, match=message):
            find_images([], source)


def test_no_list_there(here):
    with pytest.raises(VitcliError, match="cannot read the list `no`"):
        find_images([], "no")
    with pytest.raises(VitcliError, match=r"cannot read the list `\.`"):
        find_images([], ".")


def test_many_missing_ones_do_not_keep_the_rest_waiting(here, monkeypatch):
    monkeypatch.setattr(listing, "MAX_MISSING", 3)
    names = [f"{i}.jpg" for i in range(5)]
    monkeypatch.setattr(sys, "stdin", Stdin("\n".join(names).encode()))
    assert list(find_images([], "-")) == names

"""A folder of class folders, with or without `train/` and `test/` above them."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from vitcli.data.image_set import FileStore, ImageSet, Request, Source
from vitcli.data.labels import make_source
from vitcli.data.splits import SPLITS, WORDS, in_split_order
from vitcli.errors import VitcliError, printable
from vitcli.progress import Bar, Watcher

# fmt: off
IMAGE_SUFFIXES = frozenset({
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".ico", ".j2k", ".jfif", ".jp2",
    ".jpe", ".jpeg", ".jpg", ".jpx", ".mpo", ".pbm", ".pcx", ".pgm", ".png", ".pnm", ".ppm",
    ".qoi", ".tga", ".tif", ".tiff", ".webp",
})
# fmt: on
BAR_IMAGES = 1000  # a bar that moves with every file would take longer than reading its size
NOT_CLASSES = frozenset({"__macosx", "__pycache__"})
TRAIN = frozenset(name for name, split in WORDS.items() if split == "train")


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for a picture: by its ending, and not hidden."""
    return not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES


def image_files(folder: Path) -> tuple[list[str], Counter[str]]:
    """Paths of all pictures below `folder`, as `walk_images` finds them; the endings left out."""
    other: Counter[str] = Counter()
    return list(walk_images(folder, other)), other


def walk_images(
    folder: Path, other: Counter[str] | None = None, *, strict: bool = True
) -> Iterator[str]:
    """Paths of all pictures below `folder`, relative to it, in the order of their bytes.

    No more is held than the names of one folder and of those above it. Hidden files are passed
    over. Links are followed, a circle of them once; a link that leads nowhere is listed, so that
    reading it is reported.

    Args:
        other: counts the endings of files that are no pictures.
        strict: raise where a folder may not be looked into; else it is listed itself.

    Raises:
        OSError: a folder cannot be read.
    """
    seen: set[tuple[int, int]] = set()
    ahead = [iter([""])]  # of each open folder what is still to come
    while ahead:
        path = next(ahead[-1], None)
        if path is None:
            ahead.pop()
        elif path and not path.endswith("/"):
            yield path
        else:
            try:
                ahead.append(iter(_entries(folder, path, seen, other)))
            except PermissionError:
                if strict:
                    raise
                yield path


def _entries(
    folder: Path, inner: str, seen: set[tuple[int, int]], other: Counter[str] | None
) -> list[str]:
    """What is to be looked at in `folder/inner`, sorted; folders end with a slash.

    The slash takes part in the order, so that walking them one after another gives whole paths in
    the order of their bytes.
    """
    state = (folder / inner).stat()
    if (state.st_dev, state.st_ino) in seen:
        return []
    seen.add((state.st_dev, state.st_ino))
    found: list[str] = []
    with os.scandir(folder / inner) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name.lower() in NOT_CLASSES:
                continue
            if entry.is_dir():
                found.append(f"{inner}{entry.name}/")
            elif is_image_name(entry.name):
                found.append(inner + entry.name)
            elif other is not None:
                other[Path(entry.name).suffix.lower() or "no ending"] += 1
    return sorted(found, key=os.fsencode)


def load_folder(request: Request) -> Source:
    """`photos/CLASS/*`, or `photos/train/CLASS/*` and `photos/test/CLASS/*`.

    Every sub-folder is a class, sorted by name; pictures may lie deeper inside it.

    Raises:
        VitcliError: no pictures, no class folders, one class only.
    """
    root = request.path
    notes: list[str] = []
    splits: dict[str, ImageSet] = {}
    parts: list[Iterable[bytes]] = []
    for split, folder in _split_folders(root, notes).items():
        with request.watch.progress(f"{printable(folder)}, images found") as bar:
            classes, paths, labels = _read_classes(folder, root, notes, request.labelled, bar)
        if paths:
            store = FileStore(folder, paths)
            splits[split] = ImageSet(split, classes, np.array(labels, dtype=np.int64), store)
            parts += [
                _marks(split, folder, store, request.watch),
                (name.encode() for name in classes),
            ]
    if not splits:
        raise VitcliError(
            f"`{request.shown}` has no images",
            "expected are `CLASS/*.jpg`, or `train/CLASS/*.jpg` and `test/CLASS/*.jpg`; other "
            "formats: " + ", ".join(sorted(s[1:] for s in IMAGE_SUFFIXES)),
        )
    return make_source(request, splits, chain.from_iterable(parts), notes)


def _marks(split: str, folder: Path, store: FileStore, watch: Watcher) -> Iterator[bytes]:
    """What tells the files of a split from others: names and sizes."""
    with watch.progress(f"{printable(folder)}, sizes", len(store)) as bar:
        for row in range(len(store)):
            path = store.paths[row]
            yield f"{split}/".encode() + path + _size(folder, path)
            if (row + 1) % BAR_IMAGES == 0:
                bar.advance(BAR_IMAGES)


def _split_folders(root: Path, notes: list[str]) -> dict[str, Path]:
    """Split name -> its folder; the root itself is "train" where there are no splits."""
    folders = _visible_folders(root)
    splits: dict[str, Path] = {}
    for folder in sorted(folders, key=lambda folder: folder.name.lower() not in SPLITS):
        split = WORDS.get(folder.name.lower())
        if split is not None:
            splits.setdefault(split, folder)
    named = set(splits.values())
    others = [folder for folder in folders if folder not in named]
    if not splits or ("train" not in splits and others):
        return {"train": root}
    # Beside `car` and `bus` a `train` of pictures is a class of vehicles.
    if others and not any(map(_visible_folders, splits.values())):
        return {"train": root}
    if others:
        names = ", ".join(f"`{printable(folder.name)}`" for folder in others)
        notes.append(f"{printable(root)}: {names} beside `train` left out")
    return in_split_order(splits)


def _visible_folders(root: Path) -> list[Path]:
    """Sub-folders that count, sorted by name."""
    with os.scandir(root) as entries:
        names = [e.name for e in entries if e.is_dir() and not e.name.startswith(".")]
    return [root / name for name in sorted(names) if name.lower() not in NOT_CLASSES]


def _read_classes(
    folder: Path, root: Path, notes: list[str], labelled: bool, bar: Bar
) -> tuple[list[str], list[bytes], list[int]]:
    """(class names, paths relative to `folder`, labels)."""
    classes: list[str] = []
    paths: list[bytes] = []
    labels: list[int] = []
    other: Counter[str] = Counter()
    shown = printable(folder)
    for sub in _visible_folders(folder):
        found, odd = image_files(sub)
        other += odd
        bar.advance(len(found))
        if not found:
            notes.append(f"{shown}: `{printable(sub.name)}` has no images and is no class")
            continue
        labels += [len(classes)] * len(found)
        classes.append(_class_name(sub.name))
        paths += [os.fsencode(f"{sub.name}/{path}") for path in found]
    with os.scandir(folder) as entries:
        loose = sorted(e.name for e in entries if is_image_name(e.name) and not e.is_dir())
    if loose and not labelled:
        classes.append("")
        labels += [len(classes) - 1] * len(loose)
        paths += [os.fsencode(name) for name in loose]
    elif loose and not classes and (folder == root or folder.name.lower() in TRAIN):
        raise VitcliError(
            f"`{shown}` has {len(loose):,} images but no class folders",
            "put the images of each class into a folder named after it, or give a CSV file with "
            "the columns `path` and `label`",
        )
    elif loose:
        notes.append(f"{shown}: {len(loose):,} images outside of class folders left out")
    if other:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(other.items()))
        notes.append(f"{shown}: files that are no images left out: {kinds}")
    return classes, paths, labels


def _class_name(name: str) -> str:
    """A folder's name as text that can be stored: bytes that are not UTF-8 are escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _size(folder: Path, path: bytes) -> bytes:
    try:
        return (folder / os.fsdecode(path)).stat().st_size.to_bytes(8, "little")
    except OSError:  # a link to nothing
        return b"?"


def files_set(files: Sequence[str]) -> ImageSet:
    """The files as a set; the class of each is the name of the folder it lies in."""
    folders = [Path(file).parent.name for file in files]
    classes = sorted(set(folders))
    labels = np.array([classes.index(name) for name in folders], dtype=np.int64)
    return ImageSet("images", classes, labels, FileStore(Path(), map(os.fsencode, files)))

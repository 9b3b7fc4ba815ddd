"""Image folders: one subfolder per class, with or without `train/` and `test/` above them."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from vitcli.data.image_set import FileStore, ImageSet
from vitcli.data.source import DataRequest, Source, make_source
from vitcli.data.splits import in_split_order
from vitcli.decode import IMAGE_SUFFIXES
from vitcli.errors import VitcliError, printable
from vitcli.hub.datasets import SPLIT_ALIASES, SPLITS
from vitcli.progress import Bar, Watcher

BAR_IMAGES = 1000  # to move the bar for every file would take longer than to read the file's size
NOT_CLASSES = frozenset({"__macosx", "__pycache__"})
TRAIN_FOLDERS = frozenset(name for name, split in SPLIT_ALIASES.items() if split == "train")


def is_image_name(name: str) -> bool:
    """True for a file name with an image suffix that does not start with a dot."""
    return not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES


def image_files(folder: Path) -> tuple[list[str], Counter[str]]:
    """(paths of all images below `folder` as from `walk_images`, suffix counts of other files)."""
    other: Counter[str] = Counter()
    return list(walk_images(folder, other)), other


def walk_images(
    folder: Path, other: Counter[str] | None = None, *, strict: bool = True
) -> Iterator[str]:
    """The paths of all images below `folder`, relative to it, sorted by their bytes.

    Hidden files are skipped. Links are followed, a cycle of them once. A dangling link is listed,
    so that its reader reports it. Memory holds only the names of the open folders.

    Args:
        other: counts the suffixes of files that are not images.
        strict: raise if a folder may not be read; otherwise its path is listed.

    Raises:
        OSError: a folder cannot be read.
    """
    seen: set[tuple[int, int]] = set()
    open_folders = [iter([""])]  # for each open folder, its remaining entries
    while open_folders:
        path = next(open_folders[-1], None)
        if path is None:
            open_folders.pop()
        elif path and not path.endswith("/"):
            yield path
        else:
            try:
                open_folders.append(iter(_entries(folder, path, seen, other)))
            except PermissionError:
                if strict:
                    raise
                yield path


def _entries(
    folder: Path, inner: str, seen: set[tuple[int, int]], other: Counter[str] | None
) -> list[str]:
    """The images and folders in `folder/inner`, sorted; a folder ends with a slash.

    The slash takes part in the sorting, so that a walk yields whole paths sorted by their bytes.
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
                other[Path(entry.name).suffix.lower() or "no suffix"] += 1
    return sorted(found, key=os.fsencode)


def load_folder(request: DataRequest) -> Source:
    """`photos/CLASS/*`, or `photos/train/CLASS/*` and `photos/test/CLASS/*`.

    Each subfolder is a class, sorted by name; images may be in subfolders of it.

    Raises:
        VitcliError: no images, no class folders, or only one class.
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
            names = (name.encode() for name in classes)
            parts += [_names_and_sizes(split, folder, store, request.watch), names]
    if not splits:
        suffixes = ", ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
        raise VitcliError(
            f"`{request.shown}` has no images",
            "expected `CLASS/*.jpg`, or `train/CLASS/*.jpg` and `test/CLASS/*.jpg`; image formats: "
            + suffixes,
        )
    return make_source(request, splits, chain.from_iterable(parts), notes)


def image_list(files: Sequence[str]) -> ImageSet:
    """Image files as a set; the class of each is the name of its folder."""
    folders = [Path(file).parent.name for file in files]
    classes = sorted(set(folders))
    labels = np.array([classes.index(name) for name in folders], dtype=np.int64)
    return ImageSet("images", classes, labels, FileStore(Path(), map(os.fsencode, files)))


def _names_and_sizes(split: str, folder: Path, store: FileStore, watch: Watcher) -> Iterator[bytes]:
    """The part of the fingerprint for the files of a split."""
    with watch.progress(f"{printable(folder)}, sizes", len(store)) as bar:
        for row in range(len(store)):
            path = store.paths[row]
            yield f"{split}/".encode() + path + _size(folder, path)
            if (row + 1) % BAR_IMAGES == 0:
                bar.advance(BAR_IMAGES)


def _split_folders(root: Path, notes: list[str]) -> dict[str, Path]:
    """Split -> folder; `root` itself is "train" if it has no split folders."""
    folders = _visible_folders(root)
    splits: dict[str, Path] = {}
    for folder in sorted(folders, key=lambda folder: folder.name.lower() not in SPLITS):
        split = SPLIT_ALIASES.get(folder.name.lower())
        if split is not None:
            splits.setdefault(split, folder)
    split_folders = set(splits.values())
    others = [folder for folder in folders if folder not in split_folders]
    if not splits or ("train" not in splits and others):
        return {"train": root}
    # `train/` that holds images only, beside `car/` and `bus/`, is a class of vehicles.
    if others and not any(map(_visible_folders, splits.values())):
        return {"train": root}
    if others:
        names = ", ".join(f"`{printable(folder.name)}`" for folder in others)
        notes.append(f"{printable(root)}: skipped folders that are not splits: {names}")
    return in_split_order(splits)


def _visible_folders(root: Path) -> list[Path]:
    """The subfolders that can be classes or splits, sorted by name."""
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
        found, not_images = image_files(sub)
        other += not_images
        bar.advance(len(found))
        if not found:
            notes.append(f"{shown}: skipped `{printable(sub.name)}`, a folder without images")
            continue
        labels += [len(classes)] * len(found)
        # Bytes of the name that are not UTF-8 are escaped, because a recipe cannot store them.
        classes.append(os.fsencode(sub.name).decode("utf-8", "backslashreplace"))
        paths += [os.fsencode(f"{sub.name}/{path}") for path in found]
    with os.scandir(folder) as entries:
        loose = sorted(e.name for e in entries if is_image_name(e.name) and not e.is_dir())
    if loose and not labelled:
        classes.append("")
        labels += [len(classes) - 1] * len(loose)
        paths += [os.fsencode(name) for name in loose]
    elif loose and not classes and (folder == root or folder.name.lower() in TRAIN_FOLDERS):
        raise VitcliError(
            f"`{shown}` has {len(loose):,} images but no class folders",
            "put the images of each class into a folder with its name, or give a CSV file with "
            "the columns `path` and `label`",
        )
    elif loose:
        notes.append(f"{shown}: skipped {len(loose):,} images outside class folders")
    if other:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(other.items()))
        notes.append(f"{shown}: skipped files that are not images: {counts}")
    return classes, paths, labels


def _size(folder: Path, path: bytes) -> bytes:
    try:
        return (folder / os.fsdecode(path)).stat().st_size.to_bytes(8, "little")
    except OSError:  # a dangling link
        return b"?"

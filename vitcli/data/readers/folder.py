"""Image folders: class folders, with or without folders for splits, or with a table of labels."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from vitcli.data.folder_tree import is_numbered_parts, named, tree_of
from vitcli.data.image_set import FileStore, ImageSet, ImageStore
from vitcli.data.labels import sorted_classes
from vitcli.data.layout import Layout, read_layout
from vitcli.data.readers.folder_tables import TABLE_SUFFIXES, read_folder_tables
from vitcli.data.readers.split_lists import LIST_SUFFIXES, label_splits, unused_lists
from vitcli.data.source import DataRequest, Source, make_source
from vitcli.data.splits import split_of
from vitcli.decode import IMAGE_SUFFIXES
from vitcli.dicom import can_read_dicom, is_dicom_file
from vitcli.errors import VitcliError, counted, printable
from vitcli.hub.datasets import LABEL_TABLES

# fmt: off
# Folders and files that operating systems, network storage and Python write beside images.
# Names that start with a dot are skipped too.
SYSTEM_NAMES = frozenset({
    "$recycle.bin", "#recycle", "#snapshot", "@eadir", "@recently-snapshot", "@recycle", "@tmp",
    "__macosx", "__pycache__", "desktop.ini", "ehthumbs.db", "found.000", "icon\r", "lost+found",
    "network trash folder", "recycler", "system volume information", "temporary items", "thumbs.db",
})
# fmt: on
NO_LABEL = "no_label"  # the folder of CVAT's "ImageNet" format for images without a label
# A folder with one of these files is an output of a command, or a virtual environment of Python.
OUTPUT_FILES = frozenset(
    {
        "recipe.toml",
        "stored.json",
        "storing.json",
        "inspect.json",
        "confusion.csv",
        "lr.json",
        "pyvenv.cfg",
    }
)  # fmt: skip
RUNS = "runs"
MAX_LISTED = 10_000
BAR_IMAGES = 1000  # to move the bar for every file would take longer than to read the file's size


def is_image_name(name: str) -> bool:
    """True for a file name with an image suffix that does not start with a dot."""
    return not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES


def is_system_name(name: str) -> bool:
    """True for a file or folder that is not part of a dataset, such as `.git` and `Thumbs.db`."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


@dataclass
class WalkReport:
    """What a walk left out.

    Attributes:
        other: suffix -> files that are not images.
        system: name -> system folders and hidden files.
        outputs: folders that commands wrote.
        empty: folders without entries that are used.
        loops: links to a folder that holds them, and links to themselves.
        tables: files that may be tables of labels.
        without_suffix: DICOM files without an image suffix, which are images.
        dicom: True if there are `.dcm` files.
        lists: the first text files and the like, which can be lists of splits or labels.
        outside: members of an archive whose path leads outside of it.
    """

    other: Counter[str] = field(default_factory=Counter)
    system: Counter[str] = field(default_factory=Counter)
    outputs: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    loops: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    lists: list[str] = field(default_factory=list)
    without_suffix: int = 0
    dicom: bool = False

    def add_system(self, name: str) -> None:
        self.system["._*" if name.startswith("._") else name] += 1

    def add_other(self, path: str) -> None:
        suffix = Path(path).suffix.lower()
        if suffix in TABLE_SUFFIXES:
            self.tables.append(path)
        if suffix in LIST_SUFFIXES and len(self.lists) < MAX_LISTED:
            self.lists.append(path)
        if path.rpartition("/")[2].lower() not in LABEL_TABLES:
            self.other[suffix or "no suffix"] += 1

    def notes(self, shown: str) -> list[str]:
        """A line for each kind."""
        found = []
        if self.system:
            counts = [f"{name} ({n:,})" if n > 1 else name for name, n in self.system.items()]
            found.append(
                f"{shown}: skipped system folders and hidden files: {named(sorted(counts))}"
            )
        if len(self.empty) == 1:
            name = printable(self.empty[0].rstrip("/"))
            found.append(f"{shown}: skipped `{name}`, a folder without images")
        elif self.empty:
            names = [path.rstrip("/") for path in self.empty]
            found.append(f"{shown}: skipped folders without images: {named(names)}")
        if self.outputs:
            found.append(f"{shown}: skipped folders that are not data: {named(self.outputs)}")
        if self.outside:
            found.append(f"{shown}: skipped paths that lead outside of it: {named(self.outside)}")
        if self.loops:
            found.append(f"{shown}: skipped links to a folder above them: {named(self.loops)}")
        if self.other:
            found.append(self.describe_other(shown))
        if self.without_suffix:
            files = "file" if self.without_suffix == 1 else "files"
            found.append(f"{shown}: {self.without_suffix:,} {files} without an image suffix: DICOM")
        if (self.without_suffix or self.dicom) and not can_read_dicom():
            found.append(f"{shown}: DICOM images need pydicom: `pip install 'vitcli[medical]'`")
        return found

    def describe_other(self, shown: str) -> str:
        """A line about the files that are not images, by their suffixes."""
        counts = [f"{count} {suffix}" for suffix, count in sorted(self.other.items())]
        return f"{shown}: skipped files that are not images: {', '.join(counts)}"


def image_files(folder: Path) -> tuple[list[str], Counter[str]]:
    """(paths of all images below `folder` as from `walk_images`, suffix counts of other files)."""
    report = WalkReport()
    return list(walk_images(folder, report)), report.other


def walk_images(
    folder: Path, report: WalkReport | None = None, *, strict: bool = True
) -> Iterator[str]:
    """The paths of all images below `folder`, relative to it, sorted by their bytes.

    System folders, hidden files and outputs of commands are skipped. Links are followed, except to
    a folder above them. A dangling link is listed, so that its reader reports it. Memory holds only
    the names of the open folders.

    Args:
        report: receives what is left out.
        strict: raise if a folder may not be read; otherwise its path is listed.

    Raises:
        OSError: a folder cannot be read.
    """
    report = report or WalkReport()
    outer = set()
    for parent in folder.resolve().parents:
        with suppress(OSError):  # a folder above that may not be entered
            outer.add(_identity(parent))
    above: list[tuple[int, int]] = []  # of each open folder
    open_folders = [iter([""])]  # for each open folder, its remaining entries
    while open_folders:
        path = next(open_folders[-1], None)
        if path is None:
            open_folders.pop()
            del above[-1:]
        elif path and not path.endswith("/"):
            yield path
        else:
            try:
                identity = _identity(folder / path)
                if identity in above or identity in outer:
                    report.loops.append(path)
                    continue
                open_folders.append(iter(_entries(folder, path, report)))
                above.append(identity)
            except PermissionError:
                if strict:
                    raise
                yield path


def _identity(folder: Path) -> tuple[int, int]:
    """Device and inode: the same for a folder and for a link to it."""
    state = folder.stat()
    return state.st_dev, state.st_ino


def _entries(folder: Path, inner: str, report: WalkReport) -> list[str]:
    """The images and folders in `folder/inner`, sorted; a folder ends with a slash.

    The slash takes part in the sorting, so that a walk yields whole paths sorted by their bytes.
    """
    found: list[str] = []
    with os.scandir(folder / inner) as scan:
        entries = list(scan)
    if inner and _is_output(folder / inner, {entry.name for entry in entries}):
        report.outputs.append(inner)
        return []
    for entry in entries:
        if is_system_name(entry.name):
            report.add_system(entry.name)
        elif _is_folder(entry):
            found.append(f"{inner}{entry.name}/")
        elif is_image_name(entry.name):
            found.append(inner + entry.name)
            report.dicom |= entry.name.lower().endswith(".dcm")
        elif _is_regular(entry) and is_dicom_file(entry.path):
            found.append(inner + entry.name)
            report.without_suffix += 1
        else:
            report.add_other(inner + entry.name)
    if inner and not found:
        report.empty.append(inner)
    return sorted(found, key=os.fsencode)


def _is_output(folder: Path, names: set[str]) -> bool:
    if folder.name != RUNS:
        return bool(names & OUTPUT_FILES)
    return any((folder / name / file).is_file() for name in names for file in OUTPUT_FILES)


def _is_regular(entry: "os.DirEntry[str]") -> bool:
    """False for a pipe, which would wait for a writer, and for a link that leads nowhere."""
    try:
        return entry.is_file()
    except OSError:
        return False


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def load_folder(request: DataRequest) -> Source:
    """`photos/CLASS/*`, or `photos/train/CLASS/*` and `photos/test/CLASS/*`; see `layout`.

    Classes are sorted by name, or by number if all names are numbers. A table of `LABEL_TABLES`
    gives the labels of images without class folders, for the folder or for each split.

    Raises:
        VitcliError: no images, no class folders, or only one class.
    """
    root = request.path
    report = WalkReport()
    with request.watch.progress(f"{request.shown}, images found") as bar:
        paths = _counted(walk_images(root, report), bar.advance)
        tree = tree_of(root.resolve().name, paths)
    layout = read_layout(tree, request.shown, request.settings.class_level)
    notes = [*report.notes(request.shown), *layout.notes]
    label_splits(root, request.shown, layout, report.lists, notes)
    from_table = read_folder_tables(request, tree, report.tables, layout, notes)
    if from_table is not None:
        skipped = report.notes(request.shown)
        return from_table.adjusted(lambda found: replace(found, notes=(*skipped, *found.notes)))

    notes += unused_lists(request.shown, layout, report.lists)

    def store_of(base: str, paths: Sequence[str]) -> FileStore:
        return FileStore(root / base, (os.fsencode(path) for path in paths))

    def sizes(split: str, base: str, paths: Sequence[str]) -> Iterator[bytes]:
        folder = root / base
        with request.watch.progress(f"{printable(folder)}, sizes", len(paths)) as bar:
            for path in _counted(paths, bar.advance):
                yield f"{split}/".encode() + os.fsencode(path) + _size(folder / path)

    try:
        return source_of_layout(request, layout, notes, store_of, sizes, report.tables)
    except VitcliError as error:
        # Folders of patients, as in CheXpert, are no classes: another split has other patients.
        tables = [path for path in report.tables if "/" not in path and split_of(Path(path))]
        if len(layout.splits) < 2 or not tables:
            raise
        given = ",".join(printable(root / path) for path in sorted(tables))
        hint = f"if tables hold the labels, give them: `{given}`"
        raise VitcliError(error.message, hint) from None


def source_of_layout(
    request: DataRequest,
    layout: Layout,
    notes: Sequence[str],
    store_of: Callable[[str, Sequence[str]], ImageStore],
    parts_of: Callable[[str, str, Sequence[str]], Iterable[bytes]],
    tables: Sequence[str] = (),
) -> Source:
    """The images of a layout.

    Args:
        notes: messages for the user.
        store_of: (base folder, paths below it) -> the images.
        parts_of: (split, base folder, paths below it) -> content of the fingerprint.
        tables: files that may hold labels, for the error about images without class folders.

    Raises:
        VitcliError: no images, no class folders, or only one class.
    """
    notes = list(notes)
    splits: dict[str, ImageSet] = {}
    parts: list[Iterable[bytes]] = []
    usable = any(images.classes for images in layout.splits.values())
    for split, images in layout.splits.items():
        shown = printable(request.path / images.base)
        classes = dict(images.classes)
        if images.loose and not request.labelled:
            classes[""] = images.loose
        elif images.loose and (not usable or (split == "train" and not classes)):
            raise VitcliError(
                f"`{shown}` has {counted(len(images.loose), 'image', 'images')} but no class "
                "folders",
                _no_classes_hint(request, tables),
            )
        elif tables and is_numbered_parts(list(classes)):
            raise VitcliError(
                f"the folders of `{shown}` are numbered parts, such as `{next(iter(classes))}`, "
                "not classes",
                _no_classes_hint(request, tables),
            )
        elif images.loose:
            skipped = counted(len(images.loose), "image", "images")
            notes.append(f"{shown}: skipped {skipped} outside class folders")
        paths = [path.removeprefix(images.base) for found in classes.values() for path in found]
        if not paths:
            continue
        names = list(classes)
        notes += [
            f"{shown}: `{name}` is read as a class; annotation tools such as CVAT put images "
            "without a label there: move it out of the folder to leave them out"
            for name in names
            if name.casefold() == NO_LABEL
        ]
        labels = np.repeat(np.arange(len(names)), [len(found) for found in classes.values()])
        splits[split] = ImageSet(split, names, labels, store_of(images.base, paths))
        parts += [parts_of(split, images.base, paths), [name.encode() for name in names]]
    if not splits:
        suffixes = ", ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
        left = "".join(f"{note.removeprefix(f'{request.shown}: ')}; " for note in notes)
        raise VitcliError(
            f"`{request.shown}` has no images",
            f"{left}expected `CLASS/*.jpg`, or `train/CLASS/*.jpg` and `test/CLASS/*.jpg`; image "
            f"formats: {suffixes}",
        )
    source = make_source(request, splits, chain.from_iterable(parts), notes)
    return source.adjusted(partial(replace, layout=layout.rule))


def _no_classes_hint(request: DataRequest, tables: Sequence[str]) -> str:
    if tables:
        table = printable(request.path / tables[0])
        return f"if `{table}` holds the labels, give that file instead of the folder"
    return (
        "put the images of each class into a folder with its name, or give a CSV file with "
        "the columns `path` and `label`"
    )


def image_list(files: Sequence[str]) -> ImageSet:
    """Image files as a set; the class of each is the name of its folder."""
    folders = [Path(file).parent.name for file in files]
    classes = sorted_classes(set(folders))
    labels = np.array([classes.index(name) for name in folders], dtype=np.int64)
    return ImageSet("images", classes, labels, FileStore(Path(), map(os.fsencode, files)))


def _counted(paths: Iterable[str], advance: Callable[[int], None]) -> Iterator[str]:
    """The same paths; moves a bar."""
    for number, path in enumerate(paths, 1):
        yield path
        if number % BAR_IMAGES == 0:
            advance(BAR_IMAGES)


def _size(file: Path) -> bytes:
    try:
        return file.stat().st_size.to_bytes(8, "little")
    except OSError:  # a dangling link
        return b"?"

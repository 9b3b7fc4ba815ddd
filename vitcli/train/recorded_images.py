"""The images that a run started with: `images.tsv`, and the comparison before a resume."""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitcli.data.batch import targets_of
from vitcli.data.image_set import ImageSet
from vitcli.data.source import Source, fingerprint
from vitcli.data.split_record import MAX_IMAGES, SplitRecord, image_keys
from vitcli.errors import VitcliError, counted, printable, quoted
from vitcli.progress import Watcher
from vitcli.run import Run

ROWS_FILE = "images.tsv"  # in a run directory: one line per image
NUM_EXAMPLES = 3


@dataclass(frozen=True)
class ImageRow:
    """One image of a dataset, as a line of `images.tsv` has it."""

    split: str
    label: str
    content: str
    path: str


@dataclass(frozen=True)
class RecordedImages:
    """All images of a dataset in their order.

    Attributes:
        content: a hash of the ordered images, labels and splits. It does not depend on names, so a
            run continues with equal bits exactly when it is equal.
    """

    rows: tuple[ImageRow, ...]
    content: str
    record: SplitRecord


def record_images(source: Source, watch: Watcher) -> RecordedImages | None:
    """Read every image of `source` once.

    None for streams, generated images and sets of more than `MAX_IMAGES` images.
    """
    sets = dict(source.splits)
    if not all(isinstance(images, ImageSet) for images in sets.values()):
        return None
    total = sum(map(len, sets.values()))
    if total > MAX_IMAGES:
        return None
    rows: list[ImageRow] = []
    root = _common_root(list(sets.values()))
    # Class names are part of the hash, because an output of the model is a position in this list.
    parts, keys = [repr(source.classes).encode()], {}
    with watch.progress("images recorded", total) as bar:
        for name, images in sets.items():
            keys[name] = image_keys(images)
            bar.advance(len(images))
            labels = targets_of(images, np.arange(len(images)))
            parts += [name.encode(), labels.tobytes(), keys[name]["content"].tobytes()]
            rows += [
                ImageRow(name, images.label_name(i), f"{key:016x}", _shown_path(images, i, root))
                for i, key in enumerate(keys[name]["content"].tolist())
            ]
    return RecordedImages(tuple(rows), fingerprint(parts), SplitRecord(keys))


def _common_root(sets: list[ImageSet]) -> str:
    """The folder of all image files: that of `train/` and `test/`, or of the class folders."""
    roots = {os.fspath(images.root) for images in sets if images.root is not None}
    try:
        return os.path.commonpath(roots)
    except ValueError:  # no files, or relative and absolute paths
        return ""


def _shown_path(images: ImageSet, index: int, root: str) -> str:
    """The path below `root`, or the number of an image without a file."""
    if images.root is None:
        return f"row {images.rows[index]}"
    path = images.root / os.fsdecode(images.path_name(index))
    return printable(os.path.relpath(path, root) if root else path)


def rows_text(rows: tuple[ImageRow, ...]) -> str:
    """The content of `images.tsv`."""
    lines = ["split\tclass\tcontent\tpath"]
    for row in rows:
        cells = (row.split, row.label, row.content, row.path)
        lines.append("\t".join(cell.replace("\t", " ").replace("\n", " ") for cell in cells))
    return "\n".join(lines) + "\n"


def read_rows(file: Path) -> tuple[ImageRow, ...]:
    """The rows of `images.tsv`; none if there is no such file."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")[1:-1]
        return tuple(ImageRow(*line.split("\t")) for line in lines)
    except (OSError, TypeError, UnicodeDecodeError):
        return ()


def describe_changes(before: tuple[ImageRow, ...], now: tuple[ImageRow, ...]) -> list[str]:
    """What is different, such as "2 images added (`cat/9.png`, `cat/10.png`)"; empty if unknown."""
    old, new = ({row.path: row for row in rows} for rows in (before, now))
    lost, gained = [p for p in old if p not in new], [p for p in new if p not in old]
    # A path that is gone and a new path with the same content are one renamed image. Copies share
    # their content, so each lost path pairs with one new path only.
    contents = Counter(old[path].content for path in lost)
    renamed = []
    for path in gained:
        if contents[new[path].content]:
            contents[new[path].content] -= 1
            renamed.append(path)
    found_again = set(renamed)
    moved = Counter(new[path].content for path in renamed)
    removed = []
    for path in lost:
        if moved[old[path].content]:
            moved[old[path].content] -= 1
        else:
            removed.append(path)
    kept = [path for path in new if path in old]
    kinds = {
        "added": [path for path in gained if path not in found_again],
        "removed": removed,
        "renamed or moved to another class": renamed,
        "edited or exchanged": [p for p in kept if old[p].content != new[p].content],
        "relabelled": [p for p in kept if old[p].label != new[p].label],
    }
    # Any change above can move other images between the splits, so alone it is worth a line.
    if not any(kinds.values()):
        kinds["in another split"] = [p for p in kept if old[p].split != new[p].split]
    return [
        f"{counted(len(paths), 'image', 'images')} {kind} ({quoted(paths, NUM_EXAMPLES)})"
        for kind, paths in kinds.items()
        if paths
    ]


def check_same_data(run: Run, source: Source, images: RecordedImages | None) -> None:
    """Check that a run continues with the images, labels and splits that it started with.

    Raises:
        VitcliError: they have changed; images that were held out might be trained on.
    """
    known = run.provenance().get("data", {})
    changes: list[str] = []
    if images is not None and known.get("content"):
        # Names are not compared: a moved or renamed folder gives the same batches.
        if known["content"] == images.content:
            return
        changes = describe_changes(read_rows(run.path / ROWS_FILE), images.rows)
        changes = changes or ["their order, labels or splits differ"]
    elif known.get("fingerprint") in (None, source.fingerprint):
        return
    listed = f": {', '.join(changes)}" if changes else ""
    raise VitcliError(
        f"the data `{source.notation}` have changed since `{run.path}` started{listed}",
        "restore the data, or start a new run with another `--out`; a resume would mix training "
        "and held-out images",
    )

"""Tables of labels for a split without class folders, and lists of splits, beside class folders.

Benchmarks ship training images in class folders, and a table for the rest: `val_annotations.txt` of
Tiny ImageNet, `LOC_val_solution.csv` of ImageNet, `GT-final_test.csv` of GTSRB.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitcli.data.folder_tree import named
from vitcli.data.layout import Layout, SplitImages
from vitcli.errors import VitcliError, printable
from vitcli.hub.split_names import split_words

LIST_SUFFIXES = (".txt", ".csv", ".tsv", ".mat", ".json")
MAX_LISTS = 50  # that are read; a folder of boxes has one text file per image


def label_splits(
    root: Path, shown: str, layout: Layout, files: Sequence[str], notes: list[str]
) -> None:
    """Put the images of splits without class folders into the classes that a table gives.

    Args:
        layout: changed in place.
        files: paths below `root` of files that are not images.
    """
    train = layout.splits.get("train")
    for split, images in layout.splits.items():
        if train is None or not train.classes or images.classes or not images.loose:
            continue
        near = [path for path in files if images.base.startswith(path[: path.rfind("/") + 1])]
        tables = [path for path in near if path.endswith((".txt", ".csv", ".tsv"))][:MAX_LISTS]
        found = {path: _labels(root / path, images, list(train.classes)) for path in tables}
        whole = {path: names for path, names in found.items() if len(names) == len(images.loose)}
        if not whole or any(names != next(iter(whole.values())) for names in whole.values()):
            continue
        table, class_of = next(iter(whole.items()))
        for name in train.classes:
            if paths := [path for path in images.loose if class_of[path] == name]:
                images.classes[name] = paths
        images.loose = []
        said = f"gives the labels of the {len(class_of):,} {split} images"
        notes.append(f"{shown}: `{printable(table)}` {said}")


def _labels(table: Path, images: SplitImages, classes: Sequence[str]) -> dict[str, str]:
    """Image path -> class of the rows that name an image of the split; {} if no column fits."""
    # Imported here, because tables import the names of image files.
    from vitcli.data.readers.columns import LABEL_COLUMNS, known_columns
    from vitcli.data.readers.table_text import read_text_table

    try:
        text = read_text_table(table, [], lambda cells: False)
        rows = list(text.rows)
    except VitcliError:
        return {}
    by_stem = {Path(path).stem: path for path in images.loose}
    matches = {name: [_image(row.get(name), by_stem) for row in rows] for name in text.header}
    column = max(matches, key=lambda name: sum(path is not None for path in matches[name]))
    pairs = [(p, row) for p, row in zip(matches[column], rows, strict=True) if p is not None]
    others = [name for name in text.header if name != column]
    fitting = {}
    for name in others:
        found = {path: _class(row.get(name), classes) for path, row in pairs}
        if all(label is not None for label in found.values()):
            fitting[name] = {path: str(label) for path, label in found.items()}
    usual = [name for name in known_columns(others, LABEL_COLUMNS) if name in fitting]
    chosen = usual[:1] or list(fitting)
    return fitting[chosen[0]] if len(chosen) == 1 else {}


def _image(cell: Any, by_stem: Mapping[str, str]) -> str | None:
    """The image that a cell names, with or without its folders and its suffix."""
    text = str(cell or "").strip().replace("\\", "/")
    path = by_stem.get(Path(text).stem) or by_stem.get(text)
    return path if path is not None and (text in path or "/" not in text) else None


def _class(cell: Any, classes: Sequence[str]) -> str | None:
    """The class that a cell names: `n01443537`, `n01443537 1 2 3 4`, or 7 for `00007`."""
    words = str(cell or "").split()
    for text in (" ".join(words), *words[:1]):
        if text in classes:
            return text
        if text.isdecimal():
            number = [name for name in classes if name.isdecimal() and int(name) == int(text)]
            return number[0] if len(number) == 1 else None
    return None


def unused_lists(shown: str, layout: Layout, files: Sequence[str]) -> list[str]:
    """A note if the data have no split folders, but files whose names speak of splits."""
    stems = {path: path.rpartition("/")[2].rpartition(".")[0] for path in files}
    lists = sorted(path for path, stem in stems.items() if any(split_words(stem)))
    if set(layout.splits) != {"train"} or not lists:
        return []
    return [
        f"{shown}: {named(lists)} may list the splits of this dataset, and folders cannot use "
        "lists; to use them, write a CSV file with the columns `path`, `label` and `split`"
    ]

"""Tables inside an image folder that give the labels, as Hugging Face `imagefolder` reads them."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from vitcli.data.folder_tree import Folder, named
from vitcli.data.image_set import ImageSet
from vitcli.data.layout import Layout
from vitcli.data.readers import READERS, find_reader, import_function
from vitcli.data.source import DataRequest, Source, make_source
from vitcli.data.splits import in_split_order
from vitcli.errors import VitcliError, printable
from vitcli.hub.datasets import LABEL_TABLES
from vitcli.hub.split_names import folder_split

TABLE_SUFFIXES = tuple(dict.fromkeys(Path(name).suffix for name in LABEL_TABLES))


def read_folder_tables(
    request: DataRequest, tree: Folder, tables: Sequence[str], layout: Layout, notes: list[str]
) -> Source | None:
    """The images of `metadata.csv` or `labels.csv`; None if the folder names give the labels.

    Args:
        tree: all images of the folder.
        tables: paths of its tables.
        layout: what the folder names say.
        notes: receives the reason why a table is not used.

    Raises:
        VitcliError: the table cannot be used, and there are no class folders.
    """
    known = [path for path in tables if path.rpartition("/")[2].lower() in LABEL_TABLES]
    chosen = _choose(tree, known)
    if known and not chosen:
        notes.append(f"{request.shown}: skipped tables in class folders: {named(known)}")
    if not chosen:
        return None
    shown = f"{request.shown}: {named(sorted(chosen.values()))}"
    has_classes = any(len(images.classes) > 1 for images in layout.splits.values())
    if has_classes and len(layout.splits) > 1:
        notes.append(f"{shown} is not used, because the folders give splits and classes")
        return None
    try:
        source = _source_of(request, chosen, layout)
    except VitcliError as error:
        if request.labelled and not has_classes:
            raise
        notes.append(f"{shown} is not used, because {error.message}")
        return None
    listed = sum(map(len, source.splits.values()))
    total = sum(1 for _ in tree.paths())
    said = f"{shown} gives the labels"
    said += f" of {listed:,} of the {total:,} images" if listed < total else ""
    if left := [split for split in layout.splits if "" not in chosen and split not in chosen]:
        said += f"; there is no table for {named(left)}, which is not used"
    rule = ", ".join(sorted(chosen.values()))
    return source.adjusted(
        lambda found: replace(
            found, notes=(said, *found.notes), layout=rule, notation=request.shown
        )
    )


def _choose(tree: Folder, tables: Sequence[str]) -> dict[str, str]:
    """Split -> its table; the key is empty for a table of the whole folder."""
    found: dict[str, str] = {}  # folder -> table; `metadata` goes before `labels`
    for path in sorted(
        tables, key=lambda path: LABEL_TABLES.index(path.rpartition("/")[2].lower())
    ):
        found.setdefault(path[: path.rfind("/") + 1], path)
    for folder in sorted(found, key=len):
        if all(path.startswith(folder) for path in tree.paths()):
            return {"": found[folder]}
    meanings = {
        path: folder_split(folder[:-1].rpartition("/")[2]) for folder, path in found.items()
    }
    return {split[0]: path for path, split in meanings.items() if split and not split[1]}


def _source_of(request: DataRequest, tables: Mapping[str, str], layout: Layout) -> Source:
    """The images of one table, or of a table for each split."""
    # Imported here, because tables import the names of image files.
    from vitcli.data.readers.columns import LABEL_COLUMNS, find_column

    for table in tables.values() if request.settings.label_column is None else ():
        # A column of another name can hold captions, and the folder names are the labels.
        header = _header(request.path / table)
        find_column(printable(table), "label", None, header, LABEL_COLUMNS)
    single = request.path / tables.get("", "")
    if "" in tables and len(layout.splits) == 1:
        return _load(request, single)
    settings = request.settings.model_copy(update={"train_split": None, "test_split": None})
    whole = replace(request, settings=settings, whole=True, labelled=False)
    parts = {split: _load(whole, request.path / table) for split, table in tables.items()}
    if "" not in parts:
        splits = {split: next(iter(part.splits.values())) for split, part in parts.items()}
    elif set(parts[""].splits) == {"train"}:
        splits = _by_folder(parts[""].splits["train"], request, layout)
    else:  # the table names the splits
        return _load(request, single)
    notes = [note for part in parts.values() for note in part.notes]
    prints = [part.fingerprint.encode() for part in parts.values()]
    return make_source(request, in_split_order(splits), prints, notes)


def _load(request: DataRequest, table: Path) -> Source:
    reader = READERS[find_reader(str(table))]
    source: Source = import_function(reader.load)(replace(request, notation=str(table)))
    return source


def _header(table: Path) -> Sequence[str]:
    if table.suffix.lower() == ".parquet":
        from vitcli.data.readers.parquet_table import read_parquet_metadata

        names: Sequence[str] = read_parquet_metadata(table).schema.to_arrow_schema().names
        return names
    from vitcli.data.readers.table_text import read_text_table

    return read_text_table(table, [], lambda cells: False).header


def _by_folder(images: ImageSet, request: DataRequest, layout: Layout) -> dict[str, ImageSet]:
    """The images of one table by the split folder that holds them."""
    paths = [os.path.normpath(str(images.content(i))) for i in range(len(images))]
    found = {}
    for split, of_split in layout.splits.items():
        start = os.path.normpath(request.path / of_split.base) + os.sep
        rows = np.flatnonzero([path.startswith(start) for path in paths])
        found[split] = images.subset(rows, split)
    return found

"""Folders that `save_to_disk` of Hugging Face `datasets` wrote: arrow files and their list."""

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from vitcli.data.image_set import ImageSet
from vitcli.data.readers.columns import note_coarser
from vitcli.data.readers.parquet import (
    choose_columns,
    divide_by_column,
    features_of,
    images_of_table,
)
from vitcli.data.source import DataRequest, Source, make_source
from vitcli.data.splits import in_split_order
from vitcli.errors import VitcliError, printable
from vitcli.files import read_json
from vitcli.hub.split_names import SPLIT_ALIASES

SPLITS_FILE = "dataset_dict.json"  # of a `DatasetDict`
STATE_FILE = "state.json"  # of a `Dataset`
REWRITE = "write the dataset again with `save_to_disk`"
Content = TypeVar("Content", bound=BaseModel)


class ArrowFile(BaseModel):
    filename: str


class SavedState(BaseModel):
    """The entries of `state.json` that are read."""

    model_config = ConfigDict(strict=True)

    files: list[ArrowFile] = Field(alias="_data_files")
    fingerprint: str = Field(alias="_fingerprint")


class SavedSplits(BaseModel):
    """The content of `dataset_dict.json`."""

    model_config = ConfigDict(strict=True)

    splits: list[str]


def is_saved(folder: Path) -> bool:
    """True for a `Dataset` or a `DatasetDict` on the disk."""
    state = (folder / STATE_FILE).is_file() and any(folder.glob("*.arrow"))
    return state or (folder / SPLITS_FILE).is_file()


def load_saved(request: DataRequest) -> Source:
    """A `Dataset`, or a `DatasetDict` with splits, that `save_to_disk` wrote.

    Raises:
        VitcliError: a file is missing or damaged, or a column is missing.
    """
    root, notes = request.path, []
    folders = {"train": root}
    if (root / SPLITS_FILE).is_file():
        names = _read(root / SPLITS_FILE, SavedSplits).splits
        found = {SPLIT_ALIASES.get(name.lower()): root / Path(name).name for name in names}
        left = [name for name in names if name.lower() not in SPLIT_ALIASES]
        if left == names and len(names) == 1:
            found, left = {"train": root / Path(names[0]).name}, []
        folders = in_split_order({split: path for split, path in found.items() if split})
        if left:
            skipped = ", ".join(f"`{printable(name)}`" for name in left)
            notes.append(f"{request.shown}: skipped splits with other names: {skipped}")
    splits: dict[str, ImageSet] = {}
    parts: list[bytes] = []
    for split, folder in folders.items():
        state = _read(folder / STATE_FILE, SavedState)
        files = [folder / Path(entry.filename).name for entry in state.files]
        tables = [_read_arrow(file) for file in files]
        splits |= _images(split, files, tables, request, notes, divide=len(folders) == 1)
        parts += [state.fingerprint.encode("utf-8", "surrogatepass")]
        parts += [table.num_rows.to_bytes(8, "little") for table in tables]
    return make_source(request, splits, parts, notes)


def _images(
    split: str,
    files: list[Path],
    tables: list[Any],
    request: DataRequest,
    notes: list[str],
    *,
    divide: bool,
) -> dict[str, ImageSet]:
    import pyarrow as pa

    if not files:
        raise VitcliError(f"`{request.shown}` has no arrow files for `{split}`", REWRITE)
    table = pa.concat_tables(tables)
    features = features_of(table.schema)
    shown = printable(files[0])
    columns = choose_columns(shown, table.schema, features, request.settings)
    note_coarser(request.shown, columns[1], table.schema.names, request.settings, notes)
    rows = [(file, one.num_rows) for file, one in zip(files, tables, strict=True)]
    images = images_of_table(split, table, rows, columns, features, request, notes)
    if not divide:
        return {split: images}
    return divide_by_column(shown, images, table, columns[1], request, notes)


def _read(file: Path, kind: type[Content]) -> Content:
    try:
        return kind.model_validate(read_json(file))
    except (OSError, ValueError) as error:  # pydantic's error is a ValueError of several lines
        reason = printable(str(error).replace("\n", " "))
        raise VitcliError(f"cannot read `{printable(file)}`: {reason}", REWRITE) from None


def _read_arrow(file: Path) -> Any:
    """The table of an arrow stream, memory-mapped."""
    import pyarrow as pa

    try:
        # Not closed: the columns point into the mapped file.
        table = pa.ipc.open_stream(pa.memory_map(str(file))).read_all()
        table.validate(full=True)  # Arrow trusts the offsets in it, and a wrong one is a crash
        return table
    except (OSError, ValueError, pa.ArrowException) as error:  # a name that is not text
        raise VitcliError(
            f"cannot read `{printable(file)}`: {str(error).splitlines()[0]}", REWRITE
        ) from None

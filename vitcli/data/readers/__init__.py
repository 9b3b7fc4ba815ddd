"""The registry of data readers: each kind of DATA, how it is recognised and what reads it.

To add a reader, write a module in this folder and add one entry to READERS. An entry names its
functions as text, because the command line prints this table and must not load the readers.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from vitcli.errors import VitcliError, nearest_path, printable, unknown


@dataclass(frozen=True)
class Reader:
    """One kind of DATA.

    Attributes:
        example: how a user writes it.
        help: what it is, for the help, the README and errors.
        load: `module:function` below `vitcli.data`, which maps a `DataRequest` to a `Source`.
        suffixes: endings of the files that it reads.
        accepts: `module:function`, which tells whether a folder (`Path`) is of this kind; None if
            a folder never is.
        several: True if a notation such as `{train,test}.csv` means several files.
    """

    example: str
    help: str
    load: str
    suffixes: tuple[str, ...] = ()
    accepts: str | None = None
    several: bool = False


# A key with a colon is a notation, or the start of one (`hf:`). Of several readers that accept a
# folder the first one reads it; `folder` reads what no other reader accepts.
READERS = {
    "folder": Reader(
        "photos/",
        "a folder with one subfolder per class, or with `train/CLASS/` and `test/CLASS/`",
        "readers.folder:load_folder",
    ),
    "table": Reader(
        "labels.csv",
        "a .csv, .tsv, .txt or .jsonl table with a column of paths and a column of labels; several "
        "as `{train,test}.csv`, or a folder of them",
        "readers.table:load_table",
        suffixes=(".csv", ".tsv", ".txt", ".jsonl"),
        accepts="readers.table:table_files",
        several=True,
    ),
    "decoded": Reader(
        "photos-224/",
        "a folder that `vitcli patchify DATA --out FOLDER` wrote",
        "readers.decoded:load_decoded",
        accepts="readers.decoded:is_decoded",
    ),
    "parquet": Reader(
        "images.parquet",
        "a parquet file, or a folder of them",
        "readers.parquet:load_parquet",
        suffixes=(".parquet",),
        accepts="readers.parquet:parquet_files",
    ),
    "shards": Reader(
        "shards-{000..099}.tar",
        "WebDataset shards, or a folder of them",
        "readers.tar:load_tar",
        suffixes=(".tar",),
        accepts="readers.tar:is_shard_folder",
        several=True,
    ),
    "saved": Reader(
        "saved/",
        "a folder that `save_to_disk` of Hugging Face `datasets` wrote",
        "readers.saved:load_saved",
        accepts="readers.saved:is_saved",
    ),
    "zip": Reader(
        "photos.zip",
        "a zip archive of class folders",
        "readers.zip:load_zip",
        suffixes=(".zip",),
    ),
    "arrays": Reader(
        "medmnist.npz",
        "a NumPy archive with `train_images`, `train_labels`, …, or `x_train`, `y_train`, …",
        "readers.arrays:load_arrays",
        suffixes=(".npz",),
    ),
    "hf:": Reader("hf:NAME", "a dataset on the Hugging Face Hub", "readers.hub:load_hub"),
    "builtin:digits": Reader(
        "builtin:digits", "scikit-learn's 1,797 handwritten digits", "readers.builtin:load_digits"
    ),
    "builtin:formula": Reader(
        "builtin:formula", "images drawn from formulas", "formula.dataset:load_formula"
    ),
}
DATA_SUFFIXES = frozenset(suffix for reader in READERS.values() for suffix in reader.suffixes)
DATA_HELP = ", ".join(f"`{reader.example}`" for reader in READERS.values())
_KINDS = f"DATA is one of: {DATA_HELP}; docs/how-to/data.md explains each"


def find_reader(notation: str) -> str:
    """The key in READERS of the reader for `notation`.

    Raises:
        VitcliError: no reader takes it, or the path does not exist.
    """
    for key in READERS:
        if ":" in key and (notation == key or (key.endswith(":") and notation.startswith(key))):
            return key
    if notation.startswith("builtin:"):
        raise unknown("dataset", notation, (key for key in READERS if key.startswith("builtin:")))
    if not notation:  # Path("") would be the current folder
        raise VitcliError("DATA is an empty string", f"the current folder is `.`; {_KINDS}")
    path = Path(notation)
    if path.is_dir():
        accepting = (key for key, reader in READERS.items() if _accepts(reader, path))
        return next(accepting, "folder")
    shown, suffix = printable(notation), path.suffix.lower()
    for key, reader in READERS.items():
        if suffix not in reader.suffixes:
            continue
        if path.is_file() or (reader.several and re.search(r"[{,]", notation)):
            return key
        raise VitcliError(f"no such file: `{shown}`", _meant(notation))
    if re.search(r"\.(tar\.\w+|tgz)$", notation):
        raise VitcliError(
            f"`{shown}` is a compressed tar file",
            "`gunzip` it; if it holds class folders, extract it or make a .zip",
        )
    fault = "unsupported data format" if path.exists() else "no such file or folder"
    if path.is_symlink() and not path.exists():
        target = printable(path.readlink())
        fault = f"it is a link to `{target}`, which does not lead to a file or a folder"
    raise VitcliError(f"{fault}: `{shown}`", _KINDS if path.exists() else _meant(notation))


def _meant(notation: str) -> str:
    """The hint for a path that does not exist."""
    if notation.startswith("data="):
        return f"DATA has no `data=`: write `{printable(notation.removeprefix('data='))}`"
    close = nearest_path(notation)
    return f"did you mean `{printable(close)}`?" if close else _KINDS


def expand_home(notation: str) -> str:
    """`~/photos` -> `/home/me/photos`; the shell has no part in recipes and quoted arguments.

    Raises:
        VitcliError: there is no such user.
    """
    if not notation.startswith("~") or os.path.lexists(notation):
        return notation
    try:
        return str(Path(notation).expanduser())
    except RuntimeError:
        shown = printable(notation)
        raise VitcliError(
            f"`{shown}`: there is no user with this name",
            f"write `./{shown}` if the name of the folder starts with `~`",
        ) from None


def is_dataset(notation: str | os.PathLike[str]) -> bool:
    """True if `notation` is DATA that is neither a plain folder nor a single image.

    Raises:
        VitcliError: it is written like such DATA, but it does not exist.
    """
    notation = expand_home(os.fspath(notation))
    path = Path(notation)
    if notation.startswith(("builtin:", "hf:")) or path.suffix.lower() in DATA_SUFFIXES:
        return True
    return path.is_dir() and find_reader(notation) != "folder"


def import_function(function: str) -> Callable[..., Any]:
    """`readers.tar:load_tar` -> the function of `vitcli.data`."""
    found: Callable[..., Any] = resolve_name(f"vitcli.data.{function}")
    return found


def _accepts(reader: Reader, folder: Path) -> bool:
    return reader.accepts is not None and bool(import_function(reader.accepts)(folder))

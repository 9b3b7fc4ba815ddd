"""DATA as a user writes it -> images, labels and class names for each split."""

import os
from collections.abc import Callable
from pathlib import Path

from vitcli.data.decode import printable
from vitcli.data.digits import load_digits
from vitcli.data.folders import load_folder
from vitcli.data.parquet import load_parquet, parquet_files
from vitcli.data.sets import ImageSet, Request, Source
from vitcli.data.tables import load_manifest
from vitcli.errors import VitcliError, nearest

__all__ = ["SOURCES", "ImageSet", "Source", "load_data"]

UNDERSTOOD = (
    "a folder with CLASS/*.jpg or train/CLASS/*.jpg, a .csv, .tsv or .jsonl file with paths and "
    "labels, a .parquet file or a folder of them, `builtin:digits`, `builtin:formula`"
)


def load_formula(request: Request) -> Source:
    """`builtin:formula`: images drawn from formulas, as many as wanted."""
    from vitcli.data.formula import load_formula as load

    return load(request)


SOURCES: dict[str, Callable[[Request], Source]] = {
    "folder": load_folder,
    "manifest": load_manifest,
    "parquet": load_parquet,
    "builtin:digits": load_digits,
    "builtin:formula": load_formula,
}
SUFFIXES = {".csv": "manifest", ".tsv": "manifest", ".jsonl": "manifest", ".parquet": "parquet"}


def load_data(
    notation: str | os.PathLike[str],
    *,
    label_column: str | None = None,
    image_column: str | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
    labelled: bool = True,
) -> Source:
    """The images that `notation` stands for; nothing is decoded yet.

    Args:
        notation: see INTERFACE, DATA.
        label_column, image_column: for tables whose columns are not known by their names.
        test_fraction: what is set aside of each class where the data has training images only;
            0 sets nothing aside.
        seed: of that split.
        labelled: whether there must be two classes; False takes pictures without class folders.

    Raises:
        VitcliError: no such data, no images, one class only, a class that only the test images
            have, a column that is not there.
    """
    name = os.fspath(notation)
    request = Request(name, label_column, image_column, test_fraction, seed, labelled)
    try:
        return SOURCES[_kind(name)](request)
    except OSError as error:
        reason = error.strerror or str(error)
        raise VitcliError(f"cannot read `{request.shown}`: {reason}", "check the path") from None


def _kind(notation: str) -> str:
    """The key of SOURCES that reads `notation`."""
    if notation.startswith("builtin:"):
        known = [name for name in SOURCES if name.startswith("builtin:")]
        if notation in known:
            return notation
        close = nearest(notation, known)
        hint = f"did you mean `{close}`?" if close else f"there are {', '.join(known)}"
        raise VitcliError(f"no data `{notation}`", hint)
    if not notation:  # an empty path would be the current folder
        raise VitcliError("DATA is empty text", f"data is {UNDERSTOOD}; `.` is the current folder")
    path = Path(notation)
    if path.is_dir():
        return "parquet" if parquet_files(path) else "folder"
    shown = printable(notation)
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        if path.is_file():
            return SUFFIXES[suffix]
        raise VitcliError(f"no such file: `{shown}`", f"data is {UNDERSTOOD}")
    if path.exists():
        raise VitcliError(f"`{shown}` is no data that is understood", f"data is {UNDERSTOOD}")
    if notation.startswith("hf:") or ".tar" in notation:
        raise VitcliError(f"data of the kind `{shown}` is not read yet", f"data is {UNDERSTOOD}")
    raise VitcliError(f"no such file or folder: `{shown}`", f"data is {UNDERSTOOD}")

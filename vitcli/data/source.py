"""DATA as a user writes it -> images, labels and class names for each split."""

import os
import re
from collections.abc import Callable
from pathlib import Path

from vitcli.config.schema import DataSection
from vitcli.data.decoded_cache import is_stored, load_stored
from vitcli.data.image_set import ImageSet, Request, Source
from vitcli.data.readers.builtin import load_digits
from vitcli.data.readers.folder import image_files, load_folder
from vitcli.data.readers.hub import load_hub
from vitcli.data.readers.parquet import load_parquet, parquet_files
from vitcli.data.readers.table import load_manifest
from vitcli.data.readers.tar import load_shards, shard_files
from vitcli.errors import VitcliError, nearest, printable
from vitcli.progress import Quiet, Watcher

__all__ = ["SOURCES", "ImageSet", "Source", "load_data"]

UNDERSTOOD = (
    "a folder with CLASS/*.jpg or train/CLASS/*.jpg, a .csv, .tsv or .jsonl file with paths and "
    "labels, a .parquet file or a folder of them, WebDataset shards `x-{000..099}.tar`, a set that "
    "`vitcli patchify DATA --out` stored, `hf:NAME` on the Hub, `builtin:digits`, `builtin:formula`"
)


def load_formula(request: Request) -> Source:
    """`builtin:formula`: images drawn from formulas, as many as wanted."""
    from vitcli.data.formula.dataset import load_formula as load

    return load(request)


SOURCES: dict[str, Callable[[Request], Source]] = {
    "folder": load_folder,
    "manifest": load_manifest,
    "parquet": load_parquet,
    "shards": load_shards,
    "stored": load_stored,
    "hf": load_hub,
    "builtin:digits": load_digits,
    "builtin:formula": load_formula,
}
SUFFIXES = {
    ".csv": "manifest",
    ".tsv": "manifest",
    ".jsonl": "manifest",
    ".parquet": "parquet",
    ".tar": "shards",
}


def load_data(
    notation: str | os.PathLike[str],
    *,
    label_column: str | None = None,
    image_column: str | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
    labelled: bool = True,
    multi_label: bool | None = None,
    validation_fraction: float | None = None,
    folds: int | None = None,
    fold: int = 0,
    train_split: str | None = None,
    test_split: str | None = None,
    watch: Watcher | None = None,
) -> Source:
    """The images that `notation` stands for; nothing is decoded yet.

    Args:
        notation: see INTERFACE, DATA.
        label_column, image_column: for tables whose columns are not known by their names.
        test_fraction: what is set aside of each class where the data has training images only;
            0 sets nothing aside.
        seed: of that split.
        labelled: whether there must be two classes; False takes pictures without class folders.
        multi_label: whether an image has any number of labels; None goes by the data.
        validation_fraction: what is taken of each class of the training images for validation.
        folds, fold: hold one of so many parts of the training images out: as test where there is
            no test, else as validation.
        train_split, test_split: a split of the data, or a slice of one such as `train[:98%]`.
        watch: told of downloads.

    Raises:
        VitcliError: no such data, no images, one class only, a class that only the test images
            have, a column that is not there, a split that cannot be made.
    """
    name = os.fspath(notation)
    request = Request(
        name,
        label_column,
        image_column,
        test_fraction,
        seed,
        labelled,
        multi_label,
        validation_fraction,
        folds,
        fold,
        train_split,
        test_split,
        watch or Quiet(),
    )
    try:
        return SOURCES[_kind(name)](request)
    except OSError as error:
        reason = error.strerror or str(error)
        raise VitcliError(f"cannot read `{request.shown}`: {reason}", "check the path") from None


def open_data(
    section: DataSection,
    notation: str | None = None,
    *,
    whole: bool = False,
    labelled: bool = True,
    watch: Watcher | None = None,
    streams: bool = False,
) -> Source:
    """The data of a `[data]` section; see `load_data`.

    Args:
        section: the settings.
        notation: DATA, where it is not the section's own.
        whole: nothing is set aside of data that has training images only.
        labelled, watch: as in `load_data`.
        streams: whether the training images may be a stream.

    Raises:
        VitcliError: as `load_data`; a stream where there may be none.
    """
    if section.streaming and not streams:
        raise VitcliError(
            "this command looks at images in any order, and a stream has but one",
            "leave out `data.streaming`, or give images that are here",
        )
    if section.streaming:
        from vitcli.data.streaming import open_stream

        request = Request(
            section.name or "" if notation is None else notation,
            section.label_column,
            section.image_column,
            multi_label=section.multi_label,
            validation_fraction=section.validation_fraction,
            folds=section.folds,
            train_split=section.train_split,
            test_split=section.test_split,
            watch=watch or Quiet(),
        )
        return open_stream(request, section.classes, section.shuffle_buffer)
    return load_data(
        section.name or "" if notation is None else notation,
        label_column=section.label_column,
        image_column=section.image_column,
        test_fraction=0.0 if whole else section.test_fraction,
        seed=section.split_seed,
        labelled=labelled,
        multi_label=section.multi_label,
        validation_fraction=None if whole else section.validation_fraction,
        folds=None if whole else section.folds,
        fold=section.fold,
        train_split=section.train_split,
        test_split=section.test_split,
        watch=watch,
    )


def is_set(notation: str) -> bool:
    """Whether it is DATA of another kind than a folder or files of images.

    Raises:
        VitcliError: it looks like such DATA, and there is none.
    """
    path = Path(notation)
    if notation.startswith(("builtin:", "hf:")) or path.suffix.lower() in SUFFIXES:
        return True
    return path.is_dir() and _kind(notation) != "folder"


def _kind(notation: str) -> str:
    """The key of SOURCES that reads `notation`."""
    if notation.startswith("builtin:"):
        known = [name for name in SOURCES if name.startswith("builtin:")]
        if notation in known:
            return notation
        close = nearest(notation, known)
        hint = f"did you mean `{close}`?" if close else f"there are {', '.join(known)}"
        raise VitcliError(f"no data `{notation}`", hint)
    if notation.startswith("hf:"):
        return "hf"
    if not notation:  # an empty path would be the current folder
        raise VitcliError("DATA is empty text", f"data is {UNDERSTOOD}; `.` is the current folder")
    path = Path(notation)
    if path.is_dir():
        if is_stored(path):
            return "stored"
        if parquet_files(path):
            return "parquet"
        if not shard_files(notation):
            return "folder"
        # An archive may lie beside class folders; logs and a preview may lie beside shards.
        return "folder" if any("/" in file for file in image_files(path)[0]) else "shards"
    shown = printable(notation)
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        if path.is_file() or (suffix == ".tar" and "{" in notation):
            return SUFFIXES[suffix]
        raise VitcliError(f"no such file: `{shown}`", f"data is {UNDERSTOOD}")
    if re.search(r"\.(tar\.\w+|tgz)$", notation):
        hint = "unpack it with `gunzip`: compressed shards cannot be read at any place"
        raise VitcliError(f"`{shown}` is a compressed tar file", hint)
    if path.exists():
        raise VitcliError(f"`{shown}` is no data that is understood", f"data is {UNDERSTOOD}")
    raise VitcliError(f"no such file or folder: `{shown}`", f"data is {UNDERSTOOD}")

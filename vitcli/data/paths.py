"""Images as a person names them on a command line: files, folders, globs."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vitcli.data.folders import image_files
from vitcli.data.sets import FileStore, ImageSet
from vitcli.errors import VitcliError, printable

TABLES = (".csv", ".tsv", ".jsonl", ".parquet")  # DATA of other commands


def find_images(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Images, folders and globs -> paths of images, in this order; missing ones stay in.

    Raises:
        VitcliError: nothing was given, nothing of it exists, or the folders hold no images.
    """
    # os.path, because it answers False for impossible names where pathlib raises.
    files: list[str] = []
    empty: list[str] = []
    for given in paths:
        path = os.fspath(given)
        if os.path.isdir(path):  # noqa: PTH112
            inside, _ = image_files(Path(path))
            files += [str(Path(path) / name) for name in inside]
            if not inside:
                empty.append(path)
        elif glob.has_magic(path) and not os.path.lexists(path):
            matches = sorted(glob.glob(path, recursive=True), key=os.fsencode)
            files += [match for match in matches if Path(match).is_file()] or [path]
        else:
            files.append(path)
    if empty and not files:
        hint = "hidden files and files that are no images don't count"
        if any(Path(empty[0]).glob("*.parquet")):
            hint = f"it holds parquet: `vitcli evaluate {printable(empty[0])}` may be meant"
        raise VitcliError(f"no images in `{printable(empty[0])}`", hint)
    if files and all(Path(file).suffix.lower() in TABLES for file in files):
        raise VitcliError(
            f"`{printable(files[0])}` is a table, not an image",
            f"`predict` takes images, folders and globs; for labelled data there is `vitcli "
            f"evaluate {printable(files[0])}`",
        )
    if not any(os.path.exists(file) for file in files):  # noqa: PTH110
        shown = ", ".join(f"`{printable(file)}`" for file in files[:3])
        raise VitcliError(
            f"no such image: {shown}" if files else "no images given",
            hint="paths of images, folders, or quoted globs such as 'photos/**/*.jpg'",
        )
    return files


def files_set(files: Sequence[str]) -> ImageSet:
    """The files as a set; the class of each is the name of the folder it lies in."""
    folders = [Path(file).parent.name for file in files]
    classes = sorted(set(folders))
    labels = np.array([classes.index(name) for name in folders], dtype=np.int64)
    return ImageSet("images", classes, labels, FileStore(Path(), map(os.fsencode, files)))

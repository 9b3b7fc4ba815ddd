"""WebDataset shards: tar files in which the members of a sample share their name up to a dot.

`0001.jpg` and `0001.cls` (or `0001.json`) are one sample. The headers are read once; after that a
picture is one read at a known place, so shards are drawn from in any order and a run resumes
exactly, as with loose files.
"""

import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vitcli.data.image_set import ImageSet, Integers, Request, Source
from vitcli.data.labels import (
    has_label,
    is_multi_label,
    label_names,
    label_text,
    make_source,
    several_labels,
)
from vitcli.data.readers.folder import IMAGE_SUFFIXES
from vitcli.data.readers.table import LABEL_COLUMNS
from vitcli.data.splits import files_ending, in_split_order, splits_of
from vitcli.decode import ImageError
from vitcli.errors import VitcliError, printable

LABEL_ENDINGS = ("cls", "label", "txt", "json")  # the first that a sample has counts
NAMES_FILES = ("classes.txt", "labels.txt")  # beside the shards: names of numbered classes
LARGEST_LABEL = 1 << 20


def shard_files(notation: str) -> list[Path]:
    """The tar files that a notation means: one, `x-{000..099}.tar`, `{a,b}.tar`, or a folder's.

    Raises:
        VitcliError: one of them does not exist.
    """
    path = Path(notation)
    if path.is_dir():
        return files_ending(path, ".tar")
    files = [Path(name) for name in expand(notation)]
    if missing := [file for file in files if not file.is_file()]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise VitcliError(
            f"no such shard: `{printable(missing[0])}`{more} of {len(files)}",
            "`x-{000..099}.tar` means a hundred files, `x-000.tar` to `x-099.tar`",
        )
    return files


def expand(notation: str) -> Iterator[str]:
    """`a-{8..10}.tar` -> `a-8.tar` …; `{08..10}` keeps the zeros; `{x,y}` means both."""
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", notation)
    if found is None:
        yield notation
        return
    first, last, listed = found.groups()
    if listed is not None:
        parts = listed.split(",")
    else:
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        low, high = sorted((int(first), int(last)))  # an order of the shards says nothing
        parts = [f"{n:0{width}}" for n in range(low, high + 1)]
    for part in parts:
        yield from expand(notation[: found.start()] + part + notation[found.end() :])


@dataclass
class Listing:
    """The samples of some shards, a row each."""

    file: list[int] = field(default_factory=list)
    header: list[int] = field(default_factory=list)
    offset: list[int] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    label: list[Any] = field(default_factory=list)
    unlabelled: int = 0
    notes: list[str] = field(default_factory=list)


class ShardStore:
    """Pictures inside tar files.

    Args:
        files: the shards.
        places: (n, 4) file, offset of the header, offset of the content, its size.
    """

    def __init__(self, files: Sequence[Path], places: Integers) -> None:
        self.files = files
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def content(self, row: int) -> bytes:
        number, _, offset, size = (int(value) for value in self.places[row])
        try:
            handle = os.open(self.files[number], os.O_RDONLY)
            try:
                return _read(handle, offset, size)
            finally:
                os.close(handle)
        except OSError as error:
            raise ImageError(self.describe(row), error.strerror or str(error)) from None

    def describe(self, row: int) -> str:
        number, header = (int(value) for value in self.places[row][:2])
        file = self.files[number]
        try:
            with file.open("rb") as opened:
                opened.seek(header)
                with tarfile.open(fileobj=opened, mode="r:") as shard:
                    member = shard.next()
            name = member.name if member is not None else f"byte {header}"
        except (OSError, tarfile.TarError):
            name = f"byte {header}"
        return printable(f"{file}:{name}")


def _read(handle: int, offset: int, size: int) -> bytes:
    """`size` bytes from `offset`, fewer where the file ends; a system call gives 2 GiB at most."""
    parts = []
    while size > 0 and (part := os.pread(handle, size, offset)):
        parts.append(part)
        offset, size = offset + len(part), size - len(part)
    return b"".join(parts)


def load_shards(request: Request) -> Source:
    """WebDataset shards; of a folder, split by how the names of its files begin.

    Labels are `.cls`, `.label` or `.txt` members (a number or a name), or a field of `.json`
    (`data.label_column`, else one of the usual names); a list of them there gives a picture any
    number of labels. `classes.txt` beside the shards names numbered classes.

    Raises:
        VitcliError: a shard is missing or compressed, no sample has an image and a label.
    """
    return read_shards(request, shard_splits(request.notation), [])


def shard_splits(notation: str) -> dict[str, list[Path]]:
    """Split -> shards, by how the names of the files begin."""
    by_split: dict[str, list[Path]] = {}
    files = shard_files(notation)
    root = Path(notation) if Path(notation).is_dir() else files[0].parent
    for file, split in zip(files, splits_of(files, root), strict=True):
        by_split.setdefault(split or "train", []).append(file)
    return in_split_order(by_split)


def read_shards(
    request: Request,
    by_split: Mapping[str, Sequence[Path]],
    notes: list[str],
    names: list[str] | None = None,
) -> Source:
    """The images of shards, split -> files; `names` of numbered classes, else those beside them.

    Raises:
        VitcliError: as `load_shards`.
    """
    splits: dict[str, ImageSet] = {}
    parts: list[bytes] = []
    names = names or _class_names([file for files in by_split.values() for file in files])
    for split in by_split:
        found = list_samples(by_split[split], request.label_column, request.labelled)
        notes += found.notes
        if found.unlabelled:
            notes.append(f"{request.shown}: {found.unlabelled:,} samples without a label left out")
        cells, targets = found.label, None
        if is_multi_label(request.shown, "label", cells, request.multi_label, notes):
            number = partial(_numbered, names=names, shown=request.shown)
            classes, labels, targets = several_labels(cells, number)
        else:
            classes, labels = _numbered(cells, names, request.shown)
        columns = [found.file, found.header, found.offset, found.size]
        places = np.array(columns, dtype=np.int64).T.reshape(-1, 4)
        store = ShardStore(by_split[split], places)
        splits[split] = ImageSet(split, classes, labels, store, targets=targets)
        parts += [places[:, 1:].tobytes(), *(name.encode() for name in classes)]
    if not any(len(images) for images in splits.values()):
        raise VitcliError(
            f"`{request.shown}` has no sample with an image and a label",
            "a sample is `KEY.jpg` and `KEY.cls` (or `KEY.json`); a field of the JSON is named "
            "with `--set data.label_column=NAME`",
        )
    return make_source(request, splits, parts, notes)


def _class_names(files: Sequence[Path]) -> list[str] | None:
    for name in NAMES_FILES:
        beside = files[0].parent / name if files else Path(name)
        if beside.is_file():
            return read_names(beside)
    return None


def read_names(path: Path) -> list[str]:
    """Class names, one a line.

    Raises:
        VitcliError: the file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise VitcliError(
            f"cannot read the class names in `{printable(path)}`: {error}", "one name a line"
        ) from error
    return [line.strip() for line in lines if line.strip()]


def _numbered(
    labels: list[Any], names: list[str] | None, shown: str
) -> tuple[Sequence[str], Integers]:
    texts = [label_text(label) for label in labels]
    if names is None or not all(text.isdecimal() for text in texts):
        return label_names(texts)
    numbers = np.array([int(text) for text in texts], dtype=np.int64)
    if len(numbers) and numbers.max() >= len(names):
        raise VitcliError(
            f"`{shown}` has label {numbers.max()}, but {len(names)} class names lie beside it",
            "give a name for each class, one a line",
        )
    return names, numbers


def list_samples(files: Sequence[Path], column: str | None, labelled: bool) -> Listing:
    """Every sample that has an image and, where `labelled`, a label.

    Raises:
        VitcliError: a shard is compressed or is no tar file.
    """
    found = Listing()
    for number, file in enumerate(files):
        for sample in _samples(file, found.notes):
            image = next((m for m in sample.members.values() if is_image(m)), None)
            if image is None:
                continue
            label = label_of(sample, column)
            if label is None and labelled:
                found.unlabelled += 1
                continue
            found.file.append(number)
            found.header.append(image.offset)
            found.offset.append(image.offset_data)
            found.size.append(image.size)
            found.label.append("" if label is None else label)
    return found


@dataclass
class Sample:
    """The members of one key: ending -> member; and the open file that they lie in."""

    key: str
    members: dict[str, tarfile.TarInfo]
    file: Any

    def text(self, ending: str) -> str:
        """A small text member."""
        member = self.members[ending]
        self.file.seek(member.offset_data)
        content: bytes = self.file.read(min(member.size, LARGEST_LABEL))
        return content.decode("utf-8", "backslashreplace").strip()


def _samples(file: Path, notes: list[str]) -> Iterator[Sample]:
    """The samples of one shard in order; one that is cut off ends early, with a note."""
    shown = printable(file)
    try:
        with file.open("rb") as opened, file.open("rb") as beside:
            try:
                shard = tarfile.open(fileobj=opened, mode="r:")  # noqa: SIM115
            except tarfile.TarError:
                if not file.stat().st_size:
                    raise VitcliError(f"`{shown}` is empty", "fetch the file again") from None
                raise VitcliError(
                    f"`{shown}` is no plain tar file",
                    "compressed shards cannot be read at any place: unpack them with `gunzip`",
                ) from None
            sample = Sample("", {}, beside)
            try:
                for member in shard:
                    key, ending = key_of(member.name)
                    if not member.isfile() or not key:
                        continue
                    if key != sample.key:
                        yield sample
                        sample = Sample(key, {}, beside)
                    sample.members[ending] = member
                    shard.members = []  # type: ignore[attr-defined]  # it would keep them all
            except tarfile.TarError as error:
                notes.append(f"{shown} is cut off or damaged ({error}): read up to there")
            yield sample
    except OSError as error:
        raise VitcliError(f"cannot read `{shown}`: {error.strerror}", "check the path") from None


def key_of(name: str) -> tuple[str, str]:
    """`dir/0001.seg.png` -> (`dir/0001`, `seg.png`); no key for a hidden file."""
    folder, slash, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return (f"{folder}{slash}{stem}" if stem else ""), ending.lower()


def is_image(member: tarfile.TarInfo) -> bool:
    return Path(member.name).suffix.lower() in IMAGE_SUFFIXES


def label_of(sample: Sample, column: str | None) -> Any:
    """The label as text or number; None where there is none."""
    endings = LABEL_ENDINGS if column is None else (column, "json")
    for ending in endings:
        if ending not in sample.members:
            continue
        text = sample.text(ending)
        if ending != "json":
            return text or None
        try:
            described = json.loads(text)
        except ValueError:
            return None
        if isinstance(described, int | str | list):
            return described
        if isinstance(described, dict):
            keys = [column] if column else [k for k in LABEL_COLUMNS if k in described]
            return next((described[k] for k in keys if has_label(described.get(k))), None)
    return None

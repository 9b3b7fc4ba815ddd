"""WebDataset shards: tar files in which the members of a sample share a name up to the first dot.

`0001.jpg` and `0001.cls` (or `0001.json`) are one sample. The headers are read once. After that an
image is one read at a known offset, so the order is free and a run resumes exactly.
"""

import os
import tarfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np

from vitcli.data.image_set import ImageSet, Integers
from vitcli.data.labels import (
    encode_labels,
    encode_multi_label,
    has_label,
    label_splitter,
    label_text,
    tidy_notes,
)
from vitcli.data.numeric_labels import refuse_numbers
from vitcli.data.readers.columns import LABEL_COLUMNS, check_label
from vitcli.data.readers.folder import image_files
from vitcli.data.source import DataRequest, Source, make_source
from vitcli.data.splits import expand_braces, files_with_suffix, in_split_order, splits_of
from vitcli.decode import IMAGE_SUFFIXES, ImageError
from vitcli.errors import VitcliError, counted, printable
from vitcli.files import parse_json

LABEL_ENDINGS = ("cls", "label", "txt", "json")  # in order of preference
NAMES_FILES = ("classes.txt", "labels.txt")  # beside the shards: class names of numeric labels
MAX_MISSING = 1000  # files that are looked for
MAX_LABEL_BYTES = 1 << 20


def shard_files(notation: str) -> list[Path]:
    """The tar files of a notation: `x.tar`, `x-{000..099}.tar`, `{a,b}.tar`, or a folder.

    Raises:
        VitcliError: one of them does not exist.
    """
    path = Path(notation)
    if path.is_dir():
        return files_with_suffix(path, ".tar")
    names = list(expand_braces(notation))
    # Some are enough: to ask for 100,000 files takes seconds.
    missing = list(islice((name for name in names if not Path(name).is_file()), MAX_MISSING))
    if missing:
        some = "at least " if len(missing) == MAX_MISSING else ""
        more = f" and {some}{len(missing) - 1} more" if len(missing) > 1 else ""
        raise VitcliError(
            f"no such shard: `{printable(missing[0])}`{more} of {len(names)}",
            "`x-{000..099}.tar` means 100 files, `x-000.tar` to `x-099.tar`",
        )
    return [Path(name) for name in names]


def is_shard_folder(folder: Path) -> bool:
    """True if the folder holds tar files and no images in subfolders.

    An archive may be beside class folders, and logs or a preview image beside shards.
    """
    return bool(shard_files(str(folder))) and not any("/" in f for f in image_files(folder)[0])


@dataclass
class ShardIndex:
    """The samples of some shards.

    Attributes:
        places: four integers per sample, flat: shard number, offset of the image's header, offset
            of its content, size. An array takes a fifth of the memory of lists.
        labels: for each sample its label.
        unlabelled: samples that were skipped because they have no label.
        dotted: keys of samples that end at the last dot.
        notes: messages for the user.
    """

    places: "array[int]" = field(default_factory=partial(array, "q"))
    labels: list[Any] = field(default_factory=list)
    unlabelled: int = 0
    dotted: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class ShardStore:
    """Images inside tar files.

    Args:
        files: the shards.
        places: (n, 4) the places of a `ShardIndex`.
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
                return _read_at(handle, offset, size)
            finally:
                os.close(handle)
        except OSError as error:
            raise ImageError(self.describe(row), error.strerror or str(error)) from None

    def content_keys(self, rows: Integers) -> Integers:
        """The sizes of the members."""
        return self.places[rows, 3]

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


def _read_at(handle: int, offset: int, size: int) -> bytes:
    """`size` bytes from `offset`, or fewer at the end; one system call reads 2 GiB at most."""
    parts = []
    while size > 0 and (part := os.pread(handle, size, offset)):
        parts.append(part)
        offset, size = offset + len(part), size - len(part)
    return b"".join(parts)


def load_tar(request: DataRequest) -> Source:
    """WebDataset shards; a folder of them is split by the names of files or folders.

    A label is a `.cls`, `.label` or `.txt` member (a number or a name), or a field of a `.json`
    member (`data.label_column`, else a usual name). A list there makes multi-label data.
    `classes.txt` beside the shards names the classes of numeric labels.

    Raises:
        VitcliError: a shard is missing or compressed, or no sample has an image and a label.
    """
    return read_shards(request, shard_splits(request.notation), [])


def shard_splits(notation: str) -> dict[str, list[Path]]:
    """Split -> shards."""
    by_split: dict[str, list[Path]] = {}
    files = shard_files(notation)
    root = Path(notation) if Path(notation).is_dir() else None
    for file, split in zip(files, splits_of(files, root), strict=True):
        by_split.setdefault(split or "train", []).append(file)
    return in_split_order(by_split)


def read_shards(
    request: DataRequest,
    by_split: Mapping[str, Sequence[Path]],
    notes: list[str],
    names: list[str] | None = None,
) -> Source:
    """The images of shards, given as split -> files; raises as `load_tar`.

    Args:
        names: class names of numeric labels; None reads those beside the shards.
    """
    shown, settings = request.shown, request.settings
    splits: dict[str, ImageSet] = {}
    parts: list[bytes] = []
    names = names or _class_names([file for files in by_split.values() for file in files])
    for split, files in by_split.items():
        index = index_shards(files, settings.label_column, request.labelled)
        notes += index.notes
        if index.unlabelled:
            skipped = counted(index.unlabelled, "sample", "samples")
            notes.append(f"{shown}: skipped {skipped} without a label")
        if index.dotted:
            notes.append(
                f"{shown}: {counted(len(index.dotted), 'sample name ends', 'sample names end')} at "
                f"the last dot, such as `{printable(index.dotted[0])}`, because the part up to the "
                "first dot has no label"
            )
        targets = None
        divide = label_splitter(shown, "label", index.labels, settings, notes)
        if divide is not None:
            encode = partial(_encode_numeric, names=names, shown=shown)
            classes, labels, targets = encode_multi_label(index.labels, encode, divide)
        else:
            if request.numeric is False:
                refuse_numbers(shown, "label", set(index.labels))
            notes += tidy_notes(shown, set(index.labels))
            classes, labels = _encode_numeric(index.labels, names, shown)
        places = np.array(index.places, dtype=np.int64).reshape(-1, 4)
        splits[split] = ImageSet(split, classes, labels, ShardStore(files, places), targets=targets)
        parts += [places[:, 1:].tobytes(), *(name.encode() for name in classes)]
    if not any(len(images) for images in splits.values()):
        raise VitcliError(
            f"`{shown}` has no sample with an image and a label",
            "a sample is `KEY.jpg` and `KEY.cls` (or `KEY.json`); name the label field of the JSON "
            "with `--set data.label_column=NAME`; for class folders, extract it or make a .zip",
        )
    return make_source(request, splits, parts, notes)


def _class_names(files: Sequence[Path]) -> list[str] | None:
    for name in NAMES_FILES:
        beside = files[0].parent / name if files else Path(name)
        if beside.is_file():
            return read_names(beside)
    return None


def read_names(path: Path) -> list[str]:
    """Class names, one per line.

    Raises:
        VitcliError: the file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise VitcliError(
            f"cannot read the class names in `{printable(path)}`: {error}",
            "write one class name per line, in UTF-8",
        ) from error
    return [name for line in lines if (name := label_text(line))]


def _encode_numeric(
    labels: list[Any], names: list[str] | None, shown: str
) -> tuple[Sequence[str], Integers]:
    """As `encode_labels`; with `names`, whole numbers are indices into them."""
    texts = [label_text(label) for label in labels]
    if names is None or not all(text.isdecimal() for text in texts):
        return encode_labels(texts)
    indices = np.array([int(text) for text in texts], dtype=np.int64)
    if len(indices) and indices.max() >= len(names):
        raise VitcliError(
            f"`{shown}` has label {indices.max()}, but there are only {len(names)} class names",
            f"add the missing names to `{NAMES_FILES[0]}`, one per line",
        )
    return names, indices


def index_shards(files: Sequence[Path], column: str | None, labelled: bool) -> ShardIndex:
    """Every sample that has an image and, if `labelled`, a label.

    Raises:
        VitcliError: a shard is compressed, or it is not a tar file.
    """
    found = ShardIndex()
    for number, file in enumerate(files):
        samples = (part for one in _samples(file, found.notes) for part in one.divided(column))
        for sample in samples:
            image = sample.image()
            if image is None:
                continue
            label = label_of(sample, column)
            check_label(printable(file), image.name, label)
            if not has_label(label) and labelled:
                found.unlabelled += 1
                continue
            found.places.extend((number, image.offset, image.offset_data, image.size))
            found.labels.append(label if has_label(label) else "")
            if "." in sample.key.rpartition("/")[2]:
                found.dotted.append(sample.key)
    return found


@dataclass
class Sample:
    """The members of one key (ending -> member), and the open file that holds them."""

    key: str
    members: dict[str, tarfile.TarInfo]
    file: Any

    def image(self) -> tarfile.TarInfo | None:
        """The first image."""
        return next((member for member in self.members.values() if is_image(member)), None)

    def divided(self, column: str | None) -> list[Self]:
        """This sample, or the samples of its names up to the last dot if only these have labels.

        `webdataset` ends a key at the first dot, so `a.v1.png`, `a.v1.cls` and `a.v2.png` share
        the key `a`, and no member is its label.
        """
        endings = label_endings(column)
        if any(ending in self.members for ending in endings):
            return [self]
        found: dict[str, Self] = {}
        for ending, member in self.members.items():
            key = member.name.rpartition(".")[0]
            part = found.setdefault(key, replace(self, key=key, members={}))
            part.members[ending.rpartition(".")[2]] = member
        parts = list(found.values())
        labelled = (part.image() and any(e in part.members for e in endings) for part in parts)
        return parts if any(labelled) else [self]

    def text(self, ending: str) -> str:
        """The content of a small text member."""
        member = self.members[ending]
        self.file.seek(member.offset_data)
        content: bytes = self.file.read(min(member.size, MAX_LABEL_BYTES))
        return content.decode("utf-8", "backslashreplace").strip()


def _samples(file: Path, notes: list[str]) -> Iterator[Sample]:
    """The samples of one shard in order; a truncated shard ends early, with a note."""
    shown = printable(file)
    try:
        with file.open("rb") as opened, file.open("rb") as beside:
            try:
                shard = tarfile.open(fileobj=opened, mode="r:")  # noqa: SIM115
            except tarfile.TarError:
                if not file.stat().st_size:
                    raise VitcliError(f"`{shown}` is empty", "download the file again") from None
                raise VitcliError(
                    f"`{shown}` is not an uncompressed tar file",
                    "`gunzip` it; if it holds class folders, extract it or make a .zip",
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
                    shard.members = []  # type: ignore[attr-defined]  # the list would grow with every member
            except tarfile.TarError as error:
                notes.append(f"{shown} is truncated or damaged ({error}); read up to that point")
            yield sample
    except OSError as error:
        raise VitcliError(f"cannot read `{shown}`: {error.strerror}", "check the path") from None


def key_of(name: str) -> tuple[str, str]:
    """`dir/0001.seg.png` -> (`dir/0001`, `seg.png`); the key of a hidden file is empty."""
    folder, slash, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return (f"{folder}{slash}{stem}" if stem else ""), ending.lower()


def label_endings(column: str | None) -> tuple[str, ...]:
    """Endings of the members that may hold a label, in order of preference."""
    return LABEL_ENDINGS if column is None else (column, "json")


def is_image(member: tarfile.TarInfo) -> bool:
    return Path(member.name).suffix.lower() in IMAGE_SUFFIXES


def label_of(sample: Sample, column: str | None) -> Any:
    """The label as text, number or list; None if the sample has none."""
    for ending in label_endings(column):
        if ending not in sample.members:
            continue
        text = sample.text(ending)
        if ending != "json":
            return text or None
        try:
            described = parse_json(text)
        except ValueError:
            return None
        if isinstance(described, int | float | str | list):
            return described
        if isinstance(described, dict):
            keys = [column] if column else [k for k in LABEL_COLUMNS if k in described]
            return next((described[k] for k in keys if has_label(described.get(k))), None)
    return None

"""`data.streaming`: training images read shard by shard, for sets that are larger than the disk.

Nothing of a shard is stored. Each epoch draws a new order of the shards, and a shuffle buffer mixes
their images, which is less random than a permutation of the whole set. A stream cannot start in its
middle, so a resumed run starts another order: images of the epoch that was interrupted may come
twice or not at all. The test images are downloaded and read like any others.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tarfile import TarError
from typing import Any, Literal, cast

import numpy as np

from vitcli.data.image_set import ImageSet
from vitcli.data.labels import class_names, has_label, label_text
from vitcli.data.readers.hub import class_names_file, find_files, load_hub
from vitcli.data.readers.parquet import (
    choose_columns,
    features_of,
    parquet_files,
    parquet_splits,
    read_parquet,
)
from vitcli.data.readers.tar import (
    NAMES_FILES,
    Sample,
    is_image,
    key_of,
    label_endings,
    label_of,
    read_names,
    read_shards,
    shard_splits,
)
from vitcli.data.source import DataRequest, Source, fingerprint
from vitcli.data.splits import AUTO, expand_braces
from vitcli.errors import VitcliError, printable
from vitcli.hub.client import install_checks
from vitcli.hub.datasets import DatasetFiles
from vitcli.hub.http import open_url
from vitcli.hub.repository import RepoFiles

PARQUET_ROWS = 64  # rows of a parquet file that are in memory at a time
TAR_URL = re.compile(r"https?://.+\.tar")
CLASSES_HINT = "`--set data.classes=FILE` gives all class names, one per line"
Columns = tuple[str | None, str | None]  # image, label


@dataclass(frozen=True)
class Shard:
    """One file of a stream: its name in errors, and a path, `https://` or `hf://` URL."""

    name: str
    location: Path | str

    @property
    def is_tar(self) -> bool:
        return not str(self.location).lower().endswith(".parquet")

    def open(self) -> Any:
        """The open binary file."""
        if isinstance(self.location, Path):
            return self.location.open("rb")
        if not self.location.startswith("hf://"):
            return open_url(self.location)
        from huggingface_hub import HfFileSystem, constants

        install_checks()
        system = HfFileSystem(endpoint=constants.ENDPOINT)
        # A tar file is read from front to back without seeking, parquet starts at its end.
        return system.open(self.location, "rb", **({"block_size": 0} if self.is_tar else {}))


@dataclass(frozen=True)
class StreamSample:
    """An encoded image, its class number, and its name in errors."""

    content: bytes
    label: int
    name: str


def read_parquet_rows(file: Any, columns: Columns) -> Iterator[tuple[bytes, Any, str]]:
    """(image, label, name) of each row of a parquet file."""
    import pyarrow.parquet as pq

    image, label = columns
    row = 0
    batches = pq.ParquetFile(file).iter_batches(
        PARQUET_ROWS, columns=[image, label], use_threads=False
    )
    for batch in batches:
        cells, labels = batch.column(image).to_pylist(), batch.column(label).to_pylist()
        for cell, value in zip(cells, labels, strict=True):
            content = cell.get("bytes") if isinstance(cell, dict) else cell
            yield content or b"", value, f"row {row}"
            row += 1


class BufferedSample(Sample):
    """A tar sample whose members are in memory, because a stream cannot seek back."""

    def text(self, ending: str) -> str:
        content: bytes = self.file[self.members[ending].name]
        return content.decode("utf-8", "backslashreplace").strip()


def read_tar_samples(file: Any, columns: Columns) -> Iterator[tuple[bytes, Any, str]]:
    """(image, label, key) of each sample of a tar file."""
    import tarfile

    endings = label_endings(columns[1])
    sample = BufferedSample("", {}, {})

    def finish() -> Iterator[tuple[bytes, Any, str]]:
        for part in sample.divided(columns[1]):
            if (image := part.image()) is not None:
                yield part.file[image.name], label_of(part, columns[1]), part.key

    with tarfile.open(fileobj=file, mode="r|") as shard:
        for member in shard:
            key, ending = key_of(member.name)
            if not member.isfile() or not key:
                continue
            if key != sample.key:
                yield from finish()
                sample = BufferedSample(key, {}, {})
            if is_image(member) or ending.rpartition(".")[2] in endings:
                opened = shard.extractfile(member)
                sample.members[ending] = member
                sample.file[member.name] = opened.read() if opened is not None else b""
        yield from finish()


class StreamSet:
    """The training images of a stream; `TrainLoader` reads them with `epoch`.

    Args:
        classes: class names in the order of the labels.
        shards: the files, in a fixed order.
        columns: (image, label) columns of parquet files; for tar files (None, the JSON field of
            the label or None).
        buffer: images in the shuffle buffer.
    """

    kind: Literal["stream"] = "stream"
    targets: None = None

    def __init__(
        self, classes: Sequence[str], shards: Sequence[Shard], columns: Columns, buffer: int
    ) -> None:
        self.name = "train"
        self.classes = tuple(classes)
        self.shards = tuple(shards)
        self.columns = columns
        self.buffer = buffer
        self._number = {name: label for label, name in enumerate(self.classes)}

    def __len__(self) -> int:
        raise VitcliError(
            "the number of images in a stream is unknown",
            "give `--steps`, or `--set train.images=N`",
        )

    def epoch(self, seed: Sequence[int], rank: int, world_size: int) -> Iterator[StreamSample]:
        """Every image of this process's shards once, in an order that `seed` determines.

        Raises:
            VitcliError: a shard cannot be read, or a label is not a class.
        """
        # All processes draw the same order of the shards and take every `world_size`th of them.
        order = np.random.default_rng(tuple(seed)).permutation(len(self.shards))
        rng = np.random.default_rng((*seed, rank + 1))
        buffer: list[StreamSample] = []
        for number in order[rank::world_size]:
            for sample in self.read(self.shards[number]):
                if len(buffer) < self.buffer:
                    buffer.append(sample)
                    continue
                slot = int(rng.integers(self.buffer))
                sample, buffer[slot] = buffer[slot], sample
                yield sample
        for slot in rng.permutation(len(buffer)):
            yield buffer[slot]

    def read(self, shard: Shard) -> Iterator[StreamSample]:
        """The labelled images of one shard, in order."""
        from huggingface_hub.errors import HTTPError
        from pyarrow import ArrowException

        failures: Any = (OSError, TarError, ArrowException, HTTPError)
        rows = read_tar_samples if shard.is_tar else read_parquet_rows
        try:
            with shard.open() as file:
                for content, label, name in rows(file, self.columns):
                    number = self._class_number(label, shard)
                    if number is not None:
                        yield StreamSample(content, number, f"{name} of {shard.name}")
        except failures as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise VitcliError(
                f"reading `{shard.name}` failed: {reason}",
                "continue from the last checkpoint with `--resume`",
            ) from error

    def _class_number(self, label: Any, shard: Shard) -> int | None:
        """The class number of a label; None for a missing label."""
        if not has_label(label) or label == -1:
            return None
        name = label_text(label)
        if (found := self._number.get(name)) is not None:
            return found
        if name.isdecimal() and int(name) < len(self.classes):
            return int(name)
        raise VitcliError(
            f"`{shard.name}` has the label `{printable(str(label))}`, which is not one of the "
            f"{len(self.classes)} classes",
            CLASSES_HINT,
        )


def open_stream(request: DataRequest) -> Source:
    """DATA as a stream: parquet or tar shards, local, on the Hub or `https://…/x-{000..099}.tar`.

    Args:
        request: the DATA request; a stream cannot be split, so its splits are those of the data.

    Raises:
        VitcliError: the data is neither parquet nor tar shards, or its classes are unknown.
    """
    settings, buffer = request.settings, request.settings.shuffle_buffer
    refused = (
        "multi_label", "label_separator", "folds", "validation_fraction", "train_split",
        "split_column", "test_fold", "group_column",
    )  # fmt: skip
    values = {name: getattr(settings, name) for name in refused}
    if values["validation_fraction"] in (0.0, AUTO):  # asks for no split that a stream lacks
        values["validation_fraction"] = None
    # Not `in (None, False)`: the fold 0 is a value, and 0 == False.
    if given := [
        name for name, value in values.items() if value is not None and value is not False
    ]:
        raise VitcliError(
            "a stream has no folds, no slices and no multi-label images",
            f"remove `data.{given[0]}`, or `data.streaming`",
        )
    test_sets: Mapping[str, ImageSet] = {}
    record: dict[str, Any] = {"streaming": True, "resume": "approximate"}
    names_file: Path | None = None
    if request.notation.startswith("hf:"):
        repo_files, dataset = find_files(request)
        shards = _hub_shards(repo_files, dataset)
        if dataset.splits.keys() - {"train"}:
            whole = replace(request, whole=True, labelled=False)
            test_sets = load_hub(whole, without="train").splits
        names_file = class_names_file(repo_files)
        repository = repo_files.repository
        record |= {"repository": repository.repo_id, "commit": repo_files.commit}
    elif TAR_URL.fullmatch(request.notation):
        shards = [Shard(url, url) for url in expand_braces(request.notation)]
    else:
        shards, test_sets, names_file = _local_files(request)
    if not shards:
        raise VitcliError(
            f"`{request.shown}` has no training images that can be streamed",
            "a stream needs parquet files or WebDataset shards",
        )
    names_file = Path(settings.classes) if settings.classes else names_file
    columns, marked = _columns_and_classes(shards[0], request)
    classes = (read_names(names_file) if names_file else None) or marked
    if not classes:
        raise VitcliError(
            f"`{request.shown}` does not contain its class names, and a stream cannot be searched "
            "for them",
            CLASSES_HINT,
        )
    stream = StreamSet(classes, shards, columns, buffer)
    try:
        others = {name: s.relabelled(stream.classes) for name, s in test_sets.items()}
    except KeyError as error:
        raise VitcliError(
            f"`{request.shown}`: class {error} of the test images is not a class of the stream",
            CLASSES_HINT,
        ) from None
    splits = {"train": cast(ImageSet, stream), **others}
    marks = [shard.name.encode() for shard in shards] + [name.encode() for name in classes]
    note = f"{request.shown}: a stream of {len(shards):,} files, shuffle buffer {buffer:,} images"
    return Source(request.shown, splits, stream.classes, fingerprint(marks), (note,), record)


def _local_files(request: DataRequest) -> tuple[list[Shard], Mapping[str, ImageSet], Path | None]:
    """Local shards, the splits besides train, and a file with class names next to the shards."""
    path = request.path
    is_parquet = path.suffix == ".parquet" or bool(parquet_files(path))
    if not is_parquet and not path.is_dir() and path.suffix != ".tar":
        return [], {}, None
    notes: list[str] = []
    files = parquet_splits(path, notes) if is_parquet else shard_splits(request.notation)
    train = files.pop("train", [])
    shards = [Shard(printable(file), file) for file in train]
    read = read_parquet if is_parquet else read_shards
    whole = replace(request, whole=True, labelled=False)
    test_sets = read(whole, files, notes).splits if files else {}
    names = (train[0].parent / name for name in NAMES_FILES) if train else ()
    return shards, test_sets, next((name for name in names if name.is_file()), None)


def _hub_shards(repo_files: RepoFiles, dataset: DatasetFiles) -> list[Shard]:
    repository = repo_files.repository
    if dataset.kind == "folder":
        raise VitcliError(
            f"`{repository}` is a folder of images, which cannot be streamed",
            "remove `data.streaming` to download it",
        )
    root = f"hf://datasets/{repository.repo_id}@{repo_files.commit}"
    paths = dataset.splits.get("train", ())
    return [Shard(f"{repository}/{path}", f"{root}/{path}") for path in paths]


def _columns_and_classes(
    shard: Shard, request: DataRequest
) -> tuple[Columns, Sequence[str] | None]:
    """The columns of a stream, and the class names that the metadata of a parquet file has."""
    if shard.is_tar:
        return (None, request.settings.label_column), None
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with shard.open() as file:
            schema = pq.ParquetFile(file).schema_arrow
    except (OSError, pa.ArrowException) as error:
        raise VitcliError(
            f"cannot read `{shard.name}`: {error}", "check the network connection"
        ) from error
    features = features_of(schema)
    columns = choose_columns(shard.name, schema, features, request.settings)
    return columns, class_names(features.get(columns[1]))

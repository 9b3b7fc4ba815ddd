"""Images and labels of one file that is read from its front to its back.

`data.streaming`: training images read shard after shard, for sets that are larger than the disk.

Nothing of a shard is kept. The order of the shards is drawn anew each epoch, and a buffer mixes the
images of those at hand; that is less random than a permutation of the whole. A stream cannot be
entered in its middle, so a resumed run begins another one: images of the epoch that was cut short
come again or not at all. Images to test on are fetched and read as any others.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tarfile import TarError
from typing import Any, cast

import numpy as np

from vitcli.data.image_set import ImageSet
from vitcli.data.labels import class_names, has_label, label_text
from vitcli.data.readers.hub import Plan, hub_names, load_hub, plan_hub
from vitcli.data.readers.parquet import (
    choose_columns,
    features_of,
    parquet_files,
    parquet_splits,
    read_parquet,
)
from vitcli.data.readers.tar import (
    LABEL_ENDINGS,
    NAMES_FILES,
    Sample,
    expand_braces,
    is_image,
    key_of,
    label_of,
    read_names,
    read_shards,
    shard_splits,
)
from vitcli.data.source import DataRequest, Source, fingerprint
from vitcli.errors import VitcliError, printable
from vitcli.hub.repository import Listing

ROWS = 64  # of a parquet file at a time


def read_parquet_rows(
    file: Any, columns: tuple[str | None, str | None]
) -> Iterator[tuple[bytes, Any, str]]:
    """(image, label, place) of each row; a row group at a time is in memory."""
    import pyarrow.parquet as pq

    image, label = columns
    row = 0
    for batch in pq.ParquetFile(file).iter_batches(ROWS, columns=[image, label], use_threads=False):
        cells, labels = batch.column(image).to_pylist(), batch.column(label).to_pylist()
        for cell, value in zip(cells, labels, strict=True):
            content = cell.get("bytes") if isinstance(cell, dict) else cell
            yield content or b"", value, f"row {row}"
            row += 1


class Held(Sample):
    """A sample whose small members are in memory, because a stream has no way back."""

    def text(self, ending: str) -> str:
        """A small text member."""
        content: bytes = self.file[ending]
        return content.decode("utf-8", "backslashreplace").strip()


def read_tar(file: Any, columns: tuple[str | None, str | None]) -> Iterator[tuple[bytes, Any, str]]:
    """(image, label, key) of each sample of a tar file that is read from front to back."""
    import tarfile

    endings = {*LABEL_ENDINGS, *([columns[1]] if columns[1] else [])}
    sample = Held("", {}, {})
    with tarfile.open(fileobj=file, mode="r|") as shard:
        for member in shard:
            key, ending = key_of(member.name)
            if not member.isfile() or not key:
                continue
            if key != sample.key:
                yield from _finished(sample, columns[1])
                sample = Held(key, {}, {})
            if is_image(member) or ending in endings:
                opened = shard.extractfile(member)
                sample.members[ending] = member
                sample.file[ending] = opened.read() if opened is not None else b""
        yield from _finished(sample, columns[1])


def _finished(sample: Held, column: str | None) -> Iterator[tuple[bytes, Any, str]]:
    image = next((e for e, member in sample.members.items() if is_image(member)), None)
    if image is not None:
        yield sample.file[image], label_of(sample, column), sample.key


REMOTE = re.compile(r"https?://.+\.tar")
WAY_OUT = "`--resume` goes on from the last checkpoint"


@dataclass(frozen=True)
class StreamSample:
    """An image as it is stored, the number of its class, and what errors call it."""

    content: bytes
    label: int
    name: str


@dataclass(frozen=True)
class Shard:
    """One file of a stream: its name, how it is read (`parquet` or `tar`), and how it is opened."""

    name: str
    kind: str
    open: Callable[[], Any]


class StreamSet:
    """The training images of a stream; only `StreamLoader` can read them.

    Args:
        classes: names, in the order of the labels.
        shards: in their own order.
        columns: (image, label) of parquet files; (None, label) of shards, where it is said.
        buffer: images that are mixed at a time.
    """

    targets: None = None

    def __init__(
        self,
        classes: Sequence[str],
        shards: Sequence[Shard],
        columns: tuple[str | None, str | None],
        buffer: int,
    ) -> None:
        self.name = "train"
        self.classes = tuple(classes)
        self.shards = tuple(shards)
        self.columns = columns
        self.buffer = buffer
        self._number = {name: label for label, name in enumerate(self.classes)}

    def __len__(self) -> int:
        raise VitcliError(
            "how many images a stream has is not known", "give `--steps`, or `--set train.images=N`"
        )

    def epoch(self, seed: Sequence[int], rank: int, world_size: int) -> Iterator[StreamSample]:
        """Every image of this process's shards once, in an order that `seed` says.

        Raises:
            VitcliError: a shard cannot be read, or a label is no class.
        """
        rng = np.random.default_rng(tuple(seed))
        order = rng.permutation(len(self.shards))[rank::world_size]
        mixing = np.random.default_rng((*seed, rank + 1))
        held: list[StreamSample] = []
        for number in order:
            for sample in self.read(self.shards[number]):
                if len(held) < self.buffer:
                    held.append(sample)
                    continue
                place = int(mixing.integers(self.buffer))
                sample, held[place] = held[place], sample
                yield sample
        for place in mixing.permutation(len(held)):
            yield held[place]

    def read(self, shard: Shard) -> Iterator[StreamSample]:
        """The labelled images of one shard, in its order."""
        from huggingface_hub.errors import HTTPError
        from pyarrow import ArrowException

        broken: Any = (OSError, TarError, ArrowException, HTTPError)
        try:
            with shard.open() as file:
                rows = read_parquet_rows if shard.kind == "parquet" else read_tar
                for content, label, name in rows(file, self.columns):
                    number = self._label(label, shard)
                    if number is not None:
                        yield StreamSample(content, number, f"{name} of {shard.name}")
        except broken as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise VitcliError(f"cannot read on in `{shard.name}`: {reason}", WAY_OUT) from error

    def _label(self, label: Any, shard: Shard) -> int | None:
        """The class number of a cell; None where there is none."""
        if not has_label(label) or label == -1:
            return None
        name = label_text(label)
        if (found := self._number.get(name)) is not None:
            return found
        if name.isdecimal() and int(name) < len(self.classes):
            return int(name)
        raise VitcliError(
            f"`{shard.name}` has the label `{printable(str(label))}`, which is none of "
            f"{len(self.classes)} classes",
            "`--set data.classes=FILE` names them all, one a line",
        )


def open_stream(request: DataRequest) -> Source:
    """DATA as a stream: parquet or shards, here, on the Hub, or `https://…/x-{000..099}.tar`.

    Args:
        request: what the user asked for; its splits must be those of the data.

    Raises:
        VitcliError: data that is no shards or parquet, classes that are not known.
    """
    settings, buffer = request.settings, request.settings.shuffle_buffer
    if (
        settings.multi_label
        or settings.folds
        or settings.validation_fraction
        or settings.train_split
    ):
        raise VitcliError(
            "a stream has no folds, slices or several labels an image",
            "without `data.streaming` there are",
        )
    held: Mapping[str, ImageSet] = {}
    record: dict[str, Any] = {"streaming": True, "resume": "approximate"}
    beside: Path | None = None
    if request.notation.startswith("hf:"):
        listing, plan = plan_hub(request)
        shards = [_hub_shard(listing, plan, name) for name in plan.files.get("train", ())]
        rest = {name: files for name, files in plan.files.items() if name != "train"}
        held = _hub_rest(request, rest)
        beside = hub_names(listing)
        record |= {"repository": listing.repository.name, "commit": listing.commit}
    elif REMOTE.fullmatch(request.notation):
        shards = [_remote_shard(url) for url in expand_braces(request.notation)]
    else:
        shards, held, beside = _local(request)
    if not shards:
        raise VitcliError(
            f"`{request.shown}` has no training images that can be streamed",
            "parquet files and WebDataset shards can",
        )
    names = read_names(Path(settings.classes)) if settings.classes else None
    if names is None and beside is not None:
        names = read_names(beside)
    columns, marked = _look_into(shards[0], request)
    classes = names or marked
    if not classes:
        raise VitcliError(
            f"`{request.shown}` does not say its classes, and a stream cannot be searched for them",
            "`--set data.classes=FILE` names them, one a line",
        )
    stream = StreamSet(classes, shards, columns, buffer)
    splits = {"train": cast(ImageSet, stream), **_aligned(request, held, stream.classes)}
    marks = [shard.name.encode() for shard in shards] + [name.encode() for name in classes]
    note = f"{request.shown}: a stream of {len(shards):,} files, mixed {buffer:,} images at a time"
    return Source(request.shown, splits, stream.classes, fingerprint(marks), (note,), record)


def _aligned(
    request: DataRequest, held: Mapping[str, ImageSet], classes: tuple[str, ...]
) -> dict[str, ImageSet]:
    try:
        return {name: images.relabelled(classes) for name, images in held.items()}
    except KeyError as error:
        raise VitcliError(
            f"`{request.shown}`: class {error} of the images to test on is none of the stream's",
            "`--set data.classes=FILE` names them all, one a line",
        ) from None


def _local(request: DataRequest) -> tuple[list[Shard], Mapping[str, ImageSet], Path | None]:
    """Shards here, the splits beside train, and a file with class names beside them."""
    path = request.path
    kind = "parquet" if path.suffix == ".parquet" or parquet_files(path) else "tar"
    if kind == "tar" and not path.is_dir() and path.suffix != ".tar":
        return [], {}, None
    notes: list[str] = []
    files = parquet_splits(path, notes) if kind == "parquet" else shard_splits(request.notation)
    train = files.pop("train", [])
    shards = [Shard(printable(file), kind, partial(file.open, "rb")) for file in train]
    read = read_parquet if kind == "parquet" else read_shards
    alone = replace(request, whole=True, labelled=False)
    held = read(alone, files, notes).splits if files else {}
    names = (train[0].parent / name for name in NAMES_FILES) if train else ()
    return shards, held, next((name for name in names if name.is_file()), None)


def _hub_shard(listing: Listing, plan: Plan, name: str) -> Shard:
    from huggingface_hub import HfFileSystem, constants

    if plan.kind == "folder":
        raise VitcliError(
            f"`{listing.repository}` is a folder of pictures, which is no stream",
            "without `data.streaming` it is fetched",
        )
    kind = "parquet" if plan.kind == "parquet" else "tar"
    path = f"datasets/{listing.repository.name}@{listing.commit}/{name}"

    def opened() -> Any:
        system = HfFileSystem(endpoint=constants.ENDPOINT)
        # A tar file is read from front to back, parquet begins at its end.
        return system.open(path, "rb", **({"block_size": 0} if kind == "tar" else {}))

    return Shard(f"{listing.repository}/{name}", kind, opened)


def _remote_shard(url: str) -> Shard:
    def opened() -> Any:
        import fsspec

        return fsspec.open(url, "rb", block_size=0).open()

    return Shard(url, "tar", opened)


def _hub_rest(request: DataRequest, files: Mapping[str, Sequence[str]]) -> Mapping[str, ImageSet]:
    """The splits to test on, fetched."""
    if not files:
        return {}
    return load_hub(replace(request, whole=True, labelled=False), without="train").splits


def _look_into(
    shard: Shard, request: DataRequest
) -> tuple[tuple[str | None, str | None], Sequence[str] | None]:
    """The columns of a stream and, where a parquet file says them, the classes."""
    if shard.kind == "tar":
        return (None, request.settings.label_column), None
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with shard.open() as file:
            schema = pq.ParquetFile(file).schema_arrow
    except (OSError, pa.ArrowException) as error:
        raise VitcliError(f"cannot read `{shard.name}`: {error}", "see to the network") from error
    features = features_of(schema)
    columns = choose_columns(shard.name, schema, features, request.settings)
    return columns, class_names(features.get(columns[1]))

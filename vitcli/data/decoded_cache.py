"""A set of images decoded and shrunk once, and read from then on without any decoding.

A folder: for each split the pixels of all images one after another (`train.pixels`, RGB rows,
mapped into memory and so shared by all processes), an index (`train.index`), and `stored.json`,
which is written last: without it the set is not finished, and the same command goes on where it
stopped.

Storing a set of images: each is decoded and shrunk once; `stored.py` says what is written.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image

from vitcli.data.image_set import ImageSet, Pixels, Request, Source
from vitcli.data.labels import make_source
from vitcli.data.prefetch import map_in_order
from vitcli.decode import ImageError, open_image
from vitcli.errors import VitcliError, printable
from vitcli.files import replacing, write_text
from vitcli.progress import Quiet, Watcher

FORMAT = 1
DESCRIPTION = "stored.json"
PLAN = "storing.json"
# A row for each image; one that could not be read has no height.
INDEX = np.dtype(
    [
        ("offset", "<i8"),
        ("height", "<i4"),
        ("width", "<i4"),
        ("label", "<i4"),
        ("crc32", "<u4"),
    ]
)
REMAKE = "remove the folder and store the set again"


def is_stored(folder: Path) -> bool:
    """Whether the folder is a stored set, finished or not."""
    return (folder / DESCRIPTION).is_file() or (folder / PLAN).is_file()


def read_index(folder: Path, split: str) -> Any:
    """(n,) rows of INDEX; a last row that was cut off is left out."""
    file = folder / f"{split}.index"
    content = file.read_bytes()
    return np.frombuffer(content[: len(content) // INDEX.itemsize * INDEX.itemsize], dtype=INDEX)


def ends(index: Any) -> Any:
    """(n,) where the pixels of each row end."""
    return index["offset"] + 3 * index["height"].astype(np.int64) * index["width"]


def targets_file(folder: Path, split: str) -> Path:
    return folder / f"{split}.targets"


class PixelStore:
    """Images of one split, mapped into memory; each is verified when it is first read.

    Args:
        folder: of the stored set.
        split: which one.
        index: (n,) of INDEX, readable images only.
    """

    ready = True  # decoded already: nothing is gained by keeping copies

    def __init__(self, folder: Path, split: str, index: Any) -> None:
        self.name = f"{split} of {printable(folder)}"
        self.path = folder / f"{split}.pixels"
        self.index = index
        self._verified = np.zeros(len(index), dtype=bool)
        self._pixels: Any = None

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pixels": None}  # a map is opened anew in another process

    def content(self, row: int) -> Image.Image:
        return Image.fromarray(self.pixels(row))

    def pixels(self, row: int) -> Pixels:
        """(Y, X, 3): a view of the file, which cannot be written to.

        Raises:
            ImageError: they are not those that were stored.
        """
        if self._pixels is None:
            # Slices of a `memmap` are objects of its kind, which cost more than the slice.
            self._pixels = np.memmap(self.path, dtype=np.uint8, mode="r").view(np.ndarray)
        offset, height, width, _, crc = self.index[row].item()
        content = self._pixels[offset : offset + 3 * height * width]
        if not self._verified[row]:
            if zlib.crc32(content) != crc:
                raise ImageError(self.describe(row), "its stored pixels have changed", REMAKE)
            self._verified[row] = True
        shaped: Pixels = content.reshape(height, width, 3)
        return shaped

    def describe(self, row: int) -> str:
        return f"image {row} of {self.name}"


def load_stored(request: Request) -> Source:
    """A folder that `vitcli patchify DATA --out DIR` wrote.

    Raises:
        VitcliError: it is not finished, or damaged.
    """
    folder, shown = request.path, request.shown
    if not (folder / DESCRIPTION).is_file():
        raise VitcliError(
            f"`{shown}` is a set that was not stored to its end",
            "the same `vitcli patchify DATA --out` goes on where it stopped",
        )
    try:
        described = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        if described["format"] > FORMAT:
            raise VitcliError(f"`{shown}` was stored by a newer vitcli", "update vitcli")
        classes, splits = described["classes"], described["splits"]
        several = bool(described.get("multi_label"))  # not in sets of the first version
        digests, side = described["index"], int(described["side"])
    except (ValueError, KeyError, TypeError) as error:
        raise VitcliError(f"`{shown}/{DESCRIPTION}` is damaged: {error}", REMAKE) from None
    sets = {}
    left_out = 0
    for name in splits:
        index = _checked_index(folder, name, str(digests.get(name)))
        good = index[index["height"] > 0]
        left_out += len(index) - len(good)
        store = PixelStore(folder, name, good)
        targets = _read_targets(folder, name, (len(index), len(classes))) if several else None
        targets = None if targets is None else targets[index["height"] > 0]
        labels = good["label"].astype(np.int64)
        sets[name] = ImageSet(name, classes, labels, store, targets=targets)
    notes = [f"{shown}: stored from {described['source']}, shorter sides up to {side} pixels"]
    if left_out:
        notes.append(f"{shown}: {left_out:,} images that could not be read are not in it")
    parts = [str(described["fingerprint"]).encode(), str(side).encode()]
    return make_source(request, sets, parts, notes)


def _read_targets(folder: Path, split: str, shape: tuple[int, int]) -> Pixels:
    """(n, K) uint8: the labels of images that have several."""
    file = targets_file(folder, split)
    try:
        return np.fromfile(file, dtype=np.uint8).reshape(shape)
    except (OSError, ValueError):
        raise VitcliError(f"`{printable(file)}` is gone or damaged", REMAKE) from None


def _checked_index(folder: Path, split: str, digest: str) -> Any:
    """The index of a split, which must be the one that was written and fit its pixels."""
    shown = printable(folder / f"{split}.index")
    try:
        index = read_index(folder, split)
        size = (folder / f"{split}.pixels").stat().st_size
    except OSError as error:
        raise VitcliError(f"cannot read `{shown}`: {error.strerror}", REMAKE) from None
    if hashlib.sha256(index.tobytes()).hexdigest() != digest:
        raise VitcliError(f"`{shown}` is damaged", REMAKE)
    if len(index) and int(ends(index).max()) != size:
        raise VitcliError(f"`{printable(folder / split)}.pixels` is cut off or changed", REMAKE)
    return index


LOCK = ".lock"
SYNC_IMAGES = 4096  # after so many, what is written is on the disk and survives a power cut


@dataclass(frozen=True)
class Stored:
    """What `store_set` wrote.

    Args:
        images: split -> how many can be read.
        bytes: of the whole folder.
        broken: a line for each image that could not be read and was left out.
    """

    images: Mapping[str, int]
    bytes: int
    broken: tuple[str, ...]


def store_set(
    source: Source,
    out: Path,
    *,
    side: int,
    workers: int | None = None,
    watch: Watcher | None = None,
) -> Stored:
    """Decode every image once and keep it with a shorter side of at most `side` pixels.

    Aspect ratios stay, so that random crops afterwards are those of the originals; smaller images
    stay as they are. Stopped in the middle, the same call goes on where it was; when all is there,
    it does nothing.

    Args:
        source: the data, split as it is to be used.
        out: a new or empty folder, or one where this was stopped.
        side: pixels; what an evaluation resizes to before its crop is the natural choice, because
            then it finds the same pixels as in the originals.
        workers: threads; None takes one a core.

    Raises:
        VitcliError: something else lies at `out`, or another process writes there; the disk is
            full.
    """
    watch, workers = watch or Quiet(), workers or os.cpu_count() or 1
    plan = {
        "format": FORMAT,
        "side": side,
        "classes": list(source.classes),
        "splits": {name: len(images) for name, images in source.splits.items()},
        "source": source.notation,
        "fingerprint": source.fingerprint,
        "multi_label": source.multi_label,
    }
    done = _read_plan(out / DESCRIPTION)
    if {key: done.get(key) for key in plan} == plan:
        watch.note(f"{printable(out)}: stored already, nothing to do")
        kept, broken = _look_through(source, out)[:2]
    else:
        _begin(out, plan)
        with _alone(out):
            kept, broken = _store(source, out, side, workers, watch, plan)
    size = sum(file.stat().st_size for file in out.iterdir())
    return Stored(kept, size, tuple(broken))


def _store(
    source: Source, out: Path, side: int, workers: int, watch: Watcher, plan: dict[str, Any]
) -> tuple[dict[str, int], list[str]]:
    """Write what is missing: (split -> images that can be read, a line for each other one)."""
    total = sum(len(images) for images in source.splits.values())
    before = sum(_rows_done(out, name) for name in source.splits)
    if before:
        watch.note(f"going on at image {before:,} of {total:,}")
    try:
        with watch.progress("store", total, before) as bar:
            for name, images in source.splits.items():
                if images.targets is not None:
                    with replacing(targets_file(out, name)) as temporary:
                        images.targets.tofile(temporary)
                with Writer(out, name) as writer:
                    rest = range(writer.rows, len(images))
                    for image in map_in_order(partial(shrink, images, side), rest, workers):
                        writer.add(image, int(images.labels[writer.rows]))
                        bar.advance()
        kept, broken, digests = _look_through(source, out)
    except OSError as error:
        raise VitcliError(
            f"cannot write `{printable(out)}`: {error.strerror or error}",
            "free some space; the same command then goes on where this stopped",
        ) from error
    write_text(out / DESCRIPTION, json.dumps({**plan, "index": digests}, indent=1) + "\n")
    (out / PLAN).unlink(missing_ok=True)
    return kept, broken


def _look_through(source: Source, out: Path) -> tuple[dict[str, int], list[str], dict[str, str]]:
    """Split -> images that can be read; a line for each other; split -> hash of its index."""
    kept, digests = {}, {}
    broken: list[str] = []
    for name, images in source.splits.items():
        index = read_index(out, name)
        kept[name] = int((index["height"] > 0).sum())
        digests[name] = hashlib.sha256(index.tobytes()).hexdigest()
        broken += [_why(images, int(row)) for row in np.flatnonzero(index["height"] == 0)]
    return kept, broken, digests


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keep other processes from appending to the same files; a killed one holds nothing."""
    lock = FileLock(out / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise VitcliError(
            f"another process is storing into `{printable(out)}`",
            "wait for it, or take another place",
        ) from None
    except OSError as error:
        raise VitcliError(
            f"cannot write `{printable(out)}`: {error.strerror}", "take another place"
        ) from None
    try:
        yield
    finally:
        (out / LOCK).unlink(missing_ok=True)
        lock.release()


def _read_plan(file: Path) -> dict[str, Any]:
    """What a set was begun or finished as; empty where that cannot be read."""
    try:
        begun = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return begun if isinstance(begun, dict) else {}


def _begin(out: Path, plan: dict[str, Any]) -> None:
    """Make the folder, or see that it is this very set that was begun there."""
    shown = printable(out)
    if (out / DESCRIPTION).is_file():
        raise VitcliError(f"`{shown}` is another finished set", "take another place, or remove it")
    if (out / PLAN).is_file():
        if _read_plan(out / PLAN) != plan:
            raise VitcliError(
                f"in `{shown}` another set was begun, or the same one otherwise",
                "take another place, or remove it",
            )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise VitcliError(f"`{shown}` is there already and not empty", "take another place")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VitcliError(
            f"cannot make `{shown}`: {error.strerror}", "take another place"
        ) from None
    write_text(out / PLAN, json.dumps(plan))


class Writer:
    """Appends images to one split; what was written before an interruption stays."""

    def __init__(self, out: Path, split: str) -> None:
        self.rows = _rows_done(out, split)
        index = read_index(out, split)[: self.rows] if self.rows else np.empty(0, INDEX)
        self.end = int(ends(index).max(initial=0))
        self.pixels = _opened_at(out / f"{split}.pixels", self.end)
        self.index = _opened_at(out / f"{split}.index", self.rows * INDEX.itemsize)
        self.since = 0

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *raised: object) -> None:
        try:
            self._sync()
        finally:
            self.pixels.close()
            self.index.close()

    def add(self, image: Pixels | None, label: int) -> None:
        """The next image (height, width, 3), or None for one that cannot be read."""
        row = np.zeros((), dtype=INDEX)
        row["offset"], row["label"] = self.end, label
        if image is not None:
            content = image.tobytes()
            row["height"], row["width"] = image.shape[:2]
            row["crc32"] = zlib.crc32(content)
            self.pixels.write(content)
            self.end += len(content)
        self.index.write(row.tobytes())
        self.rows += 1
        self.since += 1
        if self.since >= SYNC_IMAGES:
            self._sync()

    def _sync(self) -> None:
        """Pixels first: an index row on the disk means that its pixels are there too."""
        for file in (self.pixels, self.index):
            file.flush()
            os.fsync(file.fileno())
        self.since = 0


def _opened_at(path: Path, size: int) -> BinaryIO:
    """The file, cut or made to `size` bytes, to be appended to."""
    file = path.open("ab")
    file.truncate(size)
    return file


def _rows_done(folder: Path, split: str) -> int:
    """Rows whose pixels are on the disk as well."""
    if not (folder / f"{split}.index").is_file():
        return 0
    pixels = folder / f"{split}.pixels"
    size = pixels.stat().st_size if pixels.is_file() else 0
    short = np.flatnonzero(ends(index := read_index(folder, split)) > size)
    return int(short[0]) if len(short) else len(index)


def shrink(images: ImageSet, side: int, index: int) -> Pixels | None:
    """(height, width, 3) with a shorter side of at most `side`; None where it cannot be read."""
    try:
        with open_image(images.content(index), name=images.describe(index)) as picture:
            image = picture.whole()
            shorter = min(image.size)
            if shorter > side:
                size = [max(1, int(side * length / shorter)) for length in image.size]
                image = image.resize((size[0], size[1]), Image.Resampling.BICUBIC)
            return np.asarray(image)
    except ImageError:
        return None


def _why(images: ImageSet, index: int) -> str:
    try:
        images.read(index)
    except ImageError as error:
        return f"{error.name}: {error.reason}"
    return f"{images.describe(index)}: it could not be read when the set was stored"

"""Decode a dataset once and write it to a folder, for `readers/decoded.py` to read.

The files of a split only grow, and an interrupted call continues behind the last whole image.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from PIL import Image

from vitcli.data.image_set import ImageSet, Pixels
from vitcli.data.prefetch import map_in_order
from vitcli.data.readers.decoded import (
    DESCRIPTION,
    FORMAT,
    INDEX,
    PLAN,
    REMAKE,
    pixel_ends,
    read_index,
    targets_file,
)
from vitcli.data.source import Source
from vitcli.data.split_record import content_key, image_keys
from vitcli.decode import ImageError, open_image
from vitcli.errors import VitcliError, counted, printable
from vitcli.files import (
    exclusive,
    file_checksum,
    make_folder,
    read_json,
    remove_leftovers,
    replacing,
    seal,
    unseal,
    write_text,
)
from vitcli.pixels import PixelFormat, Window
from vitcli.progress import Quiet, Watcher

LOCK = ".lock"
KEY_BYTES = 8
SYNC_IMAGES = 4096  # images between two flushes to the disk, which survive a power cut
OTHER_FOLDER = "choose another folder, or remove this one"


@dataclass(frozen=True)
class DecodedCache:
    """The result of `write_decoded`.

    Attributes:
        images: split -> readable images.
        bytes: size of the folder.
        broken: a line for each image that was skipped because it cannot be read.
    """

    images: Mapping[str, int]
    bytes: int
    broken: tuple[str, ...]


def write_decoded(
    source: Source,
    out: Path,
    *,
    side: int,
    window: Window | None = None,
    workers: int | None = None,
    watch: Watcher | None = None,
) -> DecodedCache:
    """Decode every image once and store it with a shorter side of at most `side` pixels.

    Aspect ratios stay, so that later random crops have the distribution of the originals; smaller
    images keep their size. An interrupted call continues, and a finished one does nothing.

    Args:
        source: the data, with the splits to store.
        out: a new or empty folder, or one where this call was interrupted.
        side: pixels. With the size that evaluation resizes to before its crop, evaluation sees the
            same pixels as with the originals.
        window: see `Preprocess`; it is recorded, and models that train on the folder take it.
        workers: threads; None uses one per core.
        watch: receives progress.

    Raises:
        VitcliError: `out` holds something else, another process writes there, or the disk is full.
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
        **({"window": list(window)} if window else {}),  # older versions write none
    }
    if not _is_complete(out, plan) or _work_files(out, source):
        _check_folder(out)
        make_folder(out)
        with exclusive(out / LOCK, partial(_busy, out)):
            if not _is_complete(out, plan):  # by another process, before the lock
                _start(out, plan)
                counts, broken = _write_missing(source, out, workers, watch, plan)
                return DecodedCache(counts, _num_bytes(out), tuple(broken))
            _remove_work_files(out, source)
    watch.note(f"{printable(out)}: already complete, nothing to do")
    counts, broken = _summary(source, out)[:2]
    return DecodedCache(counts, _num_bytes(out), tuple(broken))


def _num_bytes(out: Path) -> int:
    return sum(file.stat().st_size for file in out.iterdir() if file.name != LOCK)


def _is_complete(out: Path, plan: dict[str, Any]) -> bool:
    finished = _read_plan(out / DESCRIPTION)
    return {key: finished.get(key) for key in {*plan, "window"}} == {"window": None, **plan}


def _busy(out: Path) -> VitcliError:
    return VitcliError(
        f"another process is writing to `{printable(out)}`", "wait for it, or choose another folder"
    )


def _write_missing(
    source: Source, out: Path, workers: int, watch: Watcher, plan: dict[str, Any]
) -> tuple[dict[str, int], list[str]]:
    """Write what is missing: (split -> readable images, a line for each other image)."""
    total = sum(len(images) for images in source.splits.values())
    try:
        intact = {name: _intact_rows(out, images) for name, images in source.splits.items()}
        before = sum(intact.values())
        if lost := sum(_complete_rows(out, name) for name in source.splits) - before:
            watch.warn(
                f"{counted(lost, 'stored image is', 'stored images are')} made again: a stored "
                "image is damaged, or its original has changed since"
            )
        if before:
            watch.note(f"continuing at image {before:,} of {total:,}")
        with watch.progress("store", total, before) as bar:
            for name, images in source.splits.items():
                if images.targets is not None:
                    with replacing(targets_file(out, name)) as temporary:
                        images.targets.tofile(temporary)
                with PixelWriter(out, name, intact[name]) as writer:
                    small = partial(_decode_small, images, plan["side"], plan.get("window"))
                    rest = range(writer.rows, len(images))
                    for image, key in map_in_order(small, rest, workers):
                        writer.add(image, int(images.labels[writer.rows]), key)
                        bar.advance()
        counts, broken, digests = _summary(source, out)
    except OSError as error:
        raise VitcliError(
            f"cannot write `{printable(out)}`: {error.strerror or error}",
            "free some space and repeat the command, which continues where it stopped",
        ) from error
    about: dict[str, Any] = {**plan, "index": digests}
    if source.multi_label:
        about["targets"] = {name: file_checksum(targets_file(out, name)) for name in source.splits}
    write_text(out / DESCRIPTION, json.dumps(seal(about), indent=1) + "\n")
    _remove_work_files(out, source)
    return counts, broken


def _work_files(out: Path, source: Source) -> list[Path]:
    """The files that a killed call has left; a finished dataset has none."""
    files = [out / LOCK, out / PLAN, *(_originals_file(out, name) for name in source.splits)]
    return [file for file in files if file.is_file()]


def _remove_work_files(out: Path, source: Source) -> None:
    """Remove what only an unfinished dataset needs; the caller holds the lock."""
    for file in _work_files(out, source):
        if file.name != LOCK:
            file.unlink(missing_ok=True)
    for name in (DESCRIPTION, PLAN, *(targets_file(out, split).name for split in source.splits)):
        remove_leftovers(out / name)


def _summary(source: Source, out: Path) -> tuple[dict[str, int], list[str], dict[str, str]]:
    """(split -> readable images, a line for each other image, split -> hash of its index)."""
    counts, digests = {}, {}
    broken: list[str] = []
    for name, images in source.splits.items():
        index = read_index(out, name)
        counts[name] = int((index["height"] > 0).sum())
        digests[name] = hashlib.sha256(index.tobytes()).hexdigest()
        broken += [_read_error(images, int(row)) for row in np.flatnonzero(index["height"] == 0)]
    return counts, broken, digests


def _read_plan(file: Path) -> dict[str, Any]:
    """The plan of a started or finished dataset; empty if it cannot be read."""
    try:
        plan = read_json(file)
        return unseal(plan) if isinstance(plan, dict) else {}
    except (OSError, ValueError):
        return {}


def _check_folder(out: Path) -> None:
    """Check that `out` is new, empty or holds a dataset of `write_decoded`."""
    ours = (out / DESCRIPTION).is_file() or (out / PLAN).is_file()
    if ours or not out.exists():
        return
    if not out.is_dir() or any(entry.name != LOCK for entry in out.iterdir()):
        raise VitcliError(
            f"`{printable(out)}` exists already and is not empty", "choose another folder"
        )


def _start(out: Path, plan: dict[str, Any]) -> None:
    """Write the plan, or check that the same dataset was started there."""
    shown = printable(out)
    if (out / DESCRIPTION).is_file():
        if not _read_plan(out / DESCRIPTION):
            raise VitcliError(f"`{shown}/{DESCRIPTION}` is damaged", REMAKE)
        raise VitcliError(f"`{shown}` holds another decoded dataset", OTHER_FOLDER)
    if (out / PLAN).is_file():
        if _read_plan(out / PLAN) != plan:
            raise VitcliError(
                f"`{shown}` holds an unfinished dataset with other data or settings", OTHER_FOLDER
            )
        return
    write_text(out / PLAN, json.dumps(plan))


class PixelWriter:
    """Appends images to the files of one split, behind the images that are complete."""

    def __init__(self, out: Path, split: str, rows: int) -> None:
        self.rows = rows
        index = read_index(out, split)[: self.rows] if self.rows else np.empty(0, INDEX)
        self.end = int(pixel_ends(index).max(initial=0))
        self.pixels = _open_at(out / f"{split}.pixels", self.end)
        self.index = _open_at(out / f"{split}.index", self.rows * INDEX.itemsize)
        self.originals = _open_at(_originals_file(out, split), self.rows * KEY_BYTES)
        self.unsynced = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        try:
            self._sync()
        finally:
            for file in (self.pixels, self.originals, self.index):
                file.close()

    def add(self, image: Pixels | None, label: int, key: int) -> None:
        """Append an image (Y, X, 3), or None for one that cannot be read.

        `key` is the hash of the original's content.
        """
        row = np.zeros((), dtype=INDEX)
        row["offset"], row["label"] = self.end, label
        if image is not None:
            content = image.tobytes()
            row["height"], row["width"] = image.shape[:2]
            row["crc32"] = zlib.crc32(content)
            self.pixels.write(content)
            self.end += len(content)
        self.originals.write(key.to_bytes(KEY_BYTES, "little"))
        self.index.write(row.tobytes())
        self.rows += 1
        self.unsynced += 1
        if self.unsynced >= SYNC_IMAGES:
            self._sync()

    def _sync(self) -> None:
        """Flush pixels before the index, so that a row in the index always has its pixels."""
        for file in (self.pixels, self.originals, self.index):
            file.flush()
            os.fsync(file.fileno())
        self.unsynced = 0


def _open_at(path: Path, size: int) -> BinaryIO:
    """The file, truncated to `size` bytes and open for appending."""
    file = path.open("ab")
    file.truncate(size)
    return file


def _complete_rows(folder: Path, split: str) -> int:
    """The number of leading index rows whose pixels are complete."""
    if not (folder / f"{split}.index").is_file():
        return 0
    pixels = folder / f"{split}.pixels"
    size = pixels.stat().st_size if pixels.is_file() else 0
    index = read_index(folder, split)
    short = np.flatnonzero(pixel_ends(index) > size)
    return int(short[0]) if len(short) else len(index)


def _intact_rows(folder: Path, images: ImageSet) -> int:
    """The number of leading rows of an unfinished split that are as this call would write them."""
    rows = min(_complete_rows(folder, images.name), len(images))
    if not rows:
        return 0
    index = read_index(folder, images.name)[:rows]
    good = index["label"] == images.labels[:rows]
    good &= index["offset"] == np.concatenate([[0], pixel_ends(index)[:-1]])
    good &= (index["height"] >= 0) & (index["width"] >= 0)
    originals = _originals_file(folder, images.name)
    if originals.is_file():  # an earlier version did not write it
        stored = np.fromfile(originals, dtype="<u8", count=rows)
        good[len(stored) :] = False
        now = image_keys(images.subset(np.arange(len(stored))))["content"]
        good[: len(stored)] &= stored == now
    rows = int(good.argmin()) if not good.all() else rows
    with (folder / f"{images.name}.pixels").open("rb") as file:
        for number in range(rows):
            size = 3 * int(index["height"][number]) * int(index["width"][number])
            if size and zlib.crc32(file.read(size)) != index["crc32"][number]:
                return number
    return rows


def _originals_file(folder: Path, split: str) -> Path:
    """Of an unfinished dataset: for each row the hash of the content of its original."""
    return folder / f"{split}.originals"


def _decode_small(
    images: ImageSet, side: int, window: Window | None, index: int
) -> tuple[Pixels | None, int]:
    """(Y, X, 3) with a shorter side of at most `side`, and the hash of the original's content.

    The image is None if it cannot be read.
    """
    return _decoded(images, side, window, index), content_key(images)(index)


def _decoded(images: ImageSet, side: int, window: Window | None, index: int) -> Pixels | None:
    try:
        content, wanted = images.content(index), PixelFormat("RGB", window)
        with open_image(content, wanted, name=images.describe(index)) as picture:
            image = picture.whole()
            shorter = min(image.size)
            if shorter > side:
                size = [max(1, int(side * length / shorter)) for length in image.size]
                image = image.resize((size[0], size[1]), Image.Resampling.BICUBIC)
            return np.asarray(image)
    except ImageError:
        return None


def _read_error(images: ImageSet, index: int) -> str:
    try:
        images.read(index)
    except ImageError as error:
        return f"{error.name}: {error.reason}"
    return f"{images.describe(index)}: it could not be read when the dataset was stored"

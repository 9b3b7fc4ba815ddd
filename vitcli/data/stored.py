"""A set of images decoded and shrunk once, and read from then on without any decoding.

A folder: for each split the pixels of all images one after another (`train.pixels`, RGB rows,
mapped into memory and so shared by all processes), an index (`train.index`), and `stored.json`,
which is written last: without it the set is not finished, and the same command goes on where it
stopped.
"""

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitcli.data.assemble import make_source
from vitcli.data.sets import ImageSet, Pixels, Request, Source
from vitcli.decode import ImageError
from vitcli.errors import VitcliError, printable

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

"""Datasets that `vitcli patchify DATA --out FOLDER` has decoded: nothing is decoded again.

The folder holds, for each split, the pixels of all images (`train.pixels`: RGB rows, memory-mapped
and so shared by all processes), an index (`train.index`), the multi-hot targets if there are any
(`train.targets`), and `stored.json`, which is written last. `data/decoded_cache.py` writes it.
Every file has a checksum: `stored.json` those of itself, of the index and of the targets, and the
index one for the pixels of each image.
"""

import hashlib
import zlib
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, InstanceOf, Strict, ValidationError

from vitcli.data.image_set import ImageSet, Integers, Pixels
from vitcli.data.source import DataRequest, Source, make_source
from vitcli.decode import ImageError
from vitcli.errors import VitcliError, counted, printable
from vitcli.files import file_checksum, read_json, unseal
from vitcli.pixels import Window

FORMAT = 1
NEWER = range(FORMAT + 1, 1000)
DESCRIPTION = "stored.json"  # of a finished dataset
PLAN = "storing.json"  # of an unfinished dataset
# One row per image; an image that could not be read has height 0.
INDEX = np.dtype(
    [
        ("offset", "<i8"),
        ("height", "<i4"),
        ("width", "<i4"),
        ("label", "<i4"),
        ("crc32", "<u4"),
    ]
)
REMAKE = "remove the folder and run `vitcli patchify DATA --out FOLDER` again"


class Description(BaseModel):
    """The content of `stored.json`."""

    model_config = ConfigDict(strict=True)

    format: int
    side: int
    # Not `str`, which refuses names that are not UTF-8.
    classes: Annotated[list[InstanceOf[str]], Field(min_length=1)]
    splits: dict[Annotated[str, Field(pattern=r"^\w+$")], int]  # split -> images
    index: dict[str, str]  # split -> SHA-256 of its index
    # split -> `checksum` of its multi-hot targets; None from earlier versions
    targets: dict[str, str] | None = None
    source: InstanceOf[str]
    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]+$")]
    multi_label: bool = False  # the first version has no such key
    # JSON has lists only; without one, no image had wide samples.
    window: Annotated[tuple[float, float] | None, Strict(False)] = None


def is_decoded(folder: Path) -> bool:
    """True for a finished or unfinished decoded dataset."""
    return (folder / DESCRIPTION).is_file() or (folder / PLAN).is_file()


def read_index(folder: Path, split: str) -> Any:
    """(n,) rows of INDEX, without a truncated last row."""
    content = (folder / f"{split}.index").read_bytes()
    return np.frombuffer(content[: len(content) // INDEX.itemsize * INDEX.itemsize], dtype=INDEX)


def pixel_ends(index: Any) -> Any:
    """(n,) the offset behind the pixels of each row."""
    return index["offset"] + 3 * index["height"].astype(np.int64) * index["width"]


def targets_file(folder: Path, split: str) -> Path:
    return folder / f"{split}.targets"


class PixelStore:
    """The memory-mapped images of one split; the first read of each verifies its checksum.

    Args:
        folder: the decoded dataset.
        split: the split.
        index: (n,) of INDEX, readable images only.
        window: the window that the pixels were made with; see `Preprocess`.
    """

    is_decoded = True

    def __init__(self, folder: Path, split: str, index: Any, window: Window | None = None) -> None:
        self.window = window
        self.name = f"{split} of {printable(folder)}"
        self.path = folder / f"{split}.pixels"
        self.index = index
        self._verified = np.zeros(len(index), dtype=bool)
        self._pixels: Any = None

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pixels": None}  # each process maps the file itself

    def content(self, row: int) -> Image.Image:
        return Image.fromarray(self.pixels(row))

    def pixels(self, row: int) -> Pixels:
        """(Y, X, 3): a read-only view of the file.

        Raises:
            ImageError: the checksum does not match.
        """
        if self._pixels is None:
            # As a plain array, because a slice of a `memmap` costs more than the copy behind it.
            self._pixels = np.memmap(self.path, dtype=np.uint8, mode="r").view(np.ndarray)
        offset, height, width, _, crc = self.index[row].item()
        content = self._pixels[offset : offset + 3 * height * width]
        if not self._verified[row]:
            if zlib.crc32(content) != crc:
                raise ImageError(self.describe(row), "its stored pixels have changed", REMAKE)
            self._verified[row] = True
        shaped: Pixels = content.reshape(height, width, 3)
        return shaped

    def content_keys(self, rows: Integers) -> Integers:
        """Checksums."""
        return self.index["crc32"][rows].astype(np.int64)

    def describe(self, row: int) -> str:
        return f"image {row} of {self.name}"


def load_decoded(request: DataRequest) -> Source:
    """A folder that `vitcli patchify DATA --out FOLDER` wrote.

    Raises:
        VitcliError: it is unfinished or damaged.
    """
    folder, shown = request.path, request.shown
    if not (folder / DESCRIPTION).is_file():
        raise VitcliError(
            f"`{shown}` is an unfinished decoded dataset",
            "repeat its `vitcli patchify DATA --out FOLDER`, which continues where it stopped",
        )
    try:
        values = read_json(folder / DESCRIPTION)
        if isinstance(values, dict) and values.get("format") in NEWER:
            raise VitcliError(f"a newer vitcli has written `{shown}`", "update vitcli")
        described = Description.model_validate(
            unseal(values) if isinstance(values, dict) else values
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise VitcliError(
            f"`{shown}/{DESCRIPTION}` is damaged: {'.'.join(map(str, first['loc']))}: "
            f"{first['msg']}",
            REMAKE,
        ) from None
    except ValueError as error:
        raise VitcliError(f"`{shown}/{DESCRIPTION}` is damaged: {error}", REMAKE) from None
    classes = described.classes
    sets = {}
    skipped = 0
    for name in described.splits:
        index = _checked_index(folder, name, described.index.get(name, ""))
        readable = index["height"] > 0
        skipped += int((~readable).sum())
        targets = None
        if described.multi_label:
            digest = None if described.targets is None else described.targets.get(name, "")
            targets = _read_targets(folder, name, (len(index), len(classes)), digest)[readable]
        store = PixelStore(folder, name, index[readable], described.window)
        labels = store.index["label"].astype(np.int64)
        if len(labels) and not -1 <= labels.min() <= labels.max() < len(classes):
            raise VitcliError(
                f"`{shown}/{DESCRIPTION}` is damaged: it names too few classes", REMAKE
            )
        sets[name] = ImageSet(name, classes, labels, store, targets=targets)
    notes = [f"{shown}: decoded from {described.source}, shorter side at most {described.side} px"]
    if skipped:
        lost = counted(skipped, "unreadable image was", "unreadable images were")
        notes.append(f"{shown}: {lost} skipped")
    parts = [described.fingerprint.encode(), str(described.side).encode()]
    if described.window is not None:
        low, high = described.window
        notes.append(f"{shown}: made with the window [{low:g}, {high:g}]")
        parts.append(str(described.window).encode())
    return make_source(request, sets, parts, notes)


def _read_targets(folder: Path, split: str, shape: tuple[int, int], digest: str | None) -> Pixels:
    """(n, K) uint8: multi-hot targets."""
    file = targets_file(folder, split)
    try:
        if digest not in (None, file_checksum(file)):
            raise ValueError
        return np.fromfile(file, dtype=np.uint8).reshape(shape)
    except (OSError, ValueError):
        raise VitcliError(f"`{printable(file)}` is missing or damaged", REMAKE) from None


def _checked_index(folder: Path, split: str, digest: str) -> Any:
    """The index of a split, after a check of its hash and of the size of the pixel file."""
    shown = printable(folder / f"{split}.index")
    try:
        index = read_index(folder, split)
        size = (folder / f"{split}.pixels").stat().st_size
    except OSError as error:
        raise VitcliError(f"cannot read `{shown}`: {error.strerror}", REMAKE) from None
    if hashlib.sha256(index.tobytes()).hexdigest() != digest:
        raise VitcliError(f"`{shown}` is damaged", REMAKE)
    if len(index) and int(pixel_ends(index).max()) != size:
        raise VitcliError(f"`{printable(folder / split)}.pixels` is truncated or changed", REMAKE)
    return index

"""Which images a model was trained on, and which were held out: a record that travels with weights.

A flat folder has no splits of its own. When images are added or removed, another seeded split would
be drawn, and images that the model was trained on would count as test images. The record tells the
images apart by their content, so it holds after files were added, removed, renamed or moved.
"""

import base64
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitcli.data.image_set import ImageSet
from vitcli.data.prefetch import default_workers, map_in_order
from vitcli.data.source import Source, fingerprint
from vitcli.decode import ImageError
from vitcli.errors import counted
from vitcli.hub.split_names import SPLITS
from vitcli.progress import Watcher

# 12 bytes per image: 100,000 images add 1.6 MB of base64 to the header of the weights. A seed and a
# rule would be smaller, but they give another split as soon as an image is added.
KEY = np.dtype([("content", "<u8"), ("path", "<u4")])
MAX_IMAGES = 200_000  # above, reading every image before training would take minutes
# Of a larger file, evenly spaced blocks are hashed. Compressed images are different almost
# everywhere after an edit, and a set of large photographs need not be read twice.
WHOLE_BYTES, NUM_BLOCKS, BLOCK_BYTES = 2**17, 16, 2**13
KEYS_PER_JOB = 32  # a job of a thread takes longer than the hash of a small image
NEW = -1

Keys = NDArray[Any]


def image_keys(images: ImageSet) -> Keys:
    """(n,) of KEY: hashes of the content and of the path, or of the row, of each image."""
    key = content_key(images)

    def keys_from(start: int) -> list[tuple[int, int]]:
        rows = range(start, min(start + KEYS_PER_JOB, len(images)))
        return [(key(row), _hash(images.path_name(row), 4)) for row in rows]

    starts = range(0, len(images), KEYS_PER_JOB)
    parts = map_in_order(keys_from, starts, default_workers() or 1)
    return np.array(list(chain.from_iterable(parts)), dtype=KEY)


def content_key(images: ImageSet) -> Callable[[int], int]:
    """A function that hashes the content of the image with an index."""

    def key(index: int) -> int:
        try:
            return _hash(_sample(images.content(index)), 8)
        except (OSError, ImageError):  # there is no content that could be compared
            return _hash(b"unreadable" + images.path_name(index), 8)

    return key


def trained_on(record: "SplitRecord | None") -> Callable[[Any], bool]:
    """A function that tells whether a path is a training image of `record`, by its content."""
    known: Any = () if record is None else record.splits.get("train", np.empty(0, KEY))["content"]
    contents = set(map(int, known))

    def is_known(path: Any) -> bool:
        try:
            return bool(contents) and _hash(_sample(Path(path)), 8) in contents
        except (OSError, TypeError, ValueError):  # a URL, or an image in memory
            return False

    return is_known


def _sample(content: Any) -> bytes:
    """The bytes that stand for an image: all of a small one, and blocks of a large one."""
    if isinstance(content, Image.Image):
        return repr((content.mode, content.size)).encode() + content.tobytes()
    if isinstance(content, bytes):
        return content
    with Path(content).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= WHOLE_BYTES:
            return file.read()
        blocks = [str(size).encode()]
        for start in np.linspace(0, size - BLOCK_BYTES, NUM_BLOCKS).astype(int).tolist():
            file.seek(start)
            blocks.append(file.read(BLOCK_BYTES))
        return b"".join(blocks)


def _hash(content: bytes, size: int) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=size).digest(), "little")


@dataclass(frozen=True, eq=False)
class SplitRecord:
    """The images of each split of a training run, as arrays of KEY."""

    splits: Mapping[str, Keys]

    def to_json(self) -> dict[str, str]:
        """Split -> base64 of its sorted keys."""
        ordered = {name: np.sort(keys, order=("content", "path")) for name, keys in self._items()}
        return {name: base64.b64encode(keys.tobytes()).decode() for name, keys in ordered.items()}

    @classmethod
    def from_json(cls, values: Any) -> "SplitRecord | None":
        """The record that `to_json` described; None for None.

        Raises:
            ValueError: the values are not those of `to_json`.
        """
        if values is None:
            return None
        if not isinstance(values, dict) or not values.keys() <= set(SPLITS):
            raise ValueError("the record of the training images has unknown splits")
        decoded = {name: base64.b64decode(text, validate=True) for name, text in values.items()}
        return cls({name: np.frombuffer(content, dtype=KEY) for name, content in decoded.items()})

    def _items(self) -> Iterator[tuple[str, Keys]]:
        return ((name, self.splits[name]) for name in SPLITS if name in self.splits)

    def roles(self, keys: Keys, own_split: str | None = None) -> NDArray[np.int64]:
        """(n,) the split that each image was in, as an index into `SPLITS`; `NEW` for none.

        An edited image keeps the split of its path. Of an image with copies in several splits, the
        data's own split decides, else the path; without both it counts as trained on.

        Args:
            own_split: the split that the data put the images into.
        """
        role = np.full(len(keys), NEW)
        copies = np.zeros(len(keys), dtype=np.int64)
        for name, known in reversed(list(self._items())):  # training images last: they win
            found = np.isin(keys["content"], known["content"])
            role[found] = SPLITS.index(name)
            copies += found
        for name, known in self._items():
            if own_split is None:
                same = np.isin(_joined(keys), _joined(known))
            else:
                same = np.isin(keys["content"], known["content"]) & (name == own_split)
            role[same & (copies > 1)] = SPLITS.index(name)
        if not (role >= 0).any():
            return role  # other data, whose files may have the same names
        edited = role == NEW
        for name, known in reversed(list(self._items())):
            role[edited & np.isin(keys["path"], known["path"])] = SPLITS.index(name)
        return role


def _joined(keys: Keys) -> NDArray[np.uint64]:
    """One number per (content, path)."""
    joined: NDArray[np.uint64] = keys["content"] ^ (keys["path"].astype(np.uint64) << np.uint64(32))
    return joined


@dataclass(frozen=True)
class KnownImages:
    """The images of a dataset by what the training run of a model did with them.

    Attributes:
        source: the images in the splits of the run. Images that the run did not have are in none.
        roles: split of the data -> (n,) index into `SPLITS` for each image, or `NEW`.
    """

    source: Source
    roles: Mapping[str, NDArray[np.int64]]

    @property
    def held_out(self) -> str | None:
        """The split of the run that is reported: `test`, else `validation`, else None."""
        return next((name for name in ("test", "validation") if name in self.source.splits), None)

    def count(self, role: int) -> int:
        """The number of images with this role."""
        return sum(int((roles == role).sum()) for roles in self.roles.values())

    def describe(self, record: SplitRecord) -> str:
        """The held-out images, and how many are new or missing, as one line."""
        name = self.held_out
        assert name is not None
        count, before = len(self.source.splits[name]), len(record.splits[name])
        line = f"{count:,} images that the model's training run held out ({name} split)"
        if new := self.count(NEW):
            line += f"; {counted(new, 'new image is', 'new images are')} in no split"
        if lost := before - count:
            line += f"; {counted(lost, 'held-out image', 'held-out images')} of the run"
            line += f" {'is' if lost == 1 else 'are'} missing"
        return line


def known_images(source: Source, record: SplitRecord | None, watch: Watcher) -> KnownImages | None:
    """Compare the images of `source` with those of a training run; None without its record.

    Args:
        source: opened with `whole=True`.
    """
    total = sum(len(images) for images in source.splits.values())
    if record is None or total > MAX_IMAGES or not isinstance(source.split(*SPLITS), ImageSet):
        return None
    roles, has_splits = {}, set(source.splits) != {"train"}
    hashes = [source.fingerprint.encode()]
    with watch.progress("images compared with the training images", total) as bar:
        for origin, images in source.splits.items():
            keys = image_keys(images)
            roles[origin] = record.roles(keys, origin if has_splits else None)
            hashes.append(keys["content"].tobytes() + roles[origin].tobytes())
            bar.advance(len(images))
    splits = {}
    for number, name in enumerate(SPLITS):
        members = {origin: np.flatnonzero(found == number) for origin, found in roles.items()}
        # They lie in one split of the data, unless files were moved between its splits.
        origin = max(members, key=lambda origin: len(members[origin]))
        if len(members[origin]):
            images = source.splits[origin]
            whole = name == origin and len(members[origin]) == len(images)
            splits[name] = images if whole else images.subset(members[origin], name)
    return KnownImages(replace(source, splits=splits, fingerprint=fingerprint(hashes)), roles)

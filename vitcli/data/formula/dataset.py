"""`builtin:formula`: pictures drawn from formulas, as many as wanted, with nothing to download.

A scene is a ground and some objects in front of it; the main one names the class. Learning from
drawn pictures follows Kataoka et al. (2020), the closed contours Takashima et al. (2023). A picture
is a pure function of (seed, index, size); a view of it also of the run's seed, the epoch and the
view.
"""

from collections.abc import Mapping
from copy import copy
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitcli.data.formula.scenes import draw
from vitcli.data.formula.shapes import CLASSES, Draws, Integers, hash_keys
from vitcli.data.image_set import ImageSet
from vitcli.data.source import DataRequest, Source, fingerprint
from vitcli.decode import Mode

NUM_TRAIN = 1_000_000
NUM_TEST = 2_048
# So many pictures are drawn at once: their planes stay in the processor's cache.
CHUNK = 32


class FormulaSet:
    """One split, with the interface of `ImageSet`, and `batch` for training.

    Args:
        name: the split.
        seed: of the scenes; another seed is other pictures of the same 64 classes.
        size: how many there are. No pixels are kept: a million cost their numbers and labels.
        image_size: (Y, X) of the pictures that `read` gives.
    """

    targets: None = None  # each picture has one class

    def __init__(
        self,
        name: str = "train",
        seed: int = 0,
        size: int = NUM_TRAIN,
        image_size: tuple[int, int] = (64, 64),
    ) -> None:
        self.name = name
        self.seed = seed
        self.image_size = image_size
        self.classes = CLASSES
        self._scenes: Integers = np.arange(size, dtype=np.int64)
        self.labels: Integers = self._scenes % len(CLASSES)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int, mode: Mode = "RGB") -> Image.Image:
        """The picture, seen straight on."""
        images, _ = draw(self.seed, self._scenes[[index]], self.image_size, None)
        return Image.fromarray(images[0].transpose(1, 2, 0)).convert(mode)

    def describe(self, index: int) -> str:
        """What errors and tables call the picture."""
        return f"formula {self._scenes[index]} of seed {self.seed}"

    def label_name(self, index: int) -> str:
        """The class of a picture."""
        return self.classes[int(self.labels[index])]

    def class_counts(self) -> Integers:
        """(64,) how many pictures there are of each class."""
        return np.bincount(self.labels, minlength=len(self.classes)).astype(np.int64)

    def subset(self, indices: Integers, name: str | None = None) -> "FormulaSet":
        """Some of the pictures, in the order given, under the same classes."""
        part = copy(self)
        part.name = name or self.name
        part._scenes, part.labels = self._scenes[indices], self.labels[indices]
        return part

    def batch(
        self,
        epochs: Integers,
        indices: Integers,
        image_size: tuple[int, int],
        seed: int,
        views: int = 1,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(B,) epochs, (B,) indices -> (V*B, 3, Y, X) uint8 views, (B,) labels, and factors.

        Each picture of the batch is the same in whatever company it is drawn.

        Args:
            image_size: (Y, X), at least 8 each; not tied to that of `read`.
            seed: of cameras and colours; the scenes have the set's own.
            views: of each scene, view-major.

        Returns:
            Images, labels, and what the generator knows of each view: `background` and `texture`
            (of the main object; V*B, indices into TEXTURES, a background after the last is a
            plain scene's), `objects` (V*B, beside the main one), `coverage` (V*B, 8, 8: the share
            of each cell that shows the main object) and `visible` (V*B, 8, 8: 0 for ground, else
            1 + the class of what is in front).
        """
        scenes = self._scenes[indices]
        parts = []
        for view in range(views):
            for start in range(0, len(scenes), CHUNK):
                part = slice(start, start + CHUNK)
                keys = hash_keys(seed, 2, scenes[part], epochs[part], view)
                parts.append(draw(self.seed, scenes[part], image_size, Draws(keys)))
        images = torch.from_numpy(np.concatenate([images for images, _ in parts]))
        factors = {
            name: torch.from_numpy(np.concatenate([factors[name] for _, factors in parts]))
            for name in parts[0][1]
        }
        return images, torch.from_numpy(self.labels[indices]), factors


def load_formula(request: DataRequest) -> Source:
    """`builtin:formula`: a million scenes of 64 shapes to train on, 2,048 others to test."""
    seed = request.settings.split_seed
    train = FormulaSet("train", 2 * seed, NUM_TRAIN)
    test = FormulaSet("test", 2 * seed + 1, NUM_TEST)
    splits = cast(Mapping[str, ImageSet], {"train": train, "test": test})
    mark = fingerprint([b"formula-1", str(seed).encode()])
    notes = (f"{request.notation}: drawn as needed, {len(CLASSES)} shapes, seed {seed}",)
    return Source(request.notation, splits, CLASSES, mark, notes)

"""`builtin:formula`: images rendered from formulas, in any number, without a download.

A scene is a background with objects in front of it; the main object defines the class. Pretraining
on rendered images follows Kataoka et al. (2020), the closed contours Takashima et al. (2023). An
image is a pure function of (seed, index, size), and in training also of the run's seed and the
epoch.
"""

from collections.abc import Mapping
from copy import copy
from typing import Literal, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitcli.data.formula.scenes import render_scenes
from vitcli.data.formula.shapes import CLASSES, Integers, KeyedUniform, hash_keys
from vitcli.data.image_set import ImageSet
from vitcli.data.source import DataRequest, Source, fingerprint
from vitcli.pixels import Mode, PixelFormat, as_format

NUM_TRAIN = 1_000_000
NUM_TEST = 2_048
CHUNK = 32  # images rendered at once, few enough for the processor's cache


class FormulaSet:
    """One split with the interface of `ImageSet`, and `batch` for training.

    Args:
        name: the split.
        seed: seed of the scenes; another seed gives other images of the same 64 classes.
        size: number of images. No pixels are stored.
        image_size: (Y, X) of the images that `read` returns.
    """

    kind: Literal["batches"] = "batches"
    targets: None = None  # each image has one class

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

    def read(self, index: int, mode: Mode | PixelFormat = "RGB") -> Image.Image:
        """The image without augmentation."""
        images = render_scenes(self.seed, self._scenes[[index]], self.image_size, None)
        return Image.fromarray(images[0].transpose(1, 2, 0)).convert(as_format(mode).mode)

    def describe(self, index: int) -> str:
        """The name of an image in errors and tables."""
        return f"formula {self._scenes[index]} of seed {self.seed}"

    def label_name(self, index: int) -> str:
        """The class of an image."""
        return self.classes[int(self.labels[index])]

    def class_counts(self) -> Integers:
        """(64,) images per class."""
        return np.bincount(self.labels, minlength=len(self.classes)).astype(np.int64)

    def subset(self, indices: Integers, name: str | None = None) -> "FormulaSet":
        """The images at `indices`, in this order, with the same classes."""
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
    ) -> tuple[Tensor, Tensor]:
        """(B,) epochs, (B,) indices -> (B, 3, Y, X) uint8 images, (B,) labels.

        An image has the same pixels in every batch.

        Args:
            epochs, indices: (B,) the epoch and the index of each image.
            image_size: (Y, X) in px; independent of that of `read`.
            seed: seed of viewpoints and colour changes; the set has its own seed for the scenes.
        """
        scenes = self._scenes[indices]
        parts = []
        for start in range(0, len(scenes), CHUNK):
            part = slice(start, start + CHUNK)
            keys = hash_keys(seed, 2, scenes[part], epochs[part], 0)  # 0: the only view of a scene
            parts.append(render_scenes(self.seed, scenes[part], image_size, KeyedUniform(keys)))
        return torch.from_numpy(np.concatenate(parts)), torch.from_numpy(self.labels[indices])


def load_formula(request: DataRequest) -> Source:
    """`builtin:formula`: a million training scenes of 64 shapes and 2,048 test scenes."""
    seed = request.settings.split_seed
    train = FormulaSet("train", 2 * seed, NUM_TRAIN)
    test = FormulaSet("test", 2 * seed + 1, NUM_TEST)
    splits = cast(Mapping[str, ImageSet], {"train": train, "test": test})
    mark = fingerprint([b"formula-1", str(seed).encode()])
    notes = (f"{request.notation}: rendered on demand, {len(CLASSES)} shapes, seed {seed}",)
    return Source(request.notation, splits, CLASSES, mark, notes)

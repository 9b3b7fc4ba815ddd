"""Planning without data: the header of a recipe says what data it was made for."""

import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vitcli.config.recipe import header
from vitcli.data.image_set import Integers
from vitcli.data.source import Source
from vitcli.errors import VitcliError
from vitcli.progress import Watcher

DEFAULT_CLASSES = 1000
# Number of classes of the datasets in headers. JFT's "18k classes": section 4.1 of the paper.
DATASET_CLASSES = {
    "JFT-300M": 18_291,
    "ImageNet-21k": 21_843,
    "ImageNet-1k": 1000,
    "CIFAR-10": 10,
    "CIFAR-100": 100,
    "Oxford-IIIT Pets": 37,
    "Flowers-102": 102,
}


@dataclass(frozen=True)
class RecipeHeader:
    """The comment header of a recipe; None for what it does not say."""

    data: str | None = None
    images: int | None = None
    classes: int | None = None
    model: str | None = None

    @classmethod
    def parse(cls, text: str) -> "RecipeHeader":
        """Read `Data: ImageNet-1k, 1,281,167 training images` and `Cost: … for B/16`."""
        lines = header(text)
        found = re.match(r"(.+?), ([\d,]+) training images", lines.get("Data", ""))
        data = found[1] if found else None
        model = re.search(r" for (\S+/\d+)$", lines.get("Cost", ""))
        return cls(
            data=data,
            images=int(found[2].replace(",", "")) if found else None,
            classes=DATASET_CLASSES.get(data or ""),
            model=model[1] if model else None,
        )


class NoiseSet:
    """A training set of `size` noise images, in place of data that are not here.

    It has the part of `ImageSet` that a training loop uses.
    """

    kind: Literal["batches"] = "batches"
    targets = None
    name = "train"

    def __init__(self, size: int, classes: tuple[str, ...], channels: int = 3) -> None:
        self.classes = classes
        self.channels = channels
        self._size = size
        self.labels: Integers = np.zeros(1, dtype=np.int64)

    def __len__(self) -> int:
        return self._size

    def describe(self, index: int) -> str:
        """The name of an image in errors."""
        return f"noise image {index}"

    def class_counts(self) -> Integers:
        """(K,) images per class, as if all classes had equally many."""
        return np.full(len(self.classes), max(1, self._size // len(self.classes)), np.int64)

    def batch(
        self,
        epochs: Integers,
        indices: Integers,
        image_size: tuple[int, int],
        seed: int,
    ) -> tuple[Tensor, Tensor]:
        """(B,) indices -> (B, C, Y, X) uint8 noise, (B,) labels."""
        generator = torch.Generator().manual_seed(int(indices[0]))
        shape = (len(indices), self.channels, *image_size)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        return images, torch.zeros(len(indices), dtype=torch.long)


def noise_source(
    recipe: str,
    stated: RecipeHeader,
    images: int | None,
    classes: int | None,
    channels: int,
    watch: Watcher,
    regression: bool = False,
) -> Source:
    """A source of noise, of the size that the user or the header gives.

    Raises:
        VitcliError: neither gives the number of training images.
    """
    count = images if images is not None else stated.images
    if count is None:
        raise VitcliError(
            f"recipe `{recipe}` has no data, and its header has no number of training images",
            "add DATA after the recipe, or `--images N`",
        )
    known = classes if classes is not None else stated.classes or DEFAULT_CLASSES
    known = 1 if regression else known
    of = "" if regression else f" of {known:,} classes"
    data = f" ({stated.data})" if stated.data and images is None else ""
    watch.note(f"no DATA given: planned for {count:,} training images{of}{data}")
    names = tuple(str(number) for number in range(known))
    splits: Any = {"train": NoiseSet(count, names, channels)}
    return Source(stated.data or "no data", splits, names, "")

"""What a recipe's header states: the data it was made for, how many images, which model."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitcli.config.recipe import header
from vitcli.data.image_set import Integers
from vitcli.data.source import Source
from vitcli.errors import VitcliError
from vitcli.progress import Watcher

# Classes of data sets that headers name. JFT's "18k classes" are those of the paper's section 4.1.
CLASSES = {
    "JFT-300M": 18_291,
    "ImageNet-21k": 21_843,
    "ImageNet-1k": 1000,
    "CIFAR-10": 10,
    "CIFAR-100": 100,
    "Oxford-IIIT Pets": 37,
    "Flowers-102": 102,
}


@dataclass(frozen=True)
class Stated:
    """The header, understood; None for what it does not say."""

    data: str | None = None
    images: int | None = None
    classes: int | None = None
    model: str | None = None

    @classmethod
    def of(cls, text: str) -> "Stated":
        """Of a recipe's whole text: `ImageNet-1k, 1,281,167 training images`, `… for B/16`."""
        said = header(text)
        found = re.match(r"(.+?), ([\d,]+) training images", said.get("Data", ""))
        data = found[1] if found else None
        model = re.search(r" for (\S+/\d+)$", said.get("Cost", ""))
        return cls(
            data=data,
            images=int(found[2].replace(",", "")) if found else None,
            classes=CLASSES.get(data or ""),
            model=model[1] if model else None,
        )


class BlankSet:
    """A training set that is not here: so many images, of which batches of noise are made.

    It has the interface of `ImageSet` that a training loop needs.
    """

    targets = None
    name = "train"
    is_blank = True  # `[augment]` is not checked against it

    def __init__(self, size: int, classes: tuple[str, ...], channels: int = 3) -> None:
        self.classes = classes
        self.channels = channels
        self._size = size
        self.labels: Integers = np.zeros(1, dtype=np.int64)

    def __len__(self) -> int:
        return self._size

    def describe(self, index: int) -> str:
        """What errors call an image."""
        return f"image {index} of a set that is not here"

    def batch(
        self,
        epochs: Integers,
        indices: Integers,
        image_size: tuple[int, int],
        seed: int,
        views: int = 1,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(B,) indices -> (V*B, 3, Y, X) uint8 noise, (B,) labels, and nothing known of them."""
        generator = torch.Generator().manual_seed(int(indices[0]))
        shape = (views * len(indices), self.channels, *image_size)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        return images, torch.zeros(len(indices), dtype=torch.long), {}


def blank_source(
    recipe: str,
    stated: Stated,
    images: int | None,
    classes: int | None,
    channels: int,
    watch: Watcher,
) -> Source:
    """The data of a recipe that are not here, by what its header or the user says of them.

    Args:
        recipe: its name, for messages.
        images: training images; None takes the header's.
        classes: None takes those of the data that the header names, else 1,000.

    Raises:
        VitcliError: nobody says how many images there are.
    """
    count = images if images is not None else stated.images
    if count is None:
        raise VitcliError(
            f"recipe `{recipe}` names no data, and its header no number of images",
            "add DATA after it, or `--images N`",
        )
    known = classes if classes is not None else stated.classes
    if known is None:
        known = 1000
    told = [f"{count:,} training images", f"{known:,} classes"]
    what = f" ({stated.data})" if stated.data and images is None else ""
    watch.note(f"no DATA given: planned for {' of '.join(told)}{what}")
    names = tuple(str(number) for number in range(known))
    splits: Any = {"train": BlankSet(count, names, channels)}
    return Source(stated.data or "no data", splits, names, "")

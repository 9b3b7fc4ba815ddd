"""Pictures whose pixels lie decoded in memory or in a mapped file: a part of one is a slice."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitcli.decode import Box, Picture
from vitcli.pixel_modes import Mode


class ArrayPicture:
    """Decoded pixels, to take a part of: what `Picture` is for a file.

    Args:
        array: (Y, X) or (Y, X, 3) uint8, upright; it is only read.
        name: what errors call it.

    Attributes:
        size: (width, height).
    """

    def __init__(self, array: NDArray[np.uint8], name: str) -> None:
        self.array = array
        self.name = name
        self.mode: Mode = "L" if array.ndim == 2 else "RGB"
        self.size = (array.shape[1], array.shape[0])

    def whole(self) -> Image.Image:
        """The picture, as its own copy."""
        return Image.fromarray(self.array)

    def part(self, box: Box, at_least: tuple[int, int] | None = None) -> Image.Image:
        """What is in `box` = (left, top, right, bottom); there is one scale only."""
        return Image.fromarray(self.pixels(box))

    def pixels(self, box: Box, at_least: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        """(Y, X) or (Y, X, 3): what is in `box`, as its own copy."""
        left, top, right, bottom = box
        return np.array(self.array[top:bottom, left:right])


AnyPicture = Picture | ArrayPicture

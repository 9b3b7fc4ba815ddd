"""Several views of each image at test time, whose probabilities are averaged."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vitcli.decode import ImageInput, read_image
from vitcli.errors import VitcliError
from vitcli.preprocess import Preprocess, as_array

KINDS = ("flip", "crops:5", "crops:10")


@dataclass(frozen=True)
class Views:
    """What the model is shown of an image.

    `flip` is the image and its mirror image; `crops:5` the middle and the four corners of the
    resized picture, `crops:10` these and their mirror images (Krizhevsky et al., 2012). The first
    view is always the one of `preprocess` itself. A model's work, and so the time, is `count` times
    that of one view.

    Args:
        preprocess: the evaluation transform.
        kind: None for one view.

    Raises:
        VitcliError: no such kind, or a transform that leaves nothing to crop.
    """

    preprocess: Preprocess
    kind: str | None = None

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS:
            raise VitcliError(
                f"`--tta {self.kind}` is not known", f"it is one of {', '.join(KINDS)}"
            )
        if self.crops > 1 and self._shows_all():
            raise VitcliError(
                f"`--tta {self.kind}`: with `preprocess.resize_mode={self.preprocess.resize_mode}` "
                "the model sees the whole picture, so all crops are the same",
                "`--tta flip`, or `--set preprocess.resize_mode=crop`",
            )

    @property
    def crops(self) -> int:
        """Crops of a picture, mirror images not counted."""
        return 5 if self.kind in ("crops:5", "crops:10") else 1

    @property
    def mirrored(self) -> bool:
        """Whether each crop is shown as its mirror image as well."""
        return self.kind in ("flip", "crops:10")

    @property
    def count(self) -> int:
        """Views of an image."""
        return self.crops * (2 if self.mirrored else 1)

    def pixels(self, source: ImageInput) -> Tensor:
        """A path, file, bytes or picture -> (crops, C, Y, X) uint8.

        Raises:
            ImageError: it cannot be read.
        """
        if self.crops == 1:
            return self.preprocess.pixels(source)[None]  # (1, C, Y, X)
        image = read_image(source, self.preprocess.mode)
        whole, (rows, columns) = self.preprocess.resize(image), self.preprocess.image_size
        right, bottom = whole.width - columns, whole.height - rows
        corners = [(0, 0), (right, 0), (0, bottom), (right, bottom)]
        pictures = [self.preprocess.fit(image)]
        pictures += [whole.crop((x, y, x + columns, y + rows)) for x, y in corners]
        parts = map(torch.from_numpy, map(as_array, pictures))
        return torch.stack(list(parts))  # (crops, C, Y, X)

    def of(self, batch: Tensor) -> list[Tensor]:
        """(B, crops, C, Y, X) uint8 -> `count` times (B, C, Y, X), the first the plain one."""
        shown = list(batch.unbind(1))
        return [view for x in shown for view in ([x, x.flip(-1)] if self.mirrored else [x])]

    def _shows_all(self) -> bool:
        mode, size = self.preprocess.resize_mode, self.preprocess.image_size
        if mode == "squash":
            side = self.preprocess.resize_size
            return self.preprocess.crop_fraction == 1.0 if side is None else (side, side) == size
        return mode == "pad"

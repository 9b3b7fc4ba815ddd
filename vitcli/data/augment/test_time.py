"""Test-time augmentation: several views of an image, whose probabilities are averaged."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vitcli.data.augment.transform import mirrored_places
from vitcli.decode import read_image
from vitcli.errors import VitcliError, unknown
from vitcli.preprocess import AnyImage, Preprocess, as_array, as_image_input

SHIFT = 1 / 32  # of a side: airbench (Jordan, 2024) shifts CIFAR images by one pixel


@dataclass(frozen=True)
class Views:
    """The views of one value of `--tta`.

    Attributes:
        crops: per image: the centre and the corners.
        shifts: each crop is also moved by `SHIFT`, towards two opposite corners.
        mirrored: each of these has a mirror image as well.
    """

    crops: int = 1
    shifts: bool = False
    mirrored: bool = False

    @property
    def count(self) -> int:
        """Views per image."""
        return self.crops * (3 if self.shifts else 1) * (2 if self.mirrored else 1)

    def of_crop(self, x: Tensor) -> Iterator[Tensor]:
        """(B, C, Y, X) -> the views of this crop, of the same shape; the plain view first.

        One at a time: six copies of a batch of large images would take gigabytes.
        """
        for direction in (0, 1, -1) if self.shifts else (0,):
            moved = shifted(x, direction) if direction else x
            yield moved
            if self.mirrored:
                yield moved.flip(-1)


ONE_VIEW = Views()
VIEWS = {
    "flip": Views(mirrored=True),
    "shifts": Views(shifts=True, mirrored=True),
    "crops:5": Views(crops=5),
    "crops:10": Views(crops=5, mirrored=True),
}
# `evaluate` reads its images already cropped, so it makes the views of one crop only.
EVALUATION_VIEWS = tuple(name for name, views in VIEWS.items() if views.crops == 1)


def shifted(x: Tensor, direction: int) -> Tensor:
    """(B, C, Y, X) moved by `SHIFT` along the diagonal, mirrored at the border."""
    rows, columns = (
        torch.from_numpy(mirrored_places(side, direction * max(1, round(side * SHIFT))))
        for side in x.shape[2:]
    )
    return x.index_select(2, rows.to(x.device)).index_select(3, columns.to(x.device))


def views_of(kind: str | None) -> Views:
    """The views of a value of `--tta`; None is the plain view.

    Raises:
        VitcliError: the value is unknown.
    """
    if kind is None:
        return ONE_VIEW
    if kind not in VIEWS:
        raise unknown("`--tta` value", kind, VIEWS)
    return VIEWS[kind]


def check_views(kind: str | None, fits: bool) -> None:
    """Check the views of an evaluation.

    Args:
        kind: one of `EVALUATION_VIEWS`, or None for the plain view.
        fits: the evaluation fits a temperature or thresholds, which are stored with the weights.

    Raises:
        VitcliError: another kind, or a fit on several views, which a plain prediction lacks.
    """
    if views_of(kind).crops > 1:
        raise VitcliError(
            f"`--tta {kind}`: `evaluate` shows one crop of each image",
            " or ".join(f"`--tta {name}`" for name in EVALUATION_VIEWS),
        )
    if kind is not None and fits:
        raise VitcliError(
            "`--tta` cannot be combined with `--calibrate` or `--thresholds`: the values are "
            "stored with the weights and must suit a single view",
            "remove `--tta`",
        )


@dataclass(frozen=True)
class TTATransform:
    """The views of an image that the model receives at test time.

    `flip` is the image and its mirror image. `shifts` is the image, the image moved by `SHIFT`
    towards two opposite corners, and their mirror images. `crops:5` is the centre and the four
    corners of the resized image, `crops:10` these and their mirror images (Krizhevsky et al.,
    2012). The first view is always that of `preprocess`. The time grows with `count`.

    Args:
        preprocess: the evaluation transform.
        kind: a key of `VIEWS`, or None for one view.

    Raises:
        VitcliError: the kind is unknown, or `preprocess` leaves nothing to crop.
    """

    preprocess: Preprocess
    kind: str | None = None

    def __post_init__(self) -> None:
        if self.of_image.crops > 1 and self._shows_whole_image():
            raise VitcliError(
                f"`--tta {self.kind}`: with `preprocess.resize_mode={self.preprocess.resize_mode}` "
                "the model sees the whole image, so all crops are the same",
                "use `--tta flip`, or `--set preprocess.resize_mode=crop`",
            )

    @property
    def of_image(self) -> Views:
        """The views of each image."""
        return views_of(self.kind)

    @property
    def count(self) -> int:
        """Views per image."""
        return self.of_image.count

    def pixels(self, source: AnyImage) -> Tensor:
        """An image, as `Preprocess` takes it -> (crops, C, Y, X) uint8.

        Raises:
            ImageError: the image cannot be read.
        """
        if self.of_image.crops == 1:
            return self.preprocess.pixels(source)[None]  # (1, C, Y, X)
        image = read_image(as_image_input(source), self.preprocess.pixel_format)
        resized, (rows, columns) = self.preprocess.resize(image), self.preprocess.image_size
        right, bottom = resized.width - columns, resized.height - rows
        corners = [(0, 0), (right, 0), (0, bottom), (right, bottom)]
        crops = [self.preprocess.fit(image)]
        crops += [resized.crop((x, y, x + columns, y + rows)) for x, y in corners]
        return torch.stack([torch.from_numpy(as_array(crop)) for crop in crops])  # (crops, C, Y, X)

    def views(self, batch: Tensor) -> list[Tensor]:
        """(B, crops, C, Y, X) uint8 -> `count` tensors (B, C, Y, X), the plain view first."""
        return [view for crop in batch.unbind(1) for view in self.of_image.of_crop(crop)]

    def _shows_whole_image(self) -> bool:
        mode, size = self.preprocess.resize_mode, self.preprocess.image_size
        if mode == "squash":
            side = self.preprocess.resize_size
            return self.preprocess.crop_fraction == 1.0 if side is None else (side, side) == size
        return mode == "pad"

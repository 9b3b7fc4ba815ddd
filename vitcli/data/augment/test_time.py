"""Test-time augmentation: several views of an image, whose probabilities are averaged."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vitcli.decode import read_image
from vitcli.errors import VitcliError, unknown
from vitcli.preprocess import AnyImage, Preprocess, as_array, as_image_input

VIEWS = {"flip": (1, True), "crops:5": (5, False), "crops:10": (5, True)}  # crops, mirrored


def check_views(kind: str | None, fits: bool) -> None:
    """Check the views of an evaluation.

    Args:
        kind: `flip`, or None for the plain view.
        fits: the evaluation fits a temperature or thresholds, which are stored with the weights.

    Raises:
        VitcliError: another kind, or a fit on mirror images, which a plain prediction lacks.
    """
    if kind is not None and kind not in VIEWS:
        raise unknown("`--tta` value", kind, VIEWS)
    if kind not in (None, "flip"):
        raise VitcliError(
            f"`--tta {kind}`: `evaluate` averages mirror images only", "use `--tta flip`"
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

    `flip` is the image and its mirror image. `crops:5` is the centre and the four corners of the
    resized image, `crops:10` these and their mirror images (Krizhevsky et al., 2012). The first
    view is always that of `preprocess`. The time grows in proportion to `count`.

    Args:
        preprocess: the evaluation transform.
        kind: a key of `VIEWS`, or None for one view.

    Raises:
        VitcliError: the kind is unknown, or `preprocess` leaves nothing to crop.
    """

    preprocess: Preprocess
    kind: str | None = None

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in VIEWS:
            raise unknown("`--tta` value", self.kind, VIEWS)
        if self.crops > 1 and self._shows_whole_image():
            raise VitcliError(
                f"`--tta {self.kind}`: with `preprocess.resize_mode={self.preprocess.resize_mode}` "
                "the model sees the whole image, so all crops are the same",
                "use `--tta flip`, or `--set preprocess.resize_mode=crop`",
            )

    @property
    def crops(self) -> int:
        """Crops per image, without mirror images."""
        return VIEWS[self.kind][0] if self.kind else 1

    @property
    def mirrored(self) -> bool:
        """Each crop has a mirror image as a second view."""
        return VIEWS[self.kind][1] if self.kind else False

    @property
    def count(self) -> int:
        """Views per image."""
        return self.crops * (2 if self.mirrored else 1)

    def pixels(self, source: AnyImage) -> Tensor:
        """An image, as `Preprocess` takes it -> (crops, C, Y, X) uint8.

        Raises:
            ImageError: the image cannot be read.
        """
        if self.crops == 1:
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
        crops = list(batch.unbind(1))
        return [view for x in crops for view in ([x, x.flip(-1)] if self.mirrored else [x])]

    def _shows_whole_image(self) -> bool:
        mode, size = self.preprocess.resize_mode, self.preprocess.image_size
        if mode == "squash":
            side = self.preprocess.resize_size
            return self.preprocess.crop_fraction == 1.0 if side is None else (side, side) == size
        return mode == "pad"

"""The evaluation transform: one object for validation, predict, fewshot, evaluate and export.

Against the references in `shared/reference/preprocessing`: timm's pipelines and Hugging Face's
Pillow ones come out equal to 1e-6. Hugging Face's torchvision backend resizes columns and rows in
the other order and clips bicubic's overshoot in between (mostly one grey level apart, up to 11 on
noise), and it floors the offset of the crop where timm rounds it. big_vision and vit_jax resize
without antialiasing: with `antialias = false` that is met to the pixel (values that are nearly
whole may be cut off one level lower), and vit_jax's evaluation, which keeps fractions of grey
levels, within one level; with antialiasing a shrunk picture is up to 0.9 of -1..1 apart.
big_vision's `resize_small` takes means of areas, which Pillow cannot do: up to 1.3 apart.

A JPEG is decoded whole here, unlike in training. At the smallest scale of at least twice the
resized side, six photographs of 2 to 108 megapixels would come out 0.1 to 1.2 grey levels apart on
average (at most 19), and the probabilities of a ViT-Ti/16 at most 0.01, with the same first class.
"""

from dataclasses import asdict, dataclass, fields, replace
from math import floor, isfinite
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitcli.decode import ImageInput, read_image
from vitcli.errors import VitcliError
from vitcli.pixel_modes import Mode

ResizeMode = Literal["crop", "squash", "pad"]
Interpolation = Literal["bilinear", "bicubic", "nearest", "lanczos"]
CropRounding = Literal["even", "down"]

RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Preprocess:
    """What happens to a picture between the file and the model.

    Args:
        image_size: (Y, X) in pixels that the model reads.
        resize_mode: "crop" keeps the aspect ratio and cuts the middle out; "squash" ignores it;
            "pad" keeps it and fills the rest with the mean colour.
        resize_size: the shorter side before the crop (both sides when squashed), in pixels;
            None takes floor(side / crop_fraction), as timm does.
        crop_fraction: the share of the shorter side that the crop keeps.
        interpolation: Pillow's filter.
        antialias: whether a picture that is shrunk is smoothed first; without it "bilinear" is that
            of TensorFlow, cut off to whole grey levels. "nearest" never is.
        mean, std: a value per channel (or one for all) on the scale 0..1.
        num_channels: 3 (RGB) or 1 (grey).
        crop_rounding: where the middle lies between two pixels: to the "even" one, as torchvision
            and timm have it, or "down", as transformers does.

    Raises:
        VitcliError: a setting is not one of these, or the counts disagree.
    """

    image_size: tuple[int, int]
    resize_mode: ResizeMode = "crop"
    resize_size: int | None = None
    crop_fraction: float = 1.0
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    num_channels: int = 3
    crop_rounding: CropRounding = "even"
    antialias: bool = True

    def __post_init__(self) -> None:
        size = self.image_size
        object.__setattr__(self, "image_size", (int(size[0]), int(size[1])))
        if self.num_channels not in (1, 3):
            raise VitcliError(f"`num_channels` = {self.num_channels}", "it is 1 or 3")
        for name, options in (
            ("resize_mode", get_args(ResizeMode)),
            ("crop_rounding", get_args(CropRounding)),
            ("interpolation", get_args(Interpolation)),
        ):
            if getattr(self, name) not in options:
                raise VitcliError(
                    f"`preprocess.{name}` = {getattr(self, name)!r}",
                    f"it is one of {', '.join(options)}",
                )
        if not self.antialias and self.interpolation == "lanczos":
            raise VitcliError(
                "`preprocess.antialias` = false with `lanczos`", "`bilinear` or `bicubic` can do so"
            )
        if not 0 < self.crop_fraction <= 1:
            raise VitcliError(
                f"`preprocess.crop_fraction` = {self.crop_fraction}", "it lies above 0, up to 1"
            )
        for name in ("mean", "std"):
            values = tuple(float(value) for value in getattr(self, name))
            if len(values) == 1:
                values *= self.num_channels
            if len(values) != self.num_channels:
                raise VitcliError(
                    f"`preprocess.{name}` has {len(values)} values, but there are "
                    f"{self.num_channels} channels",
                    "give one for each channel, or one for all",
                )
            object.__setattr__(self, name, values)
        if not all(map(isfinite, self.mean + self.std)) or min(self.std) <= 0:
            raise VitcliError(
                f"`preprocess.mean` = {self.mean}, `preprocess.std` = {self.std}",
                "finite numbers, and every std above 0",
            )

    @property
    def mode(self) -> Mode:
        """Pillow's mode of the pictures this transform reads."""
        return "L" if self.num_channels == 1 else "RGB"

    def __call__(self, source: ImageInput) -> Tensor:
        """A path, file, bytes or picture -> (C, Y, X) float32, normalised.

        Raises:
            ImageError: it cannot be read.
        """
        return self.normalize(self.pixels(source)[None])[0]  # (C, Y, X)

    def pixels(self, source: ImageInput) -> Tensor:
        """A path, file, bytes or picture -> (C, Y, X) uint8: everything but the normalisation."""
        fitted = self.fit(read_image(source, self.mode))
        return torch.from_numpy(np.ascontiguousarray(as_pixels(fitted)))

    def fit(self, image: Image.Image) -> Image.Image:
        """A picture in `self.mode` -> one of `image_size`: resized, then cropped or padded."""
        if image.size == (self.image_size[1], self.image_size[0]) and self._keeps_size():
            return image
        resized = self.resize(image)
        rows, columns = self.image_size
        whole = floor if self.crop_rounding == "down" else round  # `round` goes to even
        top, left = whole((resized.height - rows) / 2), whole((resized.width - columns) / 2)
        if self.crop_rounding == "even":  # torchvision's: a smaller picture lies over the middle
            top = -((rows - resized.height) // 2) if resized.height < rows else top
            left = -((columns - resized.width) // 2) if resized.width < columns else left
        if top == left == 0 and resized.size == (columns, rows):
            return resized
        if self.resize_mode != "pad":
            return resized.crop((left, top, left + columns, top + rows))
        canvas = Image.new(self.mode, (columns, rows), self._mean_colour())
        # timm's `border`: what cannot be shared evenly goes to the bottom and the right.
        canvas.paste(resized, ((columns - resized.width) // 2, (rows - resized.height) // 2))
        return canvas

    def resize(self, image: Image.Image) -> Image.Image:
        """A picture as it is before the crop (or the padding)."""
        return _resize(image, self._resized_shape(image), self.interpolation, self.antialias)

    def normalize(self, images: Tensor) -> Tensor:
        """(B, C, Y, X) uint8, on any device -> (B, C, Y, X) float32: (x / 255 - mean) / std."""
        mean = torch.tensor(self.mean, device=images.device).view(1, -1, 1, 1)  # (1, C, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(1, -1, 1, 1)  # (1, C, 1, 1)
        # Batches hold the channels of a pixel side by side; here they come apart at no cost.
        scaled = torch.empty(images.shape, device=images.device)
        return torch.div(images, 255, out=scaled).sub_(mean).div_(std)  # (B, C, Y, X)

    def resized_to(self, image_size: tuple[int, int]) -> "Preprocess":
        """The same transform for another model size; the crop keeps its share of the picture."""
        before, after = min(self.image_size), min(image_size)
        side = self.resize_size
        scaled = None if side is None else max(after, floor(side * after / before))
        return replace(self, image_size=image_size, resize_size=scaled)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in a weights file's header."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            VitcliError: a key is unknown or `image_size` is missing.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(values.keys() - known)
        if unknown or "image_size" not in values:
            fault = f"unknown `{unknown[0]}`" if unknown else "`image_size` is missing"
            raise VitcliError(f"preprocessing: {fault}", f"known are {', '.join(sorted(known))}")
        settings: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        return cls(**settings)

    def _keeps_size(self) -> bool:
        """Whether a picture that has the model's size already passes unchanged."""
        if self.resize_mode == "pad":
            return True
        return self.resize_size is None and self.crop_fraction == 1.0

    def _resized_shape(self, image: Image.Image) -> tuple[int, int]:
        """(rows, columns) between resizing and cropping."""
        rows, columns = self.image_size
        if self.resize_mode == "pad":
            scale = min(rows / image.height, columns / image.width)
            return (
                max(1, min(rows, round(image.height * scale))),
                max(1, min(columns, round(image.width * scale))),
            )
        if self.resize_size is not None:
            target = (self.resize_size, self.resize_size)
        else:
            target = (floor(rows / self.crop_fraction), floor(columns / self.crop_fraction))
        if self.resize_mode == "squash":
            return target
        if target[0] == target[1]:  # torchvision's Resize: the longer side is truncated
            short, long = sorted(image.size)
            longer = int(target[0] * long / short)
            return (target[0], longer) if image.height <= image.width else (longer, target[0])
        scale = max(target[0] / image.height, target[1] / image.width)  # timm's ResizeKeepRatio
        return max(rows, round(image.height * scale)), max(columns, round(image.width * scale))

    def _mean_colour(self) -> tuple[int, ...] | int:
        colour = tuple(round(255 * value) for value in self.mean)
        return colour if self.num_channels == 3 else colour[0]


def as_pixels(image: Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A picture in L or RGB -> (C, Y, X) uint8, writable; in memory the channels lie last."""
    array = np.array(image)  # (Y, X) or (Y, X, C)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)  # (C, Y, X)


def _resize(
    image: Image.Image, shape: tuple[int, int], interpolation: str, antialias: bool
) -> Image.Image:
    width, height = shape[1], shape[0]
    if image.size == (width, height):
        return image
    if antialias or interpolation == "nearest":
        return image.resize((width, height), RESAMPLING[interpolation])
    steps = (image.width / width, 0, 0, 0, image.height / height, 0)
    how: Any = RESAMPLING[interpolation]  # not lanczos, which transformations do not have
    return image.transform((width, height), Image.Transform.AFFINE, steps, how)

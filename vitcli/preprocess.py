"""`Preprocess`, the one evaluation transform: image file -> normalised model input.

Validation, predict, fewshot, evaluate and export use it, and it is stored in the weights file.
The steps: decode, resize, crop or pad to the model's size, scale to 0..1, subtract `mean`, divide
by `std`. The rules for sizes and offsets follow these sources:

| rule | source |
| --- | --- |
| shorter side = floor(size / crop_fraction) | timm `transforms_imagenet_eval` |
| longer side truncated to whole pixels | torchvision `Resize` |
| rectangular sizes: scale to cover, both sides rounded | timm `ResizeKeepRatio` |
| crop offset rounded half to even; `down` | torchvision `CenterCrop`; transformers |
| `squash`: each side resized on its own | transformers `ViTImageProcessor`, big_vision |
| `pad`: the odd pixel goes to the bottom and the right | timm, `crop_mode="border"` |
| `antialias = false` | TensorFlow's `tf.image.resize`, used by big_vision and vit_jax |

Differences from the original pipelines, measured on their own outputs:

* timm and transformers with Pillow: equal to 1e-6.
* transformers with torchvision: mostly 1 grey level, up to 11 on noise, because it resizes rows
  first and clips in between. It also rounds the crop offset down.
* big_vision and vit_jax with `antialias = false`: equal, or one grey level lower where a value is
  nearly whole. vit_jax's evaluation keeps fractions of grey levels: within one level.
* big_vision's `resize_small` averages areas, which Pillow cannot do: up to 1.3 on -1..1.

Evaluation decodes a JPEG at full size, unlike training. Decoding at the smallest scale of at least
twice the resized side changed six photographs of 2 to 108 megapixels by 0.1 to 1.2 grey levels on
average (19 at most) and the probabilities of a ViT-Ti/16 by at most 0.01.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import floor, isfinite
from typing import Any, Literal, Self, get_args, get_origin

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vitcli.config.choices import CropRounding, Interpolation, ResizeMode
from vitcli.decode import Box, ImageError, ImageInput, read_image
from vitcli.errors import VitcliError, printable, unknown
from vitcli.files import is_url
from vitcli.pixels import Mode, PixelFormat, Window

AnyImage = ImageInput | NDArray[Any] | Tensor
FETCH_BYTES = 512 << 20  # the largest image file that is downloaded
# Limits on what a weights file may ask for, before memory is taken: 3 and 4 bytes per pixel.
MAX_SIDE, MAX_RESIZED = 8192, 8192**2  # px of a side; pixels of an image before the crop
FETCH_SECONDS = 120.0  # for the whole download

RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
}


def channel_tensor(values: Sequence[float], device: torch.device) -> Tensor:
    """C values -> (1, C, 1, 1) float32 on `device`."""
    # The device fills them in. `torch.tensor` would copy them from the host, and the host would
    # wait until a GPU has finished all earlier work.
    return torch.cat([torch.full((1,), v, device=device) for v in values]).view(1, -1, 1, 1)


@dataclass(frozen=True)
class Preprocess:
    """The evaluation transform of a model.

    Args:
        image_size: (Y, X) of the model's input, in pixels.
        resize_mode: "crop" keeps the aspect ratio and crops the centre, "squash" ignores the
            aspect ratio, "pad" keeps it and fills the rest with the mean colour.
        resize_size: length of the shorter side before the crop (of both sides for "squash"), in
            pixels. None means floor(image_size / crop_fraction).
        crop_fraction: fraction of the shorter side that the crop keeps.
        interpolation: Pillow's resampling filter.
        antialias: smooth an image before it is made smaller. False gives TensorFlow's "bilinear",
            truncated to whole grey levels. It has no effect on "nearest".
        mean, std: one value per channel, or one for all channels, on the scale 0..1.
        num_channels: 3 (RGB) or 1 (greyscale).
        crop_rounding: how half a pixel in the crop offset is rounded: to "even" (torchvision,
            timm) or "down" (transformers).
        window: (low, high), the samples that become black and white in images of 16 bits, 32 bits
            or floats. None: a rule for each image; see `pixels`.
        border: pixels that are cut off each side of an image before anything else.

    Raises:
        VitcliError: a setting has an invalid value.
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
    window: Window | None = None
    border: int = 0

    def __post_init__(self) -> None:
        size = self.image_size
        object.__setattr__(self, "image_size", (int(size[0]), int(size[1])))
        if self.num_channels not in (1, 3):
            raise VitcliError(
                f"`num_channels` is {self.num_channels}", "a model reads 1 channel or 3 channels"
            )
        for field in fields(self):
            value, choices = getattr(self, field.name), get_args(field.type)
            if get_origin(field.type) is Literal and value not in choices:
                raise unknown(f"preprocess.{field.name}", str(value), choices)
        if not self.antialias and self.interpolation == "lanczos":
            raise VitcliError(
                "`preprocess.antialias=false` is not possible with `lanczos`",
                "set `preprocess.interpolation` to `bilinear` or `bicubic`",
            )
        for side in self.image_size:
            _check_side("image_size", side, 1)
        _check_side("border", self.border, 0)
        if self.resize_size is not None:
            _check_side("resize_size", self.resize_size, 1)
        if not (isinstance(self.crop_fraction, int | float) and 0 < self.crop_fraction <= 1):
            raise VitcliError(
                f"`preprocess.crop_fraction` is {self.crop_fraction}",
                "give a number above 0 and up to 1",
            )
        if self.resize_size is None and max(self.image_size) / self.crop_fraction >= MAX_SIDE + 1:
            raise VitcliError(
                f"`preprocess.crop_fraction` = {self.crop_fraction:g} resizes images to "
                f"{max(self.image_size) / self.crop_fraction:.4g} px before the crop",
                f"give a larger fraction; images are resized to {MAX_SIDE} px at most",
            )
        for name in ("mean", "std"):
            values = tuple(float(value) for value in getattr(self, name))
            if len(values) == 1:
                values *= self.num_channels
            if len(values) != self.num_channels:
                raise VitcliError(
                    f"`preprocess.{name}` has {len(values)} values, but there are "
                    f"{self.num_channels} channels",
                    "give one value per channel, or one value for all channels",
                )
            object.__setattr__(self, name, values)
        if not all(map(isfinite, self.mean + self.std)) or min(self.std) <= 0:
            raise VitcliError(
                f"`preprocess.mean` is {self.mean}, `preprocess.std` is {self.std}",
                "give finite numbers; every std must be above 0",
            )
        if self.window is not None:
            object.__setattr__(self, "window", _checked_window(self.window))

    def check_batch(self, batch_size: int) -> None:
        """Raise a VitcliError if a batch cannot fit into the memory of this machine."""
        pixels = self.num_channels * self.image_size[0] * self.image_size[1]
        memory = psutil.virtual_memory().total
        if 5 * batch_size * pixels > memory:  # uint8 and float32
            rows, columns = self.image_size
            raise VitcliError(
                f"a batch of {batch_size:,} images of {columns}x{rows} px takes "
                f"{5 * batch_size * pixels / 2**30:,.0f} GiB, and this machine has "
                f"{memory / 2**30:,.0f} GiB",
                "use a smaller `--batch-size` or image size",
            )

    @property
    def mode(self) -> Mode:
        """Pillow's mode of the images that this transform reads."""
        return "L" if self.num_channels == 1 else "RGB"

    @property
    def pixel_format(self) -> PixelFormat:
        """The pixels that this transform reads from a file."""
        return PixelFormat(self.mode, self.window)

    def __call__(self, source: AnyImage) -> Tensor:
        """A path, URL, file, bytes, Pillow image, array or tensor -> (C, Y, X), normalised.

        Arrays and tensors are as in `as_image_input`. The result is float32.

        Raises:
            ImageError: the image cannot be read.
        """
        return self.normalize(self.pixels(source)[None])[0]  # (C, Y, X)

    def pixels(self, source: AnyImage) -> Tensor:
        """An image, as for a call -> (C, Y, X) uint8, before normalisation."""
        fitted = self.fit(read_image(as_image_input(source), self.pixel_format))
        return torch.from_numpy(np.ascontiguousarray(as_array(fitted)))

    def fit(self, image: Image.Image) -> Image.Image:
        """Resize an image in `self.mode`, then crop or pad it to `image_size`."""
        if self.border:
            image = image.crop(self.inner_box(image.size))
        if self._keeps_size(image.size):
            return image
        resized = self.resize(image)
        rows, columns = self.image_size
        to_int = floor if self.crop_rounding == "down" else round  # `round` rounds half to even
        top, left = to_int((resized.height - rows) / 2), to_int((resized.width - columns) / 2)
        if self.crop_rounding == "even":  # torchvision pads a smaller image, less on the top left
            top = -((rows - resized.height) // 2) if resized.height < rows else top
            left = -((columns - resized.width) // 2) if resized.width < columns else left
        if top == left == 0 and resized.size == (columns, rows):
            return resized
        if self.resize_mode != "pad":
            return resized.crop((left, top, left + columns, top + rows))
        canvas = Image.new(self.mode, (columns, rows), self._mean_colour())
        canvas.paste(resized, ((columns - resized.width) // 2, (rows - resized.height) // 2))
        return canvas

    def keeps(self, size: tuple[int, int]) -> bool:
        """True if `fit` changes no pixel of an image of (width, height) `size`."""
        return not self.border and self._keeps_size(size)

    def inner_box(self, size: tuple[int, int]) -> Box:
        """(left, top, right, bottom) of an image of (width, height) `size` without its border.

        Raises:
            ImageError: nothing is left.
        """
        width, height = size
        if min(size) <= 2 * self.border:
            raise ImageError(
                f"an image of {width}x{height} px", f"its border of {self.border} px is all of it"
            )
        return self.border, self.border, width - self.border, height - self.border

    def resize(self, image: Image.Image) -> Image.Image:
        """The resized image, before it is cropped or padded."""
        height, width = self._resized_shape(image)
        if image.size == (width, height):
            return image
        if height * width > MAX_RESIZED:  # a strip of one pixel by thousands
            raise ImageError(
                f"an image of {image.width}x{image.height} px",
                f"it would be resized to {width}x{height} px, more than {MAX_RESIZED:,} pixels",
            )
        if self.antialias or self.interpolation == "nearest":
            return image.resize((width, height), RESAMPLING[self.interpolation])
        # Pillow's `resize` always smooths, so an affine map samples without smoothing.
        matrix = (image.width / width, 0, 0, 0, image.height / height, 0)
        resampling: Any = RESAMPLING[self.interpolation]  # transforms do not support lanczos
        return image.transform((width, height), Image.Transform.AFFINE, matrix, resampling)

    def normalize(self, images: Tensor) -> Tensor:
        """(B, C, Y, X) uint8 on any device -> (B, C, Y, X) float32: (x / 255 - mean) / std."""
        mean, std = (channel_tensor(values, images.device) for values in (self.mean, self.std))
        # Batches are channels-last in memory. Writing into a contiguous tensor reorders them here,
        # at no extra cost.
        scaled = torch.empty(images.shape, device=images.device)
        return torch.div(images, 255, out=scaled).sub_(mean).div_(std)  # (B, C, Y, X)

    def resized_to(self, image_size: tuple[int, int]) -> "Preprocess":
        """The same transform for another input size; `crop_fraction` stays the same."""
        before, after = min(self.image_size), min(image_size)
        side = self.resize_size
        scaled = None if side is None else max(after, floor(side * after / before))
        return replace(self, image_size=image_size, resize_size=scaled)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in the header of a weights file."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        # Without unset keys of later versions: older ones read the file, and fingerprints stay.
        unset = {"border": 0, "window": None}
        return {k: v for k, v in values.items() if k not in unset or v != unset[k]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`; an unknown key or a missing `image_size` is an error."""
        known = {field.name for field in fields(cls)}
        extra = sorted(values.keys() - known)
        if extra or "image_size" not in values:
            fault = f"unknown key `{extra[0]}`" if extra else "`image_size` is missing"
            raise VitcliError(f"preprocessing: {fault}", f"the keys are {', '.join(sorted(known))}")
        settings: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        return cls(**settings)

    def _keeps_size(self, size: tuple[int, int]) -> bool:
        """An image that already has the model's size stays unchanged."""
        uncut = self.resize_size is None and self.crop_fraction == 1.0
        return size == self.image_size[::-1] and (uncut or self.resize_mode == "pad")

    def _resized_shape(self, image: Image.Image) -> tuple[int, int]:
        """(rows, columns) after resizing, before the crop."""
        rows, columns = self.image_size
        if self.resize_mode == "pad":
            scale = min(rows / image.height, columns / image.width)
            height = max(1, min(rows, round(image.height * scale)))
            return height, max(1, min(columns, round(image.width * scale)))
        if self.resize_size is not None:
            target = (self.resize_size, self.resize_size)
        else:
            target = (floor(rows / self.crop_fraction), floor(columns / self.crop_fraction))
        if self.resize_mode == "squash":
            return target
        if target[0] == target[1]:  # torchvision's `Resize` truncates the longer side
            short, long = sorted(image.size)
            longer = int(target[0] * long / short)
            return (target[0], longer) if image.height <= image.width else (longer, target[0])
        scale = max(target[0] / image.height, target[1] / image.width)  # timm's `ResizeKeepRatio`
        return max(rows, round(image.height * scale)), max(columns, round(image.width * scale))

    def _mean_colour(self) -> tuple[int, ...] | int:
        colour = tuple(round(255 * value) for value in self.mean)
        return colour if self.num_channels == 3 else colour[0]


def _check_side(name: str, value: Any, least: int) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not (whole and least <= value <= MAX_SIDE):
        raise VitcliError(
            f"`preprocess.{name}` is {value}", f"give a whole number of px, {least} to {MAX_SIDE}"
        )


def _checked_window(window: Any) -> Window:
    try:
        low, high = map(float, window)
        if isfinite(low) and isfinite(high) and low < high:
            return low, high
    except (TypeError, ValueError):
        pass
    raise VitcliError(
        f"`preprocess.window` is {window}",
        "give two numbers, the lower one first: `--set preprocess.window=[0,4095]`",
    )


def as_image_input(source: AnyImage) -> ImageInput:
    """Turn an array, a tensor or a URL into what the decoder reads; others pass unchanged.

    Args:
        source: also an array (Y, X), (Y, X, C) or a tensor (Y, X), (C, Y, X), with 1, 3 or 4
            channels: integers in 0..255, uint16, booleans, or floats in 0..1. Also a URL.

    Raises:
        ImageError: the array has no such shape or values, or the URL cannot be fetched.
    """
    if isinstance(source, str) and is_url(source):
        return fetch_image(source)
    if isinstance(source, Tensor):
        array = source.detach().cpu().numpy()
        return _image_of(array.transpose(1, 2, 0) if array.ndim == 3 else array, "a tensor")
    return _image_of(source, "an array") if isinstance(source, np.ndarray) else source


def _image_of(array: NDArray[Any], name: str) -> Image.Image:
    """(Y, X) or (Y, X, C) numbers -> an image."""
    shape = tuple(array.shape)
    if array.ndim == 3 and shape[2] == 1:
        array = array[:, :, 0]
    if 0 in shape or not (array.ndim == 2 or (array.ndim == 3 and shape[2] in (3, 4))):
        order = "(Y, X) or (C, Y, X)" if name == "a tensor" else "(Y, X) or (Y, X, C)"
        raise ImageError(name, f"its shape is {shape}", f"use {order} with 1, 3 or 4 channels")
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    # The decoder knows the white level of 16-bit images; it reads them in greyscale only.
    if array.dtype == np.uint8 or (array.dtype == np.uint16 and array.ndim == 2):
        return Image.fromarray(np.ascontiguousarray(array))
    floats = np.issubdtype(array.dtype, np.floating)
    if not floats and not np.issubdtype(array.dtype, np.integer):
        raise ImageError(name, f"its values are {array.dtype}", "use uint8, or floats in 0..1")
    white = 1.0 if floats else 65535 if array.dtype == np.uint16 else 255
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= white):  # NaN fails too
        reason = f"its values are {low:g} to {high:g}, not 0 to {white:g}"
        raise ImageError(name, reason, "use uint8, or floats in 0..1, before normalisation")
    return Image.fromarray(np.rint(array * (255.0 / white)).astype(np.uint8))


def fetch_image(url: str) -> bytes:
    """Download an image file.

    Raises:
        ImageError: no such file, no answer, too many bytes, or too slow.
    """
    # Imported here: an array needs no network.
    from vitcli.hub.http import fetch_bytes

    try:
        return fetch_bytes(url, FETCH_BYTES, FETCH_SECONDS)
    except VitcliError as error:
        raise ImageError(printable(url), f"cannot fetch it: {error.message}", error.hint) from None


def as_array(image: Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An image in mode L or RGB -> (C, Y, X) uint8, writable, channels-last in memory."""
    array = np.array(image)  # (Y, X) or (Y, X, C)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)  # (C, Y, X)

"""From stored pixels of any Pillow mode to sRGB or grey bytes, and the window of wide samples.

A window (low, high) maps `low` to black and `high` to white, as in radiology. It applies to
samples of 16 bits, 32 bits and floats. It is a property of a dataset: with one window, equal
samples of two images have equal grey levels.
"""

import io
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

Mode = Literal["RGB", "L"]
Window = tuple[float, float]

PHOTOMETRIC_TAG = 262  # TIFF: 0 if the sample 0 is white
BIT_DEPTHS = (8, 10, 12, 14, 16)  # of cameras and detectors
# Padding outside of a scanner's circle and metal lie far from the other samples.
PERCENTILES = (0.5, 99.5)
# Entries of `Image.info` that the DICOM reader sets.
FILE_WINDOW, INVERTED = "vitcli_window", "vitcli_inverted"


class PixelFormat(NamedTuple):
    """The pixels that a caller wants: Pillow's mode, and the window of wide samples or None."""

    mode: Mode = "RGB"
    window: Window | None = None


def as_format(wanted: Mode | PixelFormat) -> PixelFormat:
    """A mode alone means: without a window."""
    return wanted if isinstance(wanted, PixelFormat) else PixelFormat(wanted)


def has_wide_samples(image: Image.Image) -> bool:
    """Return True for samples of 16 or 32 bits or in floating point."""
    return image.mode in {"I", "F"} or image.mode.startswith("I;16")


def convert_pixels(image: Image.Image, wanted: PixelFormat) -> Image.Image:
    """Convert any Pillow mode to the wanted one; return the same object if nothing changes."""
    mode = wanted.mode
    if has_wide_samples(image):
        return _scale_samples(image, wanted.window).convert(mode)
    alpha = None
    if image.mode in {"P", "PA", "LA", "La", "RGBA", "RGBa"} or "transparency" in image.info:
        if image.mode == "1":
            image = image.convert("L")  # it keeps the transparent level
        if image.mode not in {"LA", "RGBA"}:
            image = image.convert("LA" if image.mode == "La" else "RGBA")
        alpha = image.getchannel("A")
        if alpha.getextrema() == (255, 255):
            alpha = None
    image = _to_srgb(image)
    if alpha is not None:
        opaque = image.convert("RGB")
        image = Image.new("RGB", image.size, (255, 255, 255))
        image.paste(opaque, mask=alpha)
    return image if image.mode == mode else image.convert(mode)


def _to_srgb(image: Image.Image) -> Image.Image:
    """Apply the embedded colour profile; keep the values if there is none or it is damaged."""
    profile = image.info.get("icc_profile")
    if image.mode in {"RGBA", "LA"}:  # keep the stored colours; the caller blends them
        bands = image.split()[:-1]
        image = Image.merge("RGB", bands) if len(bands) == 3 else bands[0]
    try:
        transform = _srgb_transform(profile if isinstance(profile, bytes) else None, image.mode)
        converted = transform and ImageCms.applyTransform(image, transform)
    except Exception:  # a damaged profile, or one for other channels: most viewers ignore it too
        return image
    return converted or image


@lru_cache(maxsize=32)
def _srgb_transform(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform to sRGB; None if the values are sRGB or have no known meaning."""
    srgb: Any = ImageCms.createProfile("sRGB")
    if mode == "LAB":
        lab: Any = ImageCms.createProfile("LAB")
        return ImageCms.buildTransform(lab, srgb, "LAB", "RGB")
    if profile is None or mode not in {"RGB", "L", "CMYK"}:
        return None
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if mode == "RGB" and "sRGB" in (opened.profile.profile_description or ""):
        return None
    return ImageCms.buildTransform(opened, srgb, mode, "RGB")


def _scale_samples(image: Image.Image, window: Window | None) -> Image.Image:
    """Convert wide grey samples to mode L; a transparent level becomes white.

    Without a window, the window that the file names is used. Otherwise black is 0. White is then
    65535 for integers, or the largest int32 if a sample exceeds that. For floats white is 1, 255
    or 65535, by the largest sample.
    """
    samples = np.asarray(image)
    transparent = image.info.get("transparency")
    finite = samples[np.isfinite(samples)]
    if not finite.size:
        raise ValueError("no pixel is a finite number")
    low, high = window or image.info.get(FILE_WINDOW) or (0.0, white_level(finite))
    values = np.nan_to_num(samples.astype(np.float32), nan=low, posinf=np.inf, neginf=-np.inf)
    grey = np.clip(np.rint((values - low) * (255.0 / (high - low))), 0, 255).astype(np.uint8)
    # Pillow inverts the 8-bit samples of a TIFF in which 0 is white, but not wider ones.
    white_is_zero = getattr(image, "tag_v2", {}).get(PHOTOMETRIC_TAG, 1) == 0
    if image.info.get(INVERTED) or (white_is_zero and image.mode.startswith("I;16")):
        grey = 255 - grey
    if isinstance(transparent, int):
        grey[samples == transparent] = 255
    return Image.fromarray(grey)


def white_level(finite: NDArray[Any]) -> float:
    """The sample that is white in an image whose window is unknown."""
    top = float(finite.max())
    if finite.dtype.kind == "f":
        return 1.0 if top <= 2.0 else 255.0 if top <= 255.0 else max(65535.0, top)
    return 65535.0 if top <= 65535.0 else float(np.iinfo(np.int32).max)


def choose_window(images: Sequence[NDArray[Any]]) -> Window:
    """The window of a dataset, from the finite samples of some of its images.

    * Integers from 0 on: (0, 2^b - 1) with the smallest usual bit depth b that holds them.
    * Floats from 0 to 65535: white as in an image whose window is unknown.
    * Others, such as the Hounsfield units of CT: the 0.5 and 99.5 percentiles.
    """
    low, high = (float(end) for end in (min(x.min() for x in images), max(x.max() for x in images)))
    if low >= 0 and high <= 65535:
        if any(x.dtype.kind == "f" for x in images):
            return 0.0, max(white_level(x) for x in images)
        return 0.0, next(2.0**bits - 1 for bits in BIT_DEPTHS if high < 2**bits)
    black, white = np.percentile(np.concatenate([x.ravel() for x in images]), PERCENTILES)
    if black < white:
        return float(black), float(white)
    return low, high if high > low else low + 1.0

"""Pixels as they are stored, in any of Pillow's modes -> what their author saw, in RGB or grey.

Alpha lies on white, 16-bit and floating-point samples are scaled, CMYK and colour profiles are
brought to sRGB.
"""

import io
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageCms

PHOTOMETRIC_TAG = 262  # of TIFF: what 0 means
Mode = Literal["RGB", "L"]


def is_wide(image: Image.Image) -> bool:
    """Whether its samples are 16 or 32 bits, or floating point."""
    return image.mode in {"I", "F"} or image.mode.startswith("I;16")


def to_mode(image: Image.Image, mode: Mode) -> Image.Image:
    """Pixels of any Pillow mode -> `mode`; the same object where nothing is to be done."""
    if is_wide(image):
        return _scale_samples(image).convert(mode)
    alpha = None
    if image.mode in {"P", "PA", "LA", "La", "RGBA", "RGBa"} or "transparency" in image.info:
        image = _with_straight_alpha(image)
        alpha = image.getchannel("A")
        if alpha.getextrema() == (255, 255):
            alpha = None
    image = _to_srgb(image)
    if alpha is not None:
        opaque = image.convert("RGB")
        image = Image.new("RGB", image.size, (255, 255, 255))
        image.paste(opaque, mask=alpha)
    return image if image.mode == mode else image.convert(mode)


def _with_straight_alpha(image: Image.Image) -> Image.Image:
    """LA or RGBA, not premultiplied."""
    if image.mode == "La":
        return image.convert("LA")
    if image.mode in {"LA", "RGBA"}:
        return image
    if image.mode == "1":
        image = image.convert("L")  # carries its transparent level along
    return image.convert("RGBA")


def _scale_samples(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits or floating point -> L; a transparent level becomes white.

    32-bit integers count as 16 bits where nothing lies above; floats as 0..1, else 0..255, else
    0..65535.
    """
    samples = np.asarray(image)
    key = image.info.get("transparency")
    values = np.nan_to_num(samples.astype(np.float32), nan=0.0, posinf=np.inf, neginf=0.0)
    finite = values[np.isfinite(values)]
    top = float(finite.max()) if finite.size else 0.0
    if image.mode == "F":
        white = 1.0 if top <= 2.0 else 255.0 if top <= 255.0 else max(65535.0, top)
    else:
        white = 65535.0 if top <= 65535.0 else float(np.iinfo(np.int32).max)
    grey = np.clip(np.rint(values * (255.0 / white)), 0, 255).astype(np.uint8)
    if image.mode.startswith("I;16") and _tiff_zero_is_white(image):
        grey = 255 - grey
    if isinstance(key, int):
        grey[samples == key] = 255
    return Image.fromarray(grey)


def _tiff_zero_is_white(image: Image.Image) -> bool:
    """Whether a TIFF is marked so; Pillow turns its 8-bit samples around, and not wider ones."""
    tags = getattr(image, "tag_v2", {})
    return tags.get(PHOTOMETRIC_TAG, 1) == 0


def _to_srgb(image: Image.Image) -> Image.Image:
    """Through the embedded colour profile to sRGB; without one, or with a bad one, as it is."""
    colour = _drop_alpha(image) if image.mode in {"RGBA", "LA"} else image
    if image.mode == "LAB":
        return _apply(ImageCms.buildTransform(*_lab_to_srgb(), "LAB", "RGB"), image)
    profile = image.info.get("icc_profile")
    if not isinstance(profile, bytes) or colour.mode not in {"RGB", "L", "CMYK"}:
        return colour
    try:
        transform = _profile_transform(profile, colour.mode)
        return colour if transform is None else _apply(transform, colour)
    except Exception:  # a damaged profile, or one for other channels: most viewers ignore it too
        return colour


def _drop_alpha(image: Image.Image) -> Image.Image:
    """RGBA -> RGB, LA -> L: the colours as stored, without blending."""
    bands = image.split()[:-1]
    return Image.merge("RGB", bands) if len(bands) == 3 else bands[0]


def _apply(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    result = ImageCms.applyTransform(image, transform)
    assert result is not None
    return result


def _lab_to_srgb() -> tuple[Any, Any]:
    return ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")


@lru_cache(maxsize=32)
def _profile_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From an ICC profile to sRGB; None where it is sRGB already."""
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if mode == "RGB" and "sRGB" in (opened.profile.profile_description or ""):
        return None
    return ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB")

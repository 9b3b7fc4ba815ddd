"""Scenes: a background, objects in front of it, and the viewpoint from which they are rendered.

The viewpoint maps pixel coordinates before the formulas are evaluated, so a random crop needs no
resampling.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitcli.data.formula.shapes import (
    CLASSES,
    CURVE_POINTS,
    HARMONICS,
    NUM_CONTOURS,
    TEXTURES,
    Affine,
    Floats,
    Integers,
    KeyedUniform,
    Texture,
    contour_table,
    curve_table,
    distance_to_curve,
    f32,
    hash_keys,
    inside_contour,
)

Pixels = NDArray[np.uint8]
# Layers from back to front: two distractors, the main object, and one that may cover part of it.
MAIN, NUM_LAYERS = 2, 4
# Plain scenes show a centred grey object on a dark background, like MNIST and Fashion-MNIST.
PLAIN_RATE = 0.3
GREY_RATE = 0.25
JITTER = 0.4
NOISE = TEXTURES.index("noise")


@dataclass(frozen=True)
class Viewpoint:
    """The viewpoints of B scenes.

    Args:
        view: maps image coordinates to scene coordinates.
        zoom: (B,) scene units that half of the shorter side shows.
        blur: (B,) width of the Gaussian blur, in scene units.
        x, y: (X,), (Y,) pixel centres in image coordinates.
    """

    view: Affine
    zoom: Floats
    blur: Floats
    x: Floats
    y: Floats


def render_scenes(
    seed: int, indices: Integers, size: tuple[int, int], views: KeyedUniform | None
) -> Pixels:
    """(B,) indices -> (B, 3, Y, X) uint8 images; `views` None: no augmentation."""
    d = KeyedUniform(hash_keys(seed, 1, indices))
    plain = d.bernoulli(PLAIN_RATE)
    viewpoint = _sample_viewpoint(views, plain, size)
    image = _render_background(d, plain, viewpoint)  # (B, 3, Y, X)
    distractors = np.where(plain, 0, d.integers(3))
    covered = d.bernoulli(0.25) & ~plain
    shown = [distractors > 0, distractors > 1, np.ones_like(plain), covered]
    for layer in range(NUM_LAYERS):
        keys = KeyedUniform(hash_keys(seed, 10 + layer, indices))
        objects = _ObjectLayer.sample(keys, plain, layer == MAIN, indices)
        for curves in (False, True):
            here = shown[layer] & ((objects.classes >= NUM_CONTOURS) == curves)
            chosen = np.flatnonzero(here)
            if len(chosen):
                colour, alpha = objects.render(chosen, curves, viewpoint)
                image[chosen] += (colour - image[chosen]) * alpha[:, None]
    image = image if views is None else _jitter_colours(views, plain, image)
    return np.clip(image * f32(255) + f32(0.5), 0, 255).astype(np.uint8)


def _sample_viewpoint(
    v: KeyedUniform | None, plain: NDArray[np.bool_], size: tuple[int, int]
) -> Viewpoint:
    """Random viewpoints; those of plain scenes vary less and are never mirrored."""
    rows, cols = size
    pixel = f32(2 / min(rows, cols))
    x = (np.arange(cols, dtype=np.float32) + f32(0.5 - cols / 2)) * pixel
    y = (np.arange(rows, dtype=np.float32) + f32(0.5 - rows / 2)) * pixel
    if v is None:
        zero = np.zeros(len(plain), dtype=np.float32)
        straight = Affine.from_scale_and_angle(
            zero, zero + 1, zero + 1, np.stack([zero, zero], axis=-1)
        )
        return Viewpoint(straight, zero + 1, zero, x, y)
    zoom = np.where(plain, v.uniform(0.85, 1.1), v.uniform(0.6, 1.05))
    angle, stretch = v.uniform(-0.2, 0.2), np.exp(v.uniform(-0.2, 0.2))
    shift = v.uniforms(2, -1, 1) * np.where(plain, f32(0.12), f32(0.25))[:, None]
    mirror = np.where(v.bernoulli(0.5) & ~plain, f32(-1), f32(1))
    blur = np.where(v.bernoulli(0.3), v.uniform(0, 0.06), f32(0))
    view = Affine.from_scale_and_angle(angle, zoom * stretch * mirror, zoom / stretch, shift)
    return Viewpoint(view, zoom, blur, x, y)


def _render_background(d: KeyedUniform, plain: NDArray[np.bool_], viewpoint: Viewpoint) -> Floats:
    """(B, 3, Y, X) the background."""
    kind = np.where(plain, np.where(d.bernoulli(0.8), 0, 1), d.integers(len(TEXTURES)))
    first, second, third = d.colour(), d.colour(), d.colour()
    dark = np.maximum(d.uniform(-0.12, 0.12), 0)[:, None]
    first = np.where(plain[:, None], dark, first)
    second = np.where(plain[:, None], dark + f32(0.25), second)
    seen = (viewpoint.view, viewpoint.x, viewpoint.y, viewpoint.blur)
    image = _blend(first, second, Texture.sample(d, kind).evaluate(*seen))
    clouds = d.bernoulli(0.5) & ~plain
    over = Texture.sample(d, np.where(clouds, NOISE, 0)).evaluate(*seen)
    over = np.where(clouds[:, None, None], over, f32(0))
    image += (third[:, :, None, None] - image) * over[:, None]
    return image


@dataclass(frozen=True)
class _ObjectLayer:
    """One object for each of B scenes, in scene units; every field is (B, ...)."""

    classes: Integers
    place: Affine  # maps object coordinates to scene coordinates
    scale: Floats
    width: Floats  # stroke width
    outline: NDArray[np.bool_]  # draw the contour as a line, not filled
    kind: Integers
    texture: Texture
    colours: tuple[Floats, Floats]
    shade: Floats  # (B, 2): brightness gradient to the right and downwards
    harmonic_jitter: Floats  # (B, 2, HARMONICS) in -1..1: variation of a contour in its class
    point_jitter: Floats  # (B, CURVE_POINTS, 2) in -1..1: variation of a curve in its class

    @classmethod
    def sample(
        cls, d: KeyedUniform, plain: NDArray[np.bool_], main: bool, indices: Integers
    ) -> "_ObjectLayer":
        """Random objects; the class of the main object follows from the scene's index."""
        classes = d.integers(len(CLASSES))
        scale, centre = d.uniform(0.2, 0.6), d.uniforms(2, -1, 1)
        if main:
            classes = indices % len(CLASSES)
            scale = np.where(plain, d.uniform(0.55, 0.95), d.uniform(0.3, 0.8))
            centre = centre * np.where(plain, f32(0.12), f32(0.4))[:, None]
        tilted, angle = d.bernoulli(0.3) & ~plain, d.uniform(-0.25, 0.25)
        angle = angle + np.where(tilted, d.uniform(-np.pi, np.pi), f32(0))
        stretch = np.exp(d.uniform(-0.35, 0.35))
        kind = np.where(plain & d.bernoulli(0.6), 0, d.integers(len(TEXTURES)))
        grey, second_grey = d.uniform(0.45, 1.0)[:, None], d.uniform(0.3, 1.0)[:, None]
        is_grey = (plain & d.bernoulli(0.85))[:, None]
        colours = (
            np.where(is_grey, grey, d.colour()),
            np.where(is_grey, grey * second_grey, d.colour()),
        )
        light = d.uniform(0, 2 * np.pi)
        shade = np.where(d.bernoulli(0.5), d.uniform(0, 0.6), f32(0))
        return cls(
            classes=classes,
            place=Affine.from_scale_and_angle(angle, scale * stretch, scale / stretch, centre),
            scale=scale,
            width=d.uniform(0.05, 0.16),
            outline=d.bernoulli(0.2),
            kind=kind,
            texture=Texture.sample(d, kind),
            colours=colours,
            shade=np.stack([np.cos(light) * shade, np.sin(light) * shade], axis=-1),
            harmonic_jitter=d.uniforms(2 * HARMONICS, -1, 1).reshape(-1, 2, HARMONICS),
            point_jitter=d.uniforms(2 * CURVE_POINTS, -1, 1).reshape(-1, CURVE_POINTS, 2),
        )

    def render(self, chosen: Integers, curves: bool, viewpoint: Viewpoint) -> tuple[Floats, Floats]:
        """(b,) indices, all contours or all curves -> (b, 3, Y, X) colour, (b, Y, X) opacity."""
        view, blur = viewpoint.view.select(chosen), viewpoint.blur[chosen]
        x, y = self.place.select(chosen).inverse().compose(view).map_grid(viewpoint.x, viewpoint.y)
        width = self.width[chosen][:, None, None]
        if curves:
            points = curve_table()[self.classes[chosen] - NUM_CONTOURS]
            points = points + f32(0.042) * np.cumsum(self.point_jitter[chosen], axis=1)
            depth: Floats = f32(1.3) * width - distance_to_curve(x, y, points)
        else:
            depth = inside_contour(
                x,
                y,
                contour_table()[self.classes[chosen]] + f32(0.03) * self.harmonic_jitter[chosen],
            )
            line = self.outline[chosen][:, None, None]
            depth = np.where(line, width - np.abs(depth), depth)
        pixel = f32(2 / min(len(viewpoint.x), len(viewpoint.y))) * viewpoint.zoom[chosen]
        soft = (pixel + f32(1.5) * blur) / self.scale[chosen]
        alpha = np.clip(f32(0.5) + depth / soft[:, None, None], 0, 1)
        field = self.texture.select(chosen).evaluate(view, viewpoint.x, viewpoint.y, blur)
        shade = self.shade[chosen][..., None, None]
        light = shade[:, 0] * np.clip(x, -1, 1) + shade[:, 1] * np.clip(y, -1, 1)
        first, second = self.colours
        return _blend(first[chosen], second[chosen], field) * (f32(1) + light)[:, None], alpha


def _jitter_colours(v: KeyedUniform, plain: NDArray[np.bool_], image: Floats) -> Floats:
    """(B, 3, Y, X) -> (B, 3, Y, X): random saturation, contrast, brightness, channel order."""
    grey = v.bernoulli(GREY_RATE)
    saturation = np.where(grey, f32(0), np.exp(v.uniform(-JITTER, JITTER)))[:, None, None]
    contrast = np.exp(v.uniform(-JITTER, JITTER))[:, None, None]
    brightness = v.uniform(-JITTER / 2, JITTER / 2)[:, None, None, None]
    gains = np.exp(v.uniforms(3, -JITTER / 2, JITTER / 2))[:, :, None]
    order = np.argsort(v.uniforms(3), axis=1)
    order = np.where(v.bernoulli(0.2)[:, None], order, np.arange(3))
    eye = np.eye(3, dtype=np.float32)
    mix = (eye * saturation + (1 - saturation) * f32(1 / 3)) * contrast * gains  # (B, 3, 3)
    mix = np.take_along_axis(mix, np.broadcast_to(order[:, :, None], mix.shape), axis=1)
    # The background of a plain scene stays dark; other colours change around the middle grey.
    centre = np.where(plain, f32(0), f32(0.5))[:, None, None, None]
    brightness = np.where(plain[:, None, None, None], f32(0), brightness)
    flat = (image - centre).reshape(*image.shape[:2], -1)  # (B, 3, Y*X)
    developed: Floats = np.matmul(mix, flat).reshape(image.shape) + centre + brightness
    return developed


def _blend(first: Floats, second: Floats, field: Floats) -> Floats:
    """(B, 3) twice, (B, Y, X) in 0..1 -> (B, 3, Y, X): interpolate between two colours."""
    return first[:, :, None, None] + (second - first)[:, :, None, None] * field[:, None]

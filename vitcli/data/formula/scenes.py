"""Scenes: a ground, some objects in front of it, and the camera that looks at them.

The camera is a map of the plane before the formulas, so a crop is never resampled.
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
    Draws,
    F,
    Floats,
    Integers,
    Texture,
    contour_table,
    curve_table,
    distance_to_curve,
    hash_keys,
    inside_contour,
)

Pixels = NDArray[np.uint8]
# Objects from back to front: two distractors, the main one, and one that may hide a part of it.
MAIN, NUM_LAYERS = 2, 4
# The share of centred grey objects on a dark ground, which digits and clothes look like.
PLAIN_RATE = 0.3
GREY_RATE = 0.25
JITTER = 0.4
NOISE, PLAIN_GROUND = TEXTURES.index("noise"), len(TEXTURES)


@dataclass(frozen=True)
class Camera:
    """How B scenes are looked at.

    Args:
        view: from the picture's plane to the scene's.
        zoom: (B,) scene units that half of the shorter side shows.
        blur: (B,) width of the blur, in scene units.
        x, y: (X,), (Y,) the pixels' centres.
    """

    view: Affine
    zoom: Floats
    blur: Floats
    x: Floats
    y: Floats


def draw(
    seed: int, indices: Integers, size: tuple[int, int], views: Draws | None
) -> tuple[Pixels, dict[str, NDArray[np.int64] | Floats]]:
    """(B,) indices -> (B, 3, Y, X) pictures and their factors; without `views`, straight on."""
    d = Draws(hash_keys(seed, 1, indices))
    plain = d.chance(PLAIN_RATE)
    camera = _camera(views, plain, size)
    image, background = _ground(d, plain, camera)  # (B, 3, Y, X)
    distractors = np.where(plain, 0, d.choice(3))
    hidden = d.chance(0.25) & ~plain
    shown = [distractors > 0, distractors > 1, np.ones_like(plain), hidden]
    visible = np.zeros((len(indices), 8, 8), dtype=np.int64)
    coverage = np.zeros((len(indices), 8, 8), dtype=np.float32)
    texture = np.zeros(len(indices), dtype=np.int64)
    for layer in range(NUM_LAYERS):
        main = layer == MAIN
        thing = _Objects.draw(Draws(hash_keys(seed, 10 + layer, indices)), plain, main, indices)
        texture = thing.kind if main else texture
        for curves in (False, True):
            here = shown[layer] & ((thing.classes >= NUM_CONTOURS) == curves)
            chosen = np.flatnonzero(here)
            if len(chosen):
                colour, alpha = thing.paint(chosen, curves, camera)
                image[chosen] += (colour - image[chosen]) * alpha[:, None]
                cells = _cells(alpha)
                front = cells > (0.2 if curves else 0.35)
                names = 1 + thing.classes[chosen][:, None, None]
                visible[chosen] = np.where(front, names, visible[chosen])
                coverage[chosen] = cells if main else coverage[chosen] * (1 - cells)
    image = image if views is None else _develop(views, plain, image)
    pixels = np.clip(image * F(255) + F(0.5), 0, 255).astype(np.uint8)
    objects = distractors + hidden
    return pixels, {
        "background": background,
        "texture": texture,
        "objects": objects,
        "coverage": coverage,
        "visible": visible,
    }


def _camera(v: Draws | None, plain: NDArray[np.bool_], size: tuple[int, int]) -> Camera:
    """The B cameras; those on plain scenes move less, and never mirror."""
    rows, cols = size
    pixel = F(2 / min(rows, cols))
    x = (np.arange(cols, dtype=np.float32) + F(0.5 - cols / 2)) * pixel
    y = (np.arange(rows, dtype=np.float32) + F(0.5 - rows / 2)) * pixel
    if v is None:
        zero = np.zeros(len(plain), dtype=np.float32)
        straight = Affine.turn(zero, zero + 1, zero + 1, np.stack([zero, zero], axis=-1))
        return Camera(straight, zero + 1, zero, x, y)
    zoom = np.where(plain, v.one(0.85, 1.1), v.one(0.6, 1.05))
    angle, stretch = v.one(-0.2, 0.2), np.exp(v.one(-0.2, 0.2))
    shift = v.many(2, -1, 1) * np.where(plain, F(0.12), F(0.25))[:, None]
    mirror = np.where(v.chance(0.5) & ~plain, F(-1), F(1))
    blur = np.where(v.chance(0.3), v.one(0, 0.06), F(0))
    view = Affine.turn(angle, zoom * stretch * mirror, zoom / stretch, shift)
    return Camera(view, zoom, blur, x, y)


def _ground(d: Draws, plain: NDArray[np.bool_], camera: Camera) -> tuple[Floats, Integers]:
    """(B, 3, Y, X) what is behind the objects, and its kind."""
    kind = np.where(plain, np.where(d.chance(0.8), 0, 1), d.choice(len(TEXTURES)))
    first, second, third = d.colour(), d.colour(), d.colour()
    dark = np.maximum(d.one(-0.12, 0.12), 0)[:, None]
    first = np.where(plain[:, None], dark, first)
    second = np.where(plain[:, None], dark + F(0.25), second)
    seen = (camera.view, camera.x, camera.y, camera.blur)
    image = _blend(first, second, Texture.draw(d, kind).field(*seen))
    clouds = d.chance(0.5) & ~plain
    over = Texture.draw(d, np.where(clouds, NOISE, 0)).field(*seen)
    over = np.where(clouds[:, None, None], over, F(0))
    image += (third[:, :, None, None] - image) * over[:, None]
    return image, np.where(plain, PLAIN_GROUND, kind)


@dataclass(frozen=True)
class _Objects:
    """One layer: an object for each of B scenes, in scene units; every field is (B, ...)."""

    classes: Integers
    place: Affine  # from the object's plane to the scene's
    scale: Floats
    width: Floats  # of the stroke
    outline: NDArray[np.bool_]  # the contour as a line, not filled
    kind: Integers
    texture: Texture
    colours: tuple[Floats, Floats]
    shade: Floats  # (B, 2): how much lighter it gets to the right and below
    bend: Floats  # (B, 2, HARMONICS): this one's difference from its class, -1..1
    tremble: Floats  # (B, CURVE_POINTS, 2)

    @classmethod
    def draw(cls, d: Draws, plain: NDArray[np.bool_], main: bool, indices: Integers) -> "_Objects":
        """The object of each scene; the main one has the class of its index."""
        classes = d.choice(len(CLASSES))
        scale, centre = d.one(0.2, 0.6), d.many(2, -1, 1)
        if main:
            classes = indices % len(CLASSES)
            scale = np.where(plain, d.one(0.55, 0.95), d.one(0.3, 0.8))
            centre = centre * np.where(plain, F(0.12), F(0.4))[:, None]
        tilted, angle = d.chance(0.3) & ~plain, d.one(-0.25, 0.25)
        angle = angle + np.where(tilted, d.one(-np.pi, np.pi), F(0))
        stretch = np.exp(d.one(-0.35, 0.35))
        kind = np.where(plain & d.chance(0.6), 0, d.choice(len(TEXTURES)))
        grey, second_grey = d.one(0.45, 1.0)[:, None], d.one(0.3, 1.0)[:, None]
        is_grey = (plain & d.chance(0.85))[:, None]
        colours = (
            np.where(is_grey, grey, d.colour()),
            np.where(is_grey, grey * second_grey, d.colour()),
        )
        light = d.one(0, 2 * np.pi)
        shade = np.where(d.chance(0.5), d.one(0, 0.6), F(0))
        return cls(
            classes=classes,
            place=Affine.turn(angle, scale * stretch, scale / stretch, centre),
            scale=scale,
            width=d.one(0.05, 0.16),
            outline=d.chance(0.2),
            kind=kind,
            texture=Texture.draw(d, kind),
            colours=colours,
            shade=np.stack([np.cos(light) * shade, np.sin(light) * shade], axis=-1),
            bend=d.many(2 * HARMONICS, -1, 1).reshape(-1, 2, HARMONICS),
            tremble=d.many(2 * CURVE_POINTS, -1, 1).reshape(-1, CURVE_POINTS, 2),
        )

    def paint(self, chosen: Integers, curves: bool, camera: Camera) -> tuple[Floats, Floats]:
        """(b,) of the B, all contours or all curves -> (b, 3, Y, X) colour, (b, Y, X) opacity."""
        view, blur = camera.view.pick(chosen), camera.blur[chosen]
        x, y = self.place.pick(chosen).inverse().after(view).points(camera.x, camera.y)
        width = self.width[chosen][:, None, None]
        if curves:
            points = curve_table()[self.classes[chosen] - NUM_CONTOURS]
            points = points + F(0.042) * np.cumsum(self.tremble[chosen], axis=1)
            depth: Floats = F(1.3) * width - distance_to_curve(x, y, points)
        else:
            depth = inside_contour(
                x, y, contour_table()[self.classes[chosen]] + F(0.03) * self.bend[chosen]
            )
            line = self.outline[chosen][:, None, None]
            depth = np.where(line, width - np.abs(depth), depth)
        pixel = F(2 / min(len(camera.x), len(camera.y))) * camera.zoom[chosen]
        soft = (pixel + F(1.5) * blur) / self.scale[chosen]
        alpha = np.clip(F(0.5) + depth / soft[:, None, None], 0, 1)
        field = self.texture.pick(chosen).field(view, camera.x, camera.y, blur)
        shade = self.shade[chosen][..., None, None]
        light = shade[:, 0] * np.clip(x, -1, 1) + shade[:, 1] * np.clip(y, -1, 1)
        first, second = self.colours
        return _blend(first[chosen], second[chosen], field) * (F(1) + light)[:, None], alpha


def _develop(v: Draws, plain: NDArray[np.bool_], image: Floats) -> Floats:
    """(B, 3, Y, X) -> the same with saturation, contrast, brightness and channels changed."""
    grey = v.chance(GREY_RATE)
    saturation = np.where(grey, F(0), np.exp(v.one(-JITTER, JITTER)))[:, None, None]
    contrast = np.exp(v.one(-JITTER, JITTER))[:, None, None]
    brightness = v.one(-JITTER / 2, JITTER / 2)[:, None, None, None]
    gains = np.exp(v.many(3, -JITTER / 2, JITTER / 2))[:, :, None]
    order = np.argsort(v.many(3), axis=1)
    order = np.where(v.chance(0.2)[:, None], order, np.arange(3))
    eye = np.eye(3, dtype=np.float32)
    mix = (eye * saturation + (1 - saturation) * F(1 / 3)) * contrast * gains  # (B, 3, 3)
    mix = np.take_along_axis(mix, np.broadcast_to(order[:, :, None], mix.shape), axis=1)
    # A plain scene's ground stays dark, another's colours move about the middle grey.
    centre = np.where(plain, F(0), F(0.5))[:, None, None, None]
    brightness = np.where(plain[:, None, None, None], F(0), brightness)
    flat = (image - centre).reshape(*image.shape[:2], -1)  # (B, 3, Y*X)
    developed: Floats = np.matmul(mix, flat).reshape(image.shape) + centre + brightness
    return developed


def _blend(first: Floats, second: Floats, field: Floats) -> Floats:
    """(B, 3) twice, (B, Y, X) in 0..1 -> (B, 3, Y, X)."""
    return first[:, :, None, None] + (second - first)[:, :, None, None] * field[:, None]


def _cells(alpha: Floats) -> Floats:
    """(b, Y, X) -> (b, 8, 8): the mean of each cell; sides of 8 pixels at least."""
    _, rows, cols = alpha.shape
    down = (np.arange(8) * rows) // 8
    across = (np.arange(8) * cols) // 8
    sums: Floats = np.add.reduceat(np.add.reduceat(alpha, down, axis=1), across, axis=2)
    counts = np.diff(down, append=rows)[:, None] * np.diff(across, append=cols)
    means: Floats = sums / counts.astype(np.float32)
    return means

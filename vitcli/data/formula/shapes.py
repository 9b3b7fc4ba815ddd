"""The formulas: hashed random numbers, closed contours, open curves, textures; numpy float32.

Shapes: B images, Y X pixel rows and columns, S segments, W waves. Coordinates point right and down,
and the shorter side of an image spans -1..1. The arithmetic gives an image the same bits in every
batch, so BLAS, whose sums depend on the batch, is used only per image.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.int64]
Keys = NDArray[np.uint64]
f32 = np.float32

NUM_CONTOURS = 32
NUM_CURVES = 32
CLASSES = (
    *(f"contour-{i:02d}" for i in range(NUM_CONTOURS)),
    *(f"curve-{i:02d}" for i in range(NUM_CURVES)),
)
HARMONICS = 6
CURVE_POINTS = 11
TEXTURES = ("flat", "gradient", "stripes", "checks", "noise", "spots")
WAVES = 10
# Another number gives other shapes of the 64 classes.
CLASS_SEED = 20260101


def hash_keys(*parts: int | Integers) -> Keys:
    """(B,) keys from integers and (B,) integers: splitmix64 (Steele et al., 2014) over the parts.

    The generator has no state, so the random numbers of any image can be computed directly.
    """
    keys = np.zeros(1, dtype=np.uint64)
    for part in parts:
        word = np.atleast_1d(np.asarray(part, dtype=np.int64)).astype(np.uint64)
        keys = _splitmix(keys + np.uint64(0x9E3779B97F4A7C15) + word)
    return keys


def _splitmix(x: Keys) -> Keys:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class KeyedUniform:
    """A sequence of uniform random numbers for each of B keys.

    The n-th number depends only on the key and on n, so the order of the calls must not change.
    """

    def __init__(self, keys: Keys) -> None:
        self.keys = keys
        self.taken = 0

    def uniforms(self, count: int, low: float = 0.0, high: float = 1.0) -> Floats:
        """(B, count) numbers in [low, high)."""
        steps = np.arange(self.taken + 1, self.taken + count + 1, dtype=np.uint64)
        self.taken += count
        bits = _splitmix(self.keys[:, None] + steps * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(
            40
        )
        uniform = bits.astype(np.float32) * f32(2**-24)  # (B, count)
        return f32(low) + f32(high - low) * uniform

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Floats:
        """(B,) numbers in [low, high)."""
        return self.uniforms(1, low, high)[:, 0].copy()

    def log_uniform(self, low: float, high: float) -> Floats:
        """(B,) log-uniform numbers in [low, high)."""
        return np.exp(self.uniform(math.log(low), math.log(high)))

    def bernoulli(self, rate: float) -> NDArray[np.bool_]:
        """(B,) True with probability `rate`."""
        return self.uniform() < f32(rate)

    def integers(self, count: int) -> Integers:
        """(B,) integers in 0..count-1."""
        return np.minimum((self.uniform() * f32(count)).astype(np.int64), count - 1)

    def colour(self) -> Floats:
        """(B, 3) RGB in 0..1: a grey with a random, mostly small, saturation."""
        grey, saturation = self.uniform(0.02, 0.98), self.uniform() ** f32(1.5)
        mixed = grey[:, None] + saturation[:, None] * self.uniforms(3, -0.5, 0.5)
        return np.clip(mixed, 0, 1)


@lru_cache(maxsize=1)
def contour_table() -> Floats:
    """(NUM_CONTOURS, 2, HARMONICS): cosine and sine coefficients of each class's radius.

    Each class has two harmonics, as VisualAtom (Takashima et al., 2023) modulates circles. Every
    second class is symmetric about the vertical axis.
    """
    d = KeyedUniform(hash_keys(CLASS_SEED, 1, np.arange(NUM_CONTOURS)))
    phase, weight = d.uniforms(HARMONICS, 0, 2 * math.pi), d.uniforms(HARMONICS)
    order = np.argsort(-weight, axis=1)
    chosen = np.zeros_like(weight)
    np.put_along_axis(chosen, order[:, :2], 1, axis=1)
    n = np.arange(1, HARMONICS + 1, dtype=np.float32)
    size = chosen * (f32(0.12) + f32(0.25) * weight) / np.sqrt(n)
    upright = np.where(np.sin(phase) < 0, f32(math.pi), f32(0)) + n * f32(math.pi / 2)
    mirrored = (np.arange(NUM_CONTOURS) % 2 == 0)[:, None]
    phase = np.where(mirrored, upright, phase)
    return np.stack([size * np.cos(phase), size * np.sin(phase)], axis=1).astype(np.float32)


@lru_cache(maxsize=1)
def curve_table() -> Floats:
    """(NUM_CURVES, CURVE_POINTS, 2): the points of each class's stroke, in -1..1.

    Two of three classes are cosine series, which look like handwriting; the third is angular.
    """
    d = KeyedUniform(hash_keys(CLASS_SEED, 2, np.arange(NUM_CURVES)))
    t = np.linspace(0, 1, CURVE_POINTS, dtype=np.float32)
    smooth = np.zeros((NUM_CURVES, CURVE_POINTS, 2), dtype=np.float32)
    for k in range(1, 5):
        smooth += (
            np.cos(f32(math.pi * k) * t)[:, None] * d.uniforms(2, -1, 1)[:, None] / f32(k**0.6)
        )
    corners = d.uniforms(8, -1, 1).reshape(NUM_CURVES, 4, 2)
    at = np.minimum((t * 3).astype(np.int64), 2)
    along = (t * 3 - at)[:, None]
    angular = corners[:, at] * (1 - along) + corners[:, at + 1] * along
    points = np.where((np.arange(NUM_CURVES) % 3 == 0)[:, None, None], angular, smooth)
    low, high = points.min(axis=1, keepdims=True), points.max(axis=1, keepdims=True)
    unit = (points - (low + high) / 2) / np.maximum((high - low) / 2, f32(0.3))
    return (unit * np.array([0.75, 1.0], dtype=np.float32)).astype(np.float32)


def inside_contour(x: Floats, y: Floats, coefficients: Floats) -> Floats:
    """(B, Y, X) twice, (B, 2, HARMONICS) -> (B, Y, X): the contour's radius minus the point's.

    radius(t) = 0.85 + sum_n a_n cos(n t) + b_n sin(n t). The addition theorem gives cos(n t) and
    sin(n t) from the direction of the point, without an arc tangent.
    """
    radius = np.sqrt(x * x + y * y) + f32(1e-6)
    cos1, sin1 = x / radius, y / radius
    cos, sin = cos1, sin1
    edge = f32(0.85) - radius
    for n in range(HARMONICS):
        a, b = coefficients[:, 0, n, None, None], coefficients[:, 1, n, None, None]
        edge += a * cos + b * sin
        cos, sin = cos * cos1 - sin * sin1, cos * sin1 + sin * cos1
    return edge


def distance_to_curve(x: Floats, y: Floats, points: Floats) -> Floats:
    """(B, Y, X) twice, (B, S+1, 2) -> (B, Y, X): the distance of each point from a polyline."""
    best = np.full_like(x, 1e6)
    for s in range(points.shape[1] - 1):
        a = points[:, s]
        along = points[:, s + 1] - a  # (B, 2)
        unit = along / (along[:, :1] ** 2 + along[:, 1:] ** 2 + f32(1e-6))
        dx, dy = x - a[:, 0, None, None], y - a[:, 1, None, None]
        at = np.clip(dx * unit[:, 0, None, None] + dy * unit[:, 1, None, None], 0, 1)
        dx -= at * along[:, 0, None, None]
        dy -= at * along[:, 1, None, None]
        np.minimum(best, dx * dx + dy * dy, out=best)
    return np.sqrt(best)


@dataclass(frozen=True)
class Affine:
    """B affine maps p -> matrix p + shift, with (B, 2, 2) matrices and (B, 2) shifts."""

    matrix: Floats
    shift: Floats

    @classmethod
    def from_scale_and_angle(
        cls, angle: Floats, scale_x: Floats, scale_y: Floats, shift: Floats
    ) -> "Affine":
        """Scale each axis, then rotate by `angle` radians, then shift."""
        cos, sin = np.cos(angle), np.sin(angle)
        rows = [[cos * scale_x, -sin * scale_y], [sin * scale_x, cos * scale_y]]
        return cls(np.stack([np.stack(row, axis=-1) for row in rows], axis=-2), shift)

    def inverse(self) -> "Affine":
        """The inverse maps."""
        m = self.matrix
        det = m[:, 0, 0] * m[:, 1, 1] - m[:, 0, 1] * m[:, 1, 0]
        rows = [[m[:, 1, 1], -m[:, 0, 1]], [-m[:, 1, 0], m[:, 0, 0]]]
        back = np.stack([np.stack(row, axis=-1) for row in rows], axis=-2) / det[:, None, None]
        return Affine(back, -_matvec(back, self.shift))

    def compose(self, first: "Affine") -> "Affine":
        """The maps that apply `first`, then `self`."""
        columns = [_matvec(self.matrix, first.matrix[:, :, k]) for k in (0, 1)]
        return Affine(np.stack(columns, axis=-1), _matvec(self.matrix, first.shift) + self.shift)

    def select(self, chosen: Integers) -> "Affine":
        """The maps at the indices `chosen`."""
        return Affine(self.matrix[chosen], self.shift[chosen])

    def map_grid(self, x: Floats, y: Floats) -> tuple[Floats, Floats]:
        """(X,), (Y,) -> (B, Y, X) twice: the coordinates of the mapped grid points."""
        m, t = self.matrix[..., None, None], self.shift[..., None, None]
        across, down = x[None, None, :], y[None, :, None]
        return (
            m[:, 0, 0] * across + (m[:, 0, 1] * down + t[:, 0]),
            m[:, 1, 0] * across + (m[:, 1, 1] * down + t[:, 1]),
        )


def _matvec(matrix: Floats, vector: Floats) -> Floats:
    """(B, 2, 2), (B, 2) -> (B, 2), without BLAS, whose sums differ with the batch size."""
    return matrix[:, :, 0] * vector[:, :1] + matrix[:, :, 1] * vector[:, 1:]


@dataclass(frozen=True)
class Texture:
    """B scalar fields, each a sum of plane waves.

    One formula gives six kinds: no wave is flat, one slow wave a gradient, one fast wave stripes,
    two waves of equal length checks, waves of all lengths with falling amplitude 1/f noise, and
    waves of one length spots.

    Args:
        vectors: (B, W, 2) wave vectors in radians per unit.
        amplitudes: (B, W), with unit power in total; all zero for flat.
        phases: (B, W).
        contrast: (B,); 3 clips the waves to hard edges.
    """

    vectors: Floats
    amplitudes: Floats
    phases: Floats
    contrast: Floats

    @classmethod
    def sample(cls, d: KeyedUniform, kind: Integers) -> "Texture":
        """(B,) indices into TEXTURES -> random textures of these kinds."""
        angle, length = d.uniform(0, 2 * math.pi), d.log_uniform(3, 22)
        angles, u = d.uniforms(WAVES, 0, 2 * math.pi), d.uniforms(WAVES)
        falling, hard, broad = d.uniform(0.2, 1.2), d.bernoulli(0.3), d.bernoulli(0.5)
        phases = d.uniforms(WAVES, 0, 2 * math.pi)
        first, second = _unit(angle) * length[:, None], _unit(angle + f32(math.pi / 2))
        second = second * length[:, None]
        vectors = np.zeros((len(kind), WAVES, 2), dtype=np.float32)
        amplitudes = np.zeros((len(kind), WAVES), dtype=np.float32)
        gradient, stripes, checks, noise, spots = ((kind == k) for k in range(1, 6))
        vectors[gradient, 0] = (_unit(angle) * (f32(0.5) + u[:, :1]))[gradient]
        vectors[stripes, 0] = first[stripes]
        vectors[checks, 0] = ((first + second) * f32(0.7))[checks]
        vectors[checks, 1] = ((first - second) * f32(0.7))[checks]
        lengths = np.exp(u * f32(math.log(25)))
        vectors[noise] = (_unit(angles) * lengths[..., None])[noise]
        spread = np.where(broad, f32(1.0), f32(0.16))[:, None] * (angles - f32(math.pi))
        around = (
            _unit(angle[:, None] + spread)
            * (length[:, None] * (f32(0.8) + f32(0.4) * u))[..., None]
        )
        vectors[spots] = around[spots]
        amplitudes[gradient | stripes | checks, 0] = 1
        amplitudes[checks, 1] = 1
        amplitudes[noise] = (lengths ** -falling[:, None])[noise]
        amplitudes[spots] = 1
        power = np.zeros(len(kind), dtype=np.float32)
        for w in range(WAVES):
            power += amplitudes[:, w] ** 2
        amplitudes /= np.sqrt(power / 2)[:, None] + f32(1e-6)
        contrast = np.where(gradient, f32(0.45), np.where(hard, f32(3.0), f32(0.4)))
        return cls(vectors, amplitudes, phases, contrast)

    def select(self, chosen: Integers) -> "Texture":
        """The textures at the indices `chosen`."""
        parts = (self.vectors, self.amplitudes, self.phases, self.contrast)
        return Texture(*(part[chosen] for part in parts))

    def evaluate(self, view: Affine, x: Floats, y: Floats, blur: Floats) -> Floats:
        """(X,), (Y,), (B,) -> (B, Y, X) in 0..1, seen through `view`.

        cos(kx x + ky y + p) is a product of two factors of rank 2, so the sum of the waves is one
        small matrix product. A Gaussian blur of width `blur` only damps the waves.
        """
        kx, ky = (
            self.vectors[..., 0] * view.matrix[:, 0, i, None]
            + self.vectors[..., 1] * view.matrix[:, 1, i, None]
            for i in (0, 1)
        )  # (B, W)
        phases = self.phases + self.vectors[..., 0] * view.shift[:, :1]
        phases = phases + self.vectors[..., 1] * view.shift[:, 1:]
        damped = self.amplitudes * np.exp((kx * kx + ky * ky) * (blur * blur)[:, None] * f32(-0.5))
        down, across = ky[..., None] * y + phases[..., None], kx[..., None] * x
        left = np.concatenate([np.cos(down), -np.sin(down)], axis=1)  # (B, 2W, Y)
        left *= np.concatenate([damped, damped], axis=1)[..., None]
        right = np.concatenate([np.cos(across), np.sin(across)], axis=1)  # (B, 2W, X)
        waves = np.matmul(left.transpose(0, 2, 1), right)  # (B, Y, X)
        return np.clip(f32(0.5) + self.contrast[:, None, None] * waves, 0, 1)


def _unit(angle: Floats) -> Floats:
    """(...) -> (..., 2): the unit vectors."""
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1)

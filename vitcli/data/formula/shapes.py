"""The formulas: hashed randomness, closed contours, open curves, textures. Pure numpy, float32.

Letters: B images, Y X pixel rows and columns, S segments, W waves. Points of the plane are right
and down; the shorter side of a picture spans -1..1. Only arithmetic whose result for one image
does not depend on its neighbours in the batch is used, so that an image can be drawn alone.
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
F = np.float32

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
# What makes class 17 class 17; another number is another set of 64 shapes.
CLASS_SEED = 20260101


def hash_keys(*parts: int | Integers) -> Keys:
    """(B,) keys from integers and (B,) integers: splitmix64 (Steele et al., 2014) over the parts.

    The state of the generator is its input, so any image's randomness is there at once.
    """
    keys = np.zeros(1, dtype=np.uint64)
    for part in parts:
        word = np.atleast_1d(np.asarray(part, dtype=np.int64)).astype(np.uint64)
        keys = _mix(keys + np.uint64(0x9E3779B97F4A7C15) + word)
    return keys


def _mix(x: Keys) -> Keys:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Draws:
    """Uniform numbers for each of B keys, handed out one after the other.

    The n-th number depends on the key and on n only.
    """

    def __init__(self, keys: Keys) -> None:
        self.keys = keys
        self.taken = 0

    def many(self, count: int, low: float = 0.0, high: float = 1.0) -> Floats:
        """(B, count) numbers in [low, high)."""
        steps = np.arange(self.taken + 1, self.taken + count + 1, dtype=np.uint64)
        self.taken += count
        bits = _mix(self.keys[:, None] + steps * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
        uniform = bits.astype(np.float32) * F(2**-24)  # (B, count)
        return F(low) + F(high - low) * uniform

    def one(self, low: float = 0.0, high: float = 1.0) -> Floats:
        """(B,) numbers in [low, high)."""
        return self.many(1, low, high)[:, 0].copy()

    def log(self, low: float, high: float) -> Floats:
        """(B,) numbers in [low, high) whose logarithms are uniform."""
        return np.exp(self.one(math.log(low), math.log(high)))

    def chance(self, rate: float) -> NDArray[np.bool_]:
        """(B,) True with probability `rate`."""
        return self.one() < F(rate)

    def choice(self, count: int) -> Integers:
        """(B,) integers in 0..count-1."""
        return np.minimum((self.one() * F(count)).astype(np.int64), count - 1)

    def colour(self) -> Floats:
        """(B, 3) RGB in 0..1: a grey, and mostly a little saturation."""
        grey, saturation = self.one(0.02, 0.98), self.one() ** F(1.5)
        mixed = grey[:, None] + saturation[:, None] * self.many(3, -0.5, 0.5)
        return np.clip(mixed, 0, 1)


@lru_cache(maxsize=1)
def contour_table() -> Floats:
    """(NUM_CONTOURS, 2, HARMONICS): cosine and sine coefficients of each class's radius.

    Two harmonics a class, as VisualAtom (Takashima et al., 2023) modulates circles; every second
    class is mirrored about the vertical, as things that stand upright tend to be.
    """
    d = Draws(hash_keys(CLASS_SEED, 1, np.arange(NUM_CONTOURS)))
    phase, weight = d.many(HARMONICS, 0, 2 * math.pi), d.many(HARMONICS)
    order = np.argsort(-weight, axis=1)
    chosen = np.zeros_like(weight)
    np.put_along_axis(chosen, order[:, :2], 1, axis=1)
    n = np.arange(1, HARMONICS + 1, dtype=np.float32)
    size = chosen * (F(0.12) + F(0.25) * weight) / np.sqrt(n)
    upright = np.where(np.sin(phase) < 0, F(math.pi), F(0)) + n * F(math.pi / 2)
    mirrored = (np.arange(NUM_CONTOURS) % 2 == 0)[:, None]
    phase = np.where(mirrored, upright, phase)
    return np.stack([size * np.cos(phase), size * np.sin(phase)], axis=1).astype(np.float32)


@lru_cache(maxsize=1)
def curve_table() -> Floats:
    """(NUM_CURVES, CURVE_POINTS, 2): the corners of each class's stroke, in -1..1.

    Two classes of three are cosine series, which bend like handwriting; the third has corners.
    """
    d = Draws(hash_keys(CLASS_SEED, 2, np.arange(NUM_CURVES)))
    t = np.linspace(0, 1, CURVE_POINTS, dtype=np.float32)
    smooth = np.zeros((NUM_CURVES, CURVE_POINTS, 2), dtype=np.float32)
    for k in range(1, 5):
        smooth += np.cos(F(math.pi * k) * t)[:, None] * d.many(2, -1, 1)[:, None] / F(k**0.6)
    corners = d.many(8, -1, 1).reshape(NUM_CURVES, 4, 2)
    at = np.minimum((t * 3).astype(np.int64), 2)
    along = (t * 3 - at)[:, None]
    angular = corners[:, at] * (1 - along) + corners[:, at + 1] * along
    points = np.where((np.arange(NUM_CURVES) % 3 == 0)[:, None, None], angular, smooth)
    low, high = points.min(axis=1, keepdims=True), points.max(axis=1, keepdims=True)
    unit = (points - (low + high) / 2) / np.maximum((high - low) / 2, F(0.3))
    return (unit * np.array([0.75, 1.0], dtype=np.float32)).astype(np.float32)


def inside_contour(x: Floats, y: Floats, coefficients: Floats) -> Floats:
    """(B, Y, X) twice, (B, 2, HARMONICS) -> (B, Y, X): the contour's radius less the point's.

    radius(t) = 0.85 + sum_n a_n cos(n t) + b_n sin(n t); cos(n t) and sin(n t) come from the
    point's direction by the addition theorem, which needs no arc tangent.
    """
    radius = np.sqrt(x * x + y * y) + F(1e-6)
    cos1, sin1 = x / radius, y / radius
    cos, sin = cos1, sin1
    edge = F(0.85) - radius
    for n in range(HARMONICS):
        a, b = coefficients[:, 0, n, None, None], coefficients[:, 1, n, None, None]
        edge += a * cos + b * sin
        cos, sin = cos * cos1 - sin * sin1, cos * sin1 + sin * cos1
    return edge


def distance_to_curve(x: Floats, y: Floats, points: Floats) -> Floats:
    """(B, Y, X) twice, (B, S+1, 2) -> (B, Y, X): how far each point is from a chain of segments."""
    best = np.full_like(x, 1e6)
    for s in range(points.shape[1] - 1):
        a = points[:, s]
        along = points[:, s + 1] - a  # (B, 2)
        unit = along / (along[:, :1] ** 2 + along[:, 1:] ** 2 + F(1e-6))
        dx, dy = x - a[:, 0, None, None], y - a[:, 1, None, None]
        at = np.clip(dx * unit[:, 0, None, None] + dy * unit[:, 1, None, None], 0, 1)
        dx -= at * along[:, 0, None, None]
        dy -= at * along[:, 1, None, None]
        np.minimum(best, dx * dx + dy * dy, out=best)
    return np.sqrt(best)


@dataclass(frozen=True)
class Affine:
    """B maps of the plane: p -> matrix p + shift, (B, 2, 2) and (B, 2)."""

    matrix: Floats
    shift: Floats

    @classmethod
    def turn(cls, angle: Floats, scale_x: Floats, scale_y: Floats, shift: Floats) -> "Affine":
        """Scale each axis, then turn by `angle` radians, then shift."""
        cos, sin = np.cos(angle), np.sin(angle)
        rows = [[cos * scale_x, -sin * scale_y], [sin * scale_x, cos * scale_y]]
        return cls(np.stack([np.stack(row, axis=-1) for row in rows], axis=-2), shift)

    def inverse(self) -> "Affine":
        """The maps back."""
        m = self.matrix
        det = m[:, 0, 0] * m[:, 1, 1] - m[:, 0, 1] * m[:, 1, 0]
        rows = [[m[:, 1, 1], -m[:, 0, 1]], [-m[:, 1, 0], m[:, 0, 0]]]
        back = np.stack([np.stack(row, axis=-1) for row in rows], axis=-2) / det[:, None, None]
        return Affine(back, -_times(back, self.shift))

    def after(self, first: "Affine") -> "Affine":
        """First `first`, then these."""
        columns = [_times(self.matrix, first.matrix[:, :, k]) for k in (0, 1)]
        return Affine(np.stack(columns, axis=-1), _times(self.matrix, first.shift) + self.shift)

    def pick(self, chosen: Integers) -> "Affine":
        """Some of the B."""
        return Affine(self.matrix[chosen], self.shift[chosen])

    def points(self, x: Floats, y: Floats) -> tuple[Floats, Floats]:
        """(X,), (Y,) -> (B, Y, X) twice: where the points of the grid go."""
        m, t = self.matrix[..., None, None], self.shift[..., None, None]
        across, down = x[None, None, :], y[None, :, None]
        return (
            m[:, 0, 0] * across + (m[:, 0, 1] * down + t[:, 0]),
            m[:, 1, 0] * across + (m[:, 1, 1] * down + t[:, 1]),
        )


def _times(matrix: Floats, vector: Floats) -> Floats:
    """(B, 2, 2), (B, 2) -> (B, 2); written out, because BLAS sums differ with the batch."""
    return matrix[:, :, 0] * vector[:, :1] + matrix[:, :, 1] * vector[:, 1:]


@dataclass(frozen=True)
class Texture:
    """B scalar fields, each a sum of plane waves: six kinds of surface in one formula.

    One slow wave is a gradient, one fast wave stripes, two of equal length checks, waves of
    all lengths with falling amplitude 1/f noise, waves of one length spots.

    Args:
        vectors: (B, W, 2) wave vectors, radians a unit.
        amplitudes: (B, W), of unit power together; all zero for flat.
        phases: (B, W).
        contrast: (B,) 3 cuts the waves off into hard edges.
    """

    vectors: Floats
    amplitudes: Floats
    phases: Floats
    contrast: Floats

    @classmethod
    def draw(cls, d: Draws, kind: Integers) -> "Texture":
        """(B,) indices into TEXTURES -> textures of these kinds."""
        angle, length = d.one(0, 2 * math.pi), d.log(3, 22)
        angles, u = d.many(WAVES, 0, 2 * math.pi), d.many(WAVES)
        falling, hard, broad = d.one(0.2, 1.2), d.chance(0.3), d.chance(0.5)
        phases = d.many(WAVES, 0, 2 * math.pi)
        first, second = _unit(angle) * length[:, None], _unit(angle + F(math.pi / 2))
        second = second * length[:, None]
        vectors = np.zeros((len(kind), WAVES, 2), dtype=np.float32)
        amplitudes = np.zeros((len(kind), WAVES), dtype=np.float32)
        gradient, stripes, checks, noise, spots = ((kind == k) for k in range(1, 6))
        vectors[gradient, 0] = (_unit(angle) * (F(0.5) + u[:, :1]))[gradient]
        vectors[stripes, 0] = first[stripes]
        vectors[checks, 0] = ((first + second) * F(0.7))[checks]
        vectors[checks, 1] = ((first - second) * F(0.7))[checks]
        lengths = np.exp(u * F(math.log(25)))
        vectors[noise] = (_unit(angles) * lengths[..., None])[noise]
        spread = np.where(broad, F(1.0), F(0.16))[:, None] * (angles - F(math.pi))
        around = (
            _unit(angle[:, None] + spread) * (length[:, None] * (F(0.8) + F(0.4) * u))[..., None]
        )
        vectors[spots] = around[spots]
        amplitudes[gradient | stripes | checks, 0] = 1
        amplitudes[checks, 1] = 1
        amplitudes[noise] = (lengths ** -falling[:, None])[noise]
        amplitudes[spots] = 1
        power = np.zeros(len(kind), dtype=np.float32)
        for w in range(WAVES):
            power += amplitudes[:, w] ** 2
        amplitudes /= np.sqrt(power / 2)[:, None] + F(1e-6)
        contrast = np.where(gradient, F(0.45), np.where(hard, F(3.0), F(0.4)))
        return cls(vectors, amplitudes, phases, contrast)

    def pick(self, chosen: Integers) -> "Texture":
        """Some of the B."""
        parts = (self.vectors, self.amplitudes, self.phases, self.contrast)
        return Texture(*(part[chosen] for part in parts))

    def field(self, view: Affine, x: Floats, y: Floats, blur: Floats) -> Floats:
        """(X,), (Y,), (B,) -> (B, Y, X) in 0..1, as seen through `view`.

        cos(kx x + ky y + p) is a product of two factors of rank 2, so the sum of the waves is one
        small matrix product; a Gaussian blur of width `blur` only damps the waves.
        """
        kx, ky = (
            self.vectors[..., 0] * view.matrix[:, 0, i, None]
            + self.vectors[..., 1] * view.matrix[:, 1, i, None]
            for i in (0, 1)
        )  # (B, W)
        phases = self.phases + self.vectors[..., 0] * view.shift[:, :1]
        phases = phases + self.vectors[..., 1] * view.shift[:, 1:]
        damped = self.amplitudes * np.exp((kx * kx + ky * ky) * (blur * blur)[:, None] * F(-0.5))
        down, across = ky[..., None] * y + phases[..., None], kx[..., None] * x
        left = np.concatenate([np.cos(down), -np.sin(down)], axis=1)  # (B, 2W, Y)
        left *= np.concatenate([damped, damped], axis=1)[..., None]
        right = np.concatenate([np.cos(across), np.sin(across)], axis=1)  # (B, 2W, X)
        waves = np.matmul(left.transpose(0, 2, 1), right)  # (B, Y, X)
        return np.clip(F(0.5) + self.contrast[:, None, None] * waves, 0, 1)


def _unit(angle: Floats) -> Floats:
    """(...) -> (..., 2): the directions."""
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1)

"""The targets of the `descriptors` objective, computed again from their definition."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from vitcli.train.objectives.descriptors import orientations, quadrant_targets

Array = NDArray[np.float64]


def share_by_angle(image: Array, signed: bool) -> Array:
    """(C, Y, X) -> (8, Y, X): the strongest gradient's root, shared out by a softmax of angles."""
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)), mode="edge")
    dx = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    dy = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    shares = np.zeros((8, *image.shape[1:]))
    for y, x in np.ndindex(*image.shape[1:]):
        norms = np.hypot(dx[:, y, x], dy[:, y, x])
        best = int(norms.argmax())
        angle = math.atan2(dy[best, y, x], dx[best, y, x]) * (1 if signed else 2)
        weights = np.exp(4 * np.cos(angle - np.arange(8) * math.pi / 4))
        shares[:, y, x] = (norms[best] ** 2 + 1e-12) ** 0.25 * weights / weights.sum()
    return shares


def means_of_cells(maps: Array, factor: int) -> Array:
    """(F, Y, X) -> (F, 4, 4), after each value was repeated `factor` times in both directions."""
    large = maps.repeat(factor, axis=1).repeat(factor, axis=2)
    rows, columns = (side // 4 for side in large.shape[1:])
    cells: Array = large.reshape(len(maps), 4, rows, 4, columns).mean(axis=(2, 4))
    return cells


def halved(image: Array) -> Array:
    """(C, Y, X) -> (C, Y/2, X/2): means of 2x2 pixels."""
    channels, rows, columns = image.shape
    small: Array = image.reshape(channels, rows // 2, 2, columns // 2, 2).mean(axis=(2, 4))
    return small


def smooth_images(rows: int, columns: int) -> torch.Tensor:
    """(6, 3, Y, X) in 0..1: smooth noise, and one image of a single colour."""
    small = torch.rand(6, 3, rows // 4, columns // 4, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(small, (rows, columns), mode="bilinear")
    images[0] = 0.3
    return images


@pytest.mark.parametrize("signed", [True, False])
def test_orientations(signed: bool) -> None:
    images = smooth_images(8, 12)
    wanted = [share_by_angle(image, signed) for image in images.double().numpy()]
    assert np.allclose(orientations(images, signed).numpy(), np.stack(wanted), atol=1e-5)


# Cells of the halved and quartered image end at its pixels, or between them.
@pytest.mark.parametrize(("rows", "columns"), [(16, 32), (12, 20)])
def test_quadrant_targets(rows: int, columns: int) -> None:
    images = smooth_images(rows, columns)
    described = []
    for image in images.double().numpy():
        half = halved(image)
        colours = [np.exp(-(((c - k / 3) * 4) ** 2)) for c in image for k in range(4)]
        described.append(
            np.concatenate(
                [
                    means_of_cells(share_by_angle(image, signed=False), 1),
                    means_of_cells(share_by_angle(half, signed=False), 2),
                    means_of_cells(share_by_angle(halved(half), signed=True), 4),
                    means_of_cells(np.stack(colours), 1),
                ]
            )
        )
    cells = np.stack(described)  # (6, 36, 4, 4)
    quadrants = [
        cells[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(6, -1)
        for i, j in np.ndindex(2, 2)
    ]
    targets = np.stack(quadrants, axis=1)  # (6, 4, 144)
    mean, std = targets.mean(axis=(0, 1)), targets.std(axis=(0, 1), ddof=1)
    wanted = (targets - mean) / (std + 1e-4)
    assert np.allclose(quadrant_targets(images).numpy(), wanted, atol=1e-3)

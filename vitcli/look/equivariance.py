"""Inductive bias, measured: does the feature map move when the picture does?

"In ViT, only MLP layers are local and translationally equivariant" (section 3.1); how much of it
a model has is measured here. Two windows are cut out of one picture, the second s pixels further
down and to the right, so that no border is invented. A network that is equivariant gives the second
window the first one's feature map, moved by s / cell cells (read between cells by linear
interpolation where that is no whole number). Over the cells that both have,

    R2 = 1 - sum |second - moved first|^2 / sum |second - mean|^2,

summed over pictures, places and channels, the mean being each channel's over pictures and places
(scikit-learn's `r2_score`, variance-weighted). 1: the map moves exactly with the picture; 0: no
better than the mean feature. The baseline compares each second window with the first window of
another picture.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitcli.vit import Config, Model, ResNet, ResNetConfig
from vitcli.vit.variants import RESNETS

WIDTHS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
SMALLEST_UNITS = (1, 1, 1, 1)
LEAST_CELLS = 4  # a side of a feature map in which something can be seen to move


def cell_size(config: Config) -> int:
    """Pixels from one place of the feature map to the next."""
    if isinstance(config, ResNetConfig):
        return resnet_stride(config.layers)
    return config.pixels_per_patch


def resnet_stride(layers: Sequence[int]) -> int:
    """Pixels from one place of a BiT ResNet's feature map to the next."""
    stride: int = 4 * 2 ** (len(layers) - 1)
    return stride


def feature_map(model: Model, images: Tensor) -> Tensor:
    """(B, C, Y, X) -> (B, D, rows, cols): the patch tokens, or the ResNet's, before pooling."""
    if isinstance(model, ResNet):
        return model.feature_map(images)
    tokens = model.tokens(images)[:, model.config.num_prefix_tokens :]  # (B, N, D)
    b, _, d = tokens.shape
    return tokens.transpose(1, 2).reshape(b, d, *model.grid_of(images))


def shifts_of(patch: int) -> tuple[int, ...]:
    """Pixels by which the window moves: half a patch, one, and two."""
    return tuple(sorted({patch // 2, patch, 2 * patch} - {0}))


def windows(images: Tensor, size: tuple[int, int], shifts: Iterable[int]) -> Tensor:
    """(B, C, Y + s, X + s) -> (S + 1, B, C, Y, X): the first window, then one for each shift."""
    rows, cols = size
    places = (0, *shifts)
    return torch.stack([images[:, :, s : s + rows, s : s + cols] for s in places])


def moved(features: Tensor, cells: float) -> Tensor:
    """(B, D, rows, cols) -> (B, D, rows', cols'): what lies `cells` further down and right.

    Only the places that the map has; linear between cells; empty where there are none.
    """
    for dim in (2, 3):
        size = features.shape[dim]
        whole = math.floor(cells)
        part = cells - whole
        count = max(0, size - math.ceil(cells))
        here = features.narrow(dim, min(whole, size), count)
        if part:
            here = (1 - part) * here + part * features.narrow(dim, min(whole + 1, size), count)
        features = here
    return features


def inner_half(features: Tensor) -> Tensor:
    """(B, D, rows, cols) -> (B, D, rows', cols'): without the outer quarters."""
    rows, cols = (size // 4 for size in features.shape[2:])
    return features[:, :, rows : features.shape[2] - rows, cols : features.shape[3] - cols]


def explained(second: Tensor, expected: Tensor) -> float | None:
    """(B, D, rows, cols) twice -> R2 of the first by the second; None where it has no value."""
    second, expected = second.double(), expected.double()
    if not second.numel():
        return None
    rest = (second - expected).square().sum()
    whole = (second - second.mean(dim=(0, 2, 3), keepdim=True)).square().sum()
    return float(1 - rest / whole) if whole > 0 else None


@dataclass(frozen=True)
class Equivariance:
    """How a feature map follows its picture.

    Attributes:
        cell: pixels between two places of the map.
        shifts: pixels of each shift.
        r2: for each shift; None where the map is too small to tell.
        inner: the same over the inner half of the rows and columns, where the zeros that
            convolutions see beyond the border come in least.
        unrelated: the same with the first window of another picture.
        images: pictures that were compared.
    """

    cell: int
    shifts: tuple[int, ...]
    r2: tuple[float | None, ...]
    inner: tuple[float | None, ...]
    unrelated: tuple[float | None, ...]
    images: int


def measure(
    model: Model,
    pictures: Sequence[Tensor],
    shifts: tuple[int, ...],
    size: tuple[int, int],
) -> Equivariance:
    """The feature maps of shifted windows against those of the first, shifted.

    Args:
        pictures: two or more of (1, C, Y + s, X + s), normalised, s the largest shift.
        shifts: in pixels.
        size: (Y, X) of a window.
    """
    assert len(pictures) > 1
    cell = cell_size(model.config)
    maps = []
    with torch.inference_mode():
        for picture in pictures:
            # One at a time: the first stages of a ResNet are larger than its weights.
            found = [feature_map(model, one).cpu() for one in windows(picture, size, shifts)]
            maps.append(torch.cat(found))  # (S + 1, D, rows, cols)
    whole = torch.stack(maps, dim=1)  # (S + 1, B, D, rows, cols)
    first, others = whole[0], whole[0].roll(1, dims=0)  # the map of the picture before
    r2, middle, unrelated = [], [], []
    for number, shift in enumerate(shifts):
        expected = moved(first, shift / cell)
        rows, cols = expected.shape[2:]
        second = whole[number + 1][:, :, :rows, :cols]
        r2.append(explained(second, expected))
        middle.append(explained(inner_half(second), inner_half(expected)))
        unrelated.append(explained(second, moved(others, shift / cell)))
    return Equivariance(cell, shifts, tuple(r2), tuple(middle), tuple(unrelated), len(pictures))


def same_budget(
    parameters: int, image_size: tuple[int, int], num_channels: int = 3
) -> ResNetConfig:
    """The BiT ResNet whose number of parameters is nearest, on a log scale.

    Without the last stages where its map would have fewer than `LEAST_CELLS` places a side.
    """
    stages = 4
    while stages > 1 and min(image_size) // resnet_stride((1,) * stages) < LEAST_CELLS:
        stages -= 1
    kinds = {units[:stages] for units in (SMALLEST_UNITS, *RESNETS.values())}
    configs = [
        ResNetConfig(image_size, num_channels, units, width)
        for units in sorted(kinds)
        for width in WIDTHS
    ]
    return min(configs, key=lambda c: abs(math.log(count_parameters(c) / max(parameters, 1))))


def count_parameters(config: ResNetConfig) -> int:
    """Parameters of a BiT ResNet without a head, in closed form."""
    width = round(64 * config.width)
    total, inputs = 49 * config.num_channels * width, width
    for stage, units in enumerate(config.layers):
        inner, outputs = width * 2**stage, 4 * width * 2**stage
        for unit in range(units):
            convolutions = inputs * inner + 9 * inner**2 + inner * outputs
            norms = 2 * (inputs + 2 * inner)
            changes = inputs != outputs or (unit == 0 and stage > 0)
            total += convolutions + norms + (inputs * outputs if changes else 0)
            inputs = outputs
    return total + 2 * inputs


def resnet_name(config: ResNetConfig) -> str:
    """`R50x1`, or with stages left out `R50x0.5/2`."""
    depth = 3 * sum(config.layers) + 2
    full = {units: layers for layers, units in RESNETS.items()}
    known = next(
        (n for units, n in full.items() if units[: len(config.layers)] == config.layers), 0
    )
    name = f"R{known or depth}x{config.width:g}"
    return name if len(config.layers) == 4 else f"{name}/{len(config.layers)}"

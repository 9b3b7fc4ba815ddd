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

The table of inductive bias: this model, the same with random weights, a BiT ResNet.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitcli.data.image_set import ImageSet
from vitcli.data.loader import eval_batches
from vitcli.inspection.attention import join, look
from vitcli.inspection.attention_distance import uniform_distance, uniform_local
from vitcli.preprocess import Preprocess
from vitcli.progress import Bar, Quiet, Watcher
from vitcli.vit import Config, Network, ResNet, ResNetConfig, from_config
from vitcli.vit.variants import RESNETS
from vitcli.weights.load import require_preprocess
from vitcli.weights.loaded import LoadedModel

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


def feature_map(model: Network, images: Tensor) -> Tensor:
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
    model: Network,
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


MOST_PICTURES = 8
LEAST_PICTURES = 4  # given by the user; with fewer the built-in ones are taken
SEED = 0


@dataclass(frozen=True)
class BiasRow:
    """One network of the table.

    Attributes:
        name: what it is.
        parameters: without the head.
        moves: how its feature map follows the picture.
        local_first, local: share of the attention inside 3x3 patches, mean over the heads of the
            first layer and of all; None of a ResNet, whose convolutions see nothing else.
        local_uniform: that of attention which is the same everywhere.
        distance, distance_uniform: mean attention distance in pixels, likewise.
    """

    name: str
    parameters: int
    moves: Equivariance
    local_first: float | None = None
    local: float | None = None
    local_uniform: float | None = None
    distance: float | None = None
    distance_uniform: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values; R2 by the shift in pixels."""
        shifts = [str(shift) for shift in self.moves.shifts]
        return {
            "name": self.name,
            "parameters": self.parameters,
            "cell_pixels": self.moves.cell,
            "r2": dict(zip(shifts, self.moves.r2, strict=True)),
            "r2_inner": dict(zip(shifts, self.moves.inner, strict=True)),
            "r2_unrelated": dict(zip(shifts, self.moves.unrelated, strict=True)),
            "local_first_layer": self.local_first,
            "local": self.local,
            "local_uniform": self.local_uniform,
            "distance_pixels": self.distance,
            "distance_uniform_pixels": self.distance_uniform,
        }


def read_pictures(
    images: ImageSet, preprocess: Preprocess, margin: int
) -> tuple[list[Tensor], list[str]]:
    """Up to `MOST_PICTURES` of (1, C, Y + margin, X + margin) uint8; what was unreadable."""
    rows, cols = preprocess.image_size
    larger = preprocess.resized_to((rows + margin, cols + margin))
    pictures: list[Tensor] = []
    broken: list[str] = []
    for batch in eval_batches(images, larger, batch_size=1, limit=MOST_PICTURES):
        broken += batch.broken
        pictures += [image[None] for image in batch.images]
    return pictures, broken


def row(
    name: str,
    model: Network,
    pictures: Sequence[Tensor],
    preprocess: Preprocess,
    shifts: tuple[int, ...],
    bar: Bar,
) -> BiasRow:
    """One network measured on `pictures`, in windows of the size that `preprocess` has."""
    rows, cols = preprocess.image_size
    parameters = body_parameters(model)
    pictures = [preprocess.normalize(picture) for picture in pictures]
    moves = measure(model, pictures, shifts, (rows, cols))
    bar.advance()
    if isinstance(model, ResNet):
        return BiasRow(name, parameters, moves)
    grid, patch = model.config.grid, model.config.pixels_per_patch
    looked = join([look(model, picture[:, :, :rows, :cols]) for picture in pictures])
    return BiasRow(
        name,
        parameters,
        moves,
        local_first=float(looked.local[:, 0].mean()),
        local=float(looked.local.mean()),
        local_uniform=uniform_local(grid),
        distance=patch * float(looked.distance.mean()),
        distance_uniform=patch * uniform_distance(grid),
    )


def others(
    config: Config,
    parameters: int,
    pictures: Sequence[Tensor],
    preprocess: Preprocess,
    *,
    random_itself: bool,
    resnet: tuple[str, LoadedModel] | None = None,
    watch: Watcher | None = None,
) -> list[BiasRow]:
    """The rows to compare with, one network in memory at a time.

    Args:
        config: of the model that is compared.
        parameters: of that model, without its head.
        pictures: as `read_pictures` gives them, on the device that computes.
        preprocess: of that model.
        random_itself: the model has random weights already, and needs no such twin.
        resnet: name and network to take in place of a random one of the same budget.
    """
    shifts = shifts_of(cell_size(config))
    device = pictures[0].device
    found: list[BiasRow] = []
    with (watch or Quiet()).progress("other networks", 2) as bar:
        if not random_itself:
            twin = fresh(config).to(device)
            found.append(row("random twin", twin, pictures, preprocess, shifts, bar))
            del twin
        if resnet is not None:
            name, loaded = resnet
            own = require_preprocess(loaded).resized_to(preprocess.image_size)
            found.append(row(name, loaded.network.to(device), pictures, own, shifts, bar))
        elif not isinstance(config, ResNetConfig):
            plain = same_budget(parameters, config.image_size, config.num_channels)
            name = f"{resnet_name(plain)}, random"
            found.append(row(name, fresh(plain).to(device), pictures, preprocess, shifts, bar))
    return found


def fresh(config: Config) -> Network:
    """A model of `config` with random weights, in eval mode."""
    return from_config(config).init_weights(torch.Generator().manual_seed(SEED)).eval()


def body_parameters(model: Network) -> int:
    """All parameters but those of the heads."""
    named = model.named_parameters()
    return sum(p.numel() for name, p in named if not name.startswith(("head.", "head_dist.")))

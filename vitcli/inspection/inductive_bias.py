"""Inductive bias, measured: translation equivariance of the feature map, locality of the attention.

"In ViT, only MLP layers are local and translationally equivariant" (section 3.1). The measurement
cuts two windows out of one image. The second window is s pixels further down and to the right, so
no border has to be invented. In an equivariant network the second feature map is the first one,
shifted by s / cell cells (with linear interpolation between cells).

Each map is centred: its mean over the places is subtracted, per image and channel. The mean of an
image hardly changes with a shift, so a network that spreads it to all places is invariant, not
equivariant. Over the places in both maps, with a the second map and b the shifted first one,

    R2 = (sum a b)^2 / (sum a^2 sum b^2), or 0 if sum a b < 0,

summed over images, places and channels: the share of the variance within images that the shifted
map explains, up to one scale (scikit-learn's `LinearRegression` without an intercept). 1 is exact
equivariance, 0 is no relation. Two controls show what a high value is worth: `unmoved` compares the
same places of both maps, without a shift (a map that depends on the place only has 1 there), and
`unrelated` compares with the first window of another image.

The table compares the model with random weights of the same shape and with a BiT ResNet. Networks
are compared at equal stride: a ResNet with another stride reads resampled images, so that its map
has as many cells.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitcli.data.image_set import ImageSet
from vitcli.data.loader import eval_batches
from vitcli.inspection.attention import AttentionStatistics, measure_attention
from vitcli.inspection.attention_distance import uniform_distance, uniform_local_share
from vitcli.preprocess import Preprocess
from vitcli.progress import Bar, Quiet, Watcher
from vitcli.vit import Config, Network, ResNet, ResNetConfig, from_config
from vitcli.vit.variants import RESNETS
from vitcli.weights.load import require_preprocess
from vitcli.weights.loaded import LoadedModel

RESNET_WIDTHS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
SMALLEST_LAYERS = (1, 1, 1, 1)
MAX_IMAGES = 8
MIN_IMAGES = 4  # with fewer images from the user, built-in images are used
ROUNDING = 1e-10  # share of the power of a map that is not counted as structure
SEED = 0


def cell_size(config: Config) -> int:
    """Pixels between two cells of the feature map."""
    if isinstance(config, ResNetConfig):
        return resnet_stride(config.layers)
    return config.pixels_per_patch


def resnet_stride(layers: Sequence[int]) -> int:
    """Pixels between two cells of the feature map of a BiT ResNet."""
    stride: int = 4 * 2 ** (len(layers) - 1)
    return stride


def feature_map(model: Network, images: Tensor) -> Tensor:
    """(B, C, Y, X) -> (B, D, rows, cols): patch tokens, or ResNet features, before pooling."""
    if isinstance(model, ResNet):
        return model.feature_map(images)
    tokens = model.tokens(images)[:, model.config.num_prefix_tokens :]  # (B, N, D)
    b, _, d = tokens.shape
    return tokens.transpose(1, 2).reshape(b, d, *model.grid_of(images))


def default_shifts(cell: int) -> tuple[int, ...]:
    """Shifts in pixels: half a cell, one cell, two cells."""
    return tuple(sorted({cell // 2, cell, 2 * cell} - {0}))


def shifted_windows(images: Tensor, size: tuple[int, int], shifts: Iterable[int]) -> Tensor:
    """(B, C, Y + s, X + s) -> (S + 1, B, C, Y, X): the first window, then one for each shift."""
    rows, cols = size
    return torch.stack([images[:, :, s : s + rows, s : s + cols] for s in (0, *shifts)])


def shift_features(features: Tensor, cells: float) -> Tensor:
    """(B, D, rows, cols) -> (B, D, rows', cols'): the features `cells` further down and right.

    The result has only the places that the map covers, and may be empty. Values between cells are
    interpolated linearly.
    """
    for dim in (2, 3):
        size = features.shape[dim]
        whole = math.floor(cells)
        part = cells - whole
        count = max(0, size - math.ceil(cells))
        shifted = features.narrow(dim, min(whole, size), count)
        if part:
            following = features.narrow(dim, min(whole + 1, size), count)
            shifted = (1 - part) * shifted + part * following
        features = shifted
    return features


def inner_half(features: Tensor) -> Tensor:
    """(B, D, rows, cols) -> (B, D, rows', cols') without the outer quarters."""
    rows, cols = (size // 4 for size in features.shape[2:])
    return features[:, :, rows : features.shape[2] - rows, cols : features.shape[3] - cols]


def variance_explained(features: Tensor, expected: Tensor) -> float | None:
    """(B, D, rows, cols) twice -> R2 within images; None if the maps have less than two places.

    A map without a structure in the image, equal at all places up to rounding, has 0.
    """
    if features.shape[2] * features.shape[3] < 2:
        return None
    variances, centred = [], []
    for one in (features.double(), expected.double()):
        centred.append(one - one.mean(dim=(2, 3), keepdim=True))
        variances.append(float(centred[-1].square().sum()))
        if variances[-1] <= ROUNDING * float(one.square().sum()):
            return 0.0
    product = float((centred[0] * centred[1]).sum())
    return max(product, 0.0) ** 2 / (variances[0] * variances[1])


@dataclass(frozen=True)
class Equivariance:
    """How exactly a feature map follows a shift of its image.

    Attributes:
        cell: pixels of the network's input between two cells of the map.
        shifts: input pixels of each shift.
        r2: for each shift; None if the map is too small.
        inner: the same over the inner half of rows and columns, where zero padding matters least.
        unmoved: the same with the first map at the same places, not shifted.
        unrelated: the same with the first window of another image.
        images: number of images.
    """

    cell: int
    shifts: tuple[int, ...]
    r2: tuple[float | None, ...]
    inner: tuple[float | None, ...]
    unmoved: tuple[float | None, ...]
    unrelated: tuple[float | None, ...]
    images: int


def measure_equivariance(
    model: Network, images: Sequence[Tensor], shifts: tuple[int, ...], size: tuple[int, int]
) -> Equivariance:
    """Compare the feature maps of shifted windows with the shifted map of the first window.

    Args:
        images: two or more of (1, C, Y + s, X + s), normalised; s is the largest shift.
        shifts: in pixels.
        size: (Y, X) of a window.
    """
    assert len(images) > 1
    cell = cell_size(model.config)
    maps = []
    with torch.inference_mode():
        for image in images:
            # One window at a time: the first stages of a ResNet need more memory than its weights.
            windows = shifted_windows(image, size, shifts)
            maps.append(torch.cat([feature_map(model, window).cpu() for window in windows]))
    stacked = torch.stack(maps, dim=1)  # (S + 1, B, D, rows, cols)
    first, other = stacked[0], stacked[0].roll(1, dims=0)  # `other` is the map of another image
    r2, inner, unmoved, unrelated = [], [], [], []
    for number, shift in enumerate(shifts):
        expected = shift_features(first, shift / cell)
        rows, cols = expected.shape[2:]
        second = stacked[number + 1][:, :, :rows, :cols]
        r2.append(variance_explained(second, expected))
        inner.append(variance_explained(inner_half(second), inner_half(expected)))
        unmoved.append(variance_explained(second, first[:, :, :rows, :cols]))
        unrelated.append(variance_explained(second, shift_features(other, shift / cell)))
    return Equivariance(
        cell, shifts, tuple(r2), tuple(inner), tuple(unmoved), tuple(unrelated), len(images)
    )


def resnet_of_size(
    parameters: int, cell: int, image_size: tuple[int, int], num_channels: int = 3
) -> ResNetConfig:
    """The BiT ResNet whose number of parameters is nearest to `parameters` on a log scale.

    It has as many stages as give the stride nearest to `cell` pixels.
    """
    stages = min(range(1, 5), key=lambda k: abs(math.log(resnet_stride((1,) * k) / cell)))
    configs = [
        ResNetConfig(image_size, num_channels, layers, width)
        for layers in sorted({k[:stages] for k in (SMALLEST_LAYERS, *RESNETS.values())})
        for width in RESNET_WIDTHS
    ]
    return min(configs, key=lambda c: abs(math.log(resnet_parameters(c) / max(parameters, 1))))


def resnet_parameters(config: ResNetConfig) -> int:
    """Number of parameters of a BiT ResNet without a head, in closed form.

    Building the three dozen candidates of `resnet_of_size` would take seconds.
    """
    width = round(64 * config.width)
    total, inputs = 49 * config.num_channels * width, width
    for stage, units in enumerate(config.layers):
        inner, outputs = width * 2**stage, 4 * width * 2**stage
        for unit in range(units):
            convolutions = inputs * inner + 9 * inner**2 + inner * outputs
            norms = 2 * (inputs + 2 * inner)
            projects = inputs != outputs or (unit == 0 and stage > 0)
            total += convolutions + norms + (inputs * outputs if projects else 0)
            inputs = outputs
    return total + 2 * inputs


def resnet_name(config: ResNetConfig) -> str:
    """`R50x1`, or `R50x0.5/2` with two stages."""
    stages = len(config.layers)
    depth = next(
        (depth for depth, layers in RESNETS.items() if layers[:stages] == config.layers),
        3 * sum(config.layers) + 2,
    )
    name = f"R{depth}x{config.width:g}"
    return name if stages == 4 else f"{name}/{stages}"


@dataclass(frozen=True)
class BiasRow:
    """One network of the table.

    Attributes:
        name: of the network.
        parameters: number of parameters without the head.
        equivariance: of its feature map.
        image_size: rows and columns of the windows that it reads.
        local_first, local: share of the attention inside 3x3 patches, mean over the heads of the
            first layer and of all layers; None for a ResNet.
        local_uniform: the same for uniform attention.
        distance, distance_uniform: mean attention distance in pixels, measured and uniform.
    """

    name: str
    parameters: int
    equivariance: Equivariance
    image_size: tuple[int, int]
    local_first: float | None = None
    local: float | None = None
    local_uniform: float | None = None
    distance: float | None = None
    distance_uniform: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values; R2 by the shift in pixels of the network's input."""
        found = self.equivariance
        shifts = [str(shift) for shift in found.shifts]
        return {
            "name": self.name,
            "parameters": self.parameters,
            "cell_pixels": found.cell,
            "image_size": list(self.image_size),
            "r2": dict(zip(shifts, found.r2, strict=True)),
            "r2_inner": dict(zip(shifts, found.inner, strict=True)),
            "r2_unmoved": dict(zip(shifts, found.unmoved, strict=True)),
            "r2_unrelated": dict(zip(shifts, found.unrelated, strict=True)),
            "local_first_layer": self.local_first,
            "local": self.local,
            "local_uniform": self.local_uniform,
            "distance_pixels": self.distance,
            "distance_uniform_pixels": self.distance_uniform,
        }


def read_with_margin(
    images: ImageSet, preprocess: Preprocess, margin: int
) -> tuple[list[Tensor], list[str]]:
    """Up to `MAX_IMAGES` of (1, C, Y + margin, X + margin) uint8, and one error per broken file."""
    rows, cols = preprocess.image_size
    larger = preprocess.resized_to((rows + margin, cols + margin))
    found: list[Tensor] = []
    broken: list[str] = []
    for batch in eval_batches(images, larger, batch_size=1, limit=MAX_IMAGES):
        broken += batch.errors
        found += [image[None] for image in batch.images]
    return found, broken


def measure_network(
    name: str,
    model: Network,
    images: Sequence[Tensor],
    preprocess: Preprocess,
    cell: int,
    bar: Bar,
) -> BiasRow:
    """One row of the table.

    Args:
        images: those of `read_with_margin`; windows have the size of `preprocess`.
        cell: pixels per cell of the model that is compared. A network with another stride gets
            images resampled by the ratio, so that all feature maps have the same cells.
    """
    rows, cols = preprocess.image_size
    images = [preprocess.normalize(image) for image in images]
    stride = cell_size(model.config)
    if stride != cell:
        rows, cols = (round(side * stride / cell) for side in (rows, cols))
        images = [resampled(image, stride / cell) for image in images]
    equivariance = measure_equivariance(model, images, default_shifts(stride), (rows, cols))
    bar.advance()
    parameters = backbone_parameters(model)
    if isinstance(model, ResNet):
        return BiasRow(name, parameters, equivariance, (rows, cols))
    grid, patch = model.config.grid, model.config.pixels_per_patch
    statistics = AttentionStatistics.concatenate(
        [measure_attention(model, image[:, :, :rows, :cols]) for image in images]
    )
    return BiasRow(
        name,
        parameters,
        equivariance,
        (rows, cols),
        local_first=float(statistics.local[:, 0].mean()),
        local=float(statistics.local.mean()),
        local_uniform=uniform_local_share(grid),
        distance=patch * float(statistics.distance.mean()),
        distance_uniform=patch * uniform_distance(grid),
    )


def resampled(images: Tensor, ratio: float) -> Tensor:
    """(B, C, Y, X) -> (B, C, Y * ratio, X * ratio), bilinear."""
    size = [round(side * ratio) for side in images.shape[2:]]
    return F.interpolate(images, size=size, mode="bilinear", antialias=True)


def measure_baselines(
    config: Config,
    parameters: int,
    images: Sequence[Tensor],
    preprocess: Preprocess,
    *,
    is_random: bool,
    resnet: tuple[str, LoadedModel] | None = None,
    watch: Watcher | None = None,
) -> list[BiasRow]:
    """The rows of the other networks, with one network in memory at a time.

    Args:
        config: of the model that is compared.
        parameters: of that model, without its head.
        images: those of `read_with_margin`, on the device that computes.
        is_random: the model has random weights, so a random copy would add nothing.
        resnet: name and network; None takes random weights of the same size.
    """
    cell = cell_size(config)
    device = images[0].device
    found: list[BiasRow] = []
    with (watch or Quiet()).progress("baselines", 2) as bar:
        if not is_random:
            twin = random_network(config).to(device)
            found.append(measure_network("random twin", twin, images, preprocess, cell, bar))
            del twin
        if resnet is not None:
            name, loaded = resnet
            network = loaded.network.to(device)
            own = require_preprocess(loaded).resized_to(preprocess.image_size)
            found.append(measure_network(name, network, images, own, cell, bar))
        elif not isinstance(config, ResNetConfig):
            plain = resnet_of_size(parameters, cell, config.image_size, config.num_channels)
            name, network = f"{resnet_name(plain)}, random", random_network(plain).to(device)
            found.append(measure_network(name, network, images, preprocess, cell, bar))
    return found


def random_network(config: Config) -> Network:
    """A model of `config` with random weights, in eval mode."""
    return from_config(config).init_weights(torch.Generator().manual_seed(SEED)).eval()


def backbone_parameters(model: Network) -> int:
    """Number of parameters without the heads."""
    named = model.named_parameters()
    return sum(p.numel() for name, p in named if not name.startswith(("head.", "head_dist.")))

"""The table of inductive bias: this model, the same with random weights, a BiT ResNet."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitcli.data.image_set import ImageSet
from vitcli.data.loader import eval_batches
from vitcli.look.distance import uniform_distance, uniform_local
from vitcli.look.equivariance import (
    Equivariance,
    cell_size,
    measure,
    resnet_name,
    same_budget,
    shifts_of,
)
from vitcli.look.figures import join, look
from vitcli.preprocess import Preprocess
from vitcli.progress import Bar, Quiet, Watcher
from vitcli.vit import Config, Model, ResNet, ResNetConfig, from_config
from vitcli.weights.load import require_preprocess

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
    model: Model,
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
    resnet: tuple[str, ResNet] | None = None,
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
            name, network = resnet
            own = require_preprocess(network).resized_to(preprocess.image_size)
            found.append(row(name, network.to(device), pictures, own, shifts, bar))
        elif not isinstance(config, ResNetConfig):
            plain = same_budget(parameters, config.image_size, config.num_channels)
            name = f"{resnet_name(plain)}, random"
            found.append(row(name, fresh(plain).to(device), pictures, preprocess, shifts, bar))
    return found


def fresh(config: Config) -> Model:
    """A model of `config` with random weights, in eval mode."""
    return from_config(config).init_weights(torch.Generator().manual_seed(SEED)).eval()


def body_parameters(model: Model) -> int:
    """All parameters but those of the heads."""
    named = model.named_parameters()
    return sum(p.numel() for name, p in named if not name.startswith(("head.", "head_dist.")))

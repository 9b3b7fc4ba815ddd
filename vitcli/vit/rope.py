"""Rotary positions in two dimensions (Su et al., 2021), as in DINOv3 and EVA-02.

Attention rotates each pair of channels of a query and of a key by an angle that grows with the
position of the patch. The product of both then depends on the difference of their positions only.
One half of the pairs encodes the row, the other half encodes the column. Prefix tokens have no
position, and values are not rotated.

`ViTConfig` has the settings, all of which begin with `rope`. Sources: `RopePositionEmbedding` of
facebookresearch/dinov3, and `VisionRotaryEmbeddingFast` of baaivision/EVA.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vitcli.config.choices import RopePairs
from vitcli.vit.config import ViTConfig
from vitcli.vit.position import Grid


class Rotation(NamedTuple):
    """The angles of the patches, for all blocks of a forward pass.

    Attributes:
        cos, sin: fp32, (N, E/2); (B, 1, V, E/2) if each image has V patches of its own.
        pairs: the channels that are rotated together.
    """

    cos: Tensor
    sin: Tensor
    pairs: RopePairs


def rotation(
    config: ViTConfig, grid: Grid, device: torch.device, *, training: bool, kept: Tensor | None
) -> Rotation | None:
    """The rotation of the patches of `grid`; None without rotary positions.

    Args:
        training: shift and scale the coordinates at random, if the configuration says so. All
            blocks and images of the batch get the same draw.
        kept: (B, V) indices of the patches that attention sees; None for all.
    """
    if config.rope is None:
        return None
    coordinates = patch_coordinates(config, grid, device)  # (N, 2)
    if training:
        coordinates = augment_coordinates(coordinates, config)
    angles = (coordinates[:, :, None] * frequencies(config, device)).flatten(1)  # (N, E/2)
    if kept is not None:
        angles = angles[kept][:, None]  # (B, 1, V, E/2)
    return Rotation(angles.cos(), angles.sin(), config.rope_pairs)


def patch_coordinates(config: ViTConfig, grid: Grid, device: torch.device) -> Tensor:
    """(N, 2): row and column of each patch, row-major.

    `centred` takes the centre of the patch, from -1 at one border of the image to 1 at the other,
    whatever the grid is. `index` counts patches; if `rope_grid` is set, another grid is squeezed or
    stretched to its size, so that the positions stay those of pre-training.
    """
    axes = []
    for i, count in enumerate(grid):
        place = torch.arange(count, dtype=torch.float32, device=device)
        if config.rope == "centred":
            place = 2.0 * ((place + 0.5) / count) - 1.0
        elif config.rope_grid is not None:
            place = place / count * config.rope_grid[i]
        axes.append(place)
    rows, cols = axes
    return torch.stack(torch.meshgrid(rows, cols, indexing="ij"), dim=-1).flatten(0, 1)  # (N, 2)


def frequencies(config: ViTConfig, device: torch.device) -> Tensor:
    """(E/4,): angle per unit of a coordinate, for the pairs of one axis."""
    quarter = config.embed_dim // config.num_heads // 4  # E/4
    exponents = torch.arange(quarter, dtype=torch.float32, device=device) / quarter
    periods = config.rope_theta**exponents
    if config.rope_dtype == "bf16":
        # Meta's files of DINOv3 hold periods that were rounded to bf16 in training.
        periods = periods.to(torch.bfloat16).float()
    turn = 2.0 * math.pi if config.rope == "centred" else 1.0  # a period is a whole turn in DINOv3
    return turn / periods


def augment_coordinates(coordinates: Tensor, config: ViTConfig) -> Tensor:
    """(N, 2) -> (N, 2): shifted by up to `rope_shift` per axis, then scaled twice.

    The factors are log-uniform: per axis in [1/jitter, jitter], then for both in [1/rescale,
    rescale].
    """
    x = coordinates
    if config.rope_shift is not None:
        x = x + config.rope_shift * _uniform(2, x)
    if config.rope_jitter is not None:
        x = x * (math.log(config.rope_jitter) * _uniform(2, x)).exp()
    if config.rope_rescale is not None:
        x = x * (math.log(config.rope_rescale) * _uniform(1, x)).exp()
    return x


def _uniform(count: int, like: Tensor) -> Tensor:
    return 2.0 * torch.rand(count, dtype=like.dtype, device=like.device) - 1.0


def rotate(x: Tensor, turn: Rotation) -> Tensor:
    """(B, H, T, E) -> (B, H, T, E): queries or keys, with the tokens after the prefix rotated."""
    prefix, x = x.tensor_split([x.shape[2] - turn.cos.shape[-2]], dim=2)
    cos, sin = turn.cos.to(x.dtype), turn.sin.to(x.dtype)
    halves = turn.pairs == "halves"
    # `halves`: channel i goes with channel i + E/2. `neighbours`: channel 2 i goes with 2 i + 1.
    a, b = x.chunk(2, dim=-1) if halves else (x[..., 0::2], x[..., 1::2])  # (B, H, N, E/2) each
    turned = a * cos - b * sin, b * cos + a * sin
    x = torch.cat(turned, dim=-1) if halves else torch.stack(turned, dim=-1).flatten(-2)
    return torch.cat([prefix, x], dim=2)

"""Mean attention distance (figures 7 right and 11) and the local share of each head.

"Attention distance was computed for 128 example images by averaging the distance between the query
pixel and all other pixels, weighted by the attention weight" (appendix D.7). The distance is
Euclidean on the grid of tokens (google-research/vision_transformer#162). Tokens without a place in
the image, such as the class token, are neither queries nor keys here. The weights between patches
are rescaled to sum to 1, so that the result is a weighted average. Other code often skips the
rescaling; attention to the class token then counts as distance 0. Both values are reported.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vitcli.vit.position import Grid

NEIGHBOURHOOD = 1  # patches to each side: 3x3 patches, the view of a 3x3 convolution


def grid_places(grid: Grid) -> Tensor:
    """(N, 2) float64: row and column of each patch."""
    rows, cols = grid
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    return torch.stack([y.flatten(), x.flatten()], dim=1).double()


def grid_distances(grid: Grid) -> Tensor:
    """(N, N) float64: Euclidean distances between patches, in patches."""
    places = grid_places(grid)
    return torch.linalg.vector_norm(places[:, None] - places, dim=-1)


def neighbour_mask(grid: Grid, reach: int = NEIGHBOURHOOD) -> Tensor:
    """(N, N) bool: True where two patches are at most `reach` rows and columns apart."""
    places = grid_places(grid)
    return (places[:, None] - places).abs().amax(dim=-1) <= reach


@dataclass(frozen=True)
class HeadStatistics:
    """Statistics of the heads of one layer, each (B, H) float64, averaged over the query patches.

    Attributes:
        distance: in patches, weights between patches rescaled to sum to 1.
        unscaled: the same without rescaling.
        local: share of the attention between patches that stays inside `NEIGHBOURHOOD`.
        prefix: share of the attention of a patch on class token and registers.
    """

    distance: Tensor
    unscaled: Tensor
    local: Tensor
    prefix: Tensor


def head_statistics(attention: Tensor, grid: Grid) -> HeadStatistics:
    """(B, H, T, T) -> the statistics of each head; the last N tokens are the patches."""
    n = grid[0] * grid[1]
    prefix = attention.shape[-1] - n
    # On the CPU, because Apple GPUs have no float64.
    between = attention[:, :, prefix:, prefix:].cpu().double()  # (B, H, N, N)
    mass = between.sum(dim=-1)  # (B, H, N)
    far = (between * grid_distances(grid)).sum(dim=-1)
    near = (between * neighbour_mask(grid)).sum(dim=-1)
    # A patch that attends to no patch at all has no distance; it counts as 0, not as NaN.
    positive = mass.clamp_min(torch.finfo(torch.float64).tiny)
    return HeadStatistics(
        distance=(far / positive).mean(dim=-1),
        unscaled=far.mean(dim=-1),
        local=(near / positive).mean(dim=-1),
        prefix=1.0 - mass.mean(dim=-1),
    )


def uniform_distance(grid: Grid) -> float:
    """The mean attention distance of uniform attention, in patches."""
    return float(grid_distances(grid).mean())


def uniform_local_share(grid: Grid) -> float:
    """The local share of uniform attention."""
    return float(neighbour_mask(grid).double().mean())

"""Mean attention distance (figures 7 right and 11) and how local each head is.

"Attention distance was computed for 128 example images by averaging the distance between the query
pixel and all other pixels, weighted by the attention weight" (appendix D.7); the distance is the
Euclidean one on the grid of tokens (the authors in google-research/vision_transformer#162). Tokens
without a place in the picture, such as the class token, are neither queries nor keys here: among
the patches the weights are scaled to sum to 1, a weighted average in the strict sense. Much code
does not scale them; then attention to the class token counts as distance 0. Both are given.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vitcli.vit.position import Grid

NEIGHBOURHOOD = 1  # patches to each side: 3x3, what a 3x3 convolution sees


def grid_places(grid: Grid) -> Tensor:
    """(N, 2) float64: row and column of each patch."""
    rows, cols = grid
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    return torch.stack([y.flatten(), x.flatten()], dim=1).double()


def grid_distances(grid: Grid) -> Tensor:
    """(N, N) float64: Euclidean distances between patches, in patches."""
    places = grid_places(grid)
    return torch.linalg.vector_norm(places[:, None] - places, dim=-1)


def neighbours(grid: Grid, reach: int = NEIGHBOURHOOD) -> Tensor:
    """(N, N) bool: whether two patches are at most `reach` rows and columns apart."""
    places = grid_places(grid)
    return (places[:, None] - places).abs().amax(dim=-1) <= reach


@dataclass(frozen=True)
class Spread:
    """How far the heads of a layer look, each (B, H) float64, averaged over the query patches.

    Attributes:
        distance: in patches, weights among the patches scaled to sum to 1.
        unscaled: the same with the weights as they are.
        local: share of the attention among patches that falls within `NEIGHBOURHOOD`.
        prefix: share of the attention of a patch that goes to class token and registers.
    """

    distance: Tensor
    unscaled: Tensor
    local: Tensor
    prefix: Tensor


def spread(attention: Tensor, grid: Grid) -> Spread:
    """(B, H, T, T) -> how far the heads look; the last N tokens are the patches."""
    n = grid[0] * grid[1]
    prefix = attention.shape[-1] - n
    # On the CPU: an Apple GPU has no float64.
    among = attention[:, :, prefix:, prefix:].cpu().double()  # (B, H, N, N)
    mass = among.sum(dim=-1)  # (B, H, N)
    far = (among * grid_distances(grid)).sum(dim=-1)
    near = (among * neighbours(grid)).sum(dim=-1)
    # Where a patch looks at no patch at all, there is no distance: it counts as 0.
    some = mass.clamp_min(torch.finfo(torch.float64).tiny)
    return Spread(
        distance=(far / some).mean(dim=-1),
        unscaled=far.mean(dim=-1),
        local=(near / some).mean(dim=-1),
        prefix=1.0 - mass.mean(dim=-1),
    )


def uniform_distance(grid: Grid) -> float:
    """The mean distance of attention that is the same everywhere, in patches."""
    return float(grid_distances(grid).mean())


def uniform_local(grid: Grid) -> float:
    """The local share of attention that is the same everywhere."""
    return float(neighbours(grid).double().mean())

"""Position embeddings: made, and carried to another grid (section 3.2, "Fine-tuning")."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Resize = Literal["bilinear", "bicubic"]


def sincos2d(grid: tuple[int, int], embed_dim: int, temperature: float = 10_000.0) -> Tensor:
    """(1, N, D): fixed sine and cosine codes of column and row, as big_vision has them.

    A quarter of the width each: sin(x w), cos(x w), sin(y w), cos(y w), with
    w_i = temperature^(-i / (D/4 - 1)).

    Raises:
        ValueError: D is not a multiple of 4, or below 8.
    """
    if embed_dim % 4 or embed_dim < 8:
        raise ValueError(f"sin-cos positions need a width that is a multiple of 4: {embed_dim}")
    rows, cols = grid
    quarter = embed_dim // 4
    # On the CPU whatever the default device is: on the meta device these few numbers would load
    # torch's compiler, a second of every start.
    omega = torch.arange(quarter, dtype=torch.float64, device="cpu") / (quarter - 1)
    omega = temperature**-omega  # (D/4,)
    place = torch.arange(rows * cols, dtype=torch.float64, device="cpu")[:, None]
    y = place.div(cols, rounding_mode="floor") * omega  # (N, D/4)
    x = place.remainder(cols) * omega  # (N, D/4)
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)[None].float()  # (1, N, D)


def resample(
    positions: Tensor, old: tuple[int, int], new: tuple[int, int], method: Resize = "bicubic"
) -> Tensor:
    """(1, N, D) on the `old` grid -> (1, M, D) on the `new` one; prefix tokens not included.

    `bilinear` aligns the corners of both grids, as the paper's code does (scipy.ndimage.zoom of
    order 1); `bicubic` is antialiased with half-pixel centres, as timm does it. Equal grids give
    the same tensor back.
    """
    if old == new:
        return positions
    grid = positions.reshape(1, *old, -1).permute(0, 3, 1, 2).float()  # (1, D, rows, cols)
    if method == "bilinear":
        grid = F.interpolate(grid, size=new, mode="bilinear", align_corners=True)
    else:
        grid = F.interpolate(grid, size=new, mode="bicubic", align_corners=False, antialias=True)
    grid = grid.permute(0, 2, 3, 1).reshape(1, new[0] * new[1], -1)  # (1, M, D)
    return grid.to(positions.dtype)

"""Position embeddings, and their resampling to another grid (section 3.2, appendix D.4)."""

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcli.config.choices import Resize
from vitcli.vit.config import ViTConfig

Grid = tuple[int, int]  # rows and columns of patches
DEFAULT_RESIZE: Resize = "bicubic"
# Names of the tables of an `OffsetBias`: the last part, of all blocks, and in a block.
BIAS_TABLE = "relative_position_bias_table"
SHARED_BIAS, BLOCK_BIAS = f"rel_pos_bias.{BIAS_TABLE}", f".attn.rel_pos_bias.{BIAS_TABLE}"


def sincos2d(
    grid: Grid, embed_dim: int, temperature: float = 10_000.0, *, inclusive: bool = True
) -> Tensor:
    """(1, N, D): fixed sine and cosine embeddings of column and row.

    Source: posemb_sincos_2d in big_vision/models/vit.py.

    Each quarter of the width holds one of sin(x w), cos(x w), sin(y w), cos(y w), with
    w_i = temperature^(-i / (D/4 - 1)). With `inclusive = False` it is temperature^(-i / (D/4)), as
    in MAE and AIMv2.

    Raises:
        ValueError: D is not a multiple of 4, or it is below 8.
    """
    if embed_dim % 4 or embed_dim < 8:
        raise ValueError(f"sin-cos positions need a width that is a multiple of 4: {embed_dim}")
    rows, cols = grid
    quarter = embed_dim // 4
    omega = torch.arange(quarter, dtype=torch.float64) / (quarter - inclusive)
    omega = temperature**-omega  # (D/4,)
    place = torch.arange(rows * cols, dtype=torch.float64)[:, None]  # (N, 1)
    y = place.div(cols, rounding_mode="floor") * omega  # (N, D/4)
    x = place.remainder(cols) * omega  # (N, D/4)
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)[None].float()  # (1, N, D)


def resample(positions: Tensor, old: Grid, new: Grid, method: Resize = DEFAULT_RESIZE) -> Tensor:
    """(n, N, D) on the `old` grid -> (n, M, D) on the `new` grid; without prefix tokens.

    Equal grids return the same tensor. The methods are:

    * `bilinear`: the corners of both grids are aligned (scipy.ndimage.zoom in the paper's code).
    * `bicubic`: antialiased, half-pixel centres (timm).
    * `bicubic_plain`: not antialiased (transformers, for ViT, DeiT and DINOv2).
    * `bicubic_aligned`: the corners of both grids are aligned (torchvision).
    * `computed`: not resampled: `resample_table` computes fixed sin-cos positions for the new grid
      (big_vision, SimpleViT).
    * `bilinear_antialiased`: timm, if it is asked for bilinear.
    """
    if old == new:
        return positions
    assert method != "computed", "only fixed positions are computed"
    n, _, d = positions.shape
    grid = positions.reshape(n, *old, d).permute(0, 3, 1, 2).float()  # (n, D, rows, cols)
    mode = method.partition("_")[0]
    if method in ("bilinear", "bicubic_aligned"):
        grid = F.interpolate(grid, size=new, mode=mode, align_corners=True)
    else:
        # Antialiasing changes larger grids too: torch's cubic kernel then has a = -0.5, not -0.75.
        smooth = method != "bicubic_plain"
        grid = F.interpolate(grid, size=new, mode=mode, align_corners=False, antialias=smooth)
    grid = grid.permute(0, 2, 3, 1).reshape(n, new[0] * new[1], d)  # (n, M, D)
    return grid.to(positions.dtype)


def table_shapes(config: ViTConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tables that are added to the tokens; empty if there are none.

    With `position_at = every` each block after the first has an entry in the `block_` tables.
    """
    (rows, cols), d = config.grid, config.embed_dim
    if config.position in ("none", "relative"):
        return {}
    if config.position == "learned2d":
        kinds = {"pos_embed_x": (cols, d // 2), "pos_embed_y": (rows, d // 2)}
    else:
        kinds = {"pos_embed": (config.num_covered_tokens + rows * cols, d)}
    shapes: dict[str, tuple[int, ...]] = {name: (1, *shape) for name, shape in kinds.items()}
    if config.position_at == "every":
        later = config.depth - 1
        shapes |= {f"block_{name}": (later, *shape) for name, shape in kinds.items() if later}
    return shapes


def fixed_table(config: ViTConfig) -> Tensor:
    """(1, covered prefix + N, D): the sin-cos embeddings of `config`; zero for prefix tokens."""
    table = sincos2d(config.grid, config.embed_dim)  # (1, N, D)
    prefix = table.new_zeros(1, config.num_covered_tokens, config.embed_dim)
    return torch.cat([prefix, table], dim=1)


def concatenate_axes(x: Tensor, y: Tensor) -> Tensor:
    """(1, cols, D/2), (1, rows, D/2) -> (1, N, D): learned 2-D positions.

    Appendix D.4: "we concatenate the X and Y embedding to get the final positional embedding".
    """
    cols, rows = x.shape[1], y.shape[1]
    x = x[:, None].expand(-1, rows, -1, -1)  # (1, rows, cols, D/2)
    y = y[:, :, None].expand(-1, -1, cols, -1)  # (1, rows, cols, D/2)
    return torch.cat([x, y], dim=-1).flatten(1, 2)  # (1, N, D)


def resample_line(table: Tensor, new: int) -> Tensor:
    """(n, old, D) -> (n, new, D): linear interpolation with aligned ends.

    This is `bilinear` along one side: resampling both axes equals resampling the whole table.
    """
    if table.shape[1] == new:
        return table
    line = table.transpose(1, 2).float()  # (n, D, old)
    line = F.interpolate(line, size=new, mode="linear", align_corners=True)
    return line.transpose(1, 2).to(table.dtype)


def resample_offsets(table: Tensor, num_patches: int) -> Tensor:
    """(2 old - 1, E) -> (2 new - 1, E): embeddings of the offsets -(new-1) .. new-1.

    The largest offset keeps its embedding, and so does offset 0, the middle entry.
    """
    if table.shape[0] == 2 * num_patches - 1:
        return table
    middle = table.shape[0] // 2
    if num_patches == 1:
        return table[middle : middle + 1]
    return resample_line(table[None], 2 * num_patches - 1)[0]


class OffsetBias(nn.Module):
    """A learned number per head and 2-D offset of query and key: the bias of BEiT's attention.

    Bao et al., 2022, after T5. The table has (2 rows - 1) (2 cols - 1) entries for the offsets of
    two patches, row-major from the largest negative one. With prefix tokens, three more follow:
    for a prefix token that attends to a patch, for a patch that attends to a prefix token, and for
    two prefix tokens. The names are those of timm and transformers.

    Attributes:
        grid: rows and columns of patches that the table is for.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.grid, self.num_prefix_tokens = config.grid, config.num_prefix_tokens
        entries = num_offsets(config.grid) + (3 if self.num_prefix_tokens else 0)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(entries, config.num_heads))

    def forward(self, grid: Grid) -> Tensor:
        """The bias (1, H, T, T) for an image of `grid` patches."""
        table = resample_bias(self.relative_position_bias_table, self.grid, grid)
        index = offset_index(grid, self.num_prefix_tokens, table.device)  # (T, T)
        return table[index].permute(2, 0, 1)[None]  # (1, H, T, T)


def num_offsets(grid: Grid) -> int:
    """Number of 2-D offsets between two patches of `grid`."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1)


def offset_index(grid: Grid, num_prefix_tokens: int, device: torch.device | None = None) -> Tensor:
    """(T, T): the entry of an `OffsetBias` table for each pair of query and key."""
    rows, cols = grid
    place = torch.arange(rows * cols, device=device)
    y, x = place // cols, place % cols
    down, right = y[:, None] - y + rows - 1, x[:, None] - x + cols - 1  # (N, N), both from 0
    index = down * (2 * cols - 1) + right  # (N, N)
    if not num_prefix_tokens:
        return index
    more, n = num_offsets(grid), rows * cols
    to_prefix = index.new_full((n, num_prefix_tokens), more + 1)
    among = index.new_full((num_prefix_tokens, num_prefix_tokens), more + 2)
    from_prefix = index.new_full((num_prefix_tokens, n), more)
    return torch.cat(
        [torch.cat([among, from_prefix], dim=1), torch.cat([to_prefix, index], dim=1)]
    )  # (T, T)


def resample_bias(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """(entries, H) for the `old` grid -> (entries, H) for the `new` one.

    Offsets are resampled bilinearly with half-pixel centres, as in transformers; the entries of the
    prefix tokens do not change.
    """
    if old == new:
        return table
    shape = 2 * old[0] - 1, 2 * old[1] - 1
    offsets, prefix = table.tensor_split([num_offsets(old)])
    grid = offsets.reshape(1, *shape, -1).permute(0, 3, 1, 2).float()  # (1, H, 2 rows-1, 2 cols-1)
    size = 2 * new[0] - 1, 2 * new[1] - 1
    grid = F.interpolate(grid, size=size, mode="bilinear", align_corners=False)
    offsets = grid.permute(0, 2, 3, 1).reshape(num_offsets(new), -1).to(table.dtype)
    return torch.cat([offsets, prefix])


def fold_shared_bias(tensors: dict[str, Tensor]) -> bool:
    """Add a shared table of `OffsetBias` to those of the blocks, in place; True if there are both.

    A few files have both. A bias is linear in its table, so the sum computes the same.
    """
    shared = tensors.get(SHARED_BIAS)
    own = [name for name in tensors if name.endswith(BLOCK_BIAS)]
    if shared is None or any(tensors[name].shape != shared.shape for name in own) or not own:
        return False
    for name in own:
        tensors[name] = tensors[name].float() + shared.float()
    del tensors[SHARED_BIAS]
    return True


def resample_table(
    name: str, table: Tensor, config: ViTConfig, grid: Grid, method: Resize = DEFAULT_RESIZE
) -> Tensor:
    """Resample the position table `name` of a network to another grid.

    Args:
        name: key of the state dict: `pos_embed`, `block_pos_embed`, with `_x` or `_y`,
            `blocks.0.attn.rel_pos`, or the table of an `OffsetBias` (see `is_position`).
        table: the entries of prefix tokens come first and do not change (section 3.2).
        method: method for whole tables; single axes are resampled linearly.

    Returns:
        A new table, or `table` itself if it already has the right size.
    """
    if name.endswith(BIAS_TABLE):
        return resample_bias(table, config.grid, grid)
    if name.endswith("rel_pos"):
        return resample_offsets(table, attended_length(name, grid))
    if name.endswith(("_x", "_y")):
        return resample_line(table, grid[1] if name.endswith("_x") else grid[0])
    if grid == config.grid:
        return table
    prefix, patches = table.tensor_split([config.num_covered_tokens], dim=1)
    if method == "computed":
        fixed = sincos2d(grid, config.embed_dim).to(table)  # (1, N, D)
        return torch.cat([prefix, fixed], dim=1)
    return torch.cat([prefix, resample(patches, config.grid, grid, method)], dim=1)


def describe_resampling(name: str, old: Grid, new: Grid, method: Resize) -> str:
    """The load report's words on the position table `name`: old size, new size and method."""
    if name.endswith(BIAS_TABLE):
        return f"offsets of {old[0]}x{old[1]} -> {new[0]}x{new[1]} patches, bilinear"
    if name.endswith("rel_pos"):
        before, after = attended_length(name, old), attended_length(name, new)
        return f"offsets of {before} -> {after} patches, linear"
    if name.endswith(("_x", "_y")):
        side = 1 if name.endswith("_x") else 0
        return f"{old[side]} -> {new[side]}, linear"
    return f"{old[0]}x{old[1]} -> {new[0]}x{new[1]}, {method}"


def is_position(name: str) -> bool:
    """True if the tensor `name` of a network is a position table."""
    tables = rf"(block_)?pos_embed(_[xy])?|(.*\.)?rel_pos|(.*\.)?{BIAS_TABLE}"
    return re.fullmatch(tables, name) is not None


def attended_length(name: str, grid: Grid) -> int:
    """Number of patches that attend to each other in the layer `name`: a row, a column, or all."""
    if ".row." in name:
        return grid[1]
    return grid[0] if ".column." in name else grid[0] * grid[1]

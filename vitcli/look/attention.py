"""The attention of every layer, computed again from the layer's input, one layer at a time.

Shapes as in `vit/model.py`. torch's fused kernels do not give their weights away, and those of all
layers together would not fit: 24 layers of ViT-L/16 at 384 pixels are half a gigabyte an image.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vitcli.vit.blocks import Attention, AxialBlock, Axis, Block, split_lines
from vitcli.vit.model import VisionTransformer
from vitcli.vit.position import Grid

ATTENTION_BYTES = 64 * 2**20  # of one layer's weights; decides how many images go at once
LARGEST_BATCH = 32


@dataclass(frozen=True)
class Layer:
    """One layer of attention, as the forward pass has it.

    Attributes:
        name: `1`, `2`, …; of axial blocks `1 rows`, `1 columns`, ….
        attention: (B, H, T, T), rows sum to 1. Of axial attention, which looks along a row or a
            column only, it is 0 for all other patches.
        output: (B, T, D), the tokens after the block.
    """

    name: str
    attention: Tensor
    output: Tensor


def attention_layers(model: VisionTransformer, images: Tensor) -> Iterator[Layer]:
    """(B, C, Y, X) -> the layers, first to last; take what you need of one before the next."""
    grid = model.grid_of(images)
    x = model.norm_pre(model.embed(images))
    for i, block in enumerate(model.blocks):
        if i:
            x = model.add_positions(x, grid, i)
        if isinstance(block, AxialBlock):
            for part in (block.row, block.column):
                attention = block_attention(part, x, grid)
                x = part(x, grid)
                yield Layer(f"{i + 1} {part.along}s", attention, x)
        else:
            assert isinstance(block, Block)
            attention = block_attention(block, x, grid)
            x = block(x, grid)
            yield Layer(f"{i + 1}", attention, x)


def layer_names(model: VisionTransformer) -> list[str]:
    """The names of the layers that `attention_layers` gives."""
    parts = (" rows", " columns") if model.config.axial else ("",)
    return [f"{i + 1}{part}" for i in range(model.config.depth) for part in parts]


def block_attention(block: Block, x: Tensor, grid: Grid) -> Tensor:
    """(B, T, D), the input of the block -> (B, H, T, T): its attention."""
    x = block.norm1(x)
    if block.along is None:
        return attention_weights(block.attn, x)
    inside = attention_weights(block.attn, split_lines(x, grid, block.along))
    return spread_lines(inside, grid, block.along)


def attention_weights(attn: Attention, x: Tensor) -> Tensor:
    """(B, T, D), normalised -> (B, H, T, T): softmax(q k^T / sqrt(E) + bias)."""
    q, k, _, bias = attn.heads(x)
    return softmax_scores(q, k, bias)


def softmax_scores(q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
    """(B, H, S, E), (B, H, T, E) -> (B, H, S, T)."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return (scores if bias is None else scores + bias).float().softmax(dim=-1)


def spread_lines(inside: Tensor, grid: Grid, along: Axis) -> Tensor:
    """Attention inside each row (B*rows, H, cols, cols), or column -> (B, H, N, N) of all patches.

    The order of `split_lines`: a line attends to itself alone.
    """
    rows, cols = grid
    lines = rows if along == "row" else cols
    inside = inside.reshape(-1, lines, *inside.shape[1:])  # (B, lines, H, n, n)
    whole = torch.diag_embed(inside.movedim(1, -1), dim1=2, dim2=4)  # (B, H, line, n, line', n')
    if along == "column":  # a column's patches lie a row apart
        whole = whole.permute(0, 1, 3, 2, 5, 4)  # (B, H, n, line, n', line')
    n = rows * cols
    return whole.reshape(whole.shape[0], whole.shape[1], n, n)


def pool_attention(model: VisionTransformer, tokens: Tensor) -> Tensor:
    """(B, T, D), after the last norm -> (B, H, N): where the query of pool `map` looks."""
    assert model.attn_pool is not None
    q, k, _ = model.attn_pool.heads(tokens[:, model.config.num_prefix_tokens :])
    return softmax_scores(q, k)[:, :, 0]


def batch_size(model: VisionTransformer) -> int:
    """Images at once, so that one layer's attention stays within `ATTENTION_BYTES`."""
    config = model.config
    one = 4 * config.num_heads * config.num_tokens**2
    return max(1, min(LARGEST_BATCH, ATTENTION_BYTES // one))

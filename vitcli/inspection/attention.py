"""The attention of every layer, computed again from the layer's input, one layer at a time.

Shapes as in `vit/model.py`. torch's fused kernels do not give their weights away, and those of all
layers together would not fit: 24 layers of ViT-L/16 at 384 pixels are half a gigabyte an image.

What the attention of a model does on images: one pass, the numbers of every figure.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitcli.inspection.attention_distance import Spread, spread
from vitcli.inspection.rollout import roll, source_row
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


Numbers = NDArray[Any]


@dataclass(frozen=True)
class Looked:
    """Numbers of n images; L layers, H heads, a grid of rows and cols.

    Attributes:
        distance: (n, L, H) mean attention distance in patches, weights scaled to sum to 1.
        unscaled: (n, L, H) the same with the weights as they are.
        local: (n, L, H) share of the attention among patches inside 3x3 patches.
        prefix: (n, L, H) share of a patch's attention that goes to class token and registers.
        rollout: (n, rows, cols) what the source takes from each patch through all layers.
        maps: (m, L, H, rows, cols) what the source takes from each patch in each layer, of the
            first m images.
        logits: (n, K), or (n, 0) of a model without a head.
    """

    distance: Numbers
    unscaled: Numbers
    local: Numbers
    prefix: Numbers
    rollout: Numbers
    maps: Numbers
    logits: Numbers

    def __len__(self) -> int:
        return len(self.distance)


def look(model: VisionTransformer, images: Tensor, keep: int = 0) -> Looked:
    """(B, C, Y, X), normalised -> the numbers; `keep` images also get maps of every head."""
    grid = model.grid_of(images)
    spreads: list[Spread] = []
    maps: list[Tensor] = []
    joint: Tensor | None = None
    last: deque[Tensor] = deque(maxlen=model.config.pool_blocks)  # what the head reads
    with torch.inference_mode():
        for layer in attention_layers(model, images):
            spreads.append(spread(layer.attention, grid))
            # A copy: a view would keep the attention of every layer alive.
            maps.append(source_row(layer.attention[:keep], model.config).cpu().clone())
            joint = roll(joint, layer.attention)
            if not layer.name.endswith(" rows"):  # half of an axial block
                last.append(layer.output)
        tokens = [model.norm(x) for x in last]
        pooled = None
        if model.attn_pool is not None:
            pooled = pool_attention(model, tokens[-1]).mean(dim=1)  # (B, N)
        assert joint is not None
        rolled = source_row(joint, model.config, pooled)  # (B, N)
        if model.config.num_classes:
            logits = model.classify(model.pool_last(tokens, grid))
        else:
            logits = rolled.new_zeros(len(rolled), 0)
    shown = torch.stack(maps, dim=1)  # (m, L, H, N)
    columns = {
        f.name: torch.stack([getattr(s, f.name) for s in spreads], dim=1) for f in fields(Spread)
    }
    return Looked(
        **{name: values.cpu().numpy() for name, values in columns.items()},
        rollout=rolled.reshape(len(rolled), *grid).cpu().numpy(),
        maps=shown.reshape(*shown.shape[:3], *grid).numpy(),
        logits=logits.cpu().numpy(),
    )


def join(parts: Sequence[Looked]) -> Looked:
    """Several batches as one."""
    names = [f.name for f in fields(Looked)]
    return Looked(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in names})

"""Attention weights of every layer, recomputed one layer at a time, and statistics of them.

Shape letters: see `vit/model.py`. The fused kernels of torch do not return attention weights. Those
of all layers together would not fit into memory: the 24 layers of ViT-L/16 at 384 px take 0.5 GiB
per image. So each layer is recomputed from its input and dropped before the next.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitcli.inspection.attention_distance import HeadStatistics, head_statistics
from vitcli.inspection.rollout import extend_rollout, source_attention
from vitcli.vit.blocks import Attention, AxialBlock, Axis, Block, split_lines
from vitcli.vit.model import VisionTransformer
from vitcli.vit.position import Grid
from vitcli.vit.rope import Rotation

ATTENTION_BYTES = 64 * 2**20  # limit for the weights of one layer; it decides the batch size
MAX_BATCH_SIZE = 32

Array = NDArray[Any]


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer of a forward pass.

    Attributes:
        name: `1`, `2`, …; for axial blocks `1 rows`, `1 columns`, ….
        attention: (B, H, T, T), rows sum to 1. Axial attention stays inside a row or a column; its
            weights for all other patches are 0.
        output: (B, T, D), the tokens after the block.
    """

    name: str
    attention: Tensor
    output: Tensor


def attention_layers(model: VisionTransformer, images: Tensor) -> Iterator[AttentionLayer]:
    """(B, C, Y, X) -> the layers from first to last."""
    grid = model.grid_of(images)
    bias = model.shared_bias(grid)
    x = model.norm_pre(model.embed(images))  # (B, T, D)
    turn = model.rotation(grid)
    for i, block in enumerate(model.blocks):
        if i:
            x = model.add_positions(x, grid, i)
        if isinstance(block, AxialBlock):
            for part in (block.row, block.column):
                attention = block_attention(part, x, grid)
                x = part(x, grid)
                yield AttentionLayer(f"{i + 1} {part.along}s", attention, x)
        else:
            assert isinstance(block, Block)
            attention = block_attention(block, x, grid, bias, turn)
            x = block(x, grid, bias, turn)
            yield AttentionLayer(f"{i + 1}", attention, x)


def layer_names(model: VisionTransformer) -> list[str]:
    """The names of the layers that `attention_layers` yields."""
    parts = (" rows", " columns") if model.config.axial else ("",)
    return [f"{i + 1}{part}" for i in range(model.config.depth) for part in parts]


def block_attention(
    block: Block, x: Tensor, grid: Grid, bias: Tensor | None = None, turn: Rotation | None = None
) -> Tensor:
    """(B, T, D), the input of the block -> (B, H, T, T)."""
    x = block.norm1(x)
    if block.along is None:
        return attention_weights(block.attn, x, grid, bias, turn)
    lines = attention_weights(block.attn, split_lines(x, grid, block.along), grid)
    return expand_axial_attention(lines, grid, block.along)


def attention_weights(
    attn: Attention,
    x: Tensor,
    grid: Grid,
    bias: Tensor | None = None,
    turn: Rotation | None = None,
) -> Tensor:
    """(B, T, D), after the norm -> (B, H, T, T): softmax(q k^T / sqrt(E) + bias)."""
    q, k, _, bias = attn.heads(x, grid, bias, turn)
    return softmax_scores(q, k, bias)


def softmax_scores(q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
    """(B, H, S, E), (B, H, T, E) -> (B, H, S, T)."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return (scores if bias is None else scores + bias).float().softmax(dim=-1)


def expand_axial_attention(lines: Tensor, grid: Grid, along: Axis) -> Tensor:
    """Attention inside each row (B*rows, H, cols, cols) or column -> (B, H, N, N) of all patches.

    The lines are in the order of `split_lines`. Each line attends to itself only.
    """
    rows, cols = grid
    count = rows if along == "row" else cols
    lines = lines.reshape(-1, count, *lines.shape[1:])  # (B, lines, H, n, n)
    whole = torch.diag_embed(lines.movedim(1, -1), dim1=2, dim2=4)  # (B, H, line, n, line', n')
    if along == "column":  # the patches of a column are a whole row apart in the token order
        whole = whole.permute(0, 1, 3, 2, 5, 4)  # (B, H, n, line, n', line')
    n = rows * cols
    return whole.reshape(whole.shape[0], whole.shape[1], n, n)


def pooling_attention(model: VisionTransformer, tokens: Tensor) -> Tensor:
    """(B, T, D), after the last norm -> (B, H, N): attention of the query of pool `map`."""
    assert model.attn_pool is not None
    q, k, _ = model.attn_pool.heads(tokens[:, model.config.num_prefix_tokens :])
    return softmax_scores(q, k)[:, :, 0]


def max_batch_size(model: VisionTransformer) -> int:
    """The number of images whose attention in one layer fits into `ATTENTION_BYTES`."""
    config = model.config
    bytes_per_image = 4 * config.num_heads * config.num_tokens**2
    return max(1, min(MAX_BATCH_SIZE, ATTENTION_BYTES // bytes_per_image))


@dataclass(frozen=True)
class AttentionStatistics:
    """Statistics of n images; L layers, H heads, a grid of rows and cols patches.

    Attributes:
        distance: (n, L, H) mean attention distance in patches, weights rescaled to sum to 1.
        unscaled: (n, L, H) the same without rescaling.
        local: (n, L, H) share of the attention between patches that stays inside 3x3 patches.
        prefix: (n, L, H) share of a patch's attention on class token and registers.
        rollout: (n, rows, cols) attention of the source to each patch through all layers.
        maps: (m, L, H, rows, cols) attention of the source in each layer, for the first m images.
        logits: (n, K), or (n, 0) for a model without a head.
    """

    distance: Array
    unscaled: Array
    local: Array
    prefix: Array
    rollout: Array
    maps: Array
    logits: Array

    def __len__(self) -> int:
        return len(self.distance)

    @classmethod
    def concatenate(cls, batches: Sequence["AttentionStatistics"]) -> "AttentionStatistics":
        """The statistics of several batches as one object."""
        names = [f.name for f in fields(cls)]
        return cls(**{name: np.concatenate([getattr(b, name) for b in batches]) for name in names})


def measure_attention(
    model: VisionTransformer, images: Tensor, num_maps: int = 0
) -> AttentionStatistics:
    """(B, C, Y, X), normalised -> the statistics; the first `num_maps` images also get `maps`."""
    grid = model.grid_of(images)
    heads: list[HeadStatistics] = []
    maps: list[Tensor] = []
    joint: Tensor | None = None
    last: deque[Tensor] = deque(maxlen=model.config.pool_blocks)  # the blocks that the head reads
    with torch.inference_mode():
        for layer in attention_layers(model, images):
            heads.append(head_statistics(layer.attention, grid))
            # Copied, because a view would keep the attention of every layer alive.
            maps.append(source_attention(layer.attention[:num_maps], model.config).cpu().clone())
            joint = extend_rollout(joint, layer.attention)
            if not layer.name.endswith(" rows"):  # the first half of an axial block
                last.append(layer.output)
        tokens = [model.norm(x) for x in last]
        pooled = None
        if model.attn_pool is not None:
            pooled = pooling_attention(model, tokens[-1]).mean(dim=1)  # (B, N)
        assert joint is not None
        rollout = source_attention(joint, model.config, pooled)  # (B, N)
        if model.config.num_classes:
            logits = model.classify(model.pool_last(tokens, grid))
        else:
            logits = rollout.new_zeros(len(rollout), 0)
    stacked = torch.stack(maps, dim=1)  # (m, L, H, N)
    per_head = {
        f.name: torch.stack([getattr(h, f.name) for h in heads], dim=1)  # (B, L, H)
        for f in fields(HeadStatistics)
    }
    return AttentionStatistics(
        **{name: values.cpu().numpy() for name, values in per_head.items()},
        rollout=rollout.reshape(len(rollout), *grid).cpu().numpy(),
        maps=stacked.reshape(*stacked.shape[:3], *grid).numpy(),
        logits=logits.cpu().numpy(),
    )

"""What the attention of a model does on images: one pass, the numbers of every figure."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitcli.look.attention import attention_layers, pool_attention
from vitcli.look.distance import Spread, spread
from vitcli.look.rollout import roll, source_row
from vitcli.vit.model import VisionTransformer

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
        probabilities: (n, K), or (n, 0) of a model without a head.
    """

    distance: Numbers
    unscaled: Numbers
    local: Numbers
    prefix: Numbers
    rollout: Numbers
    maps: Numbers
    probabilities: Numbers

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
            probabilities = model.probabilities(logits.cpu())
        else:
            probabilities = rolled.new_zeros(len(rolled), 0)
    shown = torch.stack(maps, dim=1)  # (m, L, H, N)
    columns = {
        f.name: torch.stack([getattr(s, f.name) for s in spreads], dim=1) for f in fields(Spread)
    }
    return Looked(
        **{name: values.cpu().numpy() for name, values in columns.items()},
        rollout=rolled.reshape(len(rolled), *grid).cpu().numpy(),
        maps=shown.reshape(*shown.shape[:3], *grid).numpy(),
        probabilities=probabilities.cpu().numpy(),
    )


def join(parts: Sequence[Looked]) -> Looked:
    """Several batches as one."""
    names = [f.name for f in fields(Looked)]
    return Looked(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in names})

"""Cosine similarity of position embeddings (figures 7 centre and 10)."""

import torch
from torch import Tensor

from vitcli.inspection.attention_distance import grid_distances, grid_places
from vitcli.vit.model import VisionTransformer
from vitcli.vit.position import Grid

NO_TABLE = {
    "none": "the model has no position embeddings",
    "relative": "relative positions are a bias of the attention: there is no table of places",
}


def position_table(model: VisionTransformer) -> Tensor | None:
    """(N, D) float64: what is added to each patch before the first block; None for nothing."""
    positions = model.positions(model.config.grid)
    if positions is None:
        return None
    rows, cols = model.config.grid
    return positions[0, positions.shape[1] - rows * cols :].detach().double().cpu()


def cosine_similarity(table: Tensor) -> Tensor:
    """(N, D) -> (N, N): between each two positions, 1 on the diagonal."""
    length = torch.linalg.vector_norm(table, dim=1, keepdim=True)
    unit = table / length.clamp_min(torch.finfo(table.dtype).tiny)
    return unit @ unit.T


def similarity_facts(similarity: Tensor, grid: Grid) -> dict[str, float | None]:
    """What the tiles show, in four means: of neighbours, a row, a column, and far-off places."""
    places = grid_places(grid)
    apart = (places[:, None] - places).abs()  # (N, N, 2)
    distance = grid_distances(grid)
    other = distance > 0
    kinds = {
        "neighbours": distance == 1,
        "same_row": (apart[..., 0] == 0) & other,
        "same_column": (apart[..., 1] == 0) & other,
        "far": distance > distance.max() / 2,
    }
    means = {k: similarity[which] for k, which in kinds.items()}
    return {k: float(v.mean()) if v.numel() else None for k, v in means.items()}

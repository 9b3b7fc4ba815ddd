"""Embedding filters (figure 7 left) and position similarity (figures 7 centre and 10)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitcli.inspection.attention_distance import grid_distances, grid_places
from vitcli.vit import Network, VisionTransformer
from vitcli.vit.conv_stem import ConvEmbed
from vitcli.vit.hybrid import HybridEmbed, standardize
from vitcli.vit.patches import PatchEmbed
from vitcli.vit.position import Grid

NUM_COMPONENTS = 28  # as in figure 7
NO_POSITION_TABLE = {
    "none": "the model has no position embeddings",
    "relative": "relative positions are a bias of the attention, not a table",
}


@dataclass(frozen=True)
class FilterComponents:
    """Principal components of the embedding filters, the strongest first.

    Attributes:
        filters: (n, C, P, P), each of length 1; the value of largest magnitude is positive.
        explained: (n,) share of the variance of all filters.
    """

    filters: Tensor
    explained: Tensor


def embedding_filters(model: Network) -> tuple[str, Tensor]:
    """The first layer that reads pixels -> (its name, its filters (D, C, P, P) float64)."""
    if isinstance(model, VisionTransformer):
        embed = model.patch_embed
        if isinstance(embed, PatchEmbed):
            return "patch embedding", embed.proj.weight.detach().double().cpu()
        if isinstance(embed, ConvEmbed):
            return "whitening layer of the stem", embed.root.weight.double().cpu()
        assert isinstance(embed, HybridEmbed)
        # The patch embedding of a hybrid reads feature maps, not pixels.
        conv: nn.Module = embed.backbone.stem.conv
        name = "root convolution of the ResNet"
    else:
        conv, name = model.stem.conv, "root convolution"
    weight = conv.weight
    assert isinstance(weight, Tensor)
    # Standardised as in the forward pass; the published epsilons make no difference in float64.
    return name, standardize(weight.detach().double().cpu(), 1e-10, of_variance=True)


def principal_components(filters: Tensor, number: int = NUM_COMPONENTS) -> FilterComponents:
    """(D, C, P, P) -> the components of D points with C*P*P coordinates."""
    points = filters.double().flatten(1)
    points = points - points.mean(dim=0)
    _, singular, axes = torch.linalg.svd(points, full_matrices=False)
    variance = singular**2
    number = min(number, len(singular))
    axes = axes[:number]
    # The sign of a component is arbitrary; this choice makes pictures comparable.
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    axes = axes * torch.where(largest < 0, -1.0, 1.0)
    total = variance.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return FilterComponents(axes.reshape(number, *filters.shape[1:]), variance[:number] / total)


def position_table(model: VisionTransformer) -> Tensor | None:
    """(N, D) float64: the position embeddings of the patches; None if the model has no table."""
    positions = model.positions(model.config.grid)
    if positions is None:
        return None
    rows, cols = model.config.grid
    return positions[0, positions.shape[1] - rows * cols :].detach().double().cpu()


def cosine_similarity(table: Tensor) -> Tensor:
    """(N, D) -> (N, N): similarity of each pair of positions, 1 on the diagonal."""
    length = torch.linalg.vector_norm(table, dim=1, keepdim=True)
    unit = table / length.clamp_min(torch.finfo(table.dtype).tiny)
    return unit @ unit.T


def similarity_means(similarity: Tensor, grid: Grid) -> dict[str, float | None]:
    """(N, N) -> mean similarity of neighbours, of a row, of a column, and of distant positions."""
    places = grid_places(grid)
    apart = (places[:, None] - places).abs()  # (N, N, 2)
    distance = grid_distances(grid)
    other = distance > 0
    pairs = {
        "neighbours": distance == 1,
        "same_row": (apart[..., 0] == 0) & other,
        "same_column": (apart[..., 1] == 0) & other,
        "far": distance > distance.max() / 2,
    }
    selected = {name: similarity[mask] for name, mask in pairs.items()}
    return {name: float(v.mean()) if v.numel() else None for name, v in selected.items()}

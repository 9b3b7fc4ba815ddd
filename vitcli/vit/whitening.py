"""Linear filters that decorrelate the pixels of photographs, without data.

They are the first layer of a convolutional stem, and with `model.patch_init = "whitening"` the
first weights of a patch projection. Shape letters: see `model.py`; F is the number of filters.
"""

import math

import torch
from torch import Tensor, nn

from vitcli.vit.patches import PatchEmbed

# Correlation of neighbouring pixels and of two colours of one pixel in photographs, and the
# variance of pixels in -1 to 1. Only their order of magnitude matters.
PIXEL_CORRELATION, COLOR_CORRELATION, PIXEL_VARIANCE = 0.95, 0.92, 0.25
# Of the first patch embeddings: that of pixels in -1 to 1, which LeCun-normal weights keep.
EMBEDDING_STD = 0.5


def cosine_basis(length: int) -> Tensor:
    """(length, length) float64: the orthonormal discrete cosine basis, one vector per row."""
    place = torch.arange(length, dtype=torch.float64)
    basis = torch.cos(math.pi / length * place[:, None] * (place + 0.5))
    return basis / torch.linalg.vector_norm(basis, dim=1, keepdim=True)


def whitening_filters(num_channels: int, size: int) -> Tensor:
    """(F, C, size, size) with F = C * size**2: filters of one variance that do not correlate.

    The covariance of pixels falls exponentially with their distance. The cosine basis almost
    diagonalises such a matrix (Ahmed et al., 1974), and the colours likewise. Each filter is
    divided by its standard deviation; those of large variance come first. Filters from the
    training images were not better (recipes/LOG.md), and these need no data.
    """
    line, colors = cosine_basis(size), cosine_basis(num_channels)
    place = torch.arange(size, dtype=torch.float64)
    of_pixels = PIXEL_CORRELATION ** (place[:, None] - place).abs()
    of_colors = torch.full((num_channels, num_channels), COLOR_CORRELATION, dtype=torch.float64)
    of_colors.fill_diagonal_(1.0)
    on_line, on_colors = (
        torch.einsum("ui,ij,uj->u", basis, covariance, basis)
        for basis, covariance in ((line, of_pixels), (colors, of_colors))
    )
    filters = torch.einsum("ci,uy,vx->cuviyx", colors, line, line).reshape(
        -1, *(num_channels, size, size)
    )
    variance = PIXEL_VARIANCE * torch.einsum("c,u,v->cuv", on_colors, on_line, on_line).flatten()
    order = variance.argsort(descending=True, stable=True)
    return (filters / variance.sqrt()[:, None, None, None])[order].float()


@torch.no_grad()
def whiten_patches(network: nn.Module) -> None:
    """Let the patch projection start with whitening filters, then with their negatives.

    Outputs beyond these keep their weights, and so does the rest of the network.

    Raises:
        ValueError: the network has no patch projection.
    """
    embed = getattr(network, "patch_embed", None)
    if not isinstance(embed, PatchEmbed):
        raise ValueError("`model.patch_init` is for a patch projection; this model has a stem")
    kernel = embed.proj.weight  # (D, C, P, P)
    if kernel.is_meta:  # values come from a file later, or are not needed
        return
    filters = EMBEDDING_STD * whitening_filters(kernel.shape[1], kernel.shape[2])
    both = torch.cat([filters, -filters])[: len(kernel)]
    kernel[: len(both)] = both

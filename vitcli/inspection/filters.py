"""Principal components of the embedding filters (figure 7 left).

"The top principal components of the learned embedding filters. They resemble plausible basis
functions for a low-dimensional representation of the fine structure within each patch"
(section 4.5).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vitcli.vit import Network, VisionTransformer
from vitcli.vit.hybrid import HybridEmbed, standardize
from vitcli.vit.patches import PatchEmbed

MOST = 28  # as the paper shows


@dataclass(frozen=True)
class Components:
    """Principal components, the strongest first.

    Attributes:
        name: which filters these are of.
        filters: (n, C, P, P) of length 1; the value of largest magnitude is positive.
        explained: (n,) share of the variance of all filters.
    """

    name: str
    filters: Tensor
    explained: Tensor


def embedding_filters(model: Network) -> tuple[str, Tensor]:
    """The filters that read pixels -> (what they are, (D, C, P, P) float64)."""
    if isinstance(model, VisionTransformer):
        embed = model.patch_embed
        if isinstance(embed, PatchEmbed):
            return "patch embedding", embed.proj.weight.detach().double().cpu()
        assert isinstance(embed, HybridEmbed)
        conv = embed.backbone.stem.conv
        weight, name = conv.weight, "root convolution of the ResNet"  # the patches read features
        assert isinstance(weight, Tensor)
    else:
        weight, name = model.stem.conv.weight, "root convolution"
        assert isinstance(weight, Tensor)
    # As it is applied: standardised; the epsilons of the different codes don't show in 64 bits.
    return name, standardize(weight.detach().double().cpu(), 1e-10, of_variance=True)


def principal_components(filters: Tensor, name: str = "", number: int = MOST) -> Components:
    """(D, C, P, P) -> the components of D filters, seen as D points of C*P*P coordinates."""
    points = filters.double().flatten(1)
    points = points - points.mean(dim=0)
    _, sizes, axes = torch.linalg.svd(points, full_matrices=False)
    variance = sizes**2
    number = min(number, len(sizes))
    axes = axes[:number]
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    axes = axes * torch.where(largest < 0, -1.0, 1.0)
    total = variance.sum().clamp_min(torch.finfo(torch.float64).tiny)
    shape = (number, *filters.shape[1:])
    return Components(name, axes.reshape(shape), variance[:number] / total)

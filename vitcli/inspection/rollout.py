"""Attention rollout (Abnar and Zuidema, 2020), as the paper uses it for figures 6 and 14.

"We averaged attention weights of ViT-L/16 across all heads and then recursively multiplied the
weight matrices of all layers" (appendix D.8), with the identity added for the residual branch
and rows renormalised, as the authors explain in google-research/vision_transformer#18. It says
where information came from, not for which class: it is the same for every class.
"""

import torch
from torch import Tensor

from vitcli.vit.config import ViTConfig


def with_residual(attention: Tensor) -> Tensor:
    """(B, H, T, T) -> (B, T, T): mean over the heads, plus the identity, rows summing to 1."""
    mean = attention.mean(dim=1)
    mean = mean + torch.eye(mean.shape[-1], device=mean.device, dtype=mean.dtype)
    return mean / mean.sum(dim=-1, keepdim=True)


def roll(before: Tensor | None, attention: Tensor) -> Tensor:
    """(B, T, T) of the layers so far and (B, H, T, T) of the next -> (B, T, T) with it."""
    layer = with_residual(attention)
    return layer if before is None else layer @ before


def source_name(config: ViTConfig) -> str:
    """Whose row of the rollout is looked at: what the head reads."""
    if config.pool == "map":
        return "pooling query"
    return "class token" if config.pool in CLASS_TOKEN else "mean of the patches"


CLASS_TOKEN = ("token", "token_mean", "distilled")


def source_row(matrix: Tensor, config: ViTConfig, pooled: Tensor | None = None) -> Tensor:
    """(..., T, T) -> (..., N): what the source takes from each patch.

    The class token's row where the head reads it (of `token_mean` and `distilled` too); the mean
    row of the patches where it reads their mean; for pool `map` the rows weighted as its query
    weights them.

    Args:
        pooled: (..., N) weights of the pooling query.
    """
    prefix = config.num_prefix_tokens
    to_patches = matrix[..., prefix:]  # (..., T, N)
    if config.pool in CLASS_TOKEN:
        return to_patches[..., 0, :]
    if pooled is None:
        return to_patches[..., prefix:, :].mean(dim=-2)
    return (pooled[..., None, :] @ to_patches[..., prefix:, :])[..., 0, :]  # (..., N)

"""Attention rollout (Abnar and Zuidema, 2020), as the paper uses it for figures 6 and 14.

"We averaged attention weights of ViT-L/16 across all heads and then recursively multiplied the
weight matrices of all layers" (appendix D.8). The identity is added for the residual branch and the
rows are renormalised (google-research/vision_transformer#18). Rollout shows which patches the
output depends on. It does not depend on the class.
"""

import torch
from torch import Tensor

from vitcli.vit.config import ViTConfig

CLASS_TOKEN_POOLS = ("token", "token_mean", "distilled")


def add_residual(attention: Tensor) -> Tensor:
    """(B, H, T, T) -> (B, T, T): mean over the heads, plus the identity, rows sum to 1."""
    mean = attention.mean(dim=1)
    mean = mean + torch.eye(mean.shape[-1], device=mean.device, dtype=mean.dtype)
    return mean / mean.sum(dim=-1, keepdim=True)


def extend_rollout(rollout: Tensor | None, attention: Tensor) -> Tensor:
    """(B, T, T) of the layers so far and (B, H, T, T) of the next layer -> (B, T, T)."""
    layer = add_residual(attention)
    return layer if rollout is None else layer @ rollout


def rollout_source(config: ViTConfig) -> str:
    """The name of the tokens that the head reads: the rollout starts there."""
    if config.pool == "map":
        return "pooling query"
    return "class token" if config.pool in CLASS_TOKEN_POOLS else "mean of the patches"


def source_attention(matrix: Tensor, config: ViTConfig, pooled: Tensor | None = None) -> Tensor:
    """(..., T, T) -> (..., N): attention of the source to each patch.

    The source is the class token if the head reads it, else the mean over the patches. For pool
    `map` it is the mean weighted by `pooled` (..., N), the attention of the pooling query.
    """
    prefix = config.num_prefix_tokens
    to_patches = matrix[..., prefix:]  # (..., T, N)
    if config.pool in CLASS_TOKEN_POOLS:
        return to_patches[..., 0, :]
    if pooled is None:
        return to_patches[..., prefix:, :].mean(dim=-2)
    return (pooled[..., None, :] @ to_patches[..., prefix:, :])[..., 0, :]  # (..., N)

"""Pooling: from the tokens of the encoder to the vector that the head reads."""

import torch
from torch import Tensor, nn

from vitcli.vit.blocks import Mlp, attend, build_norm
from vitcli.vit.config import ViTConfig
from vitcli.vit.position import Grid


def pool_tokens(x: Tensor, config: ViTConfig, grid: Grid) -> Tensor:
    """(B, T, D) -> (B, pooled_dim): all poolings without weights (`map` is `AttentionPool`)."""
    patches = x[:, config.num_prefix_tokens :]  # (B, N, D)
    if config.pool == "token":
        return x[:, 0]  # the class token: y of equation 4
    if config.pool == "distilled":
        return x[:, :2].flatten(1)  # (B, 2 D): class token and distillation token
    if config.pool == "quadrants":
        return pool_quadrants(patches, grid)
    mean = patches.mean(dim=1)  # without prefix tokens, as in timm
    return mean if config.pool == "mean" else torch.cat([x[:, 0], mean], dim=1)  # (B, D or 2 D)


def pool_quadrants(patches: Tensor, grid: Grid) -> Tensor:
    """(B, N, D) -> (B, 4 D): means of upper left, upper right, lower left, lower right."""
    rows, cols = grid
    b, _, d = patches.shape
    x = patches.reshape(b, rows, cols, d)  # (B, rows, cols, D)
    # The middle row or column of an odd grid belongs to both sides.
    up, low = slice(0, (rows + 1) // 2), slice(rows // 2, rows)
    left, right = slice(0, (cols + 1) // 2), slice(cols // 2, cols)
    parts = [x[:, r, c].mean(dim=(1, 2)) for r in (up, low) for c in (left, right)]
    return torch.cat(parts, dim=1)  # (B, 4 D)


class AttentionPool(nn.Module):
    """One learned query attends to the patches, then an MLP (MAPHead in big_vision's vit.py)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        d = config.embed_dim
        self.num_heads = config.num_heads
        self.latent = nn.Parameter(torch.zeros(1, 1, d))
        self.q = nn.Linear(d, d)
        self.kv = nn.Linear(d, 2 * d)
        self.proj = nn.Linear(d, d)
        self.norm = build_norm(config, d)
        self.mlp = Mlp(d, config.mlp_dim, config.gelu)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, D) -> the query (B, H, 1, E), keys and values (B, H, N, E)."""
        b, n, d = x.shape
        heads = self.num_heads, d // self.num_heads  # H, E
        q = self.q(self.latent.expand(b, -1, -1)).reshape(b, 1, *heads).transpose(1, 2)
        k, v = self.kv(x).reshape(b, n, 2, *heads).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, D)."""
        b, _, d = x.shape
        x = attend(*self.heads(x)).transpose(1, 2).reshape(b, 1, d)  # (B, 1, D)
        x = self.proj(x)
        # No residual around the attention: the learned query carries nothing of the image.
        x = x + self.mlp(self.norm(x))
        return x[:, 0]


class PreLogits(nn.Module):
    """The hidden layer of the pre-training head: a dense layer and a tanh (section 3.1)."""

    def __init__(self, width: int, representation_size: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, representation_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, R)."""
        return torch.tanh(self.fc(x))

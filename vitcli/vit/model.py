"""The Vision Transformer, from pixels to logits.

Shape letters, used in every file: B images, C channels, Y X pixel rows and columns, P patch side,
N patches, T tokens, D width, H heads, E head width, K classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitcli.vit.blocks import build_blocks
from vitcli.vit.config import ViTConfig
from vitcli.vit.hybrid import HybridEmbed, init_stem
from vitcli.vit.patches import PatchEmbed, grid_size
from vitcli.vit.pool import AttentionPool, PreLogits, pool_tokens
from vitcli.vit.position import (
    Grid,
    Resize,
    carry,
    cross,
    fixed_table,
    is_position,
    table_shapes,
)


class VisionTransformer(nn.Module):
    """ViT of Dosovitskiy et al. (2020); tensor names are timm's.

    Attributes:
        config: what it is made of.
        position_resize: how positions are carried to the grid of images of another size.
        checkpoint_activations: in training keep only the input of each block (of a hybrid's ResNet,
            each unit) for the backward pass, which computes the rest again: one more pass for a
            fraction of the memory, and the same gradients.
        patch_drop_rate: share of the patches that training leaves out of an image, drawn anew each
            time (PatchDropout, Liu et al., 2022): less work, and a regulariser.
    """

    def __init__(self, config: ViTConfig, position_resize: Resize = "bicubic") -> None:
        super().__init__()
        self.config = config
        self.position_resize = position_resize
        self.checkpoint_activations = False
        self.patch_drop_rate = 0.0
        d, eps = config.embed_dim, config.norm_eps
        self.patch_embed = embedding(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, d)) if config.class_token else None
        self.dist_token = nn.Parameter(torch.zeros(1, 1, d)) if config.distillation_token else None
        registers = config.num_registers
        self.reg_token = nn.Parameter(torch.zeros(1, registers, d)) if registers else None
        for name, shape in table_shapes(config).items():
            if config.position == "sincos2d":  # a buffer: stored with the weights, never trained
                # On the meta device a file will fill it, and no memory is taken before that.
                empty = torch.zeros(shape)
                self.register_buffer(name, empty if empty.is_meta else fixed_table(config))
            else:
                self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        self.pos_drop = nn.Dropout(config.dropout_rate)
        self.norm_pre = nn.LayerNorm(d, eps=eps) if config.norm_before_blocks else nn.Identity()
        self.blocks = build_blocks(config)
        after = config.norm_after_pool
        self.norm = nn.Identity() if after else nn.LayerNorm(d, eps=eps)
        self.attn_pool = AttentionPool(config) if config.pool == "map" else None
        self.fc_norm = nn.LayerNorm(config.pooled_dim, eps=eps) if after else nn.Identity()
        size = config.representation_size
        self.pre_logits = PreLogits(config.pooled_dim, size) if size else nn.Identity()
        classes, width = config.num_classes, config.head_dim
        self.head = nn.Linear(width, classes) if classes else nn.Identity()
        two = classes and config.distillation_head
        self.head_dist = nn.Linear(width, classes) if two else None

    def init_weights(self, generator: torch.Generator | None = None) -> "VisionTransformer":
        """Draw fresh weights as the official code does, from `generator`; returns self.

        Dense and patch kernels Xavier-uniform, each of query, key and value by itself; MLP biases
        N(0, 1e-6); class token and heads 0; positions and further tokens N(0, 0.02). A zero head
        makes the first loss that of a uniform guess; the distillation token is not zero, because it
        would stay the class token's twin.
        """
        if isinstance(self.patch_embed, HybridEmbed):
            init_stem(self.patch_embed.backbone, generator)
        for name, p in self.named_parameters():
            if name.startswith("patch_embed.backbone."):
                continue
            if name.endswith(("qkv.weight", "mlp.fc1.weight")):
                # Several matrices in one: query, key and value; both halves of a SwiGLU.
                parts = 3 if name.endswith("qkv.weight") else p.shape[0] // self.config.mlp_dim
                for part in p.data.chunk(parts):
                    nn.init.xavier_uniform_(part, generator=generator)
            elif name.startswith("patch_embed") and p.ndim == 4:
                nn.init.xavier_uniform_(p.data.flatten(1), generator=generator)
            elif is_position(name) or name in ("dist_token", "reg_token", "attn_pool.latent"):
                nn.init.normal_(p, std=0.02, generator=generator)
            elif name.startswith(("head.", "head_dist.")) or name == "cls_token":
                nn.init.zeros_(p)
            elif p.ndim == 2:
                nn.init.xavier_uniform_(p, generator=generator)
            elif ".mlp." in name and name.endswith("bias"):
                nn.init.normal_(p, std=1e-6, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        return self

    def grid_of(self, images: Tensor) -> Grid:
        """(B, C, Y, X) -> rows and columns of patches."""
        return grid_size((images.shape[2], images.shape[3]), self.config.pixels_per_patch)

    def positions(self, grid: Grid, block: int = 0) -> Tensor | None:
        """(1, n, D): what is added to the last n tokens before block `block`; None for nothing.

        n is N, or T where the table has entries for prefix tokens too. Another grid than the
        configured one gets the table resampled, a fixed one too, so that a place in the picture
        keeps its code; differentiably, for training at several sizes.
        """
        config = self.config
        if not table_shapes(config) or (block and config.position_at == "stem"):
            return None
        own = block > 0 and config.position_at == "every"

        def table(name: str) -> Tensor:
            stored: Tensor = getattr(self, f"block_{name}" if own else name)
            stored = stored[block - 1 : block] if own else stored
            return carry(name, stored, config, grid, self.position_resize)

        if config.position == "learned2d":
            return cross(table("pos_embed_x"), table("pos_embed_y"))
        return table("pos_embed")

    def add_positions(self, x: Tensor, grid: Grid, block: int = 0) -> Tensor:
        """(B, T, D) -> (B, T, D): with the positions that belong before block `block`."""
        positions = self.positions(grid, block)
        if positions is None:
            return x
        uncovered = x.shape[1] - positions.shape[1]  # prefix tokens without an entry
        return x + nn.functional.pad(positions, (0, 0, uncovered, 0))

    def embed_patches(self, images: Tensor) -> Tensor:
        """(B, C, Y, X) -> (B, N, D): the patches, or those of a feature map, projected."""
        hybrid = isinstance(self.patch_embed, HybridEmbed)
        x: Tensor = self.patch_embed(images, self._again()) if hybrid else self.patch_embed(images)
        return x

    def embed(self, images: Tensor) -> Tensor:
        """(B, C, Y, X) -> (B, T, D): equation 1, patches with class token and positions."""
        return self.add_prefix(self.embed_patches(images), self.grid_of(images))

    def drop_patches(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, V, D): without a random `patch_drop_rate` of each image's patches."""
        prefix = self.config.num_prefix_tokens
        b, n, d = x.shape[0], x.shape[1] - prefix, x.shape[2]
        kept = max(1, n - round(self.patch_drop_rate * n))
        order = torch.rand(b, n, device=x.device).argsort(dim=1)[:, :kept]  # (B, kept)
        patches = x[:, prefix:].gather(1, order[..., None].expand(-1, -1, d))
        return torch.cat([x[:, :prefix], patches], dim=1)

    def add_prefix(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, N, D) embedded patches -> (B, T, D): class token, registers and positions."""
        tokens = [t for t in (self.cls_token, self.dist_token, self.reg_token) if t is not None]
        covered = self.config.num_covered_tokens > 0
        if not covered:
            x = self.add_positions(x, grid)
        if tokens:
            x = torch.cat([*(t.expand(x.shape[0], -1, -1).to(x.dtype) for t in tokens), x], dim=1)
        if covered:
            x = self.add_positions(x, grid)
        x = self.pos_drop(x)
        return x

    def _again(self) -> bool:
        return self.checkpoint_activations and self.training and torch.is_grad_enabled()

    def encode(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, T, D) -> (B, T, D): the blocks and the final norm (equations 2 to 4)."""
        return self.encode_last(x, grid, 1)[0]

    def encode_last(self, x: Tensor, grid: Grid, count: int) -> list[Tensor]:
        """(B, T, D) -> `count` times (B, T, D): the last blocks' outputs through the final norm."""
        x = self.norm_pre(x)
        again, found = self._again(), []
        for i, block in enumerate(self.blocks):
            if i:
                x = self.add_positions(x, grid, i)
            x = checkpoint(block, x, grid, use_reentrant=False) if again else block(x, grid)
            if i >= len(self.blocks) - count:
                found.append(self.norm(x))
        return found

    def tokens(self, images: Tensor) -> Tensor:
        """(B, C, Y, X) -> (B, T, D): all tokens after the final norm."""
        return self.tokens_last(images, 1)[0]

    def tokens_last(self, images: Tensor, count: int) -> list[Tensor]:
        """(B, C, Y, X) -> `count` times (B, T, D): the tokens after each of the last blocks."""
        x = self.embed(images)
        if self.training and self.patch_drop_rate:
            x = self.drop_patches(x)
        return self.encode_last(x, self.grid_of(images), count)

    def pool(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, T, D) -> (B, F): pooled as configured, normalised there if so, with pre-logits.

        Of one block's output; with `pool_blocks` = n, F is an n-th of `feature_dim`.
        """
        if self.attn_pool is not None:
            x = self.attn_pool(x[:, self.config.num_prefix_tokens :])  # (B, D)
        else:
            x = pool_tokens(x, self.config, grid)
        x = self.pre_logits(self.fc_norm(x))
        return x

    def pool_last(self, tokens: Sequence[Tensor], grid: Grid) -> Tensor:
        """`pool_blocks` times (B, T, D) -> (B, F): each pooled, one after the other."""
        pooled = [self.pool(x, grid) for x in tokens]
        return pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=1)  # (B, F)

    def features(self, images: Tensor) -> Tensor:
        """(B, C, Y, X) -> (B, F): the representation that the head reads, F = feature_dim."""
        tokens = self.tokens_last(images, self.config.pool_blocks)
        return self.pool_last(tokens, self.grid_of(images))

    def classify(self, features: Tensor) -> Tensor:
        """(B, F) -> (B, K): logits; the features where there is no head.

        Of two distilled heads each reads its own token, and the logits are their mean (DeiT).
        """
        if self.head_dist is None:
            logits: Tensor = self.head(features)
            return logits
        token, distilled = features.chunk(2, dim=-1)
        return (self.head(token) + self.head_dist(distilled)) / 2

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, Y, X) -> (B, K): logits; the features where there is no head."""
        return self.classify(self.features(images))


def embedding(config: ViTConfig) -> nn.Module:
    """What turns (B, C, Y, X) into (B, N, D): patches, or patches of a ResNet's feature map."""
    if config.stem is not None:
        return HybridEmbed(config)
    return PatchEmbed(config.num_channels, config.patch_size, config.embed_dim, config.patch_bias)
